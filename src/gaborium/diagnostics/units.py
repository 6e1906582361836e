"""Guesses of the unit that a parameter of somebody else's layer is kept in, by name and value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

ANGLES = {"theta", "orientation", "angle", "angles", "rotation", "elevation"}
PHASES = {"psi", "phase", "phi", "offset"}
FREQUENCIES = {"freq", "frequency", "freqs", "frequencies"}
WAVELENGTHS = {"lambda", "lambd", "lam", "wavelength", "wavelengths"}
WIDTHS = {"sigma", "sigmas"}
_OTHERS = {"gamma", "aspect", "ratio", "gabor", "wave", "amplitude", "even", "odd", "bandwidth"}
# A logarithm, or another stored form, is in no unit that its name tells.
_STORED = {"log", "raw", "inv", "inverse", "logit", "unconstrained", "angular"}


class Unit(NamedTuple):
    """What a parameter looks like."""

    sentence: str
    likelihood: float
    conversion: str  # method of a tensor that would mend it, or ""
    certain: bool  # measured by a whole turn, and not guessed


def words(name: str) -> set[str]:
    """The words in the last part of a parameter's name."""
    return set(re.findall(r"[a-z]+", name.rpartition(".")[2].lower()))


def is_gabor_like(name: str) -> bool:
    """Whether a name is one that parameters of Gabor functions have."""
    named = ANGLES | PHASES | FREQUENCIES | WAVELENGTHS | WIDTHS | _OTHERS
    return bool(words(name) & (named - {"offset"}))


def suspect(
    name: str, value: Tensor, extent: float, turned: Callable[[float], bool]
) -> Unit | None:
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
    if found & (ANGLES | PHASES):
        return _angle(size, turned)
    if found & FREQUENCIES and largest > 0.5:
        radians = largest <= math.pi
        return Unit(
            f"reaches {largest:.3g}: above 0.5 cycles/px a wave is aliased"
            + ("; as rad/px it would be right." if radians else ", and above π rad/px, too."),
            0.3 if radians else 0.6,
            "",
            False,
        )
    if found & WAVELENGTHS and 0 < largest < 2:
        return Unit(
            f"is at most {largest:.3g}: a wavelength below 2 px is aliased; is it a frequency?",
            0.5,
            "reciprocal_",
            False,
        )
    if found & WIDTHS and (largest > max(extent, 1.0) or least <= 0):
        return Unit(
            f"runs from {least:.3g} to {value.max().item():.3g}: no standard deviation in px, of "
            f"an input of {extent:.0f} px.",
            0.4,
            "",
            False,
        )
    return None


def _angle(size: Tensor, turned: Callable[[float], bool]) -> Unit | None:
    """Degrees or radians: which of 360 and 2π is a whole turn is measured, not guessed."""
    largest = size.max().item()
    whole = (size - 15 * (size / 15).round()).abs() < 1e-3
    in_degrees = largest > 4 * math.pi
    if not in_degrees and not 0 < largest <= 2 * math.pi:
        return None
    if in_degrees:
        if turned(360.0) and not turned(2 * math.pi):
            return None  # kept in degrees, and used in degrees
        multiples = bool(whole.all())
        return Unit(
            f"holds values up to {largest:.4g}"
            + (", all of them multiples of 15, as degrees are" if multiples else "")
            + ", but the layer takes it in radians: 2π is a whole turn.",
            0.9 if multiples else 0.5,
            "deg2rad_",
            turned(2 * math.pi) and multiples,
        )
    if turned(360.0) and not turned(2 * math.pi):
        return Unit(
            f"holds values up to {largest:.4g}, as radians are, but the layer takes it in degrees: "
            "360 is a whole turn.",
            0.7,
            "rad2deg_",
            True,
        )
    return None
