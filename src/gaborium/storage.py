"""Layers in files, as tables, as ordinary convolutions and as ONNX graphs."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gaborium.functions.params import RECORDS, UNITS, Gabor
from gaborium.interop import from_opencv, from_skimage, to_opencv, to_skimage
from gaborium.layers import GABOR_LAYERS, GaborLayer, MixedConv
from gaborium.support import csv_text, one_of, read_tensors, require, write_bytes, write_tensors

_FORMAT = 1  # of saved layers; a higher one needs a reader for the older ones
_LAYERS: dict[str, Any] = {kind.__name__: kind for kind in (*GABOR_LAYERS, MixedConv)}


# -- files of layers --------------------------------------------------------------------------


def save_layer(layer: GaborLayer | MixedConv, path: str | os.PathLike[str]) -> None:
    """Write a layer into a safetensors file, all or nothing.

    Convention:
        - the tensors are ``layer.state_dict()``, bit for bit
        - the metadata is one JSON text under ``gaborium``: the class, the arguments of its
          constructor, the parameters without gradient, units, and a checksum of the file
        - equal layers make equal bytes; the device is not saved

    Args:
        layer: a ``GaborConv1d``, ``GaborConv2d``, ``GaborConv3d`` or ``MixedConv``.
        path: the file, in a folder that exists; an existing file is replaced.

    Raises:
        ImportError: safetensors is not installed.
        OSError: it cannot be written there; an old file stays.
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
    metadata = {
        "name": "gaborium.layer",
        "format": _FORMAT,
        "gaborium": version("gaborium"),
        **_description(layer),
        "frozen": [name for name, value in layer.named_parameters() if not value.requires_grad],
        "units": {name: UNITS[name] for name in RECORDS[layer.n_dims].field_names()},
    }
    write_tensors(path, layer.state_dict(), metadata)


def load_layer(path: str | os.PathLike[str]) -> Any:
    """Read a file of ``save_layer`` and verify its checksum. Nothing in it is executed.

    Args:
        path: the file.

    Returns:
        A new layer of the class that was saved, on the CPU, in training mode.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be read.
        ValueError: it is damaged, holds no layer, or has a newer format.
    """
    tensors, metadata = read_tensors(path, kind="layer")
    try:
        # The start that the tensors replace is drawn and judged without a trace.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = _new_layer(metadata, tensors)
        # Assigned and not copied, so that every tensor keeps its dtype.
        layer.load_state_dict(tensors, assign=True)
        for name in metadata["frozen"]:
            layer.get_parameter(name).requires_grad_(False)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} does not hold a whole layer: {_first_line(error)}."
        ) from None
    return layer


def _description(layer: Any) -> dict[str, Any]:
    """The class of a layer and the arguments of its constructor, as JSON values."""
    kind = type(layer)
    if kind not in _LAYERS.values():
        raise TypeError(
            f"layer must be a {', '.join(_LAYERS)}, got {kind.__name__}; save the state_dict() of "
            "other modules."
        )
    if kind is MixedConv:
        arguments = {"gabor": _description(layer.gabor), "seed": layer.seed}
        return {"class": kind.__name__, "arguments": arguments}
    arguments = layer.arguments()
    del arguments["device"]
    arguments["dtype"] = str(arguments["dtype"]).removeprefix("torch.")
    if isinstance(layer.start, Gabor):
        arguments["start"] = json.loads(layer.start.to_json())
    return {"class": kind.__name__, "arguments": arguments}


def _new_layer(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """A layer of ``_description``; the tensors give the number of free filters."""
    kind, arguments = _LAYERS[description["class"]], description["arguments"]
    if kind is MixedConv:
        gabor = _new_layer(arguments["gabor"], tensors)
        return MixedConv(gabor, tensors["free"], seed=arguments["seed"])
    start, dtype = arguments["start"], getattr(torch, arguments["dtype"])
    if isinstance(start, dict):
        start = RECORDS[kind.n_dims].from_json(json.dumps(start))
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in arguments.items()}
    return kind(**given | {"start": start, "dtype": dtype})


# -- plain networks ---------------------------------------------------------------------------


