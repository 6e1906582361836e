"""How large a step may be: the curvature at the minimum, and whether the minimum is a cone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium.diagnostics.causes import SET_RATE, Finding, Severity, by_severity, finding
from gaborium.diagnostics.sandbox import TrainingSetup, is_response

_DESCENT_STEPS = 200
_CONE = 0.3  # slope ∝ distance^exponent: a cone below this exponent, a bowl above it
_NEAR = 1e-3  # distances of the cone test, in units of the stored parameters
_FAR = 10.0
_MOST_EXACT = 100  # parameters up to which the Hessian is computed
_MANY_STEPS = 1e5


@dataclass(frozen=True, eq=False)
class StepLimit:
    """Curvature, slopes and step sizes around the minimum that a descent from here reaches.

    All lengths are in the units of the stored parameters, which the optimiser changes: rad for an
    ``orientation``, rad/px for an ``angular_wave_vector``, log px for ``log_sigma``.

    Args:
        sharpness: largest eigenvalue of the loss' Hessian at the minimum; infinite at a cone.
        squared_sharpness: the sharpness of the squared error; finite at a cone, too.
        exponent: the slope grows as this power of the distance from the minimum: 1 for a squared
            error, 0 at a cone.
        distances: at which the slope was measured, along the steepest direction.
        slopes: the length of the gradient there.
        basin: distance at which the squared error stops being convex along that direction;
            infinite if it never does.
        step_length: how far one step of the optimiser goes at the last slope, without momentum;
            ``None`` without an optimiser.
        findings: faults of the loss' shape and of the optimiser's step, the worst first.
    """

    sharpness: float
    squared_sharpness: float
    exponent: float
    distances: tuple[float, ...]
    slopes: tuple[float, ...]
    basin: float
    step_length: float | None
    findings: list[Finding]

    @property
    def is_cone(self) -> bool:
        """Whether the slope does not shrink near the minimum."""
        return self.exponent < _CONE

    @property
    def step_limit(self) -> float:
        """Largest step with which gradient descent settles, 2 / sharpness: 0 at a cone."""
        return self.momentum_limit(0.0)

    def momentum_limit(self, momentum: float) -> float:
        """Largest step with heavy-ball momentum β, ``2 (1 + β) / sharpness``."""
        return 2 * (1 + momentum) / self.sharpness if self.sharpness > 0 else math.inf

    def cycling(self, learning_rate: float) -> float:
        """Mean distance from the minimum at which descent with this step cycles for ever.

        At a cone of slope c the update is ``-η c`` on one side and ``+η c`` on the other. Once
        nearer than that, the parameter alternates between two points ηc apart, one on either
        side, so that its mean distance is ``η c / 2``. At a bowl it is 0.
        """
        return learning_rate * self.slopes[-1] / 2 if self.is_cone else 0.0


def step_limit(setup: TrainingSetup) -> StepLimit:
    """Measure how large a step may be, and whether descent can settle at all.

    A copy of the module descends to the nearest minimum in double precision (by L-BFGS, and on the
    square of the loss as well, which is smooth where the loss is a cone). There the Hessian's
    largest eigenvalue is computed, and the slope at ever smaller distances along the steepest
    direction. Above 100 learned parameters the eigenvalue is estimated from that slope.

    Args:
        setup: any module with learned parameters, and targets of its outputs' shape. The step and
            momentum of its optimizer are judged, and only the optimizer's parameters vary.

    Raises:
        ValueError: the targets have another shape; the loss is not a finite scalar that is the same
            twice; or no parameter is learned.
        RuntimeError: the loss has no gradient.

    Example:
        >>> layer, inputs = torch.nn.Linear(2, 1), torch.randn(50, 2)
        >>> targets = inputs.sum(1, keepdim=True)
        >>> for loss in (F.mse_loss, lambda a, b: F.mse_loss(a, b).sqrt()):
        ...     found = step_limit(TrainingSetup(layer, loss, inputs, targets))
        ...     print(found.is_cone, found.step_limit > 0)
        False True
        True False
    """
    names, optimizer = _stepped(setup)
    setup.check()  # reports faults in their own precision
    if not is_response(setup.run().output, setup.targets):
        raise ValueError(
            "The step is judged where targets are responses, of the outputs' shape; the minimum "
            "of a classifier's loss may be at infinity."
        )
    setup = setup.double()
    loss, squared = (_Objective(one, names) for one in (setup, replace(setup, loss=F.mse_loss)))
    there = _descend(squared, squared.start)
    if not setup.power():  # other losses may have other minima
        there = min(
            (_descend(loss, there), _descend(loss, there, square=True), there),
            key=lambda point: loss(point).item(),
        )

    direction = _steepest_direction(loss, there)
    # Near enough to see a cone, and far enough that rounding does not hide it.
    distances = [_NEAR / 10 * 10 ** (k / 3) for k in range(6, -1, -1)]
    slopes = [
        sum(loss.slope(there + side * r * direction)[1].norm().item() for side in (-1, 1)) / 2
        for r in distances
    ]
    exponent = 1.0
    if all(0 < slope < math.inf for slope in slopes):
        exponent = math.log(slopes[-4] / slopes[-1]) / math.log(distances[-4] / distances[-1])
    is_cone = exponent < _CONE
    basin, steepest = _basin(loss, there, direction, is_cone=is_cone)
    sharpness = math.inf if is_cone else _sharpness(loss, there, slopes[-1] / distances[-1])
    estimate = 2 * slopes[-1] ** 2 if is_cone else sharpness
    found = StepLimit(
        sharpness=sharpness,
        squared_sharpness=_sharpness(squared, there, estimate),
        exponent=exponent,
        distances=tuple(distances),
        slopes=tuple(slopes),
        basin=basin,
        step_length=optimizer and optimizer.rate * (1.0 if optimizer.adaptive else slopes[-1]),
        findings=[],
    )
    return replace(found, findings=by_severity(_findings(found, optimizer, steepest)))


class _Objective:
    """A loss as a function of the learned parameters in one flat vector."""

    def __init__(self, setup: TrainingSetup, names: Iterable[str]) -> None:
        self._setup = setup
        self._learned = {name: setup.module.get_parameter(name).detach() for name in names}
        self.start = torch.cat([value.flatten() for value in self._learned.values()])

    def __call__(self, point: Tensor) -> Tensor:
        parts = point.split([value.numel() for value in self._learned.values()])
        pairs = zip(parts, self._learned.items(), strict=True)
        loss: Tensor = self._setup.run_with({n: p.view_as(v) for p, (n, v) in pairs}).loss
        return loss

    def slope(self, point: Tensor) -> tuple[float, Tensor]:
        """The loss and its gradient."""
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            value = self(point)
            return value.item(), torch.autograd.grad(value, point)[0]


# -- the optimiser ------------------------------------------------------------------------------


class _Optimizer(NamedTuple):
    """What the steps of an optimiser depend on."""

    rate: float
    momentum: float
    adaptive: bool  # divides by the gradient's size, as Adam does
    epsilon: float  # added to that size

    def travel(self, slope: float) -> float:
        """Length of a step at a slope, with what momentum adds to it."""
        return (
            self.rate if self.adaptive else self.rate * slope / (1 - min(self.momentum, 1 - 1e-9))
        )


def _stepped(setup: TrainingSetup) -> tuple[list[str], _Optimizer | None]:
    """Names of the parameters that are learned, and the group of the optimiser's largest step."""
    learned = {id(p): name for name, p in setup.module.named_parameters() if p.requires_grad}
    groups: Any = [{"params": list(setup.module.parameters())}]
    if setup.optimizer is not None:
        groups = setup.optimizer.param_groups
    held = {id(p): group for group in groups for p in group["params"] if id(p) in learned}
    if not held:
        raise ValueError(
            "No parameter is learned: the module's parameters must require gradients, and an "
            "optimizer must be made from module.parameters() of this very module."
        )
    names = [name for key, name in learned.items() if key in held]
    if setup.optimizer is None:
        return names, None
    group = max(held.values(), key=lambda group: float(group["lr"]))
    adaptive = "eps" in group or "etas" in group
    momentum = 0.0 if adaptive else float(group.get("momentum", 0.0))
    epsilon = float(group.get("eps", 0.0))
    return names, _Optimizer(float(group["lr"]), momentum, adaptive, epsilon)


