"""The report of ``gaborium fit``: the page, its figures, and the result as JSON and as a table."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium.files import csv_text
from gaborium.fitting import FitResult, Outcome
from gaborium.params import UNITS, plain
from gaborium.plots import (
    INK,
    MUTED,
    SEQUENTIAL,
    best_first,
    colored,
    gallery,
    highest_frequency,
    lowest_explained,
    panels,
    plot_fit,
    plot_parameters,
    wavelength_ticks,
)
from gaborium.reporting.charts import (
    DARK,
    GRID,
    Chart,
    chart_json,
    data_uri,
    plotly_parts,
    plotly_script,
)
from gaborium.reporting.page import render, versions, write_files
from gaborium.reporting.wording import degrees, number, percent

_JSON_VERSION = 1
_TITLE = "Gabor functions nearest to kernels"
_LIMIT = 96  # filters in the gallery
_MAX_POINTS = 3000  # of the chart; more are slow to draw, and hide one another
_MAX_SIDE = 96  # px of a picture in the gallery
_SHOWN = ("orientation", "elevation", "wavelength", "sigma", "aspect_ratio", "center")
_SYMBOLS = {
    "orientation": "θ",
    "elevation": "φ",
    "wavelength": "λ",
    "sigma": "σ",
    "aspect_ratio": "γ",
    "center": "centre",
}


class Row(NamedTuple):
    """A filter of the gallery.

    Args:
        number: of the filter.
        explained: its explained variance, in words.
        outcome: its name in words, empty for a filter that converged.
        pictures: kernel, fit and residual as ``data:`` URIs of PNG.
        values: symbol and value of each parameter.
    """

    number: int
    explained: str
    outcome: str
    pictures: list[str]
    values: list[tuple[str, str]]


def fit_summary(result: FitResult) -> dict[str, Any]:
    """What a fit found over all filters, in a few numbers.

    Args:
        result: from ``fit``.

    Returns:
        ``n_filters``; ``outcomes``, for each that occurs its count, the most frequent first;
        ``explained_variance``, its quartiles over all filters with something to fit;
        ``wavelength``, the median over the filters that converged, px. Without such filters,
        the last two are ``None``.

    Example:
        >>> from gaborium import Gabor2d, fit, gabor
        >>> bank = gabor(Gabor2d.of(orientation=[0.0, 0.8], wavelength=6.0, sigma=2.0), 13)
        >>> summary = fit_summary(fit(bank))
        >>> summary["outcomes"], round(summary["wavelength"], 3)
        ({'CONVERGED': 2}, 6.0)
    """
    explained = result.explained_variance.double().cpu()
    explained = explained[explained.isfinite()]
    wavelength = result.params.wavelength.flatten().double().cpu()[result.converged]
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    counts = Counter(outcome.name for outcome in result.outcome)
    return {
        "n_filters": len(result),
        "outcomes": dict(counts.most_common()),
        "explained_variance": explained.quantile(quarters).tolist() if len(explained) else None,
        "wavelength": wavelength.quantile(0.5).item() if len(wavelength) else None,
    }


def fit_headline(result: FitResult) -> str:
    """For how many filters a Gabor function was found and what it explains, in one sentence."""
    summary = fit_summary(result)
    n, quartiles = summary["n_filters"], summary["explained_variance"]
    n_found = summary["outcomes"].get(Outcome.CONVERGED.name, 0)
    filters = f"{n_found} of {n} filters" if n > 1 else "the filter"
    found = (
        f"A Gabor function was found for {filters}"
        if n_found
        else (f"No Gabor function was found for {f'any of {n} filters' if n > 1 else 'the filter'}")
    )
    if quartiles is None:
        return f"{found}: there was nothing to fit."
    what = "the median" if n > 1 else "its"
    return f"{found}; {what} explained variance is {percent(quartiles[1])}."


def fit_record(result: FitResult, kernels: Tensor, *, facts: Mapping[str, str]) -> dict[str, Any]:
    """All that was found, as plain objects for JSON.

    Convention:
        - angles are in rad, lengths in px; ``orientation`` runs from +x towards +y (downwards)
        - numbers that JSON does not have are the texts ``inf``, ``-inf`` and ``nan``
        - ``result.params`` is what ``Gabor2d.from_json`` reads, if every filter was fitted

    Args:
        result: from ``fit``.
        kernels: what it was given.
        facts: where the kernels came from, by name, such as the file and its checksum.

    Returns:
        ``format``, ``version``, ``facts``, ``versions``, ``shape``, ``summary``, ``result``.

    Example:
        >>> from gaborium import Gabor2d, fit, gabor
        >>> bank = gabor(Gabor2d.of(orientation=[0.0, 0.8], wavelength=6.0, sigma=2.0), 13)
        >>> record = fit_record(fit(bank), bank, facts={"file": "bank.npy"})
        >>> record["shape"], record["result"]["outcome"]
        ([2, 13, 13], ['CONVERGED', 'CONVERGED'])
    """
    return plain(
        {
            "format": "gaborium.fit",
            "version": _JSON_VERSION,
            "facts": dict(facts),
            "versions": versions(),
            "shape": list(kernels.shape),
            "summary": fit_summary(result),
            "result": json.loads(result.to_json()),
        }
    )


def report_fit(
    result: FitResult,
    kernels: Tensor,
    *,
    title: str = _TITLE,
    limit: int = _LIMIT,
    facts: Mapping[str, str],
) -> str:
    """Write the page that shows every kernel beside its fit.

    The page is one file that opens without a network: it refers to nothing outside itself, and
    forbids the browser to. Whatever ``title`` and ``facts`` hold is shown as text.

    Args:
        result: from ``fit``.
        kernels: what it was given.
        title: of the page.
        limit: filters in the gallery at most, at least 3; of more, the best, those in the middle
            and the worst are shown.
        facts: where the kernels came from, by name, such as the file and its checksum.

    Returns:
        HTML.

    Raises:
        ValueError: ``kernels`` are not those of ``result``, or ``limit`` is below 3.
        ImportError: Jinja2, plotly or matplotlib is not installed.

    Example:
        >>> from gaborium import Gabor2d, fit, gabor
        >>> bank = gabor(Gabor2d.of(orientation=[0.0, 0.8], wavelength=6.0, sigma=2.0), 13)
        >>> page = report_fit(fit(bank), bank, facts={"file": "<bank>"})
        >>> "found for 2 of 2 filters" in page, "&lt;bank&gt;" in page
        (True, True)
    """
    order = best_first(result)
    n_dims = result.params.n_dims
    size = kernels.shape[-n_dims:]
    return render(
        "fits.html.j2",
        {"number": number, "percent": percent},
        title=title,
        facts=facts,
        headline=fit_headline(result),
        summary=fit_summary(result),
        sentences={outcome.name: outcome.value for outcome in Outcome},
        words=_OUTCOMES,
        groups=[
            (name, _rows(result, kernels, numbers))
            for name, numbers in gallery(order, limit)
            if numbers
        ],
        chart=parameter_chart(result, order),
        n_fitted=len(order),
        n_points=len(order[:: _thinning(order)]),
        n_channels=result.params.phase.numel() // len(result),
        n_dims=n_dims,
        shape=" × ".join(map(str, kernels.shape)),
        size=" × ".join(map(str, size)),
        flat=max(0.25, (size[-2] if n_dims > 1 else 1) / size[-1]),
        dark=DARK,
        plotly=plotly_script(),
    )


def write_fit(
    result: FitResult,
    kernels: Tensor,
    folder: str | os.PathLike[str],
    *,
    title: str = _TITLE,
    limit: int = _LIMIT,
    facts: Mapping[str, str],
) -> tuple[str, ...]:
    """Write the result as JSON, as a table, as a page, and as figures.

    Args:
        result: from ``fit``.
        kernels: what it was given.
        folder: where to; it exists, and files of the same names are replaced.
        title: of the page.
        limit: filters in the page's gallery at most, at least 3.
        facts: where the kernels came from, by name, such as the file and its checksum.

    Returns:
        The names of the files: ``result.json``, ``result.csv``, ``report.html`` and two PNG.

    Raises:
        FileNotFoundError: there is no such folder; told before any work is done.
        OSError: a file cannot be written, with the reason.
        ValueError: ``kernels`` are not those of ``result``, or ``limit`` is below 3.
        ImportError: Jinja2, plotly or matplotlib is not installed.
    """

    def contents() -> Iterator[tuple[str, Any]]:
        record = fit_record(result, kernels, facts=facts)
        yield "report.html", report_fit(result, kernels, title=title, limit=limit, facts=facts)
        yield "result.csv", csv_text(result.to_table())
        yield "result.json", json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
        yield "fit.png", plot_fit(result, kernels)
        yield "parameters.png", plot_parameters(result)

    return write_files(folder, contents())


# -- words ------------------------------------------------------------------------------------

_OUTCOMES = {
    "CONVERGED": "converged",
    "STALLED": "stalled",
    "OFF_MODEL": "off model",
    "NOT_IDENTIFIABLE": "not identifiable",
    "BAD_INPUT": "bad input",
}


def with_error(value: float, error: float, *, angle: bool = False) -> str:
    """A value with as many digits as its standard error justifies.

    Example:
        >>> with_error(5.12345, 0.0321), with_error(0.5, 0.01, angle=True)
        ('5.123 ± 0.032', '28.65° ± 0.57°')
        >>> with_error(5.12345, math.inf), with_error(math.inf, math.inf), with_error(1.0, 0.0)
        ('5.123 ± ∞', '∞', '1.000')
        >>> with_error(1e-17, 1e-9), with_error(123456.0, 7.0)
        ('0 ± 1.0 × 10⁻⁹', '123456.0 ± 7.0')
    """
    if not math.isfinite(value):
        return number(value)
    write = degrees if angle else number
    if error == 0:  # kept, not searched for
        return write(value)
    if not math.isfinite(error) or error >= abs(value) > 1e4:
        return f"{write(value)} ± {number(error, 2)}"
    scale = 180 / math.pi if angle else 1.0
    decimals = min(6, max(0, 1 - math.floor(math.log10(scale * error))))
    if scale * error < 1e-6:
        return f"{write(round(value, 6))} ± {write(error, 2)}"
    unit = "°" if angle else ""
    text = f"{scale * value:.{decimals}f}{unit} ± {scale * error:.{decimals}f}{unit}"
    return text.replace("-", "−")


def _values(result: FitResult, index: int) -> list[tuple[str, str]]:
    """Symbol and value of every parameter of the geometry that was searched for."""
    fields, errors = result.params.as_dict(), result.standard_error
    values = []
    for name in _SHOWN:
        if name not in fields:
            continue
        entries = fields[name][index].flatten().tolist()
        uncertain = errors[name][index].flatten().tolist()
        if name in ("center", "aspect_ratio") and not any(uncertain):
            continue  # kept where it was
        angle = UNITS[name] == "rad"
        unit = " px" if UNITS[name] == "px" else ""
        written = [with_error(*pair, angle=angle) for pair in zip(entries, uncertain, strict=True)]
        text = written[0] if len(written) == 1 else f"({', '.join(written)})"
        values.append((_SYMBOLS[name], text + unit))
    return values


# -- pictures ---------------------------------------------------------------------------------


def _rows(result: FitResult, kernels: Tensor, numbers: Sequence[int]) -> list[Row]:
    return [
        Row(
            number=index,
            explained=percent(result.explained_variance[index].item()),
            outcome=(
                "" if result.outcome[index] is Outcome.CONVERGED
                else _OUTCOMES[result.outcome[index].name]
            ),
            pictures=three,
            values=_values(result, index),
        )
        for index, three in zip(numbers, pictures(result, kernels, numbers), strict=True)
    ]  # fmt: skip


def pictures(result: FitResult, kernels: Tensor, numbers: Sequence[int]) -> list[list[str]]:
    """Kernel, fit and residual of some filters as ``data:`` URIs of PNG."""
    return [
        [data_uri((255 * colors).round().byte()) for colors in colored(_small(three))]
        for three in panels(result, kernels, numbers)
    ]


def _small(images: Tensor) -> Tensor:
    """The same images, averaged down where they have more pixels than a page can show."""
    sides = [min(side, _MAX_SIDE) for side in images.shape[-2:]]
    return F.interpolate(images, sides, mode="area")


def parameter_chart(result: FitResult, order: Sequence[int]) -> Chart:
    """Every filter at its wave vector; in 1-D at its wavelength and sigma.

    Args:
        result: from ``fit``.
        order: the filters to draw; of more than 3000, as many at equal distances in the list.
    """
    objects, _ = plotly_parts()
    chosen = order[:: _thinning(order)][::-1]  # the best on top
    params = result.params
    explained = result.explained_variance[chosen].tolist()
    texts = [_hover(result, index) for index in chosen]
    converged = result.converged[chosen].tolist()
    marker = {
        "size": 9 if len(chosen) < 300 else 6,
        "color": explained,
        "cmin": lowest_explained(result.explained_variance),
        "cmax": 1.0,
        "colorscale": SEQUENTIAL,
        "colorbar": {
            "title": {"text": "explained variance", "side": "right"}, "outlinewidth": 0,
            "thickness": 14, "len": 0.75, "tickformat": ".0%",
        },
        "symbol": ["circle" if arrived else "diamond-tall" for arrived in converged],
        "line": {"width": 0.7, "color": MUTED},
    }  # fmt: skip
    shared = {
        "mode": "markers", "marker": marker, "text": texts, "hovertemplate": "%{text}",
        "name": "", "showlegend": False,
    }  # fmt: skip
    figure = objects.Figure()
    wavelength = params.wavelength.flatten()[chosen].tolist()
    if params.n_dims == 1:
        sigma = params.sigma.flatten()[chosen].tolist()
        figure.add_trace(objects.Scatter(x=_finite(wavelength), y=_finite(sigma), **shared))
        figure.update_xaxes(type="log", title_text="wavelength, px")
        figure.update_yaxes(type="log", title_text="sigma, px")
        return Chart(
            "parameters", "Sigma against the wavelength of every filter", chart_json(figure)
        )

    frequency = params.frequency.flatten()
    radius = frequency[chosen].tolist()
    angles = params.as_dict()["orientation"].flatten()[chosen].rad2deg().tolist()
    for turn in (0.0, 180.0):
        figure.add_trace(
            objects.Scatterpolar(r=radius, theta=[angle + turn for angle in angles], **shared)
        )
    highest = highest_frequency(frequency)
    ticks = wavelength_ticks(highest)
    eighths = list(range(0, 360, 45))
    line = {"gridcolor": GRID, "linecolor": GRID, "tickcolor": MUTED}
    figure.update_layout(
        polar={
            "bgcolor": "rgba(0,0,0,0)",
            "angularaxis": {
                **line, "direction": "clockwise", "rotation": 0, "tickvals": eighths,
                "ticktext": [f"{angle % 180}°" for angle in eighths],
            },
            "radialaxis": {
                **line, "range": [0, highest], "angle": 22.5, "tickangle": 22.5,
                "tickvals": [1 / tick for tick in ticks], "ticks": "",
                "ticktext": [f"{tick:g} px" for tick in ticks], "showline": False,
                "tickfont": {"size": 11, "color": INK},
            },
        },
    )  # fmt: skip
    return Chart(
        "parameters",
        "Orientation and wavelength of every filter, as polar coordinates of its wave vector",
        chart_json(figure),
    )


def _thinning(order: Sequence[int]) -> int:
    return max(1, math.ceil(len(order) / _MAX_POINTS))


def _finite(values: list[float]) -> list[float | None]:
    """A logarithmic axis has no place for infinity."""
    return [value if math.isfinite(value) else None for value in values]


def _hover(result: FitResult, index: int) -> str:
    outcome = _OUTCOMES[result.outcome[index].name]
    explained = percent(result.explained_variance[index].item())
    lines = [f"{symbol} = {text}" for symbol, text in _values(result, index)]
    return "<br>".join([f"<b>filter {index}</b>, {outcome}", f"{explained} explained", *lines])
