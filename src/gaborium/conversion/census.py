"""``census``: how Gabor-like is the first layer of a network, filter by filter?

The numbers in ``features`` describe a filter. Six logistic stages turn them into a class: "Is it
noise? If not, is it a Gabor function? If not, ..." Each stage weighs at most four numbers; a filter
that no stage takes is ``other``. A class's probability is the product along the stages.

The weights come from filters of trained networks that were sorted by eye in two passes, and from
planted filters for classes that are rare in networks. ``benchmarks/census/run.py`` makes them, and
measures the agreement on filters that set no weight.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium import starts
from gaborium.conversion.features import NUMBERS, checked, measure, table
from gaborium.conversion.first_conv import find_first_conv
from gaborium.fitting import FitResult, fit
from gaborium.fitting.result import Saved
from gaborium.functions.kernels import bandwidth_from_sigma, gabor
from gaborium.functions.params import plain

CLASSES = ("gabor", "edge", "blob", "centre-surround", "colour-contrast", "other", "noise")
DEAD = 1e-6  # norm relative to the layer's median, below which weights are rounding
_CHUNK = 64  # filters between two calls of on_progress
_MIN_CORRELATION = 0.9  # of two filters that belong together
_PHASE_TOLERANCE = math.radians(22.5)  # of duplicates, negatives and quadrature partners
_FAINT = 0.01  # norm relative to the layer's median, below which an explanation mentions it
_NEXT_CLASS = 0.15  # probability from which an explanation names the next class
_COLOURED = 0.5  # opponency from which an explanation calls stripes coloured


# By the class that a stage decides: a constant, and weights of numbers or of differences of two.
Stages = Mapping[str, tuple[float, Mapping[str, float]]]
# Made by benchmarks/census/run.py --calibrate.
# fmt: off
STAGES: Stages = {
    "noise": (-0.94, {"explained": -1.53, "surround": -7.21, "noise": 5.1}),
    "gabor": (-8.87, {"third_bar": 7.83, "selectivity": 6.29, "crossing": -4.1, "even": 4.23}),
    "colour-contrast": (-0.49, {
        "opponency": 8.46, "constant": -5.58, "one_colour": -4.73, "oriented_luminance": -6.72,
    }),
    "edge": (0.71, {"selectivity": 7.01, "third_bar": -7.88, "blob - gabor": -8.59, "even": -5.07}),
    "blob": (0.7, {"third_bar": -7.65, "constant": 5.61, "crossing": -4.09}),
    "centre-surround": (4.2, {"surround - two_waves": 14}),
}
# fmt: on

# Percentages are written as numbers' own format, and get their space in ``explain``.
_EXPLANATIONS = {
    "gabor": "The third bar has {third_bar:.0%} of the strength of the first, in one orientation "
    "(selectivity {selectivity:.2f}){color}; a Gabor function explains {gabor:.0%}.",
    "gabor, many bars": "{bars:.0f} bars of alternating sign lie within the kernel, in one "
    "orientation (selectivity {selectivity:.2f}){color}; a Gabor function explains {gabor:.0%}.",
    "edge": "Two sides of opposite sign and no stripes: a third bar would have {third_bar:.0%} of "
    "the strength of the first. A Gaussian explains {blob:.0%}, with a wave it is {gabor:.0%}.",
    "blob": "One patch: a Gaussian explains {blob:.0%}, and a Gabor function's third bar would "
    "have {third_bar:.0%} of the strength of the first.",
    "blob, constant": "One sign nearly everywhere: {constant:.0%} of the power is in the "
    "channels' means, and a Gaussian explains {blob:.0%}.",
    "centre-surround": "A centre within a ring of the other sign explains {surround:.0%} (a "
    "Gaussian {blob:.0%}, two waves {two_waves:.0%}), and no orientation stands out (selectivity "
    "{selectivity:.2f}).",
    "colour-contrast": "Colours against each other: the mean of the channels holds "
    "{luminance:.0%} of the power, and oriented patterns in it {oriented_luminance:.0%}.",
    "other": "Structure (signal-to-noise ratio {snr:.1f}) of no other class: a Gabor function "
    "explains {gabor:.0%}, a Gaussian {blob:.0%}, a centre with its surround {surround:.0%}.",
    "other, crossing": "Two waves that cross explain {two_waves:.0%}, one Gabor function "
    "{gabor:.0%}; the weaker has {crossing:.0%} of the power of the stronger.",
    "noise": "Little more than noise: the floor of its spectrum is {noise:.0%} of the floor with "
    "its pixels in random order. A Gabor function explains {gabor:.0%}, of which {explained:.0%} "
    "are more than its parameters would explain of noise.",
    "noise, dead": "Its weights are zero, or rounding compared with the others'.",
}


def term(numbers: Mapping[str, Tensor], name: str) -> Tensor:
    """The number ``name``, or the difference of two whose names are joined by " - "."""
    first, _, second = name.partition(" - ")
    return numbers[first] - numbers[second] if second else numbers[first]


def probabilities(numbers: Mapping[str, Tensor], stages: Stages = STAGES) -> Tensor:
    """Of each class in the order of ``CLASSES``: ``(filters, classes)``, rows that sum to 1."""
    left = torch.ones_like(numbers["explained"])
    result = {}
    for label, (constant, weights) in stages.items():
        parts = [weight * term(numbers, name) for name, weight in weights.items()]
        share = (constant + torch.stack(parts).sum(0)).sigmoid()
        result[label] = left * share
        left = left * (1 - share)
    result["other"] = left
    return torch.stack([result[label] for label in CLASSES], -1)


class Pair(NamedTuple):
    """Two filters that are the same except for their sign, place or phase.

    Args:
        first: number of one filter.
        second: number of the other, higher.
        kind: ``"duplicate"``, ``"negative"`` or ``"quadrature"``.
        similarity: correlation of the two once sign, place and phase are aligned, 0 to 1.
    """

    first: int
    second: int
    kind: str
    similarity: float


@dataclass(frozen=True, eq=False)
class Census(Saved):
    """The class of every filter of a layer.

    Args:
        labels: one of ``CLASSES`` for each filter: ``"gabor"``, ``"edge"``, ``"blob"``,
            ``"centre-surround"``, ``"colour-contrast"``, ``"other"`` or ``"noise"``.
        probability: ``(filters, classes)`` in the order of ``CLASSES``; rows sum to 1.
        numbers: the numbers that decide, each ``(filters,)``; ``NUMBERS`` explains them.
        fit: the Gabor function nearest to each filter, with one geometry for its channels.
        pairs: filters that are negatives, duplicates or quadrature partners of others.
        name: of the layer in the network, empty for kernels.
    """

    kind = "census"
    labels: tuple[str, ...]
    probability: Tensor
    numbers: dict[str, Tensor]
    fit: FitResult
    pairs: tuple[Pair, ...]
    name: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        """A line: how many filters, and of which classes."""
        counts = ", ".join(f"{n} {label}" for label, n in self.counts.items() if n)
        return f"Census({len(self)} filters: {counts})"

    @property
    def counts(self) -> dict[str, int]:
        """Filters of each class, in the order of ``CLASSES``."""
        counts = Counter(self.labels)
        return {label: counts[label] for label in CLASSES}

    @property
    def confidence(self) -> Tensor:
        """Probability of the class that each filter got: ``(filters,)``, in [0, 1]."""
        return self.probability.amax(1)

    def filters(self, label: str) -> list[int]:
        """The numbers of the filters of a class.

        Raises:
            ValueError: there is no such class.
        """
        if label not in CLASSES:
            raise ValueError(f"label must be one of {', '.join(CLASSES)}, got {label!r}.")
        return [i for i, own in enumerate(self.labels) if own == label]

    def share(self, label: str = "gabor") -> float:
        """Filters of a class as a share of all that are not noise; NaN if all are noise.

        Raises:
            ValueError: there is no such class.
        """
        alive = len(self) - self.counts["noise"] if label != "noise" else len(self)
        return len(self.filters(label)) / alive if alive else math.nan

    def explain(self, index: int) -> str:
        """Why filter ``index`` got its class: a sentence or two with the numbers that decided."""
        index = range(len(self))[index]
        n = {name: value[index].item() for name, value in self.numbers.items()}
        label = self.labels[index]
        variants = {
            "gabor, many bars": round(n["bars"]) > 2,
            "blob, constant": n["constant"] > 0.5,
            "other, crossing": n["crossing"] > 0.1,
            "noise, dead": n["strength"] <= DEAD,
        }
        kind = next((v for v, yes in variants.items() if yes and v.startswith(label)), label)
        color = ", in colour" if n["opponency"] > _COLOURED else ""
        n |= {"luminance": 1 - n["opponency"], "explained": max(0.0, n["explained"])}
        sentence = _EXPLANATIONS[kind].format(**n, color=color).replace("%", " %")
        if DEAD < n["strength"] < _FAINT:
            sentence += f" Its weights are faint: {n['strength']:.1g} of the layer's median."
        probability, order = (values.tolist() for values in self.probability[index].topk(2))
        if probability[1] >= _NEXT_CLASS:
            sentence += f" Next is {CLASSES[order[1]]}, at {probability[1]:.2f}."
        return sentence

    def distribution(self) -> dict[str, Tensor]:
        """Geometry of the filters that are Gabor functions, to compare layers or cells by.

        Returns:
            ``filter`` (their numbers), ``orientation`` (rad; not in 1-D), ``wavelength`` (px),
            ``bandwidth`` (octaves at half height, infinite for waves of less than 0.19 cycles in
            a standard deviation), and ``n_x`` and ``n_y``: cycles in a standard deviation of the
            envelope along the wave and across it. Each ``(gabor filters,)``.

        Reference:
            Ringach (2002), J. Neurophysiol. 88(1), doi:10.1152/jn.2002.88.1.455, has (n_x, n_y)
            of macaque V1; ``compare_with_v1`` compares.
        """
        chosen = self.filters("gabor")
        fields = {
            name: value.flatten()[chosen]
            for name, value in self.fit.params.as_dict().items()
            if name in ("orientation", "wavelength", "sigma")
        }
        bandwidth = bandwidth_from_sigma(fields.pop("sigma"), fields["wavelength"])
        result = {"filter": torch.tensor(chosen, dtype=torch.int64)} | fields
        result["bandwidth"] = bandwidth
        return result | {name: self.numbers[name][chosen] for name in ("n_x", "n_y")}

    def compare_with_v1(self) -> dict[str, tuple[float, float]]:
        """The Gabor functions of the layer compared with cells of macaque V1, in a few numbers.

        Convention:
            - receptive fields are measured in degrees and filters in pixels; shapes, directions
              and the spread of sizes can be compared
            - V1's bandwidth follows from its ``n_x``, as for a Gabor function

        Returns:
            The layer's number and V1's: medians of ``n_x``, ``n_y`` and ``bandwidth``; ``within``,
            the share within the region of (n_x, n_y) that holds 95 % of V1's cells; ``cardinal``,
            the share within 22.5 degrees of horizontal or vertical, 0.5 if directions are even;
            and ``octaves``, the standard deviation of the wavelengths. NaN where the layer has no
            Gabor function. Empty for filters that are not two-dimensional.

        Reference:
            ``gaborium.starts`` names the publications.

        Example:
            >>> from gaborium import Gabor2d, census, gabor
            >>> result = census(gabor(Gabor2d.of(wavelength=[4.0, 5.0], sigma=2.0), 11))
            >>> for name, (layer, v1) in result.compare_with_v1().items():
            ...     print(f"{name}: {layer:.2f}, V1 {v1:.2f}")
            n_x: 0.45, V1 0.35
            n_y: 0.45, V1 0.42
            bandwidth: 1.30, V1 1.70
            within: 1.00, V1 0.95
            cardinal: 1.00, V1 0.58
            octaves: 0.16, V1 0.83
        """
        if self.fit.params.n_dims != 2:
            return {}
        of = self.distribution()
        n_x, n_y = (10**mean for mean in starts.V1_WIDTH_MEAN)
        bandwidth = bandwidth_from_sigma(torch.tensor(n_x), torch.tensor(1.0)).item()
        inside = starts.v1_distance(of["n_x"], of["n_y"]) <= starts.v1_radius(0.95)
        angle = of["orientation"] % (math.pi / 2)
        cardinal = torch.minimum(angle, math.pi / 2 - angle) <= math.pi / 8
        octaves = of["wavelength"].log2()
        spread = octaves.sub(octaves.mean()).square().mean().sqrt().item()
        return {
            "n_x": (_median(of["n_x"]), n_x),
            "n_y": (_median(of["n_y"]), n_y),
            "bandwidth": (_median(of["bandwidth"]), bandwidth),
            "within": (inside.double().mean().item(), 0.95),
            "cardinal": (cardinal.double().mean().item(), starts.V1_CARDINAL),
            "octaves": (spread, starts.V1_FREQUENCY_STD),
        }

    def to_table(self) -> list[dict[str, object]]:
        """One row per filter: class, confidence, numbers, geometry of the fit, explanation."""
        numbers = {name: value.tolist() for name, value in self.numbers.items()}
        columns = {
            "filter": range(len(self)),
            "class": self.labels,
            "confidence": self.confidence.tolist(),
            "explanation": [self.explain(i) for i in range(len(self))],
        }
        return table(self.fit.params, columns | numbers)

    def to_json(self, *, indent: int | None = None) -> str:
        """The whole census as JSON text; infinities and missing numbers are inf and nan."""
        document = {
            "name": self.name,
            "classes": CLASSES,
            "counts": self.counts,
            "labels": self.labels,
            "probability": self.probability.tolist(),
            "filters": self.to_table(),
            "pairs": [pair._asdict() for pair in self.pairs],
            "v1": self.compare_with_v1(),
            "fit": json.loads(self.fit.to_json()),
        }
        return json.dumps(plain(document), indent=indent, allow_nan=False)

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors with one entry per filter, and metadata."""
        tensors, metadata = self.fit.to_tensors()
        tensors |= {f"numbers.{name}": value for name, value in self.numbers.items()}
        tensors["probability"] = self.probability
        pairs = [list(pair) for pair in self.pairs]
        return tensors, metadata | {"labels": self.labels, "pairs": pairs, "model": self.name}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Census:
        """The inverse of ``to_tensors``."""
        return cls(
            labels=tuple(metadata["labels"]),
            probability=tensors["probability"],
            numbers={name: tensors[f"numbers.{name}"] for name in NUMBERS},
            fit=FitResult.from_tensors(tensors, metadata),
            pairs=tuple(Pair(*pair) for pair in metadata["pairs"]),
            name=metadata["model"],
        )


