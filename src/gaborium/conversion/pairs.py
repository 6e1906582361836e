"""Which filters of a layer belong together: negatives, duplicates, quadrature partners."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium.fitting import FitResult
from gaborium.kernels import gabor

_ALIKE = 0.9  # correlation from which two filters are the same
_TOLERANCE = math.radians(22.5)  # of the phase between two waves
_WITHOUT = "noise"  # a class without partners


class Pair(NamedTuple):
    """Two filters that are the same but for their sign, place or phase.

    Args:
        first: number of one filter.
        second: number of the other, higher.
        kind: ``"duplicate"``, ``"negative"`` or ``"quadrature"``.
        similarity: correlation of the two once sign, place and phase are brought together, 0 to 1.
    """

    first: int
    second: int
    kind: str
    similarity: float


def find_pairs(
    kernels: Tensor, labels: Sequence[str], result: FitResult, n_dims: int
) -> tuple[Pair, ...]:
    """All pairs of a layer, the most alike first.

    Two Gabor functions are compared as they were fitted, both moved to the middle: what they have
    in common whatever the phase, and how far apart their phases are. All other filters are
    compared as they are, at the shift of whole pixels that suits them best; for these there is no
    phase and no quadrature.

    Args:
        kernels: ``(filters, channels, *kernel_size)``.
        labels: class of each filter; noise has no partners.
        result: of ``fit`` with shared geometry.
        n_dims: spatial dimensions of a kernel.
    """
    waves = [i for i, label in enumerate(labels) if label == "gabor"]
    others = [i for i, label in enumerate(labels) if label not in ("gabor", _WITHOUT)]
    pairs = _of_waves(waves, result, tuple(kernels.shape[-n_dims:]))
    pairs += _of_kernels(others, kernels.double(), n_dims)
    return tuple(sorted(pairs, key=lambda pair: (-pair.similarity, pair.first, pair.second)))


def _of_waves(chosen: list[int], result: FitResult, sizes: tuple[int, ...]) -> list[Pair]:
    if len(chosen) < 2:
        return []
    params = result[chosen].params
    params = params.replace(center=torch.zeros_like(params.center))
    # Twice the size, that an envelope at the border loses no part in the middle.
    wide = tuple(2 * size + 1 for size in sizes)
    even = gabor(params, wide).flatten(1)
    odd = gabor(params.replace(phase=params.phase + math.pi / 2), wide).flatten(1)
    norm = (even.square() + odd.square()).sum(1).div(2).sqrt().clamp_min(1e-300)
    even, odd = even / norm.unsqueeze(1), odd / norm.unsqueeze(1)
    # A wave and its reverse are one: two waves agree in cos(φ₁ - φ₂), and nearly so where their
    # directions are half a turn apart, in cos(φ₁ + φ₂). The closer of both is meant.
    real = 0.5 * (even @ even.T + odd @ odd.T), 0.5 * (even @ even.T - odd @ odd.T)
    imaginary = 0.5 * (odd @ even.T - even @ odd.T), 0.5 * (odd @ even.T + even @ odd.T)
    x, y = torch.stack(real), torch.stack(imaginary)
    size, sense = torch.hypot(x, y).max(0)
    phase = torch.atan2(y, x).abs().gather(0, sense.unsqueeze(0))[0]
    pairs = []
    for i, j in (size.triu(1) > _ALIKE).nonzero().tolist():
        kind = _kind(phase[i, j].item())
        if kind:
            pairs.append(Pair(chosen[i], chosen[j], kind, min(1.0, size[i, j].item())))
    return pairs


def _kind(phase: float) -> str:
    targets = {"duplicate": 0.0, "quadrature": math.pi / 2, "negative": math.pi}
    near = [kind for kind, target in targets.items() if abs(phase - target) <= _TOLERANCE]
    return near[0] if near else ""


def _of_kernels(chosen: list[int], kernels: Tensor, n_dims: int) -> list[Pair]:
    if len(chosen) < 2:
        return []
    axes = tuple(range(-n_dims, 0))
    w = kernels[chosen]
    w = w / w.flatten(1).norm(dim=1).reshape(-1, *[1] * (w.ndim - 1)).clamp_min(1e-300)
    spectra = torch.fft.rfftn(w, s=[2 * size for size in w.shape[-n_dims:]], dim=axes)
    # No shift makes two kernels more alike than their amplitude spectra.
    whole = torch.fft.fftn(w, s=[2 * size for size in w.shape[-n_dims:]], dim=axes).abs().flatten(1)
    bound = F.normalize(whole, dim=1)
    pairs = []
    for i, j in ((bound @ bound.T).triu(1) > _ALIKE).nonzero().tolist():
        product = (spectra[i] * spectra[j].conj()).sum(0)
        shifted = torch.fft.irfftn(product, s=[2 * size for size in w.shape[-n_dims:]])
        best = shifted.flatten()[shifted.abs().argmax()].item()
        if abs(best) > _ALIKE:
            kind = "duplicate" if best > 0 else "negative"
            pairs.append(Pair(chosen[i], chosen[j], kind, min(1.0, abs(best))))
    return pairs
