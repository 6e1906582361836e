"""A layer in several forms, as files in one folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from gaborium import __version__
from gaborium.errors import one_of
from gaborium.export.graphs import to_onnx
from gaborium.export.plain import to_plain
from gaborium.export.tables import write_params
from gaborium.files import write_tensors, write_text
from gaborium.mixed import GaborLayer, MixedConv

# What each form is called in the folder.
FORMATS = {
    "json": "params.json",
    "csv": "params.csv",
    "skimage": "skimage.csv",
    "opencv": "opencv.csv",
    "plain": "plain.safetensors",
    "onnx": "layer.onnx",
}


def write_formats(
    layer: GaborLayer | MixedConv,
    folder: str | os.PathLike[str],
    formats: Collection[str] = ("json", "csv", "plain"),
    *,
    size: int = 64,
    facts: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Write a layer in several forms, and a ``result.json`` that says what they are.

    Args:
        layer: a Gabor layer.
        folder: where to; it exists, and files of the same names are replaced.
        formats: ``"json"`` and ``"csv"``: the parameters; ``"skimage"`` and ``"opencv"``: tables
            in these libraries' words; ``"plain"``: the state dict of ``to_plain(layer)``;
            ``"onnx"``: the layer as a graph.
        size: px along each axis of the images that the graph takes.
        facts: where the layer came from, by name.

    Returns:
        The names of the files.

    Raises:
        ImportError: a package that a form needs is not installed.
        OSError: a file cannot be written, with the reason.
        TypeError: ``layer`` is no Gabor layer.
        ValueError: a form is none of these, or cannot be made of this layer; ``to_csv`` and
            ``to_onnx`` say when.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from gaborium import GaborConv2d
        >>> with TemporaryDirectory() as folder:
        ...     write_formats(GaborConv2d(1, 4, 9), folder, ["csv", "opencv"])
        ('params.csv', 'opencv.csv', 'result.json')
    """
    chosen = [one_of("formats", name, FORMATS) for name in dict.fromkeys(formats)]
    writers: dict[str, Callable[[Path], None]] = {
        "json": lambda path: write_params(layer, path),
        "csv": lambda path: write_params(layer, path),
        "skimage": lambda path: write_params(layer, path, "skimage"),
        "opencv": lambda path: write_params(layer, path, "opencv"),
        "plain": lambda path: _write_plain(layer, path),
        "onnx": lambda path: to_onnx(layer, path, _image(layer, size)),
    }
    written = {}
    for name in chosen:
        path = Path(folder, FORMATS[name])
        writers[name](path)
        written[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    record = {
        "format": "gaborium.export",
        "version": 1,
        "gaborium": __version__,
        "layer": repr(layer),
        "facts": dict(facts or {}),
        "files": written,
    }
    write_text(Path(folder, "result.json"), json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    return (*written, "result.json")


def _image(layer: Any, size: int) -> torch.Tensor:
    like = next(layer.parameters(), next(layer.buffers(), torch.empty(0)))
    return like.new_zeros(2, layer.in_channels, *[size] * layer.n_dims)


def _write_plain(layer: Any, path: Path) -> None:
    plain = to_plain(layer)
    facts = {"format": 1, "name": "gaborium.plain", "layer": " ".join(repr(plain).split())}
    write_tensors(path, plain.state_dict(), facts, extra="export", purpose="Saved layers")
