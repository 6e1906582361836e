"""Which starts are followed, and how far: every problem gets the work that it needs.

Most kernels are found from their first start, and an exact fit cannot be beaten. So the first start
of all is followed alone; where it does not end in an exact fit, a closer look gives the others. The
few searches that creep along a valley are gathered from all batches and finished together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gaborium.fitting.solver import Family, Solution, Target, kernels_of, misfit, residual, solve
from gaborium.fitting.start import StartGrid

_EXACT = 1e-13  # share of the power below which no other start can do better
_SETTLED = 0.9  # share of the power explained, with nothing but noise left: the same
_CHANCE = 0.02  # that noise is taken for a second Gabor function
_KIN = 5  # candidates for it that are nearly one; tried on noise: 5 to 15 px, centre free or not
_LOOSE = 1e-4  # tolerance while ends are compared; the best one is then followed closely
_SLOW = 1.0  # rad that a wave turns within a standard deviation, below which a still one is tried
_REST = 1e-4  # rad that stand for none, where the limit of none is meant
_ROUND = 30  # steps before a search has to wait for the others that creep
_AT_ONCE = {"cpu": 2**18}  # bytes of kernels in a batch: they stay in the processor's cache
_AT_ONCE_ELSEWHERE = 2**27
_LOOKED_AT = 256  # problems, at least, whose starts are compared in one pass over all waves
_ALIKE = 2.0  # a difference of misfits that says nothing, in units of the noise's variance
_NEARLY = 1.25  # ratio of misfits up to which another kernel is remembered
_OTHER = 1e-4  # share of a kernel's power by which another one is different


@dataclass(frozen=True)
class Best:
    """The best end of each problem's searches.

    Args:
        solution: where it is.
        rival: another kernel that fits nearly as well; where there is none, its cost is infinite.
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

    def look(number: Tensor, n: int, *, closely: bool) -> Tensor:
        return torch.cat(
            [
                grid.starts(target.pick(i), n_starts=n, closely=closely)
                for i in _batches(number, family, y, at_least=_LOOKED_AT)
            ]
        )

    def at_rest(ends: Solution, owner: Tensor) -> Solution:
        return _at_rest(
            target, family, ends, owner, max_iterations=max_iterations, tolerance=tolerance
        )

    def look_again(number: Tensor) -> None:
        for i in _batches(number, family, y, at_least=_LOOKED_AT):
            left = target.pick(i)
            left = left._replace(y=residual(left, family, best.z[i]))
            z = grid.starts(left, n_starts=1, closely=False)[:, 0]
            second[i] = left.y.square().sum((-2, -1)) - misfit(left, family, z)

    everyone = torch.arange(len(y), device=y.device)
    first = look(everyone, 1, closely=False)[:, 0]
    best = at_rest(descend(first, everyone), everyone)
    rival = best._replace(cost=torch.full_like(best.cost, torch.inf))

    exact = max(_EXACT, 1e5 * torch.finfo(y.dtype).eps ** 2)
    inexact = (best.cost > exact * y.square().sum((-2, -1))).nonzero().flatten()
    second = torch.zeros_like(best.cost)
    look_again(inexact)
    n_left = torch.full_like(best.cost, max(1, y[0].numel() - family.n_parameters))
    settled = best.cost <= (1 - _SETTLED) * y.square().sum((-2, -1))
    settled &= ~is_structured(second, best.cost, n_left, grid.size)
    inexact = inexact[~settled[inexact]]
    if n_starts > 1 and len(inexact):
        others = _without(first[inexact], look(inexact, n_starts, closely=True))
        width = others.shape[1]
        owner = inexact.repeat_interleave(width)
        ends = descend(others.flatten(0, 1), owner, max(tolerance, _LOOSE))
        ends = at_rest(ends, owner)
        ends = _beside(Solution(*(value[inexact] for value in best)), ends, width)
        if family.n_dims > 1:
            # Nearly round kernels are as good in the other direction: is there a difference?
            across = _choose(family, ends, y[0].numel())[0].z
            across[:, family.columns["orientation"]] += math.pi / 2
            across_ends = at_rest(descend(across, inexact, max(tolerance, _LOOSE)), inexact)
            ends = _beside(
                across_ends, Solution(*(value.flatten(0, 1) for value in ends)), width + 1
            )
        chosen, other = _choose(family, ends, y[0].numel())
        best, rival = _put(best, inexact, chosen), _put(rival, inexact, other)
        near = inexact[chosen.converged & (_turn(family, chosen.z) > 2 * _REST)]
        closer = descend(best.z[near], near)
        steps = best.n_iterations[near] + closer.n_iterations
        best = _put(best, near, closer._replace(n_iterations=steps))
        best = _set_going(family, best, descend)
        look_again(inexact)

    if precise.y.dtype != y.dtype:
        best = _finish(precise, family, best, tolerance)
    return Best(best, rival, second)


def is_structured(second: Tensor, cost: Tensor, n_left: Tensor, n_candidates: int) -> Tensor:
    """Whether more than noise is left, of which the best of many waves has only a small share.

    Each pair of a cosine and a sine explains a share of noise that has a beta distribution.

    Args:
        second: power that the best of the waves explains of what is left, ``(batch,)``.
        cost: power that is left.
        n_left: numbers in a target that are not used up by parameters.
        n_candidates: how many waves were compared.
    """
    by_chance = 1 - (_CHANCE * _KIN / n_candidates) ** (2 / (n_left - 2).clamp_min(1.0))
    return second > by_chance * cost


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


def _beside(first: Solution, rest: Solution, width: int) -> Solution:
    """One end, and ``width`` others, of every problem: ``(batch, 1 + width, ...)``."""
    return Solution(
        *(
            torch.cat([a.unsqueeze(1), b.unflatten(0, (-1, width))], 1)
            for a, b in zip(first, rest, strict=True)
        )
    )


