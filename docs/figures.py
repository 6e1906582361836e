"""Draw the figures of the documentation: ``python docs/figures.py`` rewrites ``_static/*.svg``."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Arc, Ellipse

from gaborium import Gabor2d, GaborConv2d, gabor

# Equal input must give an equal file, so that the committed figures can be compared.
plt.rcParams.update({"svg.hashsalt": "gaborium", "svg.fonttype": "path", "font.size": 11})

HERE = Path(__file__).resolve().parent / "_static"
RED, BLUE, GREEN = "#c0392b", "#1f4e9c", "#1d7a46"


def main() -> None:
    HERE.mkdir(exist_ok=True)
    for name, draw in (("bank", bank), ("conventions", conventions), ("parameters", parameters)):
        figure = draw()
        figure.savefig(HERE / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
        print(f"Wrote docs/_static/{name}.svg")


def bank():
    """The filters with which a layer begins."""
    weight = GaborConv2d(1, 8, 25, bias=False).weight.detach()
    figure, axes = plt.subplots(1, 8, figsize=(10, 1.3))
    for axis, kernel in zip(axes, weight[:, 0], strict=True):
        show(axis, kernel)
    return figure


def conventions():
    """What each parameter means, on the pixels of one kernel."""
    size, theta, wavelength, sigma, ratio = 61, math.radians(30), 13.0, 8.0, 0.6
    params = Gabor2d.of(
        orientation=theta, wavelength=wavelength, sigma=sigma, aspect_ratio=ratio, phase=0.0
    )
    figure, axis = plt.subplots(figsize=(6.4, 6.4))
    half = (size - 1) / 2
    box = (-half - 0.5, half + 0.5, half + 0.5, -half - 0.5)
    show(axis, gabor(params, size), extent=box, alpha=0.75)
    along, across = (math.cos(theta), math.sin(theta)), (-math.sin(theta), math.cos(theta))

    arrow(axis, (0, 0), (26, 0), "black")
    axis.text(26.5, -1.5, "x (columns)", ha="right", va="bottom")
    arrow(axis, (0, 0), (0, 26), "black")
    axis.text(0.8, 27.0, "y (rows, downwards)", ha="left", va="center")
    arrow(axis, (0, 0), (27 * along[0], 27 * along[1]), RED)
    axis.text(23.0, 15.8, "wave vector", color=RED, ha="center", va="center")
    axis.add_patch(Arc((0, 0), 34, 34, theta1=0, theta2=30, color=RED, lw=2))
    axis.text(18.0, 5.0, "θ", color=RED, fontsize=17, ha="left", va="center")

    # One wavelength from crest to crest, measured beside the middle.
    at = (-16 * across[0], -16 * across[1])
    far = (at[0] + wavelength * along[0], at[1] + wavelength * along[1])
    arrow(axis, at, far, GREEN, style="<|-|>")
    axis.text(at[0] + 6.0, at[1] - 1.0, "λ", color=GREEN, fontsize=17, ha="left", va="bottom")

    axis.add_patch(
        Ellipse((0, 0), 2 * sigma, 2 * sigma / ratio, angle=30, fill=False, color=BLUE, lw=2)
    )
    line(axis, (0, 0), (-sigma * along[0], -sigma * along[1]), BLUE)
    axis.text(-8.2, -4.2, "σ", color=BLUE, fontsize=17, ha="right", va="center")
    line(axis, (0, 0), (sigma / ratio * across[0], sigma / ratio * across[1]), BLUE)
    axis.text(-7.5, 12.5, "σ/γ", color=BLUE, fontsize=17, ha="right", va="center")
    axis.plot(0, 0, "o", color="black", ms=4)
    return figure


def parameters():
    """One row per parameter, all others held."""
    base = {"orientation": 0.5, "wavelength": 10.0, "sigma": 5.0, "phase": 0.0, "aspect_ratio": 1.0}
    rows = {
        "orientation": (["0°", "30°", "60°", "90°", "120°", "150°"], torch.arange(6) * math.pi / 6),
        "wavelength": (["5", "7", "10", "14", "20", "∞"], [5, 7, 10, 14, 20, math.inf]),
        "phase": (["0°", "60°", "90°", "120°", "180°", "270°"], [0, 60, 90, 120, 180, 270]),
        "sigma": (["1", "2", "3", "5", "7", "10"], [1, 2, 3, 5, 7, 10]),
        "aspect_ratio": (["0.4", "0.6", "0.8", "1", "1.5", "2.5"], [0.4, 0.6, 0.8, 1, 1.5, 2.5]),
    }
    figure, axes = plt.subplots(len(rows), 6, figsize=(8.2, 7.6), layout="constrained")
    for line_of_axes, (name, (titles, values)) in zip(axes, rows.items(), strict=True):
        values = torch.as_tensor(values, dtype=torch.float64)
        if name == "phase":
            values = values.deg2rad()
        fields = base | {name: values} | ({"sigma": 3.0} if name == "aspect_ratio" else {})
        kernels = gabor(Gabor2d.of(**fields), 31)
        for axis, kernel, title in zip(line_of_axes, kernels, titles, strict=True):
            show(axis, kernel)
            axis.set_title(title, fontsize=10, pad=3)
        unit = "" if name in ("orientation", "phase", "aspect_ratio") else " / px"
        line_of_axes[0].set_ylabel(name + unit, fontsize=10)
    return figure


def show(axis, kernel, **options):
    largest = kernel.abs().max()
    axis.imshow(kernel.numpy(), cmap="gray", vmin=-largest, vmax=largest, **options)
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_visible(False)


def arrow(axis, start, end, color, style="-|>"):
    axis.annotate(
        "", end, start, arrowprops={"arrowstyle": style, "color": color, "lw": 2, "shrinkA": 0,
                                    "shrinkB": 0, "mutation_scale": 16},
    )  # fmt: skip


def line(axis, start, end, color):
    axis.plot(*zip(start, end, strict=True), color=color, lw=2)


if __name__ == "__main__":
    main()
