"""Does every parameter of a module get a right gradient, does it move, and does that matter?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gaborium.diagnostics import mending, units
from gaborium.diagnostics.causes import (
    RENEW_OPTIMIZER,
    SCALE_RATE,
    Finding,
    Severity,
    by_severity,
    finding,
    listed,
)
from gaborium.diagnostics.sandbox import (
    HALF,
    Run,
    Sandbox,
    Trace,
    check_inputs,
    check_loss,
    copied,
    copied_together,
    equal,
    tensors_of,
)
from gaborium.layers import GABOR_LAYERS

_N_DIRECTIONS = 3  # the gradient's own, and two at random
_STEP = 1e-6  # of a finite difference, as a share of the parameter's size
_NUDGE = 1e-2  # to see whether the output follows, as a share of the parameter's size
_TOO_MANY_STEPS = 1e6  # for the loss to fall by its own size
_FLAT = 1e-3  # of the loss: what a parameter has to do with less of, it cannot lower
_RATE = 1e-2  # where neither a rate nor an optimiser is given


@dataclass(frozen=True)
class ParameterCheck:
    """What became of one parameter.

    Args:
        name: as in ``module.named_parameters()``.
        shape: of the tensor.
        has_gradient: it got a gradient that is not zero everywhere.
        gradient_norm: L2 norm, in the loss's unit per unit of the parameter; NaN without one.
        disagreement: largest difference between the gradient and central differences of the loss
            in float64, over a few directions, as a share of the larger of the two; NaN where it
            could not be measured.
        moved: it changed at one step of the optimiser.
        output_follows: the output changes when the parameter does.
        state: ``"learns"``; ``"flat"``: the loss does not depend on it here; or the cause of the
            finding that it is part of.
    """

    name: str
    shape: tuple[int, ...]
    has_gradient: bool
    gradient_norm: float
    disagreement: float
    moved: bool
    output_follows: bool
    state: str


@dataclass(frozen=True)
class GradientCheck:
    """What ``check_gradients`` found.

    Args:
        parameters: one entry per parameter of the module, in its order.
        loss: at the parameters as they are.
        found: the findings, in the order in which they were made.
        not_in_double: why derivatives could not be checked in float64, or ``""``.
    """

    parameters: tuple[ParameterCheck, ...]
    loss: float
    found: tuple[Finding, ...]
    not_in_double: str = ""

    @property
    def findings(self) -> list[Finding]:
        """The worst first."""
        return by_severity(self.found)

    def to_table(self) -> list[dict[str, object]]:
        """One row per parameter, with the fields of ``ParameterCheck``."""
        return [dict(vars(parameter)) for parameter in self.parameters]


def check_gradients(
    module: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    loss: Callable[[Any], Tensor],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    learning_rate: float | None = None,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> GradientCheck:
    """Check that every parameter gets a right gradient, moves, and reaches the output.

    It serves any module. The module runs in the mode it is in; call it in ``train()`` mode to
    check what training does. All work is done on copies: parameters, buffers, gradients, mode and
    the state of random numbers stay as they are. The copies run about twenty times per parameter.

    The gradient is compared with central differences of the loss in float64, in the direction of
    the gradient and in two others. Where the loss has a kink, as behind a ReLU of 0, any slope
    between those of its two sides is right.

    Args:
        module: any module; its parameters and the inputs lie on one device.
        inputs: a batch, or a tuple of what ``module`` is called with.
        loss: from the module's output to a scalar, the same at every call.
        optimizer: the loop's own, of which a copy takes one step; by default plain gradient
            descent.
        learning_rate: of that descent; by default 0.01.
        tolerance: disagreement with finite differences above which a gradient is wrong.
        seed: of the random numbers of every run, such as those of dropout.

    Returns:
        A record with an entry per parameter, and the findings: ``"no gradient"``,
        ``"wrong gradient"``, ``"nan gradient"``, ``"does not move"``, ``"vanishing step"``,
        ``"stale cache"``, ``"wrong unit"``, ``"frozen"`` and ``"unused parameter"``.

    Raises:
        TypeError: the loss is not a tensor, or the module has nothing in it.
        ValueError: the loss is not a scalar or differs from call to call; the inputs hold NaN or
            infinities, or lie on another device or have another precision than the module.

    Example:
        >>> from gaborium import GaborConv2d
        >>> layer = GaborConv2d(1, 2, 7, seed=0)
        >>> image = torch.rand(1, 1, 16, 16)
        >>> check = check_gradients(layer, image, lambda output: output.square().mean())
        >>> [parameter.name for parameter in check.parameters if parameter.state == "learns"]
        ['angular_wave_vector', 'log_sigma', 'log_aspect_ratio', 'even', 'odd', 'bias']
        >>> check.findings
        []
    """
    if optimizer is not None and learning_rate is not None:
        raise ValueError("Give the optimizer or a learning_rate, not both.")
    if learning_rate is not None and not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}.")
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}.")
    # A module may convert its inputs, but it does not convert them to half precision.
    is_half = any(parameter.dtype in HALF for parameter in module.parameters())
    check_inputs(module, inputs, any_dtype=not is_half)
    if any(t.is_floating_point() and not t.isfinite().all() for t in tensors_of(inputs)):
        raise ValueError("inputs must be finite, got NaN or infinity.")
    trials = Sandbox(module, inputs, loss, seed)
    return _Check(trials, optimizer, learning_rate, tolerance).result()


class _Differences(NamedTuple):
    """A gradient beside finite differences."""

    disagreement: float
    slope: float  # the steepest that finite differences saw
    gradient_norm: float


class _Check:
    """The work of ``check_gradients``, in the order in which questions build on each other."""

    def __init__(
        self,
        trials: Sandbox,
        optimizer: torch.optim.Optimizer | None,
        learning_rate: float | None,
        tolerance: float,
    ) -> None:
        self.trials, self.optimizer = trials, optimizer
        self.rate, self.rate_is_guess = learning_rate or _RATE, learning_rate is None
        self.tolerance = tolerance
        self.module = trials.module
        self.trained = [n for n, p in self.module.named_parameters() if p.requires_grad]
        self.found: list[Finding] = []
        self.states: dict[str, str] = {}

    def result(self) -> GradientCheck:
        self.copy, self.optimizer_copy = copied_together(self.module, self.optimizer)
        before = {name: id(p) for name, p in self.copy.named_parameters()}
        held = dict(self.copy.named_parameters())
        run = self.trials.run(self.copy)
        check_loss(run.loss, self.trials.run().loss)
        self.loss = run.loss.item()
        after = {name: id(p) for name, p in self.copy.named_parameters()}
        self.rewrapped = [n for n in self.trained if after.get(n) != before[n]]
        if run.loss.requires_grad:
            run.loss.backward()
        self.gradients = {name: parameter.grad for name, parameter in held.items()}
        self.follows = {name: self._follows(name) for name in self.trained}
        self.overwritten = [n for n in self.trained if n not in self.rewrapped and self._undone(n)]
        self.differences, self.not_in_double = self._compare()
        self._nan()
        self._without_gradient(run)
        self._wrong()
        self.moved = self._step()
        self._stale()
        self._units()
        self._frozen()
        return GradientCheck(
            tuple(self._parameter(name, p) for name, p in self.module.named_parameters()),
            self.loss,
            tuple(self.found),
            self.not_in_double,
        )

    # -- runs -----------------------------------------------------------------------------------

    def _follows(self, name: str, *, mode: str = "") -> bool:
        """Whether the output follows a parameter that changes between two runs of one copy."""
        module = copied(self.module)
        if mode:
            module.train(mode == "train")
        first = self.trials.run(module).output
        if not _nudge(module, name):
            return False
        if mode == "train":  # what is computed once in evaluation comes after the change
            self.trials.run(module)
        return not equal(first, self.trials.run(module).output)

    def _undone(self, name: str) -> bool:
        """Whether the forward pass takes back what a step does to a parameter."""
        module = copied(self.module)
        self.trials.run(module)
        old = module.get_parameter(name).detach().clone()
        _nudge(module, name)
        self.trials.run(module)
        return not self.follows[name] and equal(old, module.get_parameter(name))

    # -- derivatives ----------------------------------------------------------------------------

    def _compare(self) -> tuple[dict[str, _Differences], str]:
        """Gradients beside finite differences, all in float64."""
        reason = "it has no floating loss"
        for widen in (False, True):
            try:
                trials = self.trials.double(widen=widen)
                module = copied(trials.module)
                run = trials.run(module)
                if run.loss.dtype != torch.float64:
                    reason = f"its loss stays {run.loss.dtype}"
                    continue
                if run.loss.requires_grad:
                    run.loss.backward()
            except Exception as error:  # somebody else's code may raise anything
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            self.twin, self.twin_run = trials, run
            if not math.isfinite(run.loss.item()):
                return {}, "the loss is not finite"
            parameters = dict(module.named_parameters())
            skip = {*self.rewrapped, *self.overwritten}
            return {
                name: self._differences(name, parameters[name].grad)
                for name in self.trained
                if name in parameters and name not in skip
            }, ""
        return {}, f"The module cannot be run in double precision: {reason}."

    def _differences(self, name: str, gradient: Tensor | None) -> _Differences:
        start = self.twin.module.get_parameter(name).detach()
        generator = torch.Generator().manual_seed(0)
        shape = start.shape
        draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
        directions = [draw.to(start.device) for draw in draws]
        if gradient is not None and bool(gradient.isfinite().all()) and bool((gradient != 0).any()):
            directions.insert(0, gradient)
        worst, steepest = 0.0, 0.0
        norm = math.nan if gradient is None else gradient.norm().item()
        for direction in directions[:_N_DIRECTIONS]:
            unit = direction / direction.norm()
            claimed = 0.0 if gradient is None else (gradient * unit).sum().item()
            wrong, slope = self._disagreement(name, unit, claimed, norm / math.sqrt(start.numel()))
            worst, steepest = max(worst, wrong), max(steepest, abs(slope))
        return _Differences(worst, steepest, norm)

    def _disagreement(
        self, name: str, unit: Tensor, claimed: float, typical: float
    ) -> tuple[float, float]:
        """How far the claimed slope is from that of the loss, beyond what differences can tell."""
        at, h = self.twin_run.loss.item(), _STEP * _size(self.twin.module.get_parameter(name))
        h *= math.sqrt(unit.numel())
        best, slope = math.inf, 0.0
        for step in (h, 10 * h, 0.1 * h):
            up, down = self._loss_at(name, step * unit), self._loss_at(name, -step * unit)
            left, right = (at - down) / step, (up - at) / step
            # Rounding of a loss that many numbers have been added up to.
            noise = 1e-13 * max(abs(at), abs(up), abs(down)) / step
            middle = (up - down) / (2 * step)
            low, high = min(left, right) - noise, max(left, right) + noise
            off = max(abs(middle - claimed) - noise, 0.0)
            scale = max(abs(middle), abs(claimed), 1e-3 * (0.0 if math.isnan(typical) else typical))
            if off > self.tolerance * scale:  # at a kink any slope between the two sides is right
                off = max(low - claimed, claimed - high, 0.0)
            share = off / scale if scale > noise else 0.0
            if share < best:
                best, slope = share, middle if abs(middle) > 10 * noise else 0.0
            if best <= self.tolerance:
                break
        return best, slope

    def _loss_at(self, name: str, change: Tensor) -> float:
        module = copied(self.twin.module)
        with torch.no_grad():
            module.get_parameter(name).add_(change)
        return self.twin.run(module).loss.item()

    # -- findings -------------------------------------------------------------------------------

    def _say(self, cause: str, location: Iterable[str], **options: Any) -> None:
        self.found.append(finding(cause, location, **options))
        for name in self.found[-1].location:
            self.states.setdefault(name, cause)

    def _has_gradient(self, name: str) -> bool:
        gradient = self.gradients.get(name)
        return gradient is not None and bool((gradient != 0).any())

    def _nan(self) -> None:
        bad = [
            name
            for name in self.trained
            if (gradient := self.gradients.get(name)) is not None
            and not bool(gradient.isfinite().all())
        ]
        if math.isfinite(self.loss) and not bad:
            return
        trace = Trace()
        run = self.trials.run(trace=trace)
        narrow = any(t.dtype in HALF for t in tensors_of(run.output))
        twin_is_finite = hasattr(self, "twin") and math.isfinite(self.twin_run.loss.item())
        root = trace.zero_roots[0] if trace.zero_roots else ""
        remedy = ""
        if narrow and twin_is_finite and not (math.isfinite(self.loss) and root):
            reason = (
                f"half precision overflows (the loss is {self.loss:g}, and "
                f"{self.twin_run.loss.item():g} in double precision)"
            )
            remedy = (
                "module = module.float()\ninputs, targets = inputs.float(), targets.float()\n"
                + RENEW_OPTIMIZER
            )
        elif root and math.isfinite(self.loss):
            reason = f"a root is taken of 0, where its slope is infinite ({root}). "
            if self.loss == 0:
                reason += "The fit is exact: use the squared error"
                remedy = "import torch\nloss = torch.nn.functional.mse_loss\n"
            else:
                reason += "Add a small constant under it, or use torch.linalg.vector_norm"
        elif not math.isfinite(self.loss):
            lost = [n for n, p in self.module.named_parameters() if not bool(p.isfinite().all())]
            finite = all(bool(t.isfinite().all()) for t in tensors_of(run.output))
            reason = f"the loss itself is {self.loss:g}, because " + (
                f"{listed(lost)} holds NaN or infinities"
                if lost
                else "its function makes it so from a finite output"
                if finite
                else "the output is not finite"
            )
        else:
            reason = "the loss is finite"
        location = bad if math.isfinite(self.loss) else self.trained
        self._say("nan gradient", location, remedy=remedy, reason=reason, loss=self.loss)

    def _without_gradient(self, run: Run) -> None:
        silent = [
            name
            for name in self.trained
            if not self._has_gradient(name) and name not in (*self.overwritten, *self.states)
        ]
        if not silent:
            return
        if not run.loss.requires_grad and any(one.requires_grad for one in tensors_of(run.output)):
            line = _break_of_loss(self.trials)
            line = line or ".item(), .detach(), numpy, a rounding or a comparison"
            self._say(
                "no gradient",
                silent,
                reason=f"the loss is cut off from the output, at {line}",
                parameters=len(silent),
            )
            return
        followed = [n for n in silent if self.follows[n]]
        depends = {n for n in followed if self._matters(n)}
        underflow = {n for n in depends if self._underflows(n)}
        self._underflow(sorted(underflow))
        self._lost([n for n in silent if n in depends - underflow])
        still = [n for n in silent if n not in followed and self.gradients.get(n) is None]
        cached = [n for n in still if units.is_gabor_like(n)]
        self._computed_once(cached)
        unused = [n for n in still if n not in cached]
        if unused:
            self._say("unused parameter", unused)

    def _matters(self, name: str) -> bool:
        """Without a gradient although the loss has a slope; a flat place has none either."""
        if self.gradients.get(name) is None:
            return True
        # At an exact fit the slopes are those of rounding.
        return self.loss != 0 and name in self.differences and self.differences[name].slope > 0

    def _underflows(self, name: str) -> bool:
        found = self.differences.get(name)
        return found is not None and found.gradient_norm > 0 and found.disagreement < 1e-2

    def _underflow(self, names: list[str]) -> None:
        if names:
            dtype = self.module.get_parameter(names[0]).dtype
            self._say(
                "vanishing step",
                names,
                remedy="module = module.float()\n" + RENEW_OPTIMIZER,
                reason=f"the gradient of {listed(names)} is rounded to zero in {dtype}",
                gradient_norm=self.differences[names[0]].gradient_norm,
            )

    def _lost(self, names: list[str]) -> None:
        """The output follows these parameters, and no gradient comes back."""
        if not names:
            return
        module = copied(self.module)
        trace = Trace({id(module.get_parameter(name)): name for name in names})
        self.trials.run(module, trace=trace)
        groups: dict[str, list[str]] = {}
        for name in names:
            breaks = trace.breaks.get(name, [])
            groups.setdefault(breaks[0].partition(" (")[0] if breaks else "", []).append(name)
        for group in groups.values():
            slopes = [self.differences[n].slope for n in group if n in self.differences]
            self._say(
                "no gradient",
                group,
                remedy=self._replacement(group[0]),
                reason="the output follows, but "
                + self._how(group[0], trace.breaks.get(group[0], [])),
                parameters=len(group),
                **({"slope_of_the_loss": max(slopes)} if slopes else {}),
            )

    def _how(self, name: str, breaks: list[str]) -> str:
        if self.gradients.get(name) is not None:
            return "it passes through a derivative of zero, such as a rounding or a sign"
        outright = [b for b in breaks if not b.startswith(("`.item", "`.float"))] or breaks
        owner = name.rpartition(".")[0]
        if self.rewrapped:
            near = [n for n in self.rewrapped if n.startswith(owner)] or self.rewrapped
            return f"{listed(near)} is wrapped into a new nn.Parameter at every forward pass"
        if outright and outright[0].startswith("`.data`") and self.overwritten:
            near = [n for n in self.overwritten if n.startswith(owner)] or self.overwritten
            return (
                f"the kernel is written through {outright[0]}: {listed(near)} gets the gradient "
                "instead, and is overwritten at the next forward pass"
            )
        if outright:
            return f"it is lost at {outright[0]}"
        return "its value leaves the graph, through .data, .detach(), .item() or numpy"

    def _computed_once(self, names: list[str]) -> None:
        """Nothing follows these parameters; a kernel made from them long ago is still in use."""
        if not names:
            return
        kept = sorted({kept for name in names for kept in self._kernels_beside(name)})
        self._say(
            "no gradient",
            names,
            confidence=1.0 if kept else 0.7,
            remedy=self._replacement(names[0]),
            reason="the kernel is computed once, at construction or at the first call, and then "
            "kept" + (f" ({listed(kept)})" if kept else ""),
            parameters=len(names),
        )

    def _kernels_beside(self, name: str) -> list[str]:
        """Tensors in the shape of kernels that are kept beside a parameter."""
        owner = name.rpartition(".")[0]
        found = []
        for path, part in self.module.get_submodule(owner).named_modules(prefix=owner):
            kept = {**dict(vars(part)), **part._buffers, **part._parameters}
            found += [
                f"{path}.{key}".lstrip(".")
                for key, value in kept.items()
                if isinstance(value, Tensor) and value.ndim in (3, 4, 5)
            ]
        return found

    def _replacement(self, name: str) -> str:
        owner = name.rpartition(".")[0]
        try:
            possible = mending.is_replaceable(self.module, owner, self.trials.inputs)
        except Exception:  # what cannot be run alone cannot be replaced
            possible = False
        return mending.replacement_code(owner) if possible else ""

    def _wrong(self) -> None:
        wrong = {
            name: found
            for name, found in self.differences.items()
            if name not in self.states
            and self._has_gradient(name)
            and not found.disagreement <= self.tolerance
        }
        if wrong:
            worst = max(wrong, key=lambda name: wrong[name].disagreement)
            self._say(
                "wrong gradient",
                wrong,
                remedy=self._replacement(worst) if units.is_gabor_like(worst) else "",
                worst=worst,
                error=f"{wrong[worst].disagreement:.0%}",
                **{f"disagreement[{n}]": found.disagreement for n, found in wrong.items()},
            )

    def _step(self) -> dict[str, bool]:
        """Take one step on the copy; say what does not move, and where it is too short."""
        parameters = dict(self.copy.named_parameters())
        stepped = [n for n in self.trained if n in parameters and self._has_gradient(n)]
        old = {name: parameters[name].detach().clone() for name in stepped}
        gradients = {name: parameters[name].grad for name in stepped}
        if self.optimizer_copy is not None:
            # Some, such as L-BFGS, ask for the loss again; it stays what it was.
            self.optimizer_copy.step(lambda: self.loss)
        else:
            with torch.no_grad():
                for name in stepped:
                    gradient = gradients[name]
                    if gradient is not None:
                        parameters[name].sub_(self.rate * gradient)
        moved = {name: not equal(old[name], parameters[name]) for name in stepped}
        known = self._known_to_optimizer()
        still = [n for n in stepped if not moved[n] and n not in self.states and n in known]
        still = [n for n in still if not self._is_rounding(n)]
        lost = [n for n in self.overwritten if n not in self.states and self._has_gradient(n)]
        if lost and not any(found.cause == "no gradient" for found in self.found):
            self._say(
                "does not move", lost, reason="the next forward pass writes the old value back"
            )
        fall = 0.0
        for name in stepped:
            gradient = gradients[name]
            if gradient is not None and name not in (*self.overwritten, *self.rewrapped):
                change = old[name].double() - parameters[name].detach().double()
                fall += (gradient.double() * change).sum().item()
        coarse = any(self.module.get_parameter(n).dtype in HALF for n in still)
        if not coarse:
            self._too_short([n for n in stepped if n in known], old, gradients, fall)
        still = [
            name
            for name in still
            if name not in self.states and self._weight(old[name], gradients[name]) > _FLAT
        ]
        if still:
            self._does_not_move(still)
        return moved

    def _is_rounding(self, name: str) -> bool:
        """Whether a gradient is 0 but for rounding, as of a bias that batch norm takes away."""
        gradient, found = self.gradients.get(name), self.differences.get(name)
        if gradient is None or found is None:
            return False
        return found.gradient_norm < 1e-3 * gradient.double().norm().item()

    def _does_not_move(self, names: list[str]) -> None:
        parameter = self.module.get_parameter(names[0])
        half = parameter.dtype in HALF
        is_guess = self.optimizer is None and self.rate_is_guess
        self._say(
            "does not move",
            names,
            severity=Severity.WARNING if is_guess else None,
            remedy="module = module.float()\n" + RENEW_OPTIMIZER
            if half
            else SCALE_RATE.format(factor=1000),
            reason=f"a step is smaller than the rounding of {parameter.dtype}",
            learning_rate=self._rate_of(names[0]),
            rounding=torch.finfo(parameter.dtype).eps * _size(parameter),
        )

    def _too_short(
        self,
        names: list[str],
        old: dict[str, Tensor],
        gradients: dict[str, Tensor | None],
        fall: float,
    ) -> None:
        """Steps so short that the loss would take millions of them, though it has a slope."""
        if not names or not math.isfinite(fall) or self.loss == 0 or self.found:
            return
        weight = max(self._weight(old[name], gradients[name]) for name in names)
        n_steps = abs(self.loss / fall) if fall else math.inf
        if weight < _FLAT or n_steps < _TOO_MANY_STEPS:
            return
        self._say(
            "vanishing step",
            names,
            severity=Severity.WARNING if self.optimizer is None else None,
            remedy=SCALE_RATE.format(factor=f"{min(n_steps / 1e2, 1e12):.3g}"),
            reason=f"at the learning rate {self._rate_of(names[0]):g} the loss needs about "
            f"{n_steps:.0e} steps to fall by its own size. The loss is scaled down, or the rate is",
            n_steps=n_steps,
            loss=self.loss,
            gradient_times_size=weight,
        )

    def _weight(self, value: Tensor, gradient: Tensor | None) -> float:
        """What share of the loss a parameter has to do with: gradient times size over loss."""
        if gradient is None or self.loss == 0:
            return 0.0
        return gradient.double().norm().item() * value.double().norm().item() / abs(self.loss)

    def _rate_of(self, name: str) -> float:
        if self.optimizer is None:
            return self.rate
        parameter = self.module.get_parameter(name)
        for group in self.optimizer.param_groups:
            if any(one is parameter for one in group["params"]):
                return float(group["lr"])
        return 0.0

    def _known_to_optimizer(self) -> set[str]:
        if self.optimizer is None:
            return set(self.trained)
        known = {id(one) for group in self.optimizer.param_groups for one in group["params"]}
        return {n for n in self.trained if id(self.module.get_parameter(n)) in known}

    def _stale(self) -> None:
        """Kernels that are computed once in a mode, and do not follow after that."""
        candidates = [n for n in self.trained if n not in (*self.overwritten, *self.rewrapped)]
        here = [
            name
            for name in candidates
            if not self.follows[name]
            and self._has_gradient(name)
            and name in self.differences
            and self.differences[name].slope > 0
        ]
        if here:
            self._say(
                "stale cache",
                here,
                remedy=self._replacement(here[0]),
                reason=f"The output does not follow {listed(here)} after the first call",
            )
            return
        stale = [n for n in candidates if self._follows(n, mode="train")]
        stale = [n for n in stale if not self._follows(n, mode="eval") and self._seen_in_eval(n)]
        if stale:
            self._say(
                "stale cache",
                stale,
                severity=Severity.WARNING,
                confidence=0.8,
                remedy=self._replacement(stale[0]),
                reason=f"In eval() mode the output does not follow {listed(stale)} after the first "
                "call, so loaded or assigned parameters have no effect",
            )
        self._modes_differ()

    def _seen_in_eval(self, name: str) -> bool:
        """Whether a change made in train() mode shows in eval() mode: it is used there, then."""
        outputs = []
        for nudged in (False, True):
            module = copied(self.module).train()
            if nudged:
                _nudge(module, name)
            self.trials.run(module)
            outputs.append(self.trials.run(module.eval()).output)
        return not equal(*outputs)

    def _modes_differ(self) -> None:
        """The same parameters, and another output: right for dropout, wrong for a convolution."""
        modules = [copied(self.module).train(mode) for mode in (True, False)]
        buffers = {name: value.clone() for name, value in modules[0].named_buffers()}
        runs = [self.trials.run(module).output for module in modules]
        other = replace(self.trials, seed=self.trials.seed + 1)
        if not equal(runs[0], other.run(copied(self.module).train()).output):
            return  # it draws, as dropout does
        if not all(equal(value, buffers.get(n)) for n, value in modules[0].named_buffers()):
            return  # it keeps statistics, as batch norm does
        outputs = [list(tensors_of(output)) for output in runs]
        if [one.shape for one in outputs[0]] != [one.shape for one in outputs[1]]:
            return
        distance = math.sqrt(sum(
            (a.double() - b.double()).square().sum().item()
            for a, b in zip(*outputs, strict=True)
        ))  # fmt: skip
        size = math.sqrt(sum(one.double().square().sum().item() for one in outputs[0]))
        if not distance <= 1e-3 * size and not any(f.cause == "stale cache" for f in self.found):
            self._say(
                "stale cache",
                (),
                severity=Severity.WARNING,
                confidence=0.5,
                reason="The output in eval() mode differs from the one in train() mode, though the "
                "module neither draws random numbers nor keeps statistics. Perhaps",
                relative_difference=distance / size if size else math.inf,
            )

    def _units(self) -> None:
        if not hasattr(self, "twin"):
            return
        extent = max((size for t in tensors_of(self.trials.inputs) for size in t.shape[2:]),
                     default=0)  # fmt: skip
        for name, parameter in self.module.named_parameters():
            if not parameter.is_floating_point() or self._is_ours(name):
                continue
            found = units.suspect(name, parameter, float(extent), partial(self._is_turn, name))
            if found is not None:
                self.found.append(found)
                self.states.setdefault(name, found.cause)

    def _is_ours(self, name: str) -> bool:
        owner = self.module.get_submodule(name.rpartition(".")[0])
        return isinstance(owner, GABOR_LAYERS)

    def _is_turn(self, name: str, turn: float) -> bool:
        """Whether the output is the same when a parameter is moved by a supposed whole turn."""
        module = copied(self.twin.module)
        with torch.no_grad():
            module.get_parameter(name).add_(turn)
        moved, still = self.twin.run(module).output, self.twin_run.output
        return all(
            torch.allclose(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())
            for a, b in zip(tensors_of(moved), tensors_of(still), strict=True)
            if a.is_floating_point()
        )

    def _frozen(self) -> None:
        nothing = not self.trained
        names = [n for n, p in self.module.named_parameters() if not p.requires_grad]
        frozen = [n for n in names if nothing or units.is_gabor_like(n)]
        if frozen:
            thaw = "".join(f"module.get_parameter({n!r}).requires_grad_(True)\n" for n in frozen)
            self._say_frozen(frozen, "requires_grad=False", thaw + RENEW_OPTIMIZER, nothing=nothing)
        for name, part in self.module.named_modules():
            if isinstance(part, GABOR_LAYERS):
                # The centre stays where it is unless asked for.
                fields = type(part.params).field_names()
                left = [f for f in fields if f not in part.learn and f != "center"]
                if left:
                    code = mending.rebuilding_code(
                        part, name, learn=repr(tuple(sorted({*part.learn, *left})))
                    )
                    reason = f"left out of learn={' of ' if name else ''}{name}"
                    self._say_frozen(left, reason, code, nothing=nothing)
        unknown = [n for n in self.trained if n not in self._known_to_optimizer()]
        if unknown:
            alone = len(unknown) == len(self.trained)
            code = "optimizer.add_param_group(dict(params=["
            code += ", ".join(f"module.get_parameter({n!r})" for n in unknown)
            code += "], lr=optimizer.param_groups[0]['lr']))\n"
            self._say(
                "frozen",
                unknown,
                severity=Severity.SEVERE if alone else Severity.WARNING,
                confidence=1.0 if alone else 0.6,
                remedy=RENEW_OPTIMIZER if alone else code,
                reason="the optimizer does not hold it"
                + (", and may have been made for another copy" if alone else ""),
            )

    def _say_frozen(self, names: list[str], reason: str, code: str, *, nothing: bool) -> None:
        self._say(
            "frozen",
            names,
            severity=Severity.SEVERE if nothing else None,
            confidence=0.9 if nothing else None,
            remedy=code,
            reason=reason + (", and nothing else learns" if nothing else ""),
        )

    # -- the record -----------------------------------------------------------------------------

    def _parameter(self, name: str, parameter: Tensor) -> ParameterCheck:
        gradient = self.gradients.get(name)
        differences = self.differences.get(name)
        state = self.states.get(name)
        if state is None and name in (*self.overwritten, *self.rewrapped):
            state = "no gradient"
        if state is None and not parameter.requires_grad:
            state = "frozen"
        if state is None:
            learns = self._has_gradient(name) and not self._is_rounding(name)
            state = "learns" if learns else "flat"
        return ParameterCheck(
            name,
            tuple(parameter.shape),
            self._has_gradient(name),
            math.nan if gradient is None else gradient.double().norm().item(),
            math.nan if differences is None else differences.disagreement,
            self.moved.get(name, False),
            self.follows.get(name, False),
            state,
        )


def _break_of_loss(trials: Sandbox) -> str:
    """Where a loss leaves the graph: the output is followed through it."""
    module = copied(trials.module)
    output = trials.run(module).output
    followed = {id(one): "output" for one in tensors_of(output) if one.requires_grad}
    trace = Trace(followed)
    with trace:
        trials.loss(output)
    breaks = trace.breaks.get("output", [])
    return breaks[0] if breaks else ""


def _nudge(module: nn.Module, name: str) -> bool:
    """Change a parameter a little, in every entry; ``False`` where it is gone."""
    try:
        parameter = module.get_parameter(name)
    except AttributeError:
        return False
    generator = torch.Generator().manual_seed(1)
    change = torch.randn(parameter.shape, generator=generator).sign() * _NUDGE * _size(parameter)
    with torch.no_grad():
        parameter.add_(change.to(parameter))
    return True


def _size(parameter: Tensor) -> float:
    """Root mean square of the entries; of a parameter that is zero, 1."""
    size = parameter.detach().double().square().mean().sqrt().item()
    return size if math.isfinite(size) and size > 1e-8 else 1.0
