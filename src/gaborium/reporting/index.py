"""The page of all runs in a folder: what each is, what came out, and where its report is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from gaborium.files import write_text
from gaborium.reporting.charts import DARK
from gaborium.reporting.page import render
from gaborium.reporting.wording import counted, number, percent

INDEX_FILE = "index.html"
_MARK = '<meta name="generator" content="gaborium">'
_TITLE = "Gaborium runs"
_RESULTS = ("result.json", "diagnosis.json")
_LARGEST = 2**26  # bytes of a result that is read for a line about it


_Told = tuple[str, str, list[str], str]  # kind, main number, what it is and others beside it, words


class _Entry(NamedTuple):
    """A run in the list."""

    name: str
    kind: str
    when: datetime
    value: str
    units: list[str]
    sentence: str
    command: str


def write_index(folder: str | os.PathLike[str]) -> Path | None:
    """Write the page that lists the finished runs in a folder, the newest first.

    Args:
        folder: of the runs, each a folder with ``report.html`` and a result as JSON.

    Returns:
        The page, ``index.html`` in the folder; ``None`` where one lies that is not ours, which
        stays.

    Raises:
        OSError: the page cannot be written, with the reason.
        ImportError: Jinja2 is not installed.
    """
    path = Path(folder, INDEX_FILE)
    if os.path.lexists(path) and not _is_ours(path):
        return None
    entries = [entry for place in Path(folder).iterdir() if (entry := _entry(place)) is not None]
    entries.sort(key=lambda entry: (entry.when, entry.name), reverse=True)
    page = render(
        "index.html.j2",
        {},
        title=_TITLE,
        headline=f"{counted(len(entries), 'run')} with a report",
        entries=entries,
        mark=_MARK,
        dark=DARK,
    )
    write_text(path, page)
    return path


def _is_ours(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return _MARK in file.read(2000)
    except (OSError, UnicodeDecodeError):
        return False


def _entry(place: Path) -> _Entry | None:
    if place.name.startswith(".") or not (place / "report.html").is_file():
        return None
    result = next((place / name for name in _RESULTS if (place / name).is_file()), None)
    if result is None:
        return None
    when = datetime.fromtimestamp(result.stat().st_mtime).astimezone()
    try:
        record = json.loads(result.read_bytes()) if result.stat().st_size < _LARGEST else {}
        kind, value, units, sentence = _TOLD[record["format"]](record)
        command = str(record["facts"].get("command", ""))
    except (AttributeError, LookupError, TypeError, ValueError):
        # Too large, of another version, or changed by hand: the report is there all the same.
        kind, value, units, sentence, command = "Report", "", [], "", ""
    return _Entry(place.name, kind, when, value, units, sentence, command)


def _recovery(record: Mapping[str, Any]) -> _Told:
    error = number(float(record["kernel_errors"]["found"]), 2)
    return (
        "Recovery of a planted Gabor kernel",
        error,
        ["error of the kernel, relative"],
        record["outcome"]["headline"],
    )


def _training(record: Mapping[str, Any]) -> _Told:
    first, *others = record["table"]
    beside = [
        f"{row['variant']}: {_share(row['accuracy'], row['accuracy_error'])}" for row in others
    ]
    return (
        "Training of networks",
        _share(first["accuracy"], first["accuracy_error"]),
        [f"test accuracy, {first['variant']}", *beside],
        record["headline"],
    )


def _share(accuracy: float | None, error: float | None) -> str:
    if accuracy is None:
        return "–"
    return f"{100 * accuracy:.1f}{f' ± {100 * error:.1f}' if error is not None else ''} %"


def _fit(record: Mapping[str, Any]) -> _Told:
    summary = record["summary"]
    explained = summary["explained_variance"]
    n_found = summary["outcomes"].get("CONVERGED", 0)
    return (
        "Fit of kernels",
        percent(float(explained[1])) if explained else "–",
        ["explained variance, median"],
        f"{n_found} of {counted(summary['n_filters'], 'filter')} converged; "
        f"from {record['facts'].get('file', 'a file')}.",
    )


def _diagnosis(record: Mapping[str, Any]) -> _Told:
    n_findings = len(record["findings"])
    return (
        "Diagnosis",
        str(n_findings),
        ["finding" if n_findings == 1 else "findings"],
        record["headline"],
    )


def _census(record: Mapping[str, Any]) -> _Told:
    result = record["result"]
    n = len(result["labels"])
    return (
        "Census of filters",
        f"{100 * result['counts']['gabor'] / n:.0f} %",
        [f"Gabor functions, of {counted(n, 'filter')}"],
        record["headline"],
    )


def _conversion(record: Mapping[str, Any]) -> _Told:
    filters = record["result"]["filters"]
    share = sum(bool(row["is_gabor"]) for row in filters) / len(filters)
    return (
        "Conversion to Gabor functions",
        f"{100 * share:.0f} %",
        [f"converted, of {counted(len(filters), 'filter')}"],
        record["headline"],
    )


_TOLD = {
    "gaborium.recovery": _recovery,
    "gaborium.train": _training,
    "gaborium.fit": _fit,
    "gaborium.census": _census,
    "gaborium.conversion": _conversion,
    "gaborium.diagnosis": _diagnosis,
}
