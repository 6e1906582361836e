"""Are the filters of a layer alive, different from each other, and still Gabor functions?"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium.diagnostics.causes import Finding, Severity, by_severity, finding
from gaborium.fitting import fit
from gaborium.functions.kernels import (
    ENOUGH_STDS,
    envelope_widths,
    inner_products,
    suggest_kernel_size,
)
from gaborium.functions.params import Gabor
from gaborium.layers import GABOR_LAYERS

_DEAD = 1e-3  # share of the median norm
_DUPLICATE = 0.99  # cosine of two kernels
_LEAK = 0.1  # response to a constant, as a share of the largest that a kernel could give
_POINT = 0.3  # px; a narrower envelope leaves one pixel
_BLOB = 0.3  # cycles within one standard deviation to each side
_STRETCHED = 8.0  # ratio of the two standard deviations
_FAINT = 0.05  # share of a filter's largest amplitude; the geometry of fainter channels is ignored
_MANY = 0.1  # share of the filters


class Duplicate(NamedTuple):
    """Two filters with the same kernel up to scale; if the cosine is negative, the opposite one."""

    first: int
    second: int
    cosine: float

    @property
    def negative(self) -> bool:
        """Whether one is the negative of the other, which a following ReLU distinguishes."""
        return self.cosine < 0


@dataclass(frozen=True, eq=False)
class Health:
    """The state of each filter of a layer.

    Args:
        params: the layer's record, or for another layer the record fitted to its kernels.
        norm: ``(filters,)``, L2 norm of each filter's kernels over its channels.
        dead: ``(filters,)``, bool: zero, not finite, or below 1/1000 of the median norm.
        aliased: wavelength below 2 px.
        truncated: the kernel's border cuts the envelope above a third of its height.
        degenerate: for every filter the shape that has replaced the Gabor function: ``"point"``,
            ``"plane wave"``, ``"stretched"``, ``"blob"``, or ``""``.
        dc_leak: ``(filters,)``, in [0, 1]: response to a constant image as a share of the largest
            that kernels of these magnitudes could give.
        duplicates: pairs of filters with a cosine beyond ±0.99. For energy filters the phase does
            not count.
        findings: the worst first.
    """

    params: Gabor
    norm: Tensor
    dead: Tensor
    aliased: Tensor
    truncated: Tensor
    degenerate: tuple[str, ...]
    dc_leak: Tensor
    duplicates: tuple[Duplicate, ...]
    findings: list[Finding] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.norm)

    @property
    def redundant(self) -> list[int]:
        """Filters that repeat the kernel of an earlier one, up to a positive scale."""
        return sorted({pair.second for pair in self.duplicates if not pair.negative})


def health(layer: nn.Module, *, name: str = "") -> Health:
    """Examine the filters of a layer.

    Args:
        layer: a ``GaborConvNd``; or another layer with a ``weight`` of a convolution's shape, to
            which Gabor functions are fitted first: filters that no Gabor function resembles are
            judged by norm, duplicates and response to a constant alone. It is not changed.
        name: of the layer in ``module``, for the code of the remedies.

    Returns:
        A record of flags and numbers per filter, with findings ``"dead filters"``,
        ``"aliased wavelength"``, ``"truncated envelope"``, ``"degenerate filters"``,
        ``"duplicate filters"`` and ``"DC leak"``.

    Raises:
        TypeError: the layer has no ``weight`` of shape ``(out, in, *kernel_size)``.

    Example:
        >>> from gaborium import Gabor2d, GaborConv2d
        >>> pair = Gabor2d.of(wavelength=[5.0, 5.0], sigma=2.0, amplitude=[1.0, -2.0])
        >>> found = health(GaborConv2d(1, 2, 9, start=pair))
        >>> found.duplicates[0].negative, found.redundant
        (True, [])
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim not in (3, 4, 5):
        raise TypeError(
            "health needs a layer with a weight of shape (out, in, *kernel_size), got "
            f"{type(layer).__name__}."
        )
    kernels, sizes = weight.detach().double(), tuple(weight.shape[2:])
    if isinstance(layer, GABOR_LAYERS):
        params = layer.params.detach().to(torch.float64).expand()
        known = torch.ones(len(params), dtype=torch.bool, device=params.device)
    else:
        result = fit(kernels, n_dims=len(sizes), geometry="filter")
        params, known = result.params.expand(), result.converged.to(kernels.device)
    members = _by_filter(kernels, len(params))
    norm, pixels = members.flatten(1).norm(dim=1), members.flatten(3)
    dead = _is_dead(norm)
    alive = known & ~dead
    # Each filter's sums over pixels, against the sums of magnitudes.
    leak = pixels.sum(-1).abs().sum(-1) / pixels.abs().sum((-1, -2)).clamp_min(1e-300)
    audible = params.amplitude.abs() >= _FAINT * params.amplitude.abs().amax(1, keepdim=True)
    found = Health(
        params=params,
        norm=norm,
        dead=dead,
        aliased=alive & ((params.wavelength < 2) & audible).any(1),
        truncated=alive & (_is_cut(params, sizes) & audible).any(1),
        degenerate=_kinds(params, audible, alive, sizes),
        dc_leak=leak.amax(1),
        duplicates=duplicates_of(layer, len(params)),
    )
    found.findings.extend(by_severity(_findings(found, layer, name)))
    return found


