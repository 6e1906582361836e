"""Where searches start: the best of a dictionary of round Gabor functions, all compared at once.

For an envelope E, the inner products of a target with ``E cos 2πk·u`` and ``E sin 2πk·u`` for all
wave vectors k are a product with one matrix. With the 2 x 2 matrix of the pair's own inner
products, which does not depend on the target, they give the power that the pair explains. The best
pairs are stretched in both directions, and compared again.
"""

from __future__ import annotations

import itertools
import math
from functools import cached_property

import torch
from torch import Tensor

from gaborium.fitting.model import GaborModel
from gaborium.fitting.solver import Target, likeliest, misfits, rows_at, without_offset
from gaborium.functions.kernels import offsets

# A round window of width s finds envelopes of these (σ / s, γ): round, longer, wider.
_SHAPES = ((1.0, 1.0), (0.7, 0.5), (0.55, 0.3), (1.2, 1.6))
_EXTREME_SHAPES = ((2.0, 3.0), (4.0, 8.0))  # waves along a line; tried in a thorough search only
_N_WIDTHS = 5
_N_STRETCHED, _N_STRETCHED_THOROUGH = 3, 10  # round waves that are stretched
_MIN_FOR_RANDOM = 24  # starts from which on a quarter of them is drawn at random
_DRAWS_PER_START = 50  # random geometries, of which the best are taken
_N_TURNED = 2  # of the best waves, how many are tried in other directions


class _Windows:
    """Round windows of one width at several centres, and the waves that are tried in them."""

    def __init__(
        self, model: GaborModel, width: float, like: Tensor, covariance: Tensor | None
    ) -> None:
        axes = []
        for size in reversed(model.sizes):
            reach = size / 4 if model.free_center else 0.0
            n = math.ceil(reach / (1.5 * width))
            axes.append([reach * i / max(n, 1) for i in range(-n, n + 1)])
        # A narrow window and an axis of few pixels have wide spectra: a coarser grid is enough.
        steps = [max(0.5 / size, 0.1 / width) for size in model.sizes]
        self.width, self.covariance = width, covariance
        self.centers = torch.tensor(list(itertools.product(*axes))).to(like)  # (centres, d)
        self.k = _wave_vectors(model, steps).to(like)  # (K, d)
        in_steps = self.k / torch.tensor(steps[::-1]).to(like)
        # Waves, and centres, that share a peak.
        self.near = torch.cdist(in_steps, in_steps) < 1.9
        self.close = torch.cdist(self.centers, self.centers) < 2.0 * width
        u = offsets(model.sizes, like.dtype, like.device)
        envelope = (-0.5 * (u - self.centers.unsqueeze(-1)).square().sum(1) / width**2).exp()
        angle = 2 * math.pi * self.k @ u
        waves = torch.stack([angle.cos(), angle.sin()])
        # Windows times cosine and times sine, (2, centres · K, pixels).
        self.pairs = (waves.unsqueeze(1) * envelope.unsqueeze(1)).flatten(1, 2)

    @cached_property
    def duals(self) -> Tensor:
        """Two rows per pair, whose squared products with a target are the power it explains.

        ``(channels or 1, 2 · centres · K, pixels)``
        """
        pairs, n, rows = self.pairs, self.pairs.shape[-1], []
        blocks: list[Tensor | None] = [None]
        if self.covariance is not None:
            parts = [slice(i, i + n) for i in range(0, len(self.covariance), n)]
            blocks = [self.covariance[part, part] for part in parts]
        for block in blocks:
            seen = pairs if block is None else pairs @ block.to(pairs)
            a, b = (pairs * seen).sum(-1)
            c = (pairs[0] * seen[1]).sum(-1)
            rest = torch.stack([pairs[0], pairs[1] - pairs[0] * (c / a).unsqueeze(-1)])
            rows.append((rest * torch.stack(_inverse_lengths(a, b, c)).unsqueeze(-1)).flatten(0, 1))
        return torch.stack(rows)

    def explained(self, target: Target, cross: Tensor) -> Tensor:
        """Power that each pair explains, summed over channels: ``(batch, centres · K)``."""
        if target.weight is None:
            inside = cross.transpose(0, 1) @ self.duals.mT  # (channels, batch, 2 · centres · K)
            return inside.square_().sum(0).unflatten(-1, (2, -1)).sum(1)
        # Weights differ between problems, and so do the pairs' lengths.
        cos, sin = self.pairs
        weight = target.weight.square()
        a, b, c = (weight @ (one * other).mT for one, other in ((cos, cos), (sin, sin), (cos, sin)))
        x, y = cross @ cos.mT, cross @ sin.mT
        first, second = _inverse_lengths(a, b, c)
        return ((x * first).square() + ((y - x * c / a) * second).square()).sum(1)


