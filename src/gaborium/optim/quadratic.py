"""What gradients say about a loss: a quadratic in the kernels, from running means.

Near any kernel W the loss of one filter is, but for a constant, ``s (½ W·C W - c·W)``: responses
are linear in W, so the curvature is the covariance C of the patches, times a scale s that belongs
to whatever lies behind the layer. The gradient there is ``g = s (C W - c)``, and therefore

    c = C W - g / s

*wherever the kernel is now*. Its running mean is all that gradients can tell about the loss: it
does not age while the filter moves, and the noise of mini-batches averages out of it. Where
``c = C T``, the best of all kernels is T, and the best Gabor function is the one nearest to it in
the metric C: to find it, nothing has to be divided by C, which would amplify noise.

The scale is found from how much the gradient changes when the kernel moves.

Brightness is kept apart, since it differs so much between images. With the mean m of the patches
of one batch and the loss's gradient o by the mean of its responses, ``g - o m`` is the part of the
gradient to which C, the covariance *within* a batch, belongs; ``o m`` belongs to ``m mᵀ``. Where a
bias or a normalisation behind the layer takes care of the responses' mean, it tells nothing.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MEMORY = 0.1  # of what is known of the scale, a move as long as all before makes one forget
_SURE, _MUCH = 5.0, 1.5  # standard errors and times: a change of the scale that is believed
_FARTHEST = 5.0  # lengths of the kernel: no target is believed to lie farther away
_TINY = 1e-30
_OF_FILTERS = (
    *("kernel", "gradient", "level", "pull"),
    *("spread", "slope", "gradient_spread", "known_spread", "known_slope"),
)


@dataclass(frozen=True)
class Metric:
    """A covariance of patches for each group of filters, ``(groups, n, n)``."""

    covariance: Tensor

    @cached_property
    def inverse(self) -> Tensor:
        """C⁻¹."""
        # Rounding must not make the smallest variances negative.
        root = torch.linalg.cholesky_ex(self.covariance.double())[0]
        return torch.cholesky_inverse(root).to(self.covariance.dtype)

    @classmethod
    def of(cls, covariance: Tensor, damping: float) -> Metric:
        """A covariance, with ``damping`` of its mean variance added to the variance of a pixel."""
        extra = damping * covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(_TINY)
        one = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        return cls(covariance + extra[:, None, None] * one)

    def times(self, kernels: Tensor) -> Tensor:
        """C times kernels ``(filters, ..., n)``."""
        return _by_group(kernels, self.covariance)

    def divide(self, kernels: Tensor) -> Tensor:
        """C⁻¹ times kernels ``(filters, ..., n)``."""
        return _by_group(kernels, self.inverse)

    def length(self, kernels: Tensor) -> Tensor:
        """Standard deviation of the responses to ``(filters, members, n)``: ``(filters,)``."""
        return inner(kernels, self.times(kernels)).clamp_min(0).sqrt()


def _by_group(kernels: Tensor, matrices: Tensor) -> Tensor:
    groups, n = matrices.shape[:2]
    return (kernels.reshape(groups, -1, n) @ matrices).reshape(kernels.shape)


@dataclass(frozen=True)
class Quadratic:
    """The loss of every filter, ``½ W·C W - c·W`` in units of its scale, and how sure that is.

    Args:
        metric: C.
        linear: c, ``(filters, members, n)``.
        scale: s, ``(filters,)``.
        error: standard error of the loss per unit of length between two kernels, ``(filters,)``.
    """

    metric: Metric
    linear: Tensor
    scale: Tensor
    error: Tensor

    def pick(self, chosen: Tensor) -> Quadratic:
        """That of some filters: of several groups as many of each, in their order."""
        return Quadratic(self.metric, self.linear[chosen], self.scale[chosen], self.error[chosen])

    def at(self, kernels: Tensor) -> Place:
        """The loss of kernels ``(filters, members, n)``, but for a constant, and its slope."""
        seen = self.metric.times(kernels)
        return Place(kernels, seen, inner(0.5 * seen - self.linear, kernels), self.linear - seen)


class Place(NamedTuple):
    """Kernels, and what a quadratic says about them."""

    kernels: Tensor  # W, (filters, members, n)
    seen: Tensor  # C W
    value: Tensor  # the loss, but for a constant, (filters,)
    downhill: Tensor  # minus its gradient

    @property
    def length(self) -> Tensor:
        """Standard deviation of the responses, ``(filters,)``."""
        return inner(self.kernels, self.seen).clamp_min(0).sqrt()

    def or_else(self, other: Place, mask: Tensor) -> Place:
        """These where ``mask`` ``(filters,)`` holds, otherwise the others."""
        return Place(
            *(
                torch.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)
                for a, b in zip(self, other, strict=True)
            )
        )

    def pick(self, chosen: Tensor) -> Place:
        """Those of some filters."""
        return Place(*(value[chosen] for value in self))

    def put(self, index: Tensor, part: Place) -> Place:
        """These with ``part`` in the places ``index``."""
        return Place(*(a.index_copy(0, index, b) for a, b in zip(self, part, strict=True)))

    def distance(self, other: Place) -> Tensor:
        """Standard deviation of the responses' difference, ``(filters,)``."""
        between = inner(self.kernels - other.kernels, self.seen - other.seen)
        return between.clamp_min(0).sqrt()


