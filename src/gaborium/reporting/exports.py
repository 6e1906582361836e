"""The page of ``gaborium export``: the filters with their parameters, and how to read each file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium.conversion import find_first_conv
from gaborium.export import to_plain, write_formats
from gaborium.export.folders import gabor_part, is_paired
from gaborium.files import write_text
from gaborium.layers import GaborLayer, MixedConv, PairEnergy
from gaborium.params import UNITS, Gabor
from gaborium.plots import colored, kernel_images
from gaborium.reporting.charts import DARK, data_uri
from gaborium.reporting.page import render
from gaborium.reporting.wording import counted, number
from gaborium.training import Trained

_TITLE = "Gabor filters in other forms"
_MAX_SIDE = 96  # px of a picture
_SYMBOLS = {
    "orientation": "θ",
    "elevation": "φ",
    "wavelength": "λ",
    "phase": "ψ",
    "sigma": "σ",
    "aspect_ratio": "γ",
    "amplitude": "A",
}
_WHAT = {
    "layer.safetensors": "the Gabor layer, to go on with in Python",
    "params.json": "the parameters, with dtype and shapes",
    "params.csv": "the parameters, a row for each filter and channel",
    "skimage.csv": "the parameters in the words of scikit-image",
    "opencv.csv": "the parameters in the words of OpenCV",
    "plain.safetensors": "the tensors of ordinary convolutions with the same kernels",
    "layer.onnx": "the layer as a graph, for a batch of any size",
    "network.onnx": "the whole network as a graph, for a batch of any size",
    "result.json": "checksums, and where all of it comes from",
}


class Row(NamedTuple):
    """A filter of the table.

    Args:
        number: of the filter.
        picture: its kernel, as a ``data:`` URI of PNG.
        values: what to sort by and what to show, for each column.
    """

    number: int
    picture: str
    values: list[tuple[float, str]]


class Form(NamedTuple):
    """A file of the export.

    Args:
        name: of the file.
        what: it is.
        size: in bytes, in words.
        sha256: its checksum.
        code: Python that reads it.
    """

    name: str
    what: str
    size: str
    sha256: str
    code: str


def report_export(
    source: GaborLayer | MixedConv | Trained,
    folder: str | os.PathLike[str],
    *,
    title: str = _TITLE,
) -> str:
    """Write the page that shows the filters of an export, and how its files are read.

    The page is one file that opens without a network: it refers to nothing outside itself, and
    forbids the browser to. Whatever the facts hold is shown as text.

    Args:
        source: what ``write_formats`` was given.
        folder: what it has filled.
        title: of the page.

    Returns:
        HTML.

    Raises:
        OSError: a file is not there.
        ImportError: Jinja2 or matplotlib is not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from gaborium import GaborConv2d
        >>> from gaborium.export import write_formats
        >>> layer = GaborConv2d(1, 4, 9)
        >>> with TemporaryDirectory() as folder:
        ...     _ = write_formats(layer, folder, ["csv"], facts={"file": "<mine>"})
        ...     page = report_export(layer, folder)
        >>> "4 Gabor filters of 9 × 9 px, in 1 file." in page, "&lt;mine&gt;" in page
        (True, True)
    """
    record = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
    model = source.network if isinstance(source, Trained) else source
    layer: Any = gabor_part(model)
    first: Any = find_first_conv(model)[1] if layer is None else layer
    gabor: Any = layer.gabor if isinstance(layer, MixedConv) else layer
    free = layer.free if isinstance(layer, MixedConv) else first.weight if layer is None else None
    if free is not None and is_paired(model, first):
        free = free[::2]  # the first of each pair, as of a Gabor filter
    rows: list[Row] = []
    columns: list[tuple[str, str]] = []
    if gabor is not None:
        params = strongest(gabor.params.detach())
        columns, values = _table(params)
        per_filter = len(gabor.weight) // len(values)
        pictures = _pictures(gabor.weight[::per_filter])
        rows = [Row(i, *both) for i, both in enumerate(zip(pictures, values, strict=True))]
    size = tuple(first.kernel_size)
    return render(
        "export.html.j2",
        {},
        title=title,
        headline=export_headline(record),
        facts=record["facts"],
        layer=record["layer"],
        input=record.get("input"),
        rows=rows,
        columns=columns,
        free=[] if free is None else _pictures(free),
        forms=_forms(source, record, Path(folder)),
        n_channels=first.weight.shape[1],
        n_dims=len(size),
        flat=max(0.25, (size[-2] if len(size) > 1 else 1) / size[-1]),
        dark=DARK,
    )


def write_export(
    source: GaborLayer | MixedConv | Trained,
    folder: str | os.PathLike[str],
    formats: Collection[str] | None = None,
    *,
    size: int | None = None,
    facts: Mapping[str, str],
) -> tuple[str, ...]:
    """Write a layer or a trained network in several forms, and a page about them.

    Args:
        source: as for ``write_formats``, as all others.
        folder: where to.
        formats: which forms.
        size: of the images that the graph of a layer takes, px.
        facts: where it came from, by name.

    Returns:
        The names of the files, ``report.html`` last.

    Raises:
        ImportError: Jinja2, matplotlib or a package that a form needs is not installed.
        OSError: a file cannot be written, with the reason.
        TypeError: ``source`` is neither.
        ValueError: as for ``write_formats``.
    """
    names = write_formats(source, folder, formats, size=size, facts=facts)
    write_text(Path(folder, "report.html"), report_export(source, folder))
    return (*names, "report.html")


def export_headline(record: Mapping[str, Any]) -> str:
    """Which filters were written in how many files, in a sentence.

    Args:
        record: what ``write_formats`` has written as ``result.json``.

    Example:
        >>> filters = {"gabor": 1, "free": 2, "size": [5, 5]}
        >>> export_headline({"filters": filters, "files": {"params.csv": "..."}})
        '1 Gabor filter and 2 free filters of 5 × 5 px, in 1 file.'
    """
    filters, n_files = record["filters"], len(record["files"])
    kinds = [
        counted(filters[kind], f"{word} filter")
        for kind, word in (("gabor", "Gabor"), ("free", "free"))
        if filters[kind]
    ]
    what = f"{' and '.join(kinds)} of {' × '.join(map(str, filters['size']))} px"
    if "input" in record:
        what = f"A trained network that begins with {what}"
    return f"{what}, in {counted(n_files, 'file')}."


def strongest(params: Gabor) -> Gabor:
    """Of each filter the Gabor function of largest amplitude among its channels.

    Example:
        >>> from gaborium import Gabor1d
        >>> waves = Gabor1d.of(
        ...     wavelength=4.0, sigma=2.0, phase=[[0.0, 1.0]], amplitude=[[0.5, -2.0]]
        ... )
        >>> strongest(waves).phase.tolist()
        [1.0]
    """
    params = params.expand()
    chosen = params.amplitude.abs().argmax(1)
    filters = torch.arange(len(chosen), device=chosen.device)
    return type(params)(**{name: v[filters, chosen] for name, v in params.as_dict().items()})


# -- filters ----------------------------------------------------------------------------------


def _table(params: Gabor) -> tuple[list[tuple[str, str]], list[list[tuple[float, str]]]]:
    """Names and symbols with units of the columns, and what stands in them for every filter."""
    columns: list[tuple[str, str]] = []
    entries: list[list[tuple[float, str]]] = []
    for name, values in params.to(device="cpu", dtype=torch.float64).as_dict().items():
        angle = UNITS[name] == "rad"
        unit = "°" if angle else UNITS[name] if UNITS[name] == "px" else ""
        if name == "center":
            if not values.any():
                continue  # it was not asked for
            parts = {f"centre {'xyz'[i]}": v for i, v in enumerate(values.unbind(-1))}
        else:
            parts = {name.replace("_", " "): values}
        for words, part in parts.items():
            symbol = _SYMBOLS.get(name, "")
            columns.append((words, ", ".join(filter(None, [symbol, unit]))))
            entries.append([_entry(value, angle=angle) for value in part.tolist()])
    return columns, [list(row) for row in zip(*entries, strict=True)]


def _entry(value: float, *, angle: bool) -> tuple[float, str]:
    shown = math.degrees(value) if angle else value
    tenths = f"{round(shown, 1) + 0.0:.1f}".replace("-", "−")
    text = tenths if angle and math.isfinite(shown) else number(shown)
    return shown, text


def _pictures(kernels: Tensor) -> list[str]:
    """Kernels ``(filters, channels, *size)`` as ``data:`` URIs, each on a scale of its own."""
    images = kernel_images(kernels[None])[0]
    sides = [min(side, _MAX_SIDE) for side in images.shape[-2:]]
    images = F.interpolate(images, sides, mode="area")
    return [data_uri((255 * colored(one[None])[0]).round().byte()) for one in images]


# -- files ------------------------------------------------------------------------------------


def _forms(source: Any, record: Mapping[str, Any], folder: Path) -> list[Form]:
    return [
        Form(
            name=name,
            what=_WHAT[name],
            size=_size((folder / name).stat().st_size),
            sha256=sha256,
            code=_code(name, source, record),
        )
        for name, sha256 in record["files"].items()
    ]


def _size(n_bytes: int) -> str:
    """A size of a file.

    Example:
        >>> _size(812), _size(15872), _size(3_100_000)
        ('812 bytes', '15.9 kB', '3.1 MB')
    """
    for unit, scale in (("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return counted(n_bytes, "byte")


def _code(name: str, source: Any, record: Mapping[str, Any]) -> str:
    """Python that reads a file from within its folder."""
    if name == "layer.safetensors":
        return f'from gaborium.export import load_layer\n\nlayer = load_layer("{name}")'
    if name in ("params.json", "params.csv"):
        return f'from gaborium.export import read_params\n\nparams = read_params("{name}")'
    if name == "layer.onnx":
        return _LAYER_GRAPH
    if name == "network.onnx":
        return _NETWORK_GRAPH.format(axes="1, -1" + ", 1" * len(record["input"]["size"]))
    if name == "plain.safetensors":
        return _NETWORK_TENSORS if isinstance(source, Trained) else _plain_code(source)
    width_first = tuple(reversed(record["filters"]["size"]))
    return _LIBRARIES[name].format(size=width_first)


_LAYER_GRAPH = """
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("layer.onnx", providers=["CPUExecutionProvider"])
(entry,) = session.get_inputs()
images = np.zeros((2, *entry.shape[1:]), np.float32)  # yours
(responses,) = session.run(None, {entry.name: images})
"""
_NETWORK_GRAPH = """
import json
import numpy as np
import onnxruntime

