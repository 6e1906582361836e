"""Are the filters of a layer alive, different from each other, and Gabor functions still?"""

from __future__ import annotations

import copy
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gaborium.diagnostics.causes import Finding, Severity, by_severity
from gaborium.diagnostics.mending import rebuilding_code
from gaborium.fitting import fit
from gaborium.kernels import ENOUGH_STDS, envelope_widths, gabor, suggest_kernel_size
from gaborium.layers import GABOR_LAYERS
from gaborium.params import UNITS, Gabor

_DEAD = 1e-3  # of the median norm
_SAME = 0.99  # cosine of two kernels
_LEAK = 0.1  # response to a constant, as a share of the largest that a kernel could give
_POINT = 0.3  # px; a narrower envelope leaves one pixel
_BLOB = 0.3  # cycles within one standard deviation to each side
_STRETCHED = 8.0
_UNMOVED = 1e-3  # of the kernel's norm
_FAINT = 0.05  # of a filter's largest amplitude: such a channel says nothing of its geometry
_MANY = 0.1  # of the filters


class Duplicate(NamedTuple):
    """Two filters with the same kernel up to scale; the negative of it where cosine < 0."""

    first: int
    second: int
    cosine: float

    @property
    def negative(self) -> bool:
        """Whether one is the other's negative, which a ReLU behind them tells apart."""
        return self.cosine < 0