# -- the minimum and its surroundings -----------------------------------------------------------


def _sharpness(loss: _Objective, point: Tensor, estimate: float) -> float:
    """Largest eigenvalue of the Hessian; the estimate for too many parameters."""
    if len(point) > _MOST_EXACT:
        return estimate
    hessian = torch.autograd.functional.hessian(loss, point)
    finite = bool(hessian.isfinite().all())
    return torch.linalg.eigvalsh(hessian).max().item() if finite else math.nan


def _descend(loss: _Objective, start: Tensor, *, square: bool = False) -> Tensor:
    """The lowest point that L-BFGS comes to, on the loss or on its square."""
    point = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point], max_iter=_DESCENT_STEPS, history_size=20, tolerance_grad=1e-14,
        tolerance_change=1e-16, line_search_fn="strong_wolfe",
    )  # fmt: skip
    lowest, best = math.inf, start

    def closure() -> float:
        nonlocal lowest, best
        value, gradient = loss.slope(point)
        if value < lowest:
            lowest, best = value, point.detach().clone()
        # At an exact hit the slope of a root is 0/0.
        point.grad = gradient.nan_to_num(0.0) * (2 * value if square else 1.0)
        return value**2 if square else value

    optimizer.step(closure)
    return best


def _steepest_direction(loss: _Objective, minimum: Tensor) -> Tensor:
    """The direction of the greatest slope around a minimum, be it smooth or a cone.

    The gradient at a small displacement u is Hu where the loss is smooth and Fu / |u| at a cone of
    a root: repeated, it turns to the first eigenvector of either.
    """
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(minimum.shape, generator=generator, dtype=torch.float64).to(minimum)
    for _ in range(1 if minimum.numel() == 1 else 12):
        gradient = loss.slope(minimum + _NEAR * (direction / direction.norm()))[1].nan_to_num(0)
        if not gradient.norm() > 0:
            break
        direction = gradient
    return direction / direction.norm()


