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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gaborium.functions.params import RECORDS, UNITS, Gabor
from gaborium.interop import from_opencv, from_skimage, to_opencv, to_skimage
from gaborium.layers import GABOR_LAYERS, GaborLayer, MixedConv, pair_energy, plain_conv
from gaborium.starts import STARTS
from gaborium.support import (
    csv_text,
    one_of,
    read_tensors,
    require,
    write_bytes,
    write_tensors,
    write_text,
)

_FORMAT = 1  # of saved layers; a higher one needs a reader for the older ones
_LAYERS: dict[str, Any] = {kind.__name__: kind for kind in (*GABOR_LAYERS, MixedConv)}
_KINDS: tuple[Any, ...] = tuple(_LAYERS.values())
# Arguments of other libraries with their units, and how a record is converted to and from them.
_CONVENTIONS: dict[str, tuple[dict[str, str], Callable[..., Any], Callable[..., Any]]] = {
    "opencv": (
        {"sigma": "px", "theta": "rad", "lambd": "px", "gamma": "1", "psi": "rad"},
        to_opencv,
        from_opencv,
    ),
    "skimage": (
        {"frequency": "cycles/px", "theta": "rad", "sigma_x": "px", "sigma_y": "px"}
        | {"offset": "rad"},
        to_skimage,
        from_skimage,
    ),
}
_SCALE = "scale (kernel's unit)"

Source = Gabor | GaborLayer | MixedConv


# -- files of layers --------------------------------------------------------------------------


def save_layer(layer: GaborLayer | MixedConv, path: str | os.PathLike[str]) -> None:
    """Write a layer into a safetensors file, all or nothing.

    Convention:
        - the tensors are ``layer.state_dict()``, bit for bit
        - the metadata is one JSON text under ``gaborium``: ``name`` ("gaborium.layer"), ``format``
          (1), ``gaborium`` (the version), ``class``, ``arguments`` of the constructor, ``frozen``
          (parameters without gradient), ``units`` of the record's fields, and ``sha256`` of the
          file with 64 zeros in the checksum's place
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
    tensors, metadata = read_tensors(path, kind="layer", newest=_FORMAT)
    try:
        return _layer(metadata, tensors)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} does not hold a whole layer: {_first_line(error)}."
        ) from None


def _description(layer: Any) -> dict[str, Any]:
    kind = type(layer)
    if kind not in _KINDS:
        raise TypeError(
            f"layer must be a {', '.join(_LAYERS)}, got {kind.__name__}; save the state_dict() of "
            "other modules."
        )
    if kind is MixedConv:
        arguments = {"gabor": _description(layer.gabor), "seed": layer.seed}
    else:
        arguments = layer.arguments()
        del arguments["device"]
        arguments["dtype"] = str(arguments["dtype"]).removeprefix("torch.")
        if isinstance(layer.start, Gabor):
            arguments["start"] = json.loads(layer.start.to_json())
    return {"class": kind.__name__, "arguments": arguments}


def _layer(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    kind = _LAYERS[metadata["class"]]
    arguments = metadata["arguments"]
    layer: Any
    if kind is MixedConv:
        layer = MixedConv(_empty_layer(arguments["gabor"]), tensors["free"], seed=arguments["seed"])
    else:
        layer = _empty_layer(metadata)
    # Assigned and not copied, so that every tensor keeps its dtype.
    layer.load_state_dict(tensors, assign=True)
    for name in metadata["frozen"]:
        layer.get_parameter(name).requires_grad_(False)
    return layer


def _empty_layer(description: Mapping[str, Any]) -> Any:
    """A Gabor layer whose parameters are still to be loaded."""
    kind = _LAYERS[description["class"]]
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in description["arguments"].items()
    }
    record, start = RECORDS[kind.n_dims], given.pop("start")
    dtype = getattr(torch, given.pop("dtype"))
    # A narrow start draws no random numbers and fits into every kernel.
    narrow = record.of(wavelength=2 * (given["min_wavelength"] or 2.0), sigma=0.25)
    layer = kind(**given, dtype=dtype, start=narrow)
    if isinstance(start, dict):
        layer.start = record.from_json(json.dumps(start))
    else:
        layer.start = one_of("start", start, STARTS)
    return layer


# -- plain networks ---------------------------------------------------------------------------


def to_plain(model: nn.Module) -> nn.Module:
    """A copy of a network in which every Gabor layer is an ordinary convolution.

    Convention:
        - every ``GaborConvNd`` and ``MixedConv`` becomes one ``nn.ConvNd``; with an energy output
          it becomes a ``PairEnergy``: a convolution, the norm of each pair of channels, the bias
        - a layer that occurs in several places of the network stays one layer
        - all kernels of the copy are parameters and learn freely; hooks of replaced layers are lost

    Args:
        model: any network, or a layer; it is not changed.

    Returns:
        The copy with equal outputs, on the same devices, of the same dtypes and training modes.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a subclass of one of the layers overrides ``forward``.

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
    result = copy.deepcopy(model)
    if isinstance(result, _KINDS):
        return _plain(result, type(result).__name__)
    _replace_layers(result, "", {})
    return result


