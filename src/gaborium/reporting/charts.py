"""The interactive charts of a report, each as JSON for plotly.js."""

from __future__ import annotations

import base64
import io
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gaborium.errors import require
from gaborium.experiments import Descent, Recovery
from gaborium.kernels import gabor
from gaborium.plots import (
    INK,
    MUTED,
    SHADE,
    TRAINED,
    basins,
    channel_names,
    folded,
    largest,
    loss_at,
    rate_colors,
    residual,
    truths,
    viewable,
    wrapped,
)
from gaborium.reporting.wording import number

GRID, PAPER = "#e4e4e4", "#ffffff"
# What the page puts in place of each colour of the charts where the reader prefers a dark page.
DARK = {INK: "#e9e7e4", MUTED: "#a5a5a5", SHADE: "#373c44", GRID: "#31353b", PAPER: "#16181c"}
_CLEAR = "rgba(0,0,0,0)"
_DASHES = ("solid", "dot", "dash", "longdash", "dashdot")
_MAX_SIDE = 240  # px; larger maps are thinned, or the page would weigh tens of megabytes
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


class Chart(NamedTuple):
    """A chart of the page.

    Args:
        name: its id in the page.
        label: what it shows, for those who cannot see it.
        json: data and layout, safe to stand inside a script element.
        ratio: width over height of a map; ``None`` for lines, which take the height they are given.
    """

    name: str
    label: str
    json: str
    ratio: float | None = None


class Map(NamedTuple):
    """A heat map with its title and the ends of its colour scale."""

    title: str
    chart: Chart
    scale: str


def plotly_script() -> str:
    """The source of plotly.js, to stand in the page."""
    offline = require("plotly.offline", extra="report", purpose="Reports")
    return offline.get_plotlyjs()


def photograph_uri(recovery: Recovery) -> str:
    """The first photograph as a ``data:`` URI of a PNG."""
    pixels = viewable(recovery.images[0])
    every = _thinning(pixels, 1000)
    return data_uri(pixels[::every, ::every], cmap="gray", vmin=0, vmax=1)


def data_uri(pixels: Tensor, **options: Any) -> str:
    """A picture as a ``data:`` URI of a PNG; the options are those of ``imsave``."""
    image = require("matplotlib.image", extra="report", purpose="Reports")
    buffer = io.BytesIO()
    image.imsave(buffer, pixels.numpy(), format="png", **options)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def signal_maps(recovery: Recovery) -> list[Map]:
    """Responses and residual to the first photograph, each on a scale of its own."""
    named = {
        "response": ("Response to the planted kernel", recovery.responses[0, 0]),
        "residual": ("Residual of the found kernel", residual(recovery)[0, 0]),
    }
    return [
        Map(title, _map(name, title, values, largest(values), middle=False), _ends(values))
        for name, (title, values) in named.items()
    ]


def kernel_maps(recovery: Recovery) -> tuple[list[tuple[str, list[Map]]], str]:
    """Rows of kernels, one for each channel, and the ends of the scale that they share."""
    kernels = {
        "planted": ("Planted", recovery.target),
        "start": ("Start", recovery.start),
        "found": ("Found by recover", recovery.found.params),
        "trained": ("Trained layer", recovery.training.params),
    }
    channels = recovery.images.shape[1]
    shape = (channels, *recovery.kernel_size)
    values = {
        name: gabor(params, recovery.kernel_size).reshape(shape)
        for name, (_, params) in kernels.items()
    }
    scale = max(largest(kernel) for kernel in values.values())
    names = channel_names(channels) if channels > 1 else [""]
    rows = []
    for channel, channel_name in enumerate(names):
        maps = []
        for name, (title, _) in kernels.items():
            label = f"{title} kernel" + (f", {channel_name}" if channel_name else "")
            kernel = values[name][channel]
            chart = _map(f"kernel-{name}-{channel}", label, kernel, scale, middle=True)
            maps.append(Map(title, chart, ""))
        rows.append((channel_name, maps))
    return rows, number(scale, 3)