@dataclass(frozen=True, eq=False)
class Health:
    """How each filter of a layer is.

    Args:
        params: the layer's record, or that of the fit to another layer's kernels.
        norm: ``(filters,)``, L2 norm of each filter's kernels over its channels.
        dead: ``(filters,)``, bool: zero, not finite, or below 1/1000 of the median norm.
        aliased: wavelength below 2 px.
        truncated: the kernel's border cuts the envelope above a third of its height.
        degenerate: for every filter what it has become instead of a Gabor function:
            ``"point"``, ``"plane wave"``, ``"stretched"``, ``"blob"``, or ``""``.
        dc_leak: ``(filters,)``, in [0, 1]: response to a constant image as a share of the largest
            that kernels of these magnitudes could give.
        duplicates: pairs of filters with a cosine beyond ±0.99. Of energy filters the phase does
            not count.
        displacement: since the start, by field in the field's unit and the record's shape, signed,
            on the circle and up to symmetry; empty without a start.
        kernel_distance: ``(filters,)``, L2 distance from the starting kernels as a share of their
            norm; ``None`` without a start.
        remedies: code by cause, in terms of ``module`` and ``optimizer``.
    """

    params: Gabor
    norm: Tensor
    dead: Tensor
    aliased: Tensor
    truncated: Tensor
    degenerate: tuple[str, ...]
    dc_leak: Tensor
    duplicates: tuple[Duplicate, ...]
    displacement: dict[str, Tensor]
    kernel_distance: Tensor | None
    remedies: dict[str, str]

    def __len__(self) -> int:
        return len(self.norm)

    @property
    def redundant(self) -> list[int]:
        """Filters without which every kernel would still be there, up to scale, sign counted."""
        return sorted({pair.second for pair in self.duplicates if not pair.negative})

    @property
    def findings(self) -> list[Finding]:
        """The worst first."""
        shape = [i for i, kind in enumerate(self.degenerate) if kind and kind != "blob"]
        blobs = [i for i, kind in enumerate(self.degenerate) if kind == "blob"]
        everywhere = bool(self.dead.all())
        found = [
            self._found(
                "dead filters",
                Severity.SEVERE if everywhere else Severity.WARNING,
                "{n} of {all} filters {is|are} dead: {its kernel is|their kernels are} zero "
                "beside those of the others.",
                _indices(self.dead),
            ),
            self._found(
                "aliased wavelength",
                Severity.WARNING,
                "{n} of {all} filters {has|have} a wavelength below 2 px, where a wave looks "
                "like a longer one.",
                _indices(self.aliased),
            ),
            self._found(
                "truncated envelope",
                Severity.WARNING,
                "{n} of {all} filters {does|do} not fit the kernel: the border cuts {its|their} "
                "envelope above a third of its height, which biases the parameters.",
                _indices(self.truncated),
                0.7,
            ),
            self._found(
                "degenerate filters",
                Severity.WARNING,
                "{n} of {all} filters {is no Gabor function|are no Gabor functions} any more: "
                + ", ".join(sorted({self.degenerate[i] for i in shape}))
                + ".",
                shape,
                0.8,
            ),
            self._found(
                "degenerate filters",
                Severity.NOTE,
                "{n} of {all} filters {is a blob|are blobs}: less than a third of a cycle lies "
                "within the envelope, so the wave's direction is undetermined.",
                blobs,
                0.5,
            ),
            self._found(
                "DC leak",
                Severity.NOTE,
                "{n} of {all} filters {answers|answer} to a constant image.",
                _indices(self.dc_leak > _LEAK),
                0.3,
                largest_share=self.dc_leak.max().item(),
            ),
            self._repeated(),
        ]
        if self.kernel_distance is not None and bool((self.kernel_distance < _UNMOVED).all()):
            found.append(
                self._found(
                    "filters did not move",
                    Severity.WARNING,
                    "No filter has moved: every kernel is within 0.1 % of where it began.",
                    list(range(len(self))),
                    0.7,
                    largest_distance=self.kernel_distance.max().item(),
                )
            )
        return by_severity([one for one in found if one is not None])

    def to_table(self) -> list[dict[str, object]]:
        """One row per filter: norm, flags, and how far it is from its start."""
        twins: dict[int, list[int]] = {}
        for pair in self.duplicates:
            twins.setdefault(pair.first, []).append(pair.second)
            twins.setdefault(pair.second, []).append(pair.first)
        rows: list[dict[str, object]] = []
        for i in range(len(self)):
            distance = self.kernel_distance
            row: dict[str, object] = {
                "filter": i,
                "norm": self.norm[i].item(),
                "dead": bool(self.dead[i]),
                "aliased": bool(self.aliased[i]),
                "truncated": bool(self.truncated[i]),
                "degenerate": self.degenerate[i],
                "dc_leak": self.dc_leak[i].item(),
                "duplicates": tuple(twins.get(i, ())),
                "kernel_distance": None if distance is None else distance[i].item(),
            }
            for name, value in self.displacement.items():
                row[f"moved {name} ({UNITS[name]})"] = value[i].abs().max().item()
            rows.append(row)
        return rows

    def _repeated(self) -> Finding | None:
        involved = sorted({i for pair in self.duplicates for i in pair[:2]})
        negatives = sum(pair.negative for pair in self.duplicates)
        many = len(self.redundant) > _MANY * len(self)
        return self._found(
            "duplicate filters",
            Severity.WARNING if many else Severity.NOTE,
            "{n} of {all} filters {has|have} the kernel of another one up to scale"
            + (f" ({negatives} of {len(self.duplicates)} pairs are negatives)." if negatives
               else "."),
            involved,
            0.7,
            pairs=float(len(self.duplicates)),
            negative_pairs=float(negatives),
            largest_cosine=max((abs(pair.cosine) for pair in self.duplicates), default=0.0),
        )  # fmt: skip

    def _found(
        self,
        cause: str,
        severity: Severity,
        sentence: str,
        filters: list[int],
        likelihood: float = 1.0,
        **numbers: float,
    ) -> Finding | None:
        """A finding about filters, if there are any; of {one|several} words the fitting ones."""
        if not filters:
            return None
        number = r"\1" if len(filters) == 1 else r"\2"
        sentence = re.sub(r"\{([^{|}]*)\|([^{|}]*)\}", number, sentence)
        return Finding(
            cause,
            severity,
            sentence.replace("{n}", str(len(filters))).replace("{all}", str(len(self))),
            {"filters": float(len(filters)), "share": len(filters) / len(self)} | numbers,
            self.remedies.get(cause, ""),
            tuple(str(i) for i in filters),
            likelihood,
        )


