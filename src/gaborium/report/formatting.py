"""How reports and the terminal write numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None, digits: int = 4) -> str:
    """A number with significant digits, a true minus and powers of ten.

    Example:
        >>> [number(v) for v in (math.pi, -0.0, 1.25e-13, -math.inf, math.nan, None)]
        ['3.142', '0', '1.250 × 10⁻¹³', '−∞', 'not a number', '–']
    """
    if value is None:
        return "–"
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
    """A share in percent, with enough digits to distinguish 0.99996 from 1 and 1e-6 from 0.

    Example:
        >>> [percent(share) for share in (0.9234, 0.99996, -0.02, 1.0, 4e-7)]
        ['92.3 %', '99.996 %', '−2.0 %', '100 %', '4.0 × 10⁻⁵ %']
    """
    rest = abs(1 - share)
    if not math.isfinite(share) or 0 < abs(share) < 1e-3:
        return number(100 * share, 2) + " %" * math.isfinite(share)
    if rest < 1e-9:
        return "100 %"
    digits = 1 if rest >= 1e-3 else min(7, math.ceil(-math.log10(rest)) - 2)
    return f"{100 * share:.{max(digits, 1)}f} %".replace("-", "−")


def degrees(angle: float, digits: int = 4) -> str:
    """An angle in rad, written in degrees."""
    return number(math.degrees(angle), digits) + "°" * math.isfinite(angle)


def counted(count: int, noun: str) -> str:
    """A number of things: ``"1 filter"`` or ``"3 filters"``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listing(parts: Sequence[str]) -> str:
    """Parts of a sentence in a row: ``"a, b and c"``."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