def to_plain(model: nn.Module) -> nn.Module:
    """A copy of a network in which every Gabor layer is an ordinary convolution.

    Convention:
        - every ``GaborConvNd`` and ``MixedConv`` becomes one ``nn.ConvNd``; with an energy output
          it becomes a ``PairEnergy``: a convolution, the norm of each pair of channels, the bias
        - a layer that occurs in several places of the network stays one layer
        - layers of derived classes stay as they are, since they may compute something else
        - all kernels of the copy are parameters and learn freely; hooks of replaced layers are lost

    Args:
        model: any network, or a layer; it is not changed.

    Returns:
        The copy with equal outputs, on the same devices, of the same dtypes and training modes.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> import torch
        >>> from gaborium import GaborConv2d
        >>> network = nn.Sequential(GaborConv2d(3, 8, 9, output="energy"), nn.ReLU())
        >>> plain = to_plain(network)
        >>> image = torch.rand(1, 3, 32, 32)
        >>> torch.equal(plain(image), network(image)), plain[0].pairs
        (True, Conv2d(3, 16, kernel_size=(9, 9), stride=(1, 1), bias=False))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}.")
    root = nn.ModuleList([copy.deepcopy(model)])  # in which a layer alone has a place, too
    plain: Any = cache(lambda layer: layer.to_conv())  # a layer in several places stays one layer
    for parent in list(root.modules()):
        for name, layer in parent._modules.items():
            if type(layer) in _LAYERS.values():
                parent._modules[name] = plain(layer)
    return root[0]


# -- ONNX -------------------------------------------------------------------------------------


def to_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Tensor | tuple[Any, ...],
) -> None:
    """Write a network as an ONNX file, for inference, all or nothing.

    Convention:
        - ``to_plain(model)`` in evaluation mode is written: one ``Conv`` node with the present
          kernels for each Gabor layer; an energy output adds the norm of pairs
        - the first axis of every tensor in ``example`` is the batch, of any size; the other axes
          have the sizes of the example
        - the network computes in its own dtype

    Args:
        model: any network with or without Gabor layers, or a layer; it is not changed.
        path: the file, in a folder that exists; an existing file is replaced.
        example: a batch, or a tuple of the network's arguments, on its device.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        OSError: it cannot be written there; an old file stays.
        TypeError: ``model`` is no module.
        ValueError: the network does not run on ``example``, depends on the size of the batch,
            needs an operator that ONNX lacks, or exceeds the 2 GB that one ONNX file holds.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from gaborium import GaborConv2d
        >>> network = nn.Sequential(GaborConv2d(1, 4, 7), nn.ReLU())
        >>> with TemporaryDirectory() as folder:
        ...     to_onnx(network, f"{folder}/network.onnx", torch.rand(1, 1, 16, 16))
        ...     [file.name for file in Path(folder).iterdir()]
        ['network.onnx']
    """
    require("onnx", extra="onnx", purpose="ONNX files")
    op = require("onnxscript", extra="onnx", purpose="ONNX files").opset18
    plain = to_plain(model).eval()
    args = example if isinstance(example, tuple) else (example,)
    # Twice the batch, because torch.export takes a size of 1 for a fixed one.
    args = pytree.tree_map(lambda one: torch.cat([one, one]) if _has_batch(one) else one, args)
    batch = torch.export.Dim("batch")
    axes = pytree.tree_map(lambda one: {0: batch} if _has_batch(one) else None, args)

    def hypot(x: Any, y: Any) -> Any:  # ONNX has no such operator
        return op.Sqrt(op.Add(op.Mul(x, x), op.Mul(y, y)))

    table: Any = {torch.ops.aten.hypot.default: hypot}
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # the exporter lists packages that it does not find
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            plain(*args)
            # torch.onnx.export on its own would fix the batch size without a word.
            program = torch.export.export(plain, args, dynamic_shapes=axes, strict=False)
            graph: Any = torch.onnx.export(program, verbose=False, custom_translation_table=table)
            data = graph.model_proto.SerializeToString()
        except Exception as error:
            raise ValueError(
                "The network cannot be written as ONNX for batches of any size: "
                f"{_first_line(error.__cause__ or error)}."
            ) from None
        finally:
            logger.setLevel(level)
    write_bytes(path, data)


def _has_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text:.300}".rstrip(" .:")


# -- tables -----------------------------------------------------------------------------------


class _Table(NamedTuple):
    """A table's columns, how one Gabor function becomes a row, and columns become a record."""

    columns: list[str]
    write: Callable[[Any], list[float]]
    read: Callable[[list[Tensor]], Gabor]


def _own(kind: type[Gabor]) -> _Table:
    """The table of a record's fields."""
    *fields, _ = kind.field_names()  # center comes last
    units = {name: UNITS[name] for name in fields}
    units |= {f"center[{axis}]": UNITS["center"] for axis in range(kind.n_dims)}
    columns = [name if unit == "1" else f"{name} ({unit})" for name, unit in units.items()]

    def write(one: Gabor) -> list[float]:
        return torch.cat([value.reshape(-1) for value in one.as_dict().values()]).tolist()

    def read(columns: list[Tensor]) -> Gabor:
        center = torch.stack(columns[len(fields) :], -1)
        return kind(**dict(zip(fields, columns, strict=False)), center=center)

    return _Table(columns, write, read)


def _foreign(names: list[str], to: Callable[..., Any], back: Callable[..., Any]) -> _Table:
    """The table of another library's arguments, and the scale of its kernels."""

    def write(one: Gabor) -> list[float]:
        arguments, scale = to(one)
        return [*arguments.values(), scale]

    def read(columns: list[Tensor]) -> Gabor:
        *arguments, scale = columns
        record = back(**dict(zip(names, arguments, strict=True)))
        return record.replace(amplitude=record.amplitude * scale)

    return _Table([*names, "scale"], write, read)


