"""Numbers and sentences of a report, and the few quantities that explain it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F

from gaborium.experiments import Descent, Recovery
from gaborium.fitting import Outcome
from gaborium.kernels import gabor_jacobian
from gaborium.plots import loss_at, truths, wrapped

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_TURNS = 1e-9  # per rad, of the responses: a smaller slope in θ is rounding
_GOOD, _CLOSE = 0.01, 0.1  # of the kernel's norm
_N_STANDARD_ERRORS = 4  # farther than this is not noise


# -- numbers ----------------------------------------------------------------------------------


def number(value: float | None, digits: int = 4) -> str:
    """A number as one writes it: significant digits, a true minus, powers of ten as such.

    Example:
        >>> [number(v) for v in (math.pi, -0.0, 1.25e-13, -math.inf, math.nan, None)]
        ['3.142', '0', '1.250 × 10⁻¹³', '−∞', 'not a number', '–']
    """
    if value is None:
        return "–"
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    power = int(exponent)
    if -3 <= power < 5:
        text = f"{value:.{max(digits - 1 - power, 0)}f}"
    else:
        text = f"{mantissa} × 10{str(power).translate(_SUPERSCRIPTS)}"
    return text.replace("-", "−")


def share(value: float) -> str:
    """A share of a whole: in percent where that is readable.

    Example:
        >>> share(0.0312), share(4e-7)
        ('3.1 %', '4.0 × 10⁻⁷')
    """
    return f"{number(100 * value, 2)} %" if value >= 1e-4 else number(value, 2)


def percent(value: float) -> str:
    """A share in percent, with the digits that tell 0.999 from 1.

    Example:
        >>> percent(0.9234), percent(0.99996), percent(-0.02), percent(1.0)
        ('92.3 %', '99.996 %', '−2.0 %', '100 %')
    """
    if not math.isfinite(value):
        return number(value)
    left = abs(1 - value)
    if left < 1e-9:
        return "100 %"
    digits = 1 if left >= 1e-3 else min(7, math.ceil(-math.log10(left)) - 2)
    return f"{100 * value:.{max(digits, 1)}f} %".replace("-", "−")


def counted(count: int, noun: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "filter"), counted(3, "filter")
        ('1 filter', '3 filters')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def degrees(angle: float | None, digits: int = 4) -> str:
    """An angle in rad, written in degrees.

    Example:
        >>> degrees(math.pi / 4)
        '45.00°'
    """
    if angle is None or not math.isfinite(angle):
        return number(angle)
    return number(math.degrees(angle), digits) + "°"


def listing(parts: Sequence[str]) -> str:
    """Parts of a sentence in a row.

    Example:
        >>> listing(["a", "b", "c"])
        'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


# -- what happened ----------------------------------------------------------------------------


def headline(recovery: Recovery) -> str:
    """What happened, in one sentence of plain words."""
    parts = [_how_descents_ended(recovery.descents)] if recovery.descents else []
    parts += [_how_recover_ended(recovery), f"the trained layer {_how_training_ended(recovery)}"]
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def outcome_sentences(recovery: Recovery) -> dict[str, str]:
    """What happened in each of the three ways: ``descents``, ``recover``, ``training``."""
    descents, found = recovery.descents, recovery.found
    errors = recovery.kernel_errors()
    kinds = {
        "cycles": ("cycles around the minimum", "cycle around the minimum"),
        "thrown out": (
            "is thrown out of the basin again",
            "are thrown out of the basin again",
        ),
        "never arrives": ("never arrives", "never arrive"),
        "lost": ("becomes NaN", "become NaN"),
    }
    counts = {kind: sum(_kind(descent) == kind for descent in descents) for kind in kinds}
    what = [
        f"{count} {kinds[kind][0 if count == 1 else 1]}" for kind, count in counts.items() if count
    ]
    first = _how_descents_ended(descents) if descents else "No descents were asked for"
    if what:
        some = any(descent.settled for descent in descents)
        first += f"; of the others {listing(what)}" if some else f": {listing(what)}"
    return {
        "descents": f"{first}.",
        "recover": (
            f"{found.outcome[0].value} The found kernel differs from the planted one by "
            f"{share(errors['found'])} of its norm and explains "
            f"{number(100 * found.explained_variance[0].item())} % of the responses' variance."
        ),
        "training": (
            f"The trained layer {_how_training_ended(recovery)}: its kernel differs from the "
            f"planted one by {share(errors['trained'])} of its norm."
        ),
    }


def verdicts(recovery: Recovery) -> dict[str, bool]:
    """Whether each of the three ways did what it is for."""
    return {
        "descents": any(descent.settled for descent in recovery.descents),
        "recover": _found_all(recovery),
        "training": _how_training_ended(recovery) == "arrived",
    }


def _kind(descent: Descent) -> str:
    if math.isnan(descent.final_error):
        return "lost"
    if descent.settled:
        return "settles"
    if descent.n_ejections:
        return "thrown out"
    return "never arrives" if descent.first_arrival is None else "cycles"


