"""Guesses of the unit that a parameter of somebody else's layer is kept in, by name and value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from torch import Tensor

from gaborium.diagnostics.causes import Finding, Severity, finding

ANGLES = {"theta", "orientation", "angle", "angles", "rotation", "elevation"}
PHASES = {"psi", "phase", "phi", "offset"}
FREQUENCIES = {"freq", "frequency", "freqs", "frequencies"}
WAVELENGTHS = {"lambda", "lambd", "lam", "wavelength", "wavelengths"}
WIDTHS = {"sigma", "sigmas"}
_OTHERS = {"gamma", "aspect", "ratio", "gabor", "wave", "amplitude", "even", "odd", "bandwidth"}
# A logarithm, or another stored form, is in no unit that its name tells.
_STORED = {"log", "raw", "inv", "inverse", "logit", "unconstrained", "angular"}


def words(name: str) -> set[str]:
    """The words in the last part of a parameter's name."""
    return set(re.findall(r"[a-z]+", name.rpartition(".")[2].lower()))


def is_gabor_like(name: str) -> bool:
    """Whether a name is one that parameters of Gabor functions have."""
    named = ANGLES | PHASES | FREQUENCIES | WAVELENGTHS | WIDTHS | _OTHERS
    return bool(words(name) & (named - {"offset"}))


def check_unit(
    name: str, value: Tensor, extent: float, turned: Callable[[float], bool]
) -> Finding | None:
    """What looks wrong with a parameter's unit, if anything.

    Args:
        name: of the parameter.
        value: its values.
        extent: largest size of the input along an axis, px.
        turned: whether the output stays the same when this is added to the parameter.
    """
    found = words(name)
    size = value.detach().double().abs()
    if found & _STORED or not size.numel() or not bool(size.isfinite().all()):
        return None
    largest, least = size.max().item(), value.min().item()

    def wrong(reason: str, severity: Severity, confidence: float, method: str = "") -> Finding:
        code = "import torch\nwith torch.no_grad():\n"
        code += f"    module.get_parameter({name!r}).{method}()\n"
        return finding(
            "wrong unit",
            (name,),
            severity=severity,
            confidence=confidence,
            remedy=code if method else "",
            reason=reason,
            largest=largest,
        )

    if found & (ANGLES | PHASES):
        values = f"holds values up to {largest:.4g}, as "
        # Which of 360 and 2π is a whole turn is measured, not guessed.
        if largest > 4 * math.pi:
            if turned(360.0) and not turned(2 * math.pi):
                return None  # kept in degrees, and used in degrees
            multiples = bool(((size - 15 * (size / 15).round()).abs() < 1e-3).all())
            return wrong(
                values + ("multiples of 15°" if multiples else "in degrees")
                + ", but the layer uses radians: 2π is a whole turn",
                Severity.SEVERE if turned(2 * math.pi) and multiples else Severity.WARNING,
                0.9 if multiples else 0.5,
                "deg2rad_",
            )  # fmt: skip
        if 0 < largest <= 2 * math.pi and turned(360.0) and not turned(2 * math.pi):
            return wrong(
                values + "in radians, but the layer uses degrees: 360 is a whole turn",
                Severity.SEVERE,
                0.7,
                "rad2deg_",
            )
    elif found & FREQUENCIES and largest > 0.5:
        reason = f"reaches {largest:.3g}: a wave above 0.5 cycles/px is aliased"
        if largest <= math.pi:
            return wrong(reason + ". In rad/px the value would be right", Severity.NOTE, 0.3)
        return wrong(reason + ", and above π rad/px, too", Severity.WARNING, 0.6)
    elif found & WAVELENGTHS and 0 < largest < 2:
        return wrong(
            f"is at most {largest:.3g}: a wavelength below 2 px is aliased. It may be a frequency",
            Severity.WARNING,
            0.5,
            "reciprocal_",
        )
    elif found & WIDTHS and (largest > max(extent, 1.0) or least <= 0):
        return wrong(
            f"runs from {least:.3g} to {value.max().item():.3g}: not a standard deviation in px "
            f"for an input of {extent:.0f} px",
            Severity.WARNING,
            0.4,
        )
    return None
