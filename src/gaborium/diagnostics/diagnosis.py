"""From a training loop that goes wrong to what is wrong with it: all questions, in their order."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium.diagnostics.causes import CAUSES, CLEAR_OPTIMIZER, Finding, Severity, finding
from gaborium.diagnostics.filters import health
from gaborium.diagnostics.gradients import check_gradients
from gaborium.diagnostics.identifiability import identifiability, recover_code, recover_options
from gaborium.diagnostics.landscape import landscape
from gaborium.diagnostics.remedies import convolution_of
from gaborium.diagnostics.sandbox import (
    Loss,
    OutputLoss,
    Sandbox,
    TrainingSetup,
    copied,
    is_response,
)
from gaborium.diagnostics.step_size import step_limit
from gaborium.diagnostics.unit_checks import is_gabor_like
from gaborium.fitting import FitResult, fit, recover
from gaborium.layers import GABOR_LAYERS, GaborLayer

Progress = Callable[[str, int, int], None]  # what is looked at, parts done, parts in all

# Faults of the code, which are faults however well the rest of the parameters learns.
_BUGS = ("no gradient", "nan gradient", "stale cache", "wrong gradient", "off-centre grid")
# What concerns other starts and other inputs rather than this one.
_OF_OTHER_STARTS = ("spurious minima", "ill-conditioned input", "trade-off")
_LEARNT = 0.99  # share of the targets that is explained where learning works
_HELPS = 0.5  # of the way to where learning works that a remedy must go
_MANY_FILTERS = 4  # whose landscapes are looked at
_OFF_CENTRE = 0.25  # px


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What ``diagnose`` found.

    Args:
        findings: the worst first, and of these the cause before its consequences.
        parts: the records of the parts, by name, such as ``"gradients"`` or ``"landscape of
            orientation, filter 0"``; ``plots`` draws them.
        skipped: parts that could not be looked at, and why.
        losses: of a trial of the set-up as it is, on a copy.
        explained: share of the targets' variance that the outputs explain before and after that
            trial; NaN where outputs and targets differ in shape.
        setup: what was examined.
        combined_remedies: where no remedy is enough alone, findings whose remedies are enough one
            after the other.
    """

    findings: list[Finding]
    parts: dict[str, Any]
    skipped: dict[str, str]
    losses: list[float]
    explained: tuple[float, float]
    setup: TrainingSetup
    combined_remedies: tuple[Finding, ...] = ()

    @property
    def severe(self) -> list[Finding]:
        """The findings with which learning fails."""
        return [found for found in self.findings if found.severity is Severity.SEVERE]

    def with_remedy(self, finding: Finding | None = None) -> TrainingSetup:
        """A copy of the set-up with a remedy carried out.

        Args:
            finding: with the remedy; by default all ``combined_remedies``, or else the first
                finding that has one.

        Raises:
            ValueError: there is no finding with a remedy.
        """
        chosen = [finding] if finding is not None else list(self.combined_remedies)
        if not chosen:
            chosen = [found for found in self.findings if found.remedy][:1]
        if not chosen or not chosen[0].remedy:
            raise ValueError("There is no finding with a remedy to carry out.")
        return _mended(self.setup, chosen)

    def to_json(self) -> dict[str, Any]:
        """Findings, losses and what was skipped, as plain values."""
        return {
            "findings": [
                vars(found) | {"severity": found.severity.name} for found in self.findings
            ],
            "skipped": dict(self.skipped),
            "losses": list(self.losses),
            "explained": list(self.explained),
            "combined_remedies": [found.cause for found in self.combined_remedies],
        }

    def __str__(self) -> str:
        if not self.findings:
            return "Nothing was found that stands in the way of learning."
        lines = []
        for number, found in enumerate(self.findings, 1):
            lines.append(f"{number}. {found.severity.name} {found.cause}: {found.sentence}")
            lines += [f"       {line}" for line in found.remedy.rstrip().splitlines()]
        return "\n".join(lines)


