"""Where to begin: the best of many Gabor functions, all compared at once by windowed spectra.

For an envelope E, the inner products of a target with ``E cos 2πk·u`` and ``E sin 2πk·u`` for all
wave vectors k are one Fourier transform of target times E. With the 2 x 2 matrix of the pair's own
inner products, which no target changes, they give what the pair explains: the exact misfit of
every round Gabor on the grid. The best ones are stretched in both directions, and compared again.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from gaborium.fitting.solver import Family, Target, misfit
from gaborium.kernels import offsets

# A round window of width s finds envelopes of these (σ / s, γ): longer, as they are, wider.
_SHAPES = ((1.0, 1.0), (0.7, 0.5), (0.55, 0.3), (1.2, 1.6))
_N_WINDOWS = 5
_PEAKS = 2  # wave vectors taken from each window
_KEPT = 10  # of all of them, how many are stretched


def starts(
    target: Target, cross: Tensor, covariance: Tensor | None, family: Family, n_starts: int
) -> Tensor:
    """The ``n_starts`` most promising geometries of each problem, best first.

    Args:
        target: targets in the metric's coordinates, for the comparison.
        cross: ``(batch, channels, pixels)`` inner products of the target with every pixel: the
            kernel itself, or the patches' covariance with the responses.
        covariance: the metric, ``(channels · pixels,) * 2``; ``None``: the identity.
        family: what is searched.
        n_starts: how many.

    Returns:
        ``(batch, n_starts, columns)`` rows of z.
    """
    u = offsets(family.sizes, cross.dtype, cross.device)
    k = _wave_vectors(family, cross)
    rows, worth = [], []
    for width, center in _windows(family):
        window = torch.exp(
            -0.5 * (u - torch.tensor(center).to(u).unsqueeze(-1)).square().sum(0) / width**2
        )
        explained = _explained(cross, covariance, window, k, u)
        for _ in range(_PEAKS):
            power, best = explained.max(-1)
            rows.append(_rows(family, k[best], width, center))
            worth.append(power)
            near = torch.cdist(k[best], k) < 1.0 / max(family.sizes)
            explained = explained.masked_fill(near, -torch.inf)
    kept = torch.stack(worth, 1).topk(min(_KEPT, len(worth))).indices
    z = _pick(torch.stack(rows, 1), kept)  # (batch, candidates, columns)
    z = _stretched(family, z)
    wide = Target(target.y.unsqueeze(1), target.root)
    cost = misfit(wide, family, z)
    chosen = cost.topk(min(n_starts, z.shape[1]), largest=False).indices
    return _pick(z, chosen)


def _pick(rows: Tensor, chosen: Tensor) -> Tensor:
    """Rows number ``chosen`` ``(batch, n)`` of ``(batch, rows, columns)``."""
    return rows.gather(1, chosen.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def _wave_vectors(family: Family, like: Tensor) -> Tensor:
    """Half of the wave vectors up to 0.5 cycles/px, twice as fine as the kernel resolves."""
    axes = [
        torch.arange(-size, size + 1).to(like) / (2 * size) if size > 1 else torch.zeros(1).to(like)
        for size in family.sizes
    ]
    grid = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], -1)
    k = grid.flip(-1)  # x first
    # k and -k are the same wave: keep the one whose last non-zero component is positive.
    order = torch.tensor([1e-3**i for i in range(k.shape[-1])]).to(like)
    return k[((k.sign() * order).sum(-1) >= 0) & (k.norm(dim=-1) <= 0.5)]


def _windows(family: Family) -> list[tuple[float, tuple[float, ...]]]:
    """Widths, each with the centres worth trying."""
    sizes = [size for size in family.sizes if size > 1] or [1]
    smallest, largest = max(0.4, min(sizes) / 14), max(sizes) / 2
    ratio = (largest / smallest) ** (1 / (_N_WINDOWS - 1))
    windows = []
    for width in (smallest * ratio**i for i in range(_N_WINDOWS)):
        axes = []
        for size in reversed(family.sizes):
            reach = size / 4 if family.free_center else 0.0
            n = math.ceil(reach / (1.5 * width))
            axes.append([reach * i / max(n, 1) for i in range(-n, n + 1)])
        windows += [(width, center) for center in itertools.product(*axes)]
    return windows


def _explained(
    cross: Tensor, covariance: Tensor | None, window: Tensor, k: Tensor, u: Tensor
) -> Tensor:
    """Power that the pair of wave vector k explains, summed over channels: ``(batch, k)``."""
    angle = 2 * math.pi * k @ u
    cos, sin = angle.cos() * window, angle.sin() * window  # (K, N)
    total = torch.zeros(len(cross), len(k), dtype=cross.dtype, device=cross.device)
    n_channels, n = cross.shape[1:]
    for channel in range(n_channels):
        here = slice(channel * n, (channel + 1) * n)
        seen_cos = cos if covariance is None else cos @ covariance[here, here]
        seen_sin = sin if covariance is None else sin @ covariance[here, here]
        a, b, c = (seen_cos * cos).sum(-1), (seen_sin * sin).sum(-1), (seen_cos * sin).sum(-1)
        x, y = cross[:, channel] @ cos.T, cross[:, channel] @ sin.T
        # With x, y along the pair's orthogonal directions; a lone sine of zero explains nothing.
        rest = b - c.square() / a
        part = (y - x * c / a).square() / torch.where(rest > 1e-6 * a, rest, torch.inf)
        total = total + x.square() / a + part
    return total


def _rows(family: Family, k: Tensor, width: float, center: tuple[float, ...]) -> Tensor:
    columns = family.columns
    z = k.new_zeros(len(k), columns["center"] + family.n_dims)
    if family.n_dims > 1:
        z[:, columns["orientation"]] = torch.atan2(k[:, 1], k[:, 0])
    if family.n_dims == 3:
        z[:, columns["elevation"]] = torch.atan2(k[:, 2], k[:, :2].norm(dim=-1))
    z[:, columns["frequency"]] = k[:, 0] if family.n_dims == 1 else k.norm(dim=-1)
    z[:, columns["sigma"]] = math.log(width)
    z[:, columns["center"] :] = torch.tensor(center).to(k)
    return z


def _stretched(family: Family, z: Tensor) -> Tensor:
    shapes = _SHAPES if family.n_dims > 1 and not family.isotropic else _SHAPES[:1]
    rows = []
    for scale, ratio in shapes:
        row = z.clone()
        row[..., family.columns["sigma"]] += math.log(scale)
        row[..., family.columns["aspect_ratio"]] = math.log(ratio)
        rows.append(row)
    return torch.cat(rows, 1)
