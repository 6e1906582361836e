"""Levenberg-Marquardt with variable projection, for a batch of geometries at once.

The kernel is ``Σ coefficient · basis(z)``. For a given geometry z the coefficients are a linear
least-squares problem, so the search runs over z alone. The residual is the part of the target that
the basis does not span, and its derivative (in Kaufman's approximation) the part of dK/dz that the
basis does not span.

Reference:
    Golub and Pereyra (1973), SIAM J. Numer. Anal. 10(2), doi:10.1137/0710036; Kaufman (1975),
    BIT 15, doi:10.1007/BF01932995; Moré (1978), Numerical Analysis, Lecture Notes in Mathematics
    630, doi:10.1007/BFb0067700.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gaborium.fitting.model import Model


class Target(NamedTuple):
    """Targets in the coordinates of a metric, where the misfit of kernels K is ``|y - R K|²``.

    The metric is one matrix for all, or a weight per pixel; by default all pixels count the same.
    """

    y: Tensor  # (*batch, groups, m); one group with a root, otherwise one per channel
    root: Tensor | None = None  # R, (m, channels · pixels)
    weight: Tensor | None = None  # square roots of weights, (batch or 1, channels or 1, pixels)

    def select(self, index: Tensor) -> Target:
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
        return self.select(torch.arange(len(self.y), device=self.y.device).repeat_interleave(n))

    def power(self) -> Tensor:
        """``|y|²``, ``(batch,)``."""
        return self.y.square().sum((-2, -1))

    def n_data(self) -> Tensor:
        """How many numbers count in each target, ``(batch,)``."""
        n = torch.full_like(self.y[:, 0, 0], self.y[0].numel())
        return n if self.weight is None else (self.weight > 0).sum((-2, -1)).to(n).expand_as(n)

    def apply_metric(self, rows: Tensor) -> Tensor:
        """``R K`` of kernels ``(batch, channels or 1, r, pixels)``.

        Without a root the shape stays; with one, every row of every channel is separate:
        ``(batch, 1, channels · r, m)``.
        """
        if self.root is not None:
            root = self.root.unflatten(-1, (-1, rows.shape[-1]))
            seen = torch.einsum("mcn,bcrn->bcrm", root, rows.expand(-1, root.shape[1], -1, -1))
            return seen.flatten(1, 2).unsqueeze(1)
        return rows if self.weight is None else rows * self.weight.unsqueeze(-2)

    def project(self, y: Tensor, n_channels: int) -> Tensor:
        """``Rᵀ y`` of ``(batch, groups, m)``: ``(batch, channels, pixels)``."""
        if self.root is not None:
            return (y @ self.root).reshape(len(y), n_channels, -1)
        return y if self.weight is None else y * self.weight


class Solution(NamedTuple):
    """Where a search ended, for every problem of a batch."""

    z: Tensor  # (batch, columns)
    cost: Tensor  # |y - R K|², (batch,)
    coefficients: Tensor  # (batch, channels, n_coefficients)
    converged: Tensor  # (batch,), bool
    n_iterations: Tensor  # (batch,)

    def map(self, change: Callable[[Tensor], Tensor]) -> Solution:
        """The ends with every tensor changed."""
        return Solution(*map(change, self))

    def select(self, index: Tensor | tuple[Tensor, Tensor]) -> Solution:
        """The ends at ``index``."""
        return self.map(lambda value: value[index])

    def scatter(self, index: Tensor, part: Solution) -> Solution:
        """These ends, with ``part`` at ``index``."""
        return Solution(*(a.index_copy(0, index, b) for a, b in zip(self, part, strict=True)))


class _State(NamedTuple):
    """A geometry of every problem, and the misfit's derivatives there."""

    z: Tensor  # (batch, columns)
    cost: Tensor  # (batch,)
    gradient: Tensor  # (batch, p): minus half the misfit's gradient
    hessian: Tensor  # (batch, p, p), by Gauss and Newton
    coefficients: Tensor  # (batch, channels, n_coefficients)