def _replace_layers(module: nn.Module, prefix: str, done: dict[nn.Module, nn.Module]) -> None:
    for name, part in module._modules.items():
        if isinstance(part, _KINDS):
            if part not in done:
                done[part] = _plain(part, prefix + name)
            module._modules[name] = done[part]
        elif part is not None:
            _replace_layers(part, f"{prefix}{name}.", done)


def _plain(layer: Any, name: str) -> nn.Module:
    kind = next(kind for kind in _KINDS if isinstance(layer, kind))
    if type(layer).forward is not kind.forward:
        raise ValueError(
            f"{name!r} is a {type(layer).__name__}, which overrides the forward of "
            f"{kind.__name__}; move the change into a separate module."
        )
    if isinstance(layer, MixedConv) or layer.output != "energy":
        return layer.to_conv()
    energy = PairEnergy(plain_conv(layer, layer.weight, None), layer.bias)
    return energy.train(layer.training)


class PairEnergy(nn.Module):
    """The norms of pairs of channels: the plain form of a Gabor layer with an energy output.

    Args:
        pairs: a convolution whose channels are pairs, one after another.
        bias: ``(out_channels,)``, added to the norms; a parameter, which is copied.

    Raises:
        ValueError: its number of channels is odd.

    Example:
        >>> import torch
        >>> layer = PairEnergy(nn.Conv2d(1, 8, 5))
        >>> layer(torch.rand(1, 1, 9, 9)).shape, layer.out_channels
        (torch.Size([1, 4, 5, 5]), 4)
    """

    output = "energy"

    def __init__(self, pairs: Any, bias: Tensor | None = None) -> None:
        super().__init__()
        if pairs.out_channels % 2:
            raise ValueError(
                f"pairs must have an even number of channels, got {pairs.out_channels}."
            )
        self.pairs = pairs
        self.in_channels, self.out_channels = pairs.in_channels, pairs.out_channels // 2
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        """Energies ``(batch, out_channels, *size)``, or the same without batch."""
        return pair_energy(self.pairs(input), len(self.pairs.kernel_size), self.bias)


# -- ONNX -------------------------------------------------------------------------------------


def to_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Tensor | tuple[Any, ...] | Mapping[str, Any],
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
        example: a batch, or a tuple or a dict of the network's arguments, on its device.

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
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    args, kwargs = pytree.tree_map(_two_or_more, (args, kwargs))
    batch = torch.export.Dim("batch")
    axes = pytree.tree_map(
        lambda value: {0: batch} if isinstance(value, Tensor) and value.ndim else None,
        kwargs or args,
    )

    def hypot(x: Any, y: Any) -> Any:  # ONNX has no such operator
        return op.Sqrt(op.Add(op.Mul(x, x), op.Mul(y, y)))

    table: Any = {torch.ops.aten.hypot.default: hypot}
    with _quiet(), torch.no_grad():
        try:
            plain(*args, **kwargs)
            # torch.onnx.export on its own would fix the batch size without a word.
            program = torch.export.export(plain, args, kwargs, dynamic_shapes=axes, strict=False)
            graph: Any = torch.onnx.export(program, verbose=False, custom_translation_table=table)
            data = graph.model_proto.SerializeToString()
        except Exception as error:
            raise ValueError(
                "The network cannot be written as ONNX for batches of any size: "
                f"{_first_line(error.__cause__ or error)}."
            ) from None
    write_bytes(path, data)