def diagnose(
    module: nn.Module,
    loss: Loss,
    data: tuple[Any, Any],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    n_steps: int = 100,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Diagnosis:
    """Find out why a Gabor layer, a loss and a training loop do not learn.

    Everything is done on copies. The set-up is tried as it is for some steps, and then with each of
    the remedies: a fault is called severe where learning fails with it, and a remedy that helps
    stands before one that does not.

    Args:
        module: a Gabor layer, ours or anybody's, or a network with one.
        loss: ``loss(output, target) -> scalar``.
        data: one batch of inputs, and the targets for it; several inputs are a tuple.
        optimizer: of the loop, made from ``module.parameters()``; by default gradient descent with
            a step of 0.01 is tried, and no step is judged.
        n_steps: of each trial.
        seed: of random numbers within module and loss.
        on_progress: called with what is looked at next, parts done and parts in all.

    Returns:
        Findings, worst first, and the records behind them.

    Raises:
        TypeError: the module is none, or the loss returns no tensor.
        ValueError: the loss is not a scalar, or not the same twice, or inputs are not finite or on
            another device than the module.

    Example:
        >>> from gaborium import Gabor2d, GaborConv2d
        >>> image = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> planted = Gabor2d.of(orientation=0.8, wavelength=4.0, sigma=2.0, aspect_ratio=0.5)
        >>> targets = GaborConv2d(1, 1, 15, start=planted, bias=False)(image).detach()
        >>> start = planted.replace(orientation=planted.orientation - torch.pi / 2)
        >>> layer = GaborConv2d(
        ...     1, 1, 15, start=start, bias=False, learn="orientation", coordinates="textbook"
        ... )
        >>> found = diagnose(layer, nn.functional.mse_loss, (image, targets)).findings[0]
        >>> found.cause
        'antipodal start'
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}.")
    if not (isinstance(data, tuple) and len(data) == 2):
        raise TypeError("data must be a tuple of inputs and targets.")
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, got {n_steps}.")
    setup = TrainingSetup(module, loss, *data, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copies repeat what the caller's layer has said already
        return _Examination(setup, n_steps, seed, on_progress or (lambda *_: None)).result()


class _Examination:
    """The work of ``diagnose``: the questions, then the trials of remedies, then the order."""

    def __init__(self, setup: TrainingSetup, n_steps: int, seed: int, report: Progress) -> None:
        self.setup, self.n_steps, self.seed, self.report = setup, n_steps, seed, report
        self.module = setup.module
        self.layers: dict[str, Any] = {
            name: part
            for name, part in setup.module.named_modules()
            if isinstance(part, GABOR_LAYERS)
        }
        self.parts: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.found: list[Finding] = []
        # The layer whose outputs the targets are.
        self.alone: Any = self.layers[""] if list(self.layers) == [""] else None

    def result(self) -> Diagnosis:
        setup = self.setup
        self._ask("gradients", self._gradients, must=True)
        broken = any(f.cause in _BUGS and f.severity is Severity.SEVERE for f in self.found)
        self._ask("kernels of foreign layers", self._foreign)
        for name in self.layers:
            self._ask(f"health{_of(name)}", partial(health, self.layers[name], name=name))
            self._ask(f"amplitude{_of(name)}", partial(self._absorbed, name))
        if self.alone is not None and self.regression and not broken:
            self._ask("identifiability", self._identifiability)
            self._ask("reachable minimum", self._reachable)
            for field, index in self._looked_at():
                self._ask(
                    f"landscape of {field}, filter {index}",
                    partial(landscape, self.output_loss, self.module, field, filter=index),
                )
        if not broken:
            self._ask("step limit", self._step_limit)
        self.report("trials", 0, 1)
        trial = setup.copy()
        before = trial.explained()
        losses = trial.train(self.n_steps, seed=self.seed)
        after = trial.explained()
        findings = self._tried(self._merged(), losses, after)
        together = self._together(findings, after)
        return Diagnosis(
            findings, self.parts, self.skipped, losses, (before, after), setup, together
        )

    def _ask(self, name: str, question: Callable[[], Any], *, must: bool = False) -> None:
        """Put one question; what it cannot be asked of is skipped, and said so."""
        self.report(name, len(self.parts) + len(self.skipped), 0)
        try:
            answer = question()
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            if must:
                raise
            self.skipped[name] = str(error).splitlines()[0]
            return
        if answer is None:
            return
        if isinstance(answer, list):
            self.found += answer
        else:
            self.parts[name] = answer
            self.found += getattr(answer, "findings", [])

    # -- questions ------------------------------------------------------------------------------

    def _gradients(self) -> Any:
        setup = self.setup
        return check_gradients(
            self.module,
            setup.inputs,
            lambda output: setup.loss(output, setup.targets),
            optimizer=setup.optimizer,
            seed=self.seed,
        )

    def _foreign(self) -> list[Finding] | None:
        """Whether layers that make their own kernels sample them around the middle."""
        inputs = self.setup.inputs
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        for name, part in self.module.named_modules():
            own = [n for n, _ in part.named_parameters(recurse=False)]
            if isinstance(part, GABOR_LAYERS) or not any(map(is_gabor_like, own)):
                continue
            found = convolution_of(self.module, name, given)
            if found is None or found["weight"][0].numel() == 1:
                continue
            weight, n_dims = found["weight"], found["weight"].ndim - 2
            result = fit(weight.float(), n_dims=n_dims, center=True)
            self.parts[f"fit{_of(name)}"] = result
            good = result.converged
            if not bool(good.any()):
                return None
            center = result.params.center[good].reshape(-1, n_dims)
            middle = center.median(0).values
            spread = (center - middle).abs().amax()
            if middle.abs().amax() > _OFF_CENTRE and spread < 0.5 * middle.abs().amax():
                return [self._off_centre(name, middle)]
        return None

    def _off_centre(self, name: str, middle: Tensor) -> Finding:
        shift = ", ".join(f"{value:+.2f}" for value in middle.tolist())
        return finding(
            "off-centre grid",
            (name,),
            of=_of(name),
            name=name,
            shift=shift,
            largest_shift_px=middle.abs().amax().item(),
        )

    def _absorbed(self, name: str) -> list[Finding] | None:
        """Whether what follows a layer undoes the amplitude of its kernels."""
        if name == "" or not self.module.training:
            return None
        louder: Any = copied(self.module)
        layer: Any = louder.get_submodule(name)
        with torch.no_grad():
            layer.params = layer.params.replace(amplitude=layer.params.amplitude * 3.0)
            if layer.bias is not None:
                layer.bias.mul_(3.0)
        one, other = self.output, self._answer(louder)
        if not isinstance(one, Tensor) or not isinstance(other, Tensor) or not _close(one, other):
            return None
        layer = self.layers[name]
        norm = layer.weight.detach().flatten(1).norm(dim=1)
        size = norm.median().item()
        far = size > 10 or size < 0.1
        code = (
            "import torch\n"
            f"layer = module.get_submodule({name!r})\n"
            "size = layer.weight.detach().flatten(1).norm(dim=1, keepdim=True)\n"
            "size = size.unflatten(0, (layer.n_filters, -1)).amax(1)\n"
            "layer.params = layer.params.replace(amplitude=layer.params.amplitude / size)\n"
        )
        return [
            finding(
                "amplitude absorbed",
                (name,),
                severity=Severity.SEVERE if far else None,
                remedy=code + CLEAR_OPTIMIZER if far else "",
                of=_of(name),
                length="the wrong length for phases, which are stored with the amplitude"
                if far
                else "about the right length",
                kernel_norm=size,
            )
        ]

    @cached_property
    def output(self) -> Any:
        """What the module answers to the inputs as it is."""
        return self._answer(copied(self.module))

    @torch.no_grad()
    def _answer(self, module: nn.Module) -> Any:
        """What a copy of the module answers, under the same random numbers each time."""
        return Sandbox(module, self.setup.inputs, seed=self.seed).run(module).output

    @cached_property
    def regression(self) -> bool:
        """Whether the targets are responses."""
        return is_response(self.output, self.setup.targets)

    def _identifiability(self) -> Any:
        return identifiability(self.module, self.setup.inputs, targets=self.setup.targets)

    def _reachable(self) -> list[Finding] | None:
        """Whether fields that do not learn have the values that the responses ask for."""
        layer = self.alone
        options = recover_options(layer)
        setup = self.setup
        if options is None or layer.output != "real" or layer.geometry != "filter":
            return None
        result = recover(setup.inputs, setup.targets, layer.kernel_size, **options)
        self.parts["recover"] = result
        return [*self._differences(layer, result)]

    def _differences(self, layer: GaborLayer, result: FitResult) -> Iterator[Finding]:
        """Frozen fields whose values are not those of the responses."""
        present = layer.params.detach().to(torch.float64)
        difference = result.params.difference(present)
        remedy = recover_code(layer)
        for field, value in difference.items():
            if field in layer.learn or field == "center":
                continue
            error = result.standard_error[field]
            unit = 1.0 if field in ("orientation", "phase") else present.as_dict()[field].abs()
            known = result.converged.unsqueeze(1) & error.isfinite()
            off = known & (value.abs() > 5 * error) & (value.abs() > 0.1 * unit)
            if not bool(off.any()):
                continue
            filters = tuple(str(i) for i in off.any(1).nonzero().flatten().tolist())
            if field == "phase" and "orientation" not in layer.learn:
                opposite = result.params.phase + present.expand().phase
                turned = torch.remainder(opposite + math.pi, 2 * math.pi) - math.pi
                if bool((turned.abs()[off] < 0.1).all()):
                    yield finding(
                        "wrong sign of phase",
                        filters,
                        largest_difference_rad=value.abs()[off].max().item(),
                    )
                    continue
            largest = value.abs()[off].max().item()
            yield finding(
                "frozen",
                filters,
                severity=Severity.SEVERE,
                confidence=0.9,
                remedy=remedy,
                reason=f"its {field} is off by up to {largest:.3g} from what the responses ask for",
                largest_difference=largest,
            )

    def _looked_at(self) -> list[tuple[str, int]]:
        """Fields and filters whose landscapes are worth a look."""
        layer = self.alone
        fields = [f for f in ("orientation", "wavelength") if f in layer.learn]
        n = min(layer.n_filters, _MANY_FILTERS)
        return [(field, index) for index in range(n) for field in fields]

    @cached_property
    def output_loss(self) -> OutputLoss:
        """The loss, by name where it is the squared error or its root under another one."""
        setup = self.setup
        measure: Any = setup.loss
        with torch.no_grad():
            outputs = [self.output, 0.5 * self.output + setup.targets.std()]
            given = torch.stack([setup.loss(one, setup.targets).double() for one in outputs])
            squared = torch.stack([F.mse_loss(one, setup.targets).double() for one in outputs])
        for name, expected in (("mse", squared), ("rmse", squared.sqrt())):
            if torch.allclose(given, expected, rtol=1e-5, atol=0.0):
                measure = name
        return OutputLoss(setup.inputs, setup.targets, measure)

    def _step_limit(self) -> Any:
        if isinstance(self.setup.inputs, tuple):
            raise ValueError("The step is judged for one tensor of inputs.")
        if not self.regression:
            raise ValueError(
                "The step is judged where targets are responses; the minimum of a classifier's "
                "loss may lie at infinity."
            )
        return step_limit(self.output_loss, self.module, optimizer=self.setup.optimizer)

    # -- trials of remedies, and the order ------------------------------------------------------

    def _merged(self) -> list[Finding]:
        """One finding for each cause and remedy, with all that it concerns."""
        merged: dict[tuple[str, str], Finding] = {}
        for found in self.found:
            key = (found.cause, found.remedy)
            if key not in merged:
                merged[key] = found
                continue
            first = merged[key]
            worse = min(first, found, key=lambda one: (one.severity.rank, -one.confidence))
            location = tuple(dict.fromkeys((*first.location, *found.location)))
            merged[key] = replace(worse, location=location)
        return list(merged.values())

    def _tried(self, findings: list[Finding], losses: list[float], after: float) -> list[Finding]:
        """Severe is what learning fails with; what a remedy mends stands first."""
        learns = after > _LEARNT or (
            math.isnan(after) and _falls(losses) and math.isfinite(losses[-1])
        )
        judged = []
        for i, found in enumerate(findings):
            self.report("remedies", i, len(findings))
            numbers, severity, helps = dict(found.numbers), found.severity, True
            if found.cause in _OF_OTHER_STARTS:
                severity = Severity.NOTE if learns else severity
            elif learns and severity is Severity.SEVERE and found.cause not in _BUGS:
                severity = Severity.WARNING
            if found.remedy and severity is not Severity.NOTE:
                helps, result = self._helps(found, losses, after)
                numbers |= result
                # Learning fails with it, and works without it.
                if helps and not learns and found.cause not in _OF_OTHER_STARTS:
                    severity = Severity.SEVERE
            judged.append((replace(found, severity=severity, numbers=numbers), helps))
        judged.sort(
            key=lambda pair: (
                pair[0].severity.rank,
                not pair[1],
                CAUSES.index(pair[0].cause),
                -pair[0].confidence,
            )
        )
        return [found for found, _ in judged]

    def _helps(
        self, found: Finding, losses: list[float], after: float
    ) -> tuple[bool, dict[str, float]]:
        """Whether learning goes better with a remedy, and how far it gets."""
        try:
            mended = self.setup.with_remedy(found.remedy)
            with_it = mended.train(self.n_steps, seed=self.seed)
            explained = mended.explained()
        except Exception:  # somebody else's module may not bear it
            return False, {}
        if not math.isnan(explained):
            reached = after if math.isfinite(after) else -1.0
            return explained > _LEARNT or explained > reached + _HELPS * (1 - reached), {
                "explained_without_remedy": after,
                "explained_with_remedy": explained,
            }
        good = math.isfinite(with_it[-1]) and (
            not math.isfinite(losses[-1]) or with_it[-1] < 0.7 * losses[-1]
        )
        return good, {"loss_without_remedy": losses[-1], "loss_with_remedy": with_it[-1]}

    def _together(self, findings: list[Finding], after: float) -> tuple[Finding, ...]:
        """Remedies that are enough one after the other, where none is alone."""
        tried = [f for f in findings if "explained_with_remedy" in f.numbers]
        reached = [f.numbers["explained_with_remedy"] for f in tried]
        if not after < _LEARNT or len(tried) < 2 or max(reached) > _LEARNT:
            return ()
        chosen: list[Finding] = []
        for found in tried:
            # Another finding may have the same remedy.
            if any(found.remedy == other.remedy for other in chosen):
                continue
            chosen.append(found)
            self.report("remedies together", len(chosen), len(tried))
            try:
                mended = _mended(self.setup, chosen)
                mended.train(self.n_steps, seed=self.seed)
                if mended.explained() > _LEARNT:
                    return tuple(chosen)
            except Exception:  # one remedy may take away what the next one needs
                chosen.pop()
        return ()


def _mended(setup: TrainingSetup, findings: Sequence[Finding]) -> TrainingSetup:
    """A copy with remedies carried out one after the other."""
    for found in findings:
        setup = setup.with_remedy(found.remedy)
    return setup


def _of(name: str) -> str:
    return f" of {name}" if name else ""


def _close(one: Tensor, other: Tensor) -> bool:
    distance = (one - other).double().norm()
    return bool(distance < 1e-2 * one.double().norm())


def _falls(losses: list[float]) -> bool:
    return losses[-1] < 0.5 * losses[0]
