"""Reports about the filters of a layer: fitted, classified, or converted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from gaborium.params import UNITS
from gaborium.plots import (
    best_first,
    evenly,
    plot_census,
    plot_conversion,
    plot_fit,
    plot_parameters,
    strips,
)
from gaborium.report.formatting import counted, degrees, number, percent
from gaborium.report.page import Report, Section, Table

_MOST_ROWS = 64
_SHARES = ("gabor", "explained_variance", "explained_response", "response_error", "confidence")
# Columns of the table of filters, where a result has them.
_COLUMNS = {
    "now": "now",
    "class": "class",
    "explanation": "explanation",
    "outcome": "outcome",
    "confidence": "confidence",
    "explained_variance": "kernel explained",
    "explained_response": "responses explained",
    "response_error": "change of responses, std",
    "n_x": "n_x",
    "n_y": "n_y",
    "orientation": "θ",
    "elevation": "φ",
    "wavelength": "λ, px",
    "sigma": "σ, px",
    "aspect_ratio": "γ",
}
_V1 = {
    "n_x": "n_x, cycles in a standard deviation of the envelope along the wave: median",
    "n_y": "n_y, the same along the stripes: median",
    "bandwidth": "bandwidth in octaves, median",
    "within": "share in the region that holds 95 % of V1's cells",
    "cardinal": "share within 22.5° of horizontal or vertical; 0.5 for even directions",
    "octaves": "spread of wavelengths: standard deviation in octaves",
}
_SOURCES = (
    "V1: 79 simple cells (Ringach 2002), directions of 246 cells (De Valois, Yund and Hepler "
    "1982), frequencies of 139 (De Valois, Albrecht and Thorell 1982). Cells are measured in "
    "degrees and filters in pixels, so only the spread of wavelengths can be compared."
)


def fit_report(result: Any, kernels: Any) -> Report:
    """The Gabor functions nearest to kernels."""
    order, converged = best_first(result), int(result.converged.sum())
    headline = f"{converged} of {counted(len(result), 'filter')} converged to a Gabor function"
    sentences = []
    for outcome, count in Counter(result.outcome).most_common():
        sentences.append(f"{counted(count, 'filter')}: {outcome.value}")
    if order:
        explained = result.explained_variance[order].double()
        low, median, high = (percent(explained.quantile(q).item()) for q in (0.25, 0.5, 0.75))
        headline += f"; the median explained variance is {median}"
        sentences.append(f"Quartiles of the explained variance: {low} and {high}.")
    if converged:
        wavelength = result.params.wavelength.flatten()[result.converged].double().median().item()
        sentences.append(f"Median wavelength of the converged filters: {number(wavelength, 3)} px.")

    def sections() -> list[Section]:
        both = zip(result.outcome, result.explained_variance.tolist(), strict=True)
        rows: list[dict[str, Any]] = [
            {"outcome": outcome.name, "explained_variance": explained}
            for outcome, explained in both
        ]
        for row in result.to_table():
            name, error = row["parameter"], _cell(row["parameter"], row["standard_error"], 2)
            rows[row["filter"]][name] = f"{_cell(name, row['value'])} ± {error}"
        figures = {"fit": partial(plot_fit, result, kernels)} if order else {}
        return [Section(figures=figures), *_every_filter(result, kernels, order, rows, 3)]

    title = "Gabor functions nearest to kernels"
    return _report("fit", title, headline + ".", sentences, sections, result)


def census_report(result: Any, kernels: Any) -> Report:
    """The class of every filter, and the Gabor functions next to macaque V1."""
    counts, n, gabors = result.counts, len(result), result.filters("gabor")
    share = f"{len(gabors)} of {counted(n, 'filter')} ({100 * len(gabors) / n:.0f} %)"
    rest = [f"{count} {label}" for label, count in counts.items() if count and label != "gabor"]
    headline = f"A Gabor function describes {share}; the rest: {', '.join(rest) or 'none'}."
    sentences = []
    for kind, count in Counter(pair.kind for pair in result.pairs).items():
        pairs = [f"{pair.first} and {pair.second}" for pair in result.pairs if pair.kind == kind]
        more = ", …" if count > 12 else "."
        sentences.append(f"{counted(count, f'{kind} pair')}: {', '.join(pairs[:12])}{more}")

    def sections() -> list[Section]:
        v1 = result.compare_with_v1() if gabors else {}
        compared = [[_V1[name], *(f"{one:.2f}" for one in both)] for name, both in v1.items()]
        order = [
            i
            for label in counts
            for i in sorted(result.filters(label), key=lambda i: -result.confidence[i].item())
        ]
        table = Table(["", "layer", "V1"], compared)
        return [
            Section(figures={"census": partial(plot_census, result, kernels)}),
            *([Section("Gabor functions and V1", [_SOURCES], table=table)] if v1 else []),
            *_every_filter(result.fit, kernels, order, result.to_table(), 4),
        ]

    return _report("census", "Census of filters", headline, sentences, sections, result)


def conversion_report(result: Any, kernels: Any) -> Report:
    """The Gabor functions that replace filters, and how well."""
    chosen, (before, after) = result.is_gabor, result.n_first_parameters
    n_chosen, n = int(chosen.sum()), counted(len(chosen), "filter")
    share = f"{n_chosen} of {n} ({100 * n_chosen / len(chosen):.0f} %)"
    headline = f"Gabor functions replace {share}; the layer had {before} parameters, now {after}."
    what = "kernel" if result.responses is None else "responses to the images"
    least = f"{100 * (result.threshold or 0):g} % of the variance of its {what}"
    sentences = [f"A filter is converted where its Gabor function explains at least {least}."]
    if result.threshold is None:
        sentences = ["The filters were named."]
    for name, values, worst in (
        ("Explained variance of the converted filters", result.fit.explained_variance, "min"),
        ("Change of their responses, in standard deviations", result.response_error, "max"),
    ):
        if n_chosen and values is not None:
            middle, end = values[chosen].median().item(), getattr(values[chosen], worst)().item()
            sentences.append(f"{name}: median {percent(middle)}, worst {percent(end)}.")

    def sections() -> list[Section]:
        rows = result.to_table()
        for row in rows:
            row["now"] = "Gabor" if row["is_gabor"] else "as before"
        order = sorted(best_first(result.fit), key=lambda i: not chosen[i])
        return [
            Section(figures={"conversion": partial(plot_conversion, result, kernels)}),
            *_every_filter(result.fit, kernels, order, rows, 4),
        ]

    title = "Conversion to Gabor functions"
    return _report("conversion", title, headline, sentences, sections, result)


def _report(
    kind: str, title: str, headline: str, sentences: list[str],
    sections: Callable[[], list[Section]], result: Any,
) -> Report:  # fmt: skip
    def record() -> dict[str, Any]:
        values: dict[str, Any] = json.loads(result.to_json())
        return values

    return Report(kind, title, headline, sentences, sections, record, result.to_table)


def _cell(name: str, value: Any, digits: int = 3) -> str:
    if isinstance(value, str):
        return value.lower().replace("_", " ") if name == "outcome" else value
    if name in _SHARES:
        return percent(value)
    return degrees(value, digits) if UNITS.get(name) == "rad" else number(value, digits)


def _every_filter(
    fit: Any, kernels: Any, order: list[int], rows: list[dict[str, Any]], n_words: int
) -> Iterable[Section]:
    """Wave vectors, and the table of filters in an order; of many, evenly chosen ones."""
    if not order or kernels is None:
        return
    yield Section(
        "Wavelengths and orientations",
        [
            "The angle is the orientation of the wave and the radius its frequency. Each filter is "
            "drawn on both sides, since a wave and its reverse have one orientation. Angles grow "
            "clockwise, as in an image. Crosses are filters that did not converge."
        ],
        {"parameters": partial(plot_parameters, fit)},
    )
    chosen, names = evenly(order, _MOST_ROWS), [name for name in _COLUMNS if name in rows[0]]
    cells: list[list[Any]] = [
        [str(i), picture, *(_cell(name, rows[i][name]) for name in names)]
        for i, picture in zip(chosen, strips(fit, kernels, chosen), strict=True)
    ]
    n_channels = fit.params.phase.numel() // len(fit)
    text = [
        "Kernel, Gabor function and residual have one colour scale, symmetric about zero: "
        + ("grey is zero." if n_channels == 3 else "blue is negative, red is positive."),
        f"{len(chosen)} of {counted(len(rows), 'filter')}, evenly from the first to the last. All "
        "are in result.csv.",
    ]
    if n_channels not in (1, 3):
        text.append(f"Of {n_channels} channels the one with the most power is drawn.")
    if fit.params.n_dims == 3:
        text.append("Of each volume the middle slice is drawn.")
    head = ["filter", "kernel, fit, residual", *(_COLUMNS[name] for name in names)]
    yield Section("Every filter", [" ".join(text)], table=Table(head, cells, n_words))
