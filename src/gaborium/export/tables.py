"""Parameters of Gabor functions as tables: a row for each filter and channel, units in the head."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaborium.errors import one_of
from gaborium.files import csv_text, write_text
from gaborium.interop import (
    from_opencv,
    from_skimage,
    to_opencv,
    to_skimage,
)
from gaborium.layers import GABOR_LAYERS, GaborLayer, MixedConv
from gaborium.params import RECORDS, UNITS, Gabor, Gabor2d

WORDS = ("gaborium", "skimage", "opencv")
_PLACES = ("filter", "channel")
_SCALE = "scale (kernel's unit)"
_LIBRARY_UNITS = {
    "skimage": {
        "frequency": "cycles/px",
        "theta": "rad",
        "sigma_x": "px",
        "sigma_y": "px",
        "offset": "rad",
    },
    "opencv": {"sigma": "px", "theta": "rad", "lambd": "px", "gamma": "1", "psi": "rad"},
}
_TO: dict[str, Callable[[Gabor2d], tuple[dict[str, float], float]]] = {
    "skimage": to_skimage,
    "opencv": to_opencv,
}
_FROM: dict[str, Callable[..., Gabor2d]] = {"skimage": from_skimage, "opencv": from_opencv}
_SUFFIXES = (".json", ".csv")

Source = Gabor | GaborLayer | MixedConv


# -- writing ----------------------------------------------------------------------------------


def to_csv(source: Source, words: str = "gaborium") -> str:
    """The parameters of a layer or a record as CSV text.

    Convention:
        - a row for each filter and channel; a record without an axis of channels has no column
          for them, and what channels share stands in the row of each
        - the columns are the record's fields with their units, as ``sigma (px)``; those of
          ``center`` are ``center[0] (px)`` and on, x first
        - ``words="skimage"``: the arguments of ``skimage.filters.gabor_kernel``; ``"opencv"``:
          those of ``cv2.getGaborKernel``; and ``scale``, by which the (real part of the) kernel
          that they give is multiplied to be ours
        - numbers have all their digits: read as double precision they are the same bits
        - of a ``MixedConv`` it is the Gabor filters, counted as in ``layer.gabor``

    Args:
        source: a Gabor layer, or a record of batch shape ``()``, ``(filters,)`` or ``(filters,
            channels)``.
        words: ``"gaborium"``, ``"skimage"`` or ``"opencv"``, of which the last two know 2-D
            functions in the kernel's middle only.

    Raises:
        TypeError: ``source`` is neither; or not 2-D for other libraries' words.
        ValueError: ``words`` is none of these; the batch has more axes or is empty; a value is
            not finite; a centre cannot be told in these words; or a layer makes other kernels of
            its parameters (``dc="remove"``, ``unit_norm=True``) than another library would.

    Example:
        >>> from gaborium import Gabor1d
        >>> print(to_csv(Gabor1d.of(wavelength=[6.0, 8.0], sigma=2.0)).replace(",", ", "))
        filter, wavelength (px), phase (rad), sigma (px), amplitude (kernel's unit), center[0] (px)
        0, 6.0, 0.0, 2.0, 1.0, 0.0
        1, 8.0, 0.0, 2.0, 1.0, 0.0
        <BLANKLINE>
    """
    one_of("words", words, WORDS)
    params = _record(source, plain=words != "gaborium").to(dtype=torch.float64, device="cpu")
    params.check()
    params = params.expand()
    shape = params.batch_shape
    if len(shape) > 2 or not shape.numel():
        raise ValueError(
            "A table has rows for filters and channels: expected a record of batch shape "
            f"(filters,) or (filters, channels), not empty, got {tuple(shape)}."
        )
    places = _PLACES[: max(1, len(shape))]
    rows = []
    for place in torch.cartesian_prod(*map(torch.arange, shape or (1,))).reshape(-1, len(places)):
        index = tuple(place.tolist())
        one = params[index] if shape else params
        numbers = _fields(one) if words == "gaborium" else _in_words(one, words)
        rows.append(dict(zip(places, index, strict=True)) | numbers)
    return csv_text(rows)


def write_params(source: Source, path: str | os.PathLike[str], words: str = "gaborium") -> None:
    """Write the parameters of a layer or a record into a file, all or nothing.

    Args:
        source: a Gabor layer or a record.
        path: the file. ``.json``: ``record.to_json()``, which keeps dtype and shapes; ``.csv``:
            as ``to_csv``.
        words: as for ``to_csv``; of ``.csv`` only.

    Raises:
        OSError: it cannot be written there, with the reason. What was there before stays.
        TypeError: ``source`` is neither.
        ValueError: the suffix is another, or as for ``to_csv``.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> edge = Gabor2d.of(orientation=[0.5, 1.0], wavelength=6.0, sigma=2.0)
        >>> with TemporaryDirectory() as folder:
        ...     write_params(edge, f"{folder}/edge.csv", words="opencv")
        ...     read_params(f"{folder}/edge.csv").orientation.tolist()
        [0.5, 1.0]
    """
    if _suffix(path) == ".csv":
        write_text(path, to_csv(source, words))
        return
    if words != "gaborium":
        raise ValueError(f"words={words!r} are for a .csv file, got {os.fspath(path)!r}.")
    write_text(path, _record(source).to_json(indent=1) + "\n")


def _record(source: Source, *, plain: bool = False) -> Gabor:
    if isinstance(source, Gabor):
        return source.detach()
    layer = source.gabor if isinstance(source, MixedConv) else source
    if not isinstance(layer, GABOR_LAYERS):
        raise TypeError(
            f"Expected a Gabor layer or a record, got {type(source).__name__}; give "
            "the layer itself of a network."
        )
    if plain and (layer.dc != "keep" or layer.unit_norm):
        raise ValueError(
            f"A layer with dc={layer.dc!r} and unit_norm={layer.unit_norm} makes other kernels of "
            "its parameters than other libraries do; give layer.params to write them all the same."
        )
    params: Gabor = layer.params.detach()
    return params


def _fields(one: Gabor) -> dict[str, float]:
    """A single Gabor function's fields by the names of their columns."""
    columns = _columns(type(one))
    values = torch.cat([value.reshape(-1) for value in one.as_dict().values()]).tolist()
    return dict(zip(columns, values, strict=True))


def _in_words(one: Gabor, words: str) -> dict[str, float]:
    numbers, scale = _TO[words](one)  # type: ignore[arg-type]  # it says so when it is no Gabor2d
    units = _LIBRARY_UNITS[words]
    named = {_headed(name, units[name]): value for name, value in numbers.items()}
    return named | {_SCALE: scale}


# -- reading ----------------------------------------------------------------------------------


def from_csv(text: str, *, dtype: torch.dtype = torch.float64) -> Gabor:
    """The record of which ``to_csv`` made a table, in whichever words.

    Args:
        text: a line of column names, then a row for each filter and channel, in any order.
        dtype: floating type of the record.

    Returns:
        A ``Gabor1d``, ``Gabor2d`` or ``Gabor3d`` of batch shape ``(filters,)`` or, where there
        is a column of channels, ``(filters, channels)``.

    Raises:
        ValueError: the columns are none of those of ``to_csv``; a row has more or fewer entries,
            or something not a number; a filter or channel is missing or twice there; or a value
            is out of its range. The message names the line.

    Example:
        >>> edge = Gabor2d.of(orientation=0.1, wavelength=[6.0, 7.0], sigma=2.0)
        >>> bool(from_csv(to_csv(edge)).isclose(edge).all())
        True
    """
    try:
        head, *lines = csv.reader(io.StringIO(text.removeprefix("\ufeff")))
    except (csv.Error, ValueError):
        head, lines = [text[:60]], []
    numbered = [(number, line) for number, line in enumerate(lines, 2) if line]
    n_places = 2 if head[1:2] == ["channel"] else 1
    kind = _kind(head, n_places)
    if not numbered:
        raise ValueError("The table has no rows below its column names.")
    table: dict[tuple[int, ...], list[float]] = {}
    for number, line in numbered:
        place, entries = _parsed(number, line, head, n_places)
        if place in table:
            raise ValueError(f"Line {number} has {_told(place)} for the second time.")
        table[place] = entries
    shape = tuple(max(axis) + 1 for axis in zip(*table, strict=True))
    if len(table) != math.prod(shape):
        raise ValueError(
            f"The table has {len(table)} rows, expected {math.prod(shape)}: one for each of "
            f"{' x '.join(map(str, shape))} {' and '.join(f'{p}s' for p in _PLACES[:n_places])}."
        )
    values = torch.tensor([table[place] for place in sorted(table)], dtype=torch.float64)
    columns = dict(zip(head[n_places:], values.unbind(-1), strict=True))
    shaped = {name: column.reshape(shape) for name, column in columns.items()}
    return _record_of(kind, shaped).to(dtype)


def read_params(path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float64) -> Gabor:
    """Read what ``write_params`` has written.

    Args:
        path: a ``.json`` or ``.csv`` file.
        dtype: floating type of a record from ``.csv``; ``.json`` tells its own.

    Raises:
        OSError: the file cannot be read.
        ValueError: the suffix is another, or the file holds no such parameters; the message says
            where.
    """
    suffix = _suffix(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
        if suffix == ".csv":
            return from_csv(text, dtype=dtype)
        named = {record.__name__: record for record in RECORDS.values()}
        # Which of the records it is, stands in the text; a wrong one says what it has found.
        record = next((r for n, r in named.items() if f'"type": "{n}"' in text), Gabor2d)
        return record.from_json(text)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r}: {error}") from None


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"Parameters go into .json or .csv files, got {os.fspath(path)!r}.")
    return suffix


