"""Layers in files of their own: what they are made of, and the numbers in them, with a checksum."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gaborium import __version__
from gaborium.errors import as_sizes, one_of
from gaborium.files import read_tensors, write_tensors
from gaborium.images import cannot_read
from gaborium.layers import LAYERS, GaborLayer, MixedConv
from gaborium.params import RECORDS, UNITS, Gabor
from gaborium.starts import STARTS

# Raised when what a file says changes; then load_layer keeps a reader for the old one.
FORMAT = 1
_NAME = "gaborium.layer"
_KINDS: dict[str, Any] = {layer.__name__: layer for layer in LAYERS.values()}
_AGAIN = "save the layer again"


def save_layer(layer: GaborLayer | MixedConv, path: str | os.PathLike[str]) -> None:
    """Write a layer into a safetensors file, all or nothing.

    Convention:
        - the tensors are those of ``layer.state_dict()``, bit for bit
        - the metadata holds, as one JSON text under ``gaborium``: ``name`` ("gaborium.layer"),
          ``format`` (1), ``gaborium`` (the version that wrote it), ``class``, ``arguments`` of the
          constructor, ``frozen`` (parameters that need no gradient), ``units`` of the record's
          fields, and ``sha256`` of the file with 64 zeros in the checksum's place
        - equal layers make equal bytes; the device is not kept

    Args:
        layer: a ``GaborConv1d``, ``GaborConv2d``, ``GaborConv3d`` or ``MixedConv``.
        path: the file, in a folder that exists; an existing file is replaced.

    Raises:
        ImportError: safetensors is not installed.
        OSError: it cannot be written there. What was there before stays.
        TypeError: ``layer`` is something else, or of a class derived from these.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from gaborium import GaborConv2d
        >>> with TemporaryDirectory() as folder:
        ...     save_layer(GaborConv2d(3, 8, 9, stride=2), f"{folder}/first.safetensors")
        ...     layer = load_layer(f"{folder}/first.safetensors")
        >>> layer.stride, layer.params.orientation.shape
        ((2, 2), torch.Size([8, 1]))
    """
    facts = {
        "name": _NAME,
        "format": FORMAT,
        "gaborium": __version__,
        **_described(layer),
        "frozen": [name for name, value in layer.named_parameters() if not value.requires_grad],
        "units": {name: UNITS[name] for name in RECORDS[layer.n_dims].field_names()},
    }
    write_tensors(path, layer.state_dict(), facts)


def load_layer(path: str | os.PathLike[str]) -> Any:
    """Read what ``save_layer`` has written, and verify its checksum.

    Nothing in the file is executed, and no more memory is taken than its size asks for.

    Args:
        path: the file.

    Returns:
        A new layer of the class that was saved, on the CPU, in training mode.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be read.
        ValueError: it is cut off or damaged, holds no layer, or has a format that this version
            does not read; the message names the version that does.
    """
    shown = repr(os.fspath(path))
    try:
        tensors, facts = read_tensors(path, kind="layer", newest=FORMAT)
    except OSError as error:
        raise cannot_read(shown, error, what="layer") from None
    if facts["format"] not in _READERS:
        raise ValueError(
            f"{shown} has format {facts['format']}, which this version does not read; load it "
            f"with gaborium {facts.get('gaborium')}, which wrote it."
        )
    try:
        return _READERS[facts["format"]](tensors, facts)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{shown} does not hold a whole layer ({told:.300}); {_AGAIN} with save_layer."
        ) from None


# -- layer → facts ----------------------------------------------------------------------------


def _described(layer: Any) -> dict[str, Any]:
    if type(layer) is MixedConv:
        arguments = {"gabor": _described(layer.gabor), "seed": layer.seed}
    elif type(layer) in _KINDS.values():
        arguments = {
            name: _argument(layer, name)
            for name in inspect.signature(type(layer)).parameters
            if name != "device"
        }
    else:
        raise TypeError(
            f"layer must be a {', '.join(_KINDS)} or MixedConv itself, got "
            f"{type(layer).__name__}; save the state_dict() of other modules."
        )
    return {"class": type(layer).__name__, "arguments": arguments}


def _argument(layer: Any, name: str) -> Any:
    """What to give the constructor for one of its arguments, as JSON has it."""
    if name == "bias":
        return layer.bias is not None
    if name == "dtype":
        return str(layer.log_sigma.dtype).removeprefix("torch.")
    if name == "learn":
        return [field for field in RECORDS[layer.n_dims].field_names() if field in layer.learn]
    if name == "min_wavelength":
        return layer.raw_coordinates.min_wavelength
    value = getattr(layer, name)
    return json.loads(value.to_json()) if isinstance(value, Gabor) else value


# -- facts → layer ----------------------------------------------------------------------------


def _read_1(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> nn.Module:
    layer: nn.Module
    if facts["class"] == "MixedConv":
        arguments = facts["arguments"]
        inner = {n.removeprefix("gabor."): v for n, v in tensors.items() if n.startswith("gabor.")}
        layer = MixedConv(
            _gabor(arguments["gabor"], inner), tensors["free"], seed=arguments["seed"]
        )
    else:
        layer = _gabor(facts, tensors)
    # Assigned, not copied: every tensor stays as it is in the file, its dtype included.
    layer.load_state_dict(tensors, assign=True)
    for name in facts["frozen"]:
        layer.get_parameter(name).requires_grad_(False)
    return layer


def _gabor(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """A Gabor layer of these arguments, whose parameters are still to be loaded."""
    kind = _KINDS[one_of("class", described["class"], (*_KINDS, "MixedConv"))]
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in described["arguments"].items()
    }
    record = RECORDS[kind.n_dims]
    start = given.pop("start")
    start = (
        record.from_json(json.dumps(start))
        if isinstance(start, dict)
        else one_of("start", start, STARTS)
    )
    dtype = getattr(torch, given.pop("dtype"))
    for name in ("kernel_size", "stride", "dilation"):
        as_sizes(name, given[name], kind.n_dims)
    _check_channels(given, tensors)
    # The named starts sample kernels; this one fits any kernel and needs none.
    narrow = record.of(wavelength=2 * (given["min_wavelength"] or 2.0), sigma=0.25)
    layer = kind(**given, dtype=dtype, start=narrow)
    layer.start = start
    return layer


def _check_channels(given: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A layer is made only as large as the numbers that are there for it."""
    sizes = [given[name] for name in ("in_channels", "out_channels", "groups")]
    if any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"channels and groups must be positive whole numbers, got {sizes}")
    n_in, n_out, groups = sizes
    expected = (n_out // 2 if given["output"] == "quadrature" else n_out, n_in // groups)
    held = tuple(tensors["even" if "even" in tensors else "phase"].shape)
    if held != expected:
        raise ValueError(f"phases must have shape {expected}, got {held}")


_READERS = {1: _read_1}