def landscape_chart(recovery: Recovery) -> Chart:
    """RMSE with the path of every descent, and MSE, over the whole circle of orientation."""
    objects, subplots = plotly_parts()
    figure = subplots.make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[0.62, 0.38], vertical_spacing=0.07
    )
    around = [math.degrees(theta) for theta in recovery.landscape["orientation"]]
    rad = [f"{theta:.3f}".replace("-", "−") for theta in recovery.landscape["orientation"]]
    start = wrapped(recovery.start.orientation[0, 0].item())
    for row, loss in ((1, "rmse"), (2, "mse")):
        name = loss.upper()
        figure.add_trace(
            objects.Scatter(
                x=around, y=recovery.landscape[loss], customdata=rad, name=name, mode="lines",
                line={"color": INK, "width": 2}, showlegend=False,
                hovertemplate=f"θ = %{{x:.1f}}° (%{{customdata}} rad)<br>{name} = %{{y:.4g}}",
            ),
            row=row, col=1,
        )  # fmt: skip
    for descent, line in line_styles(recovery):
        steps, path = folded(descent.orientation, 0.0, 2 * math.pi)
        figure.add_trace(
            objects.Scatter(
                x=[math.degrees(theta) for theta in path],
                y=[None if step is None else descent.loss[step] for step in steps],
                customdata=steps, mode="lines+markers", name=run_name(descent),
                line={**line, "width": 1}, marker={"size": 5}, opacity=0.85,
                visible=_visible(descent, recovery),
                hovertemplate="step %{customdata}<br>θ = %{x:.2f}°<br>RMSE = %{y:.4g}",
            ),
            row=1, col=1,
        )  # fmt: skip
    for row, loss in ((1, "rmse"), (2, "mse")):
        figure.add_trace(
            objects.Scatter(
                x=[math.degrees(start)], y=[loss_at(recovery, start, loss)], name="start",
                mode="markers", legendgroup="start", showlegend=row == 1,
                marker={"size": 10, "color": PAPER, "line": {"color": INK, "width": 2}},
                hovertemplate=f"start<br>θ = %{{x:.1f}}°<br>{loss.upper()} = %{{y:.4g}}",
            ),
            row=row, col=1,
        )  # fmt: skip
    for left, right in basins(recovery):
        figure.add_shape(
            type="rect", x0=math.degrees(left), x1=math.degrees(right), y0=0, y1=1, yref="paper",
            fillcolor=SHADE, line_width=0, layer="below", opacity=0.7,
        )  # fmt: skip
    for truth, label in zip(truths(recovery), ("truth", "same kernel"), strict=False):
        figure.add_shape(
            type="line", x0=math.degrees(truth), x1=math.degrees(truth), y0=0, y1=1, yref="paper",
            line={"color": INK, "width": 1, "dash": "dash" if label == "truth" else "dot"},
        )  # fmt: skip
        figure.add_annotation(
            x=math.degrees(truth), y=1, yref="paper", yanchor="bottom", text=label, showarrow=False
        )
    # The circle's ends are the same orientation; −π stands there with π.
    names = {-180: "−π", -90: "−π/2", 0: "0", 90: "π/2", 180: "π"}
    figure.update_xaxes(
        range=[-180, 180], tickvals=list(names),
        ticktext=[f"{tick}°<br>{name}".replace("-", "−") for tick, name in names.items()],
    )  # fmt: skip
    figure.update_xaxes(title_text="orientation θ, degrees and rad", row=2)
    figure.update_yaxes(title_text="RMSE", rangemode="tozero", row=1)
    figure.update_yaxes(title_text="MSE", rangemode="tozero", row=2)
    return Chart(
        "landscape",
        "RMSE and MSE against the orientation, with the path of each descent on the RMSE",
        chart_json(figure),
    )


def orientation_chart(recovery: Recovery) -> Chart:
    """Orientation against step: one half turn with the truth in its middle."""
    objects, _ = plotly_parts()
    truth = recovery.target.orientation[0, 0].item() % math.pi
    middle, basin = math.degrees(truth), math.degrees(recovery.basin)
    figure = objects.Figure()
    for descent, line in line_styles(recovery):
        steps, path = folded(descent.orientation, truth, math.pi)
        figure.add_trace(
            objects.Scatter(
                x=steps, y=[math.degrees(theta) for theta in path], mode="lines+markers",
                name=run_name(descent), line={**line, "width": 1}, marker={"size": 4},
                visible=_visible(descent, recovery),
                hovertemplate="step %{x}<br>θ = %{y:.3f}°",
            )
        )  # fmt: skip
    steps, path = folded(recovery.training.orientation, truth, math.pi)
    figure.add_trace(
        objects.Scatter(
            x=steps, y=[math.degrees(theta) for theta in path], mode="lines",
            name="trained layer", line={"color": TRAINED, "width": 3},
            hovertemplate="step %{x}<br>θ = %{y:.3f}°",
        )
    )  # fmt: skip
    if recovery.training.global_steps:
        places = [
            truth + math.remainder(recovery.training.orientation[step] - truth, math.pi)
            for step in recovery.training.global_steps
        ]
        figure.add_trace(
            objects.Scatter(
                x=recovery.training.global_steps, y=[math.degrees(theta) for theta in places],
                mode="markers", name="its global steps",
                marker={"symbol": "diamond", "size": 10, "color": TRAINED},
                hovertemplate="global step %{x}<br>θ = %{y:.3f}°",
            )
        )  # fmt: skip
    figure.add_hrect(
        y0=middle - basin, y1=middle + basin,
        fillcolor=SHADE, line_width=0, layer="below", opacity=0.7,
    )  # fmt: skip
    figure.add_hline(y=middle, line={"color": INK, "width": 1, "dash": "dash"})
    figure.add_annotation(
        x=1, xref="paper", y=middle, text="truth", xanchor="left", showarrow=False
    )
    ticks = [tick for tick in range(-90, 271, 45) if abs(tick - middle) <= 90]
    figure.update_yaxes(
        title_text="orientation θ", range=[middle - 91, middle + 91], tickvals=ticks,
        ticktext=[f"{tick}°".replace("-", "−") for tick in ticks],
    )  # fmt: skip
    figure.update_xaxes(title_text="step", rangemode="tozero")
    return Chart(
        "orientation",
        "Orientation against the step, for each descent and for the trained layer",
        chart_json(figure),
    )