def _choose(family: Family, ends: Solution, n_data: int) -> tuple[Solution, Solution]:
    """The best of the ends ``(batch, n, ...)``, and another kernel that is as good."""
    lowest = ends.cost.amin(1, keepdim=True)
    # Among ends as good as the best, prefer one that arrived.
    good = ends.cost <= lowest * (1 + 1e-6)
    index = (good.long() + (good & ends.converged).long()).argmax(1)
    row = torch.arange(len(index), device=index.device)
    best = Solution(*(value[row, index] for value in ends))
    # Of other kernels the one that differs most; one that is quite as good before all of those.
    alike = lowest * (1 + _ALIKE / max(1, n_data - family.n_parameters))
    rival = best._replace(cost=torch.full_like(best.cost, torch.inf))
    farthest = torch.full_like(best.cost, _OTHER)
    for m in range(ends.cost.shape[1]):
        here = (ends.cost[:, m] <= lowest[:, 0] * _NEARLY).nonzero().flatten()
        ours = kernels_of(family, best.z[here], best.coefficients[here])
        theirs = kernels_of(family, ends.z[here, m], ends.coefficients[here, m])
        distance = (ours - theirs).square().sum((-2, -1)) / ours.square().sum((-2, -1))
        as_good = (ends.cost[here, m] <= alike[here, 0]) & (distance > _OTHER)
        distance = distance + 100.0 * as_good
        farther = distance > farthest[here]
        here = here[farther]
        farthest[here] = distance[farther]
        rival = _put(rival, here, Solution(*(value[here, m] for value in ends)))
    return best, rival


def _at_rest(
    target: Target,
    family: Family,
    ends: Solution,
    owner: Tensor,
    *,
    max_iterations: int,
    tolerance: float,
) -> Solution:
    """Where hardly a wave is left, try none: the misfit is flat there, and the search creeps.

    The limit of frequency zero is the envelope times ``a + b x'``. With b it is approached by waves
    that hardly turn within their envelope, and whose amplitude is large.
    """
    column = family.columns["frequency"]
    slow = (_turn(family, ends.z) < _SLOW).nonzero().flatten()
    if len(slow) == 0 or family.bounds(ends.z)[0][column] > 0:
        return ends
    rest = replace(family, still=True)
    found = follow(
        target, rest, ends.z[slow], owner[slow],
        max_iterations=max_iterations, tolerance=tolerance,
    )  # fmt: skip
    # The last digits of a cost are rounding: 1e-24 of targets of unit pixels.
    as_good = found.cost <= ends.cost[slow] * (1 + 1e-6) + 1e-24
    z, _, coefficients, *_ = found = Solution(*(value[as_good] for value in found))
    sloping = coefficients.clone()
    sloping[..., 0] = 0.0
    slope = kernels_of(rest, z, sloping).square().sum((-2, -1))
    is_blob = slope < 1e-12 * kernels_of(rest, z, coefficients).square().sum((-2, -1))
    rate = _REST / z[:, family.columns["sigma"]].exp()  # rad/px
    z[:, column] = torch.where(is_blob, 0.0, rate / (2 * math.pi))
    coefficients[..., 1] *= torch.where(is_blob, 0.0, 1 / rate).unsqueeze(-1)
    return _put(ends, slow[as_good], found)


def _set_going(
    family: Family, best: Solution, descend: Callable[[Tensor, Tensor], Solution]
) -> Solution:
    """Where a wave at rest seemed best, see where a slow one leads that is followed closely."""
    turn = _turn(family, best.z)
    resting = ((turn > 0) & (turn < 2 * _REST)).nonzero().flatten()
    z = best.z[resting]
    z[:, family.columns["frequency"]] *= 0.5 * _SLOW / _REST
    going = descend(z, resting)
    better = going.cost < best.cost[resting] * (1 - 1e-6)
    return _put(best, resting[better], Solution(*(value[better] for value in going)))


def _turn(family: Family, z: Tensor) -> Tensor:
    """Of the wave within a standard deviation of its envelope, rad: ``(batch,)``."""
    sigma = z[:, family.columns["sigma"]].exp()
    return 2 * math.pi * z[:, family.columns["frequency"]].abs() * sigma


def _finish(target: Target, family: Family, best: Solution, tolerance: float) -> Solution:
    """The last steps in the target's own, higher precision."""
    dtype = target.y.dtype
    moving = (_turn(family, best.z) > 2 * _REST).nonzero().flatten()
    end = follow(
        target, family, best.z[moving].to(dtype), moving, max_iterations=2, tolerance=tolerance
    )
    end = end._replace(
        converged=end.converged | best.converged[moving],
        n_iterations=end.n_iterations + best.n_iterations[moving],
    )
    z, cost, coefficients, *others = best
    whole = Solution(z.to(dtype), cost.to(dtype), coefficients.to(dtype), *others)
    return _put(whole, moving, end)


def _put(whole: Solution, index: Tensor, part: Solution) -> Solution:
    """``whole`` with ``part`` in the places ``index``."""
    return Solution(*(a.index_copy(0, index, b) for a, b in zip(whole, part, strict=True)))


def _batches(number: Tensor, family: Family, like: Tensor, at_least: int = 16) -> Iterator[Tensor]:
    """Numbers of problems that are solved at once."""
    size = like.element_size() * family.n_channels * math.prod(family.sizes)
    largest = _AT_ONCE.get(like.device.type, _AT_ONCE_ELSEWHERE)
    if len(number):
        yield from number.split(min(max(largest // size, at_least), 2**18))
