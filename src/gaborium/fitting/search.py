"""The global search: which starts are followed, and how far. Every problem gets the work it needs.

Most kernels are found from their first start. An exact fit cannot be improved, and one that leaves
only noise cannot be improved beyond chance. So first one start per problem is followed; the others
are tried only where that was not enough. Searches that creep along a valley are gathered from all
batches and finished together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gaborium.fitting.alternatives import CenterSurround, TwoGabors, crossing, is_better
from gaborium.fitting.model import GaborModel, Model
from gaborium.fitting.solver import (
    Solution,
    Target,
    kernels_of,
    misfit,
    residual,
    solve,
    without_offset,
)
from gaborium.fitting.start import StartGrid

# Shares of a target's power.
EXACT_SHARE = 1e-13  # misfit below which no other start can do better
SETTLED_SHARE = 0.1  # misfit below which no other start is tried, if only noise is left
NEGLIGIBLE_SHARE = 1e-5  # misfit below which no other model is tried
PLAID_SHARE = 0.03  # misfit from which on two waves are tried
MIN_EXPLAINED = 0.5  # of the explainable power; a kernel below is not called a Gabor function
MIN_EXPLAINED_STRUCTURED = 0.8  # the same where more than noise is left
SECOND_WAVE_SHARE = 0.1  # of a Gabor function's power, from which on a second one counts
DIFFERENT_KERNEL_SHARE = 1e-4  # squared distance from which on two kernels are different

# Noise.
MIN_NUMBERS_LEFT = 100  # numbers per target, less parameters, that distinguish noise from structure
FALSE_ALARM_RATE = 0.02  # probability that noise is taken for a second wave
N_CORRELATED_CANDIDATES = 5  # waves on the grid that are nearly one; from noise at 5 to 15 px
EQUAL_COST_FACTOR = 2.0  # difference of misfits without meaning, in units of the noise's variance
RIVAL_COST_RATIO = 1.25  # of misfits, up to which another kernel is remembered

# Radians that a wave turns within a standard deviation of its envelope.
SLOW_TURN = 1.0  # below, the limit of frequency zero is tried
MIN_EXACT_TURN = 0.5  # above, that limit is no exact fit where a wave is one
ZERO_TURN = 1e-4  # written instead of zero where that limit is an edge

# Work.
LOOSE_TOLERANCE = 1e-4  # while ends are compared; the best one is then refined
N_PAIRS = 10  # of waves that are followed together
FIRST_STEPS = 30  # before a search has to wait for the others that creep
FIRST_DAMPING = 1e-3  # share of the curvature
SECOND_DAMPING = 1e-5  # for searches that creep: with more they stop short in a narrow valley
BATCH_BYTES = {"cpu": 2**18}  # of kernels in a batch: they stay in the processor's cache
BATCH_BYTES_ELSEWHERE = 2**27
MIN_START_BATCH = 256  # problems, at least, whose starts are compared in one pass over all waves


@dataclass(frozen=True)
class Best:
    """The best end of each problem's searches; tensors are ``(batch,)``."""

    solution: Solution
    rival: Solution  # another kernel that fits nearly as well; otherwise its cost is infinite
    structured: Tensor  # whether more than noise is left
    second: Tensor  # power of the residual that one more Gabor function would explain
    other: Tensor  # whether two Gabor functions, or a centre with its surround, explain more