def plotly_parts() -> tuple[Any, Any]:
    """Plotly's graph objects and its subplots."""
    return (
        require("plotly.graph_objects", extra="report", purpose="Reports"),
        require("plotly.subplots", extra="report", purpose="Reports"),
    )


def run_name(descent: Descent) -> str:
    """What a descent is called in legends and in sentences."""
    momentum = f", momentum {descent.momentum:g}" if descent.momentum else ""
    return f"step size {descent.learning_rate:g}{momentum}"


def _visible(descent: Descent, recovery: Recovery) -> bool | str:
    """At first the runs of the smallest momentum: all at once would hide one another."""
    least = min(other.momentum for other in recovery.descents)
    return True if descent.momentum == least else "legendonly"


def line_styles(recovery: Recovery) -> list[tuple[Descent, dict[str, Any]]]:
    """Every descent with its line: coloured by step size, dashed by momentum."""
    colors = rate_colors([descent.learning_rate for descent in recovery.descents])
    momenta = sorted({descent.momentum for descent in recovery.descents})
    return [
        (
            descent,
            {
                "color": colors[descent.learning_rate],
                "dash": _DASHES[momenta.index(descent.momentum) % len(_DASHES)],
            },
        )
        for descent in recovery.descents
    ]


def _map(name: str, label: str, values: Tensor, scale: float, *, middle: bool) -> Chart:
    """A heat map with rows downwards and square pixels; ``middle`` counts px from its middle."""
    objects, _ = plotly_parts()
    every = _thinning(values, _MAX_SIDE)
    height, width = values.shape
    x0, y0 = ((1 - width) / 2, (1 - height) / 2) if middle else (0, 0)
    figure = objects.Figure(
        objects.Heatmap(
            z=values[::every, ::every].detach().to("cpu", torch.float32).numpy(),
            x0=x0, dx=every, y0=y0, dy=every, zmin=-scale, zmax=scale,
            colorscale="RdBu_r", showscale=False,
            hovertemplate="x %{x}, y %{y} px<br>%{z:.4g}<extra></extra>",
        )
    )  # fmt: skip
    _style(figure)
    plain = {"visible": False, "fixedrange": True, "constrain": "domain"}
    figure.update_xaxes(**plain)
    figure.update_yaxes(**plain, autorange="reversed", scaleanchor="x")
    figure.update_layout(margin={"l": 1, "r": 1, "t": 1, "b": 1}, dragmode=False)
    return Chart(name, label, _text(figure), ratio=width / height)


def _thinning(values: Tensor, most: int) -> int:
    return math.ceil(max(values.shape[:2]) / most)


def _ends(values: Tensor) -> str:
    return number(largest(values), 3)


def _style(figure: Any) -> None:
    axis = {
        "gridcolor": GRID, "linecolor": MUTED, "tickcolor": MUTED, "zeroline": False,
        "showline": True, "ticks": "outside", "ticklen": 4, "automargin": True,
    }  # fmt: skip
    figure.update_layout(
        template={"layout": {"xaxis": axis, "yaxis": axis}},
        font={"family": _FONT, "size": 13, "color": INK},
        paper_bgcolor=_CLEAR, plot_bgcolor=_CLEAR, autosize=True, hovermode="closest",
        # Kept through a redraw: what the reader has switched off stays off.
        uirevision="kept",
    )  # fmt: skip


def chart_json(figure: Any) -> str:
    """A chart of lines: style, legend below, room for what stands around."""
    _style(figure)
    figure.update_layout(
        margin={"l": 10, "r": 40, "t": 48, "b": 10},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        modebar={"bgcolor": _CLEAR, "color": MUTED, "activecolor": INK},
    )
    return _text(figure)


def _text(figure: Any) -> str:
    """JSON in which no ``<`` stands, so that nothing in it can end a script element."""
    io_module = require("plotly.io", extra="report", purpose="Reports")
    text: str = io_module.to_json(figure, validate=True, engine="json")
    return text.replace("<", "\\u003c").replace(">", "\\u003e")
