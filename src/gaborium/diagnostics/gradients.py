"""Does every parameter of a module get a right gradient, does it move, and does that matter?"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

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
    Run,
    Trace,
    TrainingSetup,
    copied,
    copied_together,
    equal,
    tensors_of,
)
from gaborium.diagnostics.unit_checks import check_unit, is_gabor_like
from gaborium.layers import GABOR_LAYERS

_WRONG = 1e-3  # disagreement with finite differences above which a gradient is wrong
_STEP = 1e-6  # of a finite difference, as a share of the parameter's size
_NUDGE = 1e-2  # change that shows whether the output follows, as a share of the parameter's size
_TOO_MANY_STEPS = 1e6  # for the loss to fall by its own size
_FLAT = 1e-3  # gradient times size, as a share of the loss: less cannot lower it
_RATE = 1e-2  # of the gradient descent that is tried without an optimizer


@dataclass
class ParameterCheck:
    """The results for one parameter.

    Args:
        name: as in ``module.named_parameters()``.
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
    has_gradient: bool = False
    gradient_norm: float = math.nan
    disagreement: float = math.nan
    moved: bool = False
    output_follows: bool = False
    state: str = ""


@dataclass(frozen=True)
class GradientCheck:
    """The result of ``check_gradients``.

    Args:
        parameters: one entry per parameter of the module, in its order.
        loss: at the present parameters.
        findings: the worst first.
    """

    parameters: tuple[ParameterCheck, ...]
    loss: float
    findings: list[Finding]


def check_gradients(setup: TrainingSetup) -> GradientCheck:
    """Check that every parameter gets a right gradient, moves, and reaches the output.

    It works for any module, in its present mode; call it in ``train()`` mode to check training.
    Everything is done on copies: parameters, buffers, gradients, mode and the state of random
    numbers do not change. The copies run about twenty times per parameter. A copy of the optimizer
    takes one step.

    The gradient is compared with central differences of the loss in float64, in the direction of
    the gradient and in two others. Where the loss has a kink, as behind a ReLU of 0, any slope
    between the slopes of its two sides is right.

    Args:
        setup: any module, loss and inputs, on one device; the loss is the same at every call.

    Returns:
        A record with an entry per parameter, and the findings: ``"no gradient"``,
        ``"wrong gradient"``, ``"nan gradient"``, ``"does not move"``, ``"vanishing step"``,
        ``"stale cache"``, ``"wrong unit"``, ``"frozen"`` and ``"unused parameter"``.

    Raises:
        TypeError: the loss is not a tensor.
        ValueError: the loss is not a scalar or differs from call to call, or the inputs hold NaN or
            infinities.

    Example:
        >>> from gaborium import GaborConv2d
        >>> layer, image = GaborConv2d(1, 2, 7, seed=0), torch.rand(1, 1, 16, 16)
        >>> targets = torch.zeros_like(layer(image))
        >>> check = check_gradients(TrainingSetup(layer, nn.functional.mse_loss, image, targets))
        >>> [parameter.name for parameter in check.parameters if parameter.state == "learns"]
        ['angular_wave_vector', 'log_sigma', 'log_aspect_ratio', 'even', 'odd', 'bias']
        >>> check.findings
        []
    """
    setup.check(finite=False)
    return _Check(setup).result()


@dataclass(kw_only=True, eq=False)
class _Parameter(ParameterCheck):
    """All measurements of one parameter."""

    value: Tensor
    rate: float | None  # of the optimizer, if that holds it
    gradient: Tensor | None = None  # in float64
    is_rewrapped: bool = False  # a forward pass makes a new nn.Parameter
    is_overwritten: bool = False  # a forward pass undoes a change
    slope: float = 0.0  # the steepest finite difference
    exact_norm: float = math.nan  # of the gradient in float64
    weight: float = 0.0  # gradient times size: the share of the loss that depends on it

    @property
    def owner(self) -> str:
        """The name of its module."""
        return self.name.rpartition(".")[0]

    @property
    def is_rounding(self) -> bool:
        """Whether the gradient is zero except for rounding, as of a bias before a batch norm."""
        return self.exact_norm < 1e-3 * self.gradient_norm


