"""From numbers to a class: six questions in a row, each a few numbers with their weights.

"Is it noise? If not, is it a Gabor function? If not, ..." Each question is a logistic function of
at most four of the numbers in ``measures``; what no question takes is ``other``. A class's
probability is the product along its way.

The weights come from filters of trained networks that were sorted by eye in two passes, and from
planted ones for what is rare among these. ``benchmarks/census/run.py`` makes them again, and says
how well they do on filters that they have not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DEAD = 1e-6  # norm beside the layer's median, below which weights are rounding
CLASSES = ("gabor", "edge", "blob", "centre-surround", "colour-contrast", "other", "noise")


class Term(NamedTuple):
    """A number, or one less another, and how much it speaks for a class.

    Args:
        number: its name in ``NUMBERS``.
        weight: of it in the sum.
        less: another number that is taken from it first; empty for none.
    """

    number: str
    weight: float
    less: str = ""

    def value(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """What the weight multiplies."""
        value = numbers[self.number]
        return value - numbers[self.less] if self.less else value


class Question(NamedTuple):
    """Whether a filter is of a class, given that no earlier question was answered by yes."""

    label: str
    constant: float
    terms: tuple[Term, ...]

    def logit(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """Logarithm of the odds: ``(filters,)``."""
        parts = [term.weight * term.value(numbers) for term in self.terms]
        return self.constant + torch.stack(parts).sum(0)


# Made by benchmarks/census/run.py --calibrate.
QUESTIONS: tuple[Question, ...] = (
    Question(
        "noise", -0.94, (Term("explained", -1.53), Term("surround", -7.21), Term("noise", 5.1))
    ),
    Question(
        "gabor",
        -8.87,
        (
            Term("third_bar", 7.83),
            Term("selectivity", 6.29),
            Term("crossing", -4.1),
            Term("even", 4.23),
        ),
    ),
    Question(
        "colour-contrast",
        -0.49,
        (
            Term("opponency", 8.46),
            Term("constant", -5.58),
            Term("one_colour", -4.73),
            Term("oriented_luminance", -6.72),
        ),
    ),
    Question(
        "edge",
        0.71,
        (
            Term("selectivity", 7.01),
            Term("third_bar", -7.88),
            Term("blob", -8.59, "gabor"),
            Term("even", -5.07),
        ),
    ),
    Question(
        "blob", 0.7, (Term("third_bar", -7.65), Term("constant", 5.61), Term("crossing", -4.09))
    ),
    Question("centre-surround", 4.2, (Term("surround", 14, "two_waves"),)),
)


def probabilities(
    numbers: Mapping[str, Tensor], questions: Sequence[Question] = QUESTIONS
) -> Tensor:
    """Of each class in the order of ``CLASSES``: ``(filters, classes)``, rows that sum to 1."""
    left = torch.ones_like(numbers["explained"])
    found = {}
    for question in questions:
        share = question.logit(numbers).sigmoid()
        found[question.label] = left * share
        left = left * (1 - share)
    found["other"] = left
    return torch.stack([found[label] for label in CLASSES], -1)


def reason(label: str, numbers: Mapping[str, float], probability: Sequence[float]) -> str:
    """Why a filter got its class: a sentence or two, and the class that came next.

    Args:
        label: the class.
        numbers: of the filter, by the names of ``NUMBERS``.
        probability: of each class, in the order of ``CLASSES``.
    """
    sentence = _SENTENCES[label](numbers)
    if DEAD < numbers["strength"] < _FAINT:
        sentence += f" Its weights are faint: {numbers['strength']:.1g} of the layer's median."
    order = sorted(range(len(CLASSES)), key=lambda i: -probability[i])
    nearest = next(i for i in order if CLASSES[i] != label)
    if probability[nearest] >= _NEAR:
        sentence += f" Next is {CLASSES[nearest]}, at {probability[nearest]:.2f}."
    return sentence


_FAINT = 0.01  # of the median norm
_NEAR = 0.15  # probability from which on another class is named
_COLOURED = 0.5  # opponency from which on stripes are called coloured


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _gabor(numbers: Mapping[str, float]) -> str:
    bars = round(numbers["bars"])
    seen = (
        f"{bars} bars of alternating sign lie within the kernel"
        if bars > 2
        else f"The third bar has {_share(numbers['third_bar'])} of the strength of the first"
    )
    color = ", in colour" if numbers["opponency"] > _COLOURED else ""
    return (
        f"{seen}, in one orientation (selectivity {numbers['selectivity']:.2f}){color}; a Gabor "
        f"function explains {_share(numbers['gabor'])}."
    )


def _edge(numbers: Mapping[str, float]) -> str:
    return (
        f"Two sides of opposite sign and no stripes: a third bar would have "
        f"{_share(numbers['third_bar'])} of the strength of the first. A Gaussian explains "
        f"{_share(numbers['blob'])}, with a wave it is {_share(numbers['gabor'])}."
    )


def _blob(numbers: Mapping[str, float]) -> str:
    if numbers["constant"] > 0.5:
        return (
            f"One sign nearly everywhere: {_share(numbers['constant'])} of the power is in the "
            f"channels' means, and a Gaussian explains {_share(numbers['blob'])}."
        )
    return (
        f"One patch: a Gaussian explains {_share(numbers['blob'])}, and a Gabor function's third "
        f"bar would have {_share(numbers['third_bar'])} of the strength of the first."
    )


def _surround(numbers: Mapping[str, float]) -> str:
    return (
        f"A centre within a ring of the other sign explains {_share(numbers['surround'])} (a "
        f"Gaussian {_share(numbers['blob'])}, two waves {_share(numbers['two_waves'])}), and no "
        f"orientation stands out (selectivity {numbers['selectivity']:.2f})."
    )


def _contrast(numbers: Mapping[str, float]) -> str:
    return (
        f"Colours against each other: the mean of the channels holds "
        f"{_share(1 - numbers['opponency'])} of the power, of which what has an orientation is "
        f"{_share(numbers['oriented_luminance'])} of the whole."
    )


def _other(numbers: Mapping[str, float]) -> str:
    if numbers["crossing"] > 0.1:
        return (
            f"Two waves that cross explain {_share(numbers['two_waves'])}, one Gabor function "
            f"{_share(numbers['gabor'])}; the weaker has {_share(numbers['crossing'])} of the "
            "power of the stronger."
        )
    return (
        f"Structure (signal-to-noise ratio {numbers['snr']:.1f}) of no other class: a Gabor "
        f"function explains {_share(numbers['gabor'])}, a Gaussian {_share(numbers['blob'])}, a "
        f"centre with its surround {_share(numbers['surround'])}."
    )


def _noise(numbers: Mapping[str, float]) -> str:
    if numbers["strength"] <= DEAD:
        return "Its weights are zero, or nothing beside those of the others."
    return (
        f"Little more than noise: the floor of its spectrum is {_share(numbers['noise'])} of that "
        f"of its own pixels in random order. A Gabor function explains "
        f"{_share(numbers['gabor'])}, of which its many parameters leave "
        f"{_share(max(0.0, numbers['explained']))}."
    )


_SENTENCES = {
    "gabor": _gabor,
    "edge": _edge,
    "blob": _blob,
    "centre-surround": _surround,
    "colour-contrast": _contrast,
    "other": _other,
    "noise": _noise,
}
