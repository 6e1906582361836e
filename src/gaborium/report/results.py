"""What is said about each kind of result: headline, sentences and sections."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from gaborium import plots
from gaborium.report.formatting import counted, degrees, label, listing, number, percent, written
from gaborium.report.page import Drawing, Report, Section, Table

_MOST_ROWS = 64
_WORDS = ("now", "class", "explanation", "outcome")
_COLUMNS = (
    *_WORDS,
    *("confidence", "explained_variance", "explained_response", "response_error", "n_x", "n_y"),
    *("orientation", "elevation", "wavelength", "sigma", "aspect_ratio"),
)
_V1 = (
    "n_x and n_y are cycles in a standard deviation of the envelope, along the wave and along the "
    "stripes; within is the share in the region that holds 95 % of V1's cells, cardinal the share "
    "within 22.5° of horizontal or vertical, octaves the spread of the wavelengths. V1: 79 "
    "simple cells (Ringach 2002), directions of 246 cells (De Valois, Yund and Hepler 1982), "
    "frequencies of 139 (De Valois, Albrecht and Thorell 1982). Cells are measured in degrees and "
    "filters in pixels, so only the spread of wavelengths can be compared."
)
_PICTURES = (
    "Kernel, Gabor function and residual have one colour scale, symmetric about zero: blue is "
    "negative, red is positive; grey is zero in kernels of three channels. Of other numbers of "
    "channels the one with the most power is drawn, of volumes the middle slice."
)
_WAVES = (
    "The angle is the orientation of the wave and the radius its frequency. Each filter is drawn "
    "on both sides, since a wave and its reverse have one orientation. Angles grow clockwise, as "
    "in an image. Crosses are filters that did not converge."
)
_ERRORS = "A standard error is what noise as strong as the residual gives a parameter."
_ARRIVALS = (
    "An arrival is a step within 0.05 rad (2.9°) of the truth, an ejection a step out of the "
    "basin. A descent that stays within 0.01 rad (0.57°) has settled."
)
_REMEDIES = (
    "Remedies use the names with which `diagnose` was called: `module`, `loss`, `inputs`, "
    "`targets` and `optimizer`. All trials ran on copies."
)
_MEANS = (
    "Means over the seeds with standard errors. Reset is the trained network with its Gabor "
    "filters at their start. Networks of a seed see the same images in the same order, so "
    "differences are more certain than accuracies."
)
_PLOTS: dict[str, Drawing] = {
    "Landscape": plots.plot_landscape,
    "StepLimit": plots.plot_step_limit,
    "Identifiability": plots.plot_identifiability,
}


# -- filters of a layer ------------------------------------------------------------------------


def fit_report(result: Any, kernels: Any) -> Report:
    """The Gabor functions nearest to kernels."""
    order, table = plots.best_first(result), result.to_table()
    headline = (
        f"{int(result.converged.sum())} of {counted(len(result), 'filter')} converged to a Gabor "
        "function"
    )
    outcomes = Counter(result.outcome).most_common()
    sentences = [f"{counted(count, 'filter')}: {outcome.value}" for outcome, count in outcomes]
    if order:
        explained = result.explained_variance[order].double()
        low, median, high = (percent(explained.quantile(q).item()) for q in (0.25, 0.5, 0.75))
        headline += f"; the median explained variance is {median}"
        sentences.append(f"Quartiles of the explained variance: {low} and {high}.")
    rows: list[dict[str, Any]] = [
        {"outcome": outcome.name, "explained_variance": explained}
        for outcome, explained in zip(
            result.outcome, result.explained_variance.tolist(), strict=True
        )
    ]
    for row in table:
        name, error = row["parameter"], written(row["parameter"], row["standard_error"], 2)
        rows[row["filter"]][name] = f"{written(name, row['value'])} ± {error}"
    figures = {"fit": partial(plots.plot_fit, result, kernels)} if order else {}
    sections = [Section(figures=figures), *_every_filter(result, kernels, order, rows)]
    title = "Gabor functions nearest to kernels"
    return Report("fit", title, headline + ".", sentences, sections, table)


def census_report(result: Any, kernels: Any) -> Report:
    """The class of every filter, and the Gabor functions next to macaque V1."""
    counts, gabors, table = result.counts, result.filters("gabor"), result.to_table()
    share = f"{len(gabors)} of {counted(len(table), 'filter')}"
    rest = [f"{count} {name}" for name, count in counts.items() if count and name != "gabor"]
    headline = (
        f"A Gabor function describes {share} ({100 * len(gabors) / len(table):.0f} %); the rest: "
        f"{', '.join(rest) or '–'}."
    )
    sentences = []
    for kind, count in Counter(pair.kind for pair in result.pairs).items():
        pairs = [f"{pair.first} and {pair.second}" for pair in result.pairs if pair.kind == kind]
        more = ", …" if count > 12 else "."
        sentences.append(f"{counted(count, f'{kind} pair')}: {', '.join(pairs[:12])}{more}")
    sections = [Section(figures={"census": partial(plots.plot_census, result, kernels)})]
    v1 = result.compare_with_v1() if gabors else {}
    if v1:
        rows = [{"": name, "layer": layer, "V1": cells} for name, (layer, cells) in v1.items()]
        table_of_v1 = Table.of(rows, ["", "layer", "V1"])
        sections.append(Section("Gabor functions and V1", [_V1], table=table_of_v1))
    sure = result.confidence.tolist()
    order = [i for name in counts for i in sorted(result.filters(name), key=lambda i: -sure[i])]
    sections += _every_filter(result.fit, kernels, order, table)
    return Report("census", "Census of filters", headline, sentences, sections, table)


def conversion_report(result: Any, kernels: Any) -> Report:
    """The Gabor functions that replace filters, and how well."""
    chosen, (before, after), table = result.is_gabor, result.n_first_parameters, result.to_table()
    n_chosen, n = int(chosen.sum()), len(table)
    headline = (
        f"Gabor functions replace {n_chosen} of {counted(n, 'filter')} "
        f"({100 * n_chosen / n:.0f} %); the layer had {before} parameters, now {after}."
    )
    sentences = ["The filters were named."]
    if result.threshold is not None:
        what = "kernel" if result.responses is None else "responses to the images"
        sentences = [
            "A filter is converted where its Gabor function explains at least "
            f"{100 * result.threshold:g} % of the variance of its {what}."
        ]
    for name, values, worst in (
        ("Explained variance of the converted filters", result.fit.explained_variance, "min"),
        ("Change of their responses, in standard deviations", result.response_error, "max"),
    ):
        if n_chosen and values is not None:
            middle, end = values[chosen].median().item(), getattr(values[chosen], worst)().item()
            sentences.append(f"{name}: median {percent(middle)}, worst {percent(end)}.")
    rows = [row | {"now": "Gabor" if row["is_gabor"] else "as before"} for row in table]
    order = sorted(plots.best_first(result.fit), key=lambda i: not chosen[i])
    sections = [
        Section(figures={"conversion": partial(plots.plot_conversion, result, kernels)}),
        *_every_filter(result.fit, kernels, order, rows),
    ]
    title = "Conversion to Gabor functions"
    return Report("conversion", title, headline, sentences, sections, table)


def _every_filter(
    fit: Any, kernels: Any, order: Sequence[int], rows: Sequence[dict[str, Any]]
) -> list[Section]:
    """Wave vectors, and the table of filters in an order; of many, evenly chosen ones."""
    if not order or kernels is None:
        return []
    chosen = plots.evenly(order, _MOST_ROWS)
    table = Table.of([rows[i] for i in chosen], _COLUMNS)
    pictures = plots.strips(fit, kernels, chosen)
    cells = [
        [str(i), picture, *row]
        for i, picture, row in zip(chosen, pictures, table.rows, strict=True)
    ]
    n_words = 2 + sum(name in rows[0] for name in _WORDS)
    shown = f"{len(chosen)} of {counted(len(rows), 'filter')}, evenly from the first to the last"
    figures = {"parameters": partial(plots.plot_parameters, fit)}
    head = ["filter", "kernel, fit, residual", *table.head]
    return [
        Section("Wavelengths and orientations", [_WAVES], figures),
        Section(
            "Every filter",
            [_PICTURES, f"{shown}; all are in result.csv."],
            table=Table(head, cells, n_words),
        ),
    ]


# -- learning ----------------------------------------------------------------------------------


def recovery_report(result: Any, _: Any) -> Report:
    """A planted kernel, and the three ways to find it."""
    errors = {name: number(error, 2) for name, error in result.kernel_errors().items()}
    n_settled = sum(run.settled for run in result.descents)
    headline = (
        f"{n_settled or 'None'} of {counted(len(result.descents), 'descent')} settled; recover: "
        f"{result.found.outcome[0].name.lower().replace('_', ' ')}, kernel error "
        f"{errors['found']}; trained layer: kernel error {errors['trained']}."
    )
    names = ("parameter", "unit", "truth", "found", "error", "standard_error", "trained")
    columns = ("learning_rate", "momentum", "verdict", "first_arrival", "n_ejections")
    runs = [{name: getattr(run, name) for name in columns} for run in result.descents]
    sections = [
        Section(figures={"recovery": partial(plots.plot_recovery, result)}),
        Section("The parameters", [_ERRORS], table=Table.of(result.table(), names, 2)),
        Section(
            "The loss over the orientation",
            _explain(result),
            {"landscape": partial(plots.plot_landscape, result)},
        ),
        Section(
            "The descents, step by step",
            [_ARRIVALS],
            {"orientation": partial(plots.plot_orientation, result)},
            Table.of(runs, columns, 0) if runs else None,
        ),
    ]
    return Report("recovery", "Recovering a planted Gabor kernel", headline, [], sections)


def _explain(result: Any) -> list[str]:
    """Why descents on the orientation end as they do, from the measured losses."""
    mse, step = result.landscape["mse"][:-1], 2 * math.pi / (len(result.landscape["mse"]) - 1)
    truth = plots.truths(result)[0]
    place = round((truth + math.pi) / step) % len(mse)
    bend = mse[place - 1] + mse[(place + 1) % len(mse)] - 2 * mse[place]
    slope = math.sqrt(max(bend, 0.0) / 2) / step
    distance = math.remainder(result.start.orientation[0, 0].item() - truth, math.pi)
    rates = sorted({run.learning_rate for run in result.descents})
    updates = [f"{degrees(rate * slope, 2)} for step size {rate:g}" for rate in rates]
    return [
        f"The start is {degrees(abs(distance))} from the truth; 90° is the farthest, as "
        "orientations repeat after 180°.",
        f"The RMSE is a cone at its minimum, of slope c = {number(slope)} per rad. An update, step "
        f"size times slope, does not shrink on arrival: {listing(updates)}. So the orientation "
        "steps over the minimum and back. Momentum β makes updates up to 1/(1 − β) times longer.",
        "The basin is narrow: for white input the squared error is convex within λ / (√2 π σ/γ) = "
        f"{degrees(result.basin)} of the truth. An update longer than this leaves it again.",
        "The squared error is a bowl: within the basin, every step size below 1/c² = "
        f"{number(slope**-2 if slope else math.inf, 2)} settles.",
    ]


def diagnosis_report(result: Any, _: Any) -> Report:
    """The faults of a training loop, and the remedies."""
    findings = result.findings
    sentences = []
    if result.losses:
        first, last = number(result.losses[0]), number(result.losses[-1])
        steps = counted(len(result.losses) - 1, "step")
        sentences.append(f"The loss went from {first} to {last} in {steps}.")
    if result.combined_remedies:
        numbers = [str(findings.index(found) + 1) for found in result.combined_remedies]
        sentences.append(f"No remedy is enough alone, but {listing(numbers)} together are.")
    sections, left = [Section()], list(result.parts)
    for index, found in enumerate(findings, 1):
        # A part is drawn with the first finding that it has.
        causes = {name: _causes(result.parts[name]) for name in left}
        basis = [name for name in left if found.cause in causes[name]]
        left = [name for name in left if name not in basis]
        text = [found.sentence]
        if found.location:
            text.append(f"Where: {', '.join(found.location[:40])}")
        if found.numbers:
            values = found.numbers.items()
            text.append(", ".join(f"{label(name)} {written(name, one)}" for name, one in values))
        tone = found.severity.name.lower()
        figures = _figures(result, basis)
        title = f"{index}. {found.cause}"
        sections.append(Section(title, text, figures, code=found.remedy, tone=tone))
    text = [f"Examined: {', '.join(result.parts)}."]
    for why in dict.fromkeys(result.skipped.values()):
        names = [name for name, other in result.skipped.items() if other == why]
        text.append(f"Not examined: {', '.join(names)}. {why}")
    sections.append(Section("The examination", [*text, _REMEDIES], _figures(result, left)))
    return Report("diagnosis", "Why does it not learn?", result.headline, sentences, sections)


def _causes(part: Any) -> set[str]:
    return {found.cause for found in getattr(part, "findings", ())}


def _figures(result: Any, names: Iterable[str]) -> dict[str, Drawing]:
    """The figures of some parts of a diagnosis, by file name."""
    figures: dict[str, Drawing] = {}
    for name in names:
        part = result.parts[name]
        file, kind = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60], type(part).__name__
        if kind in _PLOTS:
            figures[file] = partial(_PLOTS[kind], part)
        elif kind == "Health":
            layer = result.setup.module.get_submodule(name[len("health of ") :])
            (kernels,) = plots.kernel_images(layer.weight[None, :32])
            titles = [str(i) for i in range(len(kernels))]
            figures[file] = partial(plots.plot_kernels, kernels, titles=titles, shared_scale=False)
    return figures


def training_report(result: Any, _: Any) -> Report:
    """How well a network does with each first layer, and what its filters learned."""
    first, *others = result.variants
    headline = f"With the first layer {first}, test accuracy is {_mean(result.accuracy(first))} %"
    differences = [
        f"{_mean(result.difference(first, other), '+')} points compared with {other}"
        for other in others
    ]
    headline += ": " * bool(others) + listing(differences)
    sentences = [run.stopped for run in result.runs if run.stopped]
    for variant in result.variants:
        if result.accuracy_reset(variant).n:
            moved = [
                f"{label(name)} {written(name, mean.mean, 2)}"
                for name, mean in result.displacement(variant).items()
                if name in ("orientation", "wavelength", "sigma")
            ]
            gain = _mean(result.learning_gain(variant), "+")
            sentences.append(f"{variant}, median distance from the start: {listing(moved)}.")
            sentences.append(f"{variant}, accuracy minus that of reset filters: {gain} points.")
    names = (
        *("variant", "n_seeds", "accuracy", "accuracy_error", "accuracy_reset"),
        *("accuracy_reset_error", "n_first_parameters", "n_parameters"),
    )
    figures = {"filters": partial(plots.plot_trained_filters, result)}
    sections = [
        Section(figures={"training": partial(plots.plot_training, result)}),
        Section("Accuracy", [_MEANS], table=Table.of(result.to_table(), names)),
        Section("The filters, before and after", figures=figures),
        Section("The recipe", code=result.recipe.to_toml()),
    ]
    return Report("train", "Training a Gabor layer", headline + ".", sentences, sections)


def _mean(mean: Any, sign: str = "") -> str:
    """A mean share in percent with its standard error."""
    if not mean.n:
        return "–"
    error = f" ± {100 * mean.standard_error:.1f}" if math.isfinite(mean.standard_error) else ""
    return f"{100 * mean.mean:{sign}.1f}{error}".replace("-", "−")


REPORTS = {
    "FitResult": fit_report,
    "Census": census_report,
    "Conversion": conversion_report,
    "Recovery": recovery_report,
    "Diagnosis": diagnosis_report,
    "TrainResult": training_report,
}