def reinitialize_filters(layer: Any, filters: list[int], *, seed: int | None = None) -> None:
    """Give some filters of a Gabor layer new random parameters; the others stay as they are.

    Args:
        layer: a ``GaborConvNd``, which is changed in place; an optimiser that knows its
            parameters still does.
        filters: their numbers.
        seed: of the random start; by default torch's global generator.

    Raises:
        TypeError: the layer is not a Gabor layer.
        IndexError: a number is out of range.

    Example:
        >>> from gaborium import Gabor2d, GaborConv2d
        >>> same = Gabor2d.of(wavelength=[5.0, 5.0], sigma=2.0)
        >>> layer = GaborConv2d(1, 2, 9, start=same)
        >>> reinitialize_filters(layer, [1], seed=0)
        >>> health(layer).duplicates
        ()
    """
    if not isinstance(layer, GABOR_LAYERS):
        raise TypeError(f"reinitialize_filters needs a Gabor layer, got {type(layer).__name__}.")
    fresh = copy.deepcopy(layer)
    fresh.start, fresh.seed = "random", seed
    fresh.reset_parameters()
    with torch.no_grad():
        for name in layer.raw_coordinates.raw_fields():
            getattr(layer, name)[filters] = getattr(fresh, name)[filters]


def duplicates_of(layer: Any, n_filters: int) -> tuple[Duplicate, ...]:
    """The duplicates alone, which cost little more than the layer's kernels."""
    flat = _by_filter(layer.weight.detach().double(), n_filters).flatten(1)
    dead = _is_dead(flat.norm(dim=1))
    unit = F.normalize(torch.where(dead[:, None], 0.0, flat), dim=1, eps=1e-30)
    # The phase of an energy filter does not count.
    n_phases = 2 if getattr(layer, "output", "") == "energy" else 1
    unit = unit.unflatten(1, (n_phases, -1))
    cosine = inner_products(unit, unit)
    pairs = (cosine.abs().triu(1) > _DUPLICATE).nonzero().tolist()
    return tuple(Duplicate(i, j, cosine[i, j].item()) for i, j in pairs)


# -- one question each --------------------------------------------------------------------------


def _by_filter(kernels: Tensor, n_filters: int) -> Tensor:
    """The kernels of each filter: ``(filters, 1 or 2, channels, *size)``."""
    return kernels.reshape(n_filters, -1, *kernels.shape[1:])


def _is_dead(norm: Tensor) -> Tensor:
    good = norm.isfinite() & (norm > 0)
    if not bool(good.any()):
        return ~good
    return ~good | (norm < _DEAD * norm[good].median())


def _is_cut(params: Gabor, sizes: tuple[int, ...]) -> Tensor:
    """Whether the kernel holds too little of an envelope along some axis: ``(*batch,)``."""
    # A kernel of one pixel along an axis is a slice, not a cut.
    room = [size / 2 if size > 1 else math.inf for size in reversed(sizes)]
    width = envelope_widths(params)
    needed = width * (ENOUGH_STDS - 1e-6) + params.center.abs()
    return (needed > width.new_tensor(room)).any(-1)


