"""``census``: how Gabor-like is the first layer of a network, filter by filter and in words?"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gaborium import starts
from gaborium.conversion.classes import CLASSES, DEAD, probabilities, reason
from gaborium.conversion.first_conv import find_first_conv
from gaborium.conversion.measures import NUMBERS, geometry, measure
from gaborium.conversion.pairs import Pair, find_pairs
from gaborium.files import read_tensors, write_tensors
from gaborium.fitting import FitResult, fit
from gaborium.fitting.result import fit_from_tensors, fit_tensors
from gaborium.kernels import bandwidth_from_sigma
from gaborium.params import plain

_PIECE = 64  # filters between two calls of on_progress


@dataclass(frozen=True, eq=False)
class Census:
    """What every filter of a layer is.

    Args:
        labels: one of ``CLASSES`` for each filter: ``"gabor"``, ``"edge"``, ``"blob"``,
            ``"centre-surround"``, ``"colour-contrast"``, ``"other"`` or ``"noise"``.
        probability: ``(filters, classes)`` in the order of ``CLASSES``; rows sum to 1.
        numbers: what the classes rest on, each ``(filters,)``; ``NUMBERS`` says what they are.
        fit: the Gabor function nearest to each filter, with one geometry for its channels.
        pairs: filters that are negatives, duplicates or quadrature partners of others.
        name: of the layer in the network, empty for kernels.
    """

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
        chosen = torch.tensor([CLASSES.index(label) for label in self.labels])
        return self.probability.gather(1, chosen.unsqueeze(1)).squeeze(1)

    def filters(self, label: str) -> list[int]:
        """The numbers of the filters of a class.

        Raises:
            ValueError: there is no such class.
        """
        if label not in CLASSES:
            raise ValueError(f"label must be one of {', '.join(CLASSES)}, got {label!r}.")
        return [i for i, own in enumerate(self.labels) if own == label]

    def share(self, label: str = "gabor") -> float:
        """Filters of a class as a share of all that are not noise; NaN if there are none.

        Raises:
            ValueError: there is no such class.
        """
        alive = len(self) - self.counts["noise"] if label != "noise" else len(self)
        return len(self.filters(label)) / alive if alive else math.nan

    def why(self, index: int) -> str:
        """Why filter ``index`` got its class, in words, with the numbers that decided."""
        index = range(len(self))[index]
        numbers = {name: value[index].item() for name, value in self.numbers.items()}
        return reason(self.labels[index], numbers, self.probability[index].tolist())

    def distribution(self) -> dict[str, Tensor]:
        """Geometry of the filters that are Gabor functions, to compare layers or cells by.

        Returns:
            ``filter`` (their numbers), ``orientation`` (rad; not in 1-D), ``wavelength`` (px),
            ``bandwidth`` (octaves at half height, infinite for waves of less than 0.19 cycles in
            a standard deviation), and ``n_x`` and ``n_y``: cycles in a standard deviation of the
            envelope along the wave and across it. Each ``(gabor filters,)``.

        Reference:
            Ringach (2002), J. Neurophysiol. 88(1), doi:10.1152/jn.2002.88.1.455, has (n_x, n_y)
            of macaque V1; ``beside_v1`` compares.
        """
        chosen = self.filters("gabor")
        params = self.fit.params
        found = {"filter": torch.tensor(chosen, dtype=torch.int64)}
        if "orientation" in params.as_dict():
            found["orientation"] = params.as_dict()["orientation"].flatten()[chosen]
        wavelength, sigma = params.wavelength.flatten()[chosen], params.sigma.flatten()[chosen]
        found |= {"wavelength": wavelength, "bandwidth": bandwidth_from_sigma(sigma, wavelength)}
        return found | {name: self.numbers[name][chosen] for name in ("n_x", "n_y")}

    def beside_v1(self) -> dict[str, tuple[float, float]]:
        """How the Gabor functions of the layer lie beside cells of macaque V1, in a few numbers.

        Convention:
            - receptive fields are measured in degrees and filters in pixels; what both have in
              common are shapes, directions, and how far sizes are spread
            - V1's bandwidth follows from its ``n_x``, as that of a Gabor function does

        Returns:
            The layer's number and V1's: medians of ``n_x``, ``n_y`` and ``bandwidth``; ``within``,
            the share within the region of (n_x, n_y) that holds 95 % of V1's cells; ``cardinal``,
            the share within 22.5 degrees of horizontal or vertical, 0.5 if directions are even;
            and ``octaves``, the standard deviation of the wavelengths. NaN where the layer has no
            Gabor function. Nothing of filters that are not two-dimensional.

        Reference:
            ``gaborium.starts`` names the publications.

        Example:
            >>> from gaborium import Gabor2d, census, gabor
            >>> found = census(gabor(Gabor2d.of(wavelength=[4.0, 5.0], sigma=2.0), 11))
            >>> for name, (layer, v1) in found.beside_v1().items():
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
        found = self.distribution()
        n_x, n_y = (10**mean for mean in starts.V1_WIDTH_MEAN)
        bandwidth = bandwidth_from_sigma(torch.tensor(n_x), torch.tensor(1.0)).item()
        inside = starts.v1_distance(found["n_x"], found["n_y"]) <= starts.v1_radius(0.95)
        turned = found["orientation"] % (math.pi / 2)
        cardinal = torch.minimum(turned, math.pi / 2 - turned) <= math.pi / 8
        octaves = found["wavelength"].log2()
        layer = {
            **{name: _median(found[name]) for name in ("n_x", "n_y", "bandwidth")},
            "within": inside.double().mean().item(),
            "cardinal": cardinal.double().mean().item(),
            "octaves": (octaves - octaves.mean()).square().mean().sqrt().item(),
        }
        v1 = (n_x, n_y, bandwidth, 0.95, starts.V1_CARDINAL, starts.V1_FREQUENCY_STD)
        return {name: (own, of_v1) for (name, own), of_v1 in zip(layer.items(), v1, strict=True)}

    def to_table(self) -> list[dict[str, object]]:
        """One row per filter: class, confidence, numbers, geometry of the fit, and why."""
        rows: list[dict[str, object]] = []
        for i, (label, fields) in enumerate(
            zip(self.labels, geometry(self.fit.params), strict=True)
        ):
            row: dict[str, object] = {
                "filter": i,
                "class": label,
                "confidence": self.confidence[i].item(),
            }
            row |= {name: value[i].item() for name, value in self.numbers.items()}
            rows.append(row | fields | {"why": self.why(i)})
        return rows

    def to_json(self, *, indent: int | None = None) -> str:
        """All that was found as JSON text; infinities and missing numbers are inf and nan."""
        document = {
            "model": self.name,
            "classes": CLASSES,
            "counts": self.counts,
            "labels": self.labels,
            "probability": self.probability.tolist(),
            "numbers": {name: value.tolist() for name, value in self.numbers.items()},
            "why": [self.why(i) for i in range(len(self))],
            "pairs": [pair._asdict() for pair in self.pairs],
            "distribution": {k: v.tolist() for k, v in self.distribution().items()},
            "beside_v1": {
                name: {"layer": layer, "v1": v1} for name, (layer, v1) in self.beside_v1().items()
            },
            "fit": json.loads(self.fit.to_json()),
        }
        return json.dumps(plain(document), indent=indent, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the census into a safetensors file, all or nothing.

        Args:
            path: the file, in a folder that exists; an existing file is replaced.

        Raises:
            ImportError: safetensors is not installed.
            OSError: it cannot be written there. What was there before stays.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> from gaborium import Gabor2d, census, gabor
            >>> found = census(gabor(Gabor2d.of(wavelength=[4.0, 5.0], sigma=3.0), 11))
            >>> with TemporaryDirectory() as folder:
            ...     found.save(f"{folder}/census.safetensors")
            ...     Census.load(f"{folder}/census.safetensors")
            Census(2 filters: 2 gabor)
        """
        tensors, facts = fit_tensors(self.fit)
        tensors |= {f"numbers.{name}": value for name, value in self.numbers.items()}
        tensors["probability"] = self.probability
        facts |= {
            "name": "gaborium.census",
            "format": 1,
            "labels": self.labels,
            "pairs": [list(pair) for pair in self.pairs],
            "model": self.name,
        }
        write_tensors(path, tensors, facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Census:
        """Read what ``save`` has written, and verify its checksum.

        Args:
            path: the file.

        Returns:
            The census, with its tensors on the CPU.

        Raises:
            ImportError: safetensors is not installed.
            OSError: the file cannot be read.
            ValueError: it is cut off or damaged, is no saved census, or has a newer format.
        """
        tensors, facts = read_tensors(path, kind="census")
        try:
            return cls(
                labels=tuple(facts["labels"]),
                probability=tensors["probability"],
                numbers={name: tensors[f"numbers.{name}"] for name in NUMBERS},
                fit=fit_from_tensors(tensors, facts),
                pairs=tuple(Pair(*pair) for pair in facts["pairs"]),
                name=facts["model"],
            )
        except LookupError as error:
            raise ValueError(
                f"{os.fspath(path)!r} has no {error} that this version knows; update gaborium."
            ) from None


def census(
    kernels: Tensor | nn.Module,
    *,
    layer: str | None = None,
    inputs: Any = None,
    n_dims: int = 2,
    n_starts: int = 12,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Census:
    """Say of every filter of a layer what it is, and why.

    A Gabor function fits blobs and edges, too, so a good fit is not a class. Every filter is also
    measured in other ways: how many bars of the fitted wave lie within the kernel, how much a
    Gaussian, a centre with its surround or two crossing waves explain, how its power is shared
    between colours and orientations, and how far it stands above its own pixels in random order.
    Six questions are put to these numbers in a row, and the first that is answered with yes gives
    the class.

    Convention:
        - ``gabor`` has at least three visible bars of alternating sign and one orientation, grey
          or in colour; ``edge`` two bars; ``blob`` one patch of one sign, round or long, or
          nothing but a constant; ``centre-surround`` a patch within a ring of the other sign;
          ``colour-contrast`` colours against each other without an oriented lightness; ``other``
          clear structure that is none of these; ``noise`` no structure, or no weights
        - neither sign nor scale, neither the order of the channels nor flips and transposition
          change a class
        - lightness is the mean of the channels

    Args:
        kernels: ``(filters, channels, *kernel_size)``, or ``(filters, *kernel_size)`` of one
            channel; or a network, of which the first convolution is taken. It is not changed.
        layer: name of the layer in a network, to choose it yourself.
        inputs: what a network is called with, to find the layer that is executed first.
        n_dims: spatial dimensions of a kernel; of a network its layer tells.
        n_starts: of the fit, candidates that are followed for each filter at most.
        on_progress: called with what is done (a word), how far, and of how many.

    Returns:
        The record, with tensors in float64.

    Raises:
        TypeError: ``kernels`` is neither, or complex or not floating.
        ValueError: a network holds no convolution, or one that is transposed, quantised, complex
            or of 1 x 1 pixels; kernels have too few axes, none or one pixel, or are not finite.

    Example:
        >>> from gaborium import Gabor2d, gabor
        >>> shapes = Gabor2d.of(wavelength=[5.0, 1e9], sigma=[3.0, 2.0])
        >>> found = census(gabor(shapes, 11))
        >>> found.labels
        ('gabor', 'blob')
        >>> print(found.why(1))
        One patch: a Gaussian explains 100 %, and a Gabor function's third bar would have 0 % of
        the strength of the first.
    """
    name = ""
    if isinstance(kernels, nn.Module):
        name, found = find_first_conv(kernels, layer, inputs=inputs)
        weight = found.weight
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name!r} has no weight that is a tensor.")
        kernels, n_dims = weight.detach(), weight.ndim - 2
    elif layer is not None or inputs is not None:
        raise ValueError("layer and inputs choose the layer of a network; leave them out.")
    w = _checked(kernels, n_dims)
    fits, numbers = [], []
    if on_progress is not None:
        on_progress("Looking at filters", 0, len(w))
    for piece in w.split(_PIECE):
        result = fit(piece, n_dims=n_dims, geometry="filter", center=True, n_starts=n_starts)
        fits.append(result)
        numbers.append(measure(piece, result, n_dims=n_dims))
        if on_progress is not None:
            on_progress("Looking at filters", sum(map(len, fits)), len(w))
    whole = {key: torch.cat([part[key] for part in numbers]) for key in numbers[0]}
    norm = w.double().flatten(1).norm(dim=1)
    median = norm.median()
    whole["strength"] = norm / torch.where(median > 0, median, 1.0)
    probability = probabilities(whole)
    dead = whole["strength"] <= DEAD
    probability[dead] = torch.eye(len(CLASSES), dtype=probability.dtype)[CLASSES.index("noise")]
    labels = tuple(CLASSES[i] for i in probability.argmax(1).tolist())
    result = FitResult.cat(fits)
    return Census(labels, probability, whole, result, find_pairs(w, labels, result, n_dims), name)


def _checked(kernels: Tensor, n_dims: int) -> Tensor:
    """Kernels ``(filters, channels, *size)`` on the CPU, or an error that says what is wrong."""
    if not isinstance(kernels, Tensor):
        raise TypeError(
            f"census needs kernels as a tensor or a network, got {type(kernels).__name__}."
        )
    if n_dims not in (1, 2, 3):
        raise ValueError(f"n_dims must be 1, 2 or 3, got {n_dims}.")
    if kernels.is_complex():
        raise TypeError("kernels are complex, and Gabor functions real; give .real or .abs().")
    if kernels.is_quantized or not kernels.is_floating_point():
        raise TypeError(
            f"kernels must be real and floating, got {kernels.dtype}; take the network before it "
            "was quantised, or dequantise them."
        )
    shape = tuple(kernels.shape)
    if kernels.ndim not in (n_dims + 1, n_dims + 2) or kernels.numel() == 0:
        raise ValueError(
            f"kernels must be (filters, channels, *kernel_size) or (filters, *kernel_size) with "
            f"{n_dims} axes of size and not empty, got shape {shape}."
        )
    if math.prod(shape[-n_dims:]) == 1:
        raise ValueError(f"kernels of shape {shape} have one pixel, in which there is no wave.")
    w = kernels.detach().cpu()
    w = w.unsqueeze(1) if w.ndim == n_dims + 1 else w
    bad = (~w.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(w)} filters hold NaN or infinity, the first is filter {bad[0]}; "
            "was the network trained to the end?"
        )
    return w


def _median(values: Tensor) -> float:
    """The middle, of an even number halfway between the two; NaN of none."""
    return values.double().quantile(0.5).item() if len(values) else math.nan
