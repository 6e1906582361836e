"""What the parts of a diagnosis show on its page: charts, pictures and tables."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gaborium.diagnostics import (
    Diagnosis,
    Finding,
    GradientCheck,
    Health,
    Identifiability,
    Landscape,
    ParameterCheck,
    StepLimit,
)
from gaborium.fitting import FitResult
from gaborium.params import UNITS
from gaborium.plots import INK, MUTED, SHADE, TRAINED, colored, plot_landscape, rate_colors
from gaborium.reporting.charts import PAPER, Chart, chart_json, data_uri, plotly_parts
from gaborium.reporting.page import png
from gaborium.reporting.wording import counted, degrees, number, percent

BLUE, VERMILION = rate_colors([0.0, 1.0]).values()
_MOST_FILTERS = 24  # in a row of pictures
_MOST_ROWS = 60  # of a table of parameters


class Figure(NamedTuple):
    """What a part has to show: a chart, pictures or a table, one of the three.

    Args:
        title: above it.
        caption: how it is to be read.
        chart: drawn by plotly.
        pictures: ``data:`` URI and the words below it.
        rows: of a table, the first of them its head; a row begins with whether it is concerned.
    """

    title: str
    caption: str
    chart: Chart | None = None
    pictures: list[tuple[str, str]] | None = None
    rows: list[tuple[bool, list[str]]] | None = None


def summary(part: Any) -> str:
    """What a part found, in a sentence."""
    if isinstance(part, GradientCheck):
        n = len(part.parameters)
        learning = sum(one.state == "learns" for one in part.parameters)
        verb = "gets a right gradient and moves" if n == 1 else "get a right gradient and move"
        told = f"{learning} of {counted(n, 'parameter')} {verb}."
        return f"{told} {part.not_in_double}".strip()
    if isinstance(part, Health):
        bad = {
            "dead": int(part.dead.sum()),
            "aliased": int(part.aliased.sum()),
            "truncated": int(part.truncated.sum()),
            "degenerate": sum(map(bool, part.degenerate)),
            "in pairs of duplicates": len({i for pair in part.duplicates for i in pair[:2]}),
        }
        found = ", ".join(f"{count} {word}" for word, count in bad.items() if count)
        return f"{counted(len(part), 'filter')}: {found or 'alive, different and whole'}."
    if isinstance(part, Identifiability):
        lost = sum(bool(part.not_identifiable(i)) for i in range(len(part.bounds)))
        told = f"Condition of the inputs {number(part.condition.max().item(), 3)}, of white input "
        told += f"{number(part.white_condition.max().item(), 3)}"
        return told + (f"; {counted(lost, 'filter')} not identifiable." if lost else ".")
    if isinstance(part, Landscape):
        share = percent(part.share_to_best)
        minima = "minimum" if part.n_spurious == 1 else "minima"
        worse = f", the others to {part.n_spurious} worse {minima}" if part.n_spurious else ""
        return f"{share} of starts roll down to the best minimum{worse}."
    if isinstance(part, StepLimit):
        if part.is_cone:
            return f"A cone: the slope stays {number(part.slopes[-1], 3)} up to the minimum."
        return (
            f"A bowl of curvature {number(part.sharpness, 3)}: plain descent settles with steps "
            f"below {number(part.step_limit, 3)}."
        )
    if isinstance(part, FitResult):
        good = int(part.converged.sum())
        return f"A Gabor function was found for {good} of {counted(len(part), 'filter')}."
    return ""


def figures(diagnosis: Diagnosis, name: str, found: Finding | None, chart: str) -> list[Figure]:
    """What a part has to show, and of it what a finding is about.

    Args:
        diagnosis: which the part belongs to.
        name: of the part.
        found: a finding that rests on it; ``None`` for all of it.
        chart: id of its chart in the page.
    """
    part = diagnosis.parts[name]
    if isinstance(part, Landscape) and len(part.fields) == 1:
        return [_landscape_figure(part, chart)]
    if isinstance(part, Landscape):
        return [_as_picture(plot_landscape(part), " and ".join(part.fields))]
    if isinstance(part, StepLimit):
        return [_slope_figure(part, chart)]
    if isinstance(part, Identifiability):
        return [_bounds_figure(part, found, chart)]
    if isinstance(part, Health):
        return list(_filters_figure(diagnosis, name, part, found))
    if isinstance(part, GradientCheck):
        return [_gradients_figure(part, found)]
    if isinstance(part, FitResult) and name == "recover":
        return list(_recover_figure(diagnosis, part, found))
    return []


def _as_picture(figure: Any, title: str) -> Figure:
    uri = "data:image/png;base64," + base64.b64encode(png(figure)).decode()
    return Figure(title, "", pictures=[(uri, "")])


def _landscape_figure(part: Landscape, name: str) -> Figure:
    """The loss over one field, with its basins and minima and where the layer is."""
    objects, _ = plotly_parts()
    angle = part.units[0] == "rad"
    field = part.fields[0].replace("_", " ")

    def told(value: float) -> float:
        return math.degrees(value) if angle else value

    x = [told(value) for value in part.grids[0].tolist()]
    values = [value if math.isfinite(value) else None for value in part.values.tolist()]
    figure = objects.Figure()
    unit = "°" if angle else f" {part.units[0]}" if part.units[0] == "px" else ""
    hover = f"{field} %{{x:.4g}}{unit}<br>loss %{{y:.4g}}<extra></extra>"
    figure.add_trace(
        objects.Scatter(x=x, y=values, mode="lines", line={"color": INK, "width": 2},
                        name="loss", showlegend=False, hovertemplate=hover)
    )  # fmt: skip
    for some, symbol, color, label in (
        (part.minima[: part.n_best], "circle", TRAINED, "best minimum"),
        (part.minima[part.n_best :], "x", VERMILION, "worse minimum"),
    ):
        if some:
            figure.add_trace(
                objects.Scatter(
                    x=[told(one.position[0]) for one in some], y=[one.value for one in some],
                    mode="markers", name=label,
                    marker={"size": 10, "symbol": symbol, "color": color},
                    hovertemplate=f"{label}<br>{hover}",
                )
            )  # fmt: skip
    figure.add_trace(
        objects.Scatter(
            x=[told(part.present[0])], y=[part.present_value], mode="markers", name="the layer",
            marker={"size": 11, "color": PAPER, "line": {"color": INK, "width": 2}},
            hovertemplate=f"the layer<br>{hover}",
        )
    )  # fmt: skip
    for left, right in _runs((part.basins < part.n_best).tolist()):
        figure.add_shape(
            type="rect", x0=x[left], x1=x[right], y0=0, y1=1, yref="paper",
            fillcolor=SHADE, line_width=0, layer="below", opacity=0.6,
        )  # fmt: skip
    figure.update_yaxes(title_text="loss")
    figure.update_xaxes(title_text=field + (f", {part.units[0]}" if unit == " px" else ""))
    if angle and part.periodic[0]:
        ticks = list(range(-180, 181, 45))
        figure.update_xaxes(
            range=[-180, 180], tickvals=ticks,
            ticktext=[f"{tick}°".replace("-", "−") for tick in ticks],
        )  # fmt: skip
    elif part.grids[0][0] > 0:
        figure.update_xaxes(type="log")
        for shape in figure.layout.shapes:  # their places are exponents on such an axis
            shape.update(x0=math.log10(shape.x0), x1=math.log10(shape.x1))
    width = part.half_width
    caption = (
        f"All other parameters as they are. Shaded is where starts roll down to a best minimum, "
        f"{percent(part.share_to_best)} of all."
    )
    if math.isfinite(width) and part.exact:  # of other losses it says little
        how = degrees(width, 3) if angle else number(width, 3) + unit
        caption += f" The squared error is convex within ±{how}"
        if part.predicted_half_width is not None:
            caption += (
                f"; λ / (√2 π σ/γ) predicts ±{degrees(part.predicted_half_width, 3)} on white input"
            )
        caption += "."
    of = f", filter {part.filter}"
    return Figure(
        f"The loss over the {field}{of}",
        caption,
        Chart(name, f"Loss against the {field}", half_page(figure)),
    )


def _runs(flags: list[bool]) -> Iterator[tuple[int, int]]:
    """First and last index of each run of true ones.

    Example:
        >>> list(_runs([True, True, False, True]))
        [(0, 1), (3, 3)]
    """
    begun = None
    for i, flag in enumerate([*flags, False]):
        if flag and begun is None:
            begun = i
        elif not flag and begun is not None:
            yield begun, i - 1
            begun = None


def _slope_figure(part: StepLimit, name: str) -> Figure:
    """The slope against the distance from the minimum."""
    objects, _ = plotly_parts()
    distances, slopes = list(part.distances), list(part.slopes)
    figure = objects.Figure()
    for power, dash in ((1, "dot"), (0, "dash")):
        line = [slopes[0] * (r / distances[0]) ** power for r in distances]
        figure.add_trace(
            objects.Scatter(x=distances, y=line, mode="lines", hoverinfo="skip", showlegend=False,
                            line={"color": MUTED, "width": 1, "dash": dash})
        )  # fmt: skip
    color = VERMILION if part.is_cone else BLUE
    figure.add_trace(
        objects.Scatter(
            x=distances, y=slopes, mode="lines+markers", showlegend=False,
            line={"color": color, "width": 3}, marker={"size": 8},
            hovertemplate="distance %{x:.3g}<br>slope %{y:.3g}<extra></extra>",
        )
    )  # fmt: skip
    if part.learning_rate:
        step = part.learning_rate * (1.0 if part.adaptive else slopes[-1])
        if step > 0:
            figure.add_vline(x=step, line={"color": INK, "width": 1, "dash": "dash"})
            figure.add_annotation(
                x=math.log10(step), y=1, yref="paper", yanchor="bottom", text="one step",
                showarrow=False,
            )  # fmt: skip
    if math.isfinite(part.basin) and part.basin > distances[-1]:
        figure.add_vrect(
            x0=distances[-1], x1=part.basin, fillcolor=SHADE, line_width=0, layer="below",
            opacity=0.6,
        )  # fmt: skip
    figure.update_xaxes(type="log", title_text="distance from the minimum", exponentformat="power")
    figure.update_yaxes(type="log", title_text="slope of the loss", exponentformat="power")
    caption = (
        "At a cone the slope stays as it is up to the minimum: whatever the distance, a step of "
        "one size is equally long, and passes it. "
        if part.is_cone
        else "The slope shrinks on the way in, and a step with it: there is a step size that "
        "settles. "
    )
    caption += (
        "Dotted is a slope that vanishes; shaded is the basin. Distances are in the units in which "
        "the parameters are stored: rad for an orientation, rad/px for a wave vector."
    )
    return Figure(
        "The slope around the minimum",
        caption,
        Chart(name, "Slope of the loss against the distance from the minimum", half_page(figure)),
    )


def _bounds_figure(part: Identifiability, found: Finding | None, name: str) -> Figure:
    """How much worse each parameter is known than from white input."""
    objects, _ = plotly_parts()
    where = found.location if found is not None else ()
    told = found.numbers.get("filter") if found is not None else None
    index = int(told if told is not None else next((w for w in where if w.isdigit()), 0))
    index = index if index < len(part.bounds) else 0
    ratios = (part.bounds[index] / part.white_bounds[index]).tolist()
    names = [one.replace("_", " ") for one in part.names]
    known = [ratio if math.isfinite(ratio) else None for ratio in ratios]
    figure = objects.Figure(
        objects.Bar(
            x=known, y=names, orientation="h", marker={"color": BLUE}, width=0.5,
            hovertemplate="%{y}: %{x:.3g} times as uncertain<extra></extra>", showlegend=False,
        )
    )  # fmt: skip
    for one, ratio in zip(names, ratios, strict=True):
        if not math.isfinite(ratio):
            figure.add_annotation(
                x=0, y=one, xref="paper", xanchor="left", text="  not determined at all",
                showarrow=False, font={"color": VERMILION},
            )  # fmt: skip
    figure.add_vline(x=1, line={"color": INK, "width": 1, "dash": "dash"})
    figure.update_xaxes(title_text="uncertainty / that on white input")
    figure.update_yaxes(autorange="reversed")
    condition = number(part.condition[index].item(), 3)
    return Figure(
        f"What the inputs tell, filter {index}",
        f"The smallest standard error that any estimate can have. The condition of the inputs is "
        f"{condition}, that of white input {number(part.white_condition[index].item(), 3)}.",
        Chart(name, "Uncertainty of each parameter", half_page(figure)),
    )


def _filters_figure(
    diagnosis: Diagnosis, name: str, part: Health, found: Finding | None
) -> Iterator[Figure]:
    """The kernels: those that a finding is about, or all of them."""
    kernels = kernels_of(diagnosis, name)
    if kernels is None:
        return
    kernels = kernels.unflatten(0, (len(part), -1))[:, 0]  # of a pair the even one
    concerned: Sequence[int] = range(len(part))
    if found is not None:
        concerned = [int(i) for i in found.location if i.isdigit() and int(i) < len(part)]
    order = list(concerned)[:_MOST_FILTERS]
    if not order:
        return
    images = _images(kernels[order])
    pictures = []
    for i, one in zip(order, images, strict=True):
        scaled = colored(one.unsqueeze(0))[0]
        uri = data_uri((255 * scaled).round().byte())
        marks = [
            word
            for word, bad in (
                ("dead", part.dead[i]),
                ("aliased", part.aliased[i]),
                ("truncated", part.truncated[i]),
                (part.degenerate[i], bool(part.degenerate[i])),
            )
            if bool(bad)
        ]
        twins = [b if a == i else a for a, b, _ in part.duplicates if i in (a, b)]
        if twins:
            marks.append(f"as {twins[0]}" + ("…" if len(twins) > 1 else ""))
        pictures.append((uri, f"{i}" + (f": {', '.join(marks)}" if marks else "")))
    left = len(concerned) - len(order)
    caption = "Each on a scale of its own; blue is negative, red is positive."
    if kernels.shape[1] == 3:
        caption = "Each on a scale of its own, with mid-grey for 0."
    yield Figure(
        "The filters" if found is None else "These filters",
        caption + (f" {left} more are not shown." if left else ""),
        pictures=pictures,
    )


def _images(kernels: Tensor) -> Tensor:
    """Kernels as images ``(n, 1 or 3, height, width)``: of volumes the middle, of waves a band."""
    images = kernels.detach().double().cpu().nan_to_num(0.0)
    if images.ndim == 3:
        images = images.unsqueeze(2).expand(-1, -1, max(1, images.shape[-1] // 3), -1)
    if images.ndim == 5:
        images = images[:, :, images.shape[2] // 2]
    if images.shape[1] not in (1, 3):
        strongest = images.flatten(2).square().sum(-1).argmax(1)
        images = images[torch.arange(len(images)), strongest].unsqueeze(1)
    return images


def kernels_of(diagnosis: Diagnosis, name: str) -> Tensor | None:
    """The kernels of the layer whose health it is."""
    layer_name = name.removeprefix("health").removeprefix(" of ")
    try:
        weight = diagnosis.setup.module.get_submodule(layer_name).weight
    except AttributeError:
        return None
    return weight.detach() if isinstance(weight, Tensor) and weight.ndim in (3, 4, 5) else None


def _gradients_figure(part: GradientCheck, found: Finding | None) -> Figure:
    """A row for each parameter, those that the finding is about first."""
    concerned = set(found.location) if found is not None else set()
    ordered = sorted(part.parameters, key=lambda one: one.name not in concerned)
    rows = [(False, ["parameter", "shape", "gradient", "off by", "moves", "state"])]
    rows += [(one.name in concerned, _gradient_row(one)) for one in ordered[:_MOST_ROWS]]
    left = len(part.parameters) - _MOST_ROWS
    return Figure(
        "The parameters and their gradients",
        "“Off by” is the distance of the gradient from finite differences of the loss in double "
        "precision, as a share." + (f" {left} more are not shown." if left > 0 else ""),
        rows=rows,
    )


def _gradient_row(one: ParameterCheck) -> list[str]:
    return [
        one.name,
        " × ".join(map(str, one.shape)) or "1",
        "none" if math.isnan(one.gradient_norm) else number(one.gradient_norm, 3),
        "–" if math.isnan(one.disagreement) else number(one.disagreement, 2),
        "yes" if one.moved else "no",
        one.state,
    ]


def _recover_figure(
    diagnosis: Diagnosis, part: FitResult, found: Finding | None
) -> Iterator[Figure]:
    """The values that the responses ask for, beside those of the layer."""
    layer: Any = diagnosis.setup.module
    params = getattr(layer, "params", None)
    if params is None or type(params) is not type(part.params):
        return
    present, asked = params.detach().expand().as_dict(), part.params.expand().as_dict()
    first = next((w for w in (found.location if found is not None else ()) if w.isdigit()), "0")
    index = int(first) if int(first) < len(part) else 0
    rows = [(False, [f"filter {index}", "the layer", "the responses ask for", "learns"])]
    for name, value in present.items():
        if name == "center" or value.shape != asked[name].shape:
            continue
        angle = UNITS[name] == "rad"
        unit = " px" if UNITS[name] == "px" else ""
        for channel, (have, want) in enumerate(
            zip(value[index].flatten().tolist(), asked[name][index].flatten().tolist(), strict=True)
        ):
            if channel and name not in ("phase", "amplitude"):
                continue
            one = name.replace("_", " ") + (f" [{channel}]" if channel else "")
            cells = [degrees(round(v, 4)) if angle else number(v) + unit for v in (have, want)]
            rows.append((False, [one, *cells, "yes" if name in layer.learn else "no"]))
    yield Figure(
        "What the responses ask for",
        "By recover, which needs no start.",
        rows=rows,
    )


def half_page(figure: Any) -> str:
    """A chart of half the page's width: its titles are no larger than its words."""
    for axis in (figure.layout.xaxis, figure.layout.yaxis):
        axis.title.font.size = 13
    return chart_json(figure)
