"""Gabor functions on a pixel grid, and their derivatives in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gaborium.errors import as_sizes
from gaborium.params import Gabor, Gabor2d, Waveform, unit_vector


def gabor(params: Gabor, kernel_size: int | tuple[int, ...]) -> Tensor:
    """Sample Gabor functions on a pixel grid.

    The kernel is ``A exp(-u·P u / 2) cos(2π k·u + ψ)``, with ``u`` the pixel's offset from the
    centre of the envelope, ``k`` the wave vector and ``P`` the envelope's precision.

    Convention:
        - x runs along the last axis, y along the one before it (rows, downwards), z before that
        - ``orientation`` turns the wave vector from +x towards +y
        - even sizes are centred between pixels; nothing is normalised
        - the phase is that at the envelope's centre, wherever ``center`` puts it

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
    return combine(even, odd, wave), combine(even, odd, turned(wave))


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
    fields = params.as_dict()
    wave = params.waveform()
    even, odd = (part.flatten(-params.n_dims) for part in even_odd(wave, sizes))
    a, b = wave.even.unsqueeze(-1), wave.odd.unsqueeze(-1)
    kernel, slope = a * even - b * odd, -a * odd - b * even  # g, and dg/dφ
    of_envelope, of_phase = log_slopes(wave, sizes)
    angles = {name: fields[name] for name in params.angle_names}
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
    result["center"] = result["center"] + slope.unsqueeze(-2) * of_phase["center"]
    result["phase"] = slope
    result["amplitude"] = params.phase.cos().unsqueeze(-1) * even
    result["amplitude"] = result["amplitude"] - params.phase.sin().unsqueeze(-1) * odd
    return {name: result[name].unflatten(-1, sizes) for name in params.field_names()}


def even_odd(wave: Waveform, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Envelope times cosine and envelope times sine, each ``(*geometry batch, *sizes)``.

    The phase and the amplitude do not enter: every kernel of this geometry is a linear
    combination of the two, which ``combine`` makes.
    """
    r, along, beside = _on_grid(wave.direction, wave.center, sizes)
    inverse = wave.sigma.unsqueeze(-1).reciprocal()
    across = (beside * (wave.aspect_ratio.unsqueeze(-1) * inverse).unsqueeze(-2)).square().sum(-2)
    envelope = (-0.5 * ((along * inverse).square() + across)).exp()
    angle = (2 * math.pi) * (wave.wave_vector.unsqueeze(-1) * r).sum(-2)
    even, odd = envelope * angle.cos(), envelope * angle.sin()
    return even.unflatten(-1, sizes), odd.unflatten(-1, sizes)


def combine(even: Tensor, odd: Tensor, wave: Waveform) -> Tensor:
    """``A cos ψ`` parts of the even kernel less ``A sin ψ`` parts of the odd one."""
    shape = (...,) + (None,) * wave.center.shape[-1]
    return wave.even[shape] * even - wave.odd[shape] * odd


def turned(wave: Waveform) -> Waveform:
    """The same waves with ``ψ - π/2`` for ψ: cosines become sines."""
    return wave._replace(even=wave.odd, odd=-wave.even)


def offsets(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Pixels' offsets from the kernel's middle, ``(d, N)``: x first, though its axis is last."""
    axes = [torch.arange(n, dtype=dtype, device=device) - (n - 1) / 2 for n in sizes]
    return torch.stack([axis.flatten() for axis in reversed(torch.meshgrid(*axes, indexing="ij"))])


def log_slopes(
    wave: Waveform, sizes: tuple[int, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """How envelope and carrier change with the geometry, in closed form.

    The derivatives of log E and of φ by those fields of the waveform that they depend on, each
    ``(*batch, d, N)``, where d = 1 for ``sigma`` and ``aspect_ratio``. So ``E cos φ`` has the
    derivative ``E cos φ · d log E / ds - E sin φ · dφ/ds``, and ``E sin φ`` correspondingly. The
    direction is meant to turn only: its length stays 1.
    """
    r, along, beside = _on_grid(wave.direction, wave.center, sizes)
    along, across = along.unsqueeze(-2), beside.square().sum(-2, keepdim=True)  # x', |y'|²
    sigma, ratio = wave.sigma[..., None, None], wave.aspect_ratio[..., None, None]
    precision, squeeze = sigma.square().reciprocal(), ratio.square()
    of_envelope = {
        # x' changes by dn·r, and |y'|² by -2 x' of it.
        "direction": (squeeze - 1) * along * precision * r,
        "sigma": (along.square() + squeeze * across) * precision / sigma,
        "aspect_ratio": -ratio * across * precision,
        "center": (wave.direction.unsqueeze(-1) * along + squeeze * beside) * precision,
    }
    k = wave.wave_vector.unsqueeze(-1)
    return of_envelope, {"wave_vector": 2 * math.pi * r, "center": -2 * math.pi * k}


def _on_grid(n: Tensor, center: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels' offsets from the centre, their part along n (x'), and what is left (y').

    Shapes ``(*batch, d, N)``, ``(*batch, N)`` and ``(*batch, d, N)``. Sums over two or three
    components are written out: a matrix product would fall to half precision under autocast.
    """
    r = offsets(sizes, center.dtype, center.device) - center.unsqueeze(-1)
    along = (n.unsqueeze(-1) * r).sum(-2)
    return r, along, r - n.unsqueeze(-1) * along.unsqueeze(-2)


def direction_and_slopes(
    angles: dict[str, Tensor], like: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The unit wave vector ``(*batch, d)`` and its derivative by each angle."""
    if not angles:
        return torch.ones_like(like).unsqueeze(-1), {}
    n = unit_vector(list(angles.values()))
    cos, sin = angles["orientation"].cos(), angles["orientation"].sin()
    if len(angles) == 1:
        return n, {"orientation": torch.stack([-sin, cos], -1)}
    flat, steep = angles["elevation"].cos(), angles["elevation"].sin()
    return n, {
        "orientation": torch.stack([-flat * sin, flat * cos, torch.zeros_like(flat)], -1),
        "elevation": torch.stack([-steep * cos, -steep * sin, flat], -1),
    }


def orientation_basin(params: Gabor2d) -> Tensor:
    """How far from the truth a descent on θ may begin: ``λ / (√2 π σ/γ)`` rad, at most π/2.

    It is the half-width within which the squared error is convex in θ, on white input and all
    other parameters being right. Shape ``(*batch,)``.

    Example:
        >>> from gaborium import Gabor2d
        >>> long_stripes = Gabor2d.of(orientation=0.0, wavelength=6.0, sigma=3.0, aspect_ratio=0.5)
        >>> print(f"{orientation_basin(long_stripes).item():.3f}")
        0.225
    """
    along = params.sigma / params.aspect_ratio
    return (params.wavelength / (math.sqrt(2) * math.pi * along)).clamp_max(math.pi / 2)