def health(layer: nn.Module, start: Gabor | None = None, *, name: str = "") -> Health:
    """Look at the filters of a layer.

    Args:
        layer: a ``GaborConvNd``; or another layer with a ``weight`` of a convolution's shape, to
            which Gabor functions are fitted first: filters that no Gabor function resembles are
            judged by norm, duplicates and response to a constant alone. It is not changed.
        start: the record with which training began, for the displacement since then.
        name: of the layer in ``module``, for the code of the remedies.

    Returns:
        A record of flags and numbers per filter, with findings ``"dead filters"``,
        ``"aliased wavelength"``, ``"truncated envelope"``, ``"degenerate filters"``,
        ``"duplicate filters"``, ``"DC leak"`` and ``"filters did not move"``.

    Raises:
        TypeError: the layer has no ``weight`` of shape ``(out, in, *kernel_size)``, or the start
            is no record of its dimension.

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
    ours = isinstance(layer, GABOR_LAYERS)
    with torch.no_grad():
        kernels = weight.detach().double()
        params, known = _params_of(layer, kernels)
        if start is not None and not isinstance(start, type(params)):
            raise TypeError(f"start must be a {type(params).__name__}, got {type(start).__name__}.")
        sizes = tuple(kernels.shape[2:])
        members = kernels.reshape(len(params), -1, *kernels.shape[1:])
        norm = members.flatten(1).norm(dim=1)
        dead = _is_dead(norm)
        alive = known & ~dead
        heard = params.amplitude.abs() >= _FAINT * params.amplitude.abs().amax(1, keepdim=True)
        aliased = alive & ((params.wavelength < 2) & heard).any(1)
        truncated = alive & (_is_cut(params, sizes) & heard).any(1)
        kinds = tuple(
            _kind(params[i], heard[i], sizes) if bool(alive[i]) else "" for i in range(len(params))
        )
        duplicates = _duplicates(members, dead, any_phase=getattr(layer, "output", "") == "energy")
        leak = _leak(members)
        moved, distance = _displacement(layer, params, start, members)
    remedies: dict[str, str] = {}
    if ours:
        redundant = sorted({pair.second for pair in duplicates if not pair.negative})
        bad = [i for i, kind in enumerate(kinds) if kind]
        remedies = _remedies(layer, name, params, _indices(dead), redundant, bad, truncated)
    return Health(
        params, norm, dead, aliased, truncated, kinds, leak, duplicates, moved, distance, remedies
    )


def reseed(layer: Any, filters: list[int], *, seed: int | None = None) -> None:
    """Let some filters of a Gabor layer begin again, at random; the others stay as they are.

    Args:
        layer: a ``GaborConvNd``, which is changed in place; an optimiser that knows its
            parameters still does.
        filters: their numbers.
        seed: of the random start; by default torch's global generator.

    Raises:
        TypeError: the layer is none of ours.
        IndexError: a number is out of range.

    Example:
        >>> from gaborium import Gabor2d, GaborConv2d
        >>> same = Gabor2d.of(wavelength=[5.0, 5.0], sigma=2.0)
        >>> layer = GaborConv2d(1, 2, 9, start=same)
        >>> reseed(layer, [1], seed=0)
        >>> health(layer).duplicates
        ()
    """
    if not isinstance(layer, GABOR_LAYERS):
        raise TypeError(f"reseed needs a Gabor layer, got {type(layer).__name__}.")
    fresh = copy.deepcopy(layer)
    fresh.start, fresh.seed = "random", seed
    fresh.reset_parameters()
    whole, new = layer.params.detach().expand(), fresh.params.detach().expand().as_dict()
    chosen = torch.zeros(len(whole), dtype=torch.bool, device=whole.device)
    chosen[filters] = True
    fields = {
        name: torch.where(chosen.reshape(-1, *[1] * (value.ndim - 1)), new[name], value)
        for name, value in whole.as_dict().items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the others are what they were
        layer.params = type(whole)(**fields)


def duplicates_of(layer: Any) -> tuple[Duplicate, ...]:
    """The duplicates of a Gabor layer alone, which cost little more than its kernels."""
    kernels = layer.weight.detach()
    members = kernels.reshape(layer.n_filters, -1, *kernels.shape[1:])
    dead = _is_dead(members.flatten(1).norm(dim=1))
    return _duplicates(members, dead, any_phase=layer.output == "energy")


def _params_of(layer: nn.Module, kernels: Tensor) -> tuple[Gabor, Tensor]:
    """The filters' record ``(filters, channels)``, and which filters it describes."""
    if isinstance(layer, GABOR_LAYERS):
        params: Gabor = layer.params
        params = params.detach().to(torch.float64).expand()
        return params, torch.ones(len(params), dtype=torch.bool, device=params.device)
    result = fit(kernels, n_dims=kernels.ndim - 2, geometry="filter")
    return result.params.expand(), result.converged.to(kernels.device)


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


def _widths(params: Gabor) -> tuple[Tensor, Tensor]:
    """Standard deviations along the wave vector and across it, px."""
    ratio = params.as_dict().get("aspect_ratio", torch.ones_like(params.sigma))
    return params.sigma, params.sigma / ratio


