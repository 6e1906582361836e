"""Which starts are followed, and how far: every problem gets the work that it needs.

Most kernels are found from their first start, and an exact fit cannot be beaten; nor, beyond
chance, can one that leaves nothing but noise. So the first start of all is followed alone, and only
where it does not end like that a closer look gives others. Searches that creep along a valley are
gathered from all batches and finished together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gaborium.fitting.alternatives import (
    CentreSurround,
    TwoGabors,
    crossing,
    is_better,
)
from gaborium.fitting.solver import (
    Family,
    Model,
    Solution,
    Target,
    kernels_of,
    misfit,
    residual,
    solve,
    without_offset,
)
from gaborium.fitting.start import StartGrid

_EXACT = 1e-13  # share of the power below which no other start can do better
_SETTLED = 0.1  # the same, if nothing but noise is left
_ENOUGH = 100  # numbers left in a target that can tell noise from the rest of a poor fit
_CHANCE = 0.02  # that noise is taken for a second Gabor function
_KIN = 5  # candidates for it that are nearly one; tried on noise: 5 to 15 px, centre free or not
_NOTHING = 1e-5  # share of the power below which what is left does not matter
LITTLE = 0.5  # share of the explainable power below which a kernel is called no Gabor
NOT_ALL = 0.8  # the same where what is left is more than noise
MUCH = 0.1  # of a Gabor function's power, from which on another one beside it counts
_PART = 0.03  # share of the power from which on a second wave is looked for beside the first
_PAIRS = 10  # of waves that are followed together
_LOOSE = 1e-4  # tolerance while ends are compared; the best one is then followed closely
_SLOW = 1.0  # rad that a wave turns within a standard deviation, below which a still one is tried
_TURNING = 0.5  # the same, above which no still one is an exact fit where a wave is one
_REST = 1e-4  # rad that stand for none, where the limit of none is meant
ALIKE = 2.0  # a difference of misfits that says nothing, in units of the noise's variance
_NEARLY = 1.25  # ratio of misfits up to which another kernel is remembered
_OTHER = 1e-4  # share of a kernel's power by which another one is different
_ROUND = 30  # steps before a search has to wait for the others that creep
_DAMPED = 1e-3  # damping of the first step, as a share of the curvature
_BOLD = 1e-5  # the same of those that creep: nearly none, or they stop short in a narrow valley
_AT_ONCE = {"cpu": 2**18}  # bytes of kernels in a batch: they stay in the processor's cache
_AT_ONCE_ELSEWHERE = 2**27
_LOOKED_AT = 256  # problems, at least, whose starts are compared in one pass over all waves


@dataclass(frozen=True)
class Best:
    """The best end of each problem's searches.

    Args:
        solution: where it is.
        rival: another kernel that fits nearly as well; where there is none, its cost is infinite.
        structured: ``(batch,)``, whether more than noise is left.
        second: ``(batch,)``, power that one more Gabor function would explain of what is left.
        other: ``(batch,)``, whether two Gabor functions, each of its own, or a centre with its
            surround explain the target better.
    """

    solution: Solution
    rival: Solution
    structured: Tensor
    second: Tensor
    other: Tensor


@dataclass(frozen=True)
class Search:
    """Solve from several starts and keep, for each problem, the end of least misfit.

    Args:
        grid: where starts come from, and what is searched.
        n_starts: candidates that are followed at most.
        max_iterations: steps at most, for each of them.
        tolerance: relative step of the kernel at which a search has arrived.
        rounding: share of a target's power that is nothing but the rounding of its numbers.
    """

    grid: StartGrid
    n_starts: int
    max_iterations: int
    tolerance: float
    rounding: float = 0.0

    @property
    def family(self) -> Family:
        """What is searched."""
        return self.grid.family

    def best(self, target: Target) -> Best:
        """The best ends for targets, in the precision of the targets."""
        precise, target = target, target.to(self.grid.dtype)
        everyone = torch.arange(len(target.y), device=target.y.device)
        power = target.y.square().sum((-2, -1))

        first = self._look(target, everyone, 1, closely=False)[:, 0]
        best = self._follow_all(target, first, everyone, self.tolerance)
        rival = best._replace(cost=torch.full_like(best.cost, torch.inf))
        inexact = (~_is_exact(best.cost, power)).nonzero().flatten()
        second = self._second(target, best, inexact, torch.zeros_like(power))
        settled = ~self._is_structured(target, best.cost, second) & (best.cost <= _SETTLED * power)
        settled &= self._n_left(target) >= _ENOUGH
        unsettled = inexact[~settled[inexact]]
        other = torch.zeros_like(settled)

        if self.n_starts > 1 and len(unsettled):
            ends = self._ends(target, best, first, unsettled)
            chosen, nearly = self._choose(ends, self._n_left(target.pick(unsettled)))
            rival = rival.put(unsettled, nearly)
            best = self._closely(target, best.put(unsettled, chosen), unsettled)
            best = self._at_bounds(target, best, unsettled[~best.converged[unsettled]])
            second = self._second(target, best, unsettled, second)

        structured = self._is_structured(target, best.cost, second)
        if self.n_starts > 1:
            # Where too little is explained, it does not matter what would explain more.
            enough = torch.where(structured, 1 - NOT_ALL, 1 - LITTLE) * power
            other = self._is_other(target, best, unsettled[(best.cost < enough)[unsettled]], power)
        if precise.y.dtype != target.y.dtype:
            best = self._finish(precise, best)
        return Best(best, rival, structured, second, other)

    def follow(
        self,
        target: Target,
        z: Tensor,
        owner: Tensor,
        tolerance: float,
        model: Model | None = None,
    ) -> Solution:
        """Solve from rows of z, each for the target number ``owner``, in rounds of batches."""
        model = model or self.family
        ends = Solution(
            *(z.clone(), z.new_zeros(len(z))),
            coefficients=z.new_zeros(len(z), model.n_channels, model.n_coefficients),
            converged=torch.zeros(len(z), dtype=torch.bool, device=z.device),
            n_iterations=torch.zeros(len(z), dtype=torch.int64, device=z.device),
        )
        waiting = torch.arange(len(z), device=z.device)
        first = min(_ROUND, self.max_iterations)
        for steps, damping in ((first, _DAMPED), (self.max_iterations - first, _BOLD)):
            if steps == 0:
                break
            for i in _batches(waiting, model, z):
                found = solve(
                    *(target.pick(owner[i]), model, ends.z[i]),
                    max_iterations=steps,
                    tolerance=tolerance,
                    damping=damping,
                )
                used = ends.n_iterations[i] + found.n_iterations
                ends = ends.put(i, found._replace(n_iterations=used))
            # A search that has neither arrived nor used its steps is stuck, and would be again.
            unfinished = ~ends.converged[waiting] & (ends.n_iterations[waiting] >= steps)
            waiting = waiting[unfinished]
        return ends

    # -- the parts of ``best``, in their order ------------------------------------------------

    def _look(self, target: Target, number: Tensor, n: int, *, closely: bool) -> Tensor:
        """The ``n`` most promising starts of problems."""
        return torch.cat(
            [
                self.grid.starts(target.pick(i), n_starts=n, closely=closely)
                for i in _batches(number, self.family, target.y, at_least=_LOOKED_AT)
            ]
        )

    def _follow_all(self, target: Target, z: Tensor, owner: Tensor, tolerance: float) -> Solution:
        """Follow waves, and where hardly one is left, the limit without."""
        ends = self.follow(target, z, owner, tolerance)
        return self._at_rest(target, ends, owner)

    def _at_rest(self, target: Target, ends: Solution, owner: Tensor) -> Solution:
        """Where hardly a wave is left, try none: the misfit is flat there, and the search creeps.

        The limit of frequency zero is the envelope times ``a + b x'``. With b it is approached by
        waves that hardly turn within their envelope, and whose amplitude is large.
        """
        column = self.family.columns["frequency"]
        turn, power = self._turn(ends.z), target.y.square().sum((-2, -1))[owner]
        found = _is_exact(ends.cost, power) & (turn > _TURNING)
        slow = ((turn < _SLOW) & ~found).nonzero().flatten()
        if len(slow) == 0 or self.family.bounds(ends.z)[0][column] > 0:
            return ends
        rest = replace(self.family, still=True)
        still = self.follow(target, ends.z[slow], owner[slow], self.tolerance, rest)
        rounding = max(self.rounding, 1e-26) * power[slow]
        as_good = still.cost <= ends.cost[slow] * (1 + 1e-6) + rounding
        z, _, coefficients, *_ = still = still.pick(as_good)
        sloping = coefficients.clone()
        sloping[..., 0] = 0.0
        slope = kernels_of(rest, z, sloping).square().sum((-2, -1))
        is_blob = slope < 1e-12 * kernels_of(rest, z, coefficients).square().sum((-2, -1))
        rate = _REST / z[:, self.family.columns["sigma"]].exp()  # rad/px
        z[:, column] = torch.where(is_blob, 0.0, rate / (2 * math.pi))
        coefficients[..., 1] *= torch.where(is_blob, 0.0, 1 / rate).unsqueeze(-1)
        return ends.put(slow[as_good], still)

    def _second(self, target: Target, best: Solution, number: Tensor, before: Tensor) -> Tensor:
        """Power that the most promising start for what is left explains, for some problems."""
        second = before.clone()
        for i in _batches(number, self.family, target.y, at_least=_LOOKED_AT):
            left = target.pick(i)
            left = left._replace(y=residual(left, self.family, best.z[i]))
            z = self.grid.starts(left, n_starts=1, closely=False)[:, 0]
            second[i] = left.y.square().sum((-2, -1)) - misfit(left, self.family, z)
        return second

    def _is_other(self, target: Target, best: Solution, number: Tensor, power: Tensor) -> Tensor:
        """Whether problems are better explained otherwise than by one Gabor function.

        In one dimension a Gabor function has a surround of its own, and no two waves cross.
        """
        other = torch.zeros_like(best.converged)
        near = number[best.cost[number] > _NOTHING * power[number]]
        if self.family.n_dims > 1 and len(near):
            other[near] = self._has_surround(target.pick(near), best.pick(near))
            crossed = near[~other[near] & (best.cost[near] > _PART * power[near])]
            if len(crossed):
                one = best.pick(crossed)
                other[crossed] = self._is_plaid(target.pick(crossed), one, power[crossed])
        return other

    def _has_surround(self, target: Target, one: Solution) -> Tensor:
        """Whether a centre with its surround is better than one Gabor function."""
        family = self.family
        rings = CentreSurround(family.sizes, family.n_channels, family.offset)
        shown = target.seen_from(without_offset(target, family), family.n_channels)
        kernels = kernels_of(family, one.z, one.coefficients)
        loudest = torch.stack([shown, kernels], 1).square().sum(2)
        ends = self._ends_of(rings, target, rings.starts(target, loudest))
        return is_better(rings, ends.cost, family, one.cost, target.n_data())

    def _is_plaid(self, target: Target, one: Solution, power: Tensor) -> Tensor:
        """Whether two Gabor functions are better than one, and two indeed."""
        family = self.family
        pair = TwoGabors(family)
        everyone = torch.arange(len(power), device=power.device)
        left = target._replace(y=residual(target, family, one.z))
        beside = self._look(left, everyone, 1, closely=False)
        waves = self._look(target, everyone, self.n_starts, closely=True)
        starts = pair.starts(target, one.z, torch.cat([beside, waves], 1), _PAIRS)
        ends = self._ends_of(pair, target, starts)
        two = crossing(pair, ends.z, ends.coefficients) > MUCH
        two |= one.cost > (1 - NOT_ALL) * power
        return two & is_better(pair, ends.cost, family, one.cost, target.n_data())

    def _ends_of(self, model: Model, target: Target, z: Tensor) -> Solution:
        """Where another model is best, from starts ``(batch, n, columns)``."""
        owner = torch.arange(len(z), device=z.device).repeat_interleave(z.shape[1])
        ends = self.follow(target, z.flatten(0, 1), owner, max(self.tolerance, _LOOSE), model)
        return _best_of(Solution(*(value.unflatten(0, z.shape[:2]) for value in ends)))

    def _is_structured(self, target: Target, cost: Tensor, second: Tensor) -> Tensor:
        """Whether more than noise is left, of which the best of many waves has a small share only.

        Each pair of a cosine and a sine explains a share of noise that has a beta distribution.
        """
        n_left = self._n_left(target)
        by_chance = 1 - (_CHANCE * _KIN / self.grid.size) ** (2 / (n_left - 2).clamp_min(1.0))
        return second > by_chance * cost

    def _n_left(self, target: Target) -> Tensor:
        """Numbers in each target that parameters do not use up."""
        return target.n_data() - self.family.n_parameters

    def _ends(self, target: Target, best: Solution, first: Tensor, number: Tensor) -> Solution:
        """The first end, those of all other starts, and one across: ``(problems, n, ...)``."""
        others = _without(first[number], self._look(target, number, self.n_starts, closely=True))
        width, loose = others.shape[1], max(self.tolerance, _LOOSE)
        owner = number.repeat_interleave(width)
        ends = self._follow_all(target, others.flatten(0, 1), owner, loose)
        ends = _beside(best.pick(number), ends, width)
        if self.family.n_dims > 1:
            # Nearly round kernels are as good in the other direction: is there a difference?
            across = _best_of(ends).z
            across[:, self.family.columns["orientation"]] += math.pi / 2
            across_ends = self._follow_all(target, across, number, loose)
            flat = Solution(*(value.flatten(0, 1) for value in ends))
            ends = _beside(across_ends, flat, width + 1)
        return ends

    def _choose(self, ends: Solution, n_left: Tensor) -> tuple[Solution, Solution]:
        """The best of the ends ``(batch, n, ...)``, and another kernel that is nearly as good."""
        best = _best_of(ends)
        # Of other kernels the one that differs most; one that is quite as good before all of those.
        alike = best.cost * (1 + ALIKE / n_left.clamp_min(1.0))
        rival = best._replace(cost=torch.full_like(best.cost, torch.inf))
        farthest = torch.full_like(best.cost, _OTHER)
        for m in range(ends.cost.shape[1]):
            here = (ends.cost[:, m] <= best.cost * _NEARLY).nonzero().flatten()
            ours = kernels_of(self.family, best.z[here], best.coefficients[here])
            theirs = kernels_of(self.family, ends.z[here, m], ends.coefficients[here, m])
            distance = (ours - theirs).square().sum((-2, -1)) / ours.square().sum((-2, -1))
            as_good = (ends.cost[here, m] <= alike[here]) & (distance > _OTHER)
            distance = distance + 100.0 * as_good
            farther = distance > farthest[here]
            here = here[farther]
            farthest[here] = distance[farther]
            rival = rival.put(here, ends.pick((here, torch.full_like(here, m))))
        return best, rival

    def _closely(self, target: Target, best: Solution, number: Tensor) -> Solution:
        """Follow the chosen ends to the full tolerance."""
        turn = self._turn(best.z[number])
        near = number[best.converged[number] & (turn > 2 * _REST)]
        closer = self.follow(target, best.z[near], near, self.tolerance)
        steps = best.n_iterations[near] + closer.n_iterations
        best = best.put(near, closer._replace(n_iterations=steps))
        # Where none seemed best, see where a slow wave leads that is followed closely.
        resting = number[(turn > 0) & (turn < 2 * _REST)]
        z = best.z[resting]
        z[:, self.family.columns["frequency"]] *= 0.5 * _SLOW / _REST
        going = self.follow(target, z, resting, self.tolerance)
        better = going.cost < best.cost[resting] * (1 - 1e-6)
        return best.put(resting[better], going.pick(better))

    def _at_bounds(self, target: Target, best: Solution, number: Tensor) -> Solution:
        """Where a search creeps, try what it may creep to: an endless or a thin envelope."""
        low, high = self.family.bounds(best.z)
        columns = self.family.columns
        corners = [("sigma", high), ("aspect_ratio", low), ("aspect_ratio", high)]
        for name, bound in corners:
            column = columns[name]
            if len(number) and column in self.family.free:
                z = best.z[number]
                z[:, column] = bound[column]
                there = self.follow(target, z, number, self.tolerance)
                better = there.cost < best.cost[number]
                best = best.put(number[better], there.pick(better))
        return best

    def _finish(self, target: Target, best: Solution) -> Solution:
        """The last steps in the target's own, higher precision."""
        dtype = target.y.dtype
        z, cost, coefficients, *others = best
        whole = Solution(z.to(dtype), cost.to(dtype), coefficients.to(dtype), *others)
        moving = self._turn(z) > 2 * _REST
        exact = _is_exact(cost, target.y.square().sum((-2, -1)).to(cost))
        # One step squares the error of an exact fit; others come closer by a factor.
        for here, n in ((moving & exact, 1), (moving & ~exact, 2)):
            index = here.nonzero().flatten()
            last = replace(self, max_iterations=n)
            end = last.follow(target, whole.z[index], index, self.tolerance)
            end = end._replace(
                converged=end.converged | best.converged[index],
                n_iterations=end.n_iterations + best.n_iterations[index],
            )
            whole = whole.put(index, end)
        return whole

    def _turn(self, z: Tensor) -> Tensor:
        """Of the wave within a standard deviation of its envelope, rad: ``(batch,)``."""
        columns = self.family.columns
        return 2 * math.pi * z[:, columns["frequency"]].abs() * z[:, columns["sigma"]].exp()


def _is_exact(cost: Tensor, power: Tensor) -> Tensor:
    """Whether misfits are rounding, and nothing can do better."""
    return cost <= max(_EXACT, 1e5 * torch.finfo(power.dtype).eps ** 2) * power


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


def _best_of(ends: Solution) -> Solution:
    """Of ends ``(batch, n, ...)`` that of least misfit; among equals one that arrived."""
    good = ends.cost <= ends.cost.amin(1, keepdim=True) * (1 + 1e-6)
    index = (good.long() + (good & ends.converged).long()).argmax(1)
    return ends.pick((torch.arange(len(index), device=index.device), index))


def _batches(number: Tensor, model: Model, like: Tensor, at_least: int = 16) -> Iterator[Tensor]:
    """Numbers of problems that are solved at once."""
    size = like.element_size() * model.n_channels * math.prod(model.sizes)
    largest = _AT_ONCE.get(like.device.type, _AT_ONCE_ELSEWHERE)
    if len(number):
        yield from number.split(min(max(largest // size, at_least), 2**18))
