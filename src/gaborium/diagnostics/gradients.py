"""Does every parameter of a module get a right gradient, does it move, and does that matter?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gaborium.diagnostics.causes import (
    REBUILD,
    RENEW_OPTIMIZER,
    SINGLE_PRECISION,
    Finding,
    Severity,
    by_severity,
    finding,
    listed,
)
from gaborium.diagnostics.remedies import replacement_code
from gaborium.diagnostics.sandbox import (
    HALF,
    Sandbox,
    Trace,
    check_inputs,
    check_loss,
    copied,
    copied_together,
    equal,
    tensors_of,
)
from gaborium.diagnostics.unit_checks import check_unit, is_gabor_like
from gaborium.layers import GABOR_LAYERS

_N_DIRECTIONS = 3  # of finite differences: the gradient's own, and two at random
_STEP = 1e-6  # of a finite difference, as a share of the parameter's size
_NUDGE = 1e-2  # change that shows whether the output follows, as a share of the parameter's size
_TOO_MANY_STEPS = 1e6  # for the loss to fall by its own size
_FLAT = 1e-3  # gradient times size, as a share of the loss: less cannot lower it
_RATE = 1e-2  # of the gradient descent that is tried without an optimizer


@dataclass(frozen=True)
class ParameterCheck:
    """The results for one parameter.

    Args:
        name: as in ``module.named_parameters()``.
        shape: of the tensor.
        has_gradient: it got a gradient that is not zero everywhere.
        gradient_norm: L2 norm, in the loss's unit per unit of the parameter; NaN without one.
        disagreement: largest difference between the gradient and central differences of the loss
            in float64, over a few directions, as a share of the larger of the two; NaN where it
            could not be measured.
        moved: it changed at one step of the optimizer.
        output_follows: the output changes when the parameter does.
        state: ``"learns"``; ``"flat"``: the loss does not depend on it here; or the cause of its
            first finding.
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
    """The result of ``check_gradients``.

    Args:
        parameters: one entry per parameter of the module, in its order.
        loss: at the present parameters.
        findings: the worst first.
        not_in_double: why derivatives could not be checked in float64, or ``""``.
    """

    parameters: tuple[ParameterCheck, ...]
    loss: float
    findings: list[Finding]
    not_in_double: str = ""

    def to_table(self) -> list[dict[str, object]]:
        """One row per parameter, with the fields of ``ParameterCheck``."""
        return [dict(vars(parameter)) for parameter in self.parameters]


