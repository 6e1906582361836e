"""The report of ``gaborium train``: the page, its figures, and the result as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gaborium.params import UNITS
from gaborium.plots import (
    INK,
    MUTED,
    TRAINED,
    colored,
    kernel_images,
    plot_trained_filters,
    plot_training,
    rate_colors,
)
from gaborium.reporting.charts import (
    DARK,
    Chart,
    chart_json,
    data_uri,
    plotly_parts,
    plotly_script,
)
from gaborium.reporting.page import render, versions, write_files
from gaborium.reporting.wording import counted, listing, number
from gaborium.training.results import Mean, Run, TrainResult

_TITLE = "Training a Gabor layer"
_COLUMNS = 8  # filters in a row
_N_BINS = 12
_NAMES = {
    "gabor": "learned Gabor",
    "gabor-fixed": "fixed Gabor",
    "mixed": "mixed",
    "free": "free",
}


class Filters(NamedTuple):
    """The filters of one run in all its snapshots.

    Args:
        title: of the first layer and the seed.
        frames: one ``data:`` URI of a PNG for each snapshot.
    """

    title: str
    frames: list[str]


# -- words --------------------------------------------------------------------------------------


def in_percent(mean: Mean, *, signed: bool = False) -> str:
    """A mean share in percent with its standard error.

    Example:
        >>> in_percent(Mean(0.9312, 0.0041, 5)), in_percent(Mean(0.9312, math.nan, 1))
        ('93.1 ± 0.4 %', '93.1 %')
        >>> in_percent(Mean(-0.0123, 0.004, 5), signed=True), in_percent(Mean(math.nan, 0.0, 0))
        ('−1.2 ± 0.4', '–')
    """
    if not mean.n:
        return "–"
    text = f"{100 * mean.mean:{'+' if signed else ''}.1f}".replace("-", "−")
    if math.isfinite(mean.standard_error):
        text += f" ± {100 * mean.standard_error:.1f}"
    return text if signed else f"{text} %"


def training_headline(result: TrainResult) -> str:
    """How well the network does, and how that compares, in a sentence."""
    first, *others = result.variants
    accuracy = result.accuracy(first)
    if not accuracy.n:
        return f"Every run with a {_NAMES[first]} first layer was stopped: its loss was not finite."
    text = (
        f"With a {_NAMES[first]} first layer the network tells {in_percent(accuracy)} of the test "
        "images right"
    )
    parts = []
    for variant in others:
        lead = result.difference(first, variant)
        if lead.n:
            points = in_percent(lead._replace(mean=abs(lead.mean)), signed=True).lstrip("+")
            word = "more" if lead.mean >= 0 else "fewer"
            parts.append(f"{points} points {word} than with a {_NAMES[variant]} one")
    return f"{text}{': ' if parts else ''}{listing(parts)}."


def training_sentences(result: TrainResult) -> dict[str, str]:
    """What became of the filters, for each first layer that has Gabor filters which learn."""
    told = {}
    for variant in result.variants:
        back = result.accuracy_reset(variant)
        if not back.n:
            continue
        moved = [
            f"the {name.replace('_', ' ')} by {_with_unit(name, mean.mean)}"
            for name, mean in result.displacement(variant).items()
            if name in ("orientation", "wavelength", "sigma") and mean.n
        ]
        gain = result.learning_gain(variant)
        loses = "loses" if gain.mean >= 0 else "gains"
        points = in_percent(gain._replace(mean=abs(gain.mean)), signed=True).lstrip("+")
        told[variant] = (
            f"The median filter moved {listing(moved)}. Put back to their start in the trained "
            f"network, the filters leave it {in_percent(back)}: it {loses} {points} points."
        )
    return told


# -- the page -----------------------------------------------------------------------------------


def training_record(result: TrainResult, *, facts: Mapping[str, str]) -> dict[str, Any]:
    """All that was found, as plain objects for JSON: that of the result, facts and versions."""
    record = result.to_record()
    return {
        "format": record.pop("format"),
        "version": record.pop("version"),
        "facts": dict(facts),
        "versions": versions(),
        "headline": training_headline(result),
        **record,
    }


def report_training(result: TrainResult, *, title: str = _TITLE, facts: Mapping[str, str]) -> str:
    """Write the page that shows what was learned, and whether it helped.

    The page is one file that opens without a network: it refers to nothing outside itself, and
    forbids the browser to. Whatever ``title`` and ``facts`` hold is shown as text.

    Args:
        result: from ``train``.
        title: of the page.
        facts: how it was made, by name, such as the command.

    Returns:
        HTML.

    Raises:
        ImportError: Jinja2, plotly or matplotlib is not installed.
    """
    filters = [_filters(run) for run in _shown(result)]
    learned = [variant for variant in result.variants if result.accuracy_reset(variant).n]
    return render(
        "training.html.j2",
        {"number": number},
        title=title,
        facts={**facts, **_recipe_facts(result)},
        headline=training_headline(result),
        cards=[
            (
                _NAMES[variant],
                in_percent(result.accuracy(variant)),
                f"{counted(result.runs_of(variant)[0].n_first_parameters, 'number')} learned in "
                "the first layer",
            )
            for variant in result.variants
        ],
        rows=[_row(result, variant) for variant in result.variants],
        n_seeds=len(result.recipe.seeds),
        stopped=[run.stopped for run in result.runs if run.stopped],
        sentences={_NAMES[variant]: text for variant, text in training_sentences(result).items()},
        learning=[_learning_chart(result, "test_accuracy"), _learning_chart(result, "loss")],
        displacement=_displacement_chart(result, learned) if learned else None,
        distribution=_distribution_chart(result, learned[0]) if learned else None,
        galleries=filters,
        films=[one.frames for one in filters],
        moments=[f"epoch {epoch}" for epoch in _shown(result)[0].epochs],
        n_channels=result.data.get("n_channels", 1),
        dark=DARK,
        plotly=plotly_script(),
    )


def write_training(
    result: TrainResult,
    folder: str | os.PathLike[str],
    *,
    title: str = _TITLE,
    facts: Mapping[str, str],
) -> tuple[str, ...]:
    """Write the result as JSON, as a page, and as figures.

    Args:
        result: from ``train``.
        folder: where to; it exists, and files of the same names are replaced.
        title: of the page.
        facts: how it was made, by name, such as the command.

    Returns:
        The names of the files: ``result.json``, ``report.html`` and two PNG.

    Raises:
        FileNotFoundError: there is no such folder; told before any work is done.
        OSError: a file cannot be written, with the reason.
        ImportError: Jinja2, plotly or matplotlib is not installed.
    """

    def contents() -> Iterator[tuple[str, Any]]:
        record = training_record(result, facts=facts)
        text = json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False)
        yield "result.json", text + "\n"
        yield "report.html", report_training(result, title=title, facts=facts)
        yield "training.png", plot_training(result)
        yield "filters.png", plot_trained_filters(result)

    return write_files(folder, contents())


def _recipe_facts(result: TrainResult) -> dict[str, str]:
    data = result.data
    size = " × ".join(map(str, data["image_size"]))
    return {
        "data": f"{data['name']}: {data['n_train']} images to learn from, {data['n_test']} to test "
        f"with, {data['n_classes']} classes, {data['n_channels']} × {size} px",
        "recipe": ", ".join(result.recipe.to_toml().splitlines()),
        "time": f"{sum(run.seconds for run in result.runs):.0f} s of training and evaluation",
    }


def _row(result: TrainResult, variant: str) -> list[str]:
    """A row of the table of first layers."""
    runs, first = result.runs_of(variant), result.variants[0]
    lead = result.difference(variant, first)
    cells = [
        _NAMES[variant],
        in_percent(result.accuracy(variant)),
        "" if variant == first else in_percent(lead, signed=True),
        in_percent(result.accuracy_reset(variant)),
    ]
    return [*cells, str(runs[0].n_first_parameters), str(runs[0].n_parameters)]


def _with_unit(name: str, value: float) -> str:
    unit = UNITS[name]
    if unit == "rad":
        return f"{number(math.degrees(value), 2)}°"
    return f"{number(value, 2)} px" if unit == "px" else number(value, 2)


# -- pictures -----------------------------------------------------------------------------------


def _shown(result: TrainResult) -> list[Run]:
    """For each first layer the run of the first seed."""
    return [result.runs_of(variant)[0] for variant in result.variants]


def _filters(run: Run) -> Filters:
    images = kernel_images(run.kernels).nan_to_num()
    # Every filter keeps its scale through the training, so that one that fades is seen to fade.
    scale = images.abs().amax((0, 2, 3, 4), keepdim=True).clamp_min(1e-30)
    frames = [_mosaic(image) for image in images / scale]
    return Filters(
        f"{_NAMES[run.variant]}, seed {run.seed}",
        [data_uri((255 * frame).round().byte()) for frame in frames],
    )


def _mosaic(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] in rows, with clear lines between them: ``(height, width, 4)``."""
    # One picture more, so that all frames have the same scale.
    n, _, height, width = images.shape
    whole = torch.cat([images, torch.ones_like(images[:1])])
    pixels = colored(whole)[:n]
    columns = min(n, _COLUMNS)
    rows = math.ceil(n / columns)
    page = torch.zeros(rows * (height + 1) - 1, columns * (width + 1) - 1, 4)
    for index, picture in enumerate(pixels):
        row, column = divmod(index, columns)
        top, left = row * (height + 1), column * (width + 1)
        page[top : top + height, left : left + width, :3] = picture
        page[top : top + height, left : left + width, 3] = 1
    return page