_OPENCV = ["sigma", "theta", "lambd", "gamma", "psi"]
_SKIMAGE = ["frequency", "theta", "sigma_x", "sigma_y", "offset"]
_TABLES = {kind.__name__: _own(kind) for kind in RECORDS.values()} | {
    "opencv": _foreign(_OPENCV, to_opencv, from_opencv),
    "skimage": _foreign(_SKIMAGE, to_skimage, from_skimage),
}


def to_csv(params: Gabor, convention: str = "gaborium") -> str:
    """The parameters of a record, such as ``layer.params``, as CSV text.

    Convention:
        - one row per filter and channel; a record without channels has no column for them, and
          values that channels share are repeated in the row of each
        - the columns are the record's fields with their units, as ``sigma (px)``; ``center`` has
          the columns ``center[0] (px)``, ``center[1] (px)``, ..., x first
        - with ``convention="skimage"`` the columns are arguments of
          ``skimage.filters.gabor_kernel``, with ``"opencv"`` of ``cv2.getGaborKernel``; ``scale``
          times the (real part of the) kernel that they give is ``gabor(params)``, which a layer
          with ``dc="remove"`` or ``unit_norm=True`` changes further
        - numbers have all digits: read in double precision they have the same bits

    Args:
        params: a record of batch shape ``()``, ``(filters,)`` or ``(filters, channels)``.
        convention: ``"gaborium"``; or ``"skimage"`` or ``"opencv"``, for 2-D functions whose
            center is 0.

    Raises:
        TypeError: ``params`` is no record, or not 2-D for another library.
        ValueError: the convention is unknown; the batch has more axes or is empty; or a value is
            not finite, or impossible in the other library.

    Example:
        >>> from gaborium import Gabor1d
        >>> print(to_csv(Gabor1d.of(wavelength=[6.0, 8.0], sigma=2.0)).replace(",", ", "))
        filter, wavelength (px), phase (rad), sigma (px), amplitude (kernel's unit), center[0] (px)
        0, 6.0, 0.0, 2.0, 1.0, 0.0
        1, 8.0, 0.0, 2.0, 1.0, 0.0
        <BLANKLINE>
    """
    one_of("convention", convention, ("gaborium", "opencv", "skimage"))
    if not isinstance(params, Gabor):
        kind = type(params).__name__
        raise TypeError(f"params must be a record such as layer.params, got {kind}.")
    params = params.detach().to(dtype=torch.float64, device="cpu").expand()
    params.check()
    shape = tuple(params.batch_shape) or (1,)
    if len(shape) > 2 or 0 in shape:
        raise ValueError(
            "A table needs a record of batch shape (filters,) or (filters, channels), not empty, "
            f"got {shape}."
        )
    table = _TABLES[type(params).__name__ if convention == "gaborium" else convention]
    params = params.expand(*shape)
    return csv_text(
        [
            dict(zip(("filter", "channel"), place, strict=False))
            | dict(zip(table.columns, table.write(params[place]), strict=True))
            for place in itertools.product(*map(range, shape))
        ]
    )


def from_csv(text: str) -> Gabor:
    """Read a table of ``to_csv``, of any convention.

    Args:
        text: a line of column names, then one row per filter and channel, in any order.

    Returns:
        A ``Gabor1d``, ``Gabor2d`` or ``Gabor3d`` in float64, of batch shape ``(filters,)`` or, with
        a column of channels, ``(filters, channels)``.

    Raises:
        ValueError: the columns are unknown, an entry is not a number, filters or channels are
            missing or repeated, or a value is out of its range.

    Example:
        >>> from gaborium import Gabor2d
        >>> edge = Gabor2d.of(orientation=0.1, wavelength=[6.0, 7.0], sigma=2.0)
        >>> bool(from_csv(to_csv(edge)).isclose(edge).all())
        True
    """
    try:
        head, *rows = [row for row in csv.reader(io.StringIO(text.removeprefix("\ufeff"))) if row]
    except (csv.Error, ValueError):
        head, rows = [], []
    axes = [axis for axis in ("filter", "channel") if axis in head]
    matching = [t for t in _TABLES.values() if sorted([*axes, *t.columns]) == sorted(head)]
    if axes[:1] != ["filter"] or not matching or not rows:
        raise ValueError("A table needs the columns of to_csv, with one row or more below them.")
    (table,) = matching
    values = {}
    for number, row in enumerate(rows, 2):
        try:
            one = dict(zip(head, row, strict=True))
            place = tuple(int(one[axis]) for axis in axes)
            values[place] = [float(one[name]) for name in table.columns]
        except ValueError:
            raise ValueError(
                f"Row {number} must have {len(head)} numbers, got {','.join(row):.80}."
            ) from None
    shape = tuple(max(axis) + 1 for axis in zip(*values, strict=True))
    if not len(values) == len(rows) == math.prod(shape) or min(map(min, values)) < 0:
        raise ValueError(
            f"The table has {len(rows)} rows, expected one for each of "
            f"{' x '.join(map(str, shape))} filters and channels."
        )
    ordered = torch.tensor([values[place] for place in sorted(values)], dtype=torch.float64)
    record = table.read(list(ordered.unflatten(0, shape).unbind(-1)))
    record.check()
    return record
