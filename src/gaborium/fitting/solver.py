"""Levenberg-Marquardt with variable projection, for a batch of Gabor geometries at once.

The kernel is ``Σ coefficient · basis(z)`` with a basis of two (the envelope times cosine and times
minus sine) per channel. For given geometry z the coefficients are a linear least-squares problem,
so the search runs over z alone: the residual is what the basis leaves of the target, and its
derivative (in Kaufman's approximation) is the part of dK/dz that the basis does not span.

Reference:
    Golub and Pereyra (1973), SIAM J. Numer. Anal. 10(2), doi:10.1137/0710036; Kaufman (1975),
    BIT 15, doi:10.1007/BF01932995.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gaborium.kernels import even_odd, log_slopes
from gaborium.params import RECORDS, Waveform, unit_vector


@dataclass(frozen=True)
class Family:
    """Which Gabor functions are searched: dimension, size, channels, and what is free.

    A geometry is a row z of ``(angles..., frequency, log σ, log γ, center...)``. The frequency may
    change its sign: nothing special happens at zero, where the wave becomes a blob.
    """

    sizes: tuple[int, ...]
    n_channels: int
    free_center: bool = False
    isotropic: bool = False

    @property
    def n_dims(self) -> int:
        """Dimensions of the kernels."""
        return len(self.sizes)

    @property
    def angle_names(self) -> tuple[str, ...]:
        """The angles of the record."""
        return RECORDS[self.n_dims].angle_names

    @property
    def columns(self) -> dict[str, int]:
        """Where each parameter's first column stands in z."""
        names = (*self.angle_names, "frequency", "sigma", "aspect_ratio", "center")
        return {name: i for i, name in enumerate(names)}

    @property
    def free(self) -> list[int]:
        """Columns of z that are searched."""
        columns = self.columns
        fixed = [] if self.n_dims > 1 and not self.isotropic else [columns["aspect_ratio"]]
        last = columns["center"] + (self.n_dims if self.free_center else 0)
        return [i for i in range(last) if i not in fixed]

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Legal range of each column; angles are not bounded."""
        largest = max(self.sizes)
        n = len(self.angle_names)
        low = [-math.inf] * n + [-0.5, math.log(0.2), math.log(0.05)]
        high = [math.inf] * n + [0.5, math.log(4.0 * largest), math.log(20.0)]
        middle = [max(size / 2, 0.5) for size in reversed(self.sizes)]
        return (
            torch.tensor([*low, *(-m for m in middle)]).to(like),
            torch.tensor([*high, *middle]).to(like),
        )


class Target(NamedTuple):
    """Targets in the metric's own coordinates: the misfit of kernels K is ``|y - R K|²``."""

    y: Tensor  # (*batch, groups, m)
    root: Tensor | None  # R, (m, channels · pixels), with one group; None: every channel a group


class Solution(NamedTuple):
    """Where the search ended, for every problem of a batch."""

    z: Tensor  # (batch, columns)
    cost: Tensor  # |y - R K|², (batch,)
    coefficients: Tensor  # A exp(iψ) per channel as (batch, channels, 2)
    converged: Tensor  # (batch,), bool
    n_iterations: Tensor  # (batch,)


