"""Gabor functions in the frequency domain: spectrum, bandwidth and response to a constant."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gaborium.kernels import gabor
from gaborium.params import Gabor


def gabor_spectrum(params: Gabor, frequencies: Tensor) -> Tensor:
    """Fourier transform of the continuous Gabor functions, in closed form.

    Convention:
        - ``G(f) = ∫ g(u) exp(-2πi f·u) du`` with ``u`` measured from the kernel's middle
        - frequencies are in cycles/px, components in (x, y, z) order
        - a sampled kernel has this spectrum as far as it is neither aliased nor truncated

    Args:
        params: Gabor functions of batch shape ``(*batch,)``.
        frequencies: ``(*points, d)`` in cycles/px.

    Returns:
        Complex tensor of shape ``(*batch, *points)``.

    Raises:
        ValueError: the last axis of ``frequencies`` does not have one entry per dimension.

    Example:
        >>> from gaborium import Gabor1d
        >>> tone = Gabor1d.of(wavelength=4.0, sigma=8.0)
        >>> peak = gabor_spectrum(tone, torch.tensor([[0.25]]))
        >>> round(peak.real.item(), 3)  # half of σ √(2π): the other half lies at -0.25
        10.027
    """
    d = params.n_dims
    if frequencies.ndim == 0 or frequencies.shape[-1] != d:
        raise ValueError(
            f"frequencies must end in an axis of {d} (cycles/px), got shape "
            f"{tuple(frequencies.shape)}."
        )
    params = params.expand()
    points = frequencies.reshape(-1, d).to(params.sigma)
    wave = params.waveform()
    n, sigma = wave.direction.unsqueeze(-2), wave.sigma.unsqueeze(-1)
    across_sigma = sigma / wave.aspect_ratio.unsqueeze(-1)
    volume = (2 * math.pi) ** (d / 2) * wave.sigma * across_sigma[..., 0] ** (d - 1)

    def bump(sign: float) -> Tensor:
        away = points - sign * wave.wave_vector.unsqueeze(-2)  # (*batch, F, d)
        along = (away * n).sum(-1)
        across = (away - along.unsqueeze(-1) * n).square().sum(-1)
        spread = (along * sigma).square() + across * across_sigma.square()
        return (-2 * math.pi**2 * spread).exp()

    plus, minus = bump(1.0), bump(-1.0)
    even, odd = wave.even.unsqueeze(-1), wave.odd.unsqueeze(-1)
    half = 0.5 * volume.unsqueeze(-1)
    values = torch.complex(half * even * (plus + minus), half * odd * (plus - minus))
    shift = (-2 * math.pi) * (points * params.center.unsqueeze(-2)).sum(-1)
    values = values * torch.polar(torch.ones_like(shift), shift)
    return values.unflatten(-1, frequencies.shape[:-1]) if frequencies.ndim > 1 else values[..., 0]


def bandwidth_from_sigma(sigma: Tensor | float, wavelength: Tensor | float) -> Tensor:
    """Bandwidth in octaves at half height of the spectrum's peak.

    ``σ/λ = (1/π) √(ln 2 / 2) (2^b + 1) / (2^b - 1)``. Up to ``σ/λ = 0.187`` the peak does not
    fall to half its height on the side of low frequencies, and the bandwidth is infinite.

    Args:
        sigma: standard deviation along the wave vector, px.
        wavelength: px.

    Returns:
        Octaves, > 0.

    Example:
        >>> round(bandwidth_from_sigma(5.622, 10.0).item(), 3)
        1.0
    """
    sigma, wavelength = _same_dtype(sigma, wavelength)
    ratio = math.pi / math.sqrt(math.log(2) / 2) * sigma / wavelength
    octaves = ((ratio + 1) / (ratio - 1)).log2()
    return torch.where(ratio > 1, octaves, torch.inf)


def sigma_from_bandwidth(bandwidth: Tensor | float, wavelength: Tensor | float) -> Tensor:
    """Standard deviation along the wave vector that gives a bandwidth in octaves.

    Args:
        bandwidth: octaves at half height, > 0.
        wavelength: px.

    Returns:
        px; the inverse of ``bandwidth_from_sigma``.

    Raises:
        ValueError: a bandwidth is not positive.

    Example:
        >>> round(sigma_from_bandwidth(1.0, 10.0).item(), 3)
        5.622
    """
    bandwidth, wavelength = _same_dtype(bandwidth, wavelength)
    if not (bandwidth > 0).all():
        raise ValueError(f"bandwidth must be positive (octaves), got {bandwidth.min().item():g}.")
    # (2^b + 1) / (2^b - 1), written so that neither end overflows or cancels.
    ratio = torch.tanh(bandwidth * (math.log(2) / 2)).reciprocal()
    return math.sqrt(math.log(2) / 2) / math.pi * ratio * wavelength


def dc_response(params: Gabor, kernel_size: int | tuple[int, ...]) -> Tensor:
    """Response to a constant image, as a share of the largest response a kernel could give.

    It is the kernel's sum over the sum of its magnitudes: 0 for a sine, 1 for a blob.

    Args:
        params: Gabor functions of batch shape ``(*batch,)``.
        kernel_size: pixels along each axis; one number serves all.

    Returns:
        ``(*batch,)``, in [-1, 1]; 0 for a kernel that is zero everywhere.

    Example:
        >>> from gaborium import Gabor2d
        >>> broad = Gabor2d.of(orientation=0.3, wavelength=10.0, sigma=3.0)
        >>> round(dc_response(broad, 31).item(), 2)
        0.27
    """
    kernels = gabor(params, kernel_size).flatten(-params.n_dims)
    size = kernels.abs().sum(-1)
    return kernels.sum(-1) / size.clamp_min(torch.finfo(kernels.dtype).tiny)


def _same_dtype(one: Tensor | float, other: Tensor | float) -> tuple[Tensor, Tensor]:
    """Both as tensors; a number beside a float64 tensor must not be rounded to float32."""
    dtype = torch.result_type(one, other)
    return torch.as_tensor(one, dtype=dtype), torch.as_tensor(other, dtype=dtype)