def _two_or_more(value: Any) -> Any:
    """A batch of 1 as a batch of 2, because torch.export takes a size of 1 for a fixed one."""
    single = isinstance(value, Tensor) and value.ndim and len(value) == 1
    return torch.cat([value, value]) if single else value


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text:.300}".rstrip(" .:")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's log, warnings and progress."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# -- tables -----------------------------------------------------------------------------------


def to_csv(source: Source, convention: str = "gaborium") -> str:
    """The parameters of a layer or a record as CSV text.

    Convention:
        - one row per filter and channel; a record without channels has no column for them, and
          values that channels share are repeated in the row of each
        - the columns are the record's fields with their units, as ``sigma (px)``; ``center`` has
          the columns ``center[0] (px)``, ``center[1] (px)``, ..., x first
        - with ``convention="skimage"`` the columns are arguments of
          ``skimage.filters.gabor_kernel``, with ``"opencv"`` of ``cv2.getGaborKernel``; ``scale``
          times the (real part of the) kernel that they give is our kernel
        - numbers have all digits: read in double precision they have the same bits
        - a ``MixedConv`` gives its Gabor filters, counted as in ``layer.gabor``

    Args:
        source: a Gabor layer, or a record of batch shape ``()``, ``(filters,)`` or ``(filters,
            channels)``.
        convention: ``"gaborium"``; or ``"skimage"`` or ``"opencv"``, for 2-D functions whose
            center is 0.

    Raises:
        TypeError: ``source`` is neither, or not 2-D for another library.
        ValueError: the convention is unknown; the batch has more axes or is empty; a value is not
            finite or impossible in the other library; or a layer with ``dc="remove"`` or
            ``unit_norm=True`` has kernels that another library cannot make.

    Example:
        >>> from gaborium import Gabor1d
        >>> print(to_csv(Gabor1d.of(wavelength=[6.0, 8.0], sigma=2.0)).replace(",", ", "))
        filter, wavelength (px), phase (rad), sigma (px), amplitude (kernel's unit), center[0] (px)
        0, 6.0, 0.0, 2.0, 1.0, 0.0
        1, 8.0, 0.0, 2.0, 1.0, 0.0
        <BLANKLINE>
    """
    one_of("convention", convention, ("gaborium", *_CONVENTIONS))
    params = _record(source, same_kernels=convention != "gaborium")
    params = params.to(dtype=torch.float64, device="cpu").expand()
    params.check()
    shape = tuple(params.batch_shape)
    if len(shape) > 2 or 0 in shape:
        raise ValueError(
            "A table needs a record of batch shape (filters,) or (filters, channels), not empty, "
            f"got {shape}."
        )
    rows = []
    for place in itertools.product(*map(range, shape)):
        one = params[place] if shape else params
        if convention == "gaborium":
            values = torch.cat([value.reshape(-1) for value in one.as_dict().values()]).tolist()
        else:
            arguments, scale = _CONVENTIONS[convention][1](one)
            values = [*arguments.values(), scale]
        columns = _columns(type(params) if convention == "gaborium" else convention)
        rows.append(
            dict(zip(("filter", "channel"), place or (0,), strict=False))
            | dict(zip(columns, values, strict=True))
        )
    return csv_text(rows)


