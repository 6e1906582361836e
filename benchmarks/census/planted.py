"""Filters that are known to be of a class, because they were made so.

Few filters of trained networks are a centre with its surround, or two crossing waves: too few to
set thresholds by. These stand beside them. Each comes from the class's own formula with a geometry
at random, in some colour, and with white noise of a tenth to a third of its size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gaborium import Gabor2d, gabor

CLASSES = ("gabor", "edge", "blob", "centre-surround", "colour-contrast", "other", "noise")


def planted(label: str, n: int, size: int, channels: int, *, seed: int) -> Tensor:
    """Filters ``(n, channels, size, size)`` of a class; the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=draw, dtype=torch.float64)

    theta, turn = between(0, math.pi), between(0, 2 * math.pi)
    center = torch.stack([between(-0.06, 0.06), between(-0.06, 0.06)], 1) * size
    colors = 1.0 + 0.25 * torch.randn(n, channels, generator=draw, dtype=torch.float64)
    if label == "gabor":
        n_x, wavelength = between(0.5, 0.9), between(2.6, max(3.0, 0.5 * size))
        kernels = _gabor(size, theta, wavelength, n_x * wavelength, turn, between(0.5, 1.0), center)
    elif label == "edge":
        sigma = between(0.2, 0.35) * size
        odd = torch.full_like(theta, math.pi / 2)
        kernels = _gabor(size, theta, 8 * sigma, sigma, odd, between(0.6, 1.2), center)
    elif label == "blob":
        sigma = between(0.13, 0.35) * size
        kernels = _gabor(size, theta, math.inf, sigma, 0 * turn, between(0.5, 1.0), center)
    elif label == "centre-surround":
        kernels = _rings(size, between(0.1, 0.16) * size, between(1.4, 2.0), center)
    elif label == "colour-contrast":
        # Opponent colours, side by side or in the middle against around.
        colors = torch.randn(n, channels, generator=draw, dtype=torch.float64)
        colors = colors - colors.mean(1, keepdim=True)
        sigma = between(0.2, 0.35) * size
        odd = torch.full_like(theta, math.pi / 2)
        kernels = _gabor(size, theta, 8 * sigma, sigma, odd, between(0.6, 1.2), center)
        rings = _rings(size, between(0.16, 0.25) * size, between(1.5, 2.0), center)
        kernels = torch.where((torch.arange(n) % 2 == 0)[:, None, None], rings, kernels)
    elif label == "other":
        # Every second pair is square and even, and so has a centre like a centre with its surround.
        square = torch.arange(n) % 2 == 0
        wavelength, across = between(2.6, max(3.0, 0.5 * size)), between(1.0, math.pi / 2)
        across, turn = torch.where(square, math.pi / 2, across), torch.where(square, 0.0, turn)
        sigma = between(0.6, 0.9) * wavelength
        kernels = _gabor(size, theta, wavelength, sigma, turn, 0 * theta + 1, center)
        other = torch.where(square, 0.0, between(0, 2 * math.pi))
        kernels = kernels + _gabor(
            size, theta + across, wavelength, sigma, other, 0 * theta + 1, center
        )
    else:
        return torch.randn(n, channels, size, size, generator=draw, dtype=torch.float64)
    whole = colors[:, :, None, None] * kernels[:, None]
    whole = whole / whole.square().mean((1, 2, 3), keepdim=True).sqrt()
    noise = torch.randn(whole.shape, generator=draw, dtype=torch.float64)
    return whole + between(0.1, 0.3)[:, None, None, None] * noise


def _gabor(
    size: int,
    theta: Tensor,
    wavelength: Tensor | float,
    sigma: Tensor,
    phase: Tensor,
    gamma: Tensor,
    center: Tensor,
) -> Tensor:
    fields = Gabor2d.of(
        orientation=theta,
        wavelength=wavelength,
        sigma=sigma,
        phase=phase,
        aspect_ratio=gamma,
        center=center,
        dtype=torch.float64,
    )
    kernels = gabor(fields, size)
    return kernels / kernels.flatten(1).norm(dim=1)[:, None, None]


def _rings(size: int, sigma: Tensor, ratio: Tensor, center: Tensor) -> Tensor:
    """Centre and surround whose integrals cancel."""

    def disc(width: Tensor) -> Tensor:
        fields = Gabor2d.of(wavelength=math.inf, sigma=width, center=center, dtype=torch.float64)
        return gabor(fields, size) / (width**2)[:, None, None]

    return disc(sigma) - disc(ratio * sigma)
