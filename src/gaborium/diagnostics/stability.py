"""How large a step may be: the curvature at the minimum, and whether the minimum is a cone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gaborium.diagnostics.causes import Finding, Severity, by_severity
from gaborium.diagnostics.losses import LayerLoss, OutputLoss, Probe, duplicate
from gaborium.diagnostics.views import filter_moments, find_gabor_layer, kernel_slopes

_DESCENT_STEPS = 200
_CONE = 0.3  # slope ∝ distance^exponent: below this it stays, above it vanishes
_NEAR = 1e-3  # distances of the cone test, in units of the stored parameters
_FAR = 10.0
_MANY_STEPS = 1e5


@dataclass(frozen=True, eq=False)
class StepLimit:
    """Curvature, slopes and step sizes around the minimum that a descent from here reaches.

    All lengths are in the units of the parameters as they are stored and stepped: rad for an
    ``orientation``, rad/px for an ``angular_wave_vector``, log px for ``log_sigma``.

    Args:
        sharpness: largest eigenvalue of the loss' Hessian at the minimum; infinite at a cone.
        flatness: smallest eigenvalue there; NaN at a cone.
        present_sharpness: largest eigenvalue at the present parameters.
        present_flatness: smallest eigenvalue there; negative where the loss is not convex.
        squared_sharpness: the sharpness of the squared error, or of the square of a loss whose
            outputs are not known; finite at a cone, too.
        exponent: the slope grows as this power of the distance from the minimum: 1 for a squared
            error, 0 at a cone.
        distances: at which the slope was measured, along the steepest direction.
        slopes: the length of the gradient there.
        basin: distance at which the squared error stops being convex along that direction;
            infinite if it never does.
        steepest: the largest slope up to there.
        minimum_loss: where the descent ended.
        present_loss: where it began.
        response_slopes: for a Gabor layer under an ``OutputLoss``, for each learned field
            ``c = rms(image * dg/dfield)`` by filter, over all outputs. At an exact minimum the
            root of the squared error has the slope c.
        learning_rate: of the optimiser; ``None`` without one.
        momentum: of the optimiser, 0 without one.
        adaptive: whether the optimiser divides by the gradient's size, as Adam does.
        epsilon: what an adaptive optimiser adds to that size.
        has_targets: whether the loss compares outputs with targets of their shape.
    """

    sharpness: float
    flatness: float
    present_sharpness: float
    present_flatness: float
    squared_sharpness: float
    exponent: float
    distances: tuple[float, ...]
    slopes: tuple[float, ...]
    basin: float
    steepest: float
    minimum_loss: float
    present_loss: float
    response_slopes: dict[str, Tensor]
    learning_rate: float | None = None
    momentum: float = 0.0
    adaptive: bool = False
    epsilon: float = 0.0
    has_targets: bool = False

    @property
    def is_cone(self) -> bool:
        """Whether the slope stays as the minimum comes near."""
        return self.exponent < _CONE

    @property
    def step_limit(self) -> float:
        """Largest step with which gradient descent settles, 2 / sharpness: 0 at a cone."""
        return self.momentum_limit(0.0)

    def momentum_limit(self, momentum: float) -> float:
        """Largest step with heavy-ball momentum β, ``2 (1 + β) / sharpness``."""
        return 2 * (1 + momentum) / self.sharpness if self.sharpness > 0 else math.inf

    def cycling(self, learning_rate: float) -> float:
        """Distance from the minimum at which descent with this step cycles for ever.

        At a cone of slope c the update is ``-η c`` on one side and ``+η c`` on the other. Once
        nearer than that, the parameter alternates between two points ηc apart, one on either
        side, so that its mean distance is ``η c / 2``. It is 0 where the slope vanishes.
        """
        return learning_rate * self.slopes[-1] / 2 if self.is_cone else 0.0

    @property
    def n_steps(self) -> float | None:
        """Steps to cross the basin at its steepest slope; ``None`` without an optimiser."""
        if self.learning_rate is None:
            return None
        step = self.learning_rate
        if not self.adaptive:
            step *= self.steepest / (1 - min(self.momentum, 1 - 1e-9))
        return min(self.basin, 1.0) / step if step > 0 else math.inf

    @property
    def findings(self) -> list[Finding]:
        """What is wrong with the loss' shape or with the optimiser's step."""
        return by_severity(_findings(self))


def step_limit(
    loss: LayerLoss,
    layer: nn.Module,
    *,
    n_iterations: int = 20,
    optimizer: torch.optim.Optimizer | None = None,
) -> StepLimit:
    """Measure how large a step may be, and whether descent can settle at all.

    A copy of the layer descends to the nearest minimum (by L-BFGS, and on the square of the loss
    as well, which is smooth where the loss is a cone). There the largest and smallest eigenvalue
    of the Hessian are found by Lanczos' method from Hessian-vector products, and the slope is
    measured at ever smaller distances along the steepest direction.

    Args:
        loss: ``loss(layer) -> scalar``, such as an ``OutputLoss``, which is evaluated in double
            precision; any other is evaluated in the layer's own.
        layer: any module with learned parameters.
        n_iterations: of Lanczos' method, at most the number of parameters.
        optimizer: whose step and momentum to judge, and whose parameters to look at.

    Raises:
        ValueError: the loss is not a finite scalar, not the same twice or has no gradient, or
            nothing is learned.

    Example:
        >>> from gaborium import Gabor2d, GaborConv2d
        >>> layer = GaborConv2d(
        ...     1,
        ...     1,
        ...     9,
        ...     bias=False,
        ...     learn="orientation",
        ...     coordinates="textbook",
        ...     start=Gabor2d.of(orientation=0.5, wavelength=5.0, sigma=2.0),
        ... )
        >>> image = torch.randn(1, 1, 40, 40)
        >>> targets = layer(image).detach()
        >>> layer.params = layer.params.detach().replace(orientation=torch.tensor([[0.4]]))
        >>> squared, root = (
        ...     step_limit(OutputLoss(image, targets, measure), layer)
        ...     for measure in ("mse", "rmse")
        ... )
        >>> squared.is_cone, root.is_cone, root.step_limit
        (False, True, 0.0)
    """
    if n_iterations < 1:
        raise ValueError(f"n_iterations must be at least 1, got {n_iterations}.")
    chosen = _names(layer, optimizer)
    settings = _settings(layer, optimizer)
    Probe(loss, layer)  # says what is wrong with them in their own precision
    if isinstance(loss, OutputLoss):
        loss, layer = loss.double(), duplicate(layer).double()
    probe = Probe(loss, layer)
    probe.learned = {name: value for name, value in probe.learned.items() if name in chosen}
    here = probe.flat()
    present_loss, _ = probe.slope(here)

    squared, is_smooth = None, False
    if isinstance(loss, OutputLoss) and loss.has_outputs_like_targets(layer):
        squared = Probe(loss.squared(), layer)
        squared.learned = probe.learned
        is_smooth = loss.is_squared_kind()
    there = _descend(squared or probe, here)
    if not is_smooth:  # other measures may have other minima
        there = min(
            (_descend(probe, there), _descend(probe, there, square=True), there),
            key=lambda point: probe.at(point).item(),
        )
    minimum_loss = probe.at(there).item()

    direction = _steepest_direction(probe, there)
    # Near enough to see a cone, and not so near that rounding blunts it.
    smallest = _NEAR / 10 if probe.is_double else _NEAR
    distances = [smallest * 10 ** (k / 3) for k in range(6, -1, -1)]
    slopes = [_mean_slope(probe, there, r * direction) for r in distances]
    exponent = _exponent(distances, slopes)
    is_cone = exponent < _CONE
    basin, steepest = _basin(probe, there, direction, is_cone=is_cone)
    flat, sharp = (math.nan, math.inf) if is_cone else _extremes(probe.at, there, n_iterations)
    if squared is not None:
        squared_sharp = _extremes(squared.at, there, n_iterations)[1]
    else:
        squared_sharp = 2 * slopes[-1] ** 2 if is_cone else sharp
    present_flat, present_sharp = _extremes(probe.at, here, n_iterations)
    return StepLimit(
        sharpness=sharp,
        flatness=flat,
        present_sharpness=present_sharp,
        present_flatness=present_flat,
        squared_sharpness=squared_sharp,
        exponent=exponent,
        distances=tuple(distances),
        slopes=tuple(slopes),
        basin=basin,
        steepest=steepest,
        minimum_loss=minimum_loss,
        present_loss=present_loss,
        response_slopes=_response_slopes(loss, probe, there),
        learning_rate=settings.learning_rate,
        momentum=settings.momentum,
        adaptive=settings.adaptive,
        epsilon=settings.epsilon,
        has_targets=squared is not None,
    )


# -- the optimiser ------------------------------------------------------------------------------


def _names(layer: nn.Module, optimizer: torch.optim.Optimizer | None) -> set[str]:
    """The parameters that are learned, by the optimiser if there is one."""
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be an nn.Module, got {type(layer).__name__}.")
    learned = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    if not learned:
        raise ValueError("The layer learns nothing: none of its parameters requires a gradient.")
    if optimizer is None:
        return set(learned)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    chosen = {name for name, p in learned.items() if id(p) in held}
    if not chosen:
        raise ValueError(
            "The optimizer holds none of the layer's learned parameters; make it from "
            "layer.parameters() of this very layer."
        )
    return chosen


class _Settings(NamedTuple):
    learning_rate: float | None = None
    momentum: float = 0.0
    adaptive: bool = False
    epsilon: float = 0.0


def _settings(layer: nn.Module, optimizer: torch.optim.Optimizer | None) -> _Settings:
    """Of the group with the largest step among those that hold parameters of the layer."""
    if optimizer is None:
        return _Settings()
    mine = {id(p) for p in layer.parameters()}
    groups = [g for g in optimizer.param_groups if any(id(p) in mine for p in g["params"])]
    group = max(groups, key=lambda group: float(group["lr"]))
    adaptive = "eps" in group or "etas" in group
    return _Settings(
        float(group["lr"]),
        0.0 if adaptive else float(group.get("momentum", 0.0)),
        adaptive,
        float(group.get("eps", 0.0)),
    )


# -- the minimum and its surroundings -----------------------------------------------------------


def _descend(probe: Probe, start: Tensor, *, square: bool = False) -> Tensor:
    """The lowest point that L-BFGS comes to, on the loss or on its square."""
    point = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point], max_iter=_DESCENT_STEPS, history_size=20, tolerance_grad=1e-14,
        tolerance_change=1e-16, line_search_fn="strong_wolfe",
    )  # fmt: skip
    lowest, best = math.inf, start

    def closure() -> float:
        nonlocal lowest, best
        value, gradient = probe.slope(point)
        if value < lowest:
            lowest, best = value, point.detach().clone()
        # At an exact hit the slope of a root is 0/0.
        point.grad = gradient.nan_to_num(0.0) * (2 * value if square else 1.0)
        return value**2 if square else value

    optimizer.step(closure)
    return best


def _steepest_direction(probe: Probe, minimum: Tensor) -> Tensor:
    """The direction of the greatest slope around a minimum, be it smooth or a cone.

    The gradient at a small displacement u is Hu where the loss is smooth and Fu / |u| at a cone of
    a root: repeated, it turns to the first eigenvector of either.
    """
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(minimum.shape, generator=generator, dtype=torch.float64).to(minimum)
    for _ in range(1 if minimum.numel() == 1 else 12):
        direction = direction / direction.norm()
        _, gradient = probe.slope(minimum + _NEAR * direction)
        gradient = gradient.nan_to_num(0.0)
        if not gradient.norm() > 0:
            break
        direction = gradient
    return direction / direction.norm()


def _mean_slope(probe: Probe, minimum: Tensor, step: Tensor) -> float:
    """Length of the gradient at equal distances to both sides."""
    both = [probe.slope(minimum + sign * step)[1].norm().item() for sign in (-1, 1)]
    return sum(both) / 2


def _exponent(distances: list[float], slopes: list[float]) -> float:
    """The power of slope ∝ distance^power at the nearer distances; 1 where there is no slope."""
    half = len(distances) // 2
    if not all(slope > 0 and math.isfinite(slope) for slope in slopes):
        return 1.0
    x = torch.tensor(distances[half:], dtype=torch.float64).log()
    y = torch.tensor(slopes[half:], dtype=torch.float64).log()
    x = x - x.mean()
    return ((x * y).sum() / x.square().sum()).item()


def _basin(
    probe: Probe, minimum: Tensor, direction: Tensor, *, is_cone: bool
) -> tuple[float, float]:
    """Where the squared error's slope stops growing, and the loss' steepest slope up to there."""
    floor = probe.at(minimum).item()
    distance, steepest, before = _NEAR, 0.0, -math.inf
    while distance < _FAR:
        rises, tallest = [], 0.0
        for sign in (-1, 1):
            value, gradient = probe.slope(minimum + sign * distance * direction)
            rise = sign * torch.dot(gradient, direction).item()
            tallest = max(tallest, abs(rise))
            rises.append(rise * (value - floor) if is_cone else rise)
        growth = sum(rises) / 2
        if not growth > before or not math.isfinite(growth):
            return distance / 1.1, max(steepest, 0.0)
        before, steepest = growth, max(steepest, tallest)
        distance *= 1.1
    return math.inf, steepest


def _extremes(
    function: Callable[[Tensor], Tensor], point: Tensor, n_iterations: int
) -> tuple[float, float]:
    """Smallest and largest eigenvalue of the Hessian, by Lanczos with full orthogonalisation.

    Both are bounds from within, which a few iterations bring to several digits.
    """
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(function(point), point, create_graph=True)

    def product(v: Tensor) -> Tensor:
        if not gradient.requires_grad:  # the loss is linear
            return torch.zeros_like(v)
        (hv,) = torch.autograd.grad(
            gradient, point, v, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return hv

    n = point.numel()
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(n, generator=generator, dtype=torch.float64).to(point)
    basis = [v / v.norm()]
    images: list[Tensor] = []
    for _ in range(min(n_iterations, n)):
        images.append(product(basis[-1]))
        rest = images[-1]
        for _ in range(2):  # twice is enough
            Q = torch.stack(basis)
            rest = rest - Q.T @ (Q @ rest)
        size = rest.norm()
        if not size > 1e-10 * images[-1].norm():
            break
        basis.append(rest / size)
    Q, AQ = torch.stack(basis[: len(images)]), torch.stack(images)
    if not AQ.isfinite().all():
        return math.nan, math.nan
    projected = (Q @ AQ.T).double()
    values = torch.linalg.eigvalsh((projected + projected.T) / 2)
    return values[0].item(), values[-1].item()


def _response_slopes(loss: LayerLoss, probe: Probe, point: Tensor) -> dict[str, Tensor]:
    """``rms(image * dg/dfield)`` over all outputs, by learned field, at the minimum."""
    name, layer = find_gabor_layer(probe.layer)
    if not isinstance(loss, OutputLoss) or layer is None or name:
        return {}
    if layer.output != "real" or any(step != 1 for step in layer.dilation) or not layer.learn:
        return {}
    copied = duplicate(layer)
    copied.load_state_dict(layer.state_dict() | probe.named(point))
    names, slopes = kernel_slopes(copied)
    powers = []
    for index in range(layer.n_filters):
        squares = filter_moments(layer, index, loss.inputs, None).second_moment
        powers.append(((slopes[index] @ squares) * slopes[index]).sum(1))
    rms = (torch.stack(powers) / layer.out_channels).clamp_min(0).sqrt()
    found: dict[str, list[Tensor]] = {}
    for name, column in zip(names, rms.unbind(1), strict=True):
        found.setdefault(name.partition("[")[0], []).append(column)
    return {field: torch.stack(columns, 1) for field, columns in found.items()}


# -- findings -----------------------------------------------------------------------------------


def _findings(found: StepLimit) -> list[Finding]:
    findings = []
    rate, momentum = found.learning_rate, found.momentum
    numbers = {"exponent": found.exponent, "basin": found.basin, "sharpness": found.sharpness}
    if rate is not None:
        numbers |= {"learning_rate": rate, "momentum": momentum}
    slope = found.slopes[-1]
    thrown = 0.0  # how far one passes a cone
    if rate is not None:
        thrown = rate if found.adaptive else rate * slope / (1 - min(momentum, 1 - 1e-9))

    if found.is_cone:
        sentence = (
            "The loss is a cone at its minimum: its slope does not shrink as the minimum comes "
            f"near, it stays {slope:.3g}. "
        )
        severity = Severity.WARNING
        if rate is None:
            sentence += "Descent with a fixed step cycles around it and never settles."
        else:
            share = thrown / found.basin
            severity = Severity.SEVERE if share > 1 else Severity.WARNING
            severity = Severity.NOTE if share < 1e-3 else severity
            sentence += f"A step of {rate:g} passes it by {thrown:.3g}"
            sentence += (
                f", out of the basin of half-width {found.basin:.3g}, again and again."
                if share > 1
                else f", and cycles within the basin of half-width {found.basin:.3g}."
            )
        numbers_here = numbers | {"slope": slope, "thrown": thrown}
        findings.append(
            Finding("cone at the minimum", severity, sentence, numbers_here, _smooth(found))
        )
        if momentum > 0 and thrown > found.basin >= thrown * (1 - momentum):
            findings.append(
                Finding(
                    "momentum too large",
                    Severity.SEVERE,
                    f"Momentum {momentum:g} makes a step {1 / (1 - momentum):.0f} times as long: "
                    f"{thrown:.3g}, beyond the basin's half-width {found.basin:.3g}, where one "
                    "step alone would not leave it.",
                    numbers_here,
                    "for group in optimizer.param_groups:\n    group['momentum'] = 0.0",
                    confidence=0.7,
                )
            )
    if rate is None:
        return findings

    limit = found.momentum_limit(momentum)
    safe = 1 / found.sharpness if 0 < found.sharpness < math.inf else None
    smaller = f"for group in optimizer.param_groups:\n    group['lr'] = {safe!r}" if safe else ""
    if found.adaptive and rate > found.basin:
        findings.append(
            Finding(
                "step too large",
                Severity.SEVERE,
                f"Every step of this optimiser is about {rate:g}, more than the basin's half-width "
                f"{found.basin:.3g}: it is thrown out as often as it comes in.",
                numbers,
                f"for group in optimizer.param_groups:\n    group['lr'] = {found.basin / 20!r}",
            )
        )
    elif not found.adaptive and not found.is_cone and rate > limit:
        findings.append(
            Finding(
                "step too large",
                Severity.SEVERE,
                f"A step of {rate:g} is above {limit:.3g}, the largest with which descent can "
                f"settle where the curvature is {found.sharpness:.3g}.",
                numbers | {"limit": limit},
                smaller,
            )
        )
    elif not found.adaptive and not found.is_cone and momentum > 0:
        travel = rate * found.steepest / (1 - min(momentum, 1 - 1e-9))
        if travel > 8 * found.basin:
            findings.append(
                Finding(
                    "momentum too large",
                    Severity.WARNING,
                    f"Momentum {momentum:g} carries a step on by {travel:.3g}, "
                    f"{travel / found.basin:.0f} times the basin's half-width: it runs through the "
                    "minimum many times.",
                    numbers | {"travel": travel},
                    "for group in optimizer.param_groups:\n    group['momentum'] = 0.5",
                    confidence=0.6,
                )
            )
    n_steps = found.n_steps or 0.0
    faint = found.adaptive and found.steepest < 10 * found.epsilon
    if found.steepest > 0 and (n_steps > _MANY_STEPS or faint):
        sentence = (
            f"The gradient, {found.steepest:.3g} at its largest, drowns in the optimiser's eps of "
            f"{found.epsilon:g}: the loss is too small."
            if faint
            else f"At the loss' steepest slope, {found.steepest:.3g}, a step of {rate:g} needs "
            f"{n_steps:.2g} steps to the minimum: the loss is too small for the step."
        )
        louder = (
            "unscaled = loss\n"
            f"loss = lambda output, target: {1 / found.steepest!r} * unscaled(output, target)"
        )
        findings.append(
            Finding(
                "loss scale",
                Severity.SEVERE,
                sentence,
                numbers | {"n_steps": n_steps, "steepest": found.steepest},
                smaller if smaller and not faint else louder,
            )
        )
    return findings


def _smooth(found: StepLimit) -> str:
    """The squared error in place of its root, with a step that settles."""
    if found.has_targets:
        text = "import torch\nloss = torch.nn.functional.mse_loss"
    else:
        text = "distance = loss\nloss = lambda output, target: distance(output, target).square()"
    if found.learning_rate is not None and not found.adaptive and found.squared_sharpness > 0:
        text += (
            "\nfor group in optimizer.param_groups:\n"
            f"    group['lr'] = {1 / found.squared_sharpness!r}"
        )
    return text
