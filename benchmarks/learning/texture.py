"""A linear classifier of texture statistics, for the experiments on KTH-TIPS and Brodatz."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from gaborium.training.networks import GridPool, output_shape

# Cells of the grid along each axis; few, because a texture looks similar everywhere.
_GRID = {1: 4, 2: 3, 3: 2}
# Energies below this are not distinguished, where white input of unit variance gives some 0.5.
_FAINT = 0.02
# Pixels between two places of an energy that are compared, diagonally as many along both axes.
_DISTANCES = (1, 2, 4)


class TextureClassifier(nn.Module):
    """A linear classifier of statistics of a first layer's energies.

    Of each channel, in each cell of a grid, three logarithms:

    - strength, the mean, relative to its average over the image's channels and cells
    - spread, the standard deviation over the mean: whether a wave is everywhere or in places
    - flatness, the geometric mean over the mean: whether it ever vanishes

    and over the whole image, of the logarithms of energies, correlations

    - of each channel with itself at distances of 1, 2 and 4 pixels, along the axes and diagonally
    - of each pair of channels

    Contrast is an offset of all logarithms and makes no difference. All statistics are normalised
    over the batch, one by one, and classified linearly.

    Reference:
        Manjunath & Ma (1996), IEEE Trans. Pattern Anal. Mach. Intell. 18(8),
        doi:10.1109/34.531803: mean and deviation of the energy as features, there of the whole
        image and without logarithms. Portilla & Simoncelli (2000), Int. J. Comput. Vis. 40(1),
        doi:10.1023/A:1026553619983: correlations of energies among what makes a texture.
    """

    def __init__(self, first: nn.Module, n_classes: int, *, image_size: tuple[int, ...]) -> None:
        super().__init__()
        self.first = first
        self.pool = GridPool(_GRID[len(image_size)])
        n_statistics = self.statistics(torch.zeros(1, *output_shape(first, image_size))).shape[1]
        self.norm = nn.BatchNorm1d(n_statistics)
        self.classifier = nn.Linear(n_statistics, n_classes)

    def statistics(self, energy: Tensor) -> Tensor:
        """The statistics ``(batch, n)`` of energies ``(batch, channels, *size)``.

        Strength, spread and flatness in each cell, then correlations, of each channel with itself
        and of pairs of channels.
        """
        # Under autocast energies may come in half precision, too coarse for differences of squares.
        energy = energy if energy.dtype == torch.float64 else energy.float()
        logs = (energy + _FAINT).log()
        mean = self.pool(energy)
        variance = (self.pool(energy.square()) - mean.square()).clamp_min(0.0)
        strength = (mean + _FAINT).log()
        spread = (variance + _FAINT**2).log() / 2 - strength
        flatness = self.pool(logs) - strength
        strength = strength.flatten(1)
        relative = strength - strength.mean(1, keepdim=True)
        of_cells = [relative, spread.flatten(1), flatness.flatten(1)]
        standard = _standardised(logs)
        return torch.cat([*of_cells, _autocorrelations(standard), _correlations(standard)], dim=1)

    def forward(self, input: Tensor) -> Tensor:
        """Logits ``(batch, n_classes)``."""
        return self.classifier(self.norm(self.statistics(self.first(input))))


def _standardised(values: Tensor) -> Tensor:
    """Each channel of ``(batch, channels, *size)`` with mean 0 and variance 1, less if flat."""
    axes = tuple(range(2, values.ndim))
    values = values - values.mean(axes, keepdim=True)
    return values / (values.square().mean(axes, keepdim=True) + _FAINT**2).sqrt()


def _autocorrelations(standard: Tensor) -> Tensor:
    """Of each channel with itself after each shift, ``(batch, channels * shifts)``."""
    size, axes = standard.shape[2:], tuple(range(2, standard.ndim))
    shifts = _shifts(tuple(size))
    if not shifts:
        return standard.new_zeros(len(standard), 0)
    # All sums of products at once, as a power spectrum; zeros keep the borders apart.
    padded = [side + max(_DISTANCES) for side in size]
    spectrum = torch.fft.rfftn(standard, s=padded, dim=axes)
    power = spectrum.real.square() + spectrum.imag.square()
    sums = torch.fft.irfftn(power, s=padded, dim=axes)
    n_pairs = [
        math.prod(side - abs(step) for side, step in zip(size, shift, strict=True))
        for shift in shifts
    ]
    places: Any = (..., *torch.tensor(shifts, device=sums.device).unbind(1))
    return (sums[places] / sums.new_tensor(n_pairs)).flatten(1)


def _shifts(size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shifts along each axis in px, one of each two that are opposite."""
    nowhere = (0,) * len(size)
    ways = [way for way in product((-1, 0, 1), repeat=len(size)) if way > nowhere]
    distances = [distance for distance in _DISTANCES if distance < min(size)]
    return [tuple(distance * step for step in way) for distance in distances for way in ways]


def _correlations(standard: Tensor) -> Tensor:
    """Of each pair of channels, ``(batch, pairs)``."""
    values = standard.flatten(2)
    with torch.autocast(values.device.type, enabled=False):
        products = values @ values.mT / values.shape[2]
    n_channels = values.shape[1]
    one, other = torch.triu_indices(n_channels, n_channels, offset=1, device=values.device)
    return products[:, one, other]
