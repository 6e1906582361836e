"""Guesses of the unit in which a foreign layer keeps a parameter, from its name and its values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from gaborium.diagnostics.causes import Finding, Severity, finding

_ANGLES = {"theta", "orientation", "angle", "angles", "rotation", "elevation"}
_PHASES = {"psi", "phase", "phi", "offset"}
_FREQUENCIES = {"freq", "frequency", "freqs", "frequencies"}
_WAVELENGTHS = {"lambda", "lambd", "lam", "wavelength", "wavelengths"}
_WIDTHS = {"sigma", "sigmas"}
_OTHERS = {"gamma", "aspect", "ratio", "gabor", "wave", "amplitude", "even", "odd", "bandwidth"}
_GABOR = (_ANGLES | _PHASES | _FREQUENCIES | _WAVELENGTHS | _WIDTHS | _OTHERS) - {"offset"}
# The name of a logarithm, or of another stored form, does not give its unit.
_STORED = {"log", "raw", "inv", "inverse", "logit", "unconstrained", "angular"}


def is_gabor_like(name: str) -> bool:
    """Whether a parameter's name is one that Gabor functions use."""
    return bool(_words(name) & _GABOR)


def check_unit(
    name: str, value: Tensor, extent: float, is_turn: Callable[[float], bool]
) -> Iterator[Finding]:
    """Judge the unit of a parameter, on inputs of ``extent`` px.

    ``is_turn`` says whether the output stays the same when a number is added to the parameter.
    """
    words, size = _words(name), value.detach().double().abs()
    if words & _STORED or not size.numel() or not bool(size.isfinite().all()):
        return
    largest, least = size.max().item(), size.min().item()
    is_angle = bool(words & (_ANGLES | _PHASES))
    # Which of 360 and 2π is a whole turn is measured, not guessed.
    in_radians = is_angle and is_turn(2 * math.pi)
    in_degrees = is_angle and not in_radians and is_turn(360.0)
    is_large = is_angle and not in_degrees and largest > 4 * math.pi
    is_multiple = bool(((size - 15 * (size / 15).round()).abs() < 1e-3).all())
    like = f"holds values up to {largest:.4g}, like"
    radians = "but the layer uses radians: 2π is a whole turn"
    aliased = f"reaches {largest:.3g}: a wave above 0.5 cycles/px is aliased"
    severe, warning, note = Severity
    guesses: tuple[tuple[Any, str, str, Severity, float], ...] = (
        (is_large and is_multiple, f"{like} multiples of 15°, {radians}", "deg2rad_",
         severe if in_radians else warning, 0.9),
        (is_large, f"{like} degrees, {radians}", "deg2rad_", warning, 0.5),
        (in_degrees and 0 < largest <= 2 * math.pi,
         f"{like} radians, but the layer uses degrees: 360 is a whole turn", "rad2deg_", severe,
         0.7),
        (words & _FREQUENCIES and largest > math.pi, aliased, "", warning, 0.6),
        (words & _FREQUENCIES and largest > 0.5,
         f"{aliased}. In rad/px the value would be right", "", note, 0.3),
        (words & _WAVELENGTHS and 0 < largest < 2,
         f"is at most {largest:.3g}: a wave below 2 px is aliased. It may be a frequency",
         "reciprocal_", warning, 0.5),
        (words & _WIDTHS and (largest > max(extent, 1.0) or least <= 0),
         f"runs from {least:.3g} to {value.max().item():.3g}: not a standard deviation in px for "
         f"an input of {extent:.0f} px", "", warning, 0.4),
    )  # fmt: skip
    for is_so, reason, method, severity, confidence in guesses:
        if is_so:
            options: Any = {"severity": severity, "confidence": confidence}
            options |= {"reason": reason, "name": name, "method": method, "largest": largest}
            yield finding("wrong unit", (name,), remedy=None if method else "", **options)
            return


def _words(name: str) -> set[str]:
    """The words in the last part of a parameter's name."""
    return set(re.findall(r"[a-z]+", name.rpartition(".")[2].lower()))