class StartGrid:
    """All round Gabor functions on a grid of wave vectors, widths and centres.

    It computes in the dtype and on the device of ``like``; ``covariance`` is the metric, if it is a
    matrix ``(channels · pixels,) * 2``.
    """

    def __init__(self, model: GaborModel, like: Tensor, covariance: Tensor | None = None) -> None:
        self.model, self.dtype = model, like.dtype
        sizes = [size for size in model.sizes if size > 1] or [1]
        narrow, wide = max(0.4, min(sizes) / 14), max(sizes) / 2
        widths = [narrow * (wide / narrow) ** (i / (_N_WIDTHS - 1)) for i in range(_N_WIDTHS)]
        self._windows = [_Windows(model, width, like, covariance) for width in widths]

    def starts(self, target: Target, *, n_starts: int, thorough: bool) -> Tensor:
        """The most promising geometries of each problem, best first: ``(batch, n, columns)``.

        If ``thorough``, more round waves are stretched into more shapes, and the best ones are
        tried in other directions too.
        """
        cross = target.project(without_offset(target, self.model), self.model.n_channels)
        rows, worth = [], []
        n_kept = max(_N_STRETCHED_THOROUGH, n_starts) if thorough else _N_STRETCHED
        n_peaks = max(2, math.ceil(n_kept / len(self._windows)))
        for windows in self._windows:
            table = windows.explained(target, cross)  # (batch, centres · K)
            for _ in range(n_peaks):
                power, best = table.max(-1)
                at, wave = best // len(windows.k), best % len(windows.k)
                rows.append(_rows(self.model, windows.k[wave], windows.width, windows.centers[at]))
                worth.append(power)
                near = windows.close[at].unsqueeze(-1) & windows.near[wave].unsqueeze(-2)
                table = table.masked_fill(near.flatten(1), -torch.inf)
        kept = torch.stack(worth, 1).topk(min(n_kept, len(worth))).indices
        best = rows_at(torch.stack(rows, 1), kept)
        shapes: tuple[tuple[float, float], ...] = _SHAPES + (_EXTREME_SHAPES if thorough else ())
        if self.model.columns["aspect_ratio"] not in self.model.free:
            shapes = _SHAPES[:1]
        z = torch.stack([_shaped(self.model, best, shape) for shape in shapes], 2)
        cost = misfits(target, self.model, z)
        # Every wave in its best shape comes before any in its second best, since other waves lead
        # elsewhere.
        again = cost > cost.amin(-1, keepdim=True)
        cost = (cost + again * cost.amax((1, 2), keepdim=True)).flatten(1)
        z = z.flatten(1, 2)
        if thorough and self.model.n_dims > 1:
            near_blobs = _turned(self.model, best[:, :_N_TURNED])
            z = torch.cat([z, near_blobs], 1)
            cost = torch.cat([cost, misfits(target, self.model, near_blobs)], 1)
        n_drawn = n_starts // 4 if thorough and n_starts >= _MIN_FOR_RANDOM else 0
        best = rows_at(z, cost.topk(min(n_starts - n_drawn, z.shape[1]), largest=False).indices)
        if n_drawn == 0:
            return best
        drawn = self._random(_DRAWS_PER_START * n_drawn, best).expand(len(best), -1, -1)
        return torch.cat([best, likeliest(target, self.model, drawn, n_drawn)], 1)

    def _random(self, n: int, like: Tensor) -> Tensor:
        """Random geometries, the same for all problems, ``(n, columns)``."""
        model, columns = self.model, self.model.columns
        low, high = model.bounds(like)
        z = torch.rand(n, len(low), generator=torch.Generator().manual_seed(0)).to(like)
        for name in model.angle_names:
            z[:, columns[name]] *= math.pi
        rest = slice(columns["frequency"], None)
        z[:, rest] = low[rest] + z[:, rest] * (high - low)[rest]
        for i in range(columns["aspect_ratio"], len(low)):
            if i not in model.free:
                z[:, i] = 0.0
        return z

    @property
    def size(self) -> int:
        """How many round Gabor functions are compared."""
        return sum(windows.pairs.shape[1] for windows in self._windows)


