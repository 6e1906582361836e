"""Reports about the filters of a layer: fitted, classified, or converted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

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
from gaborium.report.page import Card, Drawing, Report, Section, Table

_MOST_ROWS = 96
_GEOMETRY = {"orientation": "θ", "elevation": "φ", "wavelength": "λ, px", "sigma": "σ, px",
             "aspect_ratio": "γ"}  # fmt: skip
_SHARES = ("gabor", "explained_variance", "explained_response", "response_error", "confidence")
_CLASSES = {
    "gabor": "at least three bars of alternating sign in one orientation",
    "edge": "two sides of opposite sign, no stripes",
    "blob": "one patch of one sign, or about constant",
    "centre-surround": "a patch within a ring of the other sign",
    "colour-contrast": "colours against each other, no oriented lightness",
    "other": "a clear structure of another kind",
    "noise": "no structure, or no weights",
}
_V1 = {
    "n_x": "n_x, median",
    "n_y": "n_y, median",
    "bandwidth": "bandwidth in octaves, median",
    "within": "share in the region that holds 95 % of V1's cells",
    "cardinal": "share within 22.5° of horizontal or vertical; 0.5 for even directions",
    "octaves": "spread of wavelengths: standard deviation in octaves",
}


def fit_report(result: Any, kernels: Tensor | None) -> Report:
    """The Gabor functions nearest to kernels."""
    n, n_found, order = len(result), int(result.converged.sum()), best_first(result)
    outcomes = Counter(result.outcome).most_common()
    filters = f"{n_found or 'any'} of {n} filters" if n > 1 else "the filter"
    headline = f"{'A' if n_found else 'No'} Gabor function was found for {filters}"
    headline += "" if order else ": there was nothing to fit."
    cards = [Card("filters", str(n))]
    if order:
        explained = result.explained_variance[order].double()
        low, median, high = (percent(explained.quantile(q).item()) for q in (0.25, 0.5, 0.75))
        headline += f"; {'the median' if n > 1 else 'its'} explained variance is {median}."
        cards.append(Card("median explained variance", median, f"quartiles {low} and {high}"))
    if n_found:
        wavelength = result.params.wavelength.flatten()[result.converged].double().median()
        cards.append(
            Card("median wavelength", f"{number(wavelength.item(), 3)} px", "if converged")
        )

    def sections() -> list[Section]:
        params, errors = result.params.as_dict(), result.standard_error
        fields = {name: head for name, head in _GEOMETRY.items() if name in params}
        rows = {
            i: {"outcome": _name(result.outcome[i])}
            | {"explained_variance": result.explained_variance[i].item()}
            | {
                name: f"{_cell(name, params[name][i].flatten()[0].item())} ± "
                f"{_cell(name, errors[name][i].flatten()[0].item(), 2)}"
                for name in fields
            }
            for i in order
        }
        columns = {"outcome": "outcome", "explained_variance": "explained", **fields}
        meanings = [[_name(one), one.value, str(count)] for one, count in outcomes]
        table = Table(["outcome", "meaning", "filters"], meanings, 2)
        figures = [Drawing("fit", partial(plot_fit, result, kernels))] if order else []
        return [
            Section(cards=cards, figures=figures),
            Section("Outcomes", table=table),
            *([_wave_vectors(result)] if order else []),
            *_every_filter(result, kernels, order, columns, rows, 1),
        ]

    return Report(
        "fit", "Gabor functions nearest to kernels", headline,
        [", ".join(f"{counted(count, 'filter')} {_name(one)}" for one, count in outcomes) + "."],
        sections, lambda: json.loads(result.to_json()), result.to_table,
    )  # fmt: skip


def census_report(result: Any, kernels: Tensor | None) -> Report:
    """The class of every filter, and the Gabor functions next to macaque V1."""
    counts, n = result.counts, len(result)
    others = sorted((-count, label) for label, count in counts.items() if label != "gabor")
    rest = ", ".join(f"{-count} {label}" for count, label in others if count)
    verb = "is a Gabor function" if counts["gabor"] == 1 else "are Gabor functions"
    share = (
        f"{counts['gabor'] or 'None'} of {counted(n, 'filter')} ({100 * counts['gabor'] / n:.0f} %)"
    )
    headline = f"{share} {verb}" + (f"; the rest: {rest}." if rest else ".")
    pairs: dict[str, list[str]] = {}
    for pair in result.pairs:
        pairs.setdefault(pair.kind, []).append(f"{pair.first} and {pair.second}")

    def sections() -> list[Section]:
        classes = [
            [label, _CLASSES[label], str(count), f"{100 * count / n:.0f} %"]
            for label, count in counts.items()
        ]
        v1 = result.compare_with_v1() if counts["gabor"] else {}
        comparison = [[_V1[name], *(f"{one:.2f}" for one in both)] for name, both in v1.items()]
        columns = {"class": "class", "why": "why", "confidence": "confidence", "bars": "bars",
                   "gabor": "Gabor explains", "n_x": "n_x", "n_y": "n_y",
                   "selectivity": "selectivity", "opponency": "opponency"}  # fmt: skip
        rows = result.to_table()
        labels = list(counts)
        order = sorted(
            range(n), key=lambda i: (labels.index(rows[i]["class"]), -rows[i]["confidence"])
        )
        found = result.filters("gabor")
        return [
            Section(figures=[Drawing("census", partial(plot_census, result, kernels))]),
            Section("Classes", table=Table(["class", "meaning", "filters", "share"], classes, 2)),
            *([_wave_vectors(result.fit[found])] if found else []),
            *([Section(
                "The Gabor functions and macaque V1",
                table=Table(["", "this layer", "V1"], comparison),
                note="n_x and n_y are cycles in a standard deviation of the envelope, along the wave "
                "and along the stripes. V1: 79 simple cells (Ringach 2002), directions of 246 cells "
                "(De Valois, Yund and Hepler 1982), frequencies of 139 cells (De Valois, Albrecht "
                "and Thorell 1982). Cells are measured in degrees and filters in pixels, so only "
                "the spread of wavelengths can be compared.",
            )] if v1 else []),
            *([Section("Pairs", [
                f"{counted(len(some), 'pair')}, {kind}: {'; '.join(some[:24])}"
                + ("; … (all in result.json)." if len(some) > 24 else ".")
                for kind, some in pairs.items()
            ])] if pairs else []),
            *_every_filter(result.fit, kernels, order, columns, dict(enumerate(rows)), 2),
        ]  # fmt: skip

    sentences = [f"{counted(len(some), 'pair')}: {kind}." for kind, some in pairs.items()]
    return Report("census", "Census of filters", headline, sentences, sections,
                  lambda: json.loads(result.to_json()), result.to_table)  # fmt: skip


def conversion_report(result: Any, kernels: Tensor | None) -> Report:
    """The Gabor functions that replace filters, and how well."""
    chosen, n = result.is_gabor, len(result.is_gabor)
    n_chosen = int(chosen.sum())
    before, after = result.n_first_parameters
    became = "is a Gabor function" if n_chosen == 1 else "are Gabor functions"
    headline = f"None of {counted(n, 'filter')} became a Gabor function."
    sentences = ["The filters were named."]
    if result.threshold is not None:
        what = "kernel" if result.responses is None else "responses to the images"
        sentences = [f"A filter is converted where its Gabor function explains at least "
                     f"{100 * result.threshold:g} % of the variance of its {what}."]  # fmt: skip
    if n_chosen:
        explained = result.fit.explained_variance[chosen]
        headline = (f"{n_chosen} of {counted(n, 'filter')} ({100 * n_chosen / n:.0f} %) {became} "
                    f"now; {before} numbers of the layer become {after}.")  # fmt: skip
        sentences.append(f"Explained variance of the converted filters: {percent(explained.median().item())} "
                         f"in the median, {percent(explained.min().item())} at least.")  # fmt: skip
    if n_chosen and result.response_error is not None:
        error = result.response_error[chosen]
        sentences.append(f"Their responses change by {percent(error.median().item())} of a standard "
                         f"deviation in the median, {percent(error.max().item())} at most.")  # fmt: skip

    def sections() -> list[Section]:
        rows = {i: {**row, "now": "Gabor function" if chosen[i] else "as before"}
                for i, row in enumerate(result.to_table())}  # fmt: skip
        order = sorted(rows, key=lambda i: (not chosen[i], -rows[i]["explained_variance"]))
        columns = {"now": "now", "explained_variance": "kernel explained",
                   "explained_response": "responses explained",
                   "response_error": "change of responses, std", **_GEOMETRY}  # fmt: skip
        columns = {name: head for name, head in columns.items() if name in rows[0]}
        drawing = Drawing("conversion", partial(plot_conversion, result, kernels))
        return [
            Section(figures=[drawing]),
            *_every_filter(result.fit, kernels, order, columns, rows, 1),
        ]

    return Report("conversion", "Conversion to Gabor functions", headline, sentences, sections,
                  lambda: json.loads(result.to_json()), result.to_table)  # fmt: skip


def _name(outcome: Any) -> str:
    name: str = outcome.name
    return name.lower().replace("_", " ")


def _cell(name: str, value: Any, digits: int = 3) -> str:
    if isinstance(value, str):
        return value
    if name in _SHARES:
        return percent(value)
    return degrees(value, digits) if UNITS.get(name) == "rad" else number(value, digits)


def _wave_vectors(fit: Any) -> Section:
    text = (
        "The angle is the orientation of the wave, the distance from the middle its frequency; each "
        "filter is drawn on both sides, as a wave and its reverse have one orientation. Angles grow "
        "clockwise, as in an image. Crosses have another outcome than converged."
    )
    drawing = Drawing("parameters", partial(plot_parameters, fit), half=True)
    return Section("Wavelengths and orientations", [text], figures=[drawing])


def _every_filter(
    fit: Any, kernels: Tensor | None, order: Sequence[int], columns: Mapping[str, str],
    rows: Mapping[int, Mapping[str, Any]], n_text: int,
) -> list[Section]:  # fmt: skip
    """The table of filters in an order; of many, some at equal distances in it."""
    if not order or kernels is None:
        return []
    chosen = evenly(order, _MOST_ROWS)
    pictures = strips(fit, kernels, chosen)
    cells = [
        [str(i), picture, *(_cell(name, rows[i][name]) for name in columns)]
        for i, picture in zip(chosen, pictures, strict=True)
    ]
    n_channels = fit.params.phase.numel() // len(fit)
    text = "Kernel, Gabor function and residual share one colour scale, symmetric about zero: "
    text += "grey is zero." if n_channels == 3 else "blue is negative, red is positive."
    if n_channels not in (1, 3):
        text += f" Of {n_channels} channels the one with the most power is drawn."
    if fit.params.n_dims == 3:
        text += " Of each volume the middle slice is drawn."
    if len(chosen) < len(order):
        text += f" {len(chosen)} of {len(order)} filters, evenly from the first to the last."
    table = Table(["filter", "kernel, fit, residual", *columns.values()], cells, 2 + n_text)
    note = "A click on the head of a column sorts. All numbers are in result.csv."
    return [Section("Every filter", [text], table=table, note=note)]
