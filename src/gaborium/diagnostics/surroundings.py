"""Faults outside the layer: in the data, the loss, the units behind the layer and the optimiser."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium.diagnostics.causes import Finding, finding
from gaborium.diagnostics.sandbox import Trace, TrainingSetup, is_response, tensors_of

_REACH = 3  # px by which targets may be shifted
_MANY_SAMPLES = 256  # for which the order of the targets is examined
_BETTER = 0.02  # by which another order or place must correlate better
_LARGE = 10.0  # size of an offset that may hold a ReLU at zero


def check_surroundings(setup: TrainingSetup) -> Iterator[Finding]:
    """Faults that show without any training."""
    for name in ("inputs", "targets"):  # constant data would mislead the other checks
        values = tensors_of(getattr(setup, name))
        if values and all(one.numel() > 1 and bool(one.min() == one.max()) for one in values):
            yield finding("constant data", (name,))
            return
    trace = Trace()
    output = setup.run(trace=trace).output
    if trace.dead_units:
        yield finding("dead units", where=trace.dead_units[0], limit=_LARGE)
    if trace.probabilities:
        yield finding("double softmax")
    with contextlib.suppress(Exception), torch.no_grad():  # a loss may need more than tensors
        yield from _loss(setup, output)


def _loss(setup: TrainingSetup, output: Any) -> Iterator[Finding]:
    """Whether the loss depends on the targets, and is lower for perfect outputs."""
    targets = setup.targets
    if is_response(output, targets):
        perfect, others = targets.to(output), 2 * targets + 1
        remedy = "import torch\nloss = torch.nn.functional.mse_loss\n"
    elif output.ndim == 2 and targets.ndim == 1 and not targets.is_floating_point():
        n_classes = output.shape[1]
        perfect = (10 + output.abs().max()) * F.one_hot(targets, n_classes).to(output)
        others = (targets + 1) % n_classes
        remedy = "import torch\nloss = torch.nn.functional.cross_entropy\n"
    else:
        return
    pairs = ((output, targets), (perfect, targets), (perfect, others))
    present, best, changed = (setup.loss(one, other).item() for one, other in pairs)
    if best == changed:
        yield finding("loss ignores the targets", remedy=remedy)
    elif best > present + 1e-6 * abs(present):
        yield finding("negated loss", present_loss=present, perfect_loss=best)


def guesses(setup: TrainingSetup, trained: TrainingSetup) -> Iterator[Finding]:
    """Faults that a trial of their remedy must confirm, for a set-up that does not learn.

    Args:
        setup: as it is.
        trained: a copy after a trial; what its outputs resemble tells more than at the start.
    """
    groups = setup.optimizer.param_groups if setup.optimizer is not None else []
    decay = max((group.get("weight_decay", 0.0) for group in groups), default=0.0)
    if decay:
        yield finding("weight decay", weight_decay=decay)
    hooked = [name for name, p in setup.module.named_parameters() if p._backward_hooks]
    if hooked:
        yield finding("altered gradient", hooked)
    inputs, targets = setup.inputs, setup.targets
    if isinstance(inputs, Tensor) and inputs.ndim >= 3 and inputs.shape[1] == 3:
        yield finding("channel order")
    outputs = [one.run().output for one in (setup, trained)]
    if not is_response(outputs[0], targets) or not outputs[1].isfinite().all():
        return
    likeness = [_correlation(one, targets) for one in outputs]
    output = outputs[likeness[1] > likeness[0]].double()
    factor = 1.0
    if likeness[0] < -0.3:
        factor = -1.0
    elif max(likeness) > 0.9:
        factor = ((output * output).sum() / (output * targets).sum()).item()
    if not 0.9 < factor < 1.1:
        yield finding("target scale", factor=factor)
    yield from _displaced(output, targets, max(likeness))
    yield from _shuffled(output, targets)


def _correlation(one: Tensor, other: Tensor) -> float:
    one, other = (value.double() - value.double().mean() for value in (one, other))
    size = one.norm() * other.norm()
    return ((one * other).sum() / size).item() if size > 0 else 0.0


def _displaced(output: Tensor, targets: Tensor, present: float) -> Iterator[Finding]:
    """Targets that resemble the outputs more when they are shifted."""
    axes = tuple(range(2, targets.ndim))
    found = {
        shift: _correlation(output, targets.roll(shift, axes))
        for shift in itertools.product(range(-_REACH, _REACH + 1), repeat=len(axes))
        if any(shift)
    }
    best = max(found, key=found.__getitem__, default=())
    if best and found[best] > present + _BETTER:
        yield finding("shifted targets", shift=str(best), axes=str(axes))


def _shuffled(output: Tensor, targets: Tensor) -> Iterator[Finding]:
    """Targets that resemble the outputs of other samples more than of their own."""
    n = targets.shape[0] if targets.ndim else 1
    if not 1 < n <= _MANY_SAMPLES:
        return
    rows = [value.double().reshape(n, -1) for value in (output, targets)]
    rows = [F.normalize(row - row.mean(1, keepdim=True)) for row in rows]
    likeness = rows[0] @ rows[1].T
    order = likeness.argmax(1).tolist()
    own = likeness.diagonal().mean().item()
    if sorted(order) == [*range(n)] and likeness.amax(1).mean().item() > own + _BETTER:
        yield finding("shuffled targets", order=str(order))