def _kinds(
    params: Gabor, audible: Tensor, alive: Tensor, sizes: tuple[int, ...]
) -> tuple[str, ...]:
    """The shape that has replaced each filter's Gabor function, judged by its louder channels."""
    along = params.sigma
    across = along / params.as_dict().get("aspect_ratio", torch.ones_like(along))
    ratio, cycles = along / across, along / params.wavelength
    # With so few cycles the odd part is this much smaller than the even one.
    even = params.amplitude * params.phase.cos() * audible
    odd = params.amplitude * params.phase.sin() * audible * (math.sqrt(2) * math.pi * cycles)
    is_even = even.square().sum(1, keepdim=True) > odd.square().sum(1, keepdim=True)
    kinds = {
        "point": torch.maximum(along, across) < _POINT,
        "plane wave": torch.minimum(along, across) > max(sizes),
        "stretched": (ratio > _STRETCHED) | (ratio < 1 / _STRETCHED),
        "blob": (2 * cycles < _BLOB) & is_even,
    }
    found = {kind: alive & (is_one | ~audible).all(1) for kind, is_one in kinds.items()}
    return tuple(
        next((kind for kind, which in found.items() if which[i]), "") for i in range(len(params))
    )


# -- findings -----------------------------------------------------------------------------------


def _findings(found: Health, layer: nn.Module, name: str) -> Iterator[Finding]:
    is_ours, pairs = isinstance(layer, GABOR_LAYERS), found.duplicates
    cut = _indices(found.truncated)
    sick = [i for i, kind in enumerate(found.degenerate) if kind]
    blobs = [i for i in sick if found.degenerate[i] == "blob"]
    others = [i for i in sick if i not in blobs]
    few = "blobs with less than a third of a cycle, whose wave has no clear direction"
    involved = sorted({i for pair in pairs for i in pair[:2]})
    negatives, redundant = sum(pair.negative for pair in pairs), found.redundant
    rows: list[tuple[str, list[int], dict[str, Any]]] = [
        ("dead filters", _indices(found.dead), {
            "severity": Severity.SEVERE if bool(found.dead.all()) else None,
        }),
        ("aliased wavelength", _indices(found.aliased), {}),
        ("truncated envelope", cut, {
            "arguments": _larger_kernel(layer, found.params[cut]) if is_ours and cut else "",
        }),
        ("degenerate filters", others, {
            "filters": str(sick),
            "kinds": ", ".join(sorted({found.degenerate[i] for i in others})),
        }),
        ("degenerate filters", blobs, {
            "filters": str(sick), "kinds": few, "severity": Severity.NOTE, "confidence": 0.5,
        }),
        ("DC leak", _indices(found.dc_leak > _LEAK), {
            "largest_share": found.dc_leak.max().item(),
        }),
        ("duplicate filters", involved, {
            "filters": str(redundant),
            "severity": Severity.WARNING if len(redundant) > _MANY * len(found) else None,
            "reason": f"{len(involved)} of {len(found)}, in {len(pairs)} pairs, {negatives} of "
            "them negatives",
            "pairs": len(pairs),
            "negative_pairs": negatives,
            "largest_cosine": max((abs(pair.cosine) for pair in pairs), default=0.0),
        }),
    ]  # fmt: skip
    for cause, filters, values in rows:
        if filters:
            has_remedy = is_ours and (cause != "duplicate filters" or redundant)
            known: dict[str, Any] = {"name": name, "filters": str(filters)}
            known |= {"n": len(filters), "total": len(found)}
            yield finding(cause, filters, remedy=None if has_remedy else "", **(known | values))


def _larger_kernel(layer: Any, params: Gabor) -> str:
    """Arguments for a kernel that holds these envelopes, with an output of the same size."""
    sizes = [
        # A size of the same parity, so that the output keeps its place.
        min(new + (new - old) % 2, 3 * old) if new > old > 1 else old
        for new, old in zip(suggest_kernel_size(params, 2.0), layer.kernel_size, strict=True)
    ]
    if isinstance(layer.padding, str):
        return f"kernel_size={tuple(sizes)}"
    grown = zip(layer.padding, layer.dilation, sizes, layer.kernel_size, strict=True)
    padding = tuple(p + d * (new - old) // 2 for p, d, new, old in grown)
    return f"kernel_size={tuple(sizes)}, padding={padding}"


def _indices(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()