def solve(
    target: Target,
    model: Model,
    start: Tensor,
    max_iterations: int,
    tolerance: float,
    damping: float,
) -> Solution:
    """Minimise the misfit from ``start`` ``(batch, columns)``; finished problems leave the batch.

    A search has converged when a step changes the kernel by a share less than ``tolerance``.
    ``damping`` is the first step's, as a share of the Hessian's diagonal.
    """
    low, high = model.bounds(start)
    free = model.free
    eps = torch.finfo(start.dtype).eps
    tolerance = max(tolerance, 10 * eps)
    power = target.power()

    state = _state_at(target, model, start.clamp(low, high))
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
        # A column that is pulled beyond its bound stays there, and the step must not count on it.
        at = state.z[:, free]
        held = ((at <= low[free]) & (state.gradient < 0)) | (
            (at >= high[free]) & (state.gradient > 0)
        )
        gradient = state.gradient.masked_fill(held, 0.0)
        hessian = state.hessian.masked_fill(held.unsqueeze(-1) | held.unsqueeze(-2), 0.0)
        # Marquardt's scaling, which never shrinks (Moré): towards frequency zero a wave changes
        # less and less, and would need a damping that stops all other columns. The floor is for
        # directions without effect.
        scale = torch.maximum(scale, hessian.diagonal(dim1=-2, dim2=-1))
        floor = 1e4 * eps * scale.amax(-1, keepdim=True) + torch.finfo(start.dtype).tiny
        damped = hessian + torch.diag_embed(damp.unsqueeze(-1) * (scale + floor))
        # solve_ex: one singular problem must not stop the batch; its step is discarded below.
        step = torch.nan_to_num(torch.linalg.solve_ex(damped, gradient)[0])
        moved = state.z.clone()
        moved[:, free] += step
        moved = moved.clamp(low, high)
        new = _state_at(target, model, moved)

        better = is_open & (new.cost < state.cost)
        step = (moved - state.z)[:, free].unsqueeze(-1)
        size = (step.mT @ hessian @ step).flatten()  # of the kernel's change, squared
        promised = 2 * (gradient * step.squeeze(-1)).sum(-1) - size
        gain = torch.where(better, (state.cost - new.cost) / promised, 0.0)
        state = _where(better, new, state)
        # The step changes the kernel by a share below the tolerance, or the fit is exact.
        converged = size <= tolerance**2 * power
        converged |= state.cost <= 100 * eps**2 * power
        stuck = ~better & (damp > 1e8)
        # A gain far below the promise: the valley bends, and longer steps would zigzag across it.
        change = torch.where(gain > 0.75, 0.2, torch.where(gain > 0.25, 1.0, 4.0))
        damp = (damp * change).clamp_min(1e-12)

        ends.n_iterations[number[is_open]] += 1
        ends.converged[number[is_open & converged]] = True
        is_open = is_open & ~converged & ~stuck
        n_open = int(is_open.sum())
        # Shrinking the batch costs a copy of it: worth it when part of it is finished.
        if n_open < 0.8 * len(number):
            _store(ends, number, state)
            if n_open == 0:
                return ends
            rest = is_open.nonzero().flatten()
            number, power, is_open = number[rest], power[rest], is_open[rest]
            target, state = target.select(rest), _State(*(value[rest] for value in state))
            damp, scale = damp[rest], scale[rest]
    _store(ends, number, state)
    return ends


def _where(mask: Tensor, new: _State, old: _State) -> _State:
    pairs = zip(new, old, strict=True)
    return _State(*(torch.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))


def _store(ends: Solution, number: Tensor, state: _State) -> None:
    ends.z[number], ends.cost[number] = state.z, state.cost
    ends.coefficients[number] = state.coefficients


def misfit(target: Target, model: Model, z: Tensor) -> Tensor:
    """``|y - R K(z)|²`` with the best coefficients, for ``(batch, columns)``: ``(batch,)``."""
    cost = residual(target, model, z).square().sum((-2, -1))
    return torch.where(cost.isfinite(), cost, torch.inf)


def misfits(target: Target, model: Model, z: Tensor) -> Tensor:
    """Misfits of several geometries for each target: ``(batch, *several, columns)``."""
    several = z.shape[1:-1]
    cost = misfit(target.repeat(several.numel()), model, z.flatten(0, -2))
    return cost.reshape(len(z), *several)


def likeliest(target: Target, model: Model, z: Tensor, n: int) -> Tensor:
    """The geometries of least misfit among ``(batch, several, columns)``, best first."""
    cost = misfits(target, model, z)
    return rows_at(z, cost.topk(min(n, z.shape[1]), largest=False).indices)