@dataclass(frozen=True)
class Search:
    """Solve from several starts and keep, for each problem, the end of least misfit."""

    grid: StartGrid  # the source of starts; its model is searched
    n_starts: int  # candidates that are followed at most
    max_iterations: int  # steps at most, for each of them
    tolerance: float  # relative step of the kernel at which a search has converged
    rounding: float = 0.0  # share of a target's power that is only the rounding of its numbers

    @property
    def model(self) -> GaborModel:
        """The model that is searched."""
        return self.grid.model

    def best(self, target: Target) -> Best:
        """The best ends for targets, in the precision of the targets."""
        precise, target = target, target.to(self.grid.dtype)
        everyone, power = _numbers(target.y), target.power()

        first = self._starts(target, everyone, 1, thorough=False)[:, 0]
        best = self._follow_to_limit(target, first, everyone, self.tolerance)
        rival = best._replace(cost=torch.full_like(best.cost, torch.inf))
        inexact = (~_is_exact(best.cost, power)).nonzero().flatten()
        second = self._second(target, best, inexact, torch.zeros_like(power))
        settled = ~self._is_structured(target, best.cost, second)
        settled &= best.cost <= SETTLED_SHARE * power
        settled &= self._n_left(target) >= MIN_NUMBERS_LEFT
        unsettled = inexact[~settled[inexact]]
        other = torch.zeros_like(settled)

        if self.n_starts > 1 and len(unsettled):
            ends = self._ends(target, best, first, unsettled)
            chosen, nearly = self._choose(ends, self._n_left(target.select(unsettled)))
            rival = rival.scatter(unsettled, nearly)
            best = self._refine(target, best.scatter(unsettled, chosen), unsettled)
            best = self._try_bounds(target, best, unsettled[~best.converged[unsettled]])
            second = self._second(target, best, unsettled, second)

        structured = self._is_structured(target, best.cost, second)
        if self.n_starts > 1:
            # Where too little is explained, it does not matter what would explain more.
            enough = torch.where(structured, 1 - MIN_EXPLAINED_STRUCTURED, 1 - MIN_EXPLAINED)
            number = unsettled[(best.cost < enough * power)[unsettled]]
            other = self._is_other(target, best, number, power)
        if precise.y.dtype != target.y.dtype:
            best = self._finish(precise, best)
        return Best(best, rival, structured, second, other)

    def follow(
        self, target: Target, z: Tensor, owner: Tensor, tolerance: float, model: Model | None = None
    ) -> Solution:
        """Solve from rows of z, each for the target number ``owner``, in rounds of batches."""
        model = model or self.model
        ends = Solution(
            *(z.clone(), z.new_zeros(len(z))),
            coefficients=z.new_zeros(len(z), model.n_channels, model.n_coefficients),
            converged=torch.zeros(len(z), dtype=torch.bool, device=z.device),
            n_iterations=torch.zeros(len(z), dtype=torch.int64, device=z.device),
        )
        waiting = _numbers(z)
        first = min(FIRST_STEPS, self.max_iterations)
        rounds = (first, FIRST_DAMPING), (self.max_iterations - first, SECOND_DAMPING)
        for steps, damping in rounds:
            if steps == 0:
                break
            for i in _batches(waiting, model, z):
                problems = target.select(owner[i]), model, ends.z[i]
                found = solve(*problems, steps, tolerance, damping)
                used = ends.n_iterations[i] + found.n_iterations
                ends = ends.scatter(i, found._replace(n_iterations=used))
            # A search that has neither converged nor used its steps is stuck, and would be again.
            unfinished = ~ends.converged[waiting] & (ends.n_iterations[waiting] >= steps)
            waiting = waiting[unfinished]
        return ends

    def best_of_model(self, model: Model, target: Target, starts: Tensor) -> Solution:
        """The best end of another model, from starts ``(batch, n, columns)``."""
        owner = _numbers(starts).repeat_interleave(starts.shape[1])
        tolerance = max(self.tolerance, LOOSE_TOLERANCE)
        ends = self.follow(target, starts.flatten(0, 1), owner, tolerance, model)
        return _best_of(ends.map(lambda value: value.unflatten(0, starts.shape[:2])))

    def best_pair(self, target: Target, z: Tensor, n_pairs: int) -> tuple[TwoGabors, Solution]:
        """The best sum of two Gabor functions, where z ``(batch, columns)`` are the best of one."""
        pair, everyone = TwoGabors(self.model), _numbers(z)
        left = target._replace(y=residual(target, self.model, z))
        beside = self._starts(left, everyone, 1, thorough=False)
        waves = self._starts(target, everyone, self.n_starts, thorough=True)
        starts = pair.starts(target, z, torch.cat([beside, waves], 1), n_pairs)
        return pair, self.best_of_model(pair, target, starts)

    # -- the parts of ``best``, in their order ------------------------------------------------

    def _starts(self, target: Target, number: Tensor, n: int, *, thorough: bool) -> Tensor:
        """The ``n`` most promising starts of problems."""
        return torch.cat(
            [
                self.grid.starts(target.select(i), n_starts=n, thorough=thorough)
                for i in _batches(number, self.model, target.y, at_least=MIN_START_BATCH)
            ]
        )

    def _follow_to_limit(
        self, target: Target, z: Tensor, owner: Tensor, tolerance: float
    ) -> Solution:
        """Follow waves; where one hardly turns, try frequency zero too.

        The misfit is flat there, and the search creeps. The limit of frequency zero is the envelope
        times ``a + b x'``. With b it is approached by waves that hardly turn within their envelope,
        and whose amplitude is large.
        """
        ends = self.follow(target, z, owner, tolerance)
        column = self.model.columns["frequency"]
        turn, power = self._turn(ends.z), target.power()[owner]
        found = _is_exact(ends.cost, power) & (turn > MIN_EXACT_TURN)
        slow = ((turn < SLOW_TURN) & ~found).nonzero().flatten()
        if len(slow) == 0 or self.model.bounds(ends.z)[0][column] > 0:
            return ends
        limit = replace(self.model, zero_frequency=True)
        still = self.follow(target, ends.z[slow], owner[slow], self.tolerance, limit)
        rounding = max(self.rounding, 1e-26) * power[slow]
        as_good = still.cost <= ends.cost[slow] * (1 + 1e-6) + rounding
        z, _, coefficients, *_ = still = still.select(as_good)
        sloping = coefficients.clone()
        sloping[..., 0] = 0.0
        slope = kernels_of(limit, z, sloping).square().sum((-2, -1))
        is_blob = slope < 1e-12 * kernels_of(limit, z, coefficients).square().sum((-2, -1))
        rate = ZERO_TURN / z[:, self.model.columns["sigma"]].exp()  # rad/px
        z[:, column] = torch.where(is_blob, 0.0, rate / (2 * math.pi))
        coefficients[..., 1] *= torch.where(is_blob, 0.0, 1 / rate).unsqueeze(-1)
        return ends.scatter(slow[as_good], still)

    def _second(self, target: Target, best: Solution, number: Tensor, before: Tensor) -> Tensor:
        """Power of the residual that the most promising start explains, for some problems."""
        second = before.clone()
        for i in _batches(number, self.model, target.y, at_least=MIN_START_BATCH):
            left = target.select(i)
            left = left._replace(y=residual(left, self.model, best.z[i]))
            z = self.grid.starts(left, n_starts=1, thorough=False)[:, 0]
            second[i] = left.power() - misfit(left, self.model, z)
        return second

    def _is_structured(self, target: Target, cost: Tensor, second: Tensor) -> Tensor:
        """Whether more than noise is left; the best of many waves explains little of noise.

        The share of noise that a pair of cosine and sine explains has a beta distribution.
        """
        n_left, rate = self._n_left(target), FALSE_ALARM_RATE * N_CORRELATED_CANDIDATES
        by_chance = 1 - (rate / self.grid.size) ** (2 / (n_left - 2).clamp_min(1.0))
        return second > by_chance * cost

    def _n_left(self, target: Target) -> Tensor:
        """Numbers in each target that parameters do not use up."""
        return target.n_data() - self.model.n_parameters

    def _ends(self, target: Target, best: Solution, first: Tensor, number: Tensor) -> Solution:
        """The first end, the ends of all other starts, and one across: ``(problems, n, ...)``."""
        starts = self._starts(target, number, self.n_starts, thorough=True)
        others = _without(first[number], starts)
        width, loose = others.shape[1], max(self.tolerance, LOOSE_TOLERANCE)
        owner = number.repeat_interleave(width)
        ends = self._follow_to_limit(target, others.flatten(0, 1), owner, loose)
        ends = _joined(
            best.select(number).map(lambda value: value.unsqueeze(1)),
            ends.map(lambda value: value.unflatten(0, (-1, width))),
        )
        if self.model.n_dims > 1:
            # Nearly round kernels fit as well in the other direction: is there a difference?
            across = _best_of(ends).z
            across[:, self.model.columns["orientation"]] += math.pi / 2
            across_ends = self._follow_to_limit(target, across, number, loose)
            ends = _joined(across_ends.map(lambda value: value.unsqueeze(1)), ends)
        return ends

    def _choose(self, ends: Solution, n_left: Tensor) -> tuple[Solution, Solution]:
        """The best of the ends ``(batch, n, ...)``, and another kernel that is nearly as good."""
        best = _best_of(ends)
        # Of other kernels the most different one, but first of all those that are equally good.
        equal = best.cost * (1 + EQUAL_COST_FACTOR / n_left.clamp_min(1.0))
        rival = best._replace(cost=torch.full_like(best.cost, torch.inf))
        farthest = torch.full_like(best.cost, DIFFERENT_KERNEL_SHARE)
        for m in range(ends.cost.shape[1]):
            here = (ends.cost[:, m] <= best.cost * RIVAL_COST_RATIO).nonzero().flatten()
            ours = kernels_of(self.model, best.z[here], best.coefficients[here])
            theirs = kernels_of(self.model, ends.z[here, m], ends.coefficients[here, m])
            distance = (ours - theirs).square().sum((-2, -1)) / ours.square().sum((-2, -1))
            as_good = (ends.cost[here, m] <= equal[here]) & (distance > DIFFERENT_KERNEL_SHARE)
            distance = distance + 100.0 * as_good
            farther = distance > farthest[here]
            here = here[farther]
            farthest[here] = distance[farther]
            rival = rival.scatter(here, ends.select((here, torch.full_like(here, m))))
        return best, rival

    def _refine(self, target: Target, best: Solution, number: Tensor) -> Solution:
        """Follow the chosen ends to the full tolerance."""
        turn = self._turn(best.z[number])
        near = number[best.converged[number] & (turn > 2 * ZERO_TURN)]
        closer = self.follow(target, best.z[near], near, self.tolerance)
        steps = best.n_iterations[near] + closer.n_iterations
        best = best.scatter(near, closer._replace(n_iterations=steps))
        # Where frequency zero seemed best, see where a slow wave leads at the full tolerance.
        resting = number[(turn > 0) & (turn < 2 * ZERO_TURN)]
        z = best.z[resting]
        z[:, self.model.columns["frequency"]] *= 0.5 * SLOW_TURN / ZERO_TURN
        return self._improved(target, best, resting, z, 1 - 1e-6)

    def _try_bounds(self, target: Target, best: Solution, number: Tensor) -> Solution:
        """Where a search creeps, try the bounds it may creep to: an endless or a thin envelope."""
        low, high = self.model.bounds(best.z)
        columns = self.model.columns
        for name, bound in (("sigma", high), ("aspect_ratio", low), ("aspect_ratio", high)):
            column = columns[name]
            if len(number) and column in self.model.free:
                z = best.z[number]
                z[:, column] = bound[column]
                best = self._improved(target, best, number, z)
        return best

    def _improved(
        self, target: Target, best: Solution, number: Tensor, z: Tensor, share: float = 1.0
    ) -> Solution:
        """The ends from z where they cost less than this share of the best so far."""
        ends = self.follow(target, z, number, self.tolerance)
        better = ends.cost < best.cost[number] * share
        return best.scatter(number[better], ends.select(better))

    def _is_other(self, target: Target, best: Solution, number: Tensor, power: Tensor) -> Tensor:
        """Whether another model explains problems better than one Gabor function.

        In one dimension a Gabor function has a surround already, and no two waves cross.
        """
        other = torch.zeros_like(best.converged)
        near = number[best.cost[number] > NEGLIGIBLE_SHARE * power[number]]
        if self.model.n_dims > 1 and len(near):
            other[near] = self._has_surround(target.select(near), best.select(near))
            crossed = near[~other[near] & (best.cost[near] > PLAID_SHARE * power[near])]
            if len(crossed):
                one = best.select(crossed)
                other[crossed] = self._is_plaid(target.select(crossed), one, power[crossed])
        return other

    def _has_surround(self, target: Target, one: Solution) -> Tensor:
        """Whether a centre with its surround is better than one Gabor function."""
        model = self.model
        rings = CenterSurround(model.sizes, model.n_channels, model.offset)
        projected = target.project(without_offset(target, model), model.n_channels)
        kernels = kernels_of(model, one.z, one.coefficients)
        patterns = torch.stack([projected, kernels], 1).square().sum(2)
        ends = self.best_of_model(rings, target, rings.starts(target, patterns))
        return is_better(rings, ends.cost, model, one.cost, target.n_data())

    def _is_plaid(self, target: Target, one: Solution, power: Tensor) -> Tensor:
        """Whether two Gabor functions are better than one, and both are needed."""
        pair, ends = self.best_pair(target, one.z, N_PAIRS)
        two = crossing(pair, ends.z, ends.coefficients) > SECOND_WAVE_SHARE
        two |= one.cost > (1 - MIN_EXPLAINED_STRUCTURED) * power
        return two & is_better(pair, ends.cost, self.model, one.cost, target.n_data())

    def _finish(self, target: Target, best: Solution) -> Solution:
        """The last steps in the target's own, higher precision."""
        dtype = target.y.dtype
        z, cost, coefficients, *others = best
        whole = Solution(z.to(dtype), cost.to(dtype), coefficients.to(dtype), *others)
        moving = self._turn(z) > 2 * ZERO_TURN
        exact = _is_exact(cost, target.power().to(cost))
        # One step squares the error of an exact fit; others come closer by a factor.
        for here, n in ((moving & exact, 1), (moving & ~exact, 2)):
            index = here.nonzero().flatten()
            last = replace(self, max_iterations=n)
            end = last.follow(target, whole.z[index], index, self.tolerance)
            end = end._replace(
                converged=end.converged | best.converged[index],
                n_iterations=end.n_iterations + best.n_iterations[index],
            )
            whole = whole.scatter(index, end)
        return whole

    def _turn(self, z: Tensor) -> Tensor:
        """Radians that the wave turns within a standard deviation of its envelope, ``(batch,)``."""
        columns = self.model.columns
        return 2 * math.pi * z[:, columns["frequency"]].abs() * z[:, columns["sigma"]].exp()