def _headed(name: str, unit: str) -> str:
    return name if unit == "1" else f"{name} ({unit})"


def _columns(record: type[Gabor]) -> list[str]:
    names = [
        (f"{name}[{axis}]" if name == "center" else name, UNITS[name])
        for name in record.field_names()
        for axis in range(record.n_dims if name == "center" else 1)
    ]
    return [_headed(*name) for name in names]


def _kind(head: Sequence[str], n_places: int) -> type[Gabor] | str:
    """The record, or the library, whose columns these are."""
    known: dict[type[Gabor] | str, list[str]] = {r: _columns(r) for r in RECORDS.values()}
    for library, units in _LIBRARY_UNITS.items():
        known[library] = [*(_headed(*pair) for pair in units.items()), _SCALE]
    given = sorted(head[n_places:])
    for kind, columns in known.items():
        if head[:1] == ["filter"] and given == sorted(columns):
            return kind
    raise ValueError(
        f"The table must begin with a line of to_csv's columns, as 'filter,channel,"
        f"{','.join(known[Gabor2d])}', got {','.join(head)!r:.200}."
    )


def _parsed(
    number: int, line: Sequence[str], head: Sequence[str], n_places: int
) -> tuple[tuple[int, ...], list[float]]:
    if len(line) != len(head):
        raise ValueError(f"Line {number} has {len(line)} entries, expected {len(head)}.")
    parsed: list[Any] = []
    for column, (name, entry) in enumerate(zip(head, line, strict=True)):
        try:
            value = int(entry) if column < n_places else float(entry)
            if column < n_places and not 0 <= value < 10**6:
                raise ValueError
        except ValueError:
            wanted = f"a {name} counted from 0" if column < n_places else f"a number for {name}"
            raise ValueError(f"Line {number} must have {wanted}, got {entry!r:.40}.") from None
        parsed.append(value)
    return tuple(parsed[:n_places]), parsed[n_places:]


def _told(place: Sequence[int]) -> str:
    return " and ".join(f"{name} {number}" for name, number in zip(_PLACES, place, strict=False))


def _record_of(kind: type[Gabor] | str, columns: Mapping[str, Tensor]) -> Gabor:
    if not isinstance(kind, str):
        fields = {
            name: torch.stack(
                [
                    columns[_headed(f"center[{axis}]", UNITS["center"])]
                    for axis in range(kind.n_dims)
                ],
                -1,
            )
            if name == "center"
            else columns[_headed(name, UNITS[name])]
            for name in kind.field_names()
        }
        record = kind(**fields)
    else:
        units = _LIBRARY_UNITS[kind]
        given = {name: columns[_headed(name, unit)] for name, unit in units.items()}
        found = _FROM[kind](**given)
        # What a library's kernel is multiplied by to be ours multiplies its height, too.
        record = found.replace(amplitude=found.amplitude * columns[_SCALE])
    record.check()
    return record
