"""Starts: the Gabor functions with which a layer begins, and the statistics of macaque V1.

Reference:
    Primary visual cortex (V1) in a few published numbers:

    - widths: Ringach (2002), J. Neurophysiol. 88(1), doi:10.1152/jn.2002.88.1.455
    - orientations: De Valois, Yund & Hepler (1982), Vision Res. 22(5),
      doi:10.1016/0042-6989(82)90112-2
    - frequencies: De Valois, Albrecht & Thorell (1982), Vision Res. 22(5),
      doi:10.1016/0042-6989(82)90113-4
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gaborium.functions.kernels import quadrature_pair, sigma_from_bandwidth
from gaborium.functions.params import RECORDS, Gabor, Gabor1d

STARTS = ("bank", "random", "v1")

# Of log10 n_x and log10 n_y, the envelope's widths in wavelengths along the wave and along the
# stripes, of 79 simple cells: the moments of the binned counts of Ringach's population figure.
V1_WIDTH_MEAN = (-0.45, -0.38)
V1_WIDTH_STD = (0.18, 0.28)
V1_WIDTH_CORRELATION = 0.71
# Share of cells within 22.5 degrees of horizontal or vertical, 143 of 246; half if all are equal.
V1_CARDINAL = 143 / 246
# Standard deviation of the preferred frequency in octaves, of the binned counts of 139 cells.
V1_FREQUENCY_STD = 0.83

_SHORTEST = 2.5  # px, shortest wavelength of any start: a little above the aliasing limit of 2


def draw_start(
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
      every input channel. Not random.
    - ``"random"``: directions and phases uniform, wavelengths and widths uniform in octaves,
      aspect ratios 0.5 to 1, and an independent amplitude for every input channel.
    - ``"v1"``: shapes as measured in simple cells of macaque V1, see ``v1_widths``.

    With ``n_phases=1`` the bank has even filters alone, for a layer that makes their odd partners.
    The record is float64, on the CPU: geometry ``(n_filters, 1)``, phase and amplitude
    ``(n_filters, n_channels)``. Amplitudes are relative; the layer scales them.

    Example:
        >>> bank = draw_start("bank", n_filters=8, n_channels=1, kernel_size=(9, 9))
        >>> [round(angle, 2) for angle in bank.orientation[::2, 0].tolist()]
        [0.0, 0.79, 1.57, 2.36]
    """
    if name not in STARTS:
        raise ValueError(f"start must be one of {', '.join(map(repr, STARTS))}, got {name!r}.")
    n_dims, record = len(kernel_size), RECORDS[len(kernel_size)]
    size = float(min([size for size in kernel_size if size > 1] or [1]))
    # The default device may be one without numbers ("meta"), or with other random numbers.
    with torch.device("cpu"):
        if name == "bank":
            fields = _bank(n_filters, n_channels, n_dims, size, n_phases)
        else:
            fields = _random(n_filters, n_channels, size, generator)
        if name == "v1":
            fields = _with_v1_shapes(fields, size, generator)
        fields["center"] = torch.zeros(n_filters, 1, n_dims, dtype=torch.float64)
        params = record(**{field: fields[field] for field in record.field_names()})
        return _without_silence(params, kernel_size)


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
        - every response to white noise of unit variance has the same variance, 1/3, as with the
          other starts

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


# -- macaque V1 -------------------------------------------------------------------------------


def v1_widths(first: Tensor, second: Tensor, *, limit: float = math.inf) -> tuple[Tensor, Tensor]:
    """Envelope widths of V1 cells in wavelengths, from two independent standard normal numbers.

    The population is log-normal: ``n_x = σ/λ`` along the wave, ``n_y = σ/(γλ)`` along the stripes.
    Each width stops ``limit`` standard deviations from its mean.
    """
    r = V1_WIDTH_CORRELATION
    both = first, r * first + math.sqrt(1 - r**2) * second
    n_x, n_y = (
        10 ** (mean + std * z.clamp(-limit, limit))
        for mean, std, z in zip(V1_WIDTH_MEAN, V1_WIDTH_STD, both, strict=True)
    )
    return n_x, n_y