# -- charts -------------------------------------------------------------------------------------


def variant_colors(variants: Sequence[str]) -> dict[str, str]:
    """The colour of each first layer, the same in all charts."""
    palette = [TRAINED, INK, *rate_colors([0.0, 1.0, 2.0, 3.0]).values()]
    return dict(zip(variants, palette, strict=False))


def curve_of(run: Run, name: str) -> tuple[list[int], list[float]]:
    """Epochs and values of what was measured in them."""
    points = [
        (point["epoch"], point[name])
        for point in run.curve
        if isinstance(point.get(name), float) and math.isfinite(point[name])
    ]
    return [epoch for epoch, _ in points], [value for _, value in points]


def _learning_chart(result: TrainResult, name: str) -> Chart:
    objects, _ = plotly_parts()
    figure = objects.Figure()
    share = name == "test_accuracy"
    for variant, color in variant_colors(result.variants).items():
        for index, run in enumerate(result.runs_of(variant)):
            epochs, values = curve_of(run, name)
            written = "%{y:.1%}" if share else "%{y:.4g}"
            figure.add_trace(
                objects.Scatter(
                    x=epochs, y=values, mode="lines+markers", name=_NAMES[variant],
                    legendgroup=variant, showlegend=index == 0, line={"color": color, "width": 1.5},
                    marker={"size": 4, "color": color}, opacity=0.85,
                    hovertemplate=f"{_NAMES[variant]}, seed {run.seed}<br>epoch %{{x}}: {written}"
                    "<extra></extra>",
                )
            )  # fmt: skip
    figure.update_xaxes(title_text="epoch", rangemode="tozero")
    title = "accuracy on the test images" if share else "loss on the training images"
    figure.update_yaxes(title_text=title)
    if share:
        figure.update_yaxes(tickformat=".0%")
    return Chart(f"learning-{name.replace('_', '-')}", f"{title} in the epochs", _small(figure))