def census(
    kernels: Tensor | nn.Module,
    *,
    layer: str | None = None,
    inputs: Any = None,
    n_dims: int = 2,
    n_starts: int = 12,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Census:
    """Sort the filters of a layer into classes, and explain each.

    A Gabor function fits blobs and edges, too, so a good fit is not a class. Every filter is also
    measured in other ways: how many bars of the fitted wave are within the kernel, how much a
    Gaussian, a centre with its surround or two crossing waves explain, how its power is shared
    between colours and orientations, and how far it rises above its own pixels in random order.
    Six logistic stages decide by these numbers.

    Convention:
        - ``gabor`` has at least three visible bars of alternating sign and one orientation, grey
          or in colour; ``edge`` two bars; ``blob`` one patch of one sign, round or long, or
          only a constant; ``centre-surround`` a patch within a ring of the other sign;
          ``colour-contrast`` colours against each other without an oriented lightness; ``other``
          clear structure outside these classes; ``noise`` no structure, or no weights
        - neither sign nor scale, neither the order of the channels nor flips and transposition
          change a class
        - lightness is the mean of the channels

    Args:
        kernels: ``(filters, channels, *kernel_size)``, or ``(filters, *kernel_size)`` of one
            channel; or a network, whose first convolution is used. It is not changed.
        layer: name of the layer in a network, to choose it yourself.
        inputs: arguments of a network, to find the layer that is executed first.
        n_dims: spatial dimensions of a kernel; ignored for networks.
        n_starts: of the fit, candidates that are followed for each filter at most.
        on_progress: called with a word for the task, how far it is, and of how many.

    Returns:
        The record, with tensors in float64.

    Raises:
        TypeError: ``kernels`` is neither, or not floating.
        ValueError: a network holds no convolution, or one that is transposed, not floating or of
            1 x 1 pixels; kernels have too few axes, no or one pixel, or are not finite.

    Example:
        >>> from gaborium import Gabor2d, gabor
        >>> shapes = Gabor2d.of(wavelength=[5.0, 1e9], sigma=[3.0, 2.0])
        >>> result = census(gabor(shapes, 11))
        >>> result.labels
        ('gabor', 'blob')
        >>> print(result.explain(1))
        One patch: a Gaussian explains 100 %, and a Gabor function's third bar would have 0 % of
        the strength of the first.
    """
    name = ""
    if isinstance(kernels, nn.Module):
        name, found = find_first_conv(kernels, layer, inputs=inputs)
        weight: Any = found.weight
        kernels, n_dims = weight.detach(), weight.ndim - 2
    elif layer is not None or inputs is not None:
        raise ValueError("layer and inputs choose the layer of a network; leave them out.")
    w = checked(kernels, n_dims)
    report = on_progress or (lambda *_: None)
    fits: list[FitResult] = []
    numbers: list[dict[str, Tensor]] = []
    for piece in w.split(_CHUNK):
        report("Looking at filters", sum(map(len, fits)), len(w))
        result = fit(piece, n_dims=n_dims, geometry="filter", center=True, n_starts=n_starts)
        fits.append(result)
        numbers.append(measure(piece, result, n_dims=n_dims))
    report("Looking at filters", len(w), len(w))
    whole = {key: torch.cat([part[key] for part in numbers]) for key in numbers[0]}
    norm = w.double().flatten(1).norm(dim=1)
    median = norm.median()
    whole["strength"] = norm / torch.where(median > 0, median, 1.0)
    probability = probabilities(whole)
    dead = whole["strength"] <= DEAD
    probability[dead] = torch.eye(len(CLASSES), dtype=probability.dtype)[CLASSES.index("noise")]
    labels = tuple(CLASSES[i] for i in probability.argmax(1).tolist())
    result = FitResult.cat(fits)
    return Census(labels, probability, whole, result, _find_pairs(w, labels, result, n_dims), name)


def _median(values: Tensor) -> float:
    """The median, halfway between the two middle values of an even number; NaN if empty."""
    return values.double().quantile(0.5).item() if len(values) else math.nan


# -- pairs ------------------------------------------------------------------------------------


def _find_pairs(
    kernels: Tensor, labels: Sequence[str], result: FitResult, n_dims: int
) -> tuple[Pair, ...]:
    """All pairs of a layer, the most similar first; noise has no partners.

    Two Gabor functions are compared as they were fitted, both moved to the middle: by their
    correlation at the best phase, and by that phase. All other filters are compared at the
    shift of whole pixels that fits best; they have no phase and no quadrature.
    """
    waves = [i for i, label in enumerate(labels) if label == "gabor"]
    others = [i for i, label in enumerate(labels) if label not in ("gabor", "noise")]
    pairs = _pairs_of_waves(waves, result, tuple(kernels.shape[-n_dims:])) if waves else []
    pairs += _pairs_of_kernels(others, kernels.double(), n_dims) if others else []
    return tuple(sorted(pairs, key=lambda pair: (-pair.similarity, pair.first, pair.second)))


def _pairs_of_waves(chosen: list[int], result: FitResult, sizes: tuple[int, ...]) -> list[Pair]:
    params = result[chosen].params
    params = params.replace(center=torch.zeros_like(params.center))
    # Twice the size, so that a moved envelope is not cut.
    wide = tuple(2 * size + 1 for size in sizes)
    even = gabor(params, wide).flatten(1)
    odd = gabor(params.replace(phase=params.phase + math.pi / 2), wide).flatten(1)
    norm = (even.square() + odd.square()).sum(1).div(2).sqrt().clamp_min(1e-300)
    even, odd = even / norm.unsqueeze(1), odd / norm.unsqueeze(1)
    # A wave and its reverse are one: two waves agree in cos(φ₁ - φ₂), and nearly so where their
    # directions are half a turn apart, in cos(φ₁ + φ₂). The larger of both counts.
    real = 0.5 * (even @ even.T + odd @ odd.T), 0.5 * (even @ even.T - odd @ odd.T)
    imaginary = 0.5 * (odd @ even.T - even @ odd.T), 0.5 * (odd @ even.T + even @ odd.T)
    x, y = torch.stack(real), torch.stack(imaginary)
    size, sense = torch.hypot(x, y).max(0)
    phase = torch.atan2(y, x).abs().gather(0, sense.unsqueeze(0))[0]
    targets = {"duplicate": 0.0, "quadrature": math.pi / 2, "negative": math.pi}
    return [
        Pair(chosen[i], chosen[j], kind, min(1.0, size[i, j].item()))
        for i, j in (size.triu(1) > _MIN_CORRELATION).nonzero().tolist()
        for kind, target in targets.items()
        if abs(phase[i, j].item() - target) <= _PHASE_TOLERANCE
    ]


def _pairs_of_kernels(chosen: list[int], kernels: Tensor, n_dims: int) -> list[Pair]:
    axes, w = tuple(range(-n_dims, 0)), kernels[chosen]
    padded = [2 * size for size in w.shape[-n_dims:]]
    w = w / w.flatten(1).norm(dim=1).reshape(-1, *[1] * (w.ndim - 1)).clamp_min(1e-300)
    spectra = torch.fft.rfftn(w, s=padded, dim=axes)
    # Amplitude spectra bound the correlation at every shift.
    bound = F.normalize(torch.fft.fftn(w, s=padded, dim=axes).abs().flatten(1), dim=1)
    pairs = []
    for i, j in ((bound @ bound.T).triu(1) > _MIN_CORRELATION).nonzero().tolist():
        product = (spectra[i] * spectra[j].conj()).sum(0)
        shifted = torch.fft.irfftn(product, s=padded).flatten()
        best = shifted[shifted.abs().argmax()].item()
        if abs(best) > _MIN_CORRELATION:
            kind = "duplicate" if best > 0 else "negative"
            pairs.append(Pair(chosen[i], chosen[j], kind, min(1.0, abs(best))))
    return pairs
