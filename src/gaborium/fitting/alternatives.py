"""Other models of a kernel: two Gabor functions, a centre with a surround, one Gaussian.

The solver searches them like a Gabor function. A kernel that one of the first two explains better,
beyond the effect of more parameters and of chance, is not called a Gabor function, however much of
it one explains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium.fitting.model import GaborModel, Model, Sampled
from gaborium.fitting.solver import Target, likeliest
from gaborium.functions.kernels import offsets

_N_WAVES = 9  # of which any two may be a plaid
_TURNS = (0.4, 0.7)  # rad, to both sides of a wave between two others
_RATIOS = (1.2, 2.0, 4.0, 7.0)  # of a surround's width to its centre's
_N_WIDTHS = 5  # of a centre or a blob that are tried
_STRETCHES = (1.0, 0.4, 2.5)  # aspect ratios of a blob that are tried
_N_BLOBS = 3  # starts of a blob
_MAX_SPECTRAL_OVERLAP = 0.7  # correlation of two amplitude spectra from which they are not two
_MAX_COSINE = math.cos(math.radians(30.0))  # of two directions, from which waves do not cross
_VERY_STRONG = 10.0  # difference of the Bayesian information criterion


class TwoGabors(Model):
    """The sum of two functions of the model ``one``; a row of z is their two rows side by side."""

    n_basis = 4

    def __init__(self, one: GaborModel) -> None:
        self.one = one
        self.sizes, self.n_channels, self.offset = one.sizes, one.n_channels, one.offset
        self.width = one.columns["center"] + one.n_dims

    @property
    def free(self) -> list[int]:
        """Columns of z that are searched."""
        return [*self.one.free, *(self.width + i for i in self.one.free)]

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest legal value of each column."""
        low, high = self.one.bounds(like)
        return low.repeat(2), high.repeat(2)

    def at(self, z: Tensor) -> Sampled:
        """Both pairs, and their Jacobian."""
        (first, by_first), (second, by_second) = map(self.one.at, z.split(self.width, dim=1))

        def jacobian(coefficients: Tensor) -> Tensor:
            return torch.cat(
                [by_first(coefficients[..., :2]), by_second(coefficients[..., 2:4])], 2
            )

        return torch.cat([first, second], 1), jacobian

    def starts(self, target: Target, z: Tensor, waves: Tensor, n_starts: int) -> Tensor:
        """The most promising pairs of each problem, ``(batch, n_starts, columns)``.

        Pairs are: one Gabor function and the likeliest wave in its residual; any two likely waves;
        and two that cross symmetrically about the one, which is between two of equal strength.
        ``z`` is the best single one, ``(batch, columns of one)``; ``waves`` are the likeliest in
        its residual, and then the likeliest of all, ``(batch, waves, columns of one)``.
        """
        n = min(waves.shape[1], 1 + _N_WAVES)
        pairs = [(z, waves[:, 0])]
        pairs += [(waves[:, i], waves[:, j]) for i in range(1, n) for j in range(i + 1, n)]
        between, columns = [], self.one.columns
        for turn in _TURNS:
            turned = z[:, None].repeat(1, 2, 1)
            turned[..., columns["orientation"]] += turn * turned.new_tensor([1.0, -1.0])
            turned[..., columns["aspect_ratio"]] = 0.0
            between.append(turned.flatten(1))
        likely = torch.stack([torch.cat(pair, 1) for pair in pairs], 1)
        likely = likeliest(target, self, likely, max(1, n_starts - len(between)))
        return torch.cat([likely, torch.stack(between, 1)], 1)


