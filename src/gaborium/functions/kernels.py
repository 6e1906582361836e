"""Gabor functions on a pixel grid and in the frequency domain, and their derivatives."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from gaborium.functions.params import Gabor, Gabor2d, Waveform, unit_vector
from gaborium.support import as_sizes

# Standard deviations of the envelope that a kernel should hold to each side; below that its
# border cuts the envelope at more than a third of its height, and it is no Gabor any more.
ENOUGH_STDS = 1.5


def gabor(params: Gabor, kernel_size: int | tuple[int, ...]) -> Tensor:
    """Sample Gabor functions on a pixel grid.

    The kernel is ``A exp(-u·P u / 2) cos(2π k·u + ψ)``, with ``u`` the pixel's offset from the
    centre of the envelope, ``k`` the wave vector and ``P`` the envelope's precision.

    Convention:
        - x runs along the last axis, y along the one before it (rows, downwards), z before that
        - ``orientation`` turns the wave vector from +x towards +y
        - even sizes are centred between pixels; the kernel is not normalised
        - ``phase`` is the phase at the envelope's centre, wherever ``center`` puts it

    Args:
        params: Gabor functions of batch shape ``(*batch,)``.
        kernel_size: pixels along each axis, e.g. ``(height, width)``; one number serves all.

    Returns:
        Kernels of shape ``(*batch, *kernel_size)``, dtype and device of ``params``.

    Raises:
        ValueError: ``kernel_size`` does not have one entry per dimension of ``params``.

    Example:
        >>> from gaborium import Gabor2d
        >>> stripes = Gabor2d.of(orientation=0.0, wavelength=6.0, sigma=2.0)
        >>> print([round(v, 2) for v in gabor(stripes, kernel_size=(5, 5))[2].tolist()])
        [-0.3, 0.44, 1.0, 0.44, -0.3]

    Reference:
        Daugman (1985), J. Opt. Soc. Am. A 2(7), doi:10.1364/JOSAA.2.001160.
    """
    sizes = as_sizes("kernel_size", kernel_size, params.n_dims)
    return combine(*even_odd(params.waveform(), sizes), params.waveform())


def quadrature_pair(params: Gabor, kernel_size: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Sample each Gabor function and its partner a quarter of a period behind.

    Convention:
        - the first is ``gabor(params, kernel_size)``, a cosine of phase ψ
        - the second has phase ``ψ - π/2``: it is the sine where the first is the cosine, so that
          ``first + 1j * second`` is the complex Gabor function ``A E exp(i(2π k·u + ψ))``

    Args:
        params: Gabor functions of batch shape ``(*batch,)``.
        kernel_size: pixels along each axis; one number serves all.

    Returns:
        Two kernels of shape ``(*batch, *kernel_size)``.

    Example:
        >>> from gaborium import Gabor1d
        >>> even, odd = quadrature_pair(Gabor1d.of(wavelength=4.0, sigma=1.0), 3)
        >>> [abs(round(v, 2)) for v in even.tolist()], [round(v, 2) for v in odd.tolist()]
        ([0.0, 1.0, 0.0], [-0.61, 0.0, 0.61])
    """
    sizes = as_sizes("kernel_size", kernel_size, params.n_dims)
    wave = params.waveform()
    even, odd = even_odd(wave, sizes)
    return combine(even, odd, wave), combine(even, odd, quadrature_partner(wave))


def gabor_jacobian(params: Gabor, kernel_size: int | tuple[int, ...]) -> dict[str, Tensor]:
    """Derivatives of the kernels with respect to every field, in closed form.

    Args:
        params: Gabor functions of batch shape ``(*batch,)``.
        kernel_size: pixels along each axis; one number serves all.

    Returns:
        One tensor per field, under the field's name and in the record's order: shape
        ``(*batch, *kernel_size)``, in the kernel's unit per unit of the field. ``center`` has
        shape ``(*batch, d, *kernel_size)``, components x, y, z.

    Raises:
        ValueError: ``kernel_size`` does not have one entry per dimension of ``params``.

    Example:
        >>> from gaborium import Gabor2d
        >>> edge = Gabor2d.of(orientation=0.0, wavelength=6.0, sigma=2.0, phase=-1.5708)
        >>> slopes = gabor_jacobian(edge, (5, 5))
        >>> slopes["orientation"].shape, slopes["center"].shape
        (torch.Size([5, 5]), torch.Size([2, 5, 5]))
    """
    sizes = as_sizes("kernel_size", kernel_size, params.n_dims)
    params = params.expand()
    wave = params.waveform()
    even, odd = (part.flatten(-params.n_dims) for part in even_odd(wave, sizes))
    a, b = wave.even.unsqueeze(-1), wave.odd.unsqueeze(-1)
    kernel, slope = a * even - b * odd, -a * odd - b * even  # g, and dg/dφ
    of_envelope, of_phase = log_slopes(wave, sizes)
    angles = {name: getattr(params, name) for name in params.angle_names}
    frequency = params.frequency.unsqueeze(-1)
    result = {}
    for name, turn in direction_and_slopes(angles, params.frequency)[1].items():
        moved = turn.unsqueeze(-1)
        result[name] = kernel * (moved * of_envelope["direction"]).sum(-2)
        result[name] += slope * frequency * (moved * of_phase["wave_vector"]).sum(-2)
    along = (wave.direction.unsqueeze(-1) * of_phase["wave_vector"]).sum(-2)
    result["wavelength"] = -slope * along * frequency.square()
    for name in ("sigma", "aspect_ratio"):
        result[name] = kernel * of_envelope[name].squeeze(-2)
    result["center"] = kernel.unsqueeze(-2) * of_envelope["center"]
    result["center"] += slope.unsqueeze(-2) * of_phase["center"]
    result["phase"] = slope
    cos, sin = params.phase.cos().unsqueeze(-1), params.phase.sin().unsqueeze(-1)
    result["amplitude"] = cos * even - sin * odd
    return {name: result[name].unflatten(-1, sizes) for name in params.field_names()}


