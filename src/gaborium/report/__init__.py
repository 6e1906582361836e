"""Reports: a result as a page, as figures, and as JSON and CSV.

``results`` makes the sections for each kind of result, and ``page`` fills the one template with
them. The terminal shows the same sections without figures.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import Tensor

from gaborium.report.page import Report, Section, render, saved
from gaborium.report.results import REPORTS
from gaborium.support import csv_text, write_bytes, write_text


def describe(result: Any, kernels: Tensor | None = None) -> Report:
    """What is said about a result, for the results that ``write_report`` takes.

    Without ``kernels`` there is no table of all filters, as in the terminal.
    """
    kind = type(result).__name__
    if kind not in REPORTS:
        raise TypeError(f"There are reports for {', '.join(REPORTS)}, not for {kind}.")
    return REPORTS[kind](result, kernels)


def write_report(
    result: Any,
    folder: str | os.PathLike[str],
    *,
    facts: Mapping[str, str] | None = None,
    kernels: Tensor | None = None,
) -> list[Path]:
    """Write a result as a page, as figures, as JSON, and as a table with a row for each filter.

    Convention:
        - the page refers to nothing outside itself; ``facts`` are shown as text
        - in ``result.json`` angles are in rad, lengths in px, and numbers that JSON does not have
          are the texts ``inf``, ``-inf`` and ``nan``
        - either all files are written or none

    Args:
        result: a ``FitResult``, ``Census``, ``Conversion``, ``Diagnosis``, ``Recovery`` or
            ``TrainResult``.
        folder: an existing folder; files of the same names are replaced.
        facts: how the result was made, by name, such as the file and its checksum.
        kernels: the kernels that were fitted, classified, or converted.

    Returns:
        The files: ``report.html``, ``result.json``, a PNG for each figure, and ``result.csv`` for
        results with a row for each filter.

    Raises:
        FileNotFoundError: there is no such folder; raised before any work is done.
        TypeError: ``result`` is of another type, or ``kernels`` are missing.
        ValueError: ``kernels`` do not belong to ``result``.
        ImportError: Jinja2 or matplotlib is not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from gaborium import Gabor2d, fit, gabor
        >>> kernels = gabor(Gabor2d.of(orientation=[0.0, 0.8], wavelength=6.0, sigma=2.0), 13)
        >>> with TemporaryDirectory() as folder:
        ...     files = write_report(fit(kernels), folder, kernels=kernels)
        >>> [file.name for file in files]
        ['report.html', 'result.json', 'result.csv', 'fit.png', 'parameters.png']
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"There is no folder {os.fspath(folder)!r}; make it first.")
    report, facts = describe(result, kernels), dict(facts or {})
    if report.rows and kernels is None:
        raise TypeError(f"The report of a {type(result).__name__} needs kernels=.")
    versions = {name: version(name) for name in ("gaborium", "torch", "matplotlib")}
    versions |= {"python": platform.python_version()}
    shown = facts | {"versions": ", ".join(map(" ".join, versions.items()))}
    html, figures = render(report, shown)
    record = {"format": f"gaborium.{report.kind}", "version": 1, "facts": facts}
    record |= {"versions": versions, "headline": report.headline}
    record["result"] = json.loads(result.to_json())
    contents = {
        "report.html": html.encode(),
        "result.json": (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode(),
    }
    if report.rows:
        contents["result.csv"] = csv_text(report.rows).encode()
    contents |= {f"{name}.png": saved(figure, format="png") for name, figure in figures.items()}
    for name, content in contents.items():
        write_bytes(Path(folder, name), content)
    return [Path(folder, name) for name in contents]


def write_index(folder: str | os.PathLike[str]) -> Path | None:
    """Write ``index.html``: the runs in a folder with their headlines, the newest first.

    Returns:
        The page; ``None`` where there is already one that is not ours.
    """
    path = Path(folder, "index.html")
    if path.exists() and 'content="gaborium"' not in path.read_text(errors="replace"):
        return None
    runs = sorted(Path(folder).glob("*/result.json"), key=os.path.getmtime, reverse=True)
    sections = []
    for run in [run.parent for run in runs if run.with_name("report.html").is_file()]:
        try:
            record = json.loads((run / "result.json").read_bytes())
            said = [record["headline"], f"`{record['facts']['command']}`"]
        except (LookupError, TypeError, ValueError):
            said = []
        sections.append(Section(run.name, said, link=f"{quote(run.name)}/report.html"))
    index = Report("index", "Gaborium runs", f"{len(sections)} runs", [], sections)
    write_text(path, render(index, {})[0])
    return path
