"""How reports and the terminal write numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_ANGLES = ("orientation", "elevation", "phase")
# How the names of shares begin, which are written in percent.
_SHARES = ("accuracy", "confidence", "explained", "response_error", "share")


def number(value: float, digits: int = 3) -> str:
    """A number with significant digits, a true minus and powers of ten.

    Example:
        >>> [number(v) for v in (math.pi, -0.0, 1.25e-13, -math.inf, math.nan)]
        ['3.14', '0', '1.25 × 10⁻¹³', '−∞', 'not a number']
    """
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    if value == 0:
        text = "0"
    elif -3 <= int(power) < 5:
        text = f"{value:.{max(digits - 1 - int(power), 0)}f}"
    else:
        text = f"{mantissa} × 10{str(int(power)).translate(_SUPERSCRIPTS)}"
    return text.replace("-", "−")


def percent(share: float) -> str:
    """A share in percent, with enough digits to distinguish 0.99996 from 1.

    Example:
        >>> [percent(share) for share in (0.9234, 0.99996, -0.02, 1.0)]
        ['92.3 %', '99.996 %', '−2.0 %', '100 %']
    """
    rest = abs(1 - share)
    if not math.isfinite(share):
        return number(share)
    digits = 1 if rest >= 1e-3 else math.ceil(-math.log10(max(rest, 1e-9))) - 2
    return f"{100 * share:.{0 if rest < 1e-9 else max(digits, 1)}f} %".replace("-", "−")


def degrees(angle: float, digits: int = 3) -> str:
    """An angle in rad, written in degrees."""
    return number(math.degrees(angle), digits) + "°" * math.isfinite(angle)


def counted(count: int, noun: str) -> str:
    """A number of things: ``"1 filter"`` or ``"3 filters"``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listing(parts: Sequence[str]) -> str:
    """Parts of a sentence in a row: ``"a, b and c"``."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def label(name: str) -> str:
    """The name of a field in words: ``"n_parameters"`` is ``"parameters"``."""
    return re.sub("^n_(?=..)|_rad$", "", name).replace("_", " ")


def written(name: str, value: Any, digits: int = 3) -> str:
    """The value of a field of this name: an angle in degrees, a share in percent."""
    if value is None or isinstance(value, (str, int)):
        return "–" if value is None else str(value)
    if name.startswith(_SHARES):
        return percent(value)
    if name in _ANGLES or name.endswith("_rad"):
        return degrees(value, digits)
    if name in ("learning_rate", "momentum"):
        return f"{value:g}"
    return f"{value:.0f}" if value.is_integer() and value < 1e6 else number(value, digits)
