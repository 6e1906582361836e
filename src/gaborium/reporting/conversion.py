"""The report of ``gaborium convert``: what became a Gabor function, what stayed, what it costs."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from gaborium.conversion import Conversion
from gaborium.files import csv_text
from gaborium.plots import plot_conversion
from gaborium.reporting.charts import DARK
from gaborium.reporting.fits import pictures
from gaborium.reporting.page import drawn, render, versions, write_files
from gaborium.reporting.wording import counted, degrees, number, percent

_JSON_VERSION = 1
_TITLE = "Conversion to Gabor functions"
# Columns of the page's table: title, meaning and how the number is written.
_COLUMNS: dict[str, tuple[str, str, Any]] = {
    "explained_variance": ("kernel", "variance of the kernel that is explained", percent),
    "explained_response": ("responses", "variance of the responses that is explained", percent),
    "response_error": (
        "error",
        "difference of the responses, root mean square, in their standard deviations",
        percent,
    ),
    "orientation": ("θ", "orientation of the wave vector, from +x downwards", degrees),
    "elevation": ("φ", "elevation of the wave vector", degrees),
    "wavelength": ("λ, px", "wavelength", lambda value: number(value, 3)),
    "sigma": ("σ, px", "standard deviation along the wave vector", lambda value: number(value, 3)),
    "aspect_ratio": ("γ", "aspect ratio", lambda value: number(value, 3)),
}


class Row(NamedTuple):
    """A filter of the table.

    Args:
        number: of the filter.
        is_gabor: whether it is a Gabor function now.
        pictures: kernel, Gabor function and residual as ``data:`` URIs of PNG.
        values: what to sort by and what to show, for each column.
    """

    number: int
    is_gabor: bool
    pictures: list[str]
    values: list[tuple[float, str]]


def conversion_headline(conversion: Conversion) -> str:
    """How many filters became Gabor functions, and what is saved, in one sentence."""
    n, chosen = len(conversion.is_gabor), int(conversion.is_gabor.sum())
    if not chosen:
        return f"None of {counted(n, 'filter')} became a Gabor function."
    before, after = conversion.n_first_parameters
    became = "is a Gabor function" if chosen == 1 else "are Gabor functions"
    return (
        f"{chosen} of {counted(n, 'filter')} ({100 * chosen / n:.0f} %) {became} now; {before} "
        f"numbers of the layer become {after}."
    )


def conversion_sentences(conversion: Conversion) -> list[str]:
    """How filters were chosen and how well they are replaced, in words."""
    chosen = conversion.is_gabor
    what = "kernel" if conversion.responses is None else "responses to the images"
    how = (
        "The filters were named."
        if conversion.threshold is None
        else f"A filter is converted where its Gabor function explains at least "
        f"{100 * conversion.threshold:g} % of the variance of its {what}."
    )
    sentences = [how]
    if chosen.any():
        explained = conversion.fit.explained_variance[chosen]
        sentences.append(
            f"Of those that were converted the median is {percent(explained.median().item())} and "
            f"the worst {percent(explained.min().item())}."
        )
        if conversion.response_error is not None:
            error = conversion.response_error[chosen]
            sentences.append(
                "Their responses to the images differ from those before by "
                f"{percent(error.median().item())} of a standard deviation (median; at most "
                f"{percent(error.max().item())})."
            )
    return sentences


def conversion_record(
    conversion: Conversion, kernels: Tensor, *, facts: Mapping[str, str]
) -> dict[str, Any]:
    """All that was found, as plain objects for JSON.

    Args:
        conversion: from ``convert``.
        kernels: of the layer before.
        facts: where the layer came from, by name, such as the file and its checksum.

    Returns:
        ``format``, ``version``, ``facts``, ``versions``, ``shape``, ``headline``, ``result``.
    """
    return {
        "format": "gaborium.conversion",
        "version": _JSON_VERSION,
        "facts": dict(facts),
        "versions": versions(),
        "shape": list(kernels.shape),
        "headline": conversion_headline(conversion),
        "result": json.loads(conversion.to_json()),
    }


def report_conversion(
    conversion: Conversion, kernels: Tensor, *, title: str = _TITLE, facts: Mapping[str, str]
) -> str:
    """Write the page that shows every filter beside the Gabor function that replaces it, or would.

    The page is one file that opens without a network: it refers to nothing outside itself, and
    forbids the browser to. Whatever ``title`` and ``facts`` hold is shown as text.

    Args:
        conversion: from ``convert``.
        kernels: of the layer before, ``(filters, channels, *kernel_size)``.
        title: of the page.
        facts: where the layer came from, by name, such as the file and its checksum.

    Returns:
        HTML.

    Raises:
        ValueError: ``kernels`` are not those of the conversion.
        ImportError: Jinja2 or matplotlib is not installed.

    Example:
        >>> from torch import nn
        >>> from gaborium import convert
        >>> layer = nn.Conv2d(1, 2, 5)
        >>> page = report_conversion(convert(layer), layer.weight, facts={"file": "<net>"})
        >>> "of 2 filters" in page, "&lt;net&gt;" in page
        (True, True)
    """
    fit = conversion.fit
    n_dims = fit.params.n_dims
    size = kernels.shape[-n_dims:]
    explained = fit.explained_variance.nan_to_num(0.0).tolist()
    chosen = conversion.is_gabor.tolist()
    order = sorted(range(len(fit)), key=lambda i: (not chosen[i], -explained[i], i))
    table = conversion.to_table()
    columns = [name for name in _COLUMNS if name in table[0]]
    figure = drawn(plot_conversion(conversion, kernels), "png")
    return render(
        "conversion.html.j2",
        {"percent": percent, "number": number},
        title=title,
        facts=facts,
        headline=conversion_headline(conversion),
        sentences=conversion_sentences(conversion),
        columns=[_COLUMNS[name][:2] for name in columns],
        rows=[
            Row(i, chosen[i], three, _values(table[i], columns))
            for i, three in zip(order, pictures(fit, kernels, order), strict=True)
        ],
        with_images=conversion.responses is not None,
        figure="data:image/png;base64," + base64.b64encode(figure).decode(),
        n_channels=fit.params.phase.numel() // len(fit),
        n_dims=n_dims,
        shape=" × ".join(map(str, kernels.shape)),
        flat=max(0.25, (size[-2] if n_dims > 1 else 1) / size[-1]),
        dark=DARK,
    )


def write_conversion(
    conversion: Conversion,
    kernels: Tensor,
    folder: str | os.PathLike[str],
    *,
    title: str = _TITLE,
    facts: Mapping[str, str],
) -> tuple[str, ...]:
    """Write the conversion as JSON, as a table, as a page, and as a figure for a paper.

    Args:
        conversion: from ``convert``.
        kernels: of the layer before, ``(filters, channels, *kernel_size)``.
        folder: where to; it exists, and files of the same names are replaced.
        title: of the page.
        facts: where the layer came from, by name, such as the file and its checksum.

    Returns:
        The names of the files: ``report.html``, ``result.csv``, ``result.json``, and
        ``conversion`` as ``.pdf``, ``.svg`` and ``.png``.

    Raises:
        FileNotFoundError: there is no such folder; told before any work is done.
        OSError: a file cannot be written, with the reason.
        ValueError: ``kernels`` are not those of the conversion.
        ImportError: Jinja2 or matplotlib is not installed.
    """

    def contents() -> Iterator[tuple[str, Any]]:
        record = conversion_record(conversion, kernels, facts=facts)
        yield "report.html", report_conversion(conversion, kernels, title=title, facts=facts)
        yield "result.csv", csv_text(conversion.to_table())
        yield "result.json", json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
        figure = plot_conversion(conversion, kernels)
        for suffix in ("pdf", "svg", "png"):
            yield f"conversion.{suffix}", figure

    return write_files(folder, contents())


def _values(row: Mapping[str, Any], columns: list[str]) -> list[tuple[float, str]]:
    return [(row[name], _COLUMNS[name][2](row[name])) for name in columns]
