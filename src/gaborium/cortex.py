"""Macaque primary visual cortex (V1) in a few published numbers: to begin with, to compare with.

Reference:
    - widths: Ringach (2002), J. Neurophysiol. 88(1), doi:10.1152/jn.2002.88.1.455
    - orientations: De Valois, Yund & Hepler (1982), Vision Res. 22(5),
      doi:10.1016/0042-6989(82)90112-2
    - frequencies: De Valois, Albrecht & Thorell (1982), Vision Res. 22(5),
      doi:10.1016/0042-6989(82)90113-4
"""

from __future__ import annotations

import math

from torch import Tensor

# Of log10 n_x and log10 n_y, the envelope's widths in wavelengths along the wave and along the
# stripes, of 79 simple cells: the moments of the binned counts of Ringach's population figure.
WIDTH_MEAN = (-0.45, -0.38)
WIDTH_STD = (0.18, 0.28)
WIDTH_CORRELATION = 0.71

# Cells within 22.5 degrees of horizontal or vertical, 143 of 246; evenly spread, half of them were.
CARDINAL = 143 / 246

# Standard deviation of the preferred frequency in octaves, of the binned counts of 139 cells.
FREQUENCY_STD = 0.83


def distance(n_x: Tensor, n_y: Tensor) -> Tensor:
    """How far widths lie from V1's mean, in standard deviations of its population.

    The population is log-normal; the distance takes the correlation of the two into account
    (Mahalanobis). Within 1.18 lie half of the cells, within 2.45 95 %.

    Args:
        n_x: envelope's width along the wave, in wavelengths.
        n_y: the same along the stripes.

    Example:
        >>> import torch
        >>> median = torch.tensor([10**-0.45]), torch.tensor([10**-0.38])
        >>> far = distance(*median), distance(10 * median[0], 10 * median[1])
        >>> [round(one.item(), 1) for one in far]
        [0.0, 5.6]
    """
    z = [
        (width.double().log10() - mean) / std
        for width, mean, std in zip((n_x, n_y), WIDTH_MEAN, WIDTH_STD, strict=True)
    ]
    r = WIDTH_CORRELATION
    squared = (z[0].square() - 2 * r * z[0] * z[1] + z[1].square()) / (1 - r**2)
    return squared.clamp_min(0.0).sqrt()


def reach(share: float) -> float:
    """The ``distance`` within which this share of the population lies.

    Example:
        >>> round(reach(0.95), 2)
        2.45
    """
    return math.sqrt(-2 * math.log1p(-share))


def widths(first: Tensor, second: Tensor, *, limit: float = math.inf) -> tuple[Tensor, Tensor]:
    """``n_x`` and ``n_y`` of the population, of two independent standard normal numbers.

    Args:
        first: of ``n_x``.
        second: of what ``n_y`` does not have in common with it.
        limit: standard deviations from its mean at which each width stops.

    Example:
        >>> import torch
        >>> n_x, n_y = widths(torch.tensor(0.0), torch.tensor(0.0))
        >>> round(n_x.item(), 3), round(n_y.item(), 3)
        (0.355, 0.417)
    """
    r = WIDTH_CORRELATION
    both = first, r * first + math.sqrt(1 - r**2) * second
    across, along = (
        10 ** (mean + std * z.clamp(-limit, limit))
        for mean, std, z in zip(WIDTH_MEAN, WIDTH_STD, both, strict=True)
    )
    return across, along
