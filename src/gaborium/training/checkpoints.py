"""Checkpoints: the whole state of a training in one file, safe from kills and full disks."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gaborium.files import read_tensors, write_tensors

RUN_FILE = "run.safetensors"  # in place of checkpoints, what a finished run found
_KEPT = 2
_NAME = re.compile(r"checkpoint-(\d+)\.safetensors")


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write nested state, such as state dicts of modules and optimizers, all or nothing.

    Args:
        path: the file, in a folder that exists; an existing file is replaced when the new one is
            whole and on the disk.
        state: dicts with texts or whole numbers as keys, lists and tuples, of tensors, numbers,
            texts, truth values and ``None``.

    Raises:
        ImportError: safetensors is not installed.
        OSError: it cannot be written there. What was there before stays.
        TypeError: the state holds something else.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> module = torch.nn.Linear(2, 3)
        >>> adam = torch.optim.Adam(module.parameters())
        >>> with TemporaryDirectory() as folder:
        ...     save_state(f"{folder}/now.safetensors", {"adam": adam.state_dict(), "step": 0})
        ...     state = load_state(f"{folder}/now.safetensors")
        >>> state["adam"]["param_groups"][0]["betas"], state["step"]
        ((0.9, 0.999), 0)
    """
    tensors: dict[str, Tensor] = {}
    facts = {
        "name": "gaborium.checkpoint",
        "format": 1,
        "state": _flattened(dict(state), "state", tensors),
    }
    write_tensors(path, tensors, facts)


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what ``save_state`` has written, tensors on the CPU; nothing is unpickled.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be read.
        ValueError: it is cut off or damaged, is no checkpoint, or has a newer format.
    """
    tensors, facts = read_tensors(path, kind="checkpoint")
    return _nested(facts["state"], tensors)


class Checkpoints:
    """The checkpoints of one run: written by step, and only the last two kept.

    Args:
        folder: where they lie; it exists.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def paths(self) -> list[Path]:
        """The files, oldest first."""
        found = {path: _NAME.fullmatch(path.name) for path in self.folder.iterdir()}
        return sorted(
            (path for path, match in found.items() if match),
            key=lambda path: int(path.stem.partition("-")[2]),
        )

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write the state after a step, then remove what is older than the one before.

        Raises:
            OSError: it cannot be written; the earlier ones stay.
        """
        save_state(self.folder / f"checkpoint-{step:09}.safetensors", state)
        for path in self.paths()[:-_KEPT]:
            path.unlink()

    def latest(self) -> dict[str, Any] | None:
        """The newest state that is whole, or ``None`` where there is no checkpoint.

        A damaged one is told in a warning, and the one before is taken.

        Raises:
            ValueError: all of them are damaged.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return load_state(path)
            except ValueError as error:
                if path == paths[0]:
                    raise
                warnings.warn(f"{error} Taking the checkpoint before it.", stacklevel=2)
        return None


def _flattened(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value with every container tagged and every tensor replaced by its name."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        if not all(isinstance(key, (str, int)) for key in value):
            raise TypeError(f"{name} must have texts or whole numbers as keys, got {list(value)}.")
        pairs = [[key, _flattened(item, f"{name}.{key}", tensors)] for key, item in value.items()]
        return {"dict": pairs}
    if isinstance(value, (list, tuple)):
        items = [_flattened(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{name} must be made of tensors, numbers and texts to be saved, got "
        f"{type(value).__name__}."
    )


def _nested(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of ``_flattened``."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _nested(item, tensors) for key, item in content}
    items = [_nested(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
