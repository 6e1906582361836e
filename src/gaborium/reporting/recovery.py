"""The report of ``gaborium recover``: the page, its figures, and the result as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from gaborium.experiments import Recovery
from gaborium.params import plain
from gaborium.plots import plot_landscape, plot_orientation, plot_recovery
from gaborium.reporting.charts import (
    DARK,
    kernel_maps,
    landscape_chart,
    line_styles,
    orientation_chart,
    photograph_uri,
    plotly_script,
    signal_maps,
)
from gaborium.reporting.page import render, versions, write_files
from gaborium.reporting.wording import (
    degrees,
    explain,
    headline,
    listing,
    number,
    outcome_sentences,
    share,
    verdicts,
)

_JSON_VERSION = 1
_TITLE = "Recovering a planted Gabor kernel"
_SYMBOLS = {
    "orientation": "θ",
    "wavelength": "λ",
    "phase": "ψ",
    "sigma": "σ",
    "aspect_ratio": "γ",
    "amplitude": "A",
}


def recovery_record(recovery: Recovery, *, facts: Mapping[str, str]) -> dict[str, Any]:
    """All that was found, as plain objects for JSON.

    Convention:
        - angles are in rad, lengths in px; ``orientation`` runs from +x towards +y (downwards)
        - numbers that JSON does not have are the texts ``inf``, ``-inf`` and ``nan``
        - ``target``, ``start``, ``found.params`` and ``training.params`` are what
          ``Gabor2d.from_json`` reads

    Args:
        recovery: from ``gaborium.experiments.recover_planted``.
        facts: how it was made, by name, such as the photograph and the seed; kept as they come.

    Returns:
        ``format``, ``version``, ``facts``, ``versions``, ``setup``, ``target``, ``start``,
        ``outcome``, ``table``, ``kernel_errors``, ``found``, ``descents``, ``training``,
        ``landscape``.

    Example:
        >>> import torch
        >>> from gaborium import Gabor2d
        >>> from gaborium.experiments import recover_planted
        >>> image = torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(0))
        >>> planted = Gabor2d.of(orientation=0.8, wavelength=5.0, sigma=2.0)
        >>> result = recover_planted(
        ...     [image], planted, start=planted, n_steps=2, learning_rates=[0.1]
        ... )
        >>> record = recovery_record(result, facts={"seed": "0"})
        >>> record["setup"]["kernel_size"], record["found"]["outcome"]
        ([15, 15], ['CONVERGED'])
    """
    n_images, n_channels, height, width = recovery.images.shape
    record = {
        "format": "gaborium.recovery",
        "version": _JSON_VERSION,
        "facts": dict(facts),
        "versions": versions(),
        "setup": {
            "n_images": n_images,
            "n_channels": n_channels,
            "image_size": [height, width],
            "kernel_size": list(recovery.kernel_size),
            "noise": recovery.noise,
            "n_steps": _n_steps(recovery),
            "basin": recovery.basin,
        },
        "target": json.loads(recovery.target.to_json()),
        "start": json.loads(recovery.start.to_json()),
        "outcome": {"headline": headline(recovery), **outcome_sentences(recovery)},
        "table": recovery.table(),
        "kernel_errors": recovery.kernel_errors(),
        "found": json.loads(recovery.found.to_json()),
        "descents": [
            {
                "learning_rate": descent.learning_rate,
                "momentum": descent.momentum,
                "verdict": descent.verdict,
                "settled": descent.settled,
                "first_arrival": descent.first_arrival,
                "n_ejections": descent.n_ejections,
                "final_error": descent.final_error,
                "orientation": descent.orientation,
                "loss": descent.loss,
                "error": descent.error,
            }
            for descent in recovery.descents
        ],
        "training": {
            "params": json.loads(recovery.training.params.to_json()),
            "kernel_error": recovery.training.kernel_error,
            "global_steps": recovery.training.global_steps,
            "orientation": recovery.training.orientation,
            "loss": recovery.training.loss,
        },
        "landscape": recovery.landscape,
    }
    return plain(record)


def report_recovery(recovery: Recovery, *, title: str = _TITLE, facts: Mapping[str, str]) -> str:
    """Write the page that says what was found and why.

    The page is one file that opens without a network: it refers to nothing outside itself, and
    forbids the browser to. Whatever ``title`` and ``facts`` hold is shown as text.

    Args:
        recovery: from ``gaborium.experiments.recover_planted``.
        title: of the page.
        facts: how it was made, by name, such as the photograph and the seed.

    Returns:
        HTML.

    Raises:
        ImportError: Jinja2, plotly or matplotlib is not installed.

    Example:
        >>> import torch
        >>> from gaborium import Gabor2d
        >>> from gaborium.experiments import recover_planted
        >>> image = torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(0))
        >>> planted = Gabor2d.of(orientation=0.8, wavelength=5.0, sigma=2.0)
        >>> result = recover_planted(
        ...     [image], planted, start=planted, n_steps=2, learning_rates=[0.1]
        ... )
        >>> page = report_recovery(result, title="Stripes", facts={"photograph": "<noise>"})
        >>> "<title>Stripes</title>" in page, "&lt;noise&gt;" in page
        (True, True)
    """
    kernels, kernel_scale = kernel_maps(recovery)
    explanation = explain(recovery)
    rates = sorted({descent.learning_rate for descent in recovery.descents})
    momenta = sorted({descent.momentum for descent in recovery.descents})
    n_images, n_channels, height, width = recovery.images.shape
    return render(
        "report.html.j2",
        {"number": number, "share": share, "degrees": degrees, "listing": listing},
        title=title,
        facts=facts,
        headline=headline(recovery),
        sentences=outcome_sentences(recovery),
        verdicts=verdicts(recovery),
        rows=[_row(row) for row in recovery.table()],
        recovery=recovery,
        setup={
            "n_images": n_images,
            "n_channels": n_channels,
            "height": height,
            "width": width,
            "n_steps": _n_steps(recovery),
        },
        why=explanation,
        descents=[
            (descent, explanation.longest_update(descent), line)
            for descent, line in line_styles(recovery)
        ],
        # Without momentum, in order: what one step size does.
        updates={rate: rate * explanation.cone_slope for rate in rates},
        momenta=momenta,
        reach=min(rates, default=math.inf) * explanation.start_slope * _n_steps(recovery),
        photograph=photograph_uri(recovery),
        signals=signal_maps(recovery),
        kernels=kernels,
        kernel_scale=kernel_scale,
        landscape=landscape_chart(recovery),
        orientation=orientation_chart(recovery),
        dark=DARK,
        plotly=plotly_script(),
    )


def write_recovery(
    recovery: Recovery,
    folder: str | os.PathLike[str],
    *,
    title: str = _TITLE,
    facts: Mapping[str, str],
) -> tuple[str, ...]:
    """Write the result as JSON, as a page, and as figures.

    Args:
        recovery: from ``gaborium.experiments.recover_planted``.
        folder: where to; it exists, and files of the same names are replaced.
        title: of the page.
        facts: how it was made, by name, such as the photograph and the seed.

    Returns:
        The names of the files: ``result.json``, ``report.html`` and three PNG.

    Raises:
        FileNotFoundError: there is no such folder; told before any work is done.
        OSError: a file cannot be written, with the reason.
        ImportError: Jinja2, plotly or matplotlib is not installed.
    """

    def contents() -> Iterator[tuple[str, Any]]:
        record = recovery_record(recovery, facts=facts)
        yield (
            "result.json",
            json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n",
        )
        yield "report.html", report_recovery(recovery, title=title, facts=facts)
        yield "recovery.png", plot_recovery(recovery)
        yield "landscape.png", plot_landscape(recovery)
        yield "orientation.png", plot_orientation(recovery)

    return write_files(folder, contents())


def _n_steps(recovery: Recovery) -> int:
    return len(recovery.training.orientation) - 1


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table in words: each cell a text, and where it is an angle also in degrees."""
    angle = row["unit"] == "rad"

    def cell(key: str) -> tuple[str, str]:
        value, digits = row[key], 2 if "error" in key else 4
        # A phase of 1e-17 rad is 0 to a reader; how near it is stands in the column of the error.
        shown = round(value, 4) if angle and digits == 4 else value
        return number(shown, digits), degrees(shown, digits) if angle else ""

    name, _, index = row["parameter"].partition("[")
    return {
        "name": name.replace("_", " "),
        "index": index.rstrip("]"),
        "symbol": _SYMBOLS.get(name, ""),
        "unit": "" if row["unit"] == "1" else row["unit"],
        "cells": {
            key: cell(key)
            for key in (
                *("truth", "start", "found", "error", "standard_error"),
                *("trained", "trained_error"),
            )
        },
    }