def rows_at(rows: Tensor, chosen: Tensor) -> Tensor:
    """Rows number ``chosen`` ``(batch, n)`` of ``(batch, rows, columns)``."""
    return rows.gather(1, chosen.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def residual(target: Target, model: Model, z: Tensor) -> Tensor:
    """``y - R K(z)`` with the best coefficients: ``(batch, groups, m)``."""
    return _regress(target.y, _design(target, model, model.at(z)[0]))[1]


def without_offset(target: Target, model: Model) -> Tensor:
    """The targets less their best constants, if the model has an offset."""
    if not model.offset:
        return target.y
    constant = target.y.new_ones(1, 1, 1, math.prod(model.sizes))
    return _regress(target.y, target.apply_metric(constant))[1]


def kernels_of(model: Model, z: Tensor, coefficients: Tensor) -> Tensor:
    """The kernels themselves, without offset: ``(batch, channels, pixels)``."""
    basis, _ = model.at(z)
    return coefficients[..., : basis.shape[1]] @ basis


def linearize(target: Target, model: Model, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Residual ``(batch, groups, m)``, projected Jacobian ``(batch, groups, p, m)``, coefficients.

    To first order, the residual at ``z + dz`` is the residual at z less ``dz · Jacobian``.
    """
    basis, jacobian = model.at(z)
    coefficients, left, rows = _regress(target.y, _design(target, model, basis))
    by_channel = coefficients.reshape(len(z), model.n_channels, -1)
    J = jacobian(by_channel)
    if target.root is not None:  # each row is a kernel of all channels
        J = (J.transpose(1, 2).flatten(-2) @ target.root.T).unsqueeze(1)
    elif target.weight is not None:
        J = J * target.weight.unsqueeze(-2)
    J -= (J @ rows.mT) @ rows
    return left, J, by_channel


def _state_at(target: Target, model: Model, z: Tensor) -> _State:
    left, J, coefficients = linearize(target, model, z)
    cost = left.square().sum((-2, -1))
    gradient = (J * left.unsqueeze(-2)).sum((1, -1))
    hessian = (J @ J.mT).sum(1)
    return _State(z, torch.where(cost.isfinite(), cost, torch.inf), gradient, hessian, coefficients)


def _design(target: Target, model: Model, basis: Tensor) -> Tensor:
    """The basis and the constant in the metric: ``(batch, groups or 1, columns, m)``."""
    if model.offset:
        basis = torch.cat([basis, torch.ones_like(basis[:, :1])], 1)
    return target.apply_metric(basis.unsqueeze(1))


def _regress(y: Tensor, design: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least-squares coefficients ``(batch, groups, c)``, the residual, orthonormal rows.

    Columns that depend on others are left out: at zero frequency the sine is zero everywhere, and
    the problem is still well posed, with one column less.
    """
    rows, transform = _orthonormalize(design)
    shares = (rows * y.unsqueeze(-2)).sum(-1, keepdim=True)  # (batch, groups, c, 1)
    return (shares * transform).sum(-2), y - (shares * rows).sum(-2), rows


def _orthonormalize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows with the same span, and the matrix that makes them from ``rows``.

    By Gram and Schmidt, twice for each row. The inverse of the rows' inner products would lose
    twice the digits where cosine and sine are nearly the same, as for a slow wave or on the pixels
    of a thin line, and searches that lead there would creep.
    """
    size = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    # Zero compared with the others, or because the envelope is outside of the kernel.
    least = torch.finfo(rows.dtype).tiny ** 0.25
    silent = size <= (1e-10 * size.amax(-2, keepdim=True)).clamp_min(least)
    scale = size.masked_fill(silent, torch.inf).reciprocal()
    rows, transform = rows * scale, torch.diag_embed(scale.squeeze(-1))
    for i in range(1, rows.shape[-2]):
        before, row = rows[..., :i, :], rows[..., i, :]
        for _ in range(2):
            # Products of single rows: sums are several times faster than batches of matrices.
            shares = (before * row.unsqueeze(-2)).sum(-1, keepdim=True)
            row -= (shares * before).sum(-2)
            transform[..., i, :] -= (shares * transform[..., :i, :]).sum(-2)
        length = torch.linalg.vector_norm(row, dim=-1, keepdim=True)
        dependent = length <= torch.finfo(rows.dtype).eps ** 0.5
        scale = length.masked_fill(dependent, torch.inf).reciprocal()
        row *= scale
        transform[..., i, :] *= scale
    return rows, transform