def _how_descents_ended(descents: Sequence[Descent]) -> str:
    n, n_settled = len(descents), sum(descent.settled for descent in descents)
    if n == 1:
        return "The descent settled" if n_settled else "The descent did not settle"
    if n_settled == n:
        return f"All {n} descents settled"
    return f"{n_settled or 'None'} of {n} descents settled"


def _found_all(recovery: Recovery) -> bool:
    if recovery.found.outcome[0] is not Outcome.CONVERGED:
        return False
    return recovery.kernel_errors()["found"] < _GOOD or all(
        abs(row["error"]) <= _N_STANDARD_ERRORS * row["standard_error"] < math.inf
        for row in recovery.table()
    )


def _how_recover_ended(recovery: Recovery) -> str:
    outcome, error = recovery.found.outcome[0], recovery.kernel_errors()["found"]
    if outcome is not Outcome.CONVERGED:
        return {
            Outcome.STALLED: "recover stalled before it converged",
            Outcome.OFF_MODEL: "recover found no Gabor kernel that explains the responses",
            Outcome.NOT_IDENTIFIABLE: "recover found that the data leave parameters undetermined",
            Outcome.BAD_INPUT: "recover had nothing to fit",
        }[outcome]
    if _found_all(recovery):
        within = "" if error < _GOOD else " within the noise"
        return f"recover found all parameters{within} (kernel error {share(error)})"
    word = "came close" if error < _CLOSE else "missed the planted kernel"
    return f"recover {word} (kernel error {share(error)})"


def _how_training_ended(recovery: Recovery) -> str:
    errors = recovery.kernel_errors()
    # Noise bounds both; the least-squares solution is the best that can be asked for.
    if errors["trained"] < max(_GOOD, 2 * errors["found"] if _found_all(recovery) else 0.0):
        return "arrived"
    return "came close" if errors["trained"] < _CLOSE else "did not arrive"


# -- why --------------------------------------------------------------------------------------


class Explanation(NamedTuple):
    """The quantities that decide where a descent on θ ends.

    Args:
        distance: of the start from the truth, rad, in [0, π/2].
        start_slope: of the RMSE in θ at the start, per rad.
        cone_slope: c, the slope of the noiseless RMSE at the truth, per rad.
        turns: whether the kernel depends on θ at all; a round blob does not.
        tip: half-width over which noise rounds the cone's tip, rad; 0 without noise.
        convex: how far the squared error is convex below and above the truth, as measured, rad.
        other_minima: orientations of the loss's other minima, rad.
    """

    distance: float
    start_slope: float
    cone_slope: float
    turns: bool
    tip: float
    convex: tuple[float, float]
    other_minima: list[float]

    def longest_update(self, descent: Descent) -> float:
        """How far a step of the descent can go at the minimum, rad: η c / (1 - β)."""
        if descent.momentum >= 1:
            return math.inf
        return descent.learning_rate * self.cone_slope / (1 - descent.momentum)


def explain(recovery: Recovery) -> Explanation:
    """Work out the quantities behind the report's explanation."""
    truth = recovery.target.orientation[0, 0].item()
    start = recovery.start.orientation[0, 0].item()
    slope = gabor_jacobian(recovery.target, recovery.kernel_size)["orientation"]
    change = F.conv2d(recovery.images, slope.to(recovery.images))
    cone_slope = change.square().mean().sqrt().item()

    mse = recovery.landscape["mse"][:-1]  # the last point is the first
    n = len(mse)
    step = 2 * math.pi / n
    beside = [loss_at(recovery, wrapped(start + side * step), "rmse") for side in (-1, 1)]
    places = [round((wrapped(angle) + math.pi) / step) % n for angle in truths(recovery)]

    def rises_at(index: int) -> bool:
        return mse[(index - 1) % n] >= mse[index % n] < mse[(index + 1) % n]

    def convex_at(index: int) -> bool:
        return mse[(index - 1) % n] + mse[(index + 1) % n] > 2 * mse[index % n]

    def convex_towards(sign: int) -> float:
        reach = 0
        while reach < n // 4 and convex_at(places[0] + sign * (reach + 1)):
            reach += 1
        return reach * step

    # The landscape's points are a degree apart: the truth's own minimum may lie beside its point.
    minima = [
        index
        for index in range(n)
        if rises_at(index)
        and all(min((index - place) % n, (place - index) % n) > 2 for place in places)
    ]
    turns = cone_slope > _TURNS * recovery.responses.square().mean().sqrt().item()
    noise = min(recovery.landscape["rmse"]) if recovery.noise else 0.0
    return Explanation(
        distance=abs(math.remainder(start - truth, math.pi)),
        start_slope=abs(beside[1] - beside[0]) / (2 * step),
        cone_slope=cone_slope,
        turns=turns,
        tip=noise / cone_slope if turns else 0.0,
        convex=(convex_towards(-1), convex_towards(1)),
        other_minima=[index * step - math.pi for index in minima],
    )
