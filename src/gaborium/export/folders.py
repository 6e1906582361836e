"""A layer, or a trained network, in several forms, as files in one folder."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gaborium import __version__
from gaborium.conversion import find_first_conv
from gaborium.errors import one_of, require
from gaborium.export.graphs import to_onnx
from gaborium.export.plain import LAYERS_OF_OURS, to_plain
from gaborium.export.saved import save_layer
from gaborium.export.tables import write_params
from gaborium.files import write_tensors, write_text
from gaborium.layers import GaborLayer, MixedConv, PairEnergy
from gaborium.training import Trained

# What each form is called in the folder; the graph of a network has a name of its own.
FORMATS = {
    "layer": "layer.safetensors",
    "json": "params.json",
    "csv": "params.csv",
    "skimage": "skimage.csv",
    "opencv": "opencv.csv",
    "plain": "plain.safetensors",
    "onnx": "layer.onnx",
}
_NETWORK_GRAPH = "network.onnx"
_OF_ANY = ("plain", "onnx")  # the others are of Gabor layers
_SIZE = 64  # px along each axis of the images that the graph of a layer takes


def write_formats(
    source: GaborLayer | MixedConv | Trained,
    folder: str | os.PathLike[str],
    formats: Collection[str] | None = None,
    *,
    size: int | None = None,
    facts: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Write a layer or a network in several forms, and a ``result.json`` that says what they are.

    Of a trained network, ``result.json`` says under ``input`` how images become what the network
    takes: its size, what bytes are divided by, and the mean and standard deviation of each channel.

    Args:
        source: a Gabor layer, or a network of ``load_trained``.
        folder: where to; it exists, and files of the same names are replaced.
        formats: of the Gabor layer, the first one of a network, ``"layer"``: a file of
            ``save_layer``; ``"json"`` and ``"csv"``: the parameters; ``"skimage"`` and
            ``"opencv"``: tables in these libraries' words. Of the whole: ``"plain"``: the state
            dict of ``to_plain(source)``; ``"onnx"``: the graph, in single precision. By default
            ``"json"``, ``"csv"`` and ``"plain"`` of a layer; of a network ``"layer"`` and
            ``"onnx"`` too, the last where ONNX is installed, and without a Gabor layer in it
            ``"plain"`` and ``"onnx"`` alone.
        size: px along each axis of the images that the graph of a layer takes, by default 64.
        facts: where it came from, by name.

    Returns:
        The names of the files.

    Raises:
        ImportError: a package that a form needs is not installed.
        OSError: a file cannot be written, with the reason.
        TypeError: ``source`` is neither.
        ValueError: a form is none of these, or cannot be made of this layer or network, ``to_csv``
            and ``to_onnx`` say when; or ``size`` is given for a network, which has its own.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from gaborium import GaborConv2d
        >>> with TemporaryDirectory() as folder:
        ...     write_formats(GaborConv2d(1, 4, 9), folder, ["csv", "opencv"])
        ('params.csv', 'opencv.csv', 'result.json')
    """
    if not isinstance(source, (Trained, *LAYERS_OF_OURS)):
        raise TypeError(
            f"source must be a Gabor layer or a Trained network, got {type(source).__name__}."
        )
    model = source.network if isinstance(source, Trained) else source
    layer: Any = gabor_part(model)
    example = _example(source, size)
    formats = _default(source, layer) if formats is None else formats
    chosen = [one_of("formats", name, FORMATS) for name in dict.fromkeys(formats)]
    for name in chosen:
        if layer is None and name not in _OF_ANY:
            raise ValueError(
                "A network that begins with an ordinary convolution has no Gabor parameters: "
                f"its formats are {', '.join(map(repr, _OF_ANY))}, got {name!r}."
            )
    writers: dict[str, Callable[[Path], None]] = {
        "layer": lambda path: save_layer(layer, path),
        "json": lambda path: write_params(layer, path),
        "csv": lambda path: write_params(layer, path),
        "skimage": lambda path: write_params(layer, path, "skimage"),
        "opencv": lambda path: write_params(layer, path, "opencv"),
        "plain": lambda path: _write_plain(model, path),
        # Not every runtime has convolutions in other precisions.
        "onnx": lambda path: to_onnx(copy.deepcopy(model).float(), path, example),
    }
    written = {}
    for name in chosen:
        whole = isinstance(source, Trained) and name == "onnx"
        path = Path(folder, _NETWORK_GRAPH if whole else FORMATS[name])
        writers[name](path)
        written[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    first: Any = find_first_conv(model)[1] if layer is None else layer
    record = {
        "format": "gaborium.export",
        "version": 1,
        "gaborium": __version__,
        "layer": repr(first),
        "filters": {**_counts(model, first), "size": list(first.kernel_size)},
        **({"input": _input(source)} if isinstance(source, Trained) else {}),
        "facts": dict(facts or {}),
        "files": written,
    }
    write_text(Path(folder, "result.json"), json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    return (*written, "result.json")


def gabor_part(model: nn.Module) -> nn.Module | None:
    """The first Gabor layer in a network, whole with its free filters; or the layer itself."""
    return next((part for part in model.modules() if isinstance(part, LAYERS_OF_OURS)), None)


def is_paired(model: nn.Module, first: nn.Module) -> bool:
    """Whether a network takes a first layer's channels for pairs, of which it takes the norms."""
    return any(isinstance(part, PairEnergy) and part.pairs is first for part in model.modules())


def _counts(model: nn.Module, first: Any) -> dict[str, int]:
    """How many filters of each kind a first layer has; a pair of kernels is one."""
    mixed, gabor = isinstance(first, MixedConv), isinstance(first, LAYERS_OF_OURS)
    n_gabor = (first.gabor if mixed else first).n_filters if gabor else 0
    n_free = len(first.free) if mixed else 0 if gabor else first.out_channels
    return {"gabor": n_gabor, "free": n_free // (1 + is_paired(model, first))}


def _default(source: Any, layer: nn.Module | None) -> list[str]:
    if not isinstance(source, Trained):
        return ["json", "csv", "plain"]
    formats = ["plain"] if layer is None else ["layer", "json", "csv", "plain"]
    try:
        for package in ("onnx", "onnxscript"):
            require(package, extra="onnx", purpose="ONNX files")
    except ImportError as error:
        warnings.warn(f"{_NETWORK_GRAPH} is left out: {error}", stacklevel=3)
        return formats
    return [*formats, "onnx"]


def _example(source: Any, size: int | None) -> torch.Tensor:
    """Two images as the graph takes them."""
    if not isinstance(source, Trained):
        place = next(source.parameters(), next(source.buffers(), torch.empty(0))).device
        shape = (2, source.in_channels, *[size or _SIZE] * source.n_dims)
        return torch.zeros(shape, device=place)
    own = source.inputs.image_size
    if size is not None:
        raise ValueError(
            f"size is for a layer; this network takes images of {' x '.join(map(str, own))} px, "
            "with which it was trained. Leave it out."
        )
    place = next(source.network.parameters()).device
    return torch.zeros(2, source.inputs.n_channels, *own, device=place)


def _input(trained: Trained) -> dict[str, Any]:
    inputs = trained.inputs
    return {
        "n_channels": inputs.n_channels,
        "size": list(inputs.image_size),
        "divided_by": 255 if inputs.n_dims == 2 else 1,
        "mean": list(inputs.mean),
        "std": list(inputs.std),
        "classes": list(inputs.classes),
    }


def _write_plain(model: nn.Module, path: Path) -> None:
    plain = to_plain(model)
    facts = {"format": 1, "name": "gaborium.plain", "layer": " ".join(repr(plain).split())}
    write_tensors(path, plain.state_dict(), facts)
