"""Reports about learning: the planted kernel, why a loop does not learn, trained networks."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from functools import partial
from typing import Any

import torch
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
)
from gaborium.report.formatting import counted, degrees, listing, number, percent
from gaborium.report.page import Card, Drawing, Report, Section, Table

_SHARES = ("share", "border_power", "border_area", "mean_share", "largest_share", "share_to_best")
_TRIAL = ("explained_without_remedy", "explained_with_remedy",
          "loss_without_remedy", "loss_with_remedy")  # fmt: skip


def recovery_report(result: Any) -> Report:
    """The planted kernel, and the three ways to find it."""
    errors, found = result.kernel_errors(), result.found
    settled = sum(run.settled for run in result.descents)
    ways = [f"{settled or 'none'} of {counted(len(result.descents), 'descent')} settled"]
    outcome = found.outcome[0].name.lower().replace("_", " ")
    exact = outcome == "converged" and (
        errors["found"] < 0.01
        or all(abs(row["error"]) <= 4 * row["standard_error"] < math.inf for row in result.table())
    )
    ways.append(
        f"recover {'found all parameters' if exact else 'did not find the kernel'} ({outcome}, "
        f"kernel error {number(errors['found'], 2)})"
    )
    arrived = errors["trained"] < max(0.01, 2 * errors["found"] if exact else 0.0)
    ways.append(
        f"the trained layer {'arrived' if arrived else 'did not arrive'} (kernel error "
        f"{number(errors['trained'], 2)})"
    )
    headline = "; ".join(ways if result.descents else ways[1:]) + "."

    def sections() -> list[Section]:
        head = ["parameter", "unit", "planted", "start", "found", "error", "standard error", "trained", "error"]
        keys = ("truth", "start", "found", "error", "standard_error", "trained", "trained_error")
        rows = [
            [row["parameter"].replace("_", " "), row["unit"].replace("rad", "degrees"), *(
                number(math.degrees(row[key]) if row["unit"] == "rad" else row[key], 2 if "error" in key else 4)
                for key in keys
            )]
            for row in result.table()
        ]
        descents = [
            [f"{run.learning_rate:g}", f"{run.momentum:g}",
             "never" if run.first_arrival is None else f"step {run.first_arrival}",
             str(run.n_ejections), degrees(run.final_error, 3), run.verdict]
            for run in result.descents
        ]
        return [
            Section(figures=[Drawing("recovery", partial(plot_recovery, result))]),
            Section("The parameters", table=Table(head, rows, 2), note="The standard error is what "
                    "noise as strong as the residual gives each parameter."),
            Section("The loss over the orientation", _why(result),
                    figures=[Drawing("landscape", partial(plot_landscape, result))]),
            Section("The orientation, step by step",
                    figures=[Drawing("orientation", partial(plot_orientation, result))],
                    table=Table(["step size", "momentum", "first arrival", "ejections", "error at the end", "verdict"], descents, 0) if descents else None,
                    note="An arrival is a distance below 0.05 rad (2.9°), an ejection a step out of the "
                    "basin. A run has settled when its error stays below 0.01 rad (0.57°)."),
        ]

    def record() -> dict[str, Any]:
        return {
            "setup": {"image_shape": list(result.images.shape), "noise": result.noise, "basin": result.basin,
                      "kernel_size": list(result.kernel_size)},
            "target": json.loads(result.target.to_json()),
            "start": json.loads(result.start.to_json()),
            "table": result.table(),
            "kernel_errors": errors,
            "found": json.loads(found.to_json()),
            "descents": [{**dataclasses.asdict(run), "verdict": run.verdict} for run in result.descents],
            "training": {**vars(result.training), "params": json.loads(result.training.params.to_json())},
            "landscape": result.landscape,
        }  # fmt: skip

    facts = {
        "images": " × ".join(map(str, result.images.shape)),
        "kernel size": " × ".join(map(str, result.kernel_size)) + " px",
        "noise": f"{percent(result.noise)} of the responses' standard deviation" if result.noise else "none",
    }
    return Report("recovery", "Recovering a planted Gabor kernel", headline[0].upper() + headline[1:],
                  [], sections, record, facts=facts)


def _why(result: Any) -> list[str]:
    """Why descents on θ end as they do, from the measured landscape."""
    losses, n = result.landscape, len(result.landscape["mse"]) - 1
    truth = result.target.orientation[0, 0].item()
    start = result.start.orientation[0, 0].item()
    place = round((truth + math.pi) / (2 * math.pi) * n)
    reach, step = 4, 2 * math.pi / n
    rise = sum(losses["mse"][(place + side * reach) % n] for side in (-1, 1)) / 2 - losses["mse"][place % n]
    slope = math.sqrt(max(rise, 0.0)) / (reach * step)
    said = [
        f"The start is {degrees(abs(math.remainder(start - truth, math.pi)), 3)} from the truth; as "
        "orientations repeat after 180°, 90° is the farthest."
    ]
    if not slope:
        return [*said, "The planted kernel is the same in every orientation."]
    updates = sorted({run.learning_rate: degrees(run.learning_rate * slope, 2) for run in result.descents}.items())
    said.append(
        f"The RMSE is a cone at its minimum, of slope {number(slope, 3)} per rad: the update, step size "
        "times slope, does not shrink on arrival, so θ steps over the minimum and back. "
        + (f"Here one update is {listing([f'{angle} for step size {rate:g}' for rate, angle in updates])}; " if updates else "")
        + "momentum β multiplies it by up to 1/(1 − β)."
    )
    said.append(
        f"The basin is narrow: for white input the squared error is convex within λ / (√2 π σ/γ) = "
        f"{degrees(result.basin, 3)} of the truth. A longer update throws θ out of it. The squared error "
        f"is a bowl: near the minimum, every step size below 1/c² = {number(1 / slope**2, 2)} settles."
    )
    return said