def _numbers(problems: Tensor) -> Tensor:
    return torch.arange(len(problems), device=problems.device)


def _is_exact(cost: Tensor, power: Tensor) -> Tensor:
    """Whether misfits are only rounding."""
    return cost <= max(EXACT_SHARE, 1e5 * torch.finfo(power.dtype).eps ** 2) * power


def _without(first: Tensor, rows: Tensor) -> Tensor:
    """Rows ``(batch, n, columns)`` less the one that was followed already, or else the last."""
    again = (rows == first.unsqueeze(1)).all(-1)
    order = again.long().sort(dim=1, stable=True).indices[:, : max(1, rows.shape[1] - 1)]
    return rows.gather(1, order.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def _joined(one: Solution, other: Solution) -> Solution:
    """The ends of both, ``(batch, n, ...)``."""
    return Solution(*(torch.cat(pair, 1) for pair in zip(one, other, strict=True)))


def _best_of(ends: Solution) -> Solution:
    """Of ends ``(batch, n, ...)`` the one of least misfit; among equals one that converged."""
    good = ends.cost <= ends.cost.amin(1, keepdim=True) * (1 + 1e-6)
    index = (good.long() + (good & ends.converged).long()).argmax(1)
    return ends.select((_numbers(index), index))


def _batches(number: Tensor, model: Model, like: Tensor, at_least: int = 16) -> Iterator[Tensor]:
    """Numbers of problems that are solved at once."""
    size = like.element_size() * model.n_channels * math.prod(model.sizes)
    largest = BATCH_BYTES.get(like.device.type, BATCH_BYTES_ELSEWHERE)
    if len(number):
        yield from number.split(min(max(largest // size, at_least), 2**18))
