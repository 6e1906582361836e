"""Where to begin: the best of many Gabor functions, all compared at once by windowed spectra.

For an envelope E, the inner products of a target with ``E cos 2πk·u`` and ``E sin 2πk·u`` for all
wave vectors k are one Fourier transform of target times E. With the 2 x 2 matrix of the pair's own
inner products, which no target changes, they give what the pair explains: for kernels, the misfit
of every round Gabor on the grid. The best are stretched in both directions, and compared again.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gaborium.fitting.solver import Family, Target, misfit, without_offset
from gaborium.kernels import offsets

# A round window of width s finds envelopes of these (σ / s, γ): longer, as they are, wider.
_SHAPES = ((1.0, 1.0), (0.7, 0.5), (0.55, 0.3), (1.2, 1.6))
_RARE = ((2.0, 3.0), (4.0, 8.0))  # and these, seldom: waves along a line
_N_WIDTHS = 5
_KEPT, _KEPT_CLOSELY = 3, 10  # round waves that are stretched, at a first look and at a closer one
_MANY = 24  # starts from which on a quarter of them is drawn at random
_DRAWN = 50  # geometries for each of these, of which the best are taken
_TURNED = 2  # of the best, how many are tried in other directions


@dataclass(frozen=True)
class _Windows:
    """Round windows of one width at several centres, and the waves to look for inside."""

    width: float
    centers: Tensor  # (centres, d)
    k: Tensor  # wave vectors, (K, d)
    near: Tensor  # which of them are one peak, (K, K)
    close: Tensor  # and which centres, (centres, centres)
    pairs: Tensor  # windows times cosine and times sine, (2, centres · K, pixels)
    covariance: Tensor | None

    @cached_property
    def duals(self) -> Tensor:
        """Orthonormal in the metric, ``(channels or 1, 2 · centres · K, pixels)``."""
        return _orthonormal(self.pairs, self.covariance)


class StartGrid:
    """All round Gabor functions on a grid of wave vectors, widths and centres.

    Args:
        family: what is searched.
        like: a tensor of the dtype and device to compute with.
        covariance: the metric, ``(channels · pixels,) * 2``; ``None``: a weight per pixel or none.
    """

    def __init__(self, family: Family, like: Tensor, covariance: Tensor | None = None) -> None:
        self.family, self.dtype = family, like.dtype
        sizes = [size for size in family.sizes if size > 1] or [1]
        narrow, wide = max(0.4, min(sizes) / 14), max(sizes) / 2
        widths = [narrow * (wide / narrow) ** (i / (_N_WIDTHS - 1)) for i in range(_N_WIDTHS)]
        self._windows = [_windows(family, width, like, covariance) for width in widths]

    def starts(self, target: Target, *, n_starts: int, closely: bool) -> Tensor:
        """The most promising geometries of each problem, best first.

        Args:
            target: targets in the metric's coordinates.
            n_starts: how many are wanted.
            closely: whether to stretch more of the round ones into more shapes, and to try the best
                ones in other directions, too.

        Returns:
            ``(batch, n_starts, columns)`` rows of z.
        """
        cross = target.seen_from(without_offset(target, self.family), self.family.n_channels)
        rows, worth = [], []
        n_kept = max(_KEPT_CLOSELY, n_starts) if closely else _KEPT
        n_peaks = max(2, math.ceil(n_kept / len(self._windows)))
        for windows in self._windows:
            table = _explained(windows, target, cross)  # (batch, centres · K)
            for _ in range(n_peaks):
                power, best = table.max(-1)
                at, wave = best // len(windows.k), best % len(windows.k)
                rows.append(_rows(self.family, windows.k[wave], windows.width, windows.centers[at]))
                worth.append(power)
                near = windows.close[at].unsqueeze(-1) & windows.near[wave].unsqueeze(-2)
                table = table.masked_fill(near.flatten(1), -torch.inf)
        kept = torch.stack(worth, 1).topk(min(n_kept, len(worth))).indices
        best = _pick(torch.stack(rows, 1), kept)
        shapes: tuple[tuple[float, float], ...] = _SHAPES + (_RARE if closely else ())
        if self.family.columns["aspect_ratio"] not in self.family.free:
            shapes = _SHAPES[:1]
        z = torch.stack([_shaped(self.family, best, shape) for shape in shapes], 2)
        cost = self._misfit(target, z)
        # Every wave in its best shape comes before any in its second best: they lead elsewhere.
        again = cost > cost.amin(-1, keepdim=True)
        cost = (cost + again * cost.amax((1, 2), keepdim=True)).flatten(1)
        z = z.flatten(1, 2)
        if closely and self.family.n_dims > 1:
            near_blobs = _turned(self.family, best[:, :_TURNED])
            z = torch.cat([z, near_blobs], 1)
            cost = torch.cat([cost, self._misfit(target, near_blobs)], 1)
        n_drawn = n_starts // 4 if closely and n_starts >= _MANY else 0
        best = _pick(z, cost.topk(min(n_starts - n_drawn, z.shape[1]), largest=False).indices)
        if n_drawn == 0:
            return best
        drawn = self._drawn(_DRAWN * n_drawn, best).expand(len(best), -1, -1)
        chosen = self._misfit(target, drawn).topk(n_drawn, largest=False).indices
        return torch.cat([best, _pick(drawn, chosen)], 1)

    def _drawn(self, n: int, like: Tensor) -> Tensor:
        """Geometries at random, the same for all problems, ``(n, columns)``."""
        family, columns = self.family, self.family.columns
        low, high = family.bounds(like)
        z = torch.rand(n, len(low), generator=torch.Generator().manual_seed(0)).to(like)
        for name in family.angle_names:
            z[:, columns[name]] *= math.pi
        rest = slice(columns["frequency"], None)
        z[:, rest] = low[rest] + z[:, rest] * (high - low)[rest]
        for i in range(columns["aspect_ratio"], len(low)):
            if i not in family.free:
                z[:, i] = 0.0
        return z

    def _misfit(self, target: Target, z: Tensor) -> Tensor:
        """Of several geometries ``(batch, *several, columns)`` for each problem."""
        several = z.shape[1:-1]
        return misfit(target.repeat(several.numel()), self.family, z.flatten(0, -2)).reshape(
            len(z), *several
        )

    @property
    def size(self) -> int:
        """How many round Gabor functions are compared."""
        return sum(windows.pairs.shape[1] for windows in self._windows)


def _windows(family: Family, width: float, like: Tensor, covariance: Tensor | None) -> _Windows:
    axes = []
    for size in reversed(family.sizes):
        reach = size / 4 if family.free_center else 0.0
        n = math.ceil(reach / (1.5 * width))
        axes.append([reach * i / max(n, 1) for i in range(-n, n + 1)])
    centers = torch.tensor(list(itertools.product(*axes))).to(like)
    # A narrow window has a wide spectrum, and so has an axis of few pixels: there is no need to
    # look at it as closely.
    steps = [max(0.5 / size, 0.1 / width) for size in family.sizes]
    k = _wave_vectors(family, steps).to(like)
    in_steps = k / torch.tensor(steps[::-1]).to(like)
    u = offsets(family.sizes, like.dtype, like.device)
    envelope = (-0.5 * (u - centers.unsqueeze(-1)).square().sum(1) / width**2).exp()
    angle = 2 * math.pi * k @ u
    waves = torch.stack([angle.cos(), angle.sin()])
    pairs = (waves.unsqueeze(1) * envelope.unsqueeze(1)).flatten(1, 2)  # (2, centres · K, N)
    return _Windows(
        width,
        centers,
        k,
        near=torch.cdist(in_steps, in_steps) < 1.9,
        close=torch.cdist(centers, centers) < 2.0 * width,
        pairs=pairs,
        covariance=covariance,
    )


def _orthonormal(pairs: Tensor, covariance: Tensor | None) -> Tensor:
    """Two rows for every pair whose squared products with a target are what it explains."""
    n, rows = pairs.shape[-1], []
    blocks: list[Tensor | None] = [None]
    if covariance is not None:
        parts = [slice(i, i + n) for i in range(0, len(covariance), n)]
        blocks = [covariance[part, part] for part in parts]
    for block in blocks:
        seen = pairs if block is None else pairs @ block.to(pairs)
        a, b = (pairs * seen).sum(-1)
        c = (pairs[0] * seen[1]).sum(-1)
        rest = torch.stack([pairs[0], pairs[1] - pairs[0] * (c / a).unsqueeze(-1)])
        rows.append((rest * torch.stack(_inverse_lengths(a, b, c)).unsqueeze(-1)).flatten(0, 1))
    return torch.stack(rows)


def _explained(windows: _Windows, target: Target, cross: Tensor) -> Tensor:
    """Power that each pair explains, summed over channels: ``(batch, centres · K)``."""
    if target.weight is None:
        inside = cross.transpose(0, 1) @ windows.duals.mT  # (channels, batch, 2 · centres · K)
        return inside.square_().sum(0).unflatten(-1, (2, -1)).sum(1)
    # Every pixel of every problem has a weight of its own, and every pair other lengths.
    cos, sin = windows.pairs
    weight = target.weight.square()
    a, b, c = (weight @ (one * other).mT for one, other in ((cos, cos), (sin, sin), (cos, sin)))
    x, y = cross @ cos.mT, cross @ sin.mT
    first, second = _inverse_lengths(a, b, c)
    return ((x * first).square() + ((y - x * c / a) * second).square()).sum(1)


def _inverse_lengths(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse lengths of the cosine, and of the sine's part that is orthogonal to it.

    From their squared lengths a, b and inner product c; a lone sine of zero explains nothing.
    """
    rest = b - c.square() / a
    return a.rsqrt(), torch.where(rest > 1e-6 * a, rest, torch.inf).rsqrt()


