"""Figures for papers: kernels, their fits, and what an experiment with a planted kernel found.

Every function returns a matplotlib ``Figure`` that belongs to no window: save it with
``figure.savefig("kernels.pdf")``, or end a notebook cell with it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium import starts
from gaborium.conversion import CLASSES, Census, Conversion
from gaborium.diagnostics import Identifiability, Landscape, StepLimit
from gaborium.errors import require
from gaborium.experiments import Descent, Recovery
from gaborium.fitting import FitResult, Outcome
from gaborium.kernels import gabor, sigma_from_bandwidth
from gaborium.params import UNITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gaborium.training import TrainResult

__all__ = [
    "plot_census",
    "plot_conversion",
    "plot_fit",
    "plot_identifiability",
    "plot_kernels",
    "plot_landscape",
    "plot_orientation",
    "plot_parameters",
    "plot_recovery",
    "plot_step_limit",
    "plot_trained_filters",
    "plot_training",
]

# Okabe and Ito's colours, which differ for every kind of colour vision. Step sizes run from blue
# (small) to vermilion (large); green is the layer that arrives.
INK, MUTED, SHADE = "#222222", "#666666", "#d9d9d9"
TRAINED = "#009E73"
_RATES = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00")
DIVERGING = "RdBu_r"
# Of the classes of a census.
CLASS_COLORS = {
    "gabor": "#0072B2",
    "edge": "#56B4E9",
    "blob": "#E69F00",
    "centre-surround": "#F0E442",
    "colour-contrast": "#CC79A7",
    "other": "#009E73",
    "noise": "#999999",
}
SEQUENTIAL = "viridis"

_WIDTH = 7.2  # inches: both columns of a paper
_STYLE = {
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.0,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.0,
}


def plot_kernels(
    kernels: Tensor,
    *,
    titles: Sequence[str] = (),
    n_columns: int | None = None,
    shared_scale: bool = True,
) -> Figure:
    """Draw kernels side by side.

    Convention:
        - blue is negative, red is positive, and white is 0
        - a kernel of three channels is drawn in colour: red, green, blue, with mid-grey for 0
        - rows run downwards, as in the tensor

    Args:
        kernels: ``(height, width)``, ``(n, height, width)`` or ``(n, channels, height, width)``
            with 1 or 3 channels.
        titles: one for each kernel, or none at all.
        n_columns: kernels in a row; by default at most eight.
        shared_scale: whether equal colours mean equal values in all kernels, and not only
            equal shares of each kernel's largest value.

    Returns:
        The figure.

    Raises:
        ValueError: the shape is not one of those above, or titles do not match the kernels.
        ImportError: matplotlib is not installed.

    Example:
        >>> from gaborium import Gabor2d, gabor
        >>> bank = Gabor2d.of(orientation=[0.0, 0.8, 1.6], wavelength=6.0, sigma=2.0)
        >>> figure = plot_kernels(gabor(bank, 15), titles=["0", "0.8", "1.6"])
        >>> [axes.get_title(loc="left") for axes in figure.axes if axes.images]
        ['0', '0.8', '1.6']
    """
    shape = tuple(kernels.shape)
    kernels = kernels.detach().double().cpu()
    if kernels.ndim in (2, 3):
        kernels = kernels.reshape(-1, 1, *shape[-2:])
    if kernels.ndim != 4 or kernels.shape[1] not in (1, 3) or not kernels.numel():
        raise ValueError(
            "kernels must be (height, width), (n, height, width) or (n, channels, height, width) "
            f"with 1 or 3 channels, got shape {shape}; flatten(0, 1) draws every channel alone."
        )
    n, channels, height, width = kernels.shape
    if titles and len(titles) != n:
        raise ValueError(f"titles must be one for each of {n} kernels, got {len(titles)}.")
    columns = min(n, n_columns or 8)
    rows = math.ceil(n / columns)
    scales = [largest(kernel) for kernel in kernels]
    if shared_scale:
        scales = [max(scales)] * n
    bar = shared_scale and channels == 1
    with _style():
        cell = min(1.6, _WIDTH / columns)
        title_height = 0.22 if titles else 0.0
        figure = _figure(
            max(columns * cell + (0.6 if bar else 0.0), 2.0),
            max(rows * (cell * height / width + title_height), 1.0) + 0.1,
        )
        axes = figure.subplots(rows, columns, squeeze=False)
        for index, place in enumerate(axes.flat):
            _frame(place, visible=index < n)
            if index >= n:
                continue
            if channels == 1:
                image = _signed(place, kernels[index, 0], scales[index])
            else:
                grey = (0.5 + 0.5 * kernels[index] / scales[index]).clamp(0, 1)
                place.imshow(grey.permute(1, 2, 0).numpy(), interpolation="nearest")
            if titles:
                place.set_title(titles[index])
        if bar:
            _color_bar(figure, image, list(axes.flat), scales[0], orientation="vertical")
    return figure


def plot_fit(result: FitResult, kernels: Tensor, *, limit: int = 24) -> Figure:
    """Draw kernels beside their fits and what these leave, best first.

    Convention:
        - kernel, fit and residual of a filter share one colour scale, symmetric about 0
        - channels as in ``plot_kernels``; of other numbers than 1 or 3 only that of most power is
          drawn; volumes are drawn by their middle slice, 1-D kernels as strips
        - more filters than ``limit`` are drawn by their best, middle and worst thirds of it

    Args:
        result: from ``fit``.
        kernels: what it was given.
        limit: filters to draw at most, at least 3.

    Returns:
        The figure.

    Raises:
        ValueError: ``kernels`` are not those of ``result``, or ``limit`` is below 3.
        ImportError: matplotlib is not installed.

    Example:
        >>> from gaborium import Gabor2d, fit, gabor
        >>> bank = gabor(Gabor2d.of(orientation=[0.0, 0.8], wavelength=6.0, sigma=2.0), 13)
        >>> figure = plot_fit(fit(bank), bank)
        >>> [axes.get_title(loc="left") for axes in figure.axes if axes.images][:3]
        ['0: 100 %', 'fit', 'residual']
    """
    groups = gallery(best_first(result), limit)
    chosen = [number for _, numbers in groups for number in numbers]
    images = panels(result, kernels, chosen)
    height, width = images.shape[-2:]
    in_row = min(3, max(1, len(chosen) // 2))
    rows = max(1, math.ceil(len(chosen) / in_row))
    flat = max(height / width, 0.15)
    with _style():
        cell = _WIDTH / 3 / 3.2
        figure = _figure(_WIDTH / 3 * in_row, rows * (cell * flat + 0.2) + 0.1)
        for column, part in enumerate(figure.subfigures(1, in_row, squeeze=False).flat):
            for row, places in enumerate(part.subplots(rows, 3, squeeze=False)):
                index = column * rows + row
                for place in places:
                    _frame(place, visible=index < len(chosen))
                if index >= len(chosen):
                    continue
                explained = result.explained_variance[chosen[index]].item()
                titles = (
                    f"{chosen[index]}: {100 * explained:.3g} %",
                    *(("fit", "residual") if row == 0 else ("", "")),
                )
                colors = colored(images[index])
                for place, image, title in zip(places, colors, titles, strict=True):
                    place.imshow(image.numpy(), interpolation="nearest", aspect="auto")
                    place.set_box_aspect(flat)
                    place.set_title(title, fontsize=6.5)
    return figure


def plot_parameters(result: FitResult) -> Figure:
    """Draw where the filters lie: their wave vectors, coloured by explained variance.

    Convention:
        - a filter stands at the orientation of its wave, at a distance of its frequency from the
          middle; circles are labelled with the wavelength, and blobs lie in the middle
        - a wave and its reverse are the same orientation: a filter stands on both sides
        - angles grow clockwise, as they do in an image whose y runs down
        - dots are filters that converged, rings are the others
        - in 1-D, which has no orientation, sigma is drawn against the wavelength

    Args:
        result: from ``fit``.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> from gaborium import Gabor2d, fit, gabor
        >>> bank = gabor(Gabor2d.of(orientation=[0.0, 0.8], wavelength=6.0, sigma=2.0), 13)
        >>> plot_parameters(fit(bank)).axes[0].name
        'polar'
    """
    params = result.params
    explained = result.explained_variance.cpu()
    found = torch.tensor([outcome is not Outcome.BAD_INPUT for outcome in result.outcome])
    wavelength, sigma = params.wavelength.flatten().cpu(), params.sigma.flatten().cpu()
    look: dict[str, Any] = {
        "cmap": SEQUENTIAL, "vmin": lowest_explained(explained), "vmax": 1.0, "s": 14,
        "linewidths": 0.7,
    }  # fmt: skip
    with _style():
        figure = _figure(_WIDTH / 2 + 0.6, _WIDTH / 2)
        place: Any
        image: Any = None
        if params.n_dims == 1:
            place = figure.add_subplot()
            place.set(xscale="log", yscale="log", xlabel="wavelength, px", ylabel="sigma, px")
            drawn = [(wavelength, sigma)]
        else:
            place = figure.add_subplot(projection="polar")
            place.set_theta_direction(-1)
            frequency = params.frequency.flatten().cpu()
            orientation = params.as_dict()["orientation"].flatten().cpu()
            drawn = [(orientation + turn, frequency) for turn in (0.0, math.pi)]
            highest = highest_frequency(frequency)
            ticks = wavelength_ticks(highest)
            place.set_ylim(0, highest)
            place.set_yticks([1 / tick for tick in ticks], [f"{tick:g} px" for tick in ticks])
            place.set_rlabel_position(-22.5)
            place.set_xticks(
                [math.radians(angle) for angle in range(0, 360, 45)],
                [f"{angle % 180}°" for angle in range(0, 360, 45)],
            )
            place.tick_params(axis="y", labelsize=6.5)
            place.grid(color=SHADE, linewidth=0.5)
            place.spines["polar"].set_color(SHADE)
        for converged in (False, True):
            shown = found & (result.converged == converged)
            for x, y in drawn if shown.any() else []:
                image = place.scatter(x[shown], y[shown], c=explained[shown], **look)
                if not converged:
                    # Rings keep the colour in their edge.
                    image.set(edgecolors=image.cmap(image.norm(explained[shown])), facecolor="none")
        if image is not None:
            bar = figure.colorbar(image, ax=place, shrink=0.6, pad=0.12, label="explained variance")
            bar.outline.set_visible(False)
    return figure


def plot_census(result: Census, kernels: Tensor, *, limit: int = 384) -> Figure:
    """Draw all filters by class, the share of each class, and what the Gabor functions are like.

    Convention:
        - every filter has its own colour scale, symmetric about 0; three channels are drawn as
          red, green and blue, one from blue through white to red
        - within a class the surest stand first
        - of more filters than ``limit`` the surest of each class are drawn, in its share
        - n_x and n_y are cycles in a standard deviation of the envelope, along the wave and along
          the stripes; larger dots are surer, and the grey regions hold 50 and 95 % of the cells of
          macaque V1
        - the fan shows how many Gabor functions have an orientation of the wave; angles grow
          clockwise, as they do in an image whose y runs down
        - grey lines are as many cells of V1 as there are Gabor functions; its wavelengths are in
          degrees, and lie about the layer's mean. ``gaborium.starts`` names the publications

    Args:
        result: from ``census``.
        kernels: what it was given.
        limit: filters to draw at most.

    Returns:
        The figure, as wide as both columns of a paper.

    Raises:
        ValueError: ``kernels`` are not those of ``result``.
        ImportError: matplotlib is not installed.

    Example:
        >>> from gaborium import Gabor2d, census, gabor
        >>> bank = gabor(Gabor2d.of(wavelength=[4.0, 5.0], sigma=3.0), 11)
        >>> figure = plot_census(census(bank), bank)
        >>> figure.axes[0].get_title(loc="left")
        '2 filters by class'
    """
    if len(kernels) != len(result):
        raise ValueError(
            f"kernels must be those of the {len(result)} filters of the result, got shape "
            f"{tuple(kernels.shape)}."
        )
    counts = {label: n for label, n in result.counts.items() if n}
    mosaic, rows = _mosaic(result, kernels, limit)
    height = min(_WIDTH * 0.8 * mosaic.shape[0] / mosaic.shape[1], 5.5)
    with _style():
        figure = _figure(_WIDTH, height + 4.4)
        parts: Any = figure.subfigures(2, 1, height_ratios=[height + 0.2, 4.2])
        above, below = parts
        place = above.subplots()
        place.imshow(mosaic.numpy(), interpolation="nearest")
        place.set_title(f"{len(result)} filters by class")
        _frame(place, visible=False)
        for label, row in rows.items():
            shown = "noise or dead" if label == "noise" else label
            place.annotate(
                shown, (0, row), (-6, 0), textcoords="offset points", ha="right", va="center",
                fontsize=7.5, annotation_clip=False,
            )  # fmt: skip
        found = result.distribution()
        is_flat = result.fit.params.n_dims == 2  # as the retina is
        _class_bars(below.add_subplot(2, 3, 1), counts, len(result))
        _envelopes(below.add_subplot(2, 3, 2), found, result.confidence, is_flat)
        if "orientation" in found:
            _orientations(below.add_subplot(2, 3, 3, projection="polar"), found, is_flat)
        _wavelengths(below.add_subplot(2, 3, 4), found, is_flat)
        _bandwidths(below.add_subplot(2, 3, 5), found, is_flat)
        if is_flat:
            _census_key(below.add_subplot(2, 3, 6))
    return figure


def _mosaic(result: Census, kernels: Tensor, limit: int) -> tuple[Tensor, dict[str, float]]:
    """All filters as one picture, a block of rows for each class, and the middle of each block."""
    n_dims = result.fit.params.n_dims
    images = kernel_images(kernels.reshape(1, len(result), -1, *kernels.shape[-n_dims:]))[0]
    scale = images.abs().flatten(1).amax(1).clamp_min(1e-300)
    tiles = colored(images / scale[:, None, None, None])
    tiles = F.pad(_enlarged(tiles), (0, 0, 2, 2, 2, 2), value=1.0)
    share = min(1.0, limit / len(result))
    most = max(result.counts.values())
    n_columns = min(max(most, 16), 28) if most <= 28 else 28
    confidence = result.confidence.tolist()
    blocks, rows, done = [], {}, 0
    for label in CLASSES:
        chosen = sorted(result.filters(label), key=lambda i: -confidence[i])
        chosen = chosen[: math.ceil(share * len(chosen))]
        if not chosen:
            continue
        n_rows = math.ceil(len(chosen) / n_columns)
        block = torch.ones(n_rows * n_columns, *tiles.shape[1:], dtype=tiles.dtype)
        block[: len(chosen)] = tiles[chosen]
        block = block.unflatten(0, (n_rows, n_columns)).permute(0, 2, 1, 3, 4).flatten(2, 3)
        blocks.append(F.pad(block.flatten(0, 1), (0, 0, 0, 0, 0, 6), value=1.0))
        rows[label] = done + blocks[-1].shape[0] / 2 - 3
        done += blocks[-1].shape[0]
    return torch.cat(blocks), rows


def _enlarged(pictures: Tensor) -> Tensor:
    """Pictures ``(n, height, width, 3)`` with pixels, and lines, that are large enough to see."""
    up = max(1, math.ceil(24 / max(pictures.shape[1:3])))
    tall = max(up, math.ceil(8 / pictures.shape[1]))
    return pictures.repeat_interleave(tall, 1).repeat_interleave(up, 2)


def _class_bars(place: Axes, counts: dict[str, int], n: int) -> None:
    labels = list(counts)
    shares = [100 * counts[label] / n for label in labels]
    place.barh(
        range(len(labels)), shares, color=[CLASS_COLORS[label] for label in labels], height=0.7
    )
    for index, share in enumerate(shares):
        place.text(share + 1.5, index, f"{share:.0f} %", va="center", fontsize=7)
    place.set_yticks(range(len(labels)), labels)
    place.tick_params(axis="y", size=0)
    place.invert_yaxis()
    place.set(xlabel="share of the filters, %", title="Classes", xlim=(0, 1.25 * max(shares)))


def _envelopes(place: Axes, found: dict[str, Tensor], confidence: Tensor, beside_v1: bool) -> None:
    low, high = 0.08, 2.3
    ticks = (0.1, 0.2, 0.5, 1, 2)
    place.set(
        xlabel="n_x, along the wave", ylabel="n_y, along the stripes", xscale="log", yscale="log",
        xlim=(low, high), ylim=(low, high), aspect="equal", title="Envelopes, in cycles",
    )  # fmt: skip
    for axis in (place.xaxis, place.yaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)
    if beside_v1:
        turn = torch.linspace(0, 2 * math.pi, 181, dtype=torch.float64)
        for share, shade in ((0.95, 0.35), (0.5, 0.85)):
            r = starts.v1_radius(share)
            place.fill(
                *starts.v1_widths(r * turn.cos(), r * turn.sin()), color=SHADE, alpha=shade,
                linewidth=0, zorder=0,
            )  # fmt: skip
    place.plot([low, high], [low, high], color=MUTED, linewidth=0.5, zorder=1)
    place.scatter(
        found["n_x"].clamp(1.03 * low, high / 1.03), found["n_y"].clamp(1.03 * low, high / 1.03),
        s=4 + 14 * confidence[found["filter"]], color=CLASS_COLORS["gabor"], alpha=0.7,
        linewidths=0,
    )  # fmt: skip


def _orientations(place: Any, found: dict[str, Tensor], beside_v1: bool) -> None:
    """Counts of orientations on a half circle, drawn twice."""
    n_bins = 12
    # Half a bin off, so that 0 and 90 degrees lie in the middle of theirs.
    bins = (found["orientation"] * n_bins / math.pi).round().long() % n_bins
    counts = torch.bincount(bins, minlength=n_bins)
    angles = [math.pi * i / n_bins for i in range(2 * n_bins)]
    color = CLASS_COLORS["gabor"]
    place.bar(angles, counts.repeat(2).tolist(), width=0.9 * math.pi / n_bins, color=color)
    if beside_v1 and len(bins):
        # Per bin; the eight sectors of 45 degrees are cardinal and oblique in turn.
        around = [math.pi / 8 * (i // 2 * 2 + (1 if i % 2 else -1)) for i in range(17)]
        shares = (starts.V1_CARDINAL, 1 - starts.V1_CARDINAL)
        radius = [len(bins) * 2 / n_bins * shares[i // 2 % 2] for i in range(17)]
        place.plot(around, radius, color=INK, linewidth=0.9)
    place.set_theta_direction(-1)
    place.set_xticks(
        [math.radians(angle) for angle in range(0, 360, 45)],
        [f"{angle % 180}°" for angle in range(0, 360, 45)],
    )
    top = max(1, int(counts.max()))
    place.set_ylim(0, top)
    place.set_yticks([top], [str(top)])
    place.set_rlabel_position(-22.5)
    place.tick_params(labelsize=6.5)
    place.grid(color=SHADE, linewidth=0.5)
    place.spines["polar"].set_color(SHADE)
    place.set_title("Orientations")


def _wavelengths(place: Axes, found: dict[str, Tensor], beside_v1: bool) -> None:
    octaves = found["wavelength"].double().log2()
    low = math.floor(octaves.min().item()) if len(octaves) else 1
    high = max(low + 2, math.ceil(octaves.max().item()) if len(octaves) else 1)
    edges = torch.arange(3 * low, 3 * high + 1) / 3
    below = 0.5 + 0.5 * torch.erf(
        (edges - octaves.mean()) / (math.sqrt(2) * starts.V1_FREQUENCY_STD)
    )
    _histogram(place, octaves, edges, below if beside_v1 else None)
    ticks = range(low, high + 1)
    place.set_xticks(ticks, [f"{2.0**tick:g}" for tick in ticks])
    place.set(xlabel="wavelength, px", ylabel="Gabor functions", title="Wavelengths")


def _bandwidths(place: Axes, found: dict[str, Tensor], beside_v1: bool) -> None:
    highest = 4.0
    edges = torch.arange(0.0, highest + 0.1, 0.5, dtype=torch.float64)
    # Narrower bands are those of wider envelopes.
    n_x = sigma_from_bandwidth(edges[1:-1], torch.ones(len(edges) - 2, dtype=torch.float64))
    z = (n_x.log10() - starts.V1_WIDTH_MEAN[0]) / starts.V1_WIDTH_STD[0]
    below = F.pad(0.5 - 0.5 * torch.erf(z / math.sqrt(2)), (1, 0))
    below = F.pad(below, (0, 1), value=1.0)  # the last bin holds all that is wider
    values = found["bandwidth"].double().clamp_max(highest - 0.01)
    _histogram(place, values, edges, below if beside_v1 else None)
    place.set_xticks([0, 1, 2, 3, highest - 0.25], ["0", "1", "2", "3", f"> {highest - 0.5:g}"])
    place.set(xlabel="bandwidth, octaves", ylabel="Gabor functions", title="Bandwidths")


def _histogram(place: Axes, values: Tensor, edges: Tensor, below: Tensor | None) -> None:
    """Counts of values, and as a line what a population would have with these shares below."""
    counts = torch.histogram(values, edges.double()).hist
    place.bar(
        edges[:-1].tolist(), counts.tolist(), width=(0.92 * edges.diff()).tolist(), align="edge",
        color=CLASS_COLORS["gabor"],
    )  # fmt: skip
    if below is not None and len(values):
        place.stairs(len(values) * below.diff(), edges, color=INK, linewidth=0.9, baseline=None)
    place.set_xlim(edges[0].item(), edges[-1].item())
    place.set_ylim(0, max(1.0, place.get_ylim()[1]))
    place.locator_params(axis="y", integer=True, nbins=4)


def _census_key(place: Axes) -> None:
    place.set_axis_off()
    color = CLASS_COLORS["gabor"]
    dot = place.scatter([], [], s=16, color=color, alpha=0.7, linewidths=0)
    line = place.plot([], [], color=INK, linewidth=0.9)
    half, most = (place.fill([], [], color=SHADE, alpha=a, linewidth=0) for a in (0.85, 0.35))
    place.legend(
        [dot, *line, *half, *most],
        ["a Gabor function of this layer", "macaque V1, as many cells", "half of V1's cells",
         "95 % of V1's cells"],
        loc="center left",
    )  # fmt: skip


def plot_conversion(conversion: Conversion, kernels: Tensor, *, limit: int = 96) -> Figure:
    """Draw filters above the Gabor functions that replace them, and what these explain.

    Convention:
        - every pair has its own colour scale, symmetric about 0; three channels are drawn as
          red, green and blue, one from blue through white to red
        - the pairs stand by what is explained, the best first; of more than ``limit`` the best,
          those in the middle and the worst are drawn

    Args:
        conversion: from ``convert``.
        kernels: of the layer before, ``(filters, channels, *kernel_size)``.
        limit: pairs to draw at most.

    Returns:
        The figure, as wide as both columns of a paper.

    Raises:
        ValueError: ``kernels`` are not those of the conversion.
        ImportError: matplotlib is not installed.

    Example:
        >>> from torch import nn
        >>> from gaborium import Gabor2d, convert
        >>> layer = nn.Conv2d(1, 2, 9)
        >>> planted = Gabor2d.of(wavelength=4.0, sigma=1.6)
        >>> with torch.no_grad():
        ...     layer.weight[0, 0] = gabor(planted, 9)
        >>> figure = plot_conversion(convert(layer), layer.weight)
        >>> figure.axes[0].get_title(loc="left")
        '1 of 2 filters (above) and its Gabor function (below)'
    """
    after = conversion.layer.weight
    if not isinstance(after, Tensor) or kernels.shape != after.shape:
        raise ValueError(
            f"kernels must be those of the {len(conversion.is_gabor)} filters before, got shape "
            f"{tuple(kernels.shape)}."
        )
    chosen = conversion.is_gabor.tolist()
    order = [i for i in best_first(conversion.fit) if chosen[i]]
    shown = [i for _, part in gallery(order, limit) for i in part]
    n = len(chosen)
    with _style():
        mosaic = _pairs_mosaic(torch.stack([kernels.cpu(), after.cpu()]), shown) if shown else None
        height = 0.3 if mosaic is None else _WIDTH * mosaic.shape[0] / mosaic.shape[1]
        figure = _figure(_WIDTH, min(height, 8.0) + 2.3)
        above, below = figure.subplots(2, 1, height_ratios=[min(height, 8.0), 2.0])
        if mosaic is not None:
            above.imshow(mosaic.numpy(), interpolation="nearest")
        _frame(above, visible=False)
        whose = "its Gabor function" if len(order) == 1 else "their Gabor functions"
        above.set_title(f"{len(order)} of {n} filters (above) and {whose} (below)")
        for result, color, label in (
            (conversion.kernels, CLASS_COLORS["gabor"], "kernels"),
            (conversion.responses, CLASS_COLORS["blob"], "responses"),
        ):
            if result is not None:
                explained = result.explained_variance.nan_to_num(0.0).sort(descending=True).values
                below.plot(range(1, n + 1), explained, ".-", color=color, label=label, ms=3.5)
        if conversion.threshold:
            below.axhline(conversion.threshold, color=MUTED, linewidth=0.7, linestyle="--")
        below.set(
            xlabel="filters, the best explained first", ylim=(0, 1.03), xlim=(0, n + 1),
            title="Explained by a Gabor function, share of the variance",
        )  # fmt: skip
        below.xaxis.get_major_locator().set_params(integer=True)
        if conversion.responses is not None:
            below.legend(loc="lower left", ncols=2)
    return figure


def _pairs_mosaic(kernels: Tensor, chosen: Sequence[int]) -> Tensor:
    """Some filters before and after, ``(2, n, channels, *size)``, as one picture of pairs."""
    images = kernel_images(kernels[:, list(chosen)])
    scale = images.abs().flatten(2).amax((0, 2)).clamp_min(1e-300)
    images = images / scale[:, None, None, None]
    tiles = F.pad(_enlarged(colored(images.flatten(0, 1))), (0, 0, 2, 2, 1, 1), value=1.0)
    tiles = tiles.unflatten(0, images.shape[:2])
    pairs = F.pad(torch.cat([tiles[0], tiles[1]], 1), (0, 0, 0, 0, 0, 10), value=1.0)
    n_columns = min(max(len(pairs), 12), 24)
    n_rows = math.ceil(len(pairs) / n_columns)
    whole = torch.ones(n_rows * n_columns, *pairs.shape[1:], dtype=pairs.dtype)
    whole[: len(pairs)] = pairs
    grid = whole.unflatten(0, (n_rows, n_columns)).permute(0, 2, 1, 3, 4)
    return grid.flatten(2, 3).flatten(0, 1)


def plot_recovery(recovery: Recovery) -> Figure:
    """Draw a photograph, its responses, what the found kernel leaves of them, and the kernels.

    Convention:
        - all kernels share one colour scale, symmetric about 0; so do all their channels
        - the residual is the responses less the found kernel's, on a scale of its own
        - of several photographs the first is drawn, and the title says how many there were

    Args:
        recovery: from ``gaborium.experiments.recover_planted``.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from gaborium import Gabor2d
        >>> from gaborium.experiments import recover_planted
        >>> image = torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(0))
        >>> planted = Gabor2d.of(orientation=0.8, wavelength=5.0, sigma=2.0)
        >>> result = recover_planted(
        ...     [image], planted, start=planted, n_steps=2, learning_rates=[0.1]
        ... )
        >>> plot_recovery(result).axes[0].get_title(loc="left")
        'Photograph, 40 × 40 px'
    """
    images, responses = recovery.images, recovery.responses
    kernels = {
        "Planted": gabor(recovery.target, recovery.kernel_size),
        "Start": gabor(recovery.start, recovery.kernel_size),
        "Found by recover": gabor(recovery.found.params, recovery.kernel_size),
        "Trained layer": gabor(recovery.training.params, recovery.kernel_size),
    }
    channels = images.shape[1]
    rest = residual(recovery)[0, 0]
    height, width = recovery.kernel_size
    photograph_height = _WIDTH / 3 * images.shape[2] / images.shape[3] + 0.55
    cell = 1.45
    with _style():
        kernels_height = channels * cell * height / width + 0.75
        figure = _figure(_WIDTH, photograph_height + kernels_height)
        top, bottom = figure.subfigures(
            2, 1, height_ratios=[photograph_height, kernels_height], squeeze=False
        ).flat
        for place, (title, values) in zip(
            top.subplots(1, 3),
            {
                _photograph_title(images): None,
                "Response to the planted kernel": responses[0, 0],
                "Residual of the found kernel": rest,
            }.items(),
            strict=True,
        ):
            _frame(place)
            place.set_title(title)
            if values is None:
                image = place.imshow(
                    viewable(images[0]).numpy(), cmap="gray", interpolation="nearest"
                )
                _hide_color_bar(_color_bar(top, image, place, 1.0))
            else:
                scale = largest(values)
                image = _signed(place, values, scale)
                _color_bar(top, image, place, scale)
        grid = bottom.subplots(channels, len(kernels), squeeze=False)
        scale = max(largest(kernel) for kernel in kernels.values())
        names = channel_names(channels)
        for column, (title, kernel) in enumerate(kernels.items()):
            grid[0, column].set_title(title)
            for channel in range(channels):
                place = grid[channel, column]
                _frame(place)
                image = _signed(place, kernel.reshape(channels, height, width)[channel], scale)
                if column == 0 and channels > 1:
                    place.set_ylabel(names[channel], color=MUTED)
        _color_bar(bottom, image, list(grid.flat), scale, orientation="vertical")
    return figure


def plot_landscape(landscape: Landscape | Recovery) -> Figure:
    """Draw a loss over one or two parameters, and where starts roll down to.

    Convention:
        - of one parameter: shaded is where starts roll down to a best minimum; a bar shows the
          width in which the squared error is convex, and a thin one above it what the closed form
          predicts
        - of two parameters: the first runs upwards, the second to the right; dark is a low loss,
          by its square root, and hatched is what rolls down to a worse minimum
        - filled dots are the best minima, crosses the worse ones, the ring is where the layer is
        - orientations are in degrees

    Of a ``Recovery`` both losses are drawn over all orientations, and each descent's path on the
    one it followed. There

        - the axis is the whole circle of the orientation in degrees, with the rad value below
        - shaded is the basin: where the squared error is convex in theory, λ / (√2 π σ/γ) to each
          side; for an even kernel half a turn gives the same kernel, and is marked too
        - a path's points are steps; lines join them except where they would cross the axis' ends

    Args:
        landscape: from ``gaborium.diagnostics.landscape``, or from
            ``gaborium.experiments.recover_planted``.

    Returns:
        The figure; of a recovery RMSE, MSE, and a panel for each descent.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> from gaborium import Gabor2d, GaborConv2d, diagnostics
        >>> layer = GaborConv2d(1, 1, 11, start=Gabor2d.of(wavelength=5.0, sigma=2.0))
        >>> image = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
        >>> loss = diagnostics.OutputLoss(image, layer(image).detach())
        >>> figure = plot_landscape(diagnostics.landscape(loss, layer, "orientation"))
        >>> figure.axes[0].get_xlabel()
        'orientation, degrees'
    """
    if isinstance(landscape, Recovery):
        return _plot_descents(landscape)
    with _style():
        if len(landscape.fields) == 1:
            return _plot_curve(landscape)
        return _plot_surface(landscape)


def plot_step_limit(found: StepLimit) -> Figure:
    """Draw the slope against the distance from the minimum: does it vanish, or is it a cone?

    Convention:
        - both axes are logarithmic; the dotted lines are a slope that vanishes in proportion to
          the distance, and one that stays
        - shaded is the basin, as far as it is drawn
        - with an optimiser's step, the vertical line is how far one step goes at the last slope

    Args:
        found: from ``gaborium.diagnostics.step_limit``.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> from gaborium.diagnostics import step_limit
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> found = step_limit(lambda one: one.weight.square().sum(), layer)
        >>> plot_step_limit(found).axes[0].get_title(loc="left")
        'A bowl: steps below 1 settle'
    """
    distances, slopes = found.distances, found.slopes
    with _style():
        figure = _figure(_WIDTH / 2, 2.6)
        place = figure.add_subplot()
        place.set(xscale="log", yscale="log", xlabel="distance from the minimum", ylabel="slope")
        farthest = max(distances[0], min(found.basin, 10.0))
        place.axvspan(distances[-1], farthest, color=SHADE, linewidth=0, alpha=0.5, label="basin")
        far = slopes[0]
        for power, label in ((1, "vanishes"), (0, "stays")):
            line = [far * (r / distances[0]) ** power for r in distances]
            place.plot(distances, line, ":", color=MUTED, linewidth=0.8)
            place.annotate(
                label, (distances[-3], line[-3]), (8, -3), textcoords="offset points",
                color=MUTED, fontsize=7, va="top",
            )  # fmt: skip
        color = _RATES[-1] if found.is_cone else _RATES[0]
        place.plot(distances, slopes, ".-", color=color, linewidth=1.4, label="measured")
        if found.learning_rate is not None:
            step = found.learning_rate * (1.0 if found.adaptive else slopes[-1])
            place.axvline(step, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label="one step")
        place.set_title(
            "A cone: no fixed step settles"
            if found.is_cone
            else f"A bowl: steps below {_short(found.step_limit)} settle",
            fontweight="bold",
        )
        _legend(figure, place, "outside lower center")
    return figure


def plot_identifiability(found: Identifiability, *, filter: int = 0) -> Figure:  # noqa: A002
    """Draw how well each parameter of a filter is known, and which errors go together.

    Convention:
        - left: the bound on these inputs as a multiple of that on white input of the same power;
          a parameter that is not identifiable has a hatched bar to the end
        - right: correlation of the estimates, blue negative and red positive; nothing where there
          is no estimate

    Args:
        found: from ``gaborium.diagnostics.identifiability``.
        filter: which of its filters.

    Returns:
        The figure.

    Raises:
        ValueError: there is no such filter.
        ImportError: matplotlib is not installed.

    Example:
        >>> from gaborium import GaborConv2d
        >>> from gaborium.diagnostics import identifiability
        >>> found = identifiability(GaborConv2d(1, 2, 9, seed=0), torch.randn(1, 1, 40, 40))
        >>> len(plot_identifiability(found, filter=1).axes[0].patches)
        6
    """
    if not 0 <= filter < len(found.bounds):
        raise ValueError(f"filter must be from 0 to {len(found.bounds) - 1}, got {filter}.")
    names = [name.replace("_", " ") for name in found.names]
    ratio = found.bounds[filter] / found.white_bounds[filter]
    known = found.bounds[filter].isfinite() & ratio.isfinite()
    end = max([2.0, *(1.15 * ratio[known]).tolist()])
    n = len(names)
    with _style():
        height = max(1.5, 0.22 * n) + 0.9
        figure = _figure(_WIDTH, height)
        left, right = figure.subplots(1, 2, width_ratios=[1.2, 1.0])
        lengths = torch.where(known, ratio, end).tolist()
        bars = left.barh(range(n), lengths, color=_RATES[0], height=0.6)
        for bar, is_known in zip(bars, known.tolist(), strict=True):
            if not is_known:
                bar.set(facecolor="white", edgecolor=_RATES[-1], hatch="////", linewidth=0.5)
        left.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        left.set_yticks(range(n), names)
        left.invert_yaxis()
        left.set(xlim=(0, end), xlabel="bound, as a multiple of that on white input")
        conditions = (found.condition[filter].item(), found.white_condition[filter].item())
        told, white = (
            "infinite" if math.isinf(c) else f"{c:.3g}" if c < 1e3 else f"{c:,.0f}"
            for c in conditions
        )
        left.set_title(f"Filter {filter}: condition {told}, on white input {white}")
        table = found.correlation[filter].clone()
        image = right.imshow(
            table.nan_to_num(math.nan, math.nan, math.nan).numpy(),
            cmap=DIVERGING, vmin=-1, vmax=1, interpolation="nearest",
        )  # fmt: skip
        right.set_xticks(range(n), names, rotation=45, ha="right", rotation_mode="anchor")
        right.set_yticks(range(n), names)
        right.tick_params(length=0)
        right.set_title("Correlation of the errors")
        bar = figure.colorbar(image, ax=right, shrink=0.8, ticks=[-1, 0, 1])
        bar.ax.set_yticklabels(["−1", "0", "1"])
        bar.outline.set_visible(False)
    return figure


def _plot_curve(found: Landscape) -> Figure:
    """A loss over one parameter."""
    x, label = _told_axis(found, 0)
    values = found.values.tolist()
    best = found.minima[: found.n_best]
    figure = _figure(_WIDTH, 2.8)
    place = figure.add_subplot()
    inside = (found.basins < found.n_best).tolist()
    place.fill_between(
        x, 0, 1, where=inside, transform=place.get_xaxis_transform(), color=SHADE, linewidth=0,
        alpha=0.6, step="mid", label=f"rolls down to the best, {100 * found.share_to_best:.0f} %",
    )  # fmt: skip
    place.plot(x, values, color=INK, linewidth=1.2)
    _mark_minima(place, [(_told(found, 0, one.position[0]), one.value) for one in found.minima],
                 found.n_best)  # fmt: skip
    _mark_start(place, _told(found, 0, found.present[0]), found.present_value)
    low, high = min(values), max(values)
    room = (high - low) or 1.0
    for index, (width, color, words) in enumerate(
        ((found.half_width, _RATES[0], "convex"),
         (found.predicted_half_width, _RATES[2], "predicted"))
    ):  # fmt: skip
        if width is None or not math.isfinite(width):
            continue
        half = math.degrees(width) if found.units[0] == "rad" else width
        for number, one in enumerate(best):
            middle = _told(found, 0, one.position[0])
            height = low - (0.07 + 0.05 * index) * room
            name = f"{words}, ±{half:.3g}{'°' if found.units[0] == 'rad' else ''}"
            place.plot(
                [max(middle - half, min(x)), min(middle + half, max(x))], [height, height],
                color=color, linewidth=2.5 - index, solid_capstyle="butt",
                label=None if number else name,
            )  # fmt: skip
    place.set_ylim(low - 0.17 * room, high + 0.06 * room)
    place.set_ylabel("loss")
    _value_axis(place, found, 0, label)
    _legend(figure, place, "outside upper center", 3)
    return figure


def _plot_surface(found: Landscape) -> Figure:
    """A loss over two parameters, the second to the right."""
    (y, y_label), (x, x_label) = _told_axis(found, 0), _told_axis(found, 1)
    figure = _figure(_WIDTH * 0.72, _WIDTH * 0.55)
    place = figure.add_subplot()
    values = found.values.nan_to_num(posinf=math.nan).numpy()
    colors = require("matplotlib.colors", extra="plot", purpose="Figures")
    # A square root, so that hollows show beside a steep rise.
    image = place.pcolormesh(
        x, y, values, cmap=SEQUENTIAL, shading="nearest", rasterized=True,
        norm=colors.PowerNorm(0.5),
    )  # fmt: skip
    worse = (found.basins >= found.n_best).double().numpy()
    if worse.any():
        matplotlib = require("matplotlib", extra="plot", purpose="Figures")
        with matplotlib.rc_context({"hatch.linewidth": 0.4, "hatch.color": "white"}):
            place.contourf(x, y, worse, levels=[0.5, 1.5], colors="none", hatches=["////"])
            place.contour(x, y, worse, levels=[0.5], colors="white", linewidths=0.6)
    _mark_minima(
        place,
        [(_told(found, 1, one.position[1]), _told(found, 0, one.position[0]))
         for one in found.minima],
        found.n_best,
    )  # fmt: skip
    _mark_start(place, _told(found, 1, found.present[1]), _told(found, 0, found.present[0]))
    _value_axis(place, found, 1, x_label)
    _value_axis(place, found, 0, y_label, vertical=True)
    place.set_title(
        f"{100 * found.share_to_best:.0f} % of starts roll down to the best minimum",
        fontweight="bold",
    )
    bar = figure.colorbar(image, ax=place, label="loss")
    bar.outline.set_visible(False)
    _legend(figure, place, "outside lower center")
    return figure


def _told(found: Landscape, axis: int, value: float) -> float:
    return math.degrees(value) if found.units[axis] == "rad" else value


def _told_axis(found: Landscape, axis: int) -> tuple[list[float], str]:
    """The grid as it is drawn, and the axis' label with the unit."""
    grid = [_told(found, axis, value) for value in found.grids[axis].tolist()]
    unit = {"rad": ", degrees", "px": ", px"}.get(found.units[axis], "")
    return grid, found.fields[axis].replace("_", " ") + unit


