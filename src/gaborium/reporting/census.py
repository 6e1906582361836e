"""The report of ``gaborium census``: every filter with its class and why, and a figure of all."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from gaborium.conversion import CLASSES, NUMBERS, Census
from gaborium.files import csv_text
from gaborium.plots import CLASS_COLORS, plot_census
from gaborium.reporting.charts import DARK
from gaborium.reporting.fits import pictures
from gaborium.reporting.page import drawn, render, versions, write_files
from gaborium.reporting.wording import counted, number, percent

_JSON_VERSION = 1
_TITLE = "Census of filters"
# Columns of the page's table, beside pictures, class and words; all numbers stand in result.csv.
_COLUMNS = {
    "gabor": "Gabor explains",
    "bars": "bars",
    "n_x": "n_x",
    "n_y": "n_y",
    "selectivity": "selectivity",
    "opponency": "opponency",
    "snr": "signal / noise",
}
_WORDS = {
    "gabor": "at least three bars of alternating sign in one orientation",
    "edge": "two sides of opposite sign, no stripes",
    "blob": "one patch of one sign, or about constant",
    "centre-surround": "a patch within a ring of the other sign",
    "colour-contrast": "colours against each other, no oriented lightness",
    "other": "clear structure that is none of these",
    "noise": "no structure, or no weights",
}
# Rows of the comparison with V1, and whether they are shares.
_BESIDE_V1 = {
    "n_x": ("n_x, median", False),
    "n_y": ("n_y, median", False),
    "bandwidth": ("bandwidth in octaves, median", False),
    "within": ("share in the grey region that holds 95 % of V1's cells", True),
    "cardinal": ("share within 22.5° of horizontal or vertical; of even directions 50 %", True),
    "octaves": ("spread of wavelengths: standard deviation in octaves", False),
}


class Row(NamedTuple):
    """A filter of the table.

    Args:
        number: of the filter.
        label: its class.
        confidence: in the class.
        pictures: kernel, fit and residual as ``data:`` URIs of PNG.
        values: what to sort by and what to show, for each column.
        why: in words.
    """

    number: int
    label: str
    confidence: float
    pictures: list[str]
    values: list[tuple[float, str]]
    why: str


def census_headline(result: Census) -> str:
    """What share of the filters are Gabor functions, in one sentence."""
    counts, n = result.counts, len(result)
    others = sorted(
        ((count, label) for label, count in counts.items() if count and label != "gabor"),
        key=lambda pair: -pair[0],
    )
    rest = "; the rest: " + ", ".join(f"{count} {label}" for count, label in others)
    return (
        f"{counts['gabor']} of {counted(n, 'filter')} ({100 * counts['gabor'] / n:.0f} %) "
        f"{'is a Gabor function' if counts['gabor'] == 1 else 'are Gabor functions'}"
        f"{rest if others else ''}."
    )


def census_record(result: Census, kernels: Tensor, *, facts: Mapping[str, str]) -> dict[str, Any]:
    """All that was found, as plain objects for JSON.

    Args:
        result: from ``census``.
        kernels: what it was given.
        facts: where the kernels came from, by name, such as the file and its checksum.

    Returns:
        ``format``, ``version``, ``facts``, ``versions``, ``shape``, ``headline``, ``result``.

    Example:
        >>> from gaborium import Gabor2d, census, gabor
        >>> bank = gabor(Gabor2d.of(wavelength=[4.0, 5.0], sigma=3.0), 11)
        >>> record = census_record(census(bank), bank, facts={"file": "bank.npy"})
        >>> record["headline"], record["result"]["labels"]
        ('2 of 2 filters (100 %) are Gabor functions.', ['gabor', 'gabor'])
    """
    return {
        "format": "gaborium.census",
        "version": _JSON_VERSION,
        "facts": dict(facts),
        "versions": versions(),
        "shape": list(kernels.shape),
        "headline": census_headline(result),
        "result": json.loads(result.to_json()),
    }


def report_census(
    result: Census, kernels: Tensor, *, title: str = _TITLE, facts: Mapping[str, str]
) -> str:
    """Write the page that shows every filter beside its fit, with its class and why.

    The page is one file that opens without a network: it refers to nothing outside itself, and
    forbids the browser to. Whatever ``title`` and ``facts`` hold is shown as text.

    Args:
        result: from ``census``.
        kernels: what it was given.
        title: of the page.
        facts: where the kernels came from, by name, such as the file and its checksum.

    Returns:
        HTML.

    Raises:
        ValueError: ``kernels`` are not those of ``result``.
        ImportError: Jinja2 or matplotlib is not installed.

    Example:
        >>> from gaborium import Gabor2d, census, gabor
        >>> bank = gabor(Gabor2d.of(wavelength=[4.0, 5.0], sigma=3.0), 11)
        >>> page = report_census(census(bank), bank, facts={"file": "<bank>"})
        >>> "2 of 2 filters" in page, "&lt;bank&gt;" in page
        (True, True)
    """
    n_dims = result.fit.params.n_dims
    size = kernels.shape[-n_dims:]
    everyone = sorted(
        range(len(result)),
        key=lambda i: (CLASSES.index(result.labels[i]), -result.confidence[i].item(), i),
    )
    images = pictures(result.fit, kernels, everyone)
    confidence = result.confidence.tolist()
    figure = base64.b64encode(drawn(plot_census(result, kernels), "png")).decode()
    return render(
        "census.html.j2",
        {"percent": percent, "number": number},
        title=title,
        facts=facts,
        headline=census_headline(result),
        counts=result.counts,
        words=_WORDS,
        colors=CLASS_COLORS,
        columns=[(_COLUMNS[name], NUMBERS[name]) for name in _COLUMNS],
        rows=[
            Row(i, result.labels[i], confidence[i], three, _values(result, i), result.explain(i))
            for i, three in zip(everyone, images, strict=True)
        ],
        pairs=_pairs(result),
        beside_v1=_beside_v1(result),
        figure="data:image/png;base64," + figure,
        n_channels=result.fit.params.phase.numel() // len(result),
        n_dims=n_dims,
        shape=" × ".join(map(str, kernels.shape)),
        flat=max(0.25, (size[-2] if n_dims > 1 else 1) / size[-1]),
        dark=DARK,
    )


def write_census(
    result: Census,
    kernels: Tensor,
    folder: str | os.PathLike[str],
    *,
    title: str = _TITLE,
    facts: Mapping[str, str],
) -> tuple[str, ...]:
    """Write the census as JSON, as a table, as a page, and as a figure for a paper.

    Args:
        result: from ``census``.
        kernels: what it was given.
        folder: where to; it exists, and files of the same names are replaced.
        title: of the page.
        facts: where the kernels came from, by name, such as the file and its checksum.

    Returns:
        The names of the files: ``report.html``, ``result.csv``, ``result.json``, and
        ``census`` as ``.pdf``, ``.svg`` and ``.png``.

    Raises:
        FileNotFoundError: there is no such folder; told before any work is done.
        OSError: a file cannot be written, with the reason.
        ValueError: ``kernels`` are not those of ``result``.
        ImportError: Jinja2 or matplotlib is not installed.
    """

    def contents() -> Iterator[tuple[str, Any]]:
        record = census_record(result, kernels, facts=facts)
        yield "report.html", report_census(result, kernels, title=title, facts=facts)
        yield "result.csv", csv_text(result.to_table())
        yield "result.json", json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
        figure = plot_census(result, kernels)
        for suffix in ("pdf", "svg", "png"):
            yield f"census.{suffix}", figure

    return write_files(folder, contents())


def _values(result: Census, index: int) -> list[tuple[float, str]]:
    values = []
    for name in _COLUMNS:
        value = result.numbers[name][index].item()
        if name == "gabor":
            text = percent(value)
        elif name == "bars":
            text = f"{value:.0f}"
        else:
            text = number(value, 2) if name == "snr" else f"{value:.2f}"
        values.append((value, text))
    return values


def _beside_v1(result: Census) -> list[tuple[str, str, str]]:
    """What is compared, the layer's number and V1's; nothing without a Gabor function."""
    if not result.counts["gabor"]:
        return []
    rows = []
    for name, pair in result.compare_with_v1().items():
        words, is_share = _BESIDE_V1[name]
        layer, v1 = (f"{100 * one:.0f} %" if is_share else f"{one:.2f}" for one in pair)
        rows.append((words, layer, v1))
    return rows


def _pairs(result: Census) -> list[tuple[str, list[str]]]:
    """Kinds of pairs in words, and the pairs of each, the most alike first."""
    kinds = {
        "negative": "negatives of each other",
        "quadrature": "in quadrature, a quarter of a cycle apart",
        "duplicate": "the same up to their place",
    }
    found = []
    for kind, words in kinds.items():
        own = [f"{p.first} and {p.second}" for p in result.pairs if p.kind == kind]
        if own:
            found.append((f"{counted(len(own), 'pair')} {words}", own))
    return found
