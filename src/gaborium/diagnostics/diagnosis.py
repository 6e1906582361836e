"""From a training loop that fails to the cause: all checks, then trials of the remedies."""

from __future__ import annotations

import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gaborium.diagnostics.causes import (
    BUGS,
    CAUSES,
    GUESSES,
    OF_OTHER_STARTS,
    Finding,
    Severity,
    finding,
)
from gaborium.diagnostics.filters import health
from gaborium.diagnostics.gradients import check_gradients
from gaborium.diagnostics.identifiability import identifiability
from gaborium.diagnostics.landscape import landscape
from gaborium.diagnostics.remedies import convolution_of, recover_code, recover_options
from gaborium.diagnostics.sandbox import (
    Loss,
    TrainingSetup,
    copied,
    is_response,
)
from gaborium.diagnostics.step_size import step_limit
from gaborium.diagnostics.surroundings import check_surroundings, guesses
from gaborium.diagnostics.unit_checks import is_gabor_like
from gaborium.fitting import fit, recover
from gaborium.functions.params import plain
from gaborium.layers import GABOR_LAYERS

_LEARNT = 0.99  # share of the targets' variance that is explained where learning works
_HELPS = 0.5  # share of the unexplained variance that a remedy must explain
_MANY_FILTERS = 4  # filters whose landscapes are computed
_MANY_NUMBERS = 8  # among the parameters of other layers, whose landscapes are computed
_SCAN_POINTS = 180
_OFF_CENTRE = 0.25  # px


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The result of ``diagnose``.

    Args:
        findings: the worst first; of these the cause before its consequences.
        parts: the records of the checks, by name, such as ``"gradients"`` or ``"landscape of
            orientation, filter 0"``; ``plots`` draws them.
        skipped: checks that could not be made, and why.
        losses: of a trial of the unchanged set-up, on a copy.
        explained: share of the targets' variance that the outputs explain before that trial, and
            the least of it in the last quarter; NaN where outputs and targets differ in shape.
        setup: the set-up that was examined.
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
    def learns(self) -> bool:
        """Whether the trial of the unchanged set-up learned, and held what it had learned."""
        after, losses = self.explained[1], self.losses or [math.nan]
        fell = losses[-1] < 0.5 * losses[0] and math.isfinite(losses[-1])
        return after > _LEARNT or (math.isnan(after) and fell)

    @property
    def headline(self) -> str:
        """The answer in one or two sentences; first whether the trial learned at all."""
        cause = ""
        if self.findings and self.findings[0].severity is not Severity.NOTE:
            # Up to the first full stop that ends a sentence: numbers have others.
            cause = re.split(r"(?<=\w\.)\s+(?=[A-Z])", self.findings[0].sentence, maxsplit=1)[0]
        if not self.losses:
            return cause or "No fault was found in the filters. The training was not examined."
        if self.learns:
            return cause or "No fault was found that prevents learning."
        explained, n_steps = self.explained[1], len(self.losses) - 1
        how = f"the loss went from {self.losses[0]:.3g} to {self.losses[-1]:.3g}"
        if explained < 0:
            how = "the output is worse than a constant"
        elif explained >= 0:
            how = f"the output explains {explained:.1%} of the targets' variance"
        cause = cause or "The cause is unknown: no check found a fault."
        after = f"after {n_steps} step{'s' * (n_steps != 1)}"
        return f"It does not learn here: {after} {how}. {cause}"

    @property
    def severe(self) -> list[Finding]:
        """The findings that make learning fail."""
        return [found for found in self.findings if found.severity is Severity.SEVERE]

    def with_remedy(self, finding: Finding | None = None) -> TrainingSetup:
        """A copy of the set-up with a remedy carried out.

        Args:
            finding: with the remedy; by default all ``combined_remedies``, or else the first
                finding that has one.

        Raises:
            ValueError: there is no finding with a remedy.
        """
        first = [found for found in self.findings if found.remedy][:1]
        chosen = [finding] if finding is not None else list(self.combined_remedies) or first
        if not chosen or not chosen[0].remedy:
            raise ValueError("There is no finding with a remedy to carry out.")
        return self.setup.with_remedy("\n".join(one.remedy for one in chosen))

    def to_json(self) -> str:
        """Findings, losses and skipped checks as JSON text; missing numbers are inf and nan."""
        document = {
            "findings": [
                vars(found) | {"severity": found.severity.name} for found in self.findings
            ],
            "skipped": dict(self.skipped),
            "losses": list(self.losses),
            "explained": list(self.explained),
            "combined_remedies": [found.cause for found in self.combined_remedies],
        }
        return json.dumps(plain(document), allow_nan=False)

    def __str__(self) -> str:
        lines = [self.headline]
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
    n_steps: int = 400,
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> Diagnosis:
    """Find out why a Gabor layer, a loss and a training loop do not learn.

    Everything is done on copies. The set-up is tried for some steps unchanged, and then with each
    of the remedies: a fault is severe if learning fails with it, and a remedy that helps comes
    before one that does not.

    Args:
        module: a Gabor layer, ours or anybody's, or a network with one.
        loss: ``loss(output, target) -> scalar``.
        data: one batch of inputs, and the targets for it; several inputs are a tuple.
        optimizer: of the loop, made from ``module.parameters()``; by default gradient descent with
            a step of 0.01 is tried, and no step size is judged.
        n_steps: of each trial.
        seed: of random numbers in module and loss.
        on_progress: called with the name of the next check.

    Returns:
        Findings, worst first, and the records behind them.

    Raises:
        TypeError: ``module`` is not a module, or the loss does not return a tensor.
        ValueError: the loss is not a scalar, or differs between two calls; or inputs are not
            finite, or on another device than the module.

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
    if not (isinstance(data, tuple) and len(data) == 2):
        raise TypeError("data must be a tuple of inputs and targets.")
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, got {n_steps}.")
    setup = TrainingSetup(module, loss, *data, optimizer, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copies repeat the warnings of the caller's layer
        return _Examination(setup, n_steps, on_progress or (lambda _: None)).result()


def diagnose_filters(layer: nn.Module) -> Diagnosis:
    """Check the filters of a layer without inputs and loss, such as one from a file.

    Args:
        layer: a Gabor layer or a convolution.

    Returns:
        The findings of ``health``; the other checks are in ``skipped``.

    Example:
        >>> from gaborium import GaborConv2d
        >>> [found.cause for found in diagnose_filters(GaborConv2d(1, 8, 9, seed=0)).findings]
        ['DC leak']
    """
    found = health(layer)
    reason = "There are no inputs and no loss."
    skipped = dict.fromkeys(("gradients", "landscapes", "step limit", "trials"), reason)
    absent: Any = None
    setup = TrainingSetup(layer, absent, absent, absent)
    return Diagnosis(found.findings, {"health": found}, skipped, [], (math.nan, math.nan), setup)


class _Examination:
    """The work of ``diagnose``: the checks, then the trials of remedies, then the order."""

    def __init__(self, setup: TrainingSetup, n_steps: int, report: Callable[[str], None]) -> None:
        self.setup, self.module = setup, setup.module
        self.n_steps, self.report = n_steps, report
        self.layers: dict[str, Any] = {
            name: part for name, part in self.module.named_modules()
            if isinstance(part, GABOR_LAYERS)
        }  # fmt: skip
        # The layer, if the module is one: its outputs are compared with the targets.
        self.alone: Any = self.layers.get("")
        self.parts: dict[str, Any] = {}
        self.found: list[Finding] = []
        self.trials: dict[str, dict[str, float]] = {}  # by code

    def result(self) -> Diagnosis:
        skipped = {}
        for name, check in self._checks():
            self.report(name)
            try:
                answer = check()
                if hasattr(answer, "findings"):
                    self.parts[name] = answer
                    answer = answer.findings
                self.found += answer
            except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
                if name == "gradients":  # the first check: the set-up cannot be run at all
                    raise
                skipped[name] = str(error).splitlines()[0]
        self.report("trials")
        trial = self.setup.copy()
        before = trial.explained()
        self.losses, self.after = self._train(trial)
        result = Diagnosis([], self.parts, skipped, self.losses, (before, self.after), self.setup)
        self.learns = result.learns
        if not self.learns:
            self.found += guesses(self.setup, trial)
        judged = [self._judged(found) for found in self._merged()]
        judged = [(one, helps) for one, helps in judged if helps or one.cause not in GUESSES]

        def place(pair: tuple[Finding, bool]) -> tuple[Any, ...]:
            found, helps = pair  # remedies that help come first
            # A guess that helps without being enough may only resemble the fault.
            is_vague = found.cause in GUESSES and not self._is_enough(found.numbers)
            order = CAUSES.index(found.cause), -found.confidence
            return found.severity.rank, not helps, is_vague, *order

        findings = [found for found, _ in sorted(judged, key=place)]
        combined = self._combined(findings) or self._with_step(findings)
        known = [found for found in findings if all(found is not one for one in combined)]
        findings = [*combined, *known]
        return replace(result, findings=findings, combined_remedies=combined)

    # -- checks ---------------------------------------------------------------------------------

    def _checks(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """The checks by name; each returns a record with findings, or findings."""
        inputs, targets = self.setup.inputs, self.setup.targets
        yield "gradients", partial(check_gradients, self.setup)
        is_broken = any(f.cause in BUGS and f.severity is Severity.SEVERE for f in self.found)
        yield "data and loss", partial(check_surroundings, self.setup)
        yield "kernels of foreign layers", self._foreign
        for name, layer in self.layers.items():
            yield f"health{_of(name)}", partial(health, layer, name=name)
            yield f"amplitude{_of(name)}", partial(self._absorbed, name)
        if is_broken:
            return
        if self.alone is not None and is_response(self._output_of(self.module), targets):
            yield "identifiability", partial(identifiability, self.alone, inputs, targets=targets)
            yield "reachable minimum", self._reachable
            for index in range(min(self.alone.n_filters, _MANY_FILTERS)):
                for field in ("orientation", "wavelength"):
                    if field in self.alone.learn:
                        scan = partial(landscape, self.setup, field, filter=index)
                        yield f"landscape of {field}, filter {index}", scan
        for name in self._few_numbers():
            yield (
                f"landscape of {name}",
                partial(landscape, self.setup, name, n_points=_SCAN_POINTS),
            )
        yield "step limit", partial(step_limit, self.setup)

    def _few_numbers(self) -> list[str]:
        """The numbers that layers of other libraries learn, where they are few: ``"theta[0]"``."""
        names = []
        for name, value in self.module.named_parameters():
            is_ours = isinstance(self.module.get_submodule(name.rpartition(".")[0]), GABOR_LAYERS)
            if value.requires_grad and value.numel() <= _MANY_NUMBERS and not is_ours:
                places = itertools.product(*map(range, value.shape))
                names += [
                    f"{name}[{', '.join(map(str, place))}]" if place else name for place in places
                ]
        named = [name for name in names if is_gabor_like(name.partition("[")[0])]
        n_learned = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        return named[:_MANY_NUMBERS] or (names if n_learned <= _MANY_NUMBERS else [])

    def _foreign(self) -> Iterator[Finding]:
        """Whether layers that make their own kernels sample them around the middle."""
        for name, part in self.module.named_modules():
            own = [n for n, _ in part.named_parameters(recurse=False)]
            if isinstance(part, GABOR_LAYERS) or not any(map(is_gabor_like, own)):
                continue
            found = convolution_of(self.module, name, self.setup.inputs)
            if found is None or found["weight"][0].numel() == 1:
                continue
            weight: Tensor = found["weight"].float()
            result = fit(weight, n_dims=weight.ndim - 2, center=True)
            self.parts[f"fit{_of(name)}"] = result
            center = result.params.center[result.converged].flatten(0, -2)
            if not len(center):
                return
            middle = center.median(0).values
            shift = middle.abs().amax()
            if shift > _OFF_CENTRE and (center - middle).abs().amax() < 0.5 * shift:
                yield finding(
                    "off-centre grid",
                    (name,),
                    of=_of(name),
                    name=name,
                    shift=", ".join(f"{value:+.2f}" for value in middle.tolist()),
                    largest_shift_px=shift.item(),
                )
                return

    def _absorbed(self, name: str) -> Iterator[Finding]:
        """Whether the modules after a layer undo the amplitude of its kernels."""
        if name == "" or not self.module.training:
            return
        louder = copied(self.module)
        layer: Any = louder.get_submodule(name)
        with torch.no_grad():
            layer.params = layer.params.replace(amplitude=layer.params.amplitude * 3.0)
            if layer.bias is not None:
                layer.bias.mul_(3.0)
        one, other = self._output_of(self.module), self._output_of(louder)
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            return
        if (one - other).double().norm() < 1e-2 * one.double().norm():
            size = self.layers[name].weight.detach().flatten(1).norm(dim=1).median().item()
            texts: Any = {"of": _of(name), "name": name, "length": "about the right length"}
            options: Any = {"remedy": ""}
            if size > 10 or size < 0.1:
                wrong = "the wrong length for phases, which are stored with the amplitude"
                texts["length"], options = wrong, {"severity": Severity.SEVERE}
            yield finding("amplitude absorbed", (name,), kernel_norm=size, **texts, **options)

    @torch.no_grad()
    def _output_of(self, module: nn.Module) -> Any:
        """The output for the inputs, under the same random numbers each time."""
        return replace(self.setup, module=module).run().output

    def _reachable(self) -> Iterator[Finding]:
        """Whether fields that do not learn have the values that fit the responses."""
        layer, options = self.alone, recover_options(self.alone)
        if options is None or layer.output != "real" or layer.geometry != "filter":
            return
        result = recover(self.setup.inputs, self.setup.targets, layer.kernel_size, **options)
        self.parts["recover"] = result
        present = layer.params.detach().to(torch.float64)
        for field, value in result.params.difference(present).items():
            if field in layer.learn or field == "center":
                continue
            error = result.standard_error[field]
            unit = 1.0 if field in ("orientation", "phase") else present.as_dict()[field].abs()
            known = result.converged.unsqueeze(1) & error.isfinite()
            off = known & (value.abs() > 5 * error) & (value.abs() > 0.1 * unit)
            if not bool(off.any()):
                continue
            filters, largest = off.any(1).nonzero().flatten().tolist(), value.abs()[off].max()
            if field == "phase" and "orientation" not in layer.learn:
                opposite = result.params.phase + present.expand().phase
                turned = torch.remainder(opposite + math.pi, 2 * math.pi) - math.pi
                if bool((turned.abs()[off] < 0.1).all()):
                    yield finding(
                        "wrong sign of phase", filters, largest_difference_rad=largest.item()
                    )
                    continue
            reason = f"its {field} is off by up to {largest:.3g} from the responses' best fit"
            worst: Any = {"severity": Severity.SEVERE, "confidence": 0.9}
            worst |= {"remedy": recover_code(layer), "largest_difference": largest.item()}
            yield finding("frozen", filters, reason=reason, **worst)

    # -- trials of remedies ---------------------------------------------------------------------

    def _train(self, setup: TrainingSetup) -> tuple[list[float], float]:
        """The losses of a training, and the least that is explained in its last quarter."""
        part, explained = self.n_steps // 16, []
        losses = setup.train(self.n_steps - 4 * part)
        for _ in range(4):
            if math.isfinite(losses[-1]):
                losses[-1:] = setup.train(part)
            explained.append(setup.explained())
        return losses, math.nan if math.isnan(sum(explained)) else min(explained)

    def _merged(self) -> list[Finding]:
        """One finding for each cause and remedy, with all locations."""
        merged: dict[tuple[str, str], Finding] = {}
        for found in self.found:
            first = merged.setdefault((found.cause, found.remedy), found)
            worse = min(first, found, key=lambda one: (one.severity.rank, -one.confidence))
            location = tuple(dict.fromkeys((*first.location, *found.location)))
            merged[found.cause, found.remedy] = replace(worse, location=location)
        return list(merged.values())

    def _judged(self, found: Finding) -> tuple[Finding, bool]:
        """A finding with the severity that trials show, and whether its remedy helps."""
        severity, is_general = found.severity, found.cause in OF_OTHER_STARTS
        if self.learns and is_general:
            severity = Severity.NOTE
        elif self.learns and severity is Severity.SEVERE and found.cause not in BUGS:
            severity = Severity.WARNING
        if not found.remedy or severity is Severity.NOTE:
            return replace(found, severity=severity), True
        numbers = self._trial([found])
        helps = self._helps(numbers)
        if helps and not self.learns and not is_general:
            severity = Severity.SEVERE
        return replace(found, severity=severity, numbers=found.numbers | numbers), helps

    def _trial(self, findings: Sequence[Finding]) -> dict[str, float]:
        """How far learning gets with remedies; nothing if their code cannot be run."""
        code = "\n".join(one.remedy for one in findings)
        if code not in self.trials:  # several findings may have the same remedy
            self.report(f"remedy of {findings[-1].cause}")
            self.trials[code] = self._trial_of(code)
        return self.trials[code]

    def _trial_of(self, code: str) -> dict[str, float]:
        try:
            losses, explained = self._train(self.setup.with_remedy(code))
        except Exception:  # a remedy may not fit somebody else's module, or another remedy
            return {}
        if math.isnan(explained):
            return {"loss_without_remedy": self.losses[-1], "loss_with_remedy": losses[-1]}
        return {"explained_without_remedy": self.after, "explained_with_remedy": explained}

    def _helps(self, trial: Mapping[str, float]) -> bool:
        """Whether learning goes better with a remedy."""
        if "explained_with_remedy" in trial:
            reached = self.after if math.isfinite(self.after) else -1.0
            enough = min(_LEARNT, reached + _HELPS * (1 - reached))
            return trial["explained_with_remedy"] > enough
        loss = trial.get("loss_with_remedy", math.inf)
        return math.isfinite(loss) and not loss >= 0.7 * self.losses[-1]

    def _combined(self, findings: list[Finding]) -> tuple[Finding, ...]:
        """Remedies that are enough one after the other, where no remedy is enough alone."""
        tried = self._tried(findings)
        if len(tried) < 2 or max(map(_reached, tried)) > _LEARNT:
            return ()
        chosen: list[Finding] = []
        for found in tried:
            # Another finding may have the same remedy.
            if all(found.remedy != other.remedy for other in chosen):
                trial = self._trial([*chosen, found])
                chosen += [found] if trial else []
                if self._is_enough(trial):
                    return self._needed(chosen)
        return ()

    def _needed(self, chosen: list[Finding]) -> tuple[Finding, ...]:
        """The remedies of a sufficient combination without which it is not."""
        for one in chosen[:-1]:
            others = [found for found in chosen if found is not one]
            if self._is_enough(self._trial(others)):
                chosen = others
        return tuple(chosen)

    def _is_enough(self, trial: Mapping[str, float]) -> bool:
        return trial.get("explained_with_remedy", 0.0) > _LEARNT

    def _with_step(self, findings: list[Finding]) -> tuple[Finding, ...]:
        """The best remedy and one of the step, which is judged where that remedy leads.

        A start in the right valley is of no use if the next steps throw it out of the valley.
        """
        first = max(self._tried(findings), key=_reached, default=None)
        if first is None or _reached(first) > _LEARNT:
            return ()
        try:
            steps = step_limit(self.setup.with_remedy(first.remedy)).findings
        except Exception:  # as in a trial
            return ()
        for step in steps:
            trial = self._trial([first, step]) if step.remedy else {}
            if self._is_enough(trial):
                return first, replace(step, severity=Severity.SEVERE, numbers=step.numbers | trial)
        return ()

    def _tried(self, findings: list[Finding]) -> list[Finding]:
        """Findings with remedies that were tried on a set-up whose targets are not explained."""
        tried = [found for found in findings if "explained_with_remedy" in found.numbers]
        return tried if self.after < _LEARNT else []


def _reached(found: Finding) -> float:
    return found.numbers["explained_with_remedy"]


def _of(name: str) -> str:
    return f" of {name}" if name else ""