def solve(
    target: Target, family: Family, start: Tensor, *, max_iterations: int, tolerance: float
) -> Solution:
    """Descend from ``start`` ``(batch, columns)``; finished problems leave the batch."""
    low, high = family.bounds(start)
    free = family.free
    z = start.clone()
    cost = misfit(target, family, z)
    scale = target.y.square().sum((-2, -1))
    damping = torch.full_like(cost, 1e-3)
    converged = torch.zeros_like(cost, dtype=torch.bool)
    n_iterations = torch.zeros_like(cost, dtype=torch.int64)
    active = torch.arange(len(z), device=z.device)
    rounding = 100 * torch.finfo(z.dtype).eps ** 2

    for _ in range(max_iterations):
        if len(active) == 0:
            break
        here = Target(target.y[active], target.root)
        residual, J, _ = linearise(here, family, z[active])
        gradient = (J * residual.unsqueeze(1)).sum((-2, -1))  # (batch, p)
        # A column that is pulled beyond its bound stands still; the others must not count on it.
        at = z[active][:, free]
        held = ((at <= low[free]) & (gradient < 0)) | ((at >= high[free]) & (gradient > 0))
        gradient = gradient.masked_fill(held, 0.0)
        flat = J.flatten(-2).masked_fill(held.unsqueeze(-1), 0.0)
        hessian = flat @ flat.mT
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        # Marquardt's scaling, with a floor for directions that move nothing.
        metric = diagonal + 1e-12 * diagonal.amax(-1, keepdim=True) + torch.finfo(z.dtype).tiny
        damped = hessian + torch.diag_embed(damping[active].unsqueeze(-1) * metric)
        # solve_ex: one singular problem must not stop the batch; its step is discarded below.
        step = torch.linalg.solve_ex(damped, gradient)[0]
        step = torch.nan_to_num(step)
        moved = z[active].clone()
        moved[:, free] += step
        moved = moved.clamp(low, high)
        new_cost = misfit(here, family, moved)

        old_cost = cost[active]
        better = new_cost < old_cost
        made = (moved - z[active])[:, free]
        size = (flat.mT @ made.unsqueeze(-1)).square().sum((-2, -1))  # of the kernel's change
        promised = 2 * (gradient * made).sum(-1) - size
        gain = torch.where(better, (old_cost - new_cost) / promised, 0.0)
        # The step changes the kernel by a share below the tolerance, or the fit is exact.
        arrived = size <= tolerance**2 * scale[active]
        arrived |= torch.where(better, new_cost, old_cost) <= rounding * scale[active]
        stuck = ~better & (damping[active] > 1e8)
        z[active] = torch.where(better.unsqueeze(-1), moved, z[active])
        cost[active] = torch.where(better, new_cost, old_cost)
        # Much less gained than promised: the path bends, and bolder steps would zigzag across it.
        change = torch.where(gain > 0.75, 0.2, torch.where(gain > 0.25, 1.0, 4.0))
        damping[active] = (damping[active] * change).clamp_min(1e-12)
        n_iterations[active] += 1
        converged[active] = arrived
        active = active[~arrived & ~stuck]

    coefficients = linearise(target, family, z)[2]
    return Solution(z, cost, coefficients, converged, n_iterations)


def misfit(target: Target, family: Family, z: Tensor) -> Tensor:
    """``|y - R K(z)|²`` with the best coefficients: ``(*batch,)``."""
    Q, _ = _orthonormal(_in_metric(target, family, _basis(family, z)))
    inside = (target.y @ Q.mT).square().sum((-2, -1))
    # By the residual and not by the difference of two squares, which would lose half the digits.
    residual = target.y - (target.y @ Q.mT) @ Q
    return torch.where(inside.isfinite(), residual.square().sum((-2, -1)), torch.inf)


