"""What a kernel may be instead of one Gabor function: two of them, or a centre with a surround.

Both are models for the same solver. A kernel that one of them explains better, beyond what its
further parameters and chance would give, is not called a Gabor function, however much of it one
explains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium.fitting.solver import Family, Model, Sampled, Target, kernels_of, misfit
from gaborium.kernels import direction_and_slopes, offsets

_WAVES = 9  # of which any two may be a plaid
_RATIOS = (1.2, 2.0, 4.0, 7.0)  # of a surround's width to its centre's
_IN_COMMON = 0.7  # correlation of two amplitude spectra from which they are not two
_PARALLEL = math.cos(math.radians(30.0))  # of two directions, from which waves do not cross


@dataclass(frozen=True)
class TwoGabors:
    """The sum of two members of a family; rows of z are those of the two side by side."""

    one: Family

    @property
    def sizes(self) -> tuple[int, ...]:
        """Pixels along each axis."""
        return self.one.sizes

    @property
    def n_channels(self) -> int:
        """Kernels that share their geometries."""
        return self.one.n_channels

    @property
    def offset(self) -> bool:
        """Whether a constant is added to every kernel."""
        return self.one.offset

    @property
    def width(self) -> int:
        """Columns of one of the two."""
        return self.one.columns["center"] + self.one.n_dims

    @property
    def free(self) -> list[int]:
        """Columns of z that are searched."""
        return [*self.one.free, *(self.width + i for i in self.one.free)]

    @property
    def n_coefficients(self) -> int:
        """Numbers per channel that multiply kernels, and the offset."""
        return 4 + self.offset

    @property
    def n_parameters(self) -> int:
        """Numbers that a fit chooses: geometry and coefficients."""
        return len(self.free) + self.n_coefficients * self.n_channels

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Legal range of each column."""
        low, high = self.one.bounds(like)
        return low.repeat(2), high.repeat(2)

    def starts(self, target: Target, z: Tensor, waves: Tensor, n_starts: int) -> Tensor:
        """The most promising pairs of each problem, ``(batch, n_starts, columns)``.

        One Gabor function beside the likeliest wave in what it leaves; any two likely waves; and
        two that cross where the one lies between them, as it does between two of equal strength.

        Args:
            target: in the metric's coordinates.
            z: the best one, ``(batch, columns of one)``.
            waves: the likeliest in what it leaves, and then the likeliest of all, best first:
                ``(batch, waves, columns of one)``.
            n_starts: how many are wanted.
        """
        n = min(waves.shape[1], 1 + _WAVES)
        pairs = [(z, waves[:, 0])]
        pairs += [(waves[:, i], waves[:, j]) for i in range(1, n) for j in range(i + 1, n)]
        between, columns = [], self.one.columns
        for turn in (0.4, 0.7):  # rad, to both sides
            turned = z[:, None].repeat(1, 2, 1)
            turned[..., columns["orientation"]] += turn * turned.new_tensor([1.0, -1.0])
            turned[..., columns["aspect_ratio"]] = 0.0
            between.append(turned.flatten(1))
        likely = torch.stack([torch.cat(pair, 1) for pair in pairs], 1)
        likely = likeliest(self, target, likely, max(1, n_starts - len(between)))
        return torch.cat([likely, torch.stack(between, 1)], 1)

    def at(self, z: Tensor) -> _Both:
        """Its kernels for geometries ``(batch, columns)``."""
        first, second = z.split(self.width, dim=1)
        return _Both(self.one.at(first), self.one.at(second))


class _Both(NamedTuple):
    first: Sampled
    second: Sampled

    @property
    def parts(self) -> Tensor:
        return torch.cat([self.first.parts, self.second.parts], 1)

    def moves(self, coefficients: Tensor) -> Tensor:
        first, second = coefficients[..., :2], coefficients[..., 2:4]
        return torch.cat([self.first.moves(first), self.second.moves(second)], 2)