def _basin(
    loss: _Objective, minimum: Tensor, direction: Tensor, *, is_cone: bool
) -> tuple[float, float]:
    """Where the squared error's slope stops growing, and the loss' steepest slope up to there."""
    floor = loss(minimum).item()
    distance, steepest, before = _NEAR, 0.0, -math.inf
    while distance < _FAR:
        rises, tallest = [], 0.0
        for sign in (-1, 1):
            value, gradient = loss.slope(minimum + sign * distance * direction)
            rises.append(sign * torch.dot(gradient, direction).item())
            tallest = max(tallest, abs(rises[-1]))
            rises[-1] *= value - floor if is_cone else 1.0
        growth = sum(rises) / 2
        if not growth > before or not math.isfinite(growth):
            return distance / 1.1, max(steepest, 0.0)
        before, steepest = growth, max(steepest, tallest)
        distance *= 1.1
    return math.inf, steepest


# -- findings -----------------------------------------------------------------------------------


def _findings(found: StepLimit, optimizer: _Optimizer | None, steepest: float) -> Iterator[Finding]:
    basin, last, cone = found.basin, found.slopes[-1], "cone at the minimum"
    build: Any = partial(finding, exponent=found.exponent, basin=basin, sharpness=found.sharpness)
    remedy = "import torch\nloss = torch.nn.functional.mse_loss\n"
    if optimizer is None:
        if found.is_cone:
            consequence = "Descent with a fixed step cycles around it and never settles"
            yield build(cone, consequence=consequence, remedy=remedy, slope=last)
        return

    rate, momentum, adaptive, epsilon = optimizer
    build = partial(build, learning_rate=rate, momentum=momentum)
    travel = optimizer.travel(last if found.is_cone else steepest)
    if found.is_cone:
        severity = Severity.SEVERE if travel > basin else Severity.WARNING
        severity = Severity.NOTE if travel < 1e-3 * basin else severity
        end = "out of" if travel > basin else "and cycles within"
        consequence = f"A step of {rate:g} passes it by {travel:.3g}, {end} the basin of "
        consequence += f"half-width {basin:.3g}"
        if not adaptive and found.squared_sharpness > 0:
            remedy += SET_RATE.format(rate=1 / found.squared_sharpness)
        yield build(
            cone, severity=severity, consequence=consequence, remedy=remedy, slope=last,
            travel=travel,
        )  # fmt: skip
    settling = 1 / found.sharpness if found.sharpness > 0 else math.inf
    limit = found.momentum_limit(momentum)
    reason = f"the largest with which descent settles at a curvature of {found.sharpness:.3g}"
    if adaptive:
        limit, settling = basin, basin / 20
        reason = "the basin's half-width, and this optimiser's steps all have about that length"
    is_long = rate > limit and (adaptive or not found.is_cone)
    if is_long:
        yield build("step too large", limit=limit, reason=reason, rate=repr(settling))
    alone = travel * (1 - momentum)
    if momentum > 0 and found.is_cone and alone <= basin < travel:
        yield build(
            "momentum too large", travel=travel, times=f"{travel / basin:.1f}", new_momentum="0.0",
            reason="one step alone would not leave it",
        )  # fmt: skip
    elif momentum > 0 and not found.is_cone and not is_long and travel > 8 * basin:
        yield build(
            "momentum too large", travel=travel, times=f"{travel / basin:.1f}", new_momentum="0.5",
            reason="it passes the minimum many times", severity=Severity.WARNING, confidence=0.6,
        )  # fmt: skip

    crossing = optimizer.travel(steepest)
    n_steps = min(basin, 1.0) / crossing if crossing > 0 else math.inf
    is_faint = adaptive and steepest < 10 * epsilon
    if steepest > 0 and (n_steps > _MANY_STEPS or is_faint):
        reason = f"its gradient is {steepest:.3g} at most, and "
        reason += (
            f"the optimiser adds an eps of {epsilon:g} to its size"
            if is_faint
            else f"a step of {rate:g} needs {n_steps:.2g} steps to the minimum"
        )
        remedy = SET_RATE.format(rate=settling)
        if is_faint or not 0 < settling < math.inf:
            remedy = (
                "unscaled = loss\n"
                f"loss = lambda output, target: {1 / steepest!r} * unscaled(output, target)"
            )
        yield build("loss scale", reason=reason, remedy=remedy, n_steps=n_steps, steepest=steepest)
