"""Reports about learning: the planted kernel, a loop that does not learn, trained networks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from gaborium.params import UNITS
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
from gaborium.report.formatting import counted, degrees, listing, number, percent
from gaborium.report.page import Drawing, Report, Section, Table


def recovery_report(result: Any) -> Report:
    """A planted kernel, and the three ways to find it."""
    errors = {name: number(error, 2) for name, error in result.kernel_errors().items()}
    outcome = result.found.outcome[0].name.lower().replace("_", " ")
    n_settled = sum(run.settled for run in result.descents)
    headline = (
        f"{n_settled or 'None'} of {counted(len(result.descents), 'descent')} settled; recover: "
        f"{outcome}, kernel error {errors['found']}; trained layer: kernel error "
        f"{errors['trained']}."
    )

    def sections() -> list[Section]:
        keys = ("truth", "start", "found", "error", "standard_error", "trained", "trained_error")
        rows = []
        for row in result.table():
            unit = row["unit"].replace("rad", "degrees")
            turn = math.degrees(1) if row["unit"] == "rad" else 1.0
            values = (turn * row[key] for key in keys)
            cells = (
                number(value, 2) if "error" in key else number(round(value, 6))
                for key, value in zip(keys, values, strict=True)
            )
            rows.append([row["parameter"].replace("_", " "), unit, *cells])
        head = ["parameter", "unit", *(key.replace("_", " ") for key in keys)]
        descents = [
            [f"{run.learning_rate:g}", f"{run.momentum:g}", run.verdict, str(run.first_arrival),
             str(run.n_ejections), degrees(run.final_error, 3)]
            for run in result.descents
        ]  # fmt: skip
        titles = ["step size", "momentum", "verdict", "first arrival", "ejections", "final error"]
        return [
            Section(figures={"recovery": partial(plot_recovery, result)}),
            Section(
                "The parameters",
                ["A standard error is what noise as strong as the residual gives a parameter."],
                table=Table(head, rows, 2),
            ),
            Section("The loss over the orientation", _explain(result),
                    {"landscape": partial(plot_landscape, result)}),
            Section(
                "The descents, step by step",
                ["An arrival is a step within 0.05 rad (2.9°) of the truth, an ejection a step out "
                 "of the basin. A descent that stays within 0.01 rad (0.57°) has settled."],
                {"orientation": partial(plot_orientation, result)},
                Table(titles, descents, 0),
            ),
        ]  # fmt: skip

    return Report(
        "recovery", "Recovering a planted Gabor kernel", headline, [], sections,
        lambda: {"kernel_errors": result.kernel_errors(), "table": result.table(),
                 **{name: _plain(value) for name, value in vars(result).items()
                    if name not in ("images", "responses")}},
        facts={"images": " × ".join(map(str, result.images.shape)), "noise": percent(result.noise),
               "kernel size": " × ".join(map(str, result.kernel_size))},
    )  # fmt: skip


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
        f"The start is {degrees(abs(distance), 3)} from the truth; 90° is the farthest, as "
        "orientations repeat after 180°.",
        f"The RMSE is a cone at its minimum, of slope c = {number(slope, 3)} per rad. An update, "
        f"step size times slope, does not shrink on arrival: {listing(updates)}. So the "
        "orientation steps over the minimum and back. Momentum β makes updates up to 1/(1 − β) "
        "times longer.",
        "The basin is narrow: for white input the squared error is convex within λ / (√2 π σ/γ) = "
        f"{degrees(result.basin, 3)} of the truth. An update longer than this leaves it again.",
        "The squared error is a bowl: within the basin, every step size below 1/c² = "
        f"{number(slope**-2 if slope else math.inf, 2)} settles.",
    ]


def diagnosis_report(result: Any) -> Report:
    """What is wrong with a training loop, and the remedies."""
    findings, parts = result.findings, result.parts
    headline = "Nothing was found that prevents learning."
    if findings and findings[0].severity.name != "NOTE":
        # Up to the first full stop that ends a sentence: numbers have others.
        headline = re.split(r"(?<=\w\.)\s+(?=[A-ZΑ-Ω])", findings[0].sentence, maxsplit=1)[0]
    sentences = []
    if result.losses:
        first, last = number(result.losses[0], 3), number(result.losses[-1], 3)
        steps = counted(len(result.losses) - 1, "step")
        sentences.append(f"The loss went from {first} to {last} in {steps}.")
    if result.combined_remedies:
        numbers = [str(findings.index(found) + 1) for found in result.combined_remedies]
        sentences.append(f"One remedy is not enough; those of {listing(numbers)} together are.")

    def sections() -> list[Section]:
        page = [Section()]
        left = dict(parts)
        for index, found in enumerate(findings, 1):
            basis = [
                name
                for name, part in left.items()
                if found.cause in [one.cause for one in getattr(part, "findings", [])]
            ]
            numbers = [f"{name.replace('_', ' ')} {_value(name, one)}"
                       for name, one in found.numbers.items()]  # fmt: skip
            text = [
                found.sentence,
                "Where: " * bool(found.location) + ", ".join(found.location[:40]),
                ", ".join(numbers),
            ]
            page.append(Section(
                f"{index}. {found.cause}", [one for one in text if one],
                _figures(result, {name: left.pop(name) for name in basis}),
                code=found.remedy, tone=found.severity.name.lower(),
            ))  # fmt: skip
        text = []
        for why in dict.fromkeys(result.skipped.values()):
            names = [name for name, other in result.skipped.items() if other == why]
            text.append(f"Not examined: {', '.join(names)}. {why}")
        text.append(
            "Remedies use the names with which `diagnose` was called: `module`, `loss`, `inputs`, "
            "`targets` and `optimizer`. All trials ran on copies."
        )
        examined = f"Examined: {', '.join(parts)}."
        return [*page, Section("What was examined", [examined, *text], _figures(result, left))]

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
        file = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
        kind = type(part).__name__
        if kind in plots:
            figures[file] = partial(plots[kind], part)
        elif kind == "Health":
            layer = name.removeprefix("health").removeprefix(" of ")
            weight = getattr(result.setup.module.get_submodule(layer), "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 4 and weight.shape[1] in (1, 3):
                figures[file] = partial(plot_kernels, weight[:32], shared_scale=False)
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
                f"{name.replace('_', ' ')} {_distance(name, mean.mean)}"
                for name, mean in result.displacement(variant).items()
                if name in ("orientation", "wavelength", "sigma")
            ]
            gain = _mean(result.learning_gain(variant), "+")
            sentences += [
                f"{variant}, distance of the median filter from its start: {listing(moved)}.",
                f"{variant}, accuracy with learned filters minus accuracy after resetting the "
                f"filters to their start: {gain} points.",
            ]

    def sections() -> list[Section]:
        rows = [
            [
                variant, _mean(result.accuracy(variant)),
                "" if variant == first else _mean(result.difference(variant, first), "+"),
                _mean(result.accuracy_reset(variant)),
                str(result.runs_of(variant)[0].n_first_parameters),
                str(result.runs_of(variant)[0].n_parameters),
            ]
            for variant in result.variants
        ]  # fmt: skip
        head = ["first layer", "test accuracy, %", f"compared with {first}, points",
                "filters reset, %", "parameters of the first layer", "of the network"]  # fmt: skip
        seeds = counted(len(result.recipe.seeds), "seed")
        text = (
            f"Means over {seeds} with their standard errors. The networks of a seed see the same "
            "images in the same order, so differences are more certain than accuracies."
        )
        return [
            Section(figures={"training": partial(plot_training, result)}),
            Section("Accuracy", [text], table=Table(head, rows)),
            Section(
                "The filters, before and after",
                figures={"filters": partial(plot_trained_filters, result)},
            ),
        ]

    data = result.data
    facts = {
        "data": f"{data['name']}, {data['n_train']} training and {data['n_test']} test images of "
        f"{data['n_classes']} classes",
        "recipe": ", ".join(result.recipe.to_toml().splitlines()),
    }
    return Report("train", "Training a Gabor layer", headline + ".", sentences, sections,
                  result.to_record, facts=facts)  # fmt: skip


def _mean(mean: Any, sign: str = "") -> str:
    """A mean share in percent with its standard error."""
    if not mean.n:
        return "–"
    error = f" ± {100 * mean.standard_error:.1f}" if math.isfinite(mean.standard_error) else ""
    return f"{100 * mean.mean:{sign}.1f}{error}".replace("-", "−")


def _distance(name: str, value: float) -> str:
    return degrees(value, 2) if UNITS[name] == "rad" else number(value, 2)


def _value(name: str, value: Any) -> str:
    if not isinstance(value, (int, float)):
        return str(value)
    return percent(value) if name.startswith(("explained", "share")) else number(value, 3)


def _plain(value: Any) -> Any:
    """A record within a recovery as plain values."""
    if hasattr(value, "to_json"):
        return json.loads(value.to_json())
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if hasattr(value, "__dict__"):
        return {name: _plain(one) for name, one in vars(value).items()}
    return value
