"""The table of causes: severity, sentence and remedy of every fault that a diagnosis can find."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Severity(enum.Enum):
    """How much a finding harms learning."""

    SEVERE = "Learning fails, or ends in the wrong place."
    WARNING = "Learning is slower, less certain or biased."
    NOTE = "Worth knowing."

    @property
    def rank(self) -> int:
        """0 for the worst."""
        return list(Severity).index(self)


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Args:
        cause: its name, such as ``"no gradient"``. Names stay the same from one version to the
            next, so that scripts can compare them.
        severity: how much it matters.
        sentence: the finding, for a reader who knows the training loop and not this library.
        numbers: the measurements behind it, by name with unit, such as ``{"step_size": 1.0}``.
        remedy: Python code that fixes it, in terms of the names that ``diagnose`` is called with:
            ``module``, ``loss``, ``inputs``, ``targets`` and ``optimizer``.
        location: names of the parameters, or indices of the filters, that it concerns.
        confidence: how sure it is that this prevents learning, in [0, 1]. Among findings of equal
            severity the more certain one comes first.

    Example:
        >>> finding = Finding(
        ...     "no gradient", Severity.SEVERE, "theta gets no gradient.", location=("theta",)
        ... )
        >>> finding.cause, finding.severity.name
        ('no gradient', 'SEVERE')
    """

    cause: str
    severity: Severity
    sentence: str
    numbers: dict[str, float] = field(default_factory=dict)
    remedy: str = ""
    location: tuple[str, ...] = ()
    confidence: float = 1.0


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """The worst first, and among equals the most certain."""
    return sorted(findings, key=lambda found: (found.severity.rank, -found.confidence))


def finding(
    cause: str,
    location: Iterable[object] = (),
    *,
    severity: Severity | None = None,
    confidence: float | None = None,
    remedy: str | None = None,
    **values: Any,
) -> Finding:
    """Build a finding from the row of its cause.

    The sentence and the remedy take their fields from ``values``; numbers among these are also
    ``Finding.numbers``. The other arguments replace the row's.
    """
    row, names = _TABLE[cause], tuple(map(str, location))
    return Finding(
        cause,
        severity or row.severity,
        row.sentence.format(names=listed(names), **values),
        {name: float(value) for name, value in values.items() if not isinstance(value, str)},
        row.remedy.format(**values) if remedy is None else remedy,
        names,
        row.confidence if confidence is None else confidence,
    )


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = names if len(names) <= 6 else [*names[:4], f"{names[4]} and {len(names) - 5} more"]
    return ", ".join(shown)


# -- code of remedies ---------------------------------------------------------------------------

# A replaced layer has parameters that the optimizer must be given.
RENEW_OPTIMIZER = """\
if optimizer is not None:
    rate = optimizer.param_groups[0]["lr"]
    optimizer.param_groups.clear()
    optimizer.state.clear()
    optimizer.add_param_group(dict(params=list(module.parameters()), lr=rate))
"""
_CLEAR_OPTIMIZER = "if optimizer is not None:\n    optimizer.state.clear()\n"
SINGLE_PRECISION = "module = module.float()\n" + RENEW_OPTIMIZER
# The old step size need not suit a Gabor layer that replaces another layer.
REPLACE = """\
from gaborium.diagnostics import replace_by_gabor
module = replace_by_gabor(module, {name!r}, inputs)
"""
NEW_OPTIMIZER = """\
import torch
optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
"""
REBUILD = (
    "from gaborium.diagnostics import rebuild_layer\n"
    "module = rebuild_layer(module, {name!r}, {arguments})\n" + RENEW_OPTIMIZER
)
_REINITIALIZE = (
    "from gaborium.diagnostics import reinitialize_filters\n"
    "reinitialize_filters(module.get_submodule({name!r}), {filters}, seed=0)\n" + _CLEAR_OPTIMIZER
)
RECOVER = """\
from gaborium import recover
module.params = recover(
    inputs, targets, module.kernel_size{arguments}
).params
"""
SET_RATE = "for group in optimizer.param_groups:\n    group['lr'] = {rate}\n"
_SCALE_RATE = "for group in optimizer.param_groups:\n    group['lr'] *= {factor}\n"


class _Row(NamedTuple):
    severity: Severity
    sentence: str
    remedy: str = ""
    confidence: float = 1.0


_SEVERE, _WARNING, _NOTE = Severity
_SLOWER, _FASTER = _SCALE_RATE.format(factor=0.1), _SCALE_RATE.format(factor=10)