def v1_distance(n_x: Tensor, n_y: Tensor) -> Tensor:
    """Mahalanobis distance of widths from V1's mean, in standard deviations of its population."""
    x, y = (
        (width.double().log10() - mean) / std
        for width, mean, std in zip((n_x, n_y), V1_WIDTH_MEAN, V1_WIDTH_STD, strict=True)
    )
    r = V1_WIDTH_CORRELATION
    squared = (x.square() - 2 * r * x * y + y.square()) / (1 - r**2)
    return squared.clamp_min(0.0).sqrt()


def v1_radius(share: float) -> float:
    """The ``v1_distance`` within which this share of the population is found."""
    return math.sqrt(-2 * math.log1p(-share))


# -- drawing ----------------------------------------------------------------------------------


def _bank(
    n_filters: int, n_channels: int, n_dims: int, size: float, n_phases: int
) -> dict[str, Tensor]:
    n_pairs = math.ceil(n_filters / n_phases)
    # About twice as many directions as wavelengths, as in most published banks.
    n_wavelengths = n_pairs if n_dims == 1 else max(1, round(math.sqrt(n_pairs / 2)))
    n_directions = math.ceil(n_pairs / n_wavelengths)
    index = torch.arange(n_filters)
    pair = index // n_phases
    octave = (pair // n_directions).double() / max(n_wavelengths - 1, 1)
    longest = max(size, 3.0)
    wavelength = 3.0 * (longest / 3.0) ** octave
    if n_wavelengths == 1:
        wavelength = torch.full_like(octave, math.sqrt(3.0 * longest))
    orientation, elevation = _even_directions(pair % n_directions, n_directions, n_dims)
    return {
        "orientation": _column(orientation),
        "elevation": _column(elevation),
        "wavelength": _column(wavelength),
        "sigma": _column(sigma_from_bandwidth(1.0, wavelength).clamp_max(_largest_sigma(size))),
        "aspect_ratio": torch.ones(n_filters, 1, dtype=torch.float64),
        "phase": _column((index % n_phases).double() * (math.pi / 2)).expand(-1, n_channels),
        "amplitude": torch.ones(n_filters, n_channels, dtype=torch.float64),
    }


def _random(
    n_filters: int, n_channels: int, size: float, generator: torch.Generator | None
) -> dict[str, Tensor]:
    def uniform(low: float, high: float, columns: int = 1) -> Tensor:
        sample = torch.rand(n_filters, columns, dtype=torch.float64, generator=generator)
        return low + (high - low) * sample

    room = _largest_sigma(size)
    wavelength = 2 ** uniform(math.log2(_SHORTEST), math.log2(max(size, _SHORTEST)))
    sigma = sigma_from_bandwidth(2 ** uniform(-0.5, 1.0), wavelength).clamp_max(room)
    aspect_ratio = torch.maximum(2 ** uniform(-1.0, 0.0), sigma / room)
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


def _with_v1_shapes(
    fields: dict[str, Tensor], size: float, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """Random fields with the envelopes of V1 cells, and one phase and amplitude per filter."""
    first, second = torch.randn(
        2, len(fields["wavelength"]), 1, dtype=torch.float64, generator=generator
    )
    # Tails beyond all measured cells would give a filter without envelope or without end.
    n_x, n_y = v1_widths(first, second, limit=2.0)
    # In cortex the size of a receptive field varies with eccentricity; here the kernel's size sets
    # the scale: the drawn shape is kept and its wavelength is made to fit. Below 12 px the widest
    # would need wavelengths that alias; there the envelope shrinks, and keeps its aspect ratio.
    fit = _largest_sigma(size) / torch.maximum(n_x, n_y)
    wavelength = torch.minimum(fields["wavelength"], fit).clamp_min(_SHORTEST)
    return fields | {
        "wavelength": wavelength,
        "sigma": n_x * torch.minimum(wavelength, fit),
        "aspect_ratio": n_x / n_y,
        "phase": fields["phase"][:, :1].expand_as(fields["phase"]),
        "amplitude": torch.ones_like(fields["amplitude"]),
    }


def _largest_sigma(size: float) -> float:
    """Largest standard deviation that a kernel of this size holds: 1.5 of them to each side."""
    return max(size / 3.0, 0.3)


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