@dataclass(frozen=True)
class CentreSurround:
    """The difference of two round Gaussians about one centre, wherever that lies.

    A row of z is ``(center..., log σ, log of the surround's σ over the centre's)``.
    """

    sizes: tuple[int, ...]
    n_channels: int
    offset: bool = False

    @property
    def free(self) -> list[int]:
        """Columns of z that are searched."""
        return list(range(len(self.sizes) + 2))

    @property
    def n_coefficients(self) -> int:
        """Numbers per channel that multiply kernels, and the offset."""
        return 2 + self.offset

    @property
    def n_parameters(self) -> int:
        """Numbers that a fit chooses: geometry and coefficients."""
        return len(self.free) + self.n_coefficients * self.n_channels

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Legal range of each column."""
        middle = [max(size / 2, 0.5) for size in reversed(self.sizes)]
        low = [*(-m for m in middle), math.log(0.2), math.log(1.05)]
        high = [*middle, math.log(max(self.sizes)), math.log(10.0)]
        both = torch.tensor([low, high], dtype=torch.float64).to(like)
        return both[0], both[1]

    def at(self, z: Tensor) -> _Rings:
        """Its kernels for geometries ``(batch, columns)``."""
        d = len(self.sizes)
        away = offsets(self.sizes, z.dtype, z.device) - z[:, :d, None]  # (batch, d, pixels)
        scale = torch.stack([z[:, d], z[:, d] + z[:, d + 1]], 1).mul(-2).exp()
        square = away.square().sum(1, keepdim=True) * scale.unsqueeze(-1)  # (batch, 2, pixels)
        return _Rings((-0.5 * square).exp(), square, away, scale)

    def starts(self, target: Target, near: Tensor) -> Tensor:
        """The most promising geometry for each of some ratios, ``(batch, ratios, columns)``.

        Args:
            target: in the metric's coordinates.
            near: kernels whose peak may be the centre, ``(batch, several, pixels)``.
        """
        u = offsets(self.sizes, near.dtype, near.device)
        centers = u.T[near.abs().argmax(-1)]  # (batch, several, d)
        widest = max(self.sizes) / 3
        widths = [math.log(0.6 * (widest / 0.6) ** (i / 4)) for i in range(5)]
        rows = []
        for ratio in _RATIOS:
            shapes = near.new_tensor([(width, math.log(ratio)) for width in widths])
            table = shapes.repeat(centers.shape[1], 1).expand(len(near), -1, -1)
            z = torch.cat([centers.repeat_interleave(len(widths), 1), table], -1)
            rows.append(likeliest(self, target, z, 1))
        return torch.cat(rows, 1)


class _Rings(NamedTuple):
    parts: Tensor  # centre and surround, (batch, 2, pixels)
    square: Tensor  # squared distance in standard deviations of each, (batch, 2, pixels)
    away: Tensor  # offset from the centre, px, (batch, d, pixels)
    scale: Tensor  # 1/σ² of each, (batch, 2)

    def moves(self, coefficients: Tensor) -> Tensor:
        weighted = coefficients[..., :2].unsqueeze(-1) * self.parts.unsqueeze(1)  # (B, C, 2, N)
        of_center = (weighted * self.scale[:, None, :, None]).sum(2, keepdim=True)
        wider = weighted * self.square.unsqueeze(1)
        return torch.cat(
            [of_center * self.away.unsqueeze(1), wider.sum(2, keepdim=True), wider[:, :, 1:]], 2
        )


def likeliest(model: Model, target: Target, z: Tensor, n: int) -> Tensor:
    """Of geometries ``(batch, several, columns)`` those of least misfit, best first."""
    several = z.shape[1]
    cost = misfit(target.repeat(several), model, z.flatten(0, 1)).reshape(-1, several)
    best = cost.topk(min(n, several), largest=False).indices
    return z.gather(1, best.unsqueeze(-1).expand(-1, -1, z.shape[-1]))


def crossing(model: TwoGabors, z: Tensor, coefficients: Tensor) -> Tensor:
    """Power of the weaker of two crossing waves as a share of the stronger: ``(batch,)``.

    Zero where they do not cross. Two waves in one direction are parts of one whose envelope is no
    Gaussian, and of two whose spectra have much in common one is there to mend the other.
    """
    family, rows = model.one, z.split(model.width, dim=1)
    axes = tuple(range(-len(model.sizes), 0))
    padded = [2 * size for size in model.sizes]
    powers, spectra, directions = [], [], []
    for row, own in zip(rows, (coefficients[..., :2], coefficients[..., 2:4]), strict=True):
        kernels = kernels_of(family, row, own)
        powers.append(kernels.square().sum((-2, -1)))
        spectrum = torch.fft.rfftn(kernels.unflatten(-1, model.sizes), s=padded, dim=axes)
        spectra.append(spectrum.abs().flatten(1))
        directions.append(_directions(family, row))
    in_common = F.cosine_similarity(spectra[0], spectra[1], dim=1)
    parallel = (directions[0] * directions[1]).sum(-1).abs()
    cross = (in_common < _IN_COMMON) & (parallel < _PARALLEL)
    share = torch.minimum(*powers) / torch.maximum(*powers).clamp_min(1e-30)
    return torch.where(cross, share, 0.0)


def _directions(family: Family, z: Tensor) -> Tensor:
    """Unit wave vectors ``(batch, d)`` of rows of z."""
    angles = {name: z[:, family.columns[name]] for name in family.angle_names}
    return direction_and_slopes(angles, z[:, 0])[0]


def is_better(model: Model, cost: Tensor, than: Model, other: Tensor, n_data: Tensor) -> Tensor:
    """Whether a model's misfit is better than another's beyond doubt: ``(batch,)``.

    By the Bayesian information criterion, of which a difference of 10 is called very strong; fewer
    parameters earn no bonus, as there are many more models that chance could favour.

    Reference:
        Kass and Raftery (1995), J. Am. Stat. Assoc. 90(430), doi:10.1080/01621459.1995.10476572.
    """
    least = torch.finfo(cost.dtype).tiny
    gain = n_data * (other.clamp_min(least) / cost.clamp_min(least)).log()
    return gain > max(0, model.n_parameters - than.n_parameters) * n_data.log() + 10.0