def _displacement_chart(result: TrainResult, variants: Sequence[str]) -> Chart:
    """How far each field has gone from its start, in its own unit."""
    objects, subplots = plotly_parts()
    fields = list(result.displacement(variants[0])) or list(_shown(result)[0].displacement)
    titles = [f"{name.replace('_', ' ')}{_axis_unit(name)}" for name in fields]
    columns = min(3, len(fields))
    rows = math.ceil(len(fields) / columns)
    figure = subplots.make_subplots(
        rows=rows, cols=columns, subplot_titles=titles, vertical_spacing=0.2,
        horizontal_spacing=0.08,
    )  # fmt: skip
    colors = variant_colors(result.variants)
    for place, name in enumerate(fields):
        row, column = place // columns + 1, place % columns + 1
        turn = 180 / math.pi if UNITS[name] == "rad" else 1.0
        for variant in variants:
            for index, run in enumerate(result.runs_of(variant)):
                epochs = [point["epoch"] for point in run.curve]
                values = [turn * point["displacement"][name] for point in run.curve]
                figure.add_trace(
                    objects.Scatter(
                        x=epochs, y=values, mode="lines", name=_NAMES[variant], legendgroup=variant,
                        showlegend=place == 0 and index == 0 and len(variants) > 1,
                        line={"color": colors[variant], "width": 1.5}, opacity=0.85,
                        hovertemplate=f"seed {run.seed}, epoch %{{x}}: %{{y:.3g}}<extra></extra>",
                    ),
                    row=row, col=column,
                )  # fmt: skip
        if row == rows:
            figure.update_xaxes(title_text="epoch", row=row, col=column)
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(rangemode="tozero")
    figure.update_annotations(font_size=13)
    return Chart(
        "displacement",
        "Median distance of each parameter from its start, in the epochs",
        _small(figure),
    )