def linearise(target: Target, family: Family, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Residual ``(B, groups, m)``, its projected slopes ``(B, p, groups, m)``, coefficients."""
    parts = _basis(family, z)  # (B, 2, N)
    Q, T = _orthonormal(_in_metric(target, family, parts))
    share = target.y @ Q.mT  # (B, groups, columns)
    residual = target.y - share @ Q
    coefficients = (share @ T).reshape(len(z), family.n_channels, 2)

    slopes = _kernel_slopes(family, z, parts, coefficients)  # (B, p, C, N)
    J = slopes if target.root is None else (slopes.flatten(-2) @ target.root.T).unsqueeze(-2)
    flat = J.flatten(1, 2)  # (B, p · groups, m)
    J = (flat - (flat @ Q.mT) @ Q).reshape(J.shape)
    return residual, J, coefficients


def geometry(family: Family, z: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Angles, frequency, sigma, aspect ratio and centre that rows of z mean."""
    columns = family.columns
    angles = {name: z[..., columns[name]] for name in family.angle_names}
    center = z[..., columns["center"] :]
    sigma, aspect_ratio = (z[..., columns[n]].exp() for n in ("sigma", "aspect_ratio"))
    return angles, z[..., columns["frequency"]], sigma, aspect_ratio, center


def _basis(family: Family, z: Tensor) -> Tensor:
    """Envelope times cosine and times minus sine: ``(*batch, 2, pixels)``."""
    angles, frequency, sigma, aspect_ratio, center = geometry(family, z)
    n = unit_vector(list(angles.values())) if angles else torch.ones_like(center)
    wave = Waveform(n, n * frequency.unsqueeze(-1), sigma, aspect_ratio, sigma, sigma, center)
    even, odd = even_odd(wave, family.sizes)
    return torch.stack([even.flatten(-family.n_dims), -odd.flatten(-family.n_dims)], -2)


def _in_metric(target: Target, family: Family, parts: Tensor) -> Tensor:
    """The basis in the target's coordinates: ``(*batch, 2 or 2 · channels, m)``."""
    if target.root is None:
        return parts
    root = target.root.unflatten(-1, (family.n_channels, -1))
    return torch.einsum("mcn,...in->...cim", root, parts).flatten(-3, -2)


def _orthonormal(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows ``Q = T · basis``, by Gram and Schmidt; dependent rows become zero.

    At zero frequency the sine is zero everywhere: the problem is still sound, with one row less.
    """
    Q, T = torch.zeros_like(basis), basis.new_zeros(*basis.shape[:-1], basis.shape[-2])
    for i in range(basis.shape[-2]):
        row = basis[..., i, :]
        part = (Q[..., :i, :] @ row.unsqueeze(-1)).squeeze(-1)
        rest = row - (part.unsqueeze(-2) @ Q[..., :i, :]).squeeze(-2)
        made = torch.zeros_like(T[..., i, :])
        made[..., i] = 1.0
        made = made - (part.unsqueeze(-2) @ T[..., :i, :]).squeeze(-2)
        norm = rest.norm(dim=-1, keepdim=True)
        sound = norm > 1e-7 * row.norm(dim=-1, keepdim=True) + 1e-30
        inverse = torch.where(sound, 1 / torch.where(sound, norm, 1.0), 0.0)
        Q[..., i, :], T[..., i, :] = rest * inverse, made * inverse
    return Q, T


def _kernel_slopes(family: Family, z: Tensor, parts: Tensor, coefficients: Tensor) -> Tensor:
    """dK/dz for the free columns at fixed coefficients: ``(B, p, channels, pixels)``."""
    angles, frequency, sigma, aspect_ratio, center = geometry(family, z)
    slopes = log_slopes(angles, frequency, sigma, aspect_ratio, center, family.sizes)
    kernel = coefficients @ parts  # (B, C, N)
    turned = torch.stack([parts[..., 1, :], -parts[..., 0, :]], -2)  # d parts / dφ
    slope = coefficients @ turned

    def chain(envelope: Tensor | float, phase: Tensor | float) -> Tensor:
        total = torch.zeros_like(kernel)
        if isinstance(envelope, Tensor):
            total = total + kernel * envelope.unsqueeze(-2)
        if isinstance(phase, Tensor):
            total = total + slope * phase.unsqueeze(-2)
        return total

    rows = [chain(*slopes[name]) for name in (*family.angle_names, "frequency")]
    for name, value in (("sigma", sigma), ("aspect_ratio", aspect_ratio)):
        rows.append(chain(*slopes[name]) * value[:, None, None])  # by the logarithm
    if family.free_center:
        moved, turned_by = slopes["center"]
        assert isinstance(moved, Tensor)
        assert isinstance(turned_by, Tensor)
        rows += [
            chain(moved[:, i], turned_by[:, i].expand_as(moved[:, i])) for i in range(family.n_dims)
        ]
    return torch.stack([rows[i] for i in family.free], 1)
