"""Levenberg-Marquardt with variable projection, for a batch of Gabor geometries at once.

The kernel is ``Σ coefficient · basis(z)`` with a basis of two (the envelope times cosine and times
minus sine) per channel. For given geometry z the coefficients are a linear least-squares problem,
so the search runs over z alone: the residual is what the basis leaves of the target, and its
derivative (in Kaufman's approximation) is the part of dK/dz that the basis does not span.

The logarithm of the envelope is a quadratic polynomial of the pixel's offset, and the carrier's
angle a linear one. Their values at all pixels are therefore products of a few numbers per geometry
with one matrix of monomials, and so are their derivatives: that is what makes it fast.

Reference:
    Golub and Pereyra (1973), SIAM J. Numer. Anal. 10(2), doi:10.1137/0710036; Kaufman (1975),
    BIT 15, doi:10.1007/BF01932995; Moré (1978), Numerical Analysis, Lecture Notes in Mathematics
    630, doi:10.1007/BFb0067700.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gaborium.kernels import direction_and_slopes, offsets
from gaborium.params import RECORDS


@dataclass(frozen=True)
class Family:
    """Which Gabor functions are searched: dimension, size, channels, and what is free.

    A geometry is a row z of ``(angles..., frequency, log σ, log γ, center...)``. The frequency may
    change its sign: nothing special happens at zero, where the wave becomes a blob.

    Args:
        sizes: pixels along each axis.
        n_channels: kernels that share a geometry.
        free_center: whether the envelope's centre is searched.
        isotropic: whether the aspect ratio stays at 1.
        offset: whether a constant is added to every kernel, of no interest but free.
        limits: narrower ranges of columns, ``((name, lowest, highest), ...)`` in the units of z.
        still: the limit of frequency zero instead, where the pair is the envelope and the envelope
            times the offset along the wave: a blob or an edge, no wave. The frequency is ignored.
    """

    sizes: tuple[int, ...]
    n_channels: int
    free_center: bool = False
    isotropic: bool = False
    offset: bool = False
    limits: tuple[tuple[str, float, float], ...] = ()
    still: bool = False

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
        fixed += [columns["frequency"]] if self.still else []
        last = columns["center"] + (self.n_dims if self.free_center else 0)
        return [i for i in range(last) if i not in fixed]

    @property
    def n_coefficients(self) -> int:
        """Numbers per channel that multiply kernels, and the offset."""
        return 2 + self.offset

    @property
    def n_parameters(self) -> int:
        """Numbers that a fit chooses: geometry and coefficients."""
        return len(self.free) + self.n_coefficients * self.n_channels

    def at(self, z: Tensor) -> _Pair:
        """Its kernels for geometries ``(batch, columns)``."""
        return _Pair.at(self, z)

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Legal range of each column; angles are not bounded."""
        largest = max(self.sizes)
        columns, n = self.columns, len(self.angle_names)
        low = [-math.inf] * n + [-0.5, math.log(0.2), math.log(0.05)]
        high = [math.inf] * n + [0.5, math.log(4.0 * largest), math.log(20.0)]
        middle = [max(size / 2, 0.5) for size in reversed(self.sizes)]
        low, high = [*low, *(-m for m in middle)], [*high, *middle]
        for name, lowest, highest in self.limits:
            for i in range(columns[name], len(low) if name == "center" else columns[name] + 1):
                low[i], high[i] = max(low[i], lowest), min(high[i], highest)
        bounds = torch.tensor([low, high], dtype=torch.float64).to(like)
        return bounds[0], bounds[1]


class Sampled(Protocol):
    """The kernels of a model at a batch of geometries, and how they move."""

    @property
    def parts(self) -> Tensor:
        """The kernels that coefficients combine, ``(batch, parts, pixels)``."""
        ...

    def moves(self, coefficients: Tensor) -> Tensor:
        """Derivatives of their combinations by each free column.

        ``(batch, channels, parts or more)`` coefficients give ``(batch, channels, p, pixels)``.
        """
        ...