def orientation_basin(params: Gabor2d) -> Tensor:
    """How far from the truth a descent on θ may begin: ``λ / (√2 π σ/γ)`` rad, at most π/2.

    Within this distance the squared error is convex in θ, on white input and with all other
    parameters right. Shape ``(*batch,)``.
    """
    along = params.sigma / params.aspect_ratio
    return (params.wavelength / (math.sqrt(2) * math.pi * along)).clamp_max(math.pi / 2)


def suggest_kernel_size(params: Gabor, n_stds: float = 3.0) -> tuple[int, ...]:
    """Odd sizes, one per axis, that hold every envelope to ``n_stds`` standard deviations.

    Example:
        >>> from gaborium import Gabor2d
        >>> suggest_kernel_size(Gabor2d.of(wavelength=6.0, sigma=2.0, aspect_ratio=0.5))
        (25, 13)
    """
    middle = params.center.detach().abs()
    halves = (n_stds * envelope_widths(params) + middle - 1e-6).reshape(-1, params.n_dims).amax(0)
    return tuple(2 * half + 1 for half in reversed(halves.ceil().long().tolist()))


def warn_about_size(params: Gabor, kernel_size: tuple[int, ...], stacklevel: int) -> None:
    """Warn once when kernels of this size cut their envelopes or alias their waves."""
    # A kernel of one pixel along an axis is a slice, not a cut.
    room = [size / 2 if size > 1 else math.inf for size in reversed(kernel_size)]
    width = envelope_widths(params)
    cut = (width * (ENOUGH_STDS - 1e-6) > width.new_tensor(room)).any(-1)
    aliased = params.wavelength < 2
    advice = []
    if cut.any():
        advice.append(
            f"{int(cut.sum())} of {cut.numel()} Gabor functions do not fit kernel_size="
            f"{kernel_size}: their envelopes are cut above a third of their height. "
            f"Use kernel_size={suggest_kernel_size(params)} or smaller sigma, or expect "
            "biased parameters."
        )
    if aliased.any():
        advice.append(
            f"{int(aliased.sum())} of {aliased.numel()} wavelengths are below 2 px, where a "
            "wave looks like a longer one; use min_wavelength=2.0 to keep them above."
        )
    if advice:
        warnings.warn(" ".join(advice), stacklevel=stacklevel)


def envelope_widths(params: Gabor) -> Tensor:
    """Standard deviation of each envelope along each axis: ``(*batch, d)``, px, x first."""
    wave = params.detach().to(torch.float64).expand().waveform()
    along = wave.sigma.unsqueeze(-1)
    across = along / wave.aspect_ratio.unsqueeze(-1)
    share = wave.direction.square()
    return (share * along.square() + (1 - share) * across.square()).sqrt()


# -- frequency domain -------------------------------------------------------------------------


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
        >>> round(peak.real.item(), 3)  # half of σ √(2π); the other half is at -0.25
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
    """Standard deviation along the wave vector for a bandwidth in octaves.

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
    """Both as tensors; a number with a float64 tensor must not be rounded to float32."""
    dtype = torch.result_type(one, other)
    return torch.as_tensor(one, dtype=dtype), torch.as_tensor(other, dtype=dtype)


# -- the parts of a kernel --------------------------------------------------------------------


def even_odd(wave: Waveform, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Envelope times cosine and envelope times sine, each ``(*geometry batch, *sizes)``.

    They depend on neither phase nor amplitude: every kernel of this geometry is a linear
    combination of the two, see ``combine``.
    """
    r, along, across = _on_grid(wave.direction, wave.center, sizes)
    inverse = wave.sigma.unsqueeze(-1).reciprocal()
    squared = (across * (wave.aspect_ratio.unsqueeze(-1) * inverse).unsqueeze(-2)).square().sum(-2)
    envelope = (-0.5 * ((along * inverse).square() + squared)).exp()
    angle = (2 * math.pi) * (wave.wave_vector.unsqueeze(-1) * r).sum(-2)
    even, odd = envelope * angle.cos(), envelope * angle.sin()
    return even.unflatten(-1, sizes), odd.unflatten(-1, sizes)