@dataclass(frozen=True)
class CenterSurround(Model):
    """The difference of two round Gaussians with one centre, which is free.

    A row of z is ``(center..., log σ, log of the surround's σ over the centre's)``.
    """

    sizes: tuple[int, ...]
    n_channels: int
    offset: bool = False

    @property
    def free(self) -> list[int]:
        """Columns of z that are searched."""
        return list(range(self.n_dims + 2))

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest legal value of each column."""
        middle = [max(size / 2, 0.5) for size in reversed(self.sizes)]
        low = [*(-m for m in middle), math.log(0.2), math.log(1.05)]
        high = [*middle, math.log(max(self.sizes)), math.log(10.0)]
        both = torch.tensor([low, high], dtype=torch.float64).to(like)
        return both[0], both[1]

    def at(self, z: Tensor) -> Sampled:
        """Centre and surround, and their Jacobian."""
        d = self.n_dims
        away = offsets(self.sizes, z.dtype, z.device) - z[:, :d, None]  # px, (batch, d, pixels)
        scale = torch.stack([z[:, d], z[:, d] + z[:, d + 1]], 1).mul(-2).exp()  # 1/σ² of each
        square = away.square().sum(1, keepdim=True) * scale.unsqueeze(-1)  # (batch, 2, pixels)
        basis = (-0.5 * square).exp()

        def jacobian(coefficients: Tensor) -> Tensor:
            weighted = coefficients[..., :2].unsqueeze(-1) * basis.unsqueeze(1)  # (B, C, 2, N)
            of_center = (weighted * scale[:, None, :, None]).sum(2, keepdim=True)
            wider = weighted * square.unsqueeze(1)
            of_ratio = wider[:, :, 1:]
            return torch.cat(
                [of_center * away.unsqueeze(1), wider.sum(2, keepdim=True), of_ratio], 2
            )

        return basis, jacobian

    def starts(self, target: Target, patterns: Tensor) -> Tensor:
        """The most promising geometry for each of some ratios, ``(batch, ratios, columns)``.

        The centre is at a peak of one of the patterns ``(batch, several, pixels)``.
        """
        u = offsets(self.sizes, patterns.dtype, patterns.device)
        centers = u.T[patterns.abs().argmax(-1)]  # (batch, several, d)
        widths = _log_widths(0.6, max(self.sizes) / 3)
        rows = []
        for ratio in _RATIOS:
            shapes = patterns.new_tensor([(width, math.log(ratio)) for width in widths])
            table = shapes.repeat(centers.shape[1], 1).expand(len(patterns), -1, -1)
            z = torch.cat([centers.repeat_interleave(len(widths), 1), table], -1)
            rows.append(likeliest(target, self, z, 1))
        return torch.cat(rows, 1)


class Gaussian(GaborModel):
    """One Gaussian, round or elongated: the even half of a model of ``zero_frequency``."""

    n_basis = 1

    def at(self, z: Tensor) -> Sampled:
        """The envelope, and its Jacobian."""
        basis, jacobian = super().at(z)

        def of_even(coefficients: Tensor) -> Tensor:
            even = coefficients[..., :1]
            return jacobian(torch.cat([even, torch.zeros_like(even)], -1))

        return basis[:, :1], of_even

    def starts(self, target: Target, centers: Tensor) -> Tensor:
        """The most promising geometries at some centres ``(batch, several, d)``."""
        columns, rows = self.columns, []
        for log_sigma in _log_widths(0.5, max(self.sizes) / 2):
            for stretch in _STRETCHES if self.n_dims > 1 else (1.0,):
                for turn in range(4) if stretch == _STRETCHES[1] else (0,):
                    row = [0.0] * columns["center"]
                    if self.n_dims > 1:
                        row[columns["orientation"]] = turn * math.pi / 4
                    row[columns["sigma"]] = log_sigma
                    row[columns["aspect_ratio"]] = math.log(stretch)
                    rows.append(row)
        shapes = centers.new_tensor(rows)
        table = shapes.repeat(centers.shape[1], 1).expand(len(centers), -1, -1)
        z = torch.cat([table, centers.repeat_interleave(len(shapes), 1)], -1)
        return likeliest(target, self, z, _N_BLOBS)


def _log_widths(narrow: float, wide: float) -> list[float]:
    steps = [i / (_N_WIDTHS - 1) for i in range(_N_WIDTHS)]
    return [math.log(narrow * (wide / narrow) ** step) for step in steps]


def crossing(model: TwoGabors, z: Tensor, coefficients: Tensor) -> Tensor:
    """Power of the weaker of two crossing waves as a share of the stronger: ``(batch,)``.

    Zero where they do not cross. Two waves in one direction are parts of one whose envelope is not
    a Gaussian, and of two with overlapping spectra one only corrects the other.
    """
    one, rows = model.one, z.split(model.width, dim=1)
    axes = tuple(range(-len(model.sizes), 0))
    padded = [2 * size for size in model.sizes]
    powers, spectra, directions = [], [], []
    for row, own in zip(rows, (coefficients[..., :2], coefficients[..., 2:4]), strict=True):
        kernels = own @ one.at(row)[0]
        powers.append(kernels.square().sum((-2, -1)))
        spectrum = torch.fft.rfftn(kernels.unflatten(-1, model.sizes), s=padded, dim=axes)
        spectra.append(spectrum.abs().flatten(1))
        directions.append(one.directions(row)[0])
    in_common = F.cosine_similarity(spectra[0], spectra[1], dim=1)
    parallel = (directions[0] * directions[1]).sum(-1).abs()
    cross = (in_common < _MAX_SPECTRAL_OVERLAP) & (parallel < _MAX_COSINE)
    share = torch.minimum(*powers) / torch.maximum(*powers).clamp_min(1e-30)
    return torch.where(cross, share, 0.0)


def is_better(model: Model, cost: Tensor, than: Model, other: Tensor, n_data: Tensor) -> Tensor:
    """Whether a model's misfit is better than another's beyond doubt: ``(batch,)``.

    By the Bayesian information criterion, where a difference of 10 counts as very strong. Fewer
    parameters earn no bonus, since there are many more models that chance could favour.

    Reference:
        Kass and Raftery (1995), J. Am. Stat. Assoc. 90(430), doi:10.1080/01621459.1995.10476572.
    """
    least = torch.finfo(cost.dtype).tiny
    gain = n_data * (other.clamp_min(least) / cost.clamp_min(least)).log()
    return gain > max(0, model.n_parameters - than.n_parameters) * n_data.log() + _VERY_STRONG