class Model(Protocol):
    """What can be searched: kernels that depend on rows of z, and linearly on coefficients."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Pixels along each axis."""
        ...

    @property
    def n_channels(self) -> int:
        """Kernels that share a geometry."""
        ...

    @property
    def offset(self) -> bool:
        """Whether a constant is added to every kernel, of no interest but free."""
        ...

    @property
    def free(self) -> list[int]:
        """Columns of z that are searched."""
        ...

    @property
    def n_coefficients(self) -> int:
        """Numbers per channel that multiply kernels, and the offset."""
        ...

    @property
    def n_parameters(self) -> int:
        """Numbers that a fit chooses: geometry and coefficients."""
        ...

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Legal range of each column."""
        ...

    def at(self, z: Tensor) -> Sampled:
        """Its kernels for geometries ``(batch, columns)``."""
        ...


class Target(NamedTuple):
    """Targets in the metric's own coordinates: the misfit of kernels K is ``|y - R K|²``.

    The metric is one matrix for all, or a weight per pixel, or none: every pixel counts alike.
    """

    y: Tensor  # (*batch, groups, m); with a root one group, otherwise every channel is one
    root: Tensor | None = None  # R, (m, channels · pixels)
    weight: Tensor | None = None  # square roots of weights, (batch or 1, channels or 1, pixels)

    def pick(self, index: Tensor) -> Target:
        """The targets number ``index``."""
        weight = self.weight
        if weight is not None and len(weight) > 1:
            weight = weight[index]
        return Target(self.y[index], self.root, weight)

    def to(self, dtype: torch.dtype) -> Target:
        """The targets in another precision."""
        root, weight = (value if value is None else value.to(dtype) for value in self[1:])
        return Target(self.y.to(dtype), root, weight)

    def repeat(self, n: int) -> Target:
        """Every target ``n`` times in a row."""
        return self.pick(torch.arange(len(self.y), device=self.y.device).repeat_interleave(n))

    def n_data(self) -> Tensor:
        """How many numbers count in each target: ``(batch,)``."""
        n = torch.full_like(self.y[:, 0, 0], self.y[0].numel())
        return n if self.weight is None else (self.weight > 0).sum((-2, -1)).to(n).expand_as(n)

    def see(self, rows: Tensor) -> Tensor:
        """Kernels ``(batch, channels or 1, r, pixels)`` in the metric's coordinates.

        Without a root, each channel for itself; with one, every row of every channel apart:
        ``(batch, 1, channels · r, m)``.
        """
        if self.root is not None:
            root = self.root.unflatten(-1, (-1, rows.shape[-1]))
            return torch.einsum("mcn,bcrn->bcrm", root, rows.expand(-1, root.shape[1], -1, -1))
        return rows if self.weight is None else rows * self.weight.unsqueeze(-2)

    def seen_from(self, y: Tensor, n_channels: int) -> Tensor:
        """Inner products of ``y`` ``(batch, groups, m)`` with every pixel of every channel."""
        if self.root is not None:
            return (y @ self.root).reshape(len(y), n_channels, -1)
        return y if self.weight is None else y * self.weight


class Solution(NamedTuple):
    """Where the search ended, for every problem of a batch."""

    z: Tensor  # (batch, columns)
    cost: Tensor  # |y - R K|², (batch,)
    coefficients: Tensor  # (batch, channels, 2 or as many), and the offset where there is one
    converged: Tensor  # (batch,), bool
    n_iterations: Tensor  # (batch,)

    def pick(self, index: Tensor | tuple[Tensor, Tensor]) -> Solution:
        """The ends at ``index``."""
        return Solution(*(value[index] for value in self))

    def put(self, index: Tensor, part: Solution) -> Solution:
        """These with ``part`` in the places ``index``."""
        return Solution(*(a.index_copy(0, index, b) for a, b in zip(self, part, strict=True)))


class _State(NamedTuple):
    """A geometry of every problem, and what the misfit looks like there."""

    z: Tensor  # (batch, columns)
    cost: Tensor  # (batch,)
    gradient: Tensor  # (batch, p): half the misfit's, with its sign turned
    hessian: Tensor  # (batch, p, p), by Gauss and Newton
    coefficients: Tensor  # (batch, channels, coefficients)

    def pick(self, index: Tensor) -> _State:
        return _State(*(value[index] for value in self))

    def or_else(self, other: _State, mask: Tensor) -> _State:
        """These where ``mask`` holds, otherwise the others."""
        return _State(
            *(
                torch.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)
                for a, b in zip(self, other, strict=True)
            )
        )


def solve(
    target: Target,
    model: Model,
    start: Tensor,
    *,
    max_iterations: int,
    tolerance: float,
    damping: float,
) -> Solution:
    """Descend from ``start`` ``(batch, columns)``; finished problems leave the batch.

    ``damping`` is that of the first step, as a share of the Hessian's diagonal.
    """
    low, high = model.bounds(start)
    free = model.free
    eps = torch.finfo(start.dtype).eps
    tolerance = max(tolerance, 10 * eps)
    size_of = target.y.square().sum((-2, -1))

    state = _look(target, model, start.clamp(low, high))
    ends = Solution(
        *(state.z, state.cost, state.coefficients),
        converged=torch.zeros_like(state.cost, dtype=torch.bool),
        n_iterations=torch.zeros_like(state.cost, dtype=torch.int64),
    )
    number = torch.arange(len(start), device=start.device)
    damp = torch.full_like(state.cost, damping)
    scale = torch.zeros_like(state.gradient)
    is_open = torch.ones_like(ends.converged)
    for _ in range(max_iterations):
        # A column that is pulled beyond its bound stands still; the others must not count on it.
        at = state.z[:, free]
        held = ((at <= low[free]) & (state.gradient < 0)) | (
            (at >= high[free]) & (state.gradient > 0)
        )
        gradient = state.gradient.masked_fill(held, 0.0)
        hessian = state.hessian.masked_fill(held.unsqueeze(-1) | held.unsqueeze(-2), 0.0)
        # Marquardt's scaling, which as Moré has it never shrinks: towards frequency zero a wave
        # moves less and less, and would need a damping that brings all others to a halt. With a
        # floor for directions that move nothing.
        scale = torch.maximum(scale, hessian.diagonal(dim1=-2, dim2=-1))
        floor = 1e4 * eps * scale.amax(-1, keepdim=True) + torch.finfo(start.dtype).tiny
        damped = hessian + torch.diag_embed(damp.unsqueeze(-1) * (scale + floor))
        # solve_ex: one singular problem must not stop the batch; its step is discarded below.
        step = torch.nan_to_num(torch.linalg.solve_ex(damped, gradient)[0])
        moved = state.z.clone()
        moved[:, free] += step
        moved = moved.clamp(low, high)
        new = _look(target, model, moved)

        better = is_open & (new.cost < state.cost)
        made = (moved - state.z)[:, free].unsqueeze(-1)
        size = (made.mT @ hessian @ made).flatten()  # of the kernel's change, squared
        promised = 2 * (gradient * made.squeeze(-1)).sum(-1) - size
        gain = torch.where(better, (state.cost - new.cost) / promised, 0.0)
        state = new.or_else(state, better)
        # The step changes the kernel by a share below the tolerance, or the fit is exact.
        arrived = size <= tolerance**2 * size_of
        arrived |= state.cost <= 100 * eps**2 * size_of
        stuck = ~better & (damp > 1e8)
        # Much less gained than promised: the path bends, and bolder steps would zigzag across it.
        change = torch.where(gain > 0.75, 0.2, torch.where(gain > 0.25, 1.0, 4.0))
        damp = (damp * change).clamp_min(1e-12)

        ends.n_iterations[number[is_open]] += 1
        ends.converged[number[is_open & arrived]] = True
        is_open = is_open & ~arrived & ~stuck
        n_open = int(is_open.sum())
        # Cutting the batch costs a copy of it: worth it when a part of it is finished.
        if n_open < 0.8 * len(number):
            _keep(ends, number, state)
            if n_open == 0:
                return ends
            rest = is_open.nonzero().flatten()
            number, size_of, is_open = number[rest], size_of[rest], is_open[rest]
            target, state = target.pick(rest), state.pick(rest)
            damp, scale = damp[rest], scale[rest]
    _keep(ends, number, state)
    return ends


def _keep(ends: Solution, number: Tensor, state: _State) -> None:
    ends.z[number], ends.cost[number] = state.z, state.cost
    ends.coefficients[number] = state.coefficients


def misfit(target: Target, model: Model, z: Tensor) -> Tensor:
    """``|y - R K(z)|²`` with the best coefficients, for ``(batch, columns)``: ``(batch,)``."""
    cost = residual(target, model, z).square().sum((-2, -1))
    return torch.where(cost.isfinite(), cost, torch.inf)


def residual(target: Target, model: Model, z: Tensor) -> Tensor:
    """``y - R K(z)`` with the best coefficients: ``(batch, groups, m)``."""
    return _project(target.y, _basis(target, model, model.at(z).parts))[1]


def without_offset(target: Target, model: Model) -> Tensor:
    """What the best constants leave of the targets, where the model has any."""
    if not model.offset:
        return target.y
    constant = target.y.new_ones(1, 1, math.prod(model.sizes))
    return _project(target.y, _columns(target, constant))[1]


def kernels_of(model: Model, z: Tensor, coefficients: Tensor) -> Tensor:
    """The kernels themselves, without offset: ``(batch, channels, pixels)``."""
    parts = model.at(z).parts
    return coefficients[..., : parts.shape[1]] @ parts


def linearise(target: Target, model: Model, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Residual ``(batch, groups, m)``, projected slopes ``(batch, groups, p, m)``, coefficients.

    The residual of ``z + dz`` is that of z less ``dz · slopes``, to first order.
    """
    sampled = model.at(z)
    coefficients, left, rows = _project(target.y, _basis(target, model, sampled.parts))
    of_channels = coefficients.reshape(len(z), model.n_channels, -1)
    J = sampled.moves(of_channels)
    if target.root is not None:  # each row is a kernel of all channels
        J = (J.transpose(1, 2).flatten(-2) @ target.root.T).unsqueeze(1)
    elif target.weight is not None:
        J = J * target.weight.unsqueeze(-2)
    J -= (J @ rows.mT) @ rows
    return left, J, of_channels