def _value_axis(
    place: Axes, found: Landscape, axis: int, label: str, *, vertical: bool = False
) -> None:
    """Label one axis; positive fields on equal ratios, angles at round numbers of degrees."""
    grid = found.grids[axis]
    ends = (_told(found, axis, grid[0].item()), _told(found, axis, grid[-1].item()))
    which = place.yaxis if vertical else place.xaxis
    (place.set_ylabel if vertical else place.set_xlabel)(label)
    steps = grid.diff()
    if grid[0] > 0 and steps[-1] > 1.01 * steps[0]:
        (place.set_yscale if vertical else place.set_xscale)("log")
        ticks = [m * 10.0**e for e in range(-3, 5) for m in (1, 2, 3, 5)]
        ticks = [tick for tick in ticks if ends[0] <= tick <= ends[1]]
        which.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        which.set_minor_locator(require("matplotlib.ticker", extra="plot", purpose="Figures")
                                .NullLocator())  # fmt: skip
    elif found.periodic[axis]:
        which.set_ticks(range(-180, 181, 45), labels=[_degrees(t) for t in range(-180, 181, 45)])
        ends = (-180.0, 180.0)
    (place.set_ylim if vertical else place.set_xlim)(*ends)


def _mark_minima(place: Axes, points: list[tuple[float, float]], n_best: int) -> None:
    for some, marker, color, label in (
        (points[:n_best], "o", TRAINED, "best minimum"),
        (points[n_best:], "X", _RATES[-1], "worse minimum"),
    ):
        if some:
            xs, ys = zip(*some, strict=True)
            place.plot(
                xs, ys, marker, color=color, markersize=4.5, markeredgewidth=0.5,
                markeredgecolor="white", label=label, zorder=5, linestyle="none", clip_on=False,
            )  # fmt: skip