class Evidence:
    """Running means of one layer's inputs, kernels and gradients.

    Args:
        state: where they are kept, between steps and in checkpoints.
        damping: of the covariance, as a share of its mean variance.

    Example:
        >>> evidence = Evidence({}, damping=1e-4)
        >>> patches = torch.randn(1000, 9, dtype=torch.float64)
        >>> mean, offset = patches.mean(0, keepdim=True), torch.zeros(2, 1)
        >>> evidence.see_patches(patches.T.cov()[None], 0.9)
        >>> target = torch.ones(2, 1, 9, dtype=torch.float64)
        >>> for kernel in torch.randn(5, 2, 1, 9, dtype=torch.float64):
        ...     gradient = 3 * evidence.metric().times(kernel - target)
        ...     loss = evidence.see_gradient(kernel, gradient, offset, mean, 0.9, centred=True)
        >>> [round(s, 2) for s in loss.scale.tolist()]
        [3.0, 3.0]
        >>> torch.allclose(loss.metric.divide(loss.linear), target)
        True
    """

    def __init__(self, state: MutableMapping[str, Any], damping: float) -> None:
        self.state, self.damping = state, damping
        self._metric: Metric | None = None

    def see_patches(self, covariance: Tensor, momentum: float) -> None:
        """Take in the covariance of one batch's patches, ``(groups, n, n)``."""
        state = self.state
        if "covariance" not in state:
            state.update(covariance=covariance, looks=torch.zeros_like(covariance[0, 0, 0]))
        share = self._share("looks", momentum)
        state["covariance"] = state["covariance"].lerp(covariance, share)
        self._metric = None
        # C⁻¹ tells noise alone, for which an older one will do.
        state["n_looks"] = n = state.get("n_looks", 0) + 1
        if n % 8 == 0 or n in (1, 2, 4):
            state["inverse"] = self.metric().inverse

    def see_gradient(
        self,
        kernels: Tensor,
        gradient: Tensor,
        offset: Tensor,
        mean: Tensor,
        momentum: float,
        *,
        centred: bool,
        heard: Tensor | None = None,
    ) -> Quadratic:
        """Take in one batch's gradient.

        Args:
            kernels: where the gradient was taken, ``(filters, members, n)``.
            gradient: of the loss, by them.
            offset: gradient by the responses' means, ``(filters, members)``.
            mean: of the batch's patches, ``(groups, n)``.
            momentum: of the running means.
            centred: whether the responses' means do not matter.
            heard: which filters have news, ``(filters,)``; by default all.

        Returns:
            The loss as far as it is known now.
        """
        state, metric = self.state, self.metric()
        pull = pull_of_brightness(offset, mean)
        gradient = gradient - pull
        level = torch.zeros_like(kernels)
        if not centred:
            rows = mean.repeat_interleave(len(kernels) // len(mean), 0).unsqueeze(1)
            level = rows * (rows * kernels).sum(-1, keepdim=True)
        if "kernel" not in state:
            nothing = torch.zeros_like(kernels[:, 0, 0])
            names = ("spread", "slope", "gradient_spread", "known_spread", "known_slope")
            state.update({name: nothing.clone() for name in names})
            state.update(kernel=kernels, gradient=gradient, level=level, pull=pull)
            state["brightness"] = mean.unsqueeze(-1) * mean.unsqueeze(-2)
            state["steps"] = torch.zeros_like(nothing[0])
        if heard is not None:
            kernels, gradient, level, pull = (
                torch.where(heard[:, None, None], value, state[name])
                for name, value in zip(
                    ("kernel", "gradient", "level", "pull"),
                    (kernels, gradient, level, pull),
                    strict=True,
                )
            )
        share = self._share("steps", momentum)
        moved, turned = kernels - state["kernel"], gradient - state["gradient"]
        seen, seen_moved = metric.times(torch.stack([state["kernel"], moved], 1)).unbind(1)
        both = torch.stack([turned, state["gradient"]], 1)
        pulled, pulled_mean = _by_group(both, state["inverse"]).unbind(1)

        spread, slope = inner(moved, seen_moved), inner(moved, turned)
        news = {"spread": spread, "slope": slope, "gradient_spread": inner(turned, pulled)}
        for name, value in news.items():
            state[name] = (state[name] + share * value) * (1 - share)
        # A filter at rest tells nothing new, and must not make one forget.
        kept = 1 - (spread / (state["known_spread"] + spread + _TINY)).clamp_max(_MEMORY)
        state["known_spread"] = state["known_spread"] * kept + spread
        state["known_slope"] = state["known_slope"] * kept + slope
        means = {"kernel": kernels, "gradient": gradient}
        if not centred:
            brightness = mean.unsqueeze(-1) * mean.unsqueeze(-2)
            means |= {"level": level, "pull": pull, "brightness": brightness}
        for name, value in means.items():
            state[name] = state[name] + share * (value - state[name])
        n = kernels[0].numel()
        self._notice_change(n, momentum, news, share)

        downhill, pulled_mean = state["gradient"], pulled_mean + share * pulled
        length = inner(kernels, seen + seen_moved).clamp_min(0).sqrt()
        length = length.clamp_min(self.least_length(length, metric))
        least = inner(downhill, pulled_mean).clamp_min(0).sqrt() / (_FARTHEST * length) + _TINY
        known = state["known_slope"] / (state["known_spread"] + _TINY)
        scale = torch.where(known > least, known, least)
        linear = seen + share * seen_moved - downhill / scale[:, None, None]
        if not centred:
            linear = linear + state["level"] - state["pull"] / scale[:, None, None]
            metric = Metric(metric.covariance + state["brightness"])
        return Quadratic(metric, linear, scale, self._noise(n, momentum) / scale)

    def keep(self) -> None:
        """Remember what is known of every filter, for ``recall``."""
        for name in _OF_FILTERS:
            self.state[f"kept_{name}"] = self.state[name].clone()

    def recall(self, chosen: Tensor) -> None:
        """Know again what was known of some filters, as if nothing had come since."""
        for name in _OF_FILTERS:
            now, then = self.state[name], self.state[f"kept_{name}"]
            self.state[name] = torch.where(chosen.reshape(-1, *[1] * (now.ndim - 1)), then, now)

    def forget(self) -> None:
        """Remember no more."""
        for name in _OF_FILTERS:
            self.state.pop(f"kept_{name}", None)

    def metric(self) -> Metric:
        """C, as far as it is known."""
        if self._metric is None:
            self._metric = Metric.of(self.state["covariance"], self.damping)
        return self._metric

    @staticmethod
    def least_length(length: Tensor, metric: Metric) -> Tensor:
        """What a filter is taken to respond with at least, to come back if it is silent."""
        faint = metric.covariance.diagonal(dim1=-2, dim2=-1).mean().sqrt()
        return torch.maximum(0.1 * length.median(), 0.01 * faint)

    def _notice_change(
        self, n: int, momentum: float, news: dict[str, Tensor], share: float
    ) -> None:
        """Believe the last moves rather than all that came before, where they clearly disagree.

        The scale of a mean squared error never changes; that of its root grows without bound as
        the error vanishes. Where the very last move disagrees as clearly, it alone is believed.
        """
        state = self.state
        n_moves = (1 + momentum) / (1 - momentum)
        known = state["known_slope"] / (state["known_spread"] + _TINY)
        noise = self._noise(n, momentum)
        for recent, worth in ((dict(state), n_moves), (news, 1.0)):
            lately = recent["slope"] / (recent["spread"] + _TINY)
            error = noise * math.sqrt(n_moves / worth) / (recent["spread"] + _TINY).sqrt()
            other = lately > _MUCH * known
            if worth > 1.0:  # one move alone must not make steps longer
                other |= lately < known / _MUCH
            changed = (lately > 0) & other & ((lately - known).abs() > _SURE * error)
            for name in ("spread", "slope"):
                fresh = recent[name] * worth
                state[f"known_{name}"] = torch.where(changed, fresh, state[f"known_{name}"])
            if worth == 1.0:
                for name, value in news.items():
                    state[name] = torch.where(changed, share * (1 - share) * value, state[name])

    def _noise(self, n: int, momentum: float) -> Tensor:
        """Standard error of the mean gradient along one of n directions, in the metric C⁻¹."""
        state = self.state
        n_moves = (1 + momentum) / (1 - momentum)  # that a running mean is worth
        explained = state["slope"].square() / (state["spread"] + _TINY)
        left = (state["gradient_spread"] - explained).clamp_min(0) / n
        return (left / n_moves).sqrt()

    def _share(self, name: str, momentum: float) -> float:
        """Weight of a newcomer in a running mean that began with nothing."""
        weight = momentum * float(self.state[name]) + 1 - momentum
        self.state[name].fill_(weight)
        return (1 - momentum) / weight


def pull_of_brightness(offset: Tensor, mean: Tensor) -> Tensor:
    """What of a gradient belongs to the batch's mean patch: ``(filters, members, n)``."""
    return offset.unsqueeze(-1) * mean.repeat_interleave(len(offset) // len(mean), 0).unsqueeze(1)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of ``(filters, members, n)``: ``(filters,)``."""
    return (a * b).sum((-2, -1))