def _look(target: Target, model: Model, z: Tensor) -> _State:
    left, J, coefficients = linearise(target, model, z)
    cost = left.square().sum((-2, -1))
    gradient = (J * left.unsqueeze(-2)).sum((1, -1))
    hessian = (J @ J.mT).sum(1)
    return _State(z, torch.where(cost.isfinite(), cost, torch.inf), gradient, hessian, coefficients)


def _basis(target: Target, model: Model, parts: Tensor) -> Tensor:
    """What coefficients multiply, in the metric: ``(batch, groups or 1, columns, m)``."""
    if model.offset:
        parts = torch.cat([parts, torch.ones_like(parts[:, :1])], 1)
    return _columns(target, parts)


def _columns(target: Target, rows: Tensor) -> Tensor:
    """Kernels that all channels have, ``(batch, r, pixels)``, as columns of the problem."""
    seen = target.see(rows.unsqueeze(1))
    return seen if target.root is None else seen.flatten(1, 2).unsqueeze(1)


def _project(y: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least-squares coefficients ``(batch, groups, c)``, what they leave, orthonormal rows.

    Columns that depend on others are left out: at zero frequency the sine is zero everywhere, and
    the problem is still sound, with one column less.
    """
    rows, made = _orthonormal(basis)
    shares = (rows * y.unsqueeze(-2)).sum(-1, keepdim=True)  # (batch, groups, c, 1)
    return (shares * made).sum(-2), y - (shares * rows).sum(-2), rows


def _orthonormal(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that span those of ``basis``, and the matrix that makes them of it.

    By Gram and Schmidt, twice for each row. The inverse of the rows' inner products would lose
    twice the digits where a slow wave's cosine and sine, or one's on the pixels of a thin line,
    are nearly the same: searches that lead there would creep.
    """
    size = torch.linalg.vector_norm(basis, dim=-1, keepdim=True)
    # Nothing to speak of: beside the others, or because the envelope lies outside of the kernel.
    least = torch.finfo(basis.dtype).tiny ** 0.25
    silent = size <= (1e-10 * size.amax(-2, keepdim=True)).clamp_min(least)
    scale = size.masked_fill(silent, torch.inf).reciprocal()
    rows, made = basis * scale, torch.diag_embed(scale.squeeze(-1))
    for i in range(1, basis.shape[-2]):
        before, row = rows[..., :i, :], rows[..., i, :]
        for _ in range(2):
            # Products of single rows: sums are several times faster than batches of matrices.
            shares = (before * row.unsqueeze(-2)).sum(-1, keepdim=True)
            row -= (shares * before).sum(-2)
            made[..., i, :] -= (shares * made[..., :i, :]).sum(-2)
        length = torch.linalg.vector_norm(row, dim=-1, keepdim=True)
        dependent = length <= torch.finfo(basis.dtype).eps ** 0.5
        scale = length.masked_fill(dependent, torch.inf).reciprocal()
        row *= scale
        made[..., i, :] *= scale
    return rows, made


class _Pair(NamedTuple):
    """The two kernels that a geometry combines, and what their derivatives are made of."""

    family: Family
    parts: Tensor  # envelope times cosine and times minus sine, (batch, 2, pixels)
    z: Tensor
    n: Tensor  # direction of the wave, (batch, d)
    turns: Tensor  # its derivatives by the angles, (batch, angles, d)
    outer: Tensor  # n nᵀ, (batch, d, d)
    precision: Tensor  # P of the envelope exp(-u·P u / 2), (batch, d, d)

    @classmethod
    def at(cls, family: Family, z: Tensor) -> _Pair:
        """Sample them; the carrier's phase counts from the kernel's middle."""
        columns = family.columns
        angles = {name: z[:, columns[name]] for name in family.angle_names}
        frequency = z[:, columns["frequency"]]
        n, turns = direction_and_slopes(angles, frequency)
        across = torch.stack([*turns.values()], 1) if turns else n.new_zeros(len(z), 0, 1)
        outer = n.unsqueeze(-1) * n.unsqueeze(-2)
        ratio = (2 * z[:, columns["aspect_ratio"]]).exp()
        scale = (-2 * z[:, columns["sigma"]]).exp()[:, None, None]
        one = torch.eye(family.n_dims, dtype=z.dtype, device=z.device)
        precision = scale * (outer + ratio[:, None, None] * (one - outer))

        monomials = _monomials(family.sizes, z.dtype, z.device)
        center = z[:, columns["center"] :]
        envelope = (_quadratic(precision, center) @ monomials).exp_()
        rate = torch.ones_like(frequency) if family.still else 2 * math.pi * frequency
        angle = (rate.unsqueeze(-1) * n) @ monomials[1 : 1 + family.n_dims]
        if family.still:
            parts = torch.stack([torch.ones_like(angle), angle.neg_()], 1)
        else:
            parts = torch.stack([angle.cos(), angle.sin().neg_()], 1)
        parts *= envelope.unsqueeze(1)
        return cls(family, parts, z, n, across, outer, precision)

    def moves(self, coefficients: Tensor) -> Tensor:
        """Derivatives of combinations by each free column: ``(batch, channels, p, pixels)``."""
        even, odd = coefficients[..., 0, None], coefficients[..., 1, None]
        cosine, minus_sine = self.parts[:, :1], self.parts[:, 1:2]
        kernel = even * cosine + odd * minus_sine  # (batch, channels, pixels)
        slope = -odd * cosine  # by the carrier's angle
        if not self.family.still:
            slope += even * minus_sine
        of_envelope, of_angle = self._slopes()
        J = kernel.unsqueeze(-2) * of_envelope.unsqueeze(1)
        J[:, :, : of_angle.shape[1]].addcmul_(slope.unsqueeze(-2), of_angle.unsqueeze(1))
        return J

    def _slopes(self) -> tuple[Tensor, Tensor]:
        """How log envelope ``(batch, p, pixels)`` and angle ``(batch, ≤ p, pixels)`` move.

        By each free column; of the angle only the first ones, which have an influence on it.
        """
        family = self.family
        columns, d = family.columns, family.n_dims
        z, n, turns, precision = self.z, self.n, self.turns, self.precision
        center = z[:, columns["center"] :]
        frequency = z[:, columns["frequency"], None]
        monomials = _monomials(family.sizes, z.dtype, z.device)
        ratio = (2 * z[:, columns["aspect_ratio"]]).exp()
        scale = (-2 * z[:, columns["sigma"]]).exp()

        squeezed = (scale * (1 - ratio))[:, None, None, None]
        tilt = turns.unsqueeze(-1) * n[:, None, None, :]
        bends = [squeezed * (tilt + tilt.mT)]
        if not family.still:
            bends.append(torch.zeros_like(precision).unsqueeze(1))  # by the frequency
        bends.append(-2 * precision.unsqueeze(1))
        if columns["aspect_ratio"] in family.free:
            bends.append((2 * (precision - scale[:, None, None] * self.outer)).unsqueeze(1))
        rows = [_quadratic(torch.cat(bends, 1), center.unsqueeze(1))]
        if family.free_center:
            moved = rows[0].new_zeros(len(z), d, len(monomials))
            moved[:, :, 0] = -(precision @ center.unsqueeze(-1)).squeeze(-1)
            moved[:, :, 1 : 1 + d] = precision
            rows.append(moved)
        waves = turns.expand(-1, -1, d)
        if not family.still:
            waves = 2 * math.pi * torch.cat([frequency.unsqueeze(-1) * waves, n.unsqueeze(1)], 1)
        return torch.cat(rows, 1) @ monomials, waves @ monomials[1 : 1 + d]


@lru_cache(maxsize=32)
def _monomials(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """1, x, y, xx, xy, yy (and so on) of every pixel's offset: ``(monomials, pixels)``."""
    u = offsets(sizes, dtype, device)
    d = len(u)
    products = [u[i] * u[j] for i in range(d) for j in range(i, d)]
    return torch.stack([torch.ones_like(u[0]), *u, *products])


def _quadratic(P: Tensor, center: Tensor) -> Tensor:
    """Coefficients of ``-½ (u - c)ᵀ P (u - c)`` for the monomials: ``(*batch, monomials)``."""
    d = P.shape[-1]
    pulled = (P @ center.unsqueeze(-1)).squeeze(-1)
    squares = [(-0.5 if i == j else -1.0) * P[..., i, j] for i in range(d) for j in range(i, d)]
    constant = -0.5 * (pulled * center).sum(-1)
    return torch.stack([constant, *pulled.unbind(-1), *squares], -1)