def _plot_descents(recovery: Recovery) -> Figure:
    """Both losses of an experiment over all orientations, and the descents on the root."""
    around = [math.degrees(theta) for theta in recovery.landscape["orientation"]]
    rates, momenta = _settings(recovery.descents)
    rows, columns = len(momenta), max(len(rates), 1)
    width = max(_WIDTH, 1.7 * columns)
    with _style():
        figure = _figure(width, 2.5 + 1.55 * rows)
        top, *rest = figure.subfigures(
            1 + bool(rows), 1, height_ratios=[2.5, 1.55 * rows][: 1 + bool(rows)], squeeze=False
        ).flat
        losses = {
            "rmse": "Root of the mean squared error",
            "mse": "Mean squared error",
        }
        for place, (name, title) in zip(top.subplots(1, 2), losses.items(), strict=True):
            _mark_truths(place, recovery)
            place.plot(around, recovery.landscape[name], color=INK, linewidth=1.2)
            start = wrapped(recovery.start.orientation[0, 0].item())
            _mark_start(place, math.degrees(start), loss_at(recovery, start, name))
            place.set_title(title, fontweight="bold")
            place.set_ylabel(name.upper())
            place.set_ylim(bottom=0)
            _circle_axis(place, wide=True)
        _legend(top, place, "outside upper center")
        if rest:
            grid = rest[0].subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
            for row, column, place, descent in _panels(recovery, grid, rates, momenta):
                _mark_truths(place, recovery)
                place.plot(around, recovery.landscape["rmse"], color="#aaaaaa", linewidth=0.8)
                steps, path = folded(descent.orientation, 0.0, 2 * math.pi)
                place.plot(
                    [math.degrees(theta) for theta in path],
                    [math.nan if step is None else descent.loss[step] for step in steps],
                    ".-", color=rate_colors(rates)[descent.learning_rate],
                    linewidth=0.5, markersize=2.5, alpha=0.8, zorder=3,
                )  # fmt: skip
                _mark_start(place, math.degrees(path[0]), descent.loss[0])
                place.set_ylim(bottom=0)
                _circle_axis(place, wide=False, label=row == rows - 1)
                if column == 0:
                    place.set_ylabel(f"momentum {descent.momentum:g}\nRMSE")
    return figure