def combine(even: Tensor, odd: Tensor, wave: Waveform) -> Tensor:
    """The kernel ``A cos ψ · even - A sin ψ · odd``."""
    shape = (...,) + (None,) * wave.center.shape[-1]
    return wave.even[shape] * even - wave.odd[shape] * odd


def quadrature_partner(wave: Waveform) -> Waveform:
    """The same waves with ``ψ - π/2`` for ψ: cosines become sines."""
    return wave._replace(even=wave.odd, odd=-wave.even)


def inner_products(kernels: Tensor, others: Tensor) -> Tensor:
    """Inner product of each filter ``(F, members, n)`` with each ``(G, members, n)``: ``(F, G)``.

    Two members are a quadrature pair; pairs are compared at the phase at which they agree best.
    """
    products = kernels.flatten(1) @ others.flatten(1).T
    if kernels.shape[1] == 2:
        (even, odd), (other_even, other_odd) = kernels.unbind(1), others.unbind(1)
        products = torch.hypot(products, even @ other_odd.T - odd @ other_even.T)
    return products


def with_unit_amplitude(wave: Waveform) -> Waveform:
    """The same waves with amplitude 1; a silent one has no phase, and gets 0."""
    squared = wave.even.square() + wave.odd.square()
    silent = squared < 1e-24
    scale = torch.where(silent, torch.ones_like(squared), squared).rsqrt()
    return wave._replace(
        even=torch.where(silent, 1.0, wave.even * scale),
        odd=torch.where(silent, 0.0, wave.odd * scale),
    )


def offsets(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Pixels' offsets from the kernel's middle, ``(d, N)``: x first, though its axis is last."""
    axes = [torch.arange(n, dtype=dtype, device=device) - (n - 1) / 2 for n in sizes]
    return torch.stack([axis.flatten() for axis in reversed(torch.meshgrid(*axes, indexing="ij"))])


def log_slopes(
    wave: Waveform, sizes: tuple[int, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Derivatives of log E and of φ with respect to the waveform's fields, in closed form.

    Each has shape ``(*batch, d, N)``, with d = 1 for ``sigma`` and ``aspect_ratio``. ``E cos φ``
    has the derivative ``E cos φ · d log E / ds - E sin φ · dφ/ds``, and ``E sin φ`` accordingly.
    The direction is meant to turn only: its length stays 1.
    """
    r, along, across = _on_grid(wave.direction, wave.center, sizes)
    along, squared = along.unsqueeze(-2), across.square().sum(-2, keepdim=True)  # x', |y'|²
    sigma, ratio = wave.sigma[..., None, None], wave.aspect_ratio[..., None, None]
    precision, squeeze = sigma.square().reciprocal(), ratio.square()
    of_envelope = {
        # x' changes by dn·r, and |y'|² by -2 x' dn·r.
        "direction": (squeeze - 1) * along * precision * r,
        "sigma": (along.square() + squeeze * squared) * precision / sigma,
        "aspect_ratio": -ratio * squared * precision,
        "center": (wave.direction.unsqueeze(-1) * along + squeeze * across) * precision,
    }
    k = wave.wave_vector.unsqueeze(-1)
    return of_envelope, {"wave_vector": 2 * math.pi * r, "center": -2 * math.pi * k}


def direction_and_slopes(
    angles: dict[str, Tensor], like: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The unit wave vector ``(*batch, d)`` and its derivative with respect to each angle."""
    n = unit_vector(list(angles.values()), like)
    if not angles:
        return n, {}
    cos, sin = angles["orientation"].cos(), angles["orientation"].sin()
    if len(angles) == 1:
        return n, {"orientation": torch.stack([-sin, cos], -1)}
    flat, steep = angles["elevation"].cos(), angles["elevation"].sin()
    return n, {
        "orientation": torch.stack([-flat * sin, flat * cos, torch.zeros_like(flat)], -1),
        "elevation": torch.stack([-steep * cos, -steep * sin, flat], -1),
    }


def _on_grid(n: Tensor, center: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels' offsets from the centre, their part along n (x') and the rest across it (y').

    Shapes ``(*batch, d, N)``, ``(*batch, N)`` and ``(*batch, d, N)``. Sums over two or three
    components are written out: a matrix product would fall to half precision under autocast.
    """
    r = offsets(sizes, center.dtype, center.device) - center.unsqueeze(-1)
    along = (n.unsqueeze(-1) * r).sum(-2)
    return r, along, r - n.unsqueeze(-1) * along.unsqueeze(-2)
