"""Which starts are followed, and how far: every problem gets the work that it needs.

Most kernels are found from their first start, and an exact fit cannot be beaten. So the first start
of all is followed alone; where it does not end in an exact fit, a closer look gives the others. The
few searches that creep along a valley are gathered from all batches and finished together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gaborium.fitting.solver import Family, Solution, Target, kernels_of, residual, solve
from gaborium.fitting.start import StartGrid

_EXACT = 1e-13  # share of the power below which no other start can do better
_LOOSE = 1e-4  # tolerance while ends are compared; the best one is then followed closely
_KEPT = (3, 10)  # round waves that are stretched, at the first look and at the closer one
_ROUND = 30  # steps before a search has to wait for the others that creep
_AT_ONCE = {"cpu": 2**18}  # bytes of kernels in a batch: they stay in the processor's cache
_AT_ONCE_ELSEWHERE = 2**27
_ALIKE = 2.0  # a difference of misfits that says nothing, in units of the noise's variance
_OTHER = 0.1  # share of a kernel's power by which another one is different


@dataclass(frozen=True)
class Best:
    """The best end of each problem's searches.

    Args:
        solution: where it is.
        rival: quite another kernel that fits as well; where there is none, its cost is infinite.
        second: ``(batch,)``, power that one more Gabor function would explain of what is left.
    """

    solution: Solution
    rival: Solution
    second: Tensor


def search(
    target: Target, grid: StartGrid, *, n_starts: int, max_iterations: int, tolerance: float
) -> Best:
    """Solve from several starts and keep, for each problem, the end of least misfit.

    Args:
        target: in the metric's coordinates.
        grid: where starts come from, and what is searched.
        n_starts: candidates that are followed at most.
        max_iterations: steps at most, for each of them.
        tolerance: relative step of the kernel at which a search has arrived.
    """
    family = grid.family
    precise, target = target, target.to(grid.dtype)
    y = target.y

    def descend(z: Tensor, owner: Tensor, tolerance: float = tolerance) -> Solution:
        return follow(target, family, z, owner, max_iterations=max_iterations, tolerance=tolerance)

    def look(number: Tensor, n: int, kept: int, *, turned: bool) -> Tensor:
        return torch.cat(
            [
                grid.starts(target.pick(i), n_starts=n, n_kept=kept, turned=turned)
                for i in _batches(number, family, y)
            ]
        )

    everyone = torch.arange(len(y), device=y.device)
    loose = tolerance if n_starts == 1 else max(tolerance, _LOOSE)
    first = look(everyone, 1, _KEPT[0], turned=False)[:, 0]
    best = descend(first, everyone)
    rival = best._replace(cost=torch.full_like(best.cost, torch.inf))

    exact = max(_EXACT, 1e3 * torch.finfo(y.dtype).eps ** 2)
    inexact = (best.cost > exact * y.square().sum((-2, -1))).nonzero().flatten()
    if n_starts > 1 and len(inexact):
        others = _without(first[inexact], look(inexact, n_starts, _KEPT[1], turned=True))
        width = others.shape[1]
        ends = descend(others.flatten(0, 1), inexact.repeat_interleave(width), loose)
        ends = Solution(
            *(
                torch.cat([a[inexact].unsqueeze(1), b.unflatten(0, (-1, width))], 1)
                for a, b in zip(best, ends, strict=True)
            )
        )
        chosen, other = _choose(family, ends, y[0].numel())
        best, rival = _put(best, inexact, chosen), _put(rival, inexact, other)
        near = inexact[chosen.converged]
        closer = descend(best.z[near], near)
        steps = best.n_iterations[near] + closer.n_iterations
        best = _put(best, near, closer._replace(n_iterations=steps))

    best = _still(best, family, descend)
    second = torch.cat(
        [
            grid.explained(target.pick(i)._replace(y=residual(target.pick(i), family, best.z[i])))
            for i in _batches(everyone, family, y)
        ]
    )
    if precise.y.dtype != y.dtype:
        best = _finish(precise, family, best, tolerance)
    return Best(best, rival, second)


def follow(
    target: Target,
    family: Family,
    z: Tensor,
    owner: Tensor,
    *,
    max_iterations: int,
    tolerance: float,
) -> Solution:
    """Solve from rows of z, each for the target number ``owner``, in rounds of batches."""
    ends = Solution(
        *(z.clone(), z.new_zeros(len(z))),
        coefficients=z.new_zeros(len(z), family.n_channels, 2 + family.offset),
        converged=torch.zeros(len(z), dtype=torch.bool, device=z.device),
        n_iterations=torch.zeros(len(z), dtype=torch.int64, device=z.device),
    )
    waiting = torch.arange(len(z), device=z.device)
    for steps in (min(_ROUND, max_iterations), max_iterations - _ROUND):
        if steps <= 0:
            break
        for i in _batches(waiting, family, z):
            here = target.pick(owner[i])
            found = solve(here, family, ends.z[i], max_iterations=steps, tolerance=tolerance)
            used = ends.n_iterations[i] + found.n_iterations
            ends = _put(ends, i, found._replace(n_iterations=used))
        # A search that has neither arrived nor used its steps is stuck, and would be again.
        unfinished = ~ends.converged[waiting] & (ends.n_iterations[waiting] >= steps)
        waiting = waiting[unfinished]
    return ends


def _without(first: Tensor, rows: Tensor) -> Tensor:
    """Rows ``(batch, n, columns)`` less the one that was followed already, or else the last."""
    again = (rows == first.unsqueeze(1)).all(-1)
    order = again.long().sort(dim=1, stable=True).indices[:, : max(1, rows.shape[1] - 1)]
    return rows.gather(1, order.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def _choose(family: Family, ends: Solution, n_data: int) -> tuple[Solution, Solution]:
    """The best of the ends ``(batch, n, ...)``, and another kernel that is as good."""
    lowest = ends.cost.amin(1, keepdim=True)
    # Among ends as good as the best, prefer one that arrived.
    good = ends.cost <= lowest * (1 + 1e-6)
    index = (good.long() + (good & ends.converged).long()).argmax(1)
    row = torch.arange(len(index), device=index.device)
    best = Solution(*(value[row, index] for value in ends))

    alike = ends.cost - lowest <= _ALIKE * lowest / max(1, n_data - family.n_parameters)
    rival = best._replace(cost=torch.full_like(best.cost, torch.inf))
    for m in range(ends.cost.shape[1]):
        here = (alike[:, m] & (index != m)).nonzero().flatten()
        ours = kernels_of(family, best.z[here], best.coefficients[here])
        theirs = kernels_of(family, ends.z[here, m], ends.coefficients[here, m])
        distance = (ours - theirs).square().sum((-2, -1))
        here = here[distance > _OTHER * ours.square().sum((-2, -1))]
        rival = _put(rival, here, Solution(*(value[here, m] for value in ends)))
    return best, rival


def _still(
    best: Solution, family: Family, descend: Callable[[Tensor, Tensor], Solution]
) -> Solution:
    """Where hardly a wave is left, try none: the misfit is flat there, and the search is slow."""
    column = family.columns["frequency"]
    turn = 2 * math.pi * best.z[:, column].abs() * best.z[:, family.columns["sigma"]].exp()
    slow = (turn < 0.3).nonzero().flatten()  # rad within a standard deviation
    if len(slow) == 0:
        return best
    z = best.z[slow]
    z[:, column] = 0.0
    still = descend(z, slow)
    # The last digits of a cost are rounding: 1e-24 of targets of unit pixels.
    as_good = still.cost <= best.cost[slow] * (1 + 1e-6) + 1e-24
    return _put(best, slow[as_good], Solution(*(value[as_good] for value in still)))


def _finish(target: Target, family: Family, best: Solution, tolerance: float) -> Solution:
    """The last steps in the target's own, higher precision."""
    everyone = torch.arange(len(best.z), device=best.z.device)
    z = best.z.to(target.y.dtype)
    end = follow(target, family, z, everyone, max_iterations=2, tolerance=tolerance)
    return end._replace(
        converged=end.converged | best.converged,
        n_iterations=end.n_iterations + best.n_iterations,
    )


def _put(whole: Solution, index: Tensor, part: Solution) -> Solution:
    """``whole`` with ``part`` in the places ``index``."""
    return Solution(*(a.index_copy(0, index, b) for a, b in zip(whole, part, strict=True)))


def _batches(number: Tensor, family: Family, like: Tensor) -> Iterator[Tensor]:
    """Numbers of problems that are solved at once."""
    size = like.element_size() * family.n_channels * math.prod(family.sizes)
    largest = _AT_ONCE.get(like.device.type, _AT_ONCE_ELSEWHERE)
    if len(number):
        yield from number.split(min(max(largest // size, 16), 2**18))