with open("result.json", encoding="utf-8") as file:
    wanted = json.load(file)["input"]
session = onnxruntime.InferenceSession("network.onnx", providers=["CPUExecutionProvider"])
(entry,) = session.get_inputs()
images = np.zeros((2, *entry.shape[1:]))  # yours, as they lie in files
mean, std = (np.reshape(wanted[name], ({axes})) for name in ("mean", "std"))
seen = (images / wanted["divided_by"] - mean) / std
(scores,) = session.run(None, {{entry.name: seen.astype(np.float32)}})
classes = [wanted["classes"][i] for i in scores.argmax(1)]
"""
_NETWORK_TENSORS = """
from safetensors.torch import load_file

tensors = load_file("plain.safetensors")
for name, tensor in tensors.items():
    print(name, tuple(tensor.shape))
"""
_LIBRARIES = {
    "skimage.csv": """
import csv
from skimage.filters import gabor_kernel

with open("skimage.csv", newline="") as file:
    row = next(csv.DictReader(file))  # of filter 0, channel 0
kernel = float(row["scale (kernel's unit)"]) * gabor_kernel(
    frequency=float(row["frequency (cycles/px)"]),
    theta=float(row["theta (rad)"]),
    sigma_x=float(row["sigma_x (px)"]),
    sigma_y=float(row["sigma_y (px)"]),
    offset=float(row["offset (rad)"]),
).real
""",
    "opencv.csv": """
