"""Guesses of the unit in which a foreign layer keeps a parameter, from its name and its values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

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
) -> Finding | None:
    """Judge the unit of a parameter.

    Args:
        name: of the parameter.
        value: its values.
        extent: largest size of the input along an axis, px.
        is_turn: whether the output stays the same when this is added to the parameter.
    """
    words, size = _words(name), value.detach().double().abs()
    if words & _STORED or not size.numel() or not bool(size.isfinite().all()):
        return None
    largest, least = size.max().item(), value.min().item()
    severity, confidence, method = Severity.WARNING, 0.5, ""
    if words & (_ANGLES | _PHASES):
        # Which of 360 and 2π is a whole turn is measured, not guessed.
        uses_degrees = is_turn(360.0) and not is_turn(2 * math.pi)
        if largest > 4 * math.pi and not uses_degrees:
            is_multiple = bool(((size - 15 * (size / 15).round()).abs() < 1e-3).all())
            unit, confidence = ("multiples of 15°", 0.9) if is_multiple else ("degrees", 0.5)
            reason = f"{unit}, but the layer uses radians: 2π is a whole turn"
            method = "deg2rad_"
            if is_multiple and is_turn(2 * math.pi):
                severity = Severity.SEVERE
        elif 0 < largest <= 2 * math.pi and uses_degrees:
            reason = "radians, but the layer uses degrees: 360 is a whole turn"
            severity, confidence, method = Severity.SEVERE, 0.7, "rad2deg_"
        else:
            return None
        reason = f"holds values up to {largest:.4g}, like {reason}"
    elif words & _FREQUENCIES and largest > 0.5:
        reason = f"reaches {largest:.3g}: a wave above 0.5 cycles/px is aliased"
        confidence = 0.6
        if largest <= math.pi:
            reason += ". In rad/px the value would be right"
            severity, confidence = Severity.NOTE, 0.3
    elif words & _WAVELENGTHS and 0 < largest < 2:
        reason = f"is at most {largest:.3g}: a wave below 2 px is aliased. It may be a frequency"
        method = "reciprocal_"
    elif words & _WIDTHS and (largest > max(extent, 1.0) or least <= 0):
        reason = (
            f"runs from {least:.3g} to {value.max().item():.3g}: not a standard deviation in px "
            f"for an input of {extent:.0f} px"
        )
        confidence = 0.4
    else:
        return None
    return finding(
        "wrong unit",
        (name,),
        severity=severity,
        confidence=confidence,
        remedy=None if method else "",
        reason=reason,
        name=name,
        method=method,
        largest=largest,
    )


def _words(name: str) -> set[str]:
    """The words in the last part of a parameter's name."""
    return set(re.findall(r"[a-z]+", name.rpartition(".")[2].lower()))
