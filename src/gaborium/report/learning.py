"""Reports about learning: the planted kernel, a loop that does not learn, trained networks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from gaborium.plots import (
    plot_identifiability,
    plot_kernels,
    plot_landscape,
    plot_orientation,
    plot_recovery,
    plot_step_limit,
    plot_trained_filters,
    plot_training,
    truths,
)
from gaborium.report.formatting import counted, degrees, label, listing, number, written
from gaborium.report.page import Drawing, Report, Section, Table


def recovery_report(result: Any) -> Report:
    """A planted kernel, and the three ways to find it."""
    errors = {name: number(error, 2) for name, error in result.kernel_errors().items()}
    n_settled = sum(run.settled for run in result.descents)
    headline = (
        f"{n_settled or 'None'} of {counted(len(result.descents), 'descent')} settled; recover: "
        f"{result.found.outcome[0].name.lower().replace('_', ' ')}, kernel error "
        f"{errors['found']}; trained layer: kernel error {errors['trained']}."
    )

    def sections() -> list[Section]:
        rows = [row | {"parameter": f"{row['parameter']}, {row['unit']}"} for row in result.table()]
        names = ("parameter", "truth", "found", "error", "standard_error", "trained")
        columns = ("learning_rate", "momentum", "verdict", "first_arrival", "n_ejections")
        runs = [
            vars(run) | {"verdict": run.verdict, "learning_rate": f"{run.learning_rate:g}"}
            for run in result.descents
        ]
        steps = "An arrival is a step within 0.05 rad (2.9°) of the truth, an ejection a step out "
        steps += "of the basin. A descent that stays within 0.01 rad (0.57°) has settled."
        error = "A standard error is what noise as strong as the residual gives a parameter."
        return [
            Section(figures={"recovery": partial(plot_recovery, result)}),
            Section("The parameters", [error], table=Table.of(rows, names)),
            Section("The loss over the orientation", _explain(result),
                    {"landscape": partial(plot_landscape, result)}),
            Section("The descents, step by step", [steps],
                    {"orientation": partial(plot_orientation, result)},
                    Table.of(runs, columns, 0) if runs else None),
        ]  # fmt: skip

    def record() -> dict[str, Any]:
        values = {name: one for name, one in vars(result).items() if not isinstance(one, Tensor)}
        values |= {"kernel_errors": result.kernel_errors(), "table": result.table()}
        loaded: dict[str, Any] = json.loads(json.dumps(values, default=_plain))
        return loaded

    return Report("recovery", "Recovering a planted Gabor kernel", headline, [], sections, record)


def _plain(record: Any) -> Any:
    return json.loads(record.to_json()) if hasattr(record, "to_json") else vars(record)


def _explain(result: Any) -> list[str]:
    """Why descents on the orientation end as they do, from the measured losses."""
    mse, step = result.landscape["mse"][:-1], 2 * math.pi / (len(result.landscape["mse"]) - 1)
    truth = truths(result)[0]
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


def diagnosis_report(result: Any) -> Report:
    """The faults of a training loop, and the remedies."""
    findings, parts = result.findings, result.parts
    headline = "No fault was found that prevents learning."
    if findings and findings[0].severity.name != "NOTE":
        # Up to the first full stop that ends a sentence: numbers have others.
        headline = re.split(r"(?<=\w\.)\s+(?=[A-ZΑ-Ω])", findings[0].sentence, maxsplit=1)[0]
    sentences = []
    if result.losses:
        first, last = number(result.losses[0]), number(result.losses[-1])
        steps = counted(len(result.losses) - 1, "step")
        sentences.append(f"The loss went from {first} to {last} in {steps}.")
    if result.combined_remedies:
        numbers = [str(findings.index(found) + 1) for found in result.combined_remedies]
        sentences.append(f"No remedy is enough alone, but {listing(numbers)} together are.")

    def sections() -> list[Section]:
        page, left = [Section()], dict(parts)
        for index, found in enumerate(findings, 1):
            causes = {name: {one.cause for one in getattr(part, "findings", ())}
                      for name, part in left.items()}  # fmt: skip
            basis = {name: left.pop(name) for name in causes if found.cause in causes[name]}
            text = [found.sentence]
            if found.location:
                text.append(f"Where: {', '.join(found.location[:40])}")
            if found.numbers:
                values = [
                    f"{label(name)} {written(name, one)}" for name, one in found.numbers.items()
                ]
                text.append(", ".join(values))
            page.append(Section(
                f"{index}. {found.cause}", text, _figures(result, basis), code=found.remedy,
                tone=found.severity.name.lower(),
            ))  # fmt: skip
        text = [f"Examined: {', '.join(parts)}."]
        for why in dict.fromkeys(result.skipped.values()):
            names = [name for name, other in result.skipped.items() if other == why]
            text.append(f"Not examined: {', '.join(names)}. {why}")
        text.append(
            "Remedies use the names with which `diagnose` was called: `module`, `loss`, `inputs`, "
            "`targets` and `optimizer`. All trials ran on copies."
        )
        return [*page, Section("The examination", text, _figures(result, left))]

    title = "Why does it not learn?"
    return Report("diagnosis", title, headline, sentences, sections, result.to_json)


def _figures(result: Any, parts: Mapping[str, Any]) -> dict[str, Drawing]:
    """The figures of some parts of a diagnosis, by file name."""
    plots: dict[str, Drawing] = {
        "Landscape": plot_landscape,
        "StepLimit": plot_step_limit,
        "Identifiability": plot_identifiability,
    }
    figures: dict[str, Drawing] = {}
    for name, part in parts.items():
        file, kind = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60], type(part).__name__
        if kind in plots:
            figures[file] = partial(plots[kind], part)
        elif kind == "Health":
            layer = name.removeprefix("health").removeprefix(" of ")
            weight = getattr(result.setup.module.get_submodule(layer), "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 4 and weight.shape[1] in (1, 3):
                kernels, titles = (
                    weight.detach()[:32],
                    [str(i) for i in range(min(32, len(weight)))],
                )
                figures[file] = partial(plot_kernels, kernels, titles=titles, shared_scale=False)
    return figures


def training_report(result: Any) -> Report:
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

    def sections() -> list[Section]:
        rows = result.to_table()
        names = ("variant", "accuracy", "accuracy_error", "accuracy_reset", "accuracy_reset_error",
                 "n_first_parameters", "n_parameters")  # fmt: skip
        text = (
            f"Means over {counted(len(result.recipe.seeds), 'seed')} with standard errors. Reset "
            "is the trained network with its Gabor filters at their start. Networks of a seed see "
            "the same images in the same order, so differences are more certain than accuracies."
        )
        figures = {"filters": partial(plot_trained_filters, result)}
        return [
            Section(figures={"training": partial(plot_training, result)}),
            Section("Accuracy", [text], table=Table.of(rows, names)),
            Section("The filters, before and after", figures=figures),
            Section("The recipe", code=result.recipe.to_toml()),
        ]

    title = "Training a Gabor layer"
    return Report("train", title, headline + ".", sentences, sections, result.to_record)


def _mean(mean: Any, sign: str = "") -> str:
    """A mean share in percent with its standard error."""
    if not mean.n:
        return "–"
    error = f" ± {100 * mean.standard_error:.1f}" if math.isfinite(mean.standard_error) else ""
    return f"{100 * mean.mean:{sign}.1f}{error}".replace("-", "−")