import csv
import cv2

with open("opencv.csv", newline="") as file:
    row = next(csv.DictReader(file))  # of filter 0, channel 0
kernel = float(row["scale (kernel's unit)"]) * cv2.getGaborKernel(
    {size},
    sigma=float(row["sigma (px)"]),
    theta=float(row["theta (rad)"]),
    lambd=float(row["lambd (px)"]),
    gamma=float(row["gamma"]),
    psi=float(row["psi (rad)"]),
)
""",
}


def _plain_code(layer: Any) -> str:
    plain: Any = to_plain(layer)
    if not isinstance(plain, PairEnergy):
        lines = ["import torch", f"layer = {_constructor(plain)}"]
    else:
        bias = "" if plain.bias is None else f", torch.zeros({len(plain.bias)}{_dtype(plain.bias)})"
        lines = [
            "import torch\nfrom gaborium.layers import PairEnergy",
            f"layer = PairEnergy({_constructor(plain.pairs)}{bias})",
        ]
    imports, layer_line = lines
    return (
        f"{imports}\nfrom safetensors.torch import load_file\n\n{layer_line}\n"
        'layer.load_state_dict(load_file("plain.safetensors"))'
    )


def _constructor(conv: Any) -> str:
    """A convolution as it is written in Python; its own text leaves names without quotes."""
    given = {
        "stride": (1,) * len(conv.kernel_size),
        "padding": (0,) * len(conv.kernel_size),
        "dilation": (1,) * len(conv.kernel_size),
        "groups": 1,
        "padding_mode": "zeros",
    }
    words = [f"{conv.in_channels}, {conv.out_channels}, {conv.kernel_size}"]
    words += [
        f"{name}={getattr(conv, name)!r}"
        for name, default in given.items()
        if getattr(conv, name) != default
    ]
    words += ["bias=False"] * (conv.bias is None)
    return f"torch.nn.{type(conv).__name__}({', '.join(words)}{_dtype(conv.weight)})"


def _dtype(value: Tensor) -> str:
    return "" if value.dtype == torch.float32 else f", dtype={value.dtype}"
