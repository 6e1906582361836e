"""What else explains kernels: a Gaussian, a centre with its surround, two crossing waves.

``fit`` says which Gabor function is nearest, and whether something else is nearer. Here it is said
how near: each of these models is searched for like a Gabor function, with a geometry that channels
share, and its explained variance stands beside that of the Gabor function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gaborium.fitting.alternatives import CentreSurround, TwoGabors, crossing, likeliest
from gaborium.fitting.result import FitResult
from gaborium.fitting.search import Search
from gaborium.fitting.solver import (
    Family,
    Model,
    Sampled,
    Solution,
    Target,
    kernels_of,
    residual,
)
from gaborium.fitting.start import StartGrid
from gaborium.kernels import offsets

_TOLERANCE = 1e-4  # explained variances need no more
_STEPS = 60
_PAIRS = 6  # of waves that are followed together
_WAVES = 6
_BLOBS = 3  # starts of a Gaussian that are followed
_STRETCHES = (1.0, 0.4, 2.5)  # of a Gaussian's two widths


@dataclass(frozen=True)
class Rivals:
    """Explained variances ``(filters,)`` of other models than one Gabor function.

    Args:
        blob: of one Gaussian, round or elongated, with an amplitude per channel.
        surround: of the difference of two round Gaussians about one centre; as much as ``blob``
            explains in 1-D, where it is a Gabor function.
        two_waves: of two Gabor functions; as much as the one explains in 1-D.
        crossing: power of the weaker of these two as a share of the stronger; 0 where they do not
            cross.
        ring: how strong the surround is beside its centre: in the pattern that most of the
            channels' fits have in common, the norm over pixels of the weaker sign as a share of
            that of the stronger; 0 in 1-D.
    """

    blob: Tensor
    surround: Tensor
    two_waves: Tensor
    crossing: Tensor
    ring: Tensor


@dataclass(frozen=True)
class _Blob:
    """One Gaussian: the even half of the still family."""

    family: Family

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.family.sizes

    @property
    def n_channels(self) -> int:
        return self.family.n_channels

    @property
    def offset(self) -> bool:
        return False

    @property
    def free(self) -> list[int]:
        return self.family.free

    @property
    def n_coefficients(self) -> int:
        return 1

    @property
    def n_parameters(self) -> int:
        return len(self.free) + self.n_channels

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.family.bounds(like)

    def at(self, z: Tensor) -> _Even:
        return _Even(self.family.at(z))

    def starts(self, target: Target, peaks: Tensor) -> Tensor:
        """The likeliest geometries about some centres ``(batch, several, d)``."""
        d, columns = self.family.n_dims, self.family.columns
        widest = max(self.sizes) / 2
        rows = []
        for i in range(5):
            for stretch in _STRETCHES if d > 1 else (1.0,):
                for turn in range(4) if stretch == _STRETCHES[1] else (0,):
                    row = [0.0] * columns["center"]
                    if d > 1:
                        row[columns["orientation"]] = turn * math.pi / 4
                    row[columns["sigma"]] = math.log(0.5 * (widest / 0.5) ** (i / 4))
                    row[columns["aspect_ratio"]] = math.log(stretch)
                    rows.append(row)
        shapes = peaks.new_tensor(rows)
        n = peaks.shape[1]
        z = torch.cat(
            [
                shapes.repeat(n, 1).expand(len(peaks), -1, -1),
                peaks.repeat_interleave(len(shapes), 1),
            ],
            -1,
        )
        return likeliest(self, target, z, _BLOBS)


class _Even(NamedTuple):
    pair: Sampled

    @property
    def parts(self) -> Tensor:
        return self.pair.parts[:, :1]

    def moves(self, coefficients: Tensor) -> Tensor:
        even = coefficients[..., :1]
        return self.pair.moves(torch.cat([even, torch.zeros_like(even)], -1))


@torch.no_grad()
def rivals(kernels: Tensor, result: FitResult, *, n_dims: int = 2) -> Rivals:
    """How much of kernels other models explain.

    Args:
        kernels: ``(filters, channels, *kernel_size)``, as for ``fit`` with ``geometry="filter"``.
        result: what it returned, with ``center=True``. Filters that are bad input get 0.
        n_dims: spatial dimensions of a kernel.

    Returns:
        Explained variances, in float64.
    """
    sizes = tuple(kernels.shape[-n_dims:])
    y = kernels.detach().double().flatten(2)
    n, channels = y.shape[:2]
    good = (y.isfinite().all(-1).all(-1) & (y != 0).any(-1).any(-1)).nonzero().flatten()
    none = y.new_zeros(n)
    if len(good) == 0:
        return Rivals(none, none, none, none, none)
    y = y[good] / y[good].abs().amax((-2, -1), keepdim=True)
    y = y / y.square().sum((-2, -1), keepdim=True).sqrt()  # misfits are shares then
    target = Target(y)
    family = Family(sizes, channels, free_center=True)
    search = Search(StartGrid(family, y.new_empty(0)), 1, _STEPS, _TOLERANCE)
    z = _rows_of(family, result, good.tolist())

    def spread(values: Tensor) -> Tensor:
        return none.index_copy(0, good, values)

    u = offsets(sizes, y.dtype, y.device)
    loud = y.square().sum(1)
    near = torch.stack([loud, _smoothed(loud, sizes)], 1)
    middle = torch.zeros(len(y), 1, n_dims, dtype=y.dtype)
    peaks = torch.cat([u.T[near.argmax(-1)], middle], 1)
    blob = _Blob(replace(family, still=True))
    ends = _follow(search, blob, target, blob.starts(target, peaks))
    of_blob = 1 - ends.cost
    of_one = result.explained_variance.to(y)[good]
    if n_dims == 1:
        return Rivals(spread(of_blob), spread(of_blob), spread(of_one), none, none)
    rings = CentreSurround(sizes, channels)
    ends = _follow(search, rings, target, rings.starts(target, near.sqrt()))
    of_rings = 1 - ends.cost
    ring = weaker_sign(main_pattern(kernels_of(rings, ends.z, ends.coefficients)))
    pair = TwoGabors(family)
    left = target._replace(y=residual(target, family, z))
    beside = search.grid.starts(left, n_starts=1, closely=False)
    waves = search.grid.starts(target, n_starts=_WAVES, closely=True)
    starts = pair.starts(target, z, torch.cat([beside, waves], 1), _PAIRS)
    ends = _follow(search, pair, target, starts)
    crossed = crossing(pair, ends.z, ends.coefficients)
    of_two = torch.maximum(1 - ends.cost, of_one)
    return Rivals(spread(of_blob), spread(of_rings), spread(of_two), spread(crossed), spread(ring))


def _follow(search: Search, model: Model, target: Target, z: Tensor) -> Solution:
    owner = torch.arange(len(z), device=z.device).repeat_interleave(z.shape[1])
    ends = search.follow(target, z.flatten(0, 1), owner, _TOLERANCE, model)
    shaped = Solution(*(value.unflatten(0, z.shape[:2]) for value in ends))
    best = shaped.cost.argmin(1)
    return shaped.pick((torch.arange(len(best), device=best.device), best))


def _rows_of(family: Family, result: FitResult, chosen: list[int]) -> Tensor:
    """The solver's rows of what ``fit`` found."""
    params = result[chosen].params
    fields = params.as_dict()
    columns = [fields[name] for name in family.angle_names]
    columns += [params.frequency, params.sigma.log()]
    columns.append(fields["aspect_ratio"].log() if family.n_dims > 1 else 0 * params.sigma)
    flat = torch.stack([value.reshape(len(chosen)) for value in columns], -1)
    return torch.cat([flat, params.center.reshape(len(chosen), -1)], -1)


def _smoothed(values: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Means over three pixels along each axis."""
    shaped = values.unflatten(-1, sizes)
    for axis in range(-len(sizes), 0):
        if shaped.shape[axis] < 3:
            continue
        moved = shaped.movedim(axis, -1)
        moved = torch.nn.functional.pad(moved, (1, 1))
        shaped = (moved[..., :-2] + moved[..., 1:-1] + moved[..., 2:]).movedim(-1, axis) / 3
    return shaped.flatten(1)


def main_pattern(kernels: Tensor) -> Tensor:
    """The one pattern that explains most of all channels: ``(batch, channels, pixels)`` to pixels.

    Its sign means nothing.
    """
    return torch.linalg.svd(kernels, full_matrices=False).Vh[:, 0]


def weaker_sign(patterns: Tensor) -> Tensor:
    """Norm of the pixels of the weaker sign as a share of that of the stronger: ``(batch,)``."""
    both = torch.stack([patterns.clamp_min(0.0), patterns.clamp_max(0.0)], 1).norm(dim=-1)
    return both.amin(1) / both.amax(1).clamp_min(1e-300)
