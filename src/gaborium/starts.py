"""Starts: the Gabor functions with which a layer begins."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gaborium.cortex import widths
from gaborium.kernels import quadrature_pair
from gaborium.params import RECORDS, Gabor, Gabor1d
from gaborium.spectrum import sigma_from_bandwidth

STARTS = ("bank", "random", "v1")

# Shortest wavelength of any start, px: a little above the aliasing limit of 2.
_SHORTEST = 2.5


def start(
    name: str,
    *,
    n_filters: int,
    n_channels: int,
    kernel_size: tuple[int, ...],
    n_phases: int = 2,
    generator: torch.Generator | None = None,
) -> Gabor:
    """Draw the parameters that a layer begins with.

    - ``"bank"``: the classical filter bank. Directions evenly over the half circle (over the half
      sphere in 3-D), wavelengths evenly in octaves from 3 px to the kernel's size, one octave of
      bandwidth where the kernel has room for it, an even and an odd filter of each. The same for
      every input channel. Nothing is drawn.
    - ``"random"``: directions and phases uniform, wavelengths and widths uniform in octaves,
      aspect ratios 0.5 to 1, and for every input channel an amplitude of its own.
    - ``"v1"``: as measured in simple cells of macaque primary visual cortex, see ``_v1_widths``.

    Args:
        name: one of the above.
        n_filters: Gabor functions to draw.
        n_channels: input channels that each filter sees.
        kernel_size: pixels along each axis.
        n_phases: of the bank: 2 for an even and an odd filter of each wave, 1 for the even one
            alone, where the layer makes its odd partner itself.
        generator: source of randomness; by default torch's own.

    Returns:
        A float64 record on the CPU: geometry ``(n_filters, 1)``, phase and amplitude
        ``(n_filters, n_channels)``. Amplitudes are relative; the layer scales them.

    Raises:
        ValueError: the name is none of the above.

    Example:
        >>> bank = start("bank", n_filters=8, n_channels=1, kernel_size=(9, 9))
        >>> [round(angle, 2) for angle in bank.orientation[::2, 0].tolist()]
        [0.0, 0.79, 1.57, 2.36]
    """
    if name not in STARTS:
        raise ValueError(f"start must be a record or one of {', '.join(STARTS)}, got {name!r}.")
    sizes = [size for size in kernel_size if size > 1] or [1]
    draws: dict[str, Callable[..., dict[str, Tensor]]] = {
        "bank": partial(_bank, n_phases=n_phases),
        "random": _random,
        "v1": _v1,
    }
    record = RECORDS[len(kernel_size)]
    # The default device may be one without numbers ("meta"), or with other random ones.
    with torch.device("cpu"):
        fields = draws[name](n_filters, n_channels, len(kernel_size), float(min(sizes)), generator)
        known: dict[str, Any] = {n: v for n, v in fields.items() if n in record.field_names()}
        params = record.of(**known)
        geometry = {
            name: value[:, :1]
            for name, value in params.as_dict().items()
            if name not in ("phase", "amplitude")
        }
        return _without_silence(params.replace(**geometry), kernel_size)


def mel_bank(
    n_filters: int,
    kernel_size: int,
    *,
    sample_rate: float,
    lowest: float = 60.0,
    highest: float | None = None,
) -> Gabor1d:
    """Filters evenly on the mel scale, with which learned front ends for sound begin.

    Convention:
        - mel = 2595 log10(1 + Hz / 700), after O'Shaughnessy
        - the spectra of neighbours meet at half of their height; no filter is wider than its
          kernel shows, three standard deviations to each side
        - every response to white noise of unit variance has the same variance, 1/3, as those of
          the other starts

    Args:
        n_filters: how many, from the lowest frequency to the highest.
        kernel_size: samples of the kernel that they are for.
        sample_rate: samples a second, Hz.
        lowest: where the first filter's spectrum begins, Hz.
        highest: where the last one's ends, Hz; by default just below the highest frequency that
            the rate can hold, 0.925 of it.

    Returns:
        A float64 record of ``(n_filters, 1)``, wavelength and sigma in samples, phase 0: a start
        for ``GaborConv1d(start=...)`` and ``train(start=...)``.

    Raises:
        ValueError: there are no filters, or the frequencies are not in order between 0 and half
            of the rate.

    Reference:
        Zeghidour, Teboul, de Chaumont Quitry & Tagliasacchi (2021), ICLR, arXiv:2101.08596: a
        learned front end of Gabor filters that begins so.

    Example:
        >>> bank = mel_bank(40, 401, sample_rate=16000)
        >>> [round(16000 / wavelength) for wavelength in bank.wavelength[[0, 20, 39], 0].tolist()]
        [105, 1854, 6946]
    """
    nyquist = sample_rate / 2
    highest = 0.925 * nyquist if highest is None else highest
    if n_filters < 1 or kernel_size < 1:
        raise ValueError(
            f"n_filters and kernel_size must be at least 1, got {n_filters} and {kernel_size}."
        )
    if not 0 <= lowest < highest <= nyquist < math.inf:
        raise ValueError(
            "Frequencies must be 0 <= lowest < highest <= sample_rate / 2, got "
            f"{lowest:g} and {highest:g} Hz at {sample_rate:g} samples a second."
        )
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (lowest, highest))
    mel = torch.linspace(low, high, n_filters + 2, dtype=torch.float64, device="cpu")
    hertz = 700 * (10 ** (mel / 2595) - 1)
    half_width = (hertz[2:] - hertz[:-2]) / 4
    sigma = sample_rate * math.sqrt(2 * math.log(2)) / (2 * math.pi * half_width)
    sigma = sigma.clamp_max(kernel_size / 6)
    return Gabor1d.of(
        wavelength=_column(sample_rate / hertz[1:-1]),
        sigma=_column(sigma),
        amplitude=_column((2 / (3 * math.sqrt(math.pi) * sigma)).sqrt()),
    )


def _bank(
    n_filters: int,
    n_channels: int,
    n_dims: int,
    size: float,
    _: torch.Generator | None,
    *,
    n_phases: int,
) -> dict[str, Tensor]:
    n_pairs = math.ceil(n_filters / n_phases)
    # About twice as many directions as wavelengths, as in most published banks.
    n_wavelengths = n_pairs if n_dims == 1 else max(1, round(math.sqrt(n_pairs / 2)))
    n_directions = math.ceil(n_pairs / n_wavelengths)
    index = torch.arange(n_filters)
    pair = index // n_phases
    octave = (pair // n_directions).double() / max(n_wavelengths - 1, 1)
    longest = max(size, 3.0)
    wavelength = 3.0 * (longest / 3.0) ** octave if n_wavelengths > 1 else _middle(longest, index)
    orientation, elevation = _even_directions(pair % n_directions, n_directions, n_dims)
    room = _room(size)
    return {
        "orientation": _column(orientation),
        "elevation": _column(elevation),
        "wavelength": _column(wavelength),
        "sigma": _column(sigma_from_bandwidth(1.0, wavelength).clamp_max(room)),
        "aspect_ratio": torch.ones(n_filters, 1, dtype=torch.float64),
        "phase": _column((index % n_phases).double() * (math.pi / 2)).expand(-1, n_channels),
        "amplitude": torch.ones(n_filters, n_channels, dtype=torch.float64),
    }


def _random(
    n_filters: int, n_channels: int, _: int, size: float, generator: torch.Generator | None
) -> dict[str, Tensor]:
    def uniform(low: float, high: float, columns: int = 1) -> Tensor:
        sample = torch.rand(n_filters, columns, dtype=torch.float64, generator=generator)
        return low + (high - low) * sample

    wavelength = 2 ** uniform(math.log2(_SHORTEST), math.log2(max(size, _SHORTEST)))
    sigma = sigma_from_bandwidth(2 ** uniform(-0.5, 1.0), wavelength).clamp_max(_room(size))
    aspect_ratio = torch.maximum(2 ** uniform(-1.0, 0.0), sigma / _room(size))
    amplitude = torch.randn(n_filters, n_channels, dtype=torch.float64, generator=generator)
    return {
        "orientation": uniform(0.0, math.pi),
        # The sine of the elevation is uniform where directions are uniform on the sphere.
        "elevation": uniform(-1.0, 1.0).asin(),
        "wavelength": wavelength,
        "sigma": sigma,
        "aspect_ratio": aspect_ratio,
        "phase": uniform(-math.pi, math.pi, n_channels),
        "amplitude": amplitude,
    }


def _v1(
    n_filters: int, n_channels: int, n_dims: int, size: float, generator: torch.Generator | None
) -> dict[str, Tensor]:
    fields = _random(n_filters, n_channels, n_dims, size, generator)
    across, along = _v1_widths(n_filters, generator)
    # In cortex the size of a receptive field varies with eccentricity; here the kernel's size sets
    # the scale: the drawn shape is kept and its wavelength is made to fit. Below 12 px the widest
    # would need wavelengths that alias; there the envelope shrinks, and keeps its aspect ratio.
    fit = _room(size) / torch.maximum(across, along)
    wavelength = torch.minimum(fields["wavelength"], fit).clamp_min(_SHORTEST)
    fields["wavelength"] = wavelength
    fields["sigma"] = across * torch.minimum(wavelength, fit)
    fields["aspect_ratio"] = across / along
    fields["phase"] = fields["phase"][:, :1].expand(-1, n_channels)
    fields["amplitude"] = torch.ones_like(fields["amplitude"])
    return fields


def _v1_widths(n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Envelope widths in wavelengths, ``n_x = σ/λ`` and ``n_y = σ/(γλ)``, of ``n`` simple cells.

    Drawn from the log-normal population of 79 macaque V1 simple cells, see ``gaborium.cortex``.
    """
    sample = torch.randn(2, n, 1, dtype=torch.float64, generator=generator)
    # Tails beyond what was ever measured would give a filter without envelope or without end.
    return widths(sample[0], sample[1], limit=2.0)