def from_csv(text: str, *, dtype: torch.dtype = torch.float64) -> Gabor:
    """Read a table of ``to_csv``, of any convention.

    Args:
        text: a line of column names, then one row per filter and channel, in any order.
        dtype: floating type of the record.

    Returns:
        A ``Gabor1d``, ``Gabor2d`` or ``Gabor3d`` of batch shape ``(filters,)`` or, with a column of
        channels, ``(filters, channels)``.

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
        head, rows = [""], []
    axes = 2 if head[1:2] == ["channel"] else 1
    kinds: list[Any] = [*RECORDS.values(), *_CONVENTIONS]
    kind = next((k for k in kinds if sorted(head[axes:]) == sorted(_columns(k))), None)
    if head[:1] != ["filter"] or kind is None or not rows:
        raise ValueError("A table needs the columns of to_csv, with one row or more below them.")
    table = {}
    for number, row in enumerate(rows, 2):
        try:
            entries = [float(entry) for entry in row[axes:]]
            table[tuple(map(int, row[:axes]))] = dict(zip(head[axes:], entries, strict=True))
        except ValueError:
            text = ",".join(row)
            raise ValueError(
                f"Row {number} must have {len(head)} numbers, got {text:.80}."
            ) from None
    shape = tuple(max(axis) + 1 for axis in zip(*table, strict=True))
    if not len(table) == len(rows) == math.prod(shape) or min(map(min, table)) < 0:
        raise ValueError(
            f"The table has {len(rows)} rows, expected one for each of "
            f"{' x '.join(map(str, shape))} filters and channels."
        )
    ordered = [table[place] for place in sorted(table)]
    columns = [
        torch.tensor([row[name] for row in ordered], dtype=torch.float64).reshape(shape)
        for name in _columns(kind)
    ]
    if isinstance(kind, str):
        units, _, from_library = _CONVENTIONS[kind]
        record = from_library(**dict(zip(units, columns, strict=False)))
        record = record.replace(amplitude=record.amplitude * columns[-1])
    else:
        *fields, _ = kind.field_names()  # center comes last
        center = torch.stack(columns[len(fields) :], -1)
        record = kind(**dict(zip(fields, columns, strict=False)), center=center)
    record.check()
    return record.to(dtype)


def write_params(
    source: Source, path: str | os.PathLike[str], convention: str = "gaborium"
) -> None:
    """Write the parameters of a layer or a record into a file, all or nothing.

    Args:
        source: a Gabor layer or a record.
        path: the file: ``.json`` holds ``record.to_json()``, which keeps dtype and shapes;
            ``.csv`` the table of ``to_csv``.
        convention: as for ``to_csv``; for ``.csv`` only.

    Raises:
        OSError: it cannot be written there; an old file stays.
        TypeError: ``source`` is neither.
        ValueError: the suffix is another, or as for ``to_csv``.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from gaborium import Gabor2d
        >>> edge = Gabor2d.of(orientation=[0.5, 1.0], wavelength=6.0, sigma=2.0)
        >>> with TemporaryDirectory() as folder:
        ...     write_params(edge, f"{folder}/edge.csv", convention="opencv")
        ...     read_params(f"{folder}/edge.csv").orientation.tolist()
        [0.5, 1.0]
    """
    if _suffix(path) == ".csv":
        write_text(path, to_csv(source, convention))
    elif convention == "gaborium":
        write_text(path, _record(source).to_json(indent=1) + "\n")
    else:
        raise ValueError(f"convention={convention!r} needs a .csv file, got {os.fspath(path)!r}.")


def read_params(path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float64) -> Gabor:
    """Read a file of ``write_params``.

    Args:
        path: a ``.json`` or ``.csv`` file.
        dtype: floating type of a record from ``.csv``; ``.json`` has its own.

    Raises:
        OSError: the file cannot be read.
        ValueError: the suffix is another, or the file holds no such parameters.
    """
    suffix = _suffix(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
        if suffix == ".csv":
            return from_csv(text, dtype=dtype)
        kinds = RECORDS.values()
        kind = next((k for k in kinds if f'"type": "{k.__name__}"' in text), RECORDS[2])
        return kind.from_json(text)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r}: {error}") from None


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".csv"):
        raise ValueError(f"Parameters need a .json or .csv file, got {os.fspath(path)!r}.")
    return suffix


def _record(source: Source, *, same_kernels: bool = False) -> Gabor:
    if isinstance(source, Gabor):
        return source.detach()
    layer = source.gabor if isinstance(source, MixedConv) else source
    if not isinstance(layer, GABOR_LAYERS):
        raise TypeError(f"Expected a Gabor layer or a record, got {type(source).__name__}.")
    if same_kernels and (layer.dc != "keep" or layer.unit_norm):
        raise ValueError(
            f"A layer with dc={layer.dc!r} and unit_norm={layer.unit_norm} has other kernels than "
            "other libraries make of its parameters; give layer.params to write them anyway."
        )
    params: Gabor = layer.params.detach()
    return params


def _columns(kind: type[Gabor] | str) -> list[str]:
    """The columns of a record's fields or of a library's arguments, without filter and channel."""
    if isinstance(kind, str):
        return [*(_headed(*pair) for pair in _CONVENTIONS[kind][0].items()), _SCALE]
    *fields, _ = kind.field_names()  # center comes last
    centers = [f"center[{axis}]" for axis in range(kind.n_dims)]
    return [
        *(_headed(name, UNITS[name]) for name in fields),
        *(_headed(name, UNITS["center"]) for name in centers),
    ]


def _headed(name: str, unit: str) -> str:
    return name if unit == "1" else f"{name} ({unit})"
