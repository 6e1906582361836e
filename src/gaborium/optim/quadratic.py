"""A quadratic model of the loss in the kernels, estimated from gradients.

The responses of a filter are linear in its kernel W. Near any kernel its loss is therefore, up to a
constant, ``s (½ W·C W - c·W)``, with the covariance C of the patches and a scale s that depends on
the layers that follow. The gradient there is ``g = s (C W - c)``, so that

    c = C W - g / s

*at any kernel*. The running mean of c stays valid while the filter moves, and averages out the
noise of mini-batches. If ``c = C T``, then T is the best of all kernels, and the best Gabor
function is the nearest to T in the metric C. C is never inverted for this, which would amplify
noise.

The scale is estimated from the changes of the gradient when the kernel moves.

Brightness differs much between images, so it has a separate term. With the mean m of one batch's
patches and the gradient o of the loss by the mean response, ``g - o m`` belongs to C, the
covariance *within* a batch, and ``o m`` belongs to ``m mᵀ``. The second term is left out where a
bias or a normalisation compensates the mean response.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MAX_FORGETTING = 0.1  # share of the old estimate of the scale that one move replaces at most
_Z_SCORE, _MIN_FACTOR = 5.0, 1.5  # standard errors and factor of a change of the scale
_MAX_DISTANCE = 5.0  # of the estimated best kernel, in lengths of the present one
_TINY = 1e-30
_MOVES = ("squared_move", "curvature", "squared_change")
_PER_FILTER = (
    *("kernel", "gradient", "mean_response", "mean_gradient"),
    *(*_MOVES, "known_squared_move", "known_curvature"),
)


@dataclass(frozen=True)
class Metric:
    """A covariance of patches for each group of filters, ``(groups, n, n)``."""

    covariance: Tensor

    @classmethod
    def damped(cls, covariance: Tensor, damping: float) -> Metric:
        """A covariance, with ``damping`` of its mean variance added to the variance of a pixel."""
        extra = damping * covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(_TINY)
        one = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        return cls(covariance + extra[:, None, None] * one)

    @property
    def n_groups(self) -> int:
        """Groups of filters, which have as many filters each."""
        return len(self.covariance)

    def inverse(self) -> Tensor:
        """C⁻¹, ``(groups, n, n)``."""
        # Rounding must not make the smallest variances negative.
        root = torch.linalg.cholesky_ex(self.covariance.double())[0]
        return torch.cholesky_inverse(root).to(self.covariance.dtype)

    def times(self, kernels: Tensor) -> Tensor:
        """C times kernels ``(filters, ..., n)``."""
        return _times(self.covariance, kernels)


def _times(matrices: Tensor, kernels: Tensor) -> Tensor:
    """Symmetric matrices ``(groups, n, n)`` times kernels ``(filters, ..., n)``."""
    groups, n = matrices.shape[:2]
    return (kernels.reshape(groups, -1, n) @ matrices).reshape(kernels.shape)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of ``(filters, members, n)``: ``(filters,)``."""
    return (a * b).sum((-2, -1))


@dataclass(frozen=True)
class Quadratic:
    """The loss of every filter in units of its scale, ``½ W·C W - c·W``, and its standard error."""

    metric: Metric  # C
    linear: Tensor  # c, (filters, members, n)
    scale: Tensor  # s, (filters,)
    error: Tensor  # of the loss per unit of length between two kernels, (filters,)

    def select(self, index: Tensor) -> Quadratic:
        """The loss of some filters, with the same number of filters from each group in order."""
        return Quadratic(self.metric, self.linear[index], self.scale[index], self.error[index])

    def at(self, kernels: Tensor) -> Evaluation:
        """The loss of kernels ``(filters, members, n)`` up to a constant, and its slope."""
        weighted = self.metric.times(kernels)
        value = inner(0.5 * weighted - self.linear, kernels)
        return Evaluation(kernels, weighted, value, self.linear - weighted)


