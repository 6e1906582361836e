"""Figures for papers and reports: kernels, their fits, and what experiments found.

Every function returns a matplotlib ``Figure`` that belongs to no window: save it with
``figure.savefig("kernels.pdf")``, or end a notebook cell with it. Without matplotlib it raises
``ImportError``. ``width`` is in inches: 7.2 fills both columns of a paper, 3.5 one column; narrow
figures have more rows instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium import starts
from gaborium.functions.kernels import gabor
from gaborium.functions.params import UNITS
from gaborium.support import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gaborium.conversion import Census, Conversion
    from gaborium.diagnostics import Identifiability, Landscape, StepLimit
    from gaborium.experiments import Recovery
    from gaborium.fitting import FitResult
    from gaborium.training import TrainResult


# Okabe and Ito's colours, which differ for every kind of colour vision.
INK, MUTED, SHADE, PAPER = "#222222", "#666666", "#d9d9d9", "#ffffff"
BLUE, SKY, ORANGE, VERMILION, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73"
DIVERGING, SEQUENTIAL = "RdBu_r", "viridis"

_MARKS = {  # of points: marker, face and edge
    "start": ("o", PAPER, INK),
    "best minimum": ("o", GREEN, PAPER),
    "worse minimum": ("X", VERMILION, PAPER),
}
_WIDTH = 7.2  # inches: both columns of a paper
_DASHED: dict[str, Any] = {"color": INK, "linewidth": 0.8, "linestyle": (0, (4, 3))}
STYLE = {
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.0,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelsize": 7.0,
    "ytick.color": MUTED,
    "ytick.labelsize": 7.0,
}


# -- kernels, fits, census, conversion --------------------------------------------------------


def plot_kernels(
    kernels: Tensor,
    *,
    titles: Sequence[str] = (),
    shared_scale: bool = True,
    width: float = _WIDTH,
) -> Figure:
    """Draw kernels side by side.

    Convention:
        - blue is negative, red is positive, and white is 0
        - a kernel of three channels is drawn in colour: red, green, blue, with mid-grey for 0
        - rows run downwards, as in the tensor

    Args:
        kernels: ``(height, width)``, ``(n, height, width)`` or ``(n, channels, height, width)``
            with 1 or 3 channels.
        titles: one for each kernel, or an empty list.
        shared_scale: whether equal colours mean equal values in all kernels. Otherwise the
            strongest colour is the largest value of each kernel.
        width: of the figure, inches, if there are enough kernels.

    Raises:
        ValueError: the shape is not one of those above, or titles do not match the kernels.

    Example:
        >>> from gaborium import Gabor2d, gabor
        >>> bank = Gabor2d.of(orientation=[0.0, 0.8, 1.6], wavelength=6.0, sigma=2.0)
        >>> figure = plot_kernels(gabor(bank, 15), titles=["0", "0.8", "1.6"])
        >>> [axes.get_title(loc="left") for axes in figure.axes if axes.images]
        ['0', '0.8', '1.6']
    """
    shape = tuple(kernels.shape)
    images = kernels.reshape(-1, 1, *shape[-2:]) if kernels.ndim in (2, 3) else kernels
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(
            "kernels must be (height, width), (n, height, width) or (n, channels, height, width) "
            f"with 1 or 3 channels, got shape {shape}; flatten(0, 1) draws every channel alone."
        )
    n, channels, *size = images.shape
    if titles and len(titles) != n:
        raise ValueError(f"titles must be one for each of {n} kernels, got {len(titles)}.")
    columns = max(1, min(n, int(width / 0.9)))
    cell = max(min(1.6, width / columns), 2.0 / columns)
    scales = [largest(images if shared_scale else image) for image in images]
    options = {"aspect": size[0] / size[1], "height": 0.25 * bool(titles)}
    with _panels(n, columns * cell, cell, **options) as (figure, axes):
        for place, image, scale, title in zip(
            axes, images, scales, titles or [""] * n, strict=True
        ):
            mappable = _image(place, image, scale)
            place.set_title(title)
        if shared_scale and channels == 1:
            figure.colorbar(mappable, ax=axes, shrink=0.8, aspect=25, format="{x:.2g}")
    return figure


def plot_fit(result: FitResult, kernels: Tensor, *, width: float = _WIDTH) -> Figure:
    """Draw each kernel, its fit and the residual side by side, best first.

    Convention:
        - kernel, fit and residual of a filter share one colour scale; colours as in
          ``plot_kernels``
        - with other numbers of channels than 1 or 3, only the one with the most power is drawn;
          volumes are drawn by their middle slice, 1-D kernels as strips
        - with more than 24 filters, 24 of them are drawn, evenly from the best to the worst

    Args:
        result: from ``fit``.
        kernels: as they were fitted.
        width: of the figure, inches.

    Raises:
        ValueError: ``kernels`` do not belong to ``result``.

    Example:
        >>> from gaborium import Gabor2d, fit, gabor
        >>> bank = gabor(Gabor2d.of(orientation=[0.0, 0.8], wavelength=6.0, sigma=2.0), 13)
        >>> figure = plot_fit(fit(bank), bank)
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['filter 0: 100 %', 'filter 1: 100 %']
    """
    chosen = evenly(best_first(result), 24)
    pictures = strips(result, kernels, chosen)
    aspect = max((len(picture) / picture.shape[1] for picture in pictures), default=0.1)
    with _panels(len(chosen), width, 1.75, 0.22, aspect=aspect) as (figure, axes):
        for place, number, picture in zip(axes, chosen, pictures, strict=True):
            explained = 100 * result.explained_variance[number].item()
            _picture(place, picture, f"filter {number}: {explained:.3g} %")
    return figure


def plot_parameters(result: FitResult) -> Figure:
    """Draw the wave vectors of the filters, coloured by explained variance.

    Convention:
        - the angle is the orientation of the wave and the radius its frequency; circles are
          labelled with the wavelength, and blobs are in the middle
        - a wave and its reverse are the same orientation, so each filter is drawn on both sides
        - angles grow clockwise, as they do in an image whose y runs down
        - dots are filters that converged, crosses are the others
        - in 1-D, which has no orientation, sigma is drawn against the wavelength

    Args:
        result: from ``fit``.

    Example:
        >>> from gaborium import Gabor2d, fit, gabor
        >>> bank = gabor(Gabor2d.of(orientation=[0.0, 0.8], wavelength=6.0, sigma=2.0), 13)
        >>> plot_parameters(fit(bank)).axes[0].name
        'polar'
    """
    fitted = torch.tensor(sorted(best_first(result)), dtype=torch.int64)
    explained, converged = result.explained_variance.cpu(), result.converged.cpu()
    fields = {name: value.flatten().cpu() for name, value in result.params.as_dict().items()}
    wavelength, lowest = fields["wavelength"], explained[fitted].min().item() if len(fitted) else 0
    with _figure(_WIDTH / 2 + 0.6, _WIDTH / 2) as figure:
        place: Any
        if result.params.n_dims == 1:
            place = figure.add_subplot(xscale="log", yscale="log")
            place.set(xlabel="wavelength, px", ylabel="sigma, px")
            points = [(wavelength, fields["sigma"])]
        else:
            place = figure.add_subplot(projection="polar")
            points = [(fields["orientation"] + turn, 1 / wavelength) for turn in (0.0, math.pi)]
            highest = 1.06 * max((1 / wavelength[fitted]).tolist(), default=0.0) or 0.5
            first = 2 ** math.ceil(math.log2(1 / highest))
            ticks = [ratio * first for ratio in (1, 1.5, 2, 4)]
            angles = range(0, 360, 45)
            place.set_theta_direction(-1)
            place.set_xticks([math.radians(a) for a in angles], [f"{a % 180}°" for a in angles])
            place.set_rlabel_position(-22.5)
            place.set_ylim(0, highest)
            place.set_yticks([1 / tick for tick in ticks], [f"{tick:g} px" for tick in ticks])
            place.grid(color=SHADE, linewidth=0.5)
            place.spines["polar"].set_color(SHADE)
        for marker, some in (("x", fitted[~converged[fitted]]), ("o", fitted[converged[fitted]])):
            for x, y in points:
                image = place.scatter(
                    x[some], y[some], 14, explained[some], marker=marker, cmap=SEQUENTIAL,
                    vmin=math.floor(10 * lowest) / 10, vmax=1.0, rasterized=len(result) > 500,
                )  # fmt: skip
        figure.colorbar(image, ax=place, shrink=0.6, pad=0.12, label="explained variance")
    return figure


def plot_census(result: Census, kernels: Tensor, *, width: float = _WIDTH) -> Figure:
    """Draw all filters by class, and the Gabor functions next to cells of macaque V1.

    Convention:
        - every filter has its own colour scale; colours as in ``plot_kernels``
        - within a class the filters with the highest confidence come first; with more than 384
          filters, the first of each class are drawn, in its share
        - n_x and n_y are cycles in a standard deviation of the envelope, along the wave and along
          the stripes; ``gaborium.starts`` names the publications of V1's
        - ``plot_parameters(result.fit)`` draws orientations and wavelengths

    Args:
        result: from ``census``.
        kernels: as they were fitted.
        width: of the figure, inches.

    Raises:
        ValueError: ``kernels`` do not belong to ``result``.

    Example:
        >>> from gaborium import Gabor2d, census, gabor
        >>> bank = gabor(Gabor2d.of(wavelength=[4.0, 5.0], sigma=3.0), 11)
        >>> figure = plot_census(census(bank), bank)
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['2 filters by class', 'Envelopes, in cycles']
    """
    n_dims = result.fit.params.n_dims
    images = kernel_images(_of(len(result), kernels, n_dims)[None])[0]
    tiles = torch.cat([colored(image[None]) for image in images])
    space = math.ceil(tiles.shape[1] / 4)
    blocks, middles, done = [], {}, 0.0
    for label in result.counts:
        order = sorted(result.filters(label), key=lambda i: -result.confidence[i].item())
        order = order[: math.ceil(min(1.0, 384 / len(result)) * len(order))]
        if order:
            blocks.append(F.pad(mosaic(tiles[order], int(4 * width)), (0, 0, 0, 0, 0, space)))
            middles[label] = done + (len(blocks[-1]) - space) / 2
            done += len(blocks[-1])
    picture = torch.cat(blocks)
    height = 0.8 * width * len(picture) / picture.shape[1] + 0.2
    with _figure(width, height + 3.0) as figure:
        above, below = figure.subplots(2, 1, height_ratios=[height, 3.0])
        _picture(above, picture, f"{len(result)} filters by class")
        for label, row in middles.items():
            above.text(-space, row, label, ha="right", va="center", fontsize=6.5)
        low, high, found = 0.08, 2.3, result.distribution()
        below.set(title="Envelopes, in cycles", xscale="log", yscale="log", aspect="equal")
        below.set(xlabel="n_x, along the wave", ylabel="n_y, along the stripes")
        turn = torch.linspace(0, 2 * math.pi, 181, dtype=torch.float64)
        circle = torch.stack([turn.cos(), turn.sin()])
        for share, alpha in ((0.95, 0.35), (0.5, 0.85)) if n_dims == 2 else ():
            region = starts.v1_widths(*(starts.v1_radius(share) * circle))
            label = f"{100 * share:.0f} % of V1's cells"
            below.fill(*region, color=SHADE, alpha=alpha, linewidth=0, zorder=0, label=label)
        below.plot([low, high], [low, high], color=MUTED, linewidth=0.5)
        n_x, n_y = (found[name].clamp(1.03 * low, high / 1.03) for name in ("n_x", "n_y"))
        below.scatter(n_x, n_y, 12, BLUE, alpha=0.7, linewidths=0, label="Gabor functions")
        for axis in (below.xaxis, below.yaxis):
            axis.set_ticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
            axis.set_ticks([], minor=True)
        below.set(xlim=(low, high), ylim=(low, high))
        below.legend(loc="lower right", fontsize=7)
    return figure


def plot_conversion(conversion: Conversion, kernels: Tensor, *, width: float = _WIDTH) -> Figure:
    """Draw filters above the Gabor functions that replace them, and the explained variance.

    Convention:
        - every pair has its own colour scale; colours as in ``plot_kernels``
        - the pairs are sorted by explained variance, best first; with more than 96 pairs, 96 of
          them are drawn, evenly from the best to the worst

    Args:
        conversion: from ``convert``.
        kernels: of the layer before, ``(filters, channels, *kernel_size)``.
        width: of the figure, inches.

    Raises:
        ValueError: ``kernels`` do not belong to the conversion.

    Example:
        >>> from torch import nn
        >>> from gaborium import convert
        >>> layer = nn.Conv2d(1, 2, 9)
        >>> figure = plot_conversion(convert(layer, filters=[0]), layer.weight)
        >>> figure.axes[0].get_title(loc="left")
        '1 of 2 filters above their Gabor functions'
    """
    n, weight = len(conversion.is_gabor), conversion.layer.weight
    both = torch.stack([_of(n, one, kernels.ndim - 2) for one in (kernels, weight)])
    order = [i for i in best_first(conversion.fit) if conversion.is_gabor[i]]
    pairs = [
        mosaic(colored(pair), 1)
        for pair in kernel_images(both[:, evenly(order, 96)]).transpose(0, 1)
    ]
    picture = mosaic(torch.stack(pairs), int(3.4 * width), gap=3) if pairs else torch.ones(1, 20, 4)
    height = width * len(picture) / picture.shape[1] + 0.2
    with _figure(width, height + 2.2) as figure:
        above, below = figure.subplots(2, 1, height_ratios=[height, 2.0])
        _picture(above, picture, f"{len(order)} of {n} filters above their Gabor functions")
        for result, color, label in (
            (conversion.kernels, BLUE, "kernels"),
            (conversion.responses, ORANGE, "responses"),
        ):
            if result is not None:
                explained = result.explained_variance.nan_to_num(0.0).sort(descending=True).values
                below.plot(range(1, n + 1), explained, ".-", color=color, label=label, ms=3.5)
        below.axhline(conversion.threshold or math.nan, label="threshold", **_DASHED)
        below.set(
            xlabel="filters, the best explained first", ylim=(0, 1.03), xlim=(0, n + 1),
            title="Share of the variance that a Gabor function explains",
        )  # fmt: skip
        below.xaxis.get_major_locator().set_params(integer=True)
        below.legend(loc="lower left")
    return figure


# -- learning: the experiment, diagnostics, training ------------------------------------------


def plot_recovery(recovery: Recovery, *, width: float = _WIDTH) -> Figure:
    """Draw a photograph, its responses, their residual, and the kernels.

    Convention:
        - all kernels share one colour scale, symmetric about 0, in all channels
        - the residual is the responses minus the found kernel's; below both are the ends of
          their colour scales
        - with several photographs the first is drawn, and the title gives their number

    Args:
        recovery: from ``gaborium.experiments.recover_planted``.
        width: of the figure, inches.

    Example:
        >>> from gaborium import Gabor2d
        >>> from gaborium.experiments import recover_planted
        >>> planted = Gabor2d.of(orientation=0.8, wavelength=5.0, sigma=2.0)
        >>> result = recover_planted([torch.rand(1, 40, 40)], planted, start=planted, n_steps=2)
        >>> [axes.get_title(loc="left") for axes in plot_recovery(result).axes][4:8]
        ['Planted', 'Start', 'Found', 'Trained']
    """
    (n, channels, height, breadth), size = recovery.images.shape, recovery.kernel_size
    params = (recovery.target, recovery.start, recovery.found.params, recovery.trained)
    kernels = torch.stack([gabor(one, size).reshape(channels, *size) for one in params], 1)
    image = recovery.images[0] if channels == 3 else recovery.images[0].mean(0, keepdim=True)
    found = F.conv2d(recovery.images, kernels[:, 2].unsqueeze(0).to(recovery.images))
    mean = "" if channels in (1, 3) else f", mean of {channels} channels"
    with _panels(4 + 4 * channels, width, width / 4, 0.25, aspect=1.0) as (figure, axes):
        photograph, responses, rest, blank, *places = axes
        blank.set_axis_off()
        _image(photograph, 2 * image.expand(3, -1, -1) - 1, 1.0)
        photograph.set_title("Photograph" if n == 1 else f"First of {n} photographs")
        photograph.set_xlabel(f"{height} × {breadth} px{mean}")
        named = {"Responses": recovery.responses, "Residual": recovery.responses - found}
        for place, (name, values) in zip((responses, rest), named.items(), strict=True):
            _image(place, values[0], largest(values[0]))
            place.set(title=name, xlabel=f"±{largest(values[0]):.2g}")
        for index, (place, kernel) in enumerate(zip(places, kernels.flatten(0, 1), strict=True)):
            mappable = _image(place, kernel[None], largest(kernels))
            if index < 4:
                place.set_title(("Planted", "Start", "Found", "Trained")[index])
            elif index % 4 == 0:
                place.set_ylabel(f"channel {index // 4}")
        figure.colorbar(mappable, ax=places, shrink=0.8, aspect=25, format="{x:.2g}")
    return figure


def plot_orientation(recovery: Recovery, *, width: float = _WIDTH) -> Figure:
    """Draw the orientation against the step, for every descent and for the trained layer.

    Convention:
        - an orientation has period π: the axis shows one half turn with the truth in its middle,
          and its upper and lower edge are the same orientation
        - lines are broken where the shorter way leads out by one edge and in by the other
        - shaded is the basin, as in ``plot_landscape``

    Args:
        recovery: from ``gaborium.experiments.recover_planted``.
        width: of the figure, inches.

    Returns:
        The figure: a panel for each descent, with the trained layer in all of them.

    Example:
        >>> from gaborium import Gabor2d
        >>> from gaborium.experiments import recover_planted
        >>> planted = Gabor2d.of(orientation=0.8, wavelength=5.0, sigma=2.0)
        >>> result = recover_planted([torch.rand(1, 40, 40)], planted, start=planted, n_steps=2)
        >>> [axes.get_ylabel() for axes in plot_orientation(result).axes]
        ['orientation θ', '', '', '', 'orientation θ', '', '', '']
    """
    truth = recovery.target.orientation[0, 0].item() % math.pi
    middle, basin = math.degrees(truth), math.degrees(recovery.basin)
    runs = recovery.descents or (None,)
    columns = min(len(runs), int(width / 1.75))
    panels = _panels(len(runs), width, width / columns, 1.95, sharex=True, sharey=True)
    with panels as (figure, places):
        for index, (place, run) in enumerate(zip(places, runs, strict=True)):
            place.axhspan(middle - basin, middle + basin, color=SHADE, linewidth=0, label="basin")
            place.axhline(middle, label="truth", **_DASHED)
            trained = folded(recovery.training["orientation"], truth, math.pi)
            place.plot(*trained, color=GREEN, linewidth=1.4, label="trained layer")
            if run is not None:
                steps, path = folded(run.orientation, truth, math.pi)
                place.plot(steps, path, color=VERMILION, linewidth=0.8, label="descent on θ")
                _mark(place, "start", [0], path[:1])
                setting = f"step size {run.learning_rate:g}\nmomentum {run.momentum:g}"
                place.set_title(f"{setting}\n{run.verdict}", fontsize=7, color=MUTED)
            _degree_ticks(place.yaxis, 45)
            place.set_ylim(middle - 90, middle + 90)
            place.set_xlabel("step" if index >= len(runs) - columns else "")
            place.set_ylabel("" if index % columns else "orientation θ")
        _legend(figure, places[0], width)
    return figure


def plot_landscape(landscape: Landscape | Recovery, *, width: float = _WIDTH) -> Figure:
    """Draw a loss over one or two parameters, and where descents from there end.

    Convention:
        - over one parameter: descents from the shaded part reach a best minimum; the title gives
          the half-width in which the squared error is convex, and what the closed form predicts
        - over two parameters: the first runs upwards, the second to the right; dark is a low loss,
          by its square root; descents from the hatched part reach a worse minimum
        - filled dots are the best minima, crosses the worse ones, the ring is the layer
        - orientations are in degrees
        - for a ``Recovery``, RMSE and MSE over all orientations; shaded is the basin, where the
          squared error is convex in theory: λ / (√2 π σ/γ) to each side; for an even kernel half
          a turn gives the same kernel, and is marked too

    Args:
        landscape: from ``gaborium.diagnostics.landscape``, or from
            ``gaborium.experiments.recover_planted``.
        width: of the figure, inches.

    Example:
        >>> from gaborium import Gabor2d, GaborConv2d, diagnostics
        >>> layer = GaborConv2d(1, 1, 11, start=Gabor2d.of(wavelength=5.0, sigma=2.0))
        >>> image = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
        >>> parts = layer, torch.nn.functional.mse_loss, image, layer(image).detach()
        >>> setup = diagnostics.TrainingSetup(*parts)
        >>> figure = plot_landscape(diagnostics.landscape(setup, "orientation"))
        >>> figure.axes[0].get_xlabel()
        'orientation, degrees'
    """
    found: Any = landscape
    if hasattr(found, "descents"):
        return _plot_losses(found, width)
    return (_plot_curve if len(found.fields) == 1 else _plot_surface)(found, width)


def _plot_losses(recovery: Recovery, width: float) -> Figure:
    """RMSE and MSE of the experiment over the orientation."""
    around = [math.degrees(theta) for theta in recovery.landscape["orientation"]]
    start = math.degrees(math.remainder(recovery.start.orientation[0, 0].item(), 2 * math.pi))
    nearest = min(range(len(around)), key=lambda index: abs(around[index] - start))
    basin = math.degrees(recovery.basin)
    with _panels(2, width, 3.0, 2.3) as (figure, places):
        for place, name in zip(places, ("rmse", "mse"), strict=True):
            for index, truth in enumerate(map(math.degrees, truths(recovery))):
                for turn in (-360, 0, 360):
                    ends = truth + turn - basin, truth + turn + basin
                    label = "" if index or turn else f"basin, ±{basin:.1f}°"
                    place.axvspan(*ends, color=SHADE, linewidth=0, label=label)
                label = "the same kernel" if index else "truth"
                place.axvline(truth, label=label, alpha=0.5 if index else 1.0, **_DASHED)
            losses = recovery.landscape[name]
            place.plot(around, losses, color=BLUE, linewidth=1.4)
            _mark(place, "start", [start], [losses[nearest]])
            title = f"{name.upper()}: {'a cone' if name == 'rmse' else 'a bowl'} at the minimum"
            _degree_ticks(place.xaxis, 90)
            place.set(title=title, xlabel="orientation θ", xlim=(-180, 180))
            place.set_ylim(bottom=0)
        _legend(figure, figure.axes[0], width)
    return figure


def _plot_curve(found: Landscape, width: float) -> Figure:
    """A loss over one parameter."""
    x, values = _shown(found, 0, found.grids[0].tolist()), found.values.tolist()
    with _figure(width, 2.8) as figure:
        place = figure.add_subplot(ylabel="loss")
        place.fill_between(
            x, 0, 1, where=(found.basins < found.n_best).tolist(), step="mid", color=SHADE,
            transform=place.get_xaxis_transform(), linewidth=0, alpha=0.6,
            label=f"descends to the best, {100 * found.share_to_best:.0f} %",
        )  # fmt: skip
        place.plot(x, values, color=BLUE, linewidth=1.4)
        minima = _shown(found, 0, [one.position[0] for one in found.minima])
        losses, n_best = [one.value for one in found.minima], found.n_best
        _mark(place, "best minimum", minima[:n_best], losses[:n_best])
        _mark(place, "worse minimum", minima[n_best:], losses[n_best:])
        _mark(place, "start", _shown(found, 0, found.present), [found.present_value])
        widths = {"convex": found.half_width, "predicted": found.predicted_half_width}
        place.set_title(
            ", ".join(
                f"{name} within ±{_shown(found, 0, [half])[0]:.3g}"
                for name, half in widths.items()
                if half is not None and math.isfinite(half)
            )
        )
        _field_axis(place, found, 0, "x")
        _legend(figure, place, width)
    return figure


def _plot_surface(found: Landscape, width: float) -> Figure:
    """A loss over two parameters, the second to the right."""
    colors = require("matplotlib.colors", extra="plot", purpose="Figures")
    y, x = (_shown(found, axis, found.grids[axis].tolist()) for axis in (0, 1))
    worse = (found.basins >= found.n_best).double().numpy()
    with _figure(min(width, 5.2), 0.76 * min(width, 5.2)) as figure:
        place = figure.add_subplot()
        # A square root, so that minima show next to a steep rise.
        image = place.pcolormesh(
            x, y, found.values.nan_to_num(posinf=math.nan).numpy(), cmap=SEQUENTIAL,
            shading="nearest", rasterized=True, norm=colors.PowerNorm(0.5),
        )  # fmt: skip
        if worse.any():
            place.contourf(x, y, worse, levels=[0.5, 1.5], colors="none", hatches=["////"])
            place.contour(x, y, worse, levels=[0.5], colors=PAPER, linewidths=0.6)
        up, right = (_shown(found, i, [one.position[i] for one in found.minima]) for i in (0, 1))
        _mark(place, "best minimum", right[: found.n_best], up[: found.n_best])
        _mark(place, "worse minimum", right[found.n_best :], up[found.n_best :])
        here = [_shown(found, i, found.present[i : i + 1]) for i in (1, 0)]
        _mark(place, "start", *here)
        _field_axis(place, found, 1, "x")
        _field_axis(place, found, 0, "y")
        place.set_title(f"{100 * found.share_to_best:.0f} % of starts reach the best minimum")
        figure.colorbar(image, ax=place, label="loss")
        _legend(figure, place, width)
    return figure


def plot_step_limit(found: StepLimit) -> Figure:
    """Draw the slope against the distance from the minimum: a bowl or a cone?

    Convention:
        - both axes are logarithmic; the dotted line is a slope in proportion to the distance
        - shaded is the basin, as far as it is drawn
        - with an optimiser, the vertical line is the length of one step at the last slope

    Args:
        found: from ``gaborium.diagnostics.step_limit``.

    Example:
        >>> from gaborium.diagnostics import TrainingSetup, step_limit
        >>> layer, one = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)
        >>> setup = TrainingSetup(layer, torch.nn.functional.mse_loss, one, one)
        >>> found = step_limit(setup)
        >>> plot_step_limit(found).axes[0].get_title(loc="left")
        'A bowl: steps below 1 settle'
    """
    distances, slopes = found.distances, found.slopes
    with _figure(_WIDTH / 2, 2.6) as figure:
        place = figure.add_subplot(xscale="log", yscale="log")
        farthest = max(distances[0], min(found.basin, 10.0))
        place.axvspan(distances[-1], farthest, color=SHADE, linewidth=0, alpha=0.5, label="basin")
        line = [slopes[0] * distance / distances[0] for distance in distances]
        place.plot(distances, line, ":", color=MUTED, label="a bowl")
        color = VERMILION if found.is_cone else BLUE
        place.plot(distances, slopes, ".-", color=color, linewidth=1.4, label="measured")
        if found.step_length is not None:
            place.axvline(found.step_length, label="one step", **_DASHED)
        bowl = f"A bowl: steps below {found.step_limit:.2g} settle"
        title = "A cone: no fixed step settles" if found.is_cone else bowl
        place.set(title=title, xlabel="distance from the minimum", ylabel="slope of the loss")
        _legend(figure, place, _WIDTH / 2)
    return figure


def plot_identifiability(found: Identifiability, *, filter: int = 0) -> Figure:  # noqa: A002
    """Draw how well the inputs determine each parameter of a filter.

    Convention:
        - a bar is the bound on the standard error with these inputs, as a multiple of the bound
          with white input of equal power
        - a parameter that is not identifiable has a red bar to the end

    Args:
        found: from ``gaborium.diagnostics.identifiability``.
        filter: which of its filters.

    Raises:
        ValueError: there is no such filter.

    Example:
        >>> from gaborium import GaborConv2d
        >>> from gaborium.diagnostics import identifiability
        >>> found = identifiability(GaborConv2d(1, 2, 9, seed=0), torch.randn(1, 1, 40, 40))
        >>> len(plot_identifiability(found, filter=1).axes[0].patches)
        6
    """
    if not 0 <= filter < len(found.bounds):
        raise ValueError(f"filter must be from 0 to {len(found.bounds) - 1}, got {filter}.")
    ratio = found.bounds[filter] / found.white_bounds[filter]
    end = max([2.0, *(1.15 * ratio[ratio.isfinite()]).tolist()])
    names = [name.replace("_", " ") for name in found.names]
    colors = [BLUE if known else VERMILION for known in ratio.isfinite()]
    with _figure(_WIDTH / 2, 0.25 * len(names) + 1.0) as figure:
        place = figure.add_subplot()
        place.barh(names, ratio.nan_to_num(end, end).tolist(), color=colors, height=0.6)
        place.axvline(1, **_DASHED)
        place.invert_yaxis()
        place.set(xlim=(0, end), xlabel="bound / bound with white input")
        condition, white = found.condition[filter].item(), found.white_condition[filter].item()
        place.set_title(f"Filter {filter}: condition {condition:.3g}, white input {white:.3g}")
    return figure


def plot_training(result: TrainResult, *, width: float = _WIDTH) -> Figure:
    """Draw the learning curves of every run, and how far the Gabor parameters moved.

    Convention:
        - each line is a run; equal colours are equal first layers
        - Δ is the distance from the start, a median over the filters; angles are in degrees

    Args:
        result: from ``gaborium.train``.
        width: of the figure, inches.
    """
    moving = [run for run in result.runs if any(run.displacement.values())]
    fields = list(moving[0].displacement) if moving else []
    palette = (GREEN, INK, BLUE, SKY, ORANGE, VERMILION)
    colors = dict(zip(result.variants, palette, strict=False))
    with _panels(2 + len(fields), width, 1.75, 1.8) as (figure, places):
        for place, name in zip(places, ["test_accuracy", "loss", *fields], strict=True):
            factor = 180 / math.pi if UNITS.get(name) == "rad" else 1.0
            for run in moving if name in fields else result.runs:
                points = [{**point, **point["displacement"]} for point in run.curve]
                curve = [
                    (point["epoch"], factor * point[name]) for point in points if name in point
                ]
                label = run.variant if run.seed == result.recipe.seeds[0] else ""
                place.plot(*zip(*curve, strict=True), color=colors[run.variant], label=label)
            title = f"Δ {_labelled(name)}" if name in fields else name.replace("_", " ")
            place.set(title=title, xlabel="epoch")
            place.set_ylim(bottom=0)
        _legend(figure, places[0], width)
    return figure


def plot_trained_filters(result: TrainResult, *, width: float = _WIDTH) -> Figure:
    """Draw the filters of each first layer before and after training, of the first seed.

    Args:
        result: from ``gaborium.train``.
        width: of the figure, inches.

    Returns:
        The figure; every filter has its own scale, the same before and after.
    """
    runs = [result.runs_of(variant)[0] for variant in result.variants]
    pictures = []
    for run in runs:
        pairs = kernel_images(run.kernels[[0, -1]]).transpose(0, 1)
        tiles = torch.stack([colored(pair) for pair in pairs], 1)
        pictures.append([mosaic(some, min(len(some), int(1.2 * width))) for some in tiles])
    heights = [width / 2 * len(one) / one.shape[1] + 0.3 for one, _ in pictures]
    with _figure(width, sum(heights)) as figure:
        axes = figure.subplots(len(runs), 2, squeeze=False, height_ratios=heights)
        for row, run, pair in zip(axes, runs, pictures, strict=True):
            for place, picture, when in zip(row, pair, ("start", "end"), strict=True):
                _picture(place, picture, f"{run.variant}, {when}")
    return figure


# -- shared with the report -------------------------------------------------------------------


def best_first(result: FitResult) -> list[int]:
    """The numbers of the filters by explained variance, without those that have bad input."""
    order = result.explained_variance.nan_to_num(-math.inf).sort(descending=True, stable=True)
    return [i for i in order.indices.tolist() if result.outcome[i].name != "BAD_INPUT"]


def evenly(items: Sequence[int], most: int) -> list[int]:
    """At most this many of a list, at equal distances, with the first and the last."""
    last, n = len(items) - 1, min(most, len(items))
    return [items[round(i * last / max(n - 1, 1))] for i in range(n)]


def strips(result: FitResult, kernels: Tensor, chosen: Sequence[int]) -> list[Tensor]:
    """Pictures of kernel, fit and residual of the chosen filters: ``(height, width, 4)`` each."""
    kernel = _of(len(result), kernels, result.params.n_dims)[list(chosen)]
    fitted = gabor(result[list(chosen)].params, tuple(kernel.shape[2:])).reshape(kernel.shape)
    images = kernel_images(torch.stack([kernel, fitted.to(kernel), kernel - fitted.to(kernel)]))
    return [mosaic(colored(three), 3) for three in images.transpose(0, 1)]


def kernel_images(kernels: Tensor) -> Tensor:
    """Kernels ``(times, n, channels, *size)`` as images ``(times, n, 1 or 3, height, width)``."""
    kernels = kernels.detach().cpu().double()
    if kernels.shape[2] not in (1, 3):
        strongest = kernels.flatten(3).square().sum((0, -1)).argmax(1)
        kernels = kernels[:, torch.arange(len(strongest)), strongest].unsqueeze(2)
    if kernels.ndim == 6:
        kernels = kernels[:, :, :, kernels.shape[3] // 2]
    if kernels.ndim == 4:
        kernels = kernels.unsqueeze(-2).repeat_interleave(math.ceil(kernels.shape[-1] / 3), -2)
    return kernels


def colored(images: Tensor) -> Tensor:
    """Signed images ``(n, 1 or 3, height, width)`` on one scale as colours ``(n, h, w, 3)``."""
    matplotlib = require("matplotlib", extra="plot", purpose="Figures")
    shares = 0.5 + 0.5 * (images / largest(images)).clamp(-1, 1)
    if images.shape[1] == 3:
        return shares.nan_to_num(0.5).movedim(1, -1)
    colors = matplotlib.colormaps[DIVERGING].with_extremes(bad="#888888")(shares[:, 0].numpy())
    return torch.from_numpy(colors)[..., :3]


def mosaic(tiles: Tensor, n_columns: int, *, gap: int = 1) -> Tensor:
    """Tiles ``(n, height, width, 3 or 4)`` in rows as one picture, transparent between them."""
    n_rows = math.ceil(len(tiles) / n_columns)
    tiles = F.pad(tiles, (0, 4 - tiles.shape[-1]), value=1.0)
    tiles = F.pad(tiles, (0, 0, 0, gap, 0, gap, 0, n_rows * n_columns - len(tiles)))
    rows = tiles.unflatten(0, (n_rows, n_columns)).permute(0, 2, 1, 3, 4)
    return rows.flatten(2, 3).flatten(0, 1)[:-gap, :-gap]


def largest(values: Tensor) -> float:
    """The end of a symmetric scale for ``values``: their largest magnitude, or 1 if that is 0."""
    finite = values[values.isfinite()]
    return (finite.abs().max().item() if finite.numel() else 0.0) or 1.0


def folded(
    angles: Sequence[float], middle: float, period: float
) -> tuple[list[float], list[float]]:
    """Steps, and angles in degrees within half a period of ``middle``; NaN breaks lines there."""
    turned = torch.remainder(
        torch.tensor(angles, dtype=torch.float64) - middle + period / 2, period
    )
    path = (middle - period / 2 + turned).rad2deg()
    breaks = (path.diff().abs() > math.degrees(period) / 2).nonzero().flatten().tolist()
    steps, shown = [float(step) for step in range(len(path))], path.tolist()
    for place in reversed(breaks):
        steps.insert(place + 1, math.nan)
        shown.insert(place + 1, math.nan)
    return steps, shown


def truths(recovery: Recovery) -> list[float]:
    """Orientations in [-π, π] that give the planted kernel: two if it is even, otherwise one."""
    truth = recovery.target.orientation[0, 0].item()
    turns = (0.0, math.pi) if recovery.target.phase.sin().abs().max().item() < 1e-6 else (0.0,)
    return [math.remainder(truth + turn, 2 * math.pi) for turn in turns]


# -- drawing ----------------------------------------------------------------------------------


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    """A figure with the same look whatever the user's settings are, which come back afterwards."""
    matplotlib = require("matplotlib", extra="plot", purpose="Figures")
    module = require("matplotlib.figure", extra="plot", purpose="Figures")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = module.Figure(figsize=(width, height), dpi=200, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
        yield figure


@contextmanager
def _panels(
    n: int, width: float, least: float, height: float, *, aspect: float = 0.0, **options: Any
) -> Iterator[tuple[Any, list[Any]]]:
    """A figure of ``n`` panels in rows, of a least width, and as high as ``aspect`` times it."""
    columns = max(1, int(width / least + 1e-6))
    rows = max(1, math.ceil(n / columns))
    with _figure(width, rows * (height + aspect * width / columns) + 0.1) as figure:
        places = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
        for place in places[n:]:
            place.remove()
        yield figure, places[:n]


def _of(n: int, kernels: Tensor, n_dims: int) -> Tensor:
    """Kernels as ``(n, channels, *size)`` in double precision."""
    if kernels.numel() % (n * math.prod(kernels.shape[-n_dims:])):
        raise ValueError(
            f"kernels must belong to the {n} filters of the result, got shape "
            f"{tuple(kernels.shape)}."
        )
    return kernels.detach().cpu().double().reshape(n, -1, *kernels.shape[-n_dims:])


def _image(place: Axes, image: Tensor, scale: float) -> Any:
    """Draw an image ``(1 or 3, height, width)`` on a symmetric scale, in a frame."""
    place.set(xticks=[], yticks=[])
    for spine in place.spines.values():
        spine.set(visible=True, color=SHADE, linewidth=0.5)
    image = image.detach().cpu().double()
    if len(image) == 1:
        return place.imshow(image[0].numpy(), cmap=DIVERGING, vmin=-scale, vmax=scale)
    return place.imshow((0.5 + 0.5 * image / scale).clamp(0, 1).movedim(0, -1).numpy())


def _picture(place: Axes, picture: Tensor, title: str) -> None:
    """Draw a mosaic, without a frame."""
    place.imshow(picture.numpy())
    place.set_title(title)
    place.set_axis_off()


def _labelled(name: str, unit: str | None = None) -> str:
    """A field's name with the unit in which it is drawn."""
    shown = {"rad": ", degrees", "px": ", px"}.get(UNITS[name] if unit is None else unit, "")
    return name.replace("_", " ") + shown


def _shown(found: Landscape, axis: int, values: Sequence[float]) -> list[float]:
    """Values of a field in the unit in which they are drawn."""
    return [math.degrees(value) if found.units[axis] == "rad" else value for value in values]


def _field_axis(place: Axes, found: Landscape, axis: int, letter: str) -> None:
    """Label one axis; positive fields on equal ratios, angles at round numbers of degrees."""
    grid = found.grids[axis]
    which: Any = place.xaxis if letter == "x" else place.yaxis
    ends = _shown(found, axis, [grid[0].item(), grid[-1].item()])
    label = _labelled(found.fields[axis], found.units[axis])
    if period := found.periods[axis]:
        half = _shown(found, axis, [period / 2])[0]
        ends = [-half, half]
        _degree_ticks(which, 45)
    place.set(**{f"{letter}label": label, f"{letter}lim": ends})
    if grid[0] > 0 and grid.diff()[-1] > 1.01 * grid.diff()[0]:
        place.set(**{f"{letter}scale": "log"})
        which.get_major_locator().set_params(subs=(1, 2, 3, 5))
        which.set_major_formatter("{x:g}")
        which.set_ticks([], minor=True)


def _degree_ticks(axis: Any, step: int) -> None:
    """Label an axis in degrees; its limits are set afterwards."""
    axis.set_ticks(range(-360, 361, step))
    axis.set_major_formatter("{x:g}°")


def _mark(place: Axes, label: str, x: Sequence[float], y: Sequence[float]) -> None:
    """Mark points of a kind, if there are any."""
    marker, face, edge = _MARKS[label]
    look: dict[str, Any] = {"mfc": face, "mec": edge, "mew": 0.7, "ms": 4.5, "zorder": 5}
    if x:
        place.plot(x, y, marker, label=label, clip_on=False, **look)


def _legend(figure: Any, place: Axes, width: float) -> None:
    """A legend above the panels, in rows that fit the width."""
    handles, labels = place.get_legend_handles_labels()
    columns = min(len(labels), int(width / 1.4))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)