def plot_orientation(recovery: Recovery) -> Figure:
    r"""Draw the orientation against the step, for every descent and for the trained layer.

    Convention:
        - an orientation has period π: the axis shows one half turn with the truth in its middle,
          and its upper and lower edge are the same orientation
        - lines are broken where the shorter way leads out by one edge and in by the other
        - shaded is the basin, as in ``plot_landscape``

    Args:
        recovery: from ``gaborium.experiments.recover_planted``.

    Returns:
        The figure: a panel for each descent, with the trained layer in all of them.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from gaborium import Gabor2d
        >>> from gaborium.experiments import recover_planted
        >>> image = torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(0))
        >>> planted = Gabor2d.of(orientation=0.8, wavelength=5.0, sigma=2.0)
        >>> result = recover_planted(
        ...     [image], planted, start=planted, n_steps=2, learning_rates=[0.1], momenta=[0.9]
        ... )
        >>> [axes.get_ylabel() for axes in plot_orientation(result).axes]
        ['momentum 0.9\norientation θ']
    """
    rates, momenta = _settings(recovery.descents)
    rows, columns = max(len(momenta), 1), max(len(rates), 1)
    truth = recovery.target.orientation[0, 0].item() % math.pi
    middle, basin = math.degrees(truth), math.degrees(recovery.basin)
    trained_steps, trained = folded(recovery.training.orientation, truth, math.pi)
    with _style():
        figure = _figure(max(_WIDTH, 1.7 * columns), 0.75 + 1.6 * rows)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        panels = list(_panels(recovery, grid, rates, momenta))
        for place in grid.flat:
            place.axhspan(middle - basin, middle + basin, color=SHADE, linewidth=0, label="basin")
            place.axhline(middle, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label="truth")
            place.plot(
                [math.nan if step is None else step for step in trained_steps],
                [math.degrees(theta) for theta in trained],
                color=TRAINED, linewidth=1.4, label="trained layer",
            )  # fmt: skip
            place.set_ylim(middle - 90, middle + 90)
            ticks = [tick for tick in range(-90, 271, 45) if abs(tick - middle) <= 90]
            place.set_yticks(ticks, [_degrees(tick) for tick in ticks])
        for row, column, place, descent in panels:
            steps, path = folded(descent.orientation, truth, math.pi)
            place.plot(
                [math.nan if step is None else step for step in steps],
                [math.degrees(theta) for theta in path],
                ".-", color=rate_colors(rates)[descent.learning_rate],
                linewidth=0.6, markersize=1.6, label="descent on θ",
            )  # fmt: skip
            _mark_start(place, 0, math.degrees(path[0]))
            if column == 0:
                place.set_ylabel(f"momentum {descent.momentum:g}\norientation θ")
            if row == rows - 1:
                place.set_xlabel("step")
        if not panels:
            grid[0, 0].set(xlabel="step", ylabel="orientation θ")
        _legend(figure, grid[0, 0], "outside upper center")
    return figure