class Evaluation(NamedTuple):
    """A quadratic loss at some kernels."""

    kernels: Tensor  # W, (filters, members, n)
    weighted: Tensor  # C W
    value: Tensor  # the loss up to a constant, (filters,)
    descent: Tensor  # minus its gradient

    @property
    def length(self) -> Tensor:
        """Standard deviation of the responses, ``(filters,)``."""
        return inner(self.kernels, self.weighted).clamp_min(0).sqrt()

    def distance(self, other: Evaluation) -> Tensor:
        """Standard deviation of the responses' difference, ``(filters,)``."""
        difference = inner(self.kernels - other.kernels, self.weighted - other.weighted)
        return difference.clamp_min(0).sqrt()

    def where(self, mask: Tensor, other: Evaluation) -> Evaluation:
        """This one where ``mask`` ``(filters,)`` is true, otherwise the other."""
        return Evaluation(*(where(mask, a, b) for a, b in zip(self, other, strict=True)))


def where(mask: Tensor, one: Tensor, other: Tensor | float) -> Tensor:
    """``torch.where`` for a mask ``(filters,)`` and tensors ``(filters, ...)``."""
    return torch.where(mask.reshape(-1, *[1] * (one.ndim - 1)), one, other)


class QuadraticEstimator:
    """Estimates the loss of one layer's filters from running means of patches and gradients."""

    def __init__(self, state: MutableMapping[str, Any], damping: float) -> None:
        # The state holds the running means, between steps and in checkpoints.
        self.state, self.damping = state, damping

    def metric(self) -> Metric:
        """The present estimate of C."""
        return Metric.damped(self.state["covariance"], self.damping)

    def update_covariance(self, covariance: Tensor, momentum: float) -> None:
        """Average in the covariance of one batch's patches, ``(groups, n, n)``."""
        state = self.state
        if "covariance" not in state:
            state["covariance"] = covariance
            state["covariance_weight"] = torch.zeros_like(covariance[0, 0, 0])
        share = self._share("covariance_weight", momentum)
        state["covariance"] = state["covariance"].lerp(covariance, share)
        # C⁻¹ only serves to estimate noise, for which an older one is good enough.
        state["n_covariances"] = n = state.get("n_covariances", 0) + 1
        if n % 8 == 0 or n in (1, 2, 4):
            state["inverse_covariance"] = self.metric().inverse()

    def update_gradient(
        self,
        kernels: Tensor,
        gradient: Tensor,
        offset: Tensor,
        mean: Tensor,
        momentum: float,
        *,
        centred: bool,
        valid: Tensor | None = None,
    ) -> Quadratic:
        """Average in one batch's gradient, and return the present estimate of the loss.

        The gradient is by the kernels ``(filters, members, n)``, ``offset`` by their responses'
        means ``(filters, members)``, and ``mean`` is of the batch's patches, ``(groups, n)``. With
        ``centred`` the loss does not depend on these means. Filters outside ``valid`` have no
        gradient.
        """
        state, metric = self.state, self.metric()
        mean_gradient = gradient_of_mean(offset, mean)
        mean_response = torch.zeros_like(kernels)
        if not centred:
            rows = mean.repeat_interleave(len(kernels) // len(mean), 0).unsqueeze(1)
            mean_response = rows * (rows * kernels).sum(-1, keepdim=True)
        new = {"kernel": kernels, "gradient": gradient - mean_gradient}
        new |= {"mean_response": mean_response, "mean_gradient": mean_gradient}
        if "kernel" not in state:
            zeros = torch.zeros_like(kernels[:, 0, 0])
            state.update({name: zeros.clone() for name in _PER_FILTER if name not in new})
            state.update(new, brightness=mean.unsqueeze(-1) * mean.unsqueeze(-2))
            state["gradient_weight"] = torch.zeros_like(zeros[0])
        if valid is not None:
            new = {name: where(valid, value, state[name]) for name, value in new.items()}
        share = self._share("gradient_weight", momentum)
        move, change = (new[name] - state[name] for name in ("kernel", "gradient"))
        weighted, weighted_move = metric.times(torch.stack([state["kernel"], move], 1)).unbind(1)
        inverse = state["inverse_covariance"]
        divided_change, divided_mean = _times(
            inverse, torch.stack([change, state["gradient"]], 1)
        ).unbind(1)

        last = {"squared_move": inner(move, weighted_move), "curvature": inner(move, change)}
        last["squared_change"] = inner(change, divided_change)
        for name in _MOVES:
            state[name] = (state[name] + share * last[name]) * (1 - share)
        # A filter that hardly moves has little evidence, and keeps its old estimate.
        squared = last["squared_move"]
        forgotten = squared / (state["known_squared_move"] + squared + _TINY)
        for name in ("squared_move", "curvature"):
            kept = state[f"known_{name}"] * (1 - forgotten.clamp_max(_MAX_FORGETTING))
            state[f"known_{name}"] = kept + last[name]
        if centred:
            new = {name: new[name] for name in ("kernel", "gradient")}
        else:
            new["brightness"] = mean.unsqueeze(-1) * mean.unsqueeze(-2)
        for name, value in new.items():
            state[name] = state[name] + share * (value - state[name])
        n = kernels[0].numel()
        self._adapt_scale(n, momentum, last, share)

        gradient, divided_mean = state["gradient"], divided_mean + share * divided_change
        length = inner(kernels, weighted + weighted_move).clamp_min(0).sqrt()
        length = length.clamp_min(self.min_length(length, metric))
        least = inner(gradient, divided_mean).clamp_min(0).sqrt() / (_MAX_DISTANCE * length)
        known, least = self._known_scale(), least + _TINY
        scale = torch.where(known > least, known, least)
        linear = weighted + share * weighted_move - gradient / scale[:, None, None]
        if not centred:
            linear = linear + state["mean_response"] - state["mean_gradient"] / scale[:, None, None]
            metric = Metric(metric.covariance + state["brightness"])
        return Quadratic(metric, linear, scale, self._noise(n, momentum) / scale)

    def snapshot(self) -> dict[str, Tensor]:
        """The present estimates of every filter, for ``restore``."""
        return {name: self.state[name].clone() for name in _PER_FILTER}

    def restore(self, snapshot: dict[str, Tensor], mask: Tensor) -> None:
        """Return to the estimates of a snapshot, for the filters in ``mask``."""
        for name, value in snapshot.items():
            self.state[name] = where(mask, value, self.state[name])

    @staticmethod
    def min_length(length: Tensor, metric: Metric) -> Tensor:
        """Least length that is assumed of a filter, so that a silent one can grow."""
        deviation = metric.covariance.diagonal(dim1=-2, dim2=-1).mean().sqrt()
        return torch.maximum(0.1 * length.median(), 0.01 * deviation)

    def _known_scale(self) -> Tensor:
        return self.state["known_curvature"] / (self.state["known_squared_move"] + _TINY)

    def _adapt_scale(self, n: int, momentum: float, last: dict[str, Tensor], share: float) -> None:
        """Replace the estimate of the scale where the last moves clearly disagree with it.

        The scale of a mean squared error never changes. The scale of its root grows without bound
        as the error vanishes. If the very last move disagrees as clearly, it alone counts.
        """
        state, known = self.state, self._known_scale()
        n_moves, noise = _n_averaged(momentum), self._noise(n, momentum)
        for recent, weight in ((dict(state), n_moves), (last, 1.0)):
            squared = recent["squared_move"] + _TINY
            scale = recent["curvature"] / squared
            error = noise * math.sqrt(n_moves / weight) / squared.sqrt()
            differs = scale > _MIN_FACTOR * known
            if weight > 1.0:  # a single move must not make steps longer
                differs |= scale < known / _MIN_FACTOR
            changed = (scale > 0) & differs & ((scale - known).abs() > _Z_SCORE * error)
            for name in ("squared_move", "curvature"):
                known_name = f"known_{name}"
                state[known_name] = where(changed, recent[name] * weight, state[known_name])
            if weight == 1.0:
                for name, value in last.items():
                    state[name] = where(changed, share * (1 - share) * value, state[name])

    def _noise(self, n: int, momentum: float) -> Tensor:
        """Standard error of the mean gradient along one of n directions, in the metric C⁻¹."""
        state = self.state
        explained = state["curvature"].square() / (state["squared_move"] + _TINY)
        left = (state["squared_change"] - explained).clamp_min(0) / n
        return (left / _n_averaged(momentum)).sqrt()

    def _share(self, name: str, momentum: float) -> float:
        """Weight of the newest value in a running mean that started without a value."""
        weight = momentum * float(self.state[name]) + 1 - momentum
        self.state[name].fill_(weight)
        return (1 - momentum) / weight


def _n_averaged(momentum: float) -> float:
    """Number of values that a running mean is worth."""
    return (1 + momentum) / (1 - momentum)


def gradient_of_mean(offset: Tensor, mean: Tensor) -> Tensor:
    """Part of the gradient that belongs to the batch's mean patch: ``(filters, members, n)``."""
    return offset.unsqueeze(-1) * mean.repeat_interleave(len(offset) // len(mean), 0).unsqueeze(1)