class _Check:
    """Measurements on copies of a module, and then the questions, which build on each other."""

    def __init__(self, setup: TrainingSetup) -> None:
        self.setup, self.module, optimizer = setup, setup.module, setup.optimizer
        self.found: list[Finding] = []
        values = dict(self.module.named_parameters())
        # A plain descent is less telling than the optimizer of the loop.
        self.severity = Severity.WARNING if optimizer is None else Severity.SEVERE
        if optimizer is None:
            optimizer = torch.optim.SGD([*values.values()] or [torch.zeros(())], lr=_RATE)
        rates = {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
        module, optimizer = copied_together(self.module, optimizer)
        before = dict(module.named_parameters())
        self.run = setup.run(module)
        self.loss: float = self.run.loss.item()
        if self.run.loss.requires_grad:
            self.run.loss.backward()
        after = dict(module.named_parameters())
        self.parameters: list[_Parameter] = []
        for name, value in values.items():
            one = _Parameter(name=name, value=value, rate=rates.get(id(value)))
            gradient = before[name].grad
            one.is_rewrapped = value.requires_grad and after.get(name) is not before[name]
            if gradient is not None:
                one.gradient = gradient.to(torch.float64, copy=True)
                one.has_gradient = bool((gradient != 0).any())
                one.gradient_norm = one.gradient.norm().item()
            self.parameters.append(one)
        self.trained = [one for one in self.parameters if one.value.requires_grad]
        for one in self.trained:
            self._change(one)
        self.overwritten = [one for one in self.trained if one.is_overwritten]
        self.rewrapped = [one for one in self.trained if one.is_rewrapped]
        self.twin: TrainingSetup | None = None  # in float64
        self.twin_output: Any = None
        self.twin_loss = math.nan
        self._compare()
        self.fall = self._step(optimizer, after)

    def result(self) -> GradientCheck:
        for question in (
            self._gradients,
            self._written_back,
            self._too_short,
            self._rounded_away,
            self._stale,
            self._units,
            self._frozen,
            self._unknown,
        ):
            for found in question():
                self.found.append(found)
                for one in self.parameters:
                    if one.name in found.location:
                        one.state = one.state or found.cause
        for one in self.parameters:
            learns = "learns" if one.has_gradient and not one.is_rounding else "flat"
            is_lost = one.is_overwritten or one.is_rewrapped
            otherwise = learns if one.value.requires_grad else "frozen"
            one.state = one.state or ("no gradient" if is_lost else otherwise)
        names = [public.name for public in fields(ParameterCheck)]
        rows = [{name: getattr(one, name) for name in names} for one in self.parameters]
        parameters = tuple(ParameterCheck(**row) for row in rows)
        return GradientCheck(parameters, self.loss, by_severity(self.found))

    # -- measurements ---------------------------------------------------------------------------

    def _change(self, one: _Parameter) -> None:
        """See whether the output follows a change, and whether the next run undoes the change."""
        module = copied(self.module)
        first = self.setup.run(module).output
        old = _nudge(module, one.name)
        if old is not None:
            one.output_follows = not equal(first, self.setup.run(module).output)
            is_back = not one.is_rewrapped and equal(old, module.get_parameter(one.name))
            one.is_overwritten = is_back and not one.output_follows

    def _compare(self) -> None:
        """Compare gradients with finite differences of the loss, both in float64."""
        with contextlib.suppress(Exception):  # somebody else's code may raise anything
            twin = self.setup.double()
            module = copied(twin.module)
            output, loss = twin.run(module)
            if loss.dtype == torch.float64:
                if loss.requires_grad:
                    loss.backward()
                self.twin, self.twin_output, self.twin_loss = twin, output, loss.item()
        if self.twin is None or not math.isfinite(self.twin_loss):
            return
        parameters = dict(module.named_parameters())
        for one in self.trained:
            if one.name in parameters and not (one.is_rewrapped or one.is_overwritten):
                self._differences(self.twin, one, parameters[one.name].grad)

    def _differences(self, twin: TrainingSetup, one: _Parameter, gradient: Tensor | None) -> None:
        """Compare along the gradient and along two random directions."""
        start = twin.module.get_parameter(one.name).detach()
        generator = torch.Generator().manual_seed(0)
        draws = [
            torch.randn(start.shape, generator=generator, dtype=torch.float64) for _ in range(2)
        ]
        directions = [draw.to(start.device) for draw in draws]
        if gradient is not None and bool(gradient.isfinite().all()) and bool((gradient != 0).any()):
            directions.insert(0, gradient)
        one.exact_norm = math.nan if gradient is None else gradient.norm().item()
        typical = 0.0 if gradient is None else one.exact_norm / math.sqrt(start.numel())
        measured = []
        for direction in directions:
            unit = direction / direction.norm()
            claimed = 0.0 if gradient is None else (gradient * unit).sum().item()
            measured.append(self._disagreement(twin, one.name, unit, claimed, typical))
        one.disagreement = max(wrong for wrong, _ in measured)
        one.slope = max(abs(slope) for _, slope in measured)

    def _disagreement(
        self, twin: TrainingSetup, name: str, unit: Tensor, claimed: float, typical: float
    ) -> tuple[float, float]:
        """Distance of the claimed slope from the measured one, beyond rounding; and that slope."""
        at, best, slope = self.twin_loss, math.inf, 0.0
        h = _STEP * _size(twin.module.get_parameter(name)) * math.sqrt(unit.numel())
        for step in (h, 10 * h, 0.1 * h):
            up, down = (_run_changed(twin, name, s * unit).loss.item() for s in (step, -step))
            left, right = (at - down) / step, (up - at) / step
            # Rounding of a loss that is the sum of many numbers.
            noise = 1e-13 * max(abs(at), abs(up), abs(down)) / step
            middle = (up - down) / (2 * step)
            low, high = min(left, right) - noise, max(left, right) + noise
            off = max(abs(middle - claimed) - noise, 0.0)
            scale = max(abs(middle), abs(claimed), 1e-3 * typical)
            if off > _WRONG * scale:  # at a kink any slope between the two sides is right
                off = max(low - claimed, claimed - high, 0.0)
            share = off / scale if scale > noise else 0.0
            if share < best:
                best, slope = share, middle if abs(middle) > 10 * noise else 0.0
            if best <= _WRONG:
                break
        return best, slope

    def _step(self, optimizer: torch.optim.Optimizer, values: dict[str, nn.Parameter]) -> float:
        """Take one step on the copy, and return how far the loss would fall along its slope."""
        stepped = [one for one in self.trained if one.name in values and one.has_gradient]
        old = [values[one.name].detach().to(torch.float64, copy=True) for one in stepped]
        # Some optimizers, such as L-BFGS, evaluate the loss again.
        optimizer.step(lambda: self.loss)
        fall = 0.0
        for one, before in zip(stepped, old, strict=True):
            after, gradient = values[one.name].detach().double(), one.gradient
            one.moved = not equal(before, after)
            one.weight = one.gradient_norm * before.norm().item() / (abs(self.loss) or math.inf)
            if gradient is not None and not (one.is_overwritten or one.is_rewrapped):
                fall += (gradient * (before - after)).sum().item()
        return fall

    # -- gradients ------------------------------------------------------------------------------

    def _gradients(self) -> Iterator[Finding]:
        """One finding for all parameters with the same cause and the same reason."""
        groups: dict[tuple[str, str], list[_Parameter]] = {}
        reasons: dict[str, str] = {}
        for one in self.trained:
            cause, reasons[one.name] = self._explain(one)
            if cause:
                groups.setdefault((cause, reasons[one.name].partition(" (")[0]), []).append(one)
        for (cause, _), ones in groups.items():
            exact = [one for one in ones if not math.isnan(one.disagreement)]
            worst = max(ones, key=lambda one: one.disagreement if one in exact else 0.0)
            numbers: dict[str, Any] = {"parameters": len(ones), "loss": self.loss}
            if cause == "wrong gradient":
                numbers |= {f"disagreement[{one.name}]": one.disagreement for one in exact}
            elif exact:
                numbers["slope_of_the_loss"] = max(one.slope for one in exact)
            remedy, reason = self._remedy(cause, worst), reasons[worst.name]
            yield finding(cause, _names(ones), remedy=remedy, reason=reason, **numbers)

    def _explain(self, one: _Parameter) -> tuple[str, str]:
        """Cause and reason if the gradient of a parameter is at fault; else two empty texts."""
        is_finite = one.gradient is None or bool(one.gradient.isfinite().all())
        if not math.isfinite(self.loss) or not is_finite:
            return "nan gradient", self._nan[0]
        slope = one.slope if self.loss else 0.0  # 0 at an exact fit
        if one.has_gradient:
            if one.disagreement > _WRONG:
                off = f"{one.disagreement:.0%}"
                return "wrong gradient", f"finite differences in float64 disagree (by {off})"
            if slope > 0 and not one.output_follows and not one.is_overwritten:
                return "stale cache", " after the first call"
            return "", ""
        if one.is_overwritten:
            return "", ""
        if self._is_cut_off:
            line = (self._breaks(self.trained) or [".item(), .detach(), a rounding or numpy"])[-1]
            return "no gradient", f"the loss is cut off from the output, at {line}"
        if one.gradient is not None and not (one.output_follows and slope > 0):
            return "", ""
        if not one.output_follows:
            if not is_gabor_like(one.name):
                return "unused parameter", ""
            return "no gradient", (
                "the output does not follow, because the kernel is computed once, at construction "
                "or at the first call, and then kept"
            )
        if one.exact_norm > 0 and one.disagreement < 1e-2:
            return "vanishing step", f"gradients are rounded to zero in {one.value.dtype}"
        return "no gradient", "the output follows, but " + self._reason(one)

    def _remedy(self, cause: str, one: _Parameter) -> str:
        if cause == "nan gradient":
            return self._nan[1]
        if cause == "vanishing step":
            return SINGLE_PRECISION
        is_foreign = cause in ("no gradient", "stale cache") and not self._is_cut_off
        if is_foreign or (cause == "wrong gradient" and is_gabor_like(one.name)):
            return replacement_code(self.module, one.owner, self.setup.inputs)
        return ""

    @property
    def _is_cut_off(self) -> bool:
        """Whether the output has a graph and the loss has lost it."""
        output, loss = self.run
        return not loss.requires_grad and any(one.requires_grad for one in tensors_of(output))

    def _breaks(self, ones: list[_Parameter]) -> list[str]:
        """Where the values of these parameters leave the graph, in order."""
        module, trace = copied(self.module), Trace()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in _names(ones))
        self.setup.run(module, trace=trace)
        return trace.breaks

    def _reason(self, one: _Parameter) -> str:
        """Why no gradient comes back from an output that follows a parameter."""
        if one.gradient is not None:
            return "it passes through a derivative of zero, such as a rounding or a sign"
        lost = self.rewrapped or self.overwritten
        near = listed(_names([other for other in lost if other.owner == one.owner] or lost))
        if self.rewrapped:
            return f"{near} is wrapped into a new nn.Parameter at every forward pass"
        # The first break that matters: .item() may only have made a number for a message.
        breaks = self._breaks([one])
        breaks.sort(key=lambda line: line.startswith(("`.item", "`.float")))
        if not breaks:
            return "its value leaves the graph, through .data, .detach(), .item() or numpy"
        if breaks[0].startswith("`.data`") and self.overwritten:
            return (
                f"the kernel is written through {breaks[0]}: {near} gets the gradient instead, "
                "and is overwritten at the next forward pass"
            )
        return f"it is lost at {breaks[0]}"

    @cached_property
    def _nan(self) -> tuple[str, str]:
        """Why the loss or a gradient is not finite, and the remedy."""
        trace = Trace()
        outputs = tensors_of(self.setup.run(trace=trace).output)
        is_finite, root = math.isfinite(self.loss), next(iter(trace.zero_roots), "")
        lost = _names(one for one in self.parameters if not bool(one.value.isfinite().all()))
        because = f", because {listed(lost)} holds NaN or infinities" if lost else ""
        is_half = any(t.dtype in HALF for t in outputs) and math.isfinite(self.twin_loss)
        if is_half and not (is_finite and root):
            return (
                f"half precision overflows (the loss is {self.loss:g}, and {self.twin_loss:g} in "
                "double precision)"
            ), "inputs, targets = inputs.float(), targets.float()\n" + SINGLE_PRECISION
        if not is_finite:
            return f"the loss itself is {self.loss:g}{because}", ""
        if root and self.loss == 0:
            return (
                f"the fit is exact, and the root of the squared error has no slope at 0 ({root})"
            ), "import torch\nloss = torch.nn.functional.mse_loss\n"
        advice = "Add a small constant under the root, or use torch.linalg.vector_norm"
        if root:
            return f"a root of 0 has an infinite slope ({root}). {advice}", ""
        return "the loss is finite", ""

    # -- steps ----------------------------------------------------------------------------------

    def _written_back(self) -> Iterator[Finding]:
        """Parameters that every forward pass gives their old values."""
        lost = [one for one in self.overwritten if not one.state and one.has_gradient]
        if lost and not any(found.cause == "no gradient" for found in self.found):
            reason = "the next forward pass writes the old value back"
            yield finding("does not move", _names(lost), reason=reason, remedy="")

    def _is_still(self, one: _Parameter) -> bool:
        """Whether a step did not change a parameter, and no finding says why."""
        known = one.rate is not None and one.has_gradient
        return known and not (one.moved or one.state or one.is_rounding)

    def _too_short(self) -> Iterator[Finding]:
        """Steps so short that the loss needs millions of them, though it has a slope."""
        known = [one for one in self.trained if one.has_gradient and one.rate is not None]
        is_half = any(self._is_still(one) and one.value.dtype in HALF for one in known)
        if not known or is_half or not math.isfinite(self.fall) or not self.loss or self.found:
            return
        n_steps = abs(self.loss / self.fall) if self.fall else math.inf
        weight, rate = max(one.weight for one in known), known[0].rate
        if weight >= _FLAT and n_steps >= _TOO_MANY_STEPS:
            yield finding(
                "vanishing step",
                _names(known),
                severity=self.severity,
                factor=f"{min(n_steps / 1e2, 1e12):.3g}",
                reason=f"at the learning rate {rate:g} the loss needs about {n_steps:.0e} steps to "
                "fall by its own size. The loss is scaled down, or the rate is",
                n_steps=n_steps,
                loss=self.loss,
                gradient_times_size=weight,
            )

    def _rounded_away(self) -> Iterator[Finding]:
        """Parameters with steps smaller than their rounding."""
        still = [one for one in self.trained if one.weight > _FLAT and self._is_still(one)]
        if still:
            value = still[0].value
            yield finding(
                "does not move",
                _names(still),
                severity=self.severity,
                remedy=SINGLE_PRECISION if value.dtype in HALF else None,
                reason=f"a step is smaller than the rounding of {value.dtype}",
                learning_rate=still[0].rate,
                rounding=torch.finfo(value.dtype).eps * _size(value),
            )

    # -- caches, units and frozen parameters ----------------------------------------------------

    def _stale(self) -> Iterator[Finding]:
        """Kernels that eval() mode computes once."""
        if any(found.cause == "stale cache" for found in self.found):
            return
        stale = [
            one
            for one in self.trained
            if not (one.is_overwritten or one.is_rewrapped) and self._keeps_in_eval(one.name)
        ]
        if stale:
            reason = " in eval() mode after the first call, so loaded parameters have no effect"
            options: Any = {"severity": Severity.WARNING, "confidence": 0.8}
            options["remedy"] = self._remedy("stale cache", stale[0])
            yield finding("stale cache", _names(stale), reason=reason, **options)

    def _keeps_in_eval(self, name: str) -> bool:
        """Whether eval() mode keeps a kernel: changes after its first call have no effect."""
        module, other = (copied(self.module).train() for _ in range(2))
        _nudge(other, name)
        for one in (module, other):
            self.setup.run(one)
        before, after = (self.setup.run(one.eval()).output for one in (module, other))
        _nudge(module, name)
        return not equal(before, after) and equal(before, self.setup.run(module).output)

    def _units(self) -> Iterator[Finding]:
        sizes = [size for t in tensors_of(self.setup.inputs) for size in t.shape[2:]]
        for one in self.parameters if self.twin is not None else ():
            is_ours = isinstance(self.module.get_submodule(one.owner), GABOR_LAYERS)
            if one.value.is_floating_point() and not is_ours:
                is_turn = partial(self._is_turn, one.name)
                yield from check_unit(one.name, one.value, float(max(sizes, default=0)), is_turn)

    def _is_turn(self, name: str, turn: float) -> bool:
        """Whether the output is the same when a parameter is moved by a supposed whole turn."""
        moved = tensors_of(_run_changed(self.twin, name, turn).output)
        return all(
            torch.allclose(one, still, rtol=1e-6, atol=1e-6 * still.abs().max().item())
            for one, still in zip(moved, tensors_of(self.twin_output), strict=True)
            if one.is_floating_point()
        )

    def _frozen(self) -> Iterator[Finding]:
        """Parameters without a gradient by choice, which is severe if they are all."""
        names = [one.name for one in self.parameters if not one.value.requires_grad]
        frozen = [name for name in names if not self.trained or is_gabor_like(name)]
        code = "".join(f"module.get_parameter({n!r}).requires_grad_(True)\n" for n in frozen)
        left_out = [(frozen, "requires_grad=False", code + RENEW_OPTIMIZER)]
        for name, part in self.module.named_modules():
            if isinstance(part, GABOR_LAYERS):
                # The centre is fixed unless learn= names it.
                left = [
                    f
                    for f in type(part.params).field_names()
                    if f not in part.learn and f != "center"
                ]
                learn = tuple(sorted({*part.learn, *left}))
                code = REBUILD.format(name=name, arguments=f"learn={learn}")
                left_out.append((left, f"left out of learn={' of ' if name else ''}{name}", code))
        more = "" if self.trained else ", and all others are frozen too"
        worst: Any = {"severity": Severity.SEVERE, "confidence": 0.9}
        for names, reason, code in left_out:
            if names:
                options = {} if self.trained else worst
                yield finding("frozen", names, reason=reason + more, remedy=code, **options)

    def _unknown(self) -> Iterator[Finding]:
        """Parameters that the optimizer does not hold."""
        unknown = _names(one for one in self.trained if one.rate is None)
        reason = "the optimizer does not hold it"
        if unknown and len(unknown) == len(self.trained):
            reason += ", and may have been made for another copy"
            options: Any = {"severity": Severity.SEVERE, "confidence": 1.0}
            yield finding("frozen", unknown, reason=reason, **options)
        elif unknown:
            code = (
                f"new = [module.get_parameter(name) for name in {unknown}]\n"
                "optimizer.add_param_group(dict(params=new, lr=optimizer.param_groups[0]['lr']))\n"
            )
            options = {"severity": Severity.WARNING, "confidence": 0.6, "remedy": code}
            yield finding("frozen", unknown, reason=reason, **options)


def _names(ones: Iterable[_Parameter]) -> list[str]:
    return [one.name for one in ones]


def _run_changed(setup: Any, name: str, change: Any) -> Run:
    """Run a copy with a parameter changed by so much."""
    module = copied(setup.module)
    with torch.no_grad():
        module.get_parameter(name).add_(change)
    return setup.run(module)


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