def _room(size: float) -> float:
    """Largest standard deviation that a kernel of this size holds: 1.5 of them to each side."""
    return max(size / 3.0, 0.3)


def _middle(longest: float, like: Tensor) -> Tensor:
    return torch.full(like.shape, math.sqrt(3.0 * longest), dtype=torch.float64)


def _column(value: Tensor) -> Tensor:
    return value.double().unsqueeze(-1)


def _even_directions(index: Tensor, n: int, n_dims: int) -> tuple[Tensor, Tensor]:
    """Directions number ``index`` of ``n``, evenly over the half circle or the half sphere."""
    if n_dims < 3:
        return index * (math.pi / n), torch.zeros(len(index))
    # A spiral of golden angles: even, and as good for 5 directions as for 500.
    golden = math.pi * (3 - math.sqrt(5))
    return index * golden, ((index + 0.5) / n).asin()


def _without_silence(params: Gabor, kernel_size: tuple[int, ...]) -> Gabor:
    """Turn the phase by π/2 where the kernel would be zero, as a sine on a single pixel is."""
    real, partner = (k.flatten(-params.n_dims) for k in quadrature_pair(params, kernel_size))
    silent = real.norm(dim=-1) < 0.01 * partner.norm(dim=-1)
    return params.replace(phase=torch.where(silent, params.phase - math.pi / 2, params.phase))
