"""Networks with Gabor layers on the Hugging Face Hub, or in a folder of its form."""

from __future__ import annotations

import functools
import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gaborium.errors import require
from gaborium.files import read_tensors, write_tensors
from gaborium.params import RECORDS, Gabor

_NEED = {"extra": "hub", "purpose": "Models of the Hugging Face Hub"}
_FORMAT = 1
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_RECORDS = {record.__name__: record for record in RECORDS.values()}


def add_hub(model: type[nn.Module]) -> Any:
    """A class with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    These are the methods of huggingface_hub's ``PyTorchModelHubMixin``, with its arguments.

    Convention:
        - ``config.json`` holds the arguments that the model was built with; dtypes and records
          may be among them. A device is not kept, and what JSON cannot hold is an error
        - ``model.safetensors`` holds the state dict and a checksum; nothing is ever unpickled
        - ``from_pretrained`` wants every tensor and no other, and returns a model in evaluation
          mode
        - a folder is read and written without a network

    Args:
        model: a class of modules: a Gabor layer's, or that of a network of yours, of which this
            may be the decorator.

    Returns:
        A class derived from ``model``, of the same name.

    Raises:
        ImportError: huggingface_hub or safetensors is not installed.
        TypeError: ``model`` is no class of modules.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from gaborium import GaborConv2d
        >>> HubConv = add_hub(GaborConv2d)
        >>> layer = HubConv(3, 8, kernel_size=9, dtype=torch.float64)
        >>> with TemporaryDirectory() as folder:
        ...     layer.save_pretrained(folder)
        ...     again = HubConv.from_pretrained(folder)
        >>> image = torch.rand(1, 3, 32, 32, dtype=torch.float64)
        >>> torch.equal(again(image), layer(image))
        True
    """
    if not isinstance(model, type) or not issubclass(model, nn.Module):
        raise TypeError(f"model must be a class of modules, got {model!r:.80}.")
    names = ("__module__", "__qualname__", "__doc__")
    return type(model.__name__, (model, _mixin()), {name: getattr(model, name) for name in names})


@functools.cache
def _mixin() -> Any:
    hub = require("huggingface_hub", **_NEED)
    require("safetensors", **_NEED)

    class HubModel(hub.PyTorchModelHubMixin):  # type: ignore[name-defined,misc]
        """What ``add_hub`` adds."""

        _unkept: tuple[str, ...] = ()

        def __init_subclass__(cls, **kwargs: Any) -> None:
            given = {"library_name": "gaborium", "tags": ["gabor"], **kwargs}
            super().__init_subclass__(**given)

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            # __init__ gets them as they are; what is kept of them must be plain.
            plain = {name: _encoded(value) for name, value in kwargs.items()}
            instance = super().__new__(cls, *map(_encoded, args), **plain)
            config = instance._hub_mixin_config or {}
            config.pop("device", None)
            given = {*_names(cls)[: len(args)], *kwargs}
            instance._unkept = tuple(sorted(given - {"device", *config}))
            return instance

        def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
            """Write the model into a folder; see ``add_hub`` and huggingface_hub."""
            if self._unkept and kwargs.get("config") is None:
                raise ValueError(
                    f"{type(self).__name__} was built with {', '.join(self._unkept)}, which "
                    f"{_CONFIG} cannot hold; build it from numbers, texts, dtypes and records."
                )
            return super().save_pretrained(save_directory, **kwargs)

        def _save_pretrained(self, save_directory: Path) -> None:
            facts = {"format": _FORMAT, "name": "gaborium.model"}
            write_tensors(save_directory / _WEIGHTS, self.state_dict(), facts, **_NEED)

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
            """Read a model from a folder or from the Hub; see ``add_hub`` and huggingface_hub."""
            path = pretrained_model_name_or_path
            if Path(path).is_dir():
                _check_config(Path(path, _CONFIG))
            elif isinstance(path, Path) or path.startswith((".", "/", "~")):
                raise FileNotFoundError(f"There is no folder {os.fspath(path)!r}.")
            return super().from_pretrained(path, **kwargs)

        @classmethod
        def _from_pretrained(
            cls,
            *,
            model_id: str,
            revision: str | None,
            cache_dir: str | Path | None,
            force_download: bool,
            local_files_only: bool,
            token: str | bool | None,
            map_location: str = "cpu",
            strict: bool = True,
            **arguments: Any,
        ) -> Any:
            file = Path(model_id, _WEIGHTS)
            if not Path(model_id).is_dir():
                file = Path(
                    hub.hf_hub_download(
                        repo_id=model_id,
                        filename=_WEIGHTS,
                        revision=revision,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        token=token,
                        local_files_only=local_files_only,
                    )
                )
            elif not file.is_file():
                raise FileNotFoundError(f"{model_id!r} has no {_WEIGHTS}; save the model again.")
            tensors, _ = read_tensors(
                file, newest=_FORMAT, what="weights of save_pretrained", again="save them again",
                **_NEED,
            )  # fmt: skip
            try:
                model = cls(**{name: _decoded(value) for name, value in arguments.items()})
                model.load_state_dict(tensors, strict=strict)
            except (LookupError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{model_id!r} is no {cls.__name__}: {' '.join(str(error).split()):.300}"
                ) from None
            return model.to(map_location).eval()

    return HubModel


def _names(model: Any) -> list[str]:
    return list(inspect.signature(model.__init__).parameters)[1:]


def _check_config(file: Path) -> None:
    """The mixin would go on without a config, and build another model."""
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{str(file.parent)!r} has no {_CONFIG}; give a folder of save_pretrained."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is no JSON ({error}); save the model again.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{str(file)!r} holds no arguments by name; save the model again.")


# -- arguments that JSON has no word for ------------------------------------------------------


def _encoded(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Gabor):
        return json.loads(value.to_json())
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def _decoded(value: Any) -> Any:
    """An argument as it was given: by its own mark, whatever the annotation says."""
    if isinstance(value, dict) and set(value) == {"dtype"}:
        dtype = getattr(torch, str(value["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"there is no dtype {value['dtype']!r}")
        return dtype
    if isinstance(value, dict) and value.get("type") in _RECORDS:
        return _RECORDS[value["type"]].from_json(json.dumps(value))
    return value
