"""Trained networks by name, as transformers and timm know them, without running their code."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

_LIBRARIES = ("transformers", "timm")
_LISTED = 4  # weights in a message before "and more"


def names_network(name: str | os.PathLike[str]) -> bool:
    """Whether ``load_network`` is meant: a library's name with its prefix, or a saved network.

    Example:
        >>> names_network("transformers:microsoft/resnet-18"), names_network("model.pt")
        (True, False)
    """
    text = os.fspath(name)
    return text.startswith(tuple(f"{library}:" for library in _LIBRARIES)) or _is_saved(Path(text))


def load_network(name: str | os.PathLike[str]) -> nn.Module:
    """Load a trained network by its name, or from a folder that transformers has written.

    Of transformers weights are read from safetensors files alone, and of timm from these or from
    files of nothing but tensors. Code that comes with a network is never run, and nothing is
    unpickled.

    Args:
        name: ``"transformers:NAME"`` or ``"timm:NAME"`` with a name that the library knows, which
            is fetched and kept in its cache; or the folder of ``save_pretrained``.

    Returns:
        The network as it was saved, with its head, in evaluation mode and on the CPU.

    Raises:
        ImportError: the library is not installed.
        OSError: there is no such network or weights as safetensors, or it cannot be fetched.
        ValueError: ``name`` is none of these, or the library cannot build the network.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import ResNetConfig, ResNetModel
        >>> small = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
        >>> with TemporaryDirectory() as folder:
        ...     ResNetModel(small).save_pretrained(folder)
        ...     network = load_network(folder)
        >>> from gaborium.conversion import find_first_conv
        >>> find_first_conv(network)[0]
        'embedder.embedder.convolution'
    """
    text = os.fspath(name)
    if not names_network(text):
        raise ValueError(
            f"A network must be transformers:NAME, timm:NAME or a folder of save_pretrained with "
            f"its config.json, got {text!r}."
        )
    library, _, known = text.partition(":")
    if _is_saved(Path(text)):
        library, known = "transformers", text
    module = _library(library)  # before, as it sets the levels of its loggers
    with _careful(library, known):
        if library == "timm":
            network = module.create_model(known, pretrained=True)
        else:
            network = _of_transformers(module, known)
    return network.eval()


def _is_saved(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise  # the package is there; something it needs is not
        raise ImportError(
            f"Networks of {name} need {name}: pip install {name}.", name=name
        ) from None


def _of_transformers(transformers: Any, name: str) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    # The class that the weights were saved from: AutoModel would leave its head out.
    named = [getattr(transformers, kind, None) for kind in config.architectures or ()]
    kinds: list[Any] = [
        kind
        for kind in named
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    ]
    network, told = (kinds or [transformers.AutoModel])[0].from_pretrained(
        name,
        config=config,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = sorted(told["missing_keys"])
    if missing:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        warnings.warn(
            f"The weights of {name!r} lack {', '.join(missing[:_LISTED])}{more}; these are random.",
            stacklevel=3,
        )
    return network


@contextmanager
def _careful(library: str, name: str) -> Iterator[None]:
    """Unpickle nothing, hear no advice for other callers, and tell what fails in one line."""
    variables = {
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": None,  # of both, torch takes neither
    }
    before = {variable: os.environ.pop(variable, None) for variable in variables}
    loggers = [logging.getLogger(each) for each in (*_LIBRARIES, "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        _set(variables)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # libraries, hubs and damaged files fail in every way there is
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(_told(library, name, str(error) or type(error).__name__)) from None
    finally:
        _set(before)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _set(variables: dict[str, str | None]) -> None:
    for variable, value in variables.items():
        if value is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = value


def _told(library: str, name: str, text: str) -> str:
    if "trust_remote_code" in text:
        detail = "it comes with code of its own, which is never run"
    elif "weights_only" in text or "Weights only" in text:
        detail = "its weights need unpickling, which can run code; take one with safetensors"
    else:
        advice = "save it again" if _is_saved(Path(name)) else "check the name and the connection"
        detail = " ".join(text.split())[:200].split(". ")[0].rstrip(".,") + f"; {advice}"
    return f"{library} cannot load {name!r}: {detail}."