def plot_training(result: TrainResult) -> Figure:
    """Draw the learning curves of every run, and how far the Gabor parameters went.

    Args:
        result: from ``gaborium.train``.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    moving = [run for run in result.runs if any(run.displacement.values())]
    fields = list(moving[0].displacement) if moving else []
    colors = dict(zip(result.variants, (TRAINED, INK, *_RATES), strict=False))
    with _style():
        rows = 1 + math.ceil(len(fields) / 3)
        figure = _figure(_WIDTH, 2.2 * rows)
        grid = figure.add_gridspec(rows, 6)
        for name, columns, title in (
            ("test_accuracy", slice(0, 3), "Accuracy on the test images"),
            ("loss", slice(3, 6), "Loss on the training images"),
        ):
            place = figure.add_subplot(grid[0, columns])
            for run in result.runs:
                points = [(p["epoch"], p[name]) for p in run.curve if name in p]
                label = run.variant if run.seed == result.recipe.seeds[0] else None
                if points:
                    place.plot(*zip(*points, strict=True), color=colors[run.variant], label=label)
            place.set(title=title, xlabel="epoch")
            if name == "test_accuracy":
                place.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
                place.legend()
        for index, name in enumerate(fields):
            column = 2 * (index % 3)
            place = figure.add_subplot(grid[1 + index // 3, column : column + 2])
            unit = UNITS[name]
            turn = 180 / math.pi if unit == "rad" else 1.0
            for run in moving:
                values = [turn * point["displacement"][name] for point in run.curve]
                place.plot([p["epoch"] for p in run.curve], values, color=colors[run.variant])
            shown = {"rad": ", degrees", "px": ", px"}.get(unit, "")
            place.set(title=f"Moved: {name.replace('_', ' ')}{shown}", xlabel="epoch")
            place.set_ylim(bottom=0)
    return figure


def plot_trained_filters(result: TrainResult) -> Figure:
    """Draw the filters of each first layer before and after training, of the first seed.

    Args:
        result: from ``gaborium.train``.

    Returns:
        The figure; every filter has its own scale, the same before and after.

    Raises:
        ImportError: matplotlib is not installed.
    """
    runs = [result.runs_of(variant)[0] for variant in result.variants]
    pairs = [kernel_images(run.kernels[[0, -1]]) for run in runs]
    n = max(pair.shape[1] for pair in pairs)
    columns = min(n, 8)
    rows = math.ceil(n / columns)
    with _style():
        height = _WIDTH / (2 * columns) * rows * pairs[0].shape[-2] / pairs[0].shape[-1]
        figure = _figure(_WIDTH, len(runs) * (max(height, 0.3) + 0.35))
        parts = figure.subfigures(len(runs), 2, squeeze=False)
        for line, run, pair in zip(parts, runs, pairs, strict=True):
            for part, images, when in zip(line, pair, ("start", "end"), strict=True):
                part.suptitle(
                    f"{run.variant}, seed {run.seed}: {when}", fontsize=8, x=0.02, ha="left"
                )
                axes = part.subplots(rows, columns, squeeze=False)
                for index, place in enumerate(axes.flat):
                    _frame(place, visible=index < len(images))
                    if index >= len(images):
                        continue
                    scale = largest(pair[:, index])
                    if images.shape[1] == 1:
                        _signed(place, images[index, 0], scale)
                    else:
                        grey = (0.5 + 0.5 * images[index] / scale).clamp(0, 1)
                        place.imshow(grey.permute(1, 2, 0).numpy(), interpolation="nearest")
    return figure


# -- what the figures and the report share ----------------------------------------------------


def best_first(result: FitResult) -> list[int]:
    """The numbers of the filters by explained variance, less those with nothing to fit."""
    order = result.explained_variance.nan_to_num(-math.inf).sort(descending=True, stable=True)
    return [
        number
        for number in order.indices.tolist()
        if result.outcome[number] is not Outcome.BAD_INPUT
    ]


def gallery(order: list[int], limit: int) -> list[tuple[str, list[int]]]:
    """All of a list under no name or, of more than ``limit``, the best, middle and worst of it.

    Example:
        >>> gallery([5, 4, 3], 3), gallery([5, 4, 3, 2, 1, 0], 3)
        ([('', [5, 4, 3])], [('best', [5]), ('middle', [3]), ('worst', [0])])
    """
    if limit < 3:
        raise ValueError(f"limit must be at least 3: a best, a middle and a worst; got {limit}.")
    if len(order) <= limit:
        return [("", order)]
    third = limit // 3
    first = (len(order) - third) // 2
    return [
        ("best", order[:third]),
        ("middle", order[first : first + third]),
        ("worst", order[-third:]),
    ]


def panels(result: FitResult, kernels: Tensor, chosen: Sequence[int]) -> Tensor:
    """Kernel, fit and residual of the chosen filters as images ``(n, 3, 1 or 3, height, width)``.

    Of other numbers of channels than 1 or 3 the one of most power, of volumes the middle slice.
    """
    n_dims = result.params.n_dims
    size = tuple(kernels.shape[-n_dims:])
    whole = kernels.detach().cpu()
    if whole.numel() != result.params.phase.numel() * math.prod(size):
        raise ValueError(
            f"kernels must be those of the {len(result)} filters of the result, got shape "
            f"{tuple(kernels.shape)}."
        )
    kernel = whole.reshape(len(result), -1, *size)[list(chosen)].double()
    found = gabor(result[chosen].params, size).reshape(kernel.shape).cpu()
    three = torch.stack([kernel, found, kernel - found], 1)
    if kernel.shape[1] not in (1, 3):
        strongest = kernel.flatten(2).square().sum(-1).argmax(1)
        three = three[torch.arange(len(three)), :, strongest].unsqueeze(2)
    if n_dims == 3:
        three = three[..., size[0] // 2, :, :]
    return three.unsqueeze(-2) if n_dims == 1 else three


def kernel_images(kernels: Tensor) -> Tensor:
    """Kernels at some times as images: ``(times, n, 1 or 3, height, width)``.

    Of other numbers of channels than 1 or 3 the one of most power, of volumes the middle slice.

    Args:
        kernels: ``(times, n, channels, *size)``.
    """
    kernels = kernels.detach().cpu().double()
    if kernels.shape[2] not in (1, 3):
        strongest = kernels.flatten(3).square().sum((0, -1)).argmax(1)
        kernels = kernels[:, torch.arange(len(strongest)), strongest].unsqueeze(2)
    if kernels.ndim == 6:
        kernels = kernels[:, :, :, kernels.shape[3] // 2]
    return kernels.unsqueeze(-2) if kernels.ndim == 4 else kernels


def colored(images: Tensor) -> Tensor:
    """Signed images ``(n, 1 or 3, height, width)`` on one scale as colours ``(n, h, w, 3)``.

    A single channel runs from blue through white to red; three are red, green and blue with
    mid-grey for 0. What is not a number is grey.
    """
    matplotlib = require("matplotlib", extra="plot", purpose="Figures")
    shares = 0.5 + 0.5 * (images / largest(images)).clamp(-1, 1)
    if images.shape[1] == 3:
        return shares.nan_to_num(0.5).movedim(1, -1)
    colors = matplotlib.colormaps[DIVERGING].with_extremes(bad="#888888")(shares[:, 0].numpy())
    return torch.from_numpy(colors)[..., :3]


def lowest_explained(explained: Tensor) -> float:
    """The lower end of a colour scale for explained variances whose upper end is 1."""
    finite = explained[explained.isfinite()]
    return max(0.0, math.floor(10 * min(finite.tolist(), default=0.0) - 1e-9) / 10)


def highest_frequency(frequency: Tensor) -> float:
    """The rim of a polar plot, cycles/px."""
    finite = frequency[frequency.isfinite()]
    return 1.06 * max(finite.tolist(), default=0.0) or 0.5


def wavelength_ticks(highest: float) -> list[float]:
    """Wavelengths to write at circles of radius 1/wavelength, not too near to one another.

    Example:
        >>> wavelength_ticks(0.53)
        [2.0, 3.0, 4.0, 6.0, 12.0]
    """
    steps = [m * 2.0**e for e in range(1, 12) for m in (1, 1.5)]
    ticks: list[float] = []
    last, apart = 2 * highest, 0.14 * highest
    for tick in steps:
        if apart <= 1 / tick <= min(highest, last - apart):
            ticks.append(tick)
            last = 1 / tick
    return ticks


def residual(recovery: Recovery) -> Tensor:
    """The responses less those of the kernel that ``recover`` found, in the responses' shape."""
    kernel = gabor(recovery.found.params, recovery.kernel_size).to(recovery.images)
    return recovery.responses - F.conv2d(recovery.images, kernel.reshape(1, -1, *kernel.shape[-2:]))


