"""Reports about the filters of a layer: fitted, classified, or converted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from gaborium.plots import (
    best_first,
    evenly,
    plot_census,
    plot_conversion,
    plot_fit,
    plot_parameters,
    strips,
)
from gaborium.report.formatting import counted, number, percent, written
from gaborium.report.page import Report, Section, Table

_MOST_ROWS = 64
_COLUMNS = (
    *("now", "class", "explanation", "outcome", "confidence", "explained_variance"),
    *("explained_response", "response_error", "n_x", "n_y", "orientation", "elevation"),
    *("wavelength", "sigma", "aspect_ratio"),
)
_V1 = (
    "n_x and n_y are cycles in a standard deviation of the envelope, along the wave and along the "
    "stripes; within is the share in the region that holds 95 % of V1's cells, cardinal the share "
    "within 22.5° of horizontal or vertical, octaves the spread of the wavelengths. V1: 79 "
    "simple cells (Ringach 2002), directions of 246 cells (De Valois, Yund and Hepler 1982), "
    "frequencies of 139 (De Valois, Albrecht and Thorell 1982). Cells are measured in degrees and "
    "filters in pixels, so only the spread of wavelengths can be compared."
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
        sentences.append(f"Median wavelength of the converged filters: {number(wavelength)} px.")

    def sections() -> list[Section]:
        rows: list[dict[str, Any]] = [
            {"outcome": outcome.name, "explained_variance": result.explained_variance[i].item()}
            for i, outcome in enumerate(result.outcome)
        ]
        for row in result.to_table():
            name, error = row["parameter"], written(row["parameter"], row["standard_error"], 2)
            rows[row["filter"]][name] = f"{written(name, row['value'])} ± {error}"
        figures = {"fit": partial(plot_fit, result, kernels)} if order else {}
        return [Section(figures=figures), *_every_filter(result, kernels, order, rows)]

    title = "Gabor functions nearest to kernels"
    return _report("fit", title, headline + ".", sentences, sections, result)


def census_report(result: Any, kernels: Any) -> Report:
    """The class of every filter, and the Gabor functions next to macaque V1."""
    counts, n, gabors = result.counts, len(result), result.filters("gabor")
    share = f"{len(gabors)} of {counted(n, 'filter')} ({100 * len(gabors) / n:.0f} %)"
    rest = [f"{count} {name}" for name, count in counts.items() if count and name != "gabor"]
    headline = f"A Gabor function describes {share}; the rest: {', '.join(rest) or '–'}."
    sentences = []
    for kind, count in Counter(pair.kind for pair in result.pairs).items():
        pairs = [f"{pair.first} and {pair.second}" for pair in result.pairs if pair.kind == kind]
        more = ", …" if count > 12 else "."
        sentences.append(f"{counted(count, f'{kind} pair')}: {', '.join(pairs[:12])}{more}")

    def sections() -> Iterable[Section]:
        yield Section(figures={"census": partial(plot_census, result, kernels)})
        v1 = result.compare_with_v1() if gabors else {}
        rows = [{"": name, "layer": layer, "V1": cells} for name, (layer, cells) in v1.items()]
        if rows:
            yield Section("Gabor functions and V1", [_V1], table=Table.of(rows, list(rows[0])))
        sure = result.confidence.tolist()
        order = [i for name in counts for i in sorted(result.filters(name), key=lambda i: -sure[i])]
        yield from _every_filter(result.fit, kernels, order, result.to_table())

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
            *_every_filter(result.fit, kernels, order, rows),
        ]

    title = "Conversion to Gabor functions"
    return _report("conversion", title, headline, sentences, sections, result)


def _report(
    kind: str, title: str, headline: str, sentences: list[str],
    sections: Callable[[], Iterable[Section]], result: Any,
) -> Report:  # fmt: skip
    def record() -> dict[str, Any]:
        values: dict[str, Any] = json.loads(result.to_json())
        return values

    return Report(kind, title, headline, sentences, sections, record, result.to_table)


def _every_filter(
    fit: Any, kernels: Any, order: Sequence[int], rows: Sequence[dict[str, Any]]
) -> Iterable[Section]:
    """Wave vectors, and the table of filters in an order; of many, evenly chosen ones."""
    if not order or kernels is None:
        return
    text = (
        "The angle is the orientation of the wave and the radius its frequency. Each filter is "
        "drawn on both sides, since a wave and its reverse have one orientation. Angles grow "
        "clockwise, as in an image. Crosses are filters that did not converge."
    )
    figures = {"parameters": partial(plot_parameters, fit)}
    yield Section("Wavelengths and orientations", [text], figures)
    chosen = evenly(order, _MOST_ROWS)
    table = Table.of([rows[i] for i in chosen], _COLUMNS)
    cells = zip(chosen, strips(fit, kernels, chosen), table.rows, strict=True)
    head = ["filter", "kernel, fit, residual", *table.head]
    n_words = 4 if "explanation" in rows[0] else 3
    n_channels = fit.params.phase.numel() // len(fit)
    text = "Kernel, Gabor function and residual have one colour scale, symmetric about zero: "
    text += "grey is zero." if n_channels == 3 else "blue is negative, red is positive."
    text += f" {len(chosen)} of {counted(len(rows), 'filter')}, evenly from the first to the last;"
    text += " all are in result.csv."
    if n_channels not in (1, 3):
        text += f" Of {n_channels} channels the one with the most power is drawn."
    if fit.params.n_dims == 3:
        text += " Of each volume the middle slice is drawn."
    rows_shown = [[str(i), picture, *row] for i, picture, row in cells]
    yield Section("Every filter", [text], table=Table(head, rows_shown, n_words))
