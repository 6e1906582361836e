"""What a diagnosis says: a sentence, the numbers behind it, and the remedy as code."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class Severity(enum.Enum):
    """How much a finding stands in the way of learning."""

    SEVERE = "Learning fails, or ends in the wrong place."
    WARNING = "Learning is slower, less certain or biased."
    NOTE = "Worth knowing."

    @property
    def rank(self) -> int:
        """0 for the worst."""
        return list(Severity).index(self)


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Args:
        cause: what it is, in words that stay the same from one version to the next, such as
            ``"no gradient"``; the fault bench and users' scripts compare it.
        severity: how much it matters.
        sentence: the finding for a reader who knows the training loop and not this library.
        numbers: what the sentence rests on, by name with unit, such as ``{"step_size": 1.0}``.
        remedy: Python that mends it, in terms of the names that ``diagnose`` is called with:
            ``module``, ``loss``, ``inputs``, ``targets`` and ``optimizer``.
        where: names of the parameters, or indices of the filters, that are concerned.
        likelihood: how sure it is that this is what stands in the way, in [0, 1]; among findings
            of equal severity the likelier stands first.

    Example:
        >>> finding = Finding(
        ...     "no gradient", Severity.SEVERE, "theta gets no gradient.", where=("theta",)
        ... )
        >>> finding.cause, finding.severity.name
        ('no gradient', 'SEVERE')
    """

    cause: str
    severity: Severity
    sentence: str
    numbers: dict[str, float] = field(default_factory=dict)
    remedy: str = ""
    where: tuple[str, ...] = ()
    likelihood: float = 1.0


def by_severity(findings: list[Finding]) -> list[Finding]:
    """The worst first, and among equals the likeliest."""
    return sorted(findings, key=lambda found: (found.severity.rank, -found.likelihood))