# A cause comes before its consequences: a lost gradient before a bad start, images that are too
# bright before the step that is then too long.
_TABLE = {
    "altered gradient": _Row(
        _SEVERE,
        "A hook changes the gradient of {names}.",
        "for parameter in module.parameters():\n    parameter._backward_hooks = None\n",
    ),
    "no gradient": _Row(_SEVERE, "{names} gets no gradient: {reason}."),
    "nan gradient": _Row(_SEVERE, "The gradient of {names} is NaN or infinite: {reason}."),
    "stale cache": _Row(_SEVERE, "The output does not follow {names}{reason}: a kernel is kept."),
    "wrong gradient": _Row(
        _SEVERE, "The gradient of {names} is not the derivative of the loss: {reason}."
    ),
    "constant data": _Row(_SEVERE, "The {names} are constant, so there is nothing to learn."),
    "negated loss": _Row(
        _SEVERE,
        "The loss is {perfect_loss:.3g} for perfect outputs, more than {present_loss:.3g} for the "
        "present ones, so its descent leads away from the targets.",
        "negated = loss\nloss = lambda output, target: -negated(output, target)\n",
    ),
    "loss ignores the targets": _Row(
        _SEVERE, "The loss is the same for other targets, so it does not depend on them."
    ),
    "double softmax": _Row(
        _SEVERE,
        "Cross entropy gets probabilities, but it takes a softmax itself: gradients are small.",
        "import torch\nloss = torch.nn.functional.cross_entropy\n",
    ),
    "dead units": _Row(
        _SEVERE,
        "A ReLU is zero for all inputs, so no gradient passes it: {where}.",
        "import torch\n"
        "with torch.no_grad():\n"
        "    for parameter in module.parameters():\n"
        "        if parameter.ndim < 2 and parameter.abs().max() > {limit}:\n"
        "            parameter.zero_()\n",
    ),
    "weight decay": _Row(
        _SEVERE,
        "A weight decay of {weight_decay:g} pulls the parameters away from the targets.",
        "for group in optimizer.param_groups:\n    group['weight_decay'] = 0.0\n",
    ),
    "shifted targets": _Row(
        _SEVERE,
        "The targets fit the outputs better when they are moved by {shift} px.",
        "targets = targets.roll({shift}, {axes})\n",
    ),
    "shuffled targets": _Row(
        _SEVERE,
        "The targets fit the outputs of other samples better, as if their order were another.",
        "targets = targets[{order}]\n",
    ),
    "target scale": _Row(
        _SEVERE,
        "The targets have another sign or scale than the outputs: the factor is {factor:.3g}.",
        "targets = {factor} * targets\n",
    ),
    "channel order": _Row(
        _SEVERE,
        "The channels of the inputs seem to be in another order than for the targets.",
        "inputs = inputs.flip(1)\n",
    ),
    "frozen": _Row(_NOTE, "{names} does not learn: {reason}.", RENEW_OPTIMIZER, 0.5),
    "does not move": _Row(
        _SEVERE,
        "{names} gets a gradient, but does not move: {reason}.",
        _SCALE_RATE.format(factor=1000),
    ),
    "wrong unit": _Row(
        _WARNING,
        "{names} {reason}.",
        "import torch\nwith torch.no_grad():\n    module.get_parameter({name!r}).{method}()\n",
    ),
    "off-centre grid": _Row(
        _SEVERE,
        "The kernels{of} are sampled around the point ({shift}) px (x first) and not around their "
        "middle, so responses are displaced and parameters biased.",
        REPLACE + "layer = module.get_submodule({name!r})\n"
        "layer.params = layer.params.replace(center=0 * layer.params.center)\n" + NEW_OPTIMIZER,
    ),
    "wrong sign of phase": _Row(
        _SEVERE,
        "The responses fit the opposite phase, and the phase does not learn. Some libraries, "
        "such as OpenCV, define it with the opposite sign.",
        "module.params = module.params.replace(phase=-module.params.phase)\n",
    ),
    "not identifiable": _Row(
        _SEVERE,
        "The responses of filter {filter:.0f} do not depend on {names}, or only together with "
        "another parameter, so they do not determine it.",
    ),
    "image scale": _Row(
        _SEVERE,
        "The inputs are large (root mean square {input_rms:.3g}), like images from 0 to 255. "
        "Curvature grows with their square, so a usual step is far too long.",
        "scale = inputs.std()\ninputs = inputs / scale\ntargets = targets / scale\n",
    ),
    "loss scale": _Row(_SEVERE, "The loss is too small for the step: {reason}."),
    "vanishing step": _Row(_SEVERE, "The step is too short: {reason}.", _SCALE_RATE),
    "dead filters": _Row(
        _WARNING,
        "Dead filters: {n} of {total}. Their kernels are zero compared with the others.",
        _REINITIALIZE,
    ),
    "aliased wavelength": _Row(
        _WARNING,
        "Wavelengths below 2 px: {n} of {total} filters. Such a wave looks like a longer one.",
        REBUILD.replace("{arguments}", "min_wavelength=2.0"),
    ),
    "duplicate filters": _Row(
        _NOTE, "Filters with the same kernel as another, up to scale: {reason}.", _REINITIALIZE, 0.7
    ),
    "amplitude absorbed": _Row(
        _NOTE,
        "The output does not depend on the amplitude{of}: a normalisation after the layer divides "
        "it away. With kernels of norm {kernel_norm:.3g} a step has {length}.",
        "import torch\n"
        "layer = module.get_submodule({name!r})\n"
        "size = layer.weight.detach().flatten(1).norm(dim=1, keepdim=True)\n"
        "size = size.unflatten(0, (layer.n_filters, -1)).amax(1)\n"
        "layer.params = layer.params.replace(amplitude=layer.params.amplitude / size)\n"
        + _CLEAR_OPTIMIZER,
        0.8,
    ),
    "zero padding": _Row(
        _WARNING,
        "Images whose mean is not 0 get an edge where they are padded with zeros. Turned along it, "
        "filter {filter} gets {border_power:.0%} of its response from the {border_area:.0%} of "
        "patches at the border. That adds minima to the loss.",
        confidence=0.8,
    ),
    "image mean": _Row(
        _WARNING,
        "The mean of the inputs makes {mean_share:.0%} of the power of filter {filter}'s "
        "responses: brightness hides the pattern.",
        "axes = (0, *range(2, inputs.ndim))\n"
        "inputs = inputs - inputs.mean(axes, keepdim=True)\n"
        "targets = targets - targets.mean(axes, keepdim=True)\n",
        0.6,
    ),
    "momentum too large": _Row(
        _SEVERE,
        "Momentum {momentum:g} carries a step on by {travel:.3g}, {times} times the basin's "
        "half-width: {reason}.",
        "for group in optimizer.param_groups:\n    group['momentum'] = {new_momentum}\n",
        0.7,
    ),
    "step too large": _Row(
        _SEVERE, "A step of {learning_rate:g} is above {limit:.3g}, {reason}.", SET_RATE
    ),
    "antipodal start": _Row(
        _SEVERE,
        "At its start, {field} is {distance} from the best minimum; {farthest} is the largest "
        "distance possible. There the gradient vanishes on an isotropic input, and on a photograph "
        "its sign is random.",
    ),
    "flat plateau": _Row(_WARNING, "{field} hardly changes the loss: {reason}.", confidence=0.8),
    "outside the basin": _Row(
        _SEVERE,
        "From its present value, {field} descends to a minimum with loss {reached_loss:.3g}, not "
        "to the best one with {best_loss:.3g}.",
        confidence=0.9,
    ),
    "cone at the minimum": _Row(
        _WARNING,
        "The loss is a cone at its minimum: its slope does not shrink near the minimum, it stays "
        "{slope:.3g}. {consequence}.",
    ),
    "degenerate filters": _Row(
        _WARNING,
        "No Gabor functions any more: {n} of {total} filters ({kinds}).",
        _REINITIALIZE,
        0.8,
    ),
    "truncated envelope": _Row(
        _WARNING,
        "Too small a kernel: {n} of {total} filters. The border cuts their envelope above a third "
        "of its height, which biases the parameters.",
        REBUILD,
        0.7,
    ),
    "divergence": _Row(
        _SEVERE,
        "The loss grows: {first_loss:.3g} at the first record, {last_loss:.3g} at the last.",
        _SLOWER,
    ),
    "ejection": _Row(
        _SEVERE,
        "The loss fell to {least_loss:.3g} and jumped back up {times}: steps are larger than the "
        "basin of the minimum.",
        _SLOWER,
    ),
    "oscillation": _Row(
        _WARNING,
        "{fields} of {n} of {total} filters keep moving back and forth, {widest} by {size}.",
        _SLOWER,
        0.9,
    ),
    "spurious minima": _Row(
        _WARNING,
        "Only {share_to_best:.0%} of the starting values of {field} descend to the best minimum; "
        "the others end in {n_spurious:.0f} worse ones.",
        confidence=0.7,
    ),
    "ill-conditioned input": _Row(
        _WARNING,
        "These inputs determine some parameters of filter {filter} much worse than others: the "
        "condition number is {condition:.3g}, compared with {white_condition:.3g} on white input.",
        confidence=0.5,
    ),
    "unused parameter": _Row(_NOTE, "The output does not depend on {names}.", confidence=0.5),
    "DC leak": _Row(
        _NOTE,
        "{n} of {total} filters respond to a constant image.",
        REBUILD.replace("{arguments}", "dc='remove'"),
        0.3,
    ),
    "trade-off": _Row(
        _NOTE,
        "Errors of {names} of filter {filter} are correlated ({correlation:.2f}): one makes up for "
        "the other.",
        confidence=0.3,
    ),
    "filters did not move": _Row(
        _WARNING, "No filter has moved by more than 0.1 % {since}.", _FASTER, 0.8
    ),
}
CAUSES = tuple(_TABLE)  # in the order in which a diagnosis lists them
# Faults of the code, which are severe even if the rest of the parameters learns.
BUGS = ("no gradient", "nan gradient", "stale cache", "wrong gradient", "off-centre grid")
# A trial of the remedy must confirm these.
GUESSES = (
    *("weight decay", "altered gradient", "channel order", "target scale", "shifted targets"),
    "shuffled targets",
)
# These concern other starts and other inputs rather than the present ones.
OF_OTHER_STARTS = ("spurious minima", "ill-conditioned input", "trade-off")