def _inverse_lengths(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse lengths of the cosine and of the part of the sine that is orthogonal to it.

    From their squared lengths a, b and inner product c. A sine of zero gets length infinity.
    """
    rest = b - c.square() / a
    return a.rsqrt(), torch.where(rest > 1e-6 * a, rest, torch.inf).rsqrt()


def _wave_vectors(model: GaborModel, steps: list[float]) -> Tensor:
    """Half of the wave vectors up to 0.5 cycles/px, on a grid of these steps along the axes."""
    axes = []
    for size, step in zip(model.sizes, steps, strict=True):
        n = math.floor(0.5 / step + 1e-9) if size > 1 else 0
        axes.append(torch.arange(-n, n + 1, dtype=torch.float64) * step)
    grid = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], -1)
    k = grid.flip(-1)  # x first
    # k and -k are the same wave: keep the one whose last non-zero component is positive.
    order = torch.tensor([1e-3**i for i in range(k.shape[-1])], dtype=k.dtype)
    return k[((k.sign() * order).sum(-1) >= 0) & (k.norm(dim=-1) <= 0.5 + 1e-9)]


def _rows(model: GaborModel, k: Tensor, width: float, center: Tensor) -> Tensor:
    columns = model.columns
    z = k.new_zeros(len(k), columns["center"] + model.n_dims)
    if model.n_dims > 1:
        z[:, columns["orientation"]] = torch.atan2(k[:, 1], k[:, 0])
    if model.n_dims == 3:
        z[:, columns["elevation"]] = torch.atan2(k[:, 2], k[:, :2].norm(dim=-1))
    frequency = k[:, 0] if model.n_dims == 1 else k.norm(dim=-1)
    # At frequency zero the misfit is even in it, and its gradient zero.
    least = 0.5 / (2 * math.pi * width)
    z[:, columns["frequency"]] = torch.where(frequency.abs() < least, least, frequency)
    z[:, columns["sigma"]] = math.log(width)
    z[:, columns["center"] :] = center
    return z


def _shaped(model: GaborModel, z: Tensor, shape: tuple[float, float]) -> Tensor:
    scale, ratio = shape
    z = z.clone()
    if model.columns["aspect_ratio"] in model.free:
        z[..., model.columns["sigma"]] += math.log(scale)
        z[..., model.columns["aspect_ratio"]] = math.log(ratio)
    return z


def _turned(model: GaborModel, z: Tensor) -> Tensor:
    """Narrow across, and in four directions: ``(batch, 4 · waves, columns)``.

    A wave that hardly turns within its envelope makes the kernel narrower along itself. If the
    envelope is narrow across, the kernel is nearly round, and its spectrum does not show the wave's
    direction.
    """
    z = _shaped(model, z, _SHAPES[-1]).repeat(1, 4, 1)
    turns = torch.arange(4, device=z.device).repeat_interleave(z.shape[1] // 4)
    z[..., model.columns["orientation"]] += turns * math.pi / 4
    return z