def _pick(rows: Tensor, chosen: Tensor) -> Tensor:
    """Rows number ``chosen`` ``(batch, n)`` of ``(batch, rows, columns)``."""
    return rows.gather(1, chosen.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def _wave_vectors(family: Family, steps: list[float]) -> Tensor:
    """Half of the wave vectors up to 0.5 cycles/px, on a grid of these steps along the axes."""
    axes = []
    for size, step in zip(family.sizes, steps, strict=True):
        n = math.floor(0.5 / step + 1e-9) if size > 1 else 0
        axes.append(torch.arange(-n, n + 1, dtype=torch.float64) * step)
    grid = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], -1)
    k = grid.flip(-1)  # x first
    # k and -k are the same wave: keep the one whose last non-zero component is positive.
    order = torch.tensor([1e-3**i for i in range(k.shape[-1])], dtype=k.dtype)
    return k[((k.sign() * order).sum(-1) >= 0) & (k.norm(dim=-1) <= 0.5 + 1e-9)]


def _rows(family: Family, k: Tensor, width: float, center: Tensor) -> Tensor:
    columns = family.columns
    z = k.new_zeros(len(k), columns["center"] + family.n_dims)
    if family.n_dims > 1:
        z[:, columns["orientation"]] = torch.atan2(k[:, 1], k[:, 0])
    if family.n_dims == 3:
        z[:, columns["elevation"]] = torch.atan2(k[:, 2], k[:, :2].norm(dim=-1))
    frequency = k[:, 0] if family.n_dims == 1 else k.norm(dim=-1)
    # A blob is a point of rest: the misfit is even in the frequency there.
    least = 0.5 / (2 * math.pi * width)
    z[:, columns["frequency"]] = torch.where(frequency.abs() < least, least, frequency)
    z[:, columns["sigma"]] = math.log(width)
    z[:, columns["center"] :] = center
    return z


def _shaped(family: Family, z: Tensor, shape: tuple[float, float]) -> Tensor:
    scale, ratio = shape
    z = z.clone()
    if family.columns["aspect_ratio"] in family.free:
        z[..., family.columns["sigma"]] += math.log(scale)
        z[..., family.columns["aspect_ratio"]] = math.log(ratio)
    return z


def _turned(family: Family, z: Tensor) -> Tensor:
    """Narrow across and in four directions: ``(batch, 4 · waves, columns)``.

    A wave that hardly turns within its envelope narrows the kernel along itself. If the envelope is
    narrow across, the whole is nearly round, and its spectrum does not tell the wave's direction.
    """
    z = _shaped(family, z, _SHAPES[-1]).repeat(1, 4, 1)
    turns = torch.arange(4, device=z.device).repeat_interleave(z.shape[1] // 4)
    z[..., family.columns["orientation"]] += turns * math.pi / 4
    return z
