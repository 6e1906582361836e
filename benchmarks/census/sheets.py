"""Pictures of trained filters, to be sorted by hand before any program has said what they are.

    python benchmarks/census/sheets.py --output /tmp/sheets      # sheet-00.png, ... and sheets.csv

Some filters of every network in the shared data, in random order, sixteen on a sheet. In each cell:
the filter as a picture (its colours as red, green and blue, or grey; zero is mid-grey, and the
largest weight is black or white), the same without sharp pixels, and of filters with three
channels the mean over the channels and the two opponent axes (red against green, blue against
yellow). ``sheets.csv`` says which filter is where; GUIDE.md says what the classes are.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from _report import ROOT

mpl.use("Agg")
import matplotlib.pyplot as plt

# How many filters of each network are sorted.
N_FILTERS = {
    "resnet18_imagenet": 64,
    "squeezenet10_deepcompression": 48,
    "caffenet_alexnet_u8": 64,
    "faceboxes": 24,
    "tfeat_liberty": 24,
    "srcnn_keras_3051": 24,
    "style_la_muse": 16,
    "style_rain_princess": 16,
    "style_scream": 16,
    "deepdesc_split1": 16,
    "deepdesc_split2": 16,
    "cifar10_quick_k5": 32,
    "cifar10_resnet20_k3": 16,
    "NEGATIVE_noise_like_srcnn_adam30": 16,
    "sparsecode_A144_olshausen": 32,
}
PER_SHEET = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, required=True, help="folder of the sheets")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = choose(options.data)
    with (options.output / "sheets.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("sheet", "cell", "network", "filter"))
        for i, (network, index, _) in enumerate(chosen):
            writer.writerow((i // PER_SHEET, i % PER_SHEET, network, index))
    for sheet in range(-(-len(chosen) // PER_SHEET)):
        some = [kernel for *_, kernel in chosen[sheet * PER_SHEET :][:PER_SHEET]]
        draw(some, f"sheet {sheet:02d}", options.output / f"sheet-{sheet:02d}.png")
    print(f"{len(chosen)} filters of {len(N_FILTERS)} networks in {options.output}")


def choose(data: Path) -> list[tuple[str, int, np.ndarray]]:
    """Network, index and kernel ``(channels, h, w)``, channels as red, green, blue."""
    draw_from, found = np.random.default_rng(0), []
    for network, n in N_FILTERS.items():
        with np.load(data / "kernels" / f"{network}.npz") as file:
            weights, meta = file["weights"], json.loads(str(file["meta"]))
        if meta["channels"].startswith("BGR") and "unknown" not in meta["channels"]:
            weights = weights[:, ::-1]
        chosen = sorted(draw_from.choice(len(weights), n, replace=False).tolist())
        found += [(network, index, weights[index]) for index in chosen]
    draw_from.shuffle(found)
    return found


def draw(kernels: list[np.ndarray], title: str, path: Path) -> None:
    figure, axes = plt.subplots(8, 10, figsize=(14, 12))
    for axis in axes.flat:
        axis.axis("off")
    for i, kernel in enumerate(kernels):
        row, left = divmod(i, 2)
        # As a whole, so that channels keep their share of the weight.
        scaled = kernel / (2 * np.abs(kernel).max() + 1e-30) + 0.5
        cells = axes[row, 5 * left : 5 * left + 5]
        whole = scaled.transpose(1, 2, 0) if len(kernel) == 3 else scaled[0]
        for axis, smooth in zip(cells, ("nearest", "bicubic"), strict=False):
            axis.imshow(whole, cmap="gray", vmin=0, vmax=1, interpolation=smooth)
        if len(kernel) == 3:
            red, green, blue = kernel / (np.abs(kernel).max() + 1e-30)
            views = {
                "mean": (red + green + blue) / 3,
                "R-G": (red - green) / 2,
                "B-Y": (2 * blue - red - green) / 4,
            }
            for axis, (name, view) in zip(cells[2:], views.items(), strict=True):
                axis.imshow(view, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
                axis.set_title(name, fontsize=7)
        cells[0].set_title(f"cell {i}", fontsize=9, weight="bold")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=75)
    plt.close(figure)


if __name__ == "__main__":
    main()