def _kind(params: Gabor, heard: Tensor, sizes: tuple[int, ...]) -> str:
    """What a filter ``(channels,)`` has become, judged by its loudest channels."""
    along, across = (width[heard] for width in _widths(params))
    if bool((torch.maximum(along, across) < _POINT).all()):
        return "point"
    if bool((torch.minimum(along, across) > max(sizes)).all()):
        return "plane wave"
    if bool(((along / across > _STRETCHED) | (across / along > _STRETCHED)).all()):
        return "stretched"
    cycles = along / params.wavelength[heard]
    # With so few of them the odd part is this much smaller than the even one.
    even = params.amplitude[heard] * params.phase[heard].cos()
    odd = params.amplitude[heard] * params.phase[heard].sin() * math.sqrt(2) * math.pi * cycles
    few = bool((2 * cycles < _BLOB).all())
    return "blob" if few and bool(even.square().sum() > odd.square().sum()) else ""


def _duplicates(members: Tensor, dead: Tensor, *, any_phase: bool) -> tuple[Duplicate, ...]:
    flat = members.flatten(1)
    flat = torch.where(dead[:, None], 0.0, flat)
    unit = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-30)
    cosine = unit @ unit.T
    if any_phase:
        even, odd = (unit.unflatten(1, (2, -1))[:, i] for i in (0, 1))
        cosine = torch.hypot(cosine, even @ odd.T - odd @ even.T)
    pairs = (cosine.abs().triu(1) > _SAME).nonzero().tolist()
    return tuple(Duplicate(i, j, cosine[i, j].item()) for i, j in pairs)


def _leak(members: Tensor) -> Tensor:
    """Each filter's sums over pixels, against the sums of magnitudes; the leakier member's."""
    pixels = members.flatten(3)
    sums = pixels.sum(-1).abs().sum(-1)
    return (sums / pixels.abs().sum((-1, -2)).clamp_min(1e-300)).amax(1)


def _displacement(
    layer: nn.Module, params: Gabor, start: Gabor | None, members: Tensor
) -> tuple[dict[str, Tensor], Tensor | None]:
    if start is None:
        return {}, None
    if isinstance(layer, GABOR_LAYERS):
        before = copy.deepcopy(layer).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the caller has seen them
            before.params = start
        start, kernels = before.params.detach(), before.weight.reshape(members.shape)
    else:
        start = start.detach().to(params.sigma)
        kernels = gabor(start.expand(), tuple(members.shape[3:])).reshape(members.shape)
    distance = (members - kernels).flatten(1).norm(dim=1)
    size = kernels.flatten(1).norm(dim=1).clamp_min(1e-300)
    return params.difference(start.expand()), distance / size


def _remedies(
    layer: Any,
    name: str,
    params: Gabor,
    dead: list[int],
    redundant: list[int],
    degenerate: list[int],
    truncated: Tensor,
) -> dict[str, str]:
    def begin_again(filters: list[int]) -> str:
        return (
            "from gaborium.diagnostics import reseed\n"
            f"reseed(module.get_submodule({name!r}), {filters}, seed=0)\n"
            "if optimizer is not None:\n    optimizer.state.clear()\n"
        )

    above = "layer.params.replace(wavelength=layer.params.wavelength.clamp_min(2.2))"
    remedies = {
        "dead filters": begin_again(dead),
        "degenerate filters": begin_again(degenerate),
        "aliased wavelength": rebuilding_code(layer, name, min_wavelength="2.0", start=above),
        "DC leak": rebuilding_code(layer, name, dc="'remove'"),
    }
    if redundant:
        remedies["duplicate filters"] = begin_again(redundant)
    if bool(truncated.any()):
        cut = params[truncated.nonzero().flatten()]
        sizes = [
            # A size of the same parity, so that the output keeps its size and place.
            min(new + (new - old) % 2, 3 * old) if new > old > 1 else old
            for new, old in zip(suggest_kernel_size(cut, 2.0), layer.kernel_size, strict=True)
        ]
        changes = {"kernel_size": repr(tuple(sizes))}
        if not isinstance(layer.padding, str):
            grown = zip(layer.padding, layer.dilation, sizes, layer.kernel_size, strict=True)
            changes["padding"] = repr(tuple(p + d * (new - old) // 2 for p, d, new, old in grown))
        remedies["truncated envelope"] = rebuilding_code(layer, name, **changes)
    return remedies


def _indices(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()