def _axis_unit(name: str) -> str:
    return {"rad": ", degrees", "px": ", px"}.get(UNITS[name], "")


def _distribution_chart(result: TrainResult, variant: str) -> Chart:
    """Orientations and wavelengths of all filters of all seeds, before and after."""
    objects, subplots = plotly_parts()
    ends = [(run.start, run.end) for run in result.runs_of(variant) if run.params]
    names = [n for n in ("orientation", "wavelength") if hasattr(ends[0][0], n)]
    figure = subplots.make_subplots(rows=1, cols=len(names), horizontal_spacing=0.1)
    for column, name in enumerate(names, 1):
        before, after = (
            torch.cat([getattr(params, name)[:, 0] for params in some])
            for some in zip(*ends, strict=True)
        )
        edges = _bins(name, torch.cat([before, after]))
        for label, values, color in (("start", before, MUTED), ("end", after, TRAINED)):
            counts = _counts(name, values, edges)
            middle = ((edges[1:] + edges[:-1]) / 2).tolist()
            figure.add_trace(
                objects.Bar(
                    x=middle, y=counts, name=label, legendgroup=label, showlegend=column == 1,
                    marker={"color": color, "line": {"width": 0}},
                    hovertemplate=f"{label}: %{{y}} filters<extra></extra>",
                ),
                row=1, col=column,
            )  # fmt: skip
        title = "orientation, degrees" if name == "orientation" else "wavelength, px"
        figure.update_xaxes(title_text=title, row=1, col=column)
        if name == "orientation":
            figure.update_xaxes(tickvals=list(range(0, 181, 45)), range=[0, 180], row=1, col=column)
    figure.update_yaxes(title_text="filters", row=1, col=1)
    figure.update_layout(barmode="group", bargap=0.15, bargroupgap=0.05)
    return Chart(
        "distribution",
        f"Histograms of the {' and the '.join(names)} before and after training",
        _small(figure),
    )


def _bins(name: str, values: Tensor) -> Tensor:
    if name == "orientation":
        return torch.linspace(0, 180, _N_BINS + 1)
    finite = values[values.isfinite()]
    # A few waves that have become nearly blobs would leave one bar for all others.
    high = finite.quantile(0.98).item() if len(finite) else 10.0
    return torch.linspace(0, max(math.ceil(1.1 * high), 2), _N_BINS + 1)


def _counts(name: str, values: Tensor, edges: Tensor) -> list[int]:
    if name == "orientation":
        values = values.rad2deg() % 180
    last = (edges[-1] * (1 - 1e-6)).item()
    inside = values.nan_to_num(posinf=last).clamp(0, last)
    return torch.histc(inside, len(edges) - 1, 0, edges[-1].item()).int().tolist()


def _small(figure: Any) -> str:
    figure.for_each_xaxis(lambda axis: axis.title.update(font_size=13))
    figure.for_each_yaxis(lambda axis: axis.title.update(font_size=13))
    return chart_json(figure)