def check_gradients(
    module: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    loss: Callable[[Any], Tensor],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> GradientCheck:
    """Check that every parameter gets a right gradient, moves, and reaches the output.

    It works for any module, in its present mode; call it in ``train()`` mode to check training.
    Everything is done on copies: parameters, buffers, gradients, mode and the state of random
    numbers do not change. The copies run about twenty times per parameter.

    The gradient is compared with central differences of the loss in float64, in the direction of
    the gradient and in two others. Where the loss has a kink, as behind a ReLU of 0, any slope
    between the slopes of its two sides is right.

    Args:
        module: any module; its parameters and the inputs are on one device.
        inputs: a batch, or a tuple of the arguments of ``module``.
        loss: from the module's output to a scalar, the same at every call.
        optimizer: of the training loop, of which a copy takes one step; by default gradient
            descent with a rate of 0.01.
        tolerance: disagreement with finite differences above which a gradient is wrong.
        seed: of the random numbers of every run, such as dropout.

    Returns:
        A record with an entry per parameter, and the findings: ``"no gradient"``,
        ``"wrong gradient"``, ``"nan gradient"``, ``"does not move"``, ``"vanishing step"``,
        ``"stale cache"``, ``"wrong unit"``, ``"frozen"`` and ``"unused parameter"``.

    Raises:
        TypeError: the loss is not a tensor, or ``module`` is not a module.
        ValueError: the loss is not a scalar or differs from call to call; the inputs hold NaN or
            infinities, or are on another device or of another precision than the module.

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
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}.")
    # Modules may convert their inputs, but rarely to half precision.
    is_half = any(parameter.dtype in HALF for parameter in module.parameters())
    check_inputs(module, inputs, any_dtype=not is_half)
    if any(t.is_floating_point() and not t.isfinite().all() for t in tensors_of(inputs)):
        raise ValueError("inputs must be finite, got NaN or infinity.")
    return _Check(Sandbox(module, inputs, loss, seed), optimizer, tolerance).result()


class _Differences(NamedTuple):
    """A gradient compared with finite differences, all in float64."""

    disagreement: float
    slope: float  # the steepest finite difference
    gradient_norm: float


class _Measurement:
    """Measurements on copies of a module: gradients, finite differences, effects on the output."""

    def __init__(
        self, sandbox: Sandbox, optimizer: torch.optim.Optimizer | None, tolerance: float
    ) -> None:
        self.sandbox, self.module, self.tolerance = sandbox, sandbox.module, tolerance
        parameters = dict(self.module.named_parameters())
        self.trained = [name for name, value in parameters.items() if value.requires_grad]
        # A plain descent is less telling than the optimizer of the loop.
        self.severity = Severity.WARNING if optimizer is None else Severity.SEVERE
        if optimizer is None:
            optimizer = torch.optim.SGD([*parameters.values()] or [torch.zeros(())], lr=_RATE)
        rates = {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
        self.rates = {n: rates[id(p)] for n, p in parameters.items() if id(p) in rates}
        self.copy, self.optimizer = copied_together(self.module, optimizer)
        before = dict(self.copy.named_parameters())
        self.run = sandbox.run(self.copy)
        check_loss(self.run.loss, sandbox.run().loss)
        self.loss: float = self.run.loss.item()
        if self.run.loss.requires_grad:
            self.run.loss.backward()
        self.gradients = {name: parameter.grad for name, parameter in before.items()}
        after = dict(self.copy.named_parameters())
        self.rewrapped = [n for n in self.trained if after.get(n) is not before[n]]
        effects = {name: self._effect(name) for name in self.trained}
        self.follows = {name: follows for name, (follows, _) in effects.items()}
        self.overwritten = [n for n, effect in effects.items() if effect == (False, True)]
        self.twin: Sandbox | None = None  # in float64
        self.twin_output: Any = None
        self.twin_loss = math.nan
        self.exact, self.not_in_double = self._compare()

    def has_gradient(self, name: str) -> bool:
        gradient = self.gradients.get(name)
        return gradient is not None and bool((gradient != 0).any())

    def is_rounding(self, name: str) -> bool:
        """Whether a gradient is zero except for rounding, as of a bias before a batch norm."""
        gradient, exact = self.gradients.get(name), self.exact.get(name)
        if gradient is None or exact is None:
            return False
        return exact.gradient_norm < 1e-3 * gradient.double().norm().item()

    # -- does the output follow a parameter? ----------------------------------------------------

    def _effect(self, name: str) -> tuple[bool, bool]:
        """Whether the output follows a change, and whether the next run undoes the change."""
        module = copied(self.module)
        first = self.sandbox.run(module).output
        old = _nudge(module, name)
        if old is None:
            return False, False
        follows = not equal(first, self.sandbox.run(module).output)
        return follows, name not in self.rewrapped and equal(old, module.get_parameter(name))

    def keeps_in_eval(self, name: str) -> bool:
        """Whether eval() mode keeps a kernel: changes after its first call have no effect."""
        module, other = (copied(self.module).train() for _ in range(2))
        _nudge(other, name)
        for one in (module, other):
            self.sandbox.run(one)
        before, after = (self.sandbox.run(one.eval()).output for one in (module, other))
        _nudge(module, name)
        return not equal(before, after) and equal(before, self.sandbox.run(module).output)

    # -- derivatives ----------------------------------------------------------------------------

    def _compare(self) -> tuple[dict[str, _Differences], str]:
        """Gradients and finite differences in float64, or the reason that they are missing."""
        reason = ""
        for widen in (False, True):
            try:
                twin = self.sandbox.double(widen=widen)
                module = copied(twin.module)
                run = twin.run(module)
                if run.loss.dtype != torch.float64:
                    reason = f"its loss stays {run.loss.dtype}"
                    continue
                if run.loss.requires_grad:
                    run.loss.backward()
            except Exception as error:  # somebody else's code may raise anything
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            self.twin, self.twin_output, self.twin_loss = twin, run.output, run.loss.item()
            if not math.isfinite(self.twin_loss):
                return {}, "the loss is not finite"
            parameters = dict(module.named_parameters())
            return {
                name: self._differences(twin, name, parameters[name].grad)
                for name in self.trained
                if name in parameters and name not in (*self.rewrapped, *self.overwritten)
            }, ""
        return {}, f"The module cannot be run in double precision: {reason}."

    def _differences(self, twin: Sandbox, name: str, gradient: Tensor | None) -> _Differences:
        start = twin.module.get_parameter(name).detach()
        generator = torch.Generator().manual_seed(0)
        draws = [
            torch.randn(start.shape, generator=generator, dtype=torch.float64) for _ in range(2)
        ]
        directions = [draw.to(start.device) for draw in draws]
        if gradient is not None and bool(gradient.isfinite().all()) and bool((gradient != 0).any()):
            directions.insert(0, gradient)
        worst, steepest = 0.0, 0.0
        norm = math.nan if gradient is None else gradient.norm().item()
        typical = 0.0 if math.isnan(norm) else norm / math.sqrt(start.numel())
        for direction in directions[:_N_DIRECTIONS]:
            unit = direction / direction.norm()
            claimed = 0.0 if gradient is None else (gradient * unit).sum().item()
            wrong, slope = self._disagreement(twin, name, unit, claimed, typical)
            worst, steepest = max(worst, wrong), max(steepest, abs(slope))
        return _Differences(worst, steepest, norm)

    def _disagreement(
        self, twin: Sandbox, name: str, unit: Tensor, claimed: float, typical: float
    ) -> tuple[float, float]:
        """Distance of the claimed slope from the measured one, beyond rounding; and that slope."""

        def loss_at(step: float) -> float:
            module = copied(twin.module)
            with torch.no_grad():
                module.get_parameter(name).add_(step * unit)
            return twin.run(module).loss.item()

        at, best, slope = self.twin_loss, math.inf, 0.0
        h = _STEP * _size(twin.module.get_parameter(name)) * math.sqrt(unit.numel())
        for step in (h, 10 * h, 0.1 * h):
            up, down = loss_at(step), loss_at(-step)
            left, right = (at - down) / step, (up - at) / step
            # Rounding of a loss that is the sum of many numbers.
            noise = 1e-13 * max(abs(at), abs(up), abs(down)) / step
            middle = (up - down) / (2 * step)
            low, high = min(left, right) - noise, max(left, right) + noise
            off = max(abs(middle - claimed) - noise, 0.0)
            scale = max(abs(middle), abs(claimed), 1e-3 * typical)
            if off > self.tolerance * scale:  # at a kink any slope between the two sides is right
                off = max(low - claimed, claimed - high, 0.0)
            share = off / scale if scale > noise else 0.0
            if share < best:
                best, slope = share, middle if abs(middle) > 10 * noise else 0.0
            if best <= self.tolerance:
                break
        return best, slope


class _Check(_Measurement):
    """The questions of ``check_gradients``, in the order in which they build on each other."""

    def result(self) -> GradientCheck:
        self.found: list[Finding] = []
        self.states: dict[str, str] = {}  # the cause of each parameter's first finding
        self._gradients()
        self.moved = self._step()
        self._stale()
        self._units()
        self._frozen()
        return GradientCheck(
            tuple(self._parameter(name, p) for name, p in self.module.named_parameters()),
            self.loss,
            by_severity(self.found),
            self.not_in_double,
        )

    def _say(self, cause: str, location: Iterable[str], **options: Any) -> None:
        self._add(finding(cause, location, **options))

    def _add(self, found: Finding) -> None:
        self.found.append(found)
        for name in found.location:
            self.states.setdefault(name, found.cause)

    # -- gradients ------------------------------------------------------------------------------

    def _gradients(self) -> None:
        """One finding for all parameters with the same cause and the same reason."""
        groups: dict[tuple[str, str], list[str]] = {}
        reasons: dict[str, str] = {}
        for name in self.trained:
            cause, reasons[name] = self._explain(name)
            if cause:
                groups.setdefault((cause, reasons[name].partition(" (")[0]), []).append(name)
        for (cause, _), names in groups.items():
            exact = {name: self.exact[name] for name in names if name in self.exact}
            worst = max(names, key=lambda n: exact[n].disagreement if n in exact else 0.0)
            numbers = {"parameters": len(names), "loss": self.loss}
            if cause == "wrong gradient":
                numbers |= {f"disagreement[{n}]": one.disagreement for n, one in exact.items()}
            elif exact:
                numbers["slope_of_the_loss"] = max(one.slope for one in exact.values())
            remedy = self._remedy(cause, worst)
            self._say(cause, names, remedy=remedy, reason=reasons[worst], **numbers)

    def _explain(self, name: str) -> tuple[str, str]:
        """Cause and reason if the gradient of a parameter is at fault; else two empty texts."""
        gradient, exact = self.gradients.get(name), self.exact.get(name)
        if not math.isfinite(self.loss) or not (gradient is None or gradient.isfinite().all()):
            return "nan gradient", self._nan[0]
        slope = 0.0 if exact is None or self.loss == 0 else exact.slope  # 0 at an exact fit
        if self.has_gradient(name):
            if exact is not None and not exact.disagreement <= self.tolerance:
                off = f"{exact.disagreement:.0%}"
                return "wrong gradient", f"finite differences in float64 disagree (by {off})"
            if slope > 0 and not self.follows[name] and name not in self.overwritten:
                return "stale cache", " after the first call"
            return "", ""
        if name in self.overwritten:
            return "", ""
        if self._is_cut_off:
            line = (self._breaks(self.trained) or [".item(), .detach(), a rounding or numpy"])[-1]
            return "no gradient", f"the loss is cut off from the output, at {line}"
        if not self.follows[name]:
            if gradient is not None:
                return "", ""
            if not is_gabor_like(name):
                return "unused parameter", ""
            return "no gradient", (
                "the output does not follow, because the kernel is computed once, at construction "
                "or at the first call, and then kept"
            )
        if gradient is not None and not slope > 0:
            return "", ""
        if exact is not None and exact.gradient_norm > 0 and exact.disagreement < 1e-2:
            dtype = self.module.get_parameter(name).dtype
            return "vanishing step", f"gradients are rounded to zero in {dtype}"
        return "no gradient", "the output follows, but " + self._reason(name)

    def _remedy(self, cause: str, name: str) -> str:
        if cause == "nan gradient":
            return self._nan[1]
        if cause == "vanishing step":
            return SINGLE_PRECISION
        is_foreign = cause in ("no gradient", "stale cache") and not self._is_cut_off
        if is_foreign or (cause == "wrong gradient" and is_gabor_like(name)):
            owner = name.rpartition(".")[0]
            return replacement_code(self.module, owner, self.sandbox.inputs)
        return ""

    @property
    def _is_cut_off(self) -> bool:
        """Whether the output has a graph and the loss has lost it."""
        output, loss = self.run
        return not loss.requires_grad and any(one.requires_grad for one in tensors_of(output))

    def _breaks(self, names: list[str]) -> list[str]:
        """Where the values of these parameters leave the graph, in order."""
        module, trace = copied(self.module), Trace()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in names)
        self.sandbox.run(module, trace=trace)
        return trace.breaks

    def _reason(self, name: str) -> str:
        """Why no gradient comes back from an output that follows a parameter."""
        # The first break that matters: .item() may only have made a number for a message.
        breaks = self._breaks([name])
        breaks.sort(key=lambda line: line.startswith(("`.item", "`.float")))

        def near(names: list[str]) -> str:
            owner = name.rpartition(".")[0]
            return listed([n for n in names if n.startswith(owner)] or names)

        if self.gradients.get(name) is not None:
            return "it passes through a derivative of zero, such as a rounding or a sign"
        if self.rewrapped:
            return (
                f"{near(self.rewrapped)} is wrapped into a new nn.Parameter at every forward pass"
            )
        if not breaks:
            return "its value leaves the graph, through .data, .detach(), .item() or numpy"
        if breaks[0].startswith("`.data`") and self.overwritten:
            return (
                f"the kernel is written through {breaks[0]}: {near(self.overwritten)} gets the "
                "gradient instead, and is overwritten at the next forward pass"
            )
        return f"it is lost at {breaks[0]}"

    @cached_property
    def _nan(self) -> tuple[str, str]:
        """Why the loss or a gradient is not finite, and the remedy."""
        trace = Trace()
        outputs = list(tensors_of(self.sandbox.run(trace=trace).output))
        is_half, root = any(t.dtype in HALF for t in outputs), trace.zero_roots[:1]
        is_finite = math.isfinite(self.loss)
        if is_half and math.isfinite(self.twin_loss) and not (is_finite and root):
            return (
                f"half precision overflows (the loss is {self.loss:g}, and {self.twin_loss:g} in "
                "double precision)"
            ), "inputs, targets = inputs.float(), targets.float()\n" + SINGLE_PRECISION
        if not is_finite:
            lost = [n for n, p in self.module.named_parameters() if not bool(p.isfinite().all())]
            because = f", because {listed(lost)} holds NaN or infinities" if lost else ""
            return f"the loss itself is {self.loss:g}{because}", ""
        if root and self.loss == 0:
            return (
                f"the fit is exact, and the root of the squared error has no slope at 0 ({root[0]})"
            ), "import torch\nloss = torch.nn.functional.mse_loss\n"
        if root:
            return (
                f"a root of 0 has an infinite slope ({root[0]}). Add a small constant under the "
                "root, or use torch.linalg.vector_norm"
            ), ""
        return "the loss is finite", ""

    # -- steps ----------------------------------------------------------------------------------

    def _step(self) -> dict[str, bool]:
        """Take one step on the copy; report what does not move, and steps that are too short."""
        parameters = dict(self.copy.named_parameters())
        stepped = [n for n in self.trained if n in parameters and self.has_gradient(n)]
        # Copies, since an optimizer may change gradients in place.
        gradients = {
            name: gradient.double().clone()
            for name, gradient in self.gradients.items()
            if name in stepped and gradient is not None
        }
        old = {name: parameters[name].detach().double().clone() for name in stepped}
        # Some optimizers, such as L-BFGS, evaluate the loss again.
        self.optimizer.step(lambda: self.loss)
        moved = {name: not equal(old[name], parameters[name].double()) for name in stepped}
        lost = [n for n in self.overwritten if n not in self.states and self.has_gradient(n)]
        if lost and not any(found.cause == "no gradient" for found in self.found):
            reason = "the next forward pass writes the old value back"
            self._say("does not move", lost, reason=reason, remedy="")
        # Gradient times size: the share of the loss that depends on a parameter.
        weights = {
            name: (gradients[name].norm() * old[name].norm()).item() / (abs(self.loss) or math.inf)
            for name in stepped
        }
        fall = sum(
            (gradients[name] * (old[name] - parameters[name].detach())).sum().item()
            for name in stepped
            if name not in (*self.overwritten, *self.rewrapped)
        )
        known = [name for name in stepped if name in self.rates]
        still = [
            name
            for name in known
            if not moved[name] and name not in self.states and not self.is_rounding(name)
        ]
        if known and not any(self.module.get_parameter(n).dtype in HALF for n in still):
            self._too_short(known, max(weights[name] for name in known), fall)
        still = [n for n in still if n not in self.states and weights[n] > _FLAT]
        if still:
            parameter = self.module.get_parameter(still[0])
            self._say(
                "does not move",
                still,
                severity=self.severity,
                remedy=SINGLE_PRECISION if parameter.dtype in HALF else None,
                reason=f"a step is smaller than the rounding of {parameter.dtype}",
                learning_rate=self.rates[still[0]],
                rounding=torch.finfo(parameter.dtype).eps * _size(parameter),
            )
        return moved

    def _too_short(self, names: list[str], weight: float, fall: float) -> None:
        """Steps so short that the loss needs millions of them, though it has a slope."""
        if not math.isfinite(fall) or self.loss == 0 or self.found:
            return
        n_steps = abs(self.loss / fall) if fall else math.inf
        if weight < _FLAT or n_steps < _TOO_MANY_STEPS:
            return
        self._say(
            "vanishing step",
            names,
            severity=self.severity,
            factor=f"{min(n_steps / 1e2, 1e12):.3g}",
            reason=f"at the learning rate {self.rates[names[0]]:g} the loss needs about "
            f"{n_steps:.0e} steps to fall by its own size. The loss is scaled down, or the rate is",
            n_steps=n_steps,
            loss=self.loss,
            gradient_times_size=weight,
        )

    # -- caches ---------------------------------------------------------------------------------

    def _stale(self) -> None:
        """Kernels that eval() mode computes once."""
        if any(found.cause == "stale cache" for found in self.found):
            return
        candidates = [n for n in self.trained if n not in (*self.overwritten, *self.rewrapped)]
        stale = [name for name in candidates if self.keeps_in_eval(name)]
        if stale:
            self._say(
                "stale cache",
                stale,
                severity=Severity.WARNING,
                confidence=0.8,
                remedy=self._remedy("stale cache", stale[0]),
                reason=" in eval() mode after the first call, so loaded parameters have no effect",
            )

    # -- units and frozen parameters ------------------------------------------------------------

    def _units(self) -> None:
        if self.twin is None:
            return
        sizes = [size for t in tensors_of(self.sandbox.inputs) for size in t.shape[2:]]
        for name, parameter in self.module.named_parameters():
            owner = self.module.get_submodule(name.rpartition(".")[0])
            if parameter.is_floating_point() and not isinstance(owner, GABOR_LAYERS):
                is_turn = partial(self._is_turn, self.twin, name)
                found = check_unit(name, parameter, float(max(sizes, default=0)), is_turn)
                if found is not None:
                    self._add(found)

    def _is_turn(self, twin: Sandbox, name: str, turn: float) -> bool:
        """Whether the output is the same when a parameter is moved by a supposed whole turn."""
        module = copied(twin.module)
        with torch.no_grad():
            module.get_parameter(name).add_(turn)
        pairs = zip(tensors_of(twin.run(module).output), tensors_of(self.twin_output), strict=True)
        return all(
            torch.allclose(moved, still, rtol=1e-6, atol=1e-6 * still.abs().max().item())
            for moved, still in pairs
            if moved.is_floating_point()
        )

    def _frozen(self) -> None:
        left_out: list[tuple[list[str], str, str]] = []  # names, reason and remedy
        names = [n for n, p in self.module.named_parameters() if not p.requires_grad]
        frozen = [n for n in names if not self.trained or is_gabor_like(n)]
        if frozen:
            code = "".join(f"module.get_parameter({n!r}).requires_grad_(True)\n" for n in frozen)
            left_out.append((frozen, "requires_grad=False", code + RENEW_OPTIMIZER))
        for name, part in self.module.named_modules():
            if isinstance(part, GABOR_LAYERS):
                # The centre is fixed unless learn= names it.
                fields = type(part.params).field_names()
                left = [f for f in fields if f not in part.learn and f != "center"]
                if left:
                    learn = tuple(sorted({*part.learn, *left}))
                    code = REBUILD.format(name=name, arguments=f"learn={learn}")
                    reason = f"left out of learn={' of ' if name else ''}{name}"
                    left_out.append((left, reason, code))
        for names, reason, code in left_out:
            if self.trained:
                self._say("frozen", names, remedy=code, reason=reason)
            else:
                options = {"severity": Severity.SEVERE, "confidence": 0.9, "remedy": code}
                self._say(
                    "frozen", names, reason=f"{reason}, and all others are frozen too", **options
                )
        unknown = [n for n in self.trained if n not in self.rates]
        if unknown and len(unknown) == len(self.trained):
            reason = "the optimizer does not hold it, and may have been made for another copy"
            options = {"severity": Severity.SEVERE, "confidence": 1.0}
            self._say("frozen", unknown, reason=reason, **options)
        elif unknown:
            code = (
                f"new = [module.get_parameter(name) for name in {unknown}]\n"
                "optimizer.add_param_group(dict(params=new, lr=optimizer.param_groups[0]['lr']))\n"
            )
            options = {"severity": Severity.WARNING, "confidence": 0.6, "remedy": code}
            self._say("frozen", unknown, reason="the optimizer does not hold it", **options)

    def _parameter(self, name: str, parameter: Tensor) -> ParameterCheck:
        gradient, exact = self.gradients.get(name), self.exact.get(name)
        state = self.states.get(name)
        if state is None and name in (*self.overwritten, *self.rewrapped):
            state = "no gradient"
        if state is None and not parameter.requires_grad:
            state = "frozen"
        if state is None:
            learns = self.has_gradient(name) and not self.is_rounding(name)
            state = "learns" if learns else "flat"
        return ParameterCheck(
            name,
            tuple(parameter.shape),
            self.has_gradient(name),
            math.nan if gradient is None else gradient.double().norm().item(),
            math.nan if exact is None else exact.disagreement,
            self.moved.get(name, False),
            self.follows.get(name, False),
            state,
        )


def _nudge(module: nn.Module, name: str) -> Tensor | None:
    """Change a parameter a little, in every entry; and return its old value, if it exists."""
    try:
        parameter = module.get_parameter(name)
    except AttributeError:
        return None
    old = parameter.detach().clone()
    generator = torch.Generator().manual_seed(1)
    change = torch.randn(parameter.shape, generator=generator).sign() * _NUDGE * _size(parameter)
    with torch.no_grad():
        parameter.add_(change.to(parameter))
    return old


def _size(parameter: Tensor) -> float:
    """Root mean square of the entries; 1 for a parameter that is zero."""
    size = parameter.detach().double().square().mean().sqrt().item()
    return size if math.isfinite(size) and size > 1e-8 else 1.0