def viewable(image: Tensor) -> Tensor:
    """An image ``(channels, height, width)`` as one can look at it, values in [0, 1].

    Three channels become ``(height, width, 3)``. Otherwise the mean over the channels, from its
    smallest to its largest value, becomes ``(height, width)``.
    """
    image = image.detach().double().cpu()
    if image.shape[0] == 3:
        return image.permute(1, 2, 0).clamp(0, 1)
    grey = image.mean(0)
    return (grey - grey.min()) / (grey.max() - grey.min()).clamp_min(1e-300)


def largest(values: Tensor) -> float:
    """The end of a symmetric scale for ``values``: their largest magnitude, or 1 if that is 0."""
    finite = values[values.isfinite()]
    return (finite.abs().max().item() if finite.numel() else 0.0) or 1.0


def channel_names(n_channels: int) -> list[str]:
    """What the channels of an image are called."""
    if n_channels == 3:
        return ["red", "green", "blue"]
    return [f"channel {index}" for index in range(n_channels)]


def wrapped(angle: float) -> float:
    """The angle in [-π, π] that is the same on the circle."""
    return math.remainder(angle, 2 * math.pi)


def folded(
    angles: Sequence[float], middle: float, period: float
) -> tuple[list[int | None], list[float]]:
    """Bring a path of angles within half a period of ``middle``, broken where it goes around.

    Returns:
        The steps and the angles. Where the shorter way to the next angle leads out by one end and
        in by the other there is an entry more, of step ``None`` and angle NaN, at which a line is
        to break.

    Example:
        >>> folded([0.4, 0.6, 0.4], 0.0, 1.0)
        ([0, None, 1, None, 2], [0.4, nan, -0.4, nan, 0.4])
    """
    steps: list[int | None] = []
    path: list[float] = []
    for step, angle in enumerate(angles):
        here = math.nan
        if math.isfinite(angle):
            here = middle + math.remainder(angle - middle, period)
        if step and abs(here - path[-1]) > period / 2:
            steps.append(None)
            path.append(math.nan)
        steps.append(step)
        path.append(here)
    return steps, path


def loss_at(recovery: Recovery, orientation: float, loss: str) -> float:
    """The landscape's value at an orientation in [-π, π], between its points by interpolation."""
    values = recovery.landscape[loss]
    place = (orientation + math.pi) / (2 * math.pi) * (len(values) - 1)
    left = min(int(place), len(values) - 2)
    return values[left] + (place - left) * (values[left + 1] - values[left])


def truths(recovery: Recovery) -> list[float]:
    """Orientations in [-π, π] that give the planted kernel: two if it is even, otherwise one."""
    truth = wrapped(recovery.target.orientation[0, 0].item())
    even = recovery.target.phase.sin().abs().max().item() < 1e-6
    return [truth, wrapped(truth + math.pi)] if even else [truth]


def basins(recovery: Recovery) -> list[tuple[float, float]]:
    """The basins of ``truths`` as intervals in [-π, π]; one across the end is two intervals."""
    half = recovery.basin
    turns = (-2 * math.pi, 0.0, 2 * math.pi)
    ends = [
        (max(truth + turn - half, -math.pi), min(truth + turn + half, math.pi))
        for truth in truths(recovery)
        for turn in turns
    ]
    return [(left, right) for left, right in ends if left < right]


def rate_colors(rates: Sequence[float]) -> dict[float, str]:
    """A colour for each step size, from blue for the smallest to vermilion for the largest.

    Example:
        >>> rate_colors([0.1, 0.01])
        {0.01: '#0072B2', 0.1: '#D55E00'}
    """
    ordered = sorted(set(rates))
    anchors = [[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in _RATES]
    colors = {}
    for index, rate in enumerate(ordered):
        place = index / max(len(ordered) - 1, 1) * (len(anchors) - 1)
        left = min(int(place), len(anchors) - 2)
        mixed = [
            round(a + (place - left) * (b - a))
            for a, b in zip(anchors[left], anchors[left + 1], strict=True)
        ]
        colors[rate] = "#" + "".join(f"{part:02X}" for part in mixed)
    return colors


# -- drawing ----------------------------------------------------------------------------------


@contextmanager
def _style() -> Iterator[None]:
    """The same look whatever the user's own settings are, which come back afterwards."""
    matplotlib = require("matplotlib", extra="plot", purpose="Figures")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _figure(width: float, height: float) -> Figure:
    module = require("matplotlib.figure", extra="plot", purpose="Figures")
    figure = module.Figure(figsize=(width, height), dpi=200, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    return figure


def _frame(place: Axes, *, visible: bool = True) -> None:
    """An axis for an image: a thin frame and no ticks."""
    place.set(xticks=[], yticks=[])
    for spine in place.spines.values():
        spine.set(visible=visible, color="#bbbbbb", linewidth=0.5)
    if not visible:
        place.set_axis_off()


def _signed(place: Axes, values: Tensor, scale: float) -> Any:
    return place.imshow(
        values.detach().cpu().numpy(),
        cmap=DIVERGING, vmin=-scale, vmax=scale, interpolation="nearest",
    )  # fmt: skip


def _color_bar(
    figure: Any, image: Any, places: Any, scale: float, orientation: str = "horizontal"
) -> Any:
    flat = orientation == "horizontal"
    bar = figure.colorbar(
        image, ax=places, orientation=orientation, shrink=0.7 if flat else 0.8,
        aspect=25, pad=0.02, ticks=[-scale, 0, scale],
    )  # fmt: skip
    bar.ax.set(**{"xticklabels" if flat else "yticklabels": [_short(-scale), "0", _short(scale)]})
    bar.outline.set_visible(False)
    bar.ax.tick_params(size=0, labelsize=6.5)
    return bar


def _hide_color_bar(bar: Any) -> None:
    """Leave the room that it takes, so that images with and without one stand in line."""
    bar.solids.set_visible(False)
    bar.ax.tick_params(labelcolor="none")


def _short(value: float) -> str:
    return f"{value:.2g}".replace("-", "−").replace("e−0", "e−")


def _degrees(value: float) -> str:
    return f"{value:.4g}°".replace("-", "−")


def _photograph_title(images: Tensor) -> str:
    n, channels, height, width = images.shape
    kind = "" if channels in (1, 3) else f", mean of {channels} channels"
    count = "Photograph" if n == 1 else f"First of {n} photographs"
    return f"{count}, {height} × {width} px{kind}"


def _settings(descents: Sequence[Descent]) -> tuple[list[float], list[float]]:
    """The step sizes and the momenta that there are, in order."""
    rates = sorted({descent.learning_rate for descent in descents})
    momenta = sorted({descent.momentum for descent in descents})
    return rates, momenta


def _panels(
    recovery: Recovery, grid: Any, rates: list[float], momenta: list[float]
) -> Iterator[tuple[int, int, Any, Descent]]:
    """Row, column, axes and descent: a row for each momentum, a column for each step size."""
    for descent in recovery.descents:
        row = momenta.index(descent.momentum)
        column = rates.index(descent.learning_rate)
        place = grid[row, column]
        verdict = "\n".join(textwrap.wrap(descent.verdict, 27))
        place.set_title(verdict, fontsize=7, color=MUTED, loc="left")
        if row == 0:
            place.annotate(
                f"step size {descent.learning_rate:g}", (0, 1), (0, 24), fontweight="bold",
                xycoords="axes fraction", textcoords="offset points", va="bottom",
            )  # fmt: skip
        yield row, column, place, descent


def _mark_truths(place: Axes, recovery: Recovery) -> None:
    for index, (left, right) in enumerate(basins(recovery)):
        place.axvspan(
            math.degrees(left), math.degrees(right), color=SHADE, linewidth=0,
            label=None if index else f"basin, ±{math.degrees(recovery.basin):.1f}°",
        )  # fmt: skip
    labels = ("truth", "the same kernel")
    for truth, label, dash in zip(truths(recovery), labels, ((4, 3), (1, 2)), strict=False):
        place.axvline(
            math.degrees(truth), color=INK, linewidth=0.8, linestyle=(0, dash), label=label
        )


def _mark_start(place: Axes, x: float, y: float) -> None:
    place.plot(
        x, y, "o", color=INK, markerfacecolor="white", markersize=4, markeredgewidth=0.8,
        label="start", zorder=4, clip_on=False, linestyle="none",
    )  # fmt: skip


def _circle_axis(place: Axes, *, wide: bool, label: bool = True) -> None:
    """The whole circle in degrees, where there is room also its ends and the value in rad."""
    names = {-180: "−π", -90: "−π/2", 0: "0", 90: "π/2", 180: "π"}
    ticks = list(names) if wide else [-90, 0, 90]
    place.set_xlim(-180, 180)
    place.set_xticks(
        ticks, [_degrees(tick) + (f"\n{names[tick]}" if wide else "") for tick in ticks]
    )
    if label:
        place.set_xlabel("orientation θ" + (", degrees and rad" if wide else ""))


def _legend(figure: Any, place: Axes, where: str, n_columns: int | None = None) -> None:
    handles, labels = place.get_legend_handles_labels()
    figure.legend(handles, labels, loc=where, ncols=n_columns or len(labels), handlelength=1.8)
