"""Models that a fit can search: kernels are linear in coefficients, given a row of geometry.

The logarithm of a Gabor function's envelope is a quadratic polynomial of the pixel's offset, and
the carrier's angle a linear one. Their values at all pixels are products of a few numbers per
geometry with one matrix of monomials, and so are their derivatives. That makes it fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gaborium.functions.kernels import direction_and_slopes, offsets
from gaborium.functions.params import RECORDS, Gabor

# The basis ``(batch, n_basis, pixels)``, and a function from coefficients ``(batch, channels,
# n_basis or more)`` to the Jacobian of the kernels that they combine, by the free columns of z:
# ``(batch, channels, p, pixels)``.
Sampled = tuple[Tensor, Callable[[Tensor], Tensor]]


class Model:
    """Base of all models; a subclass has these attributes, ``free``, ``bounds`` and ``at``."""

    sizes: tuple[int, ...]  # pixels along each axis
    n_channels: int  # kernels that share a geometry
    offset: bool  # whether a constant, which is not returned, is added to every kernel
    n_basis = 2  # kernels that coefficients combine

    @property
    def free(self) -> list[int]:
        """Columns of z that are searched."""
        raise NotImplementedError

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest legal value of each column."""
        raise NotImplementedError

    def at(self, z: Tensor) -> Sampled:
        """The basis and its Jacobian at geometries ``(batch, columns)``."""
        raise NotImplementedError

    @property
    def n_dims(self) -> int:
        """Dimensions of the kernels."""
        return len(self.sizes)

    @property
    def n_coefficients(self) -> int:
        """Coefficients per channel, with the offset's."""
        return self.n_basis + self.offset

    @property
    def n_parameters(self) -> int:
        """Numbers that a fit chooses: geometry and coefficients."""
        return len(self.free) + self.n_coefficients * self.n_channels


@dataclass(frozen=True)
class GaborModel(Model):
    """Gabor functions: the envelope times cosine and times minus sine, with two coefficients.

    A geometry is a row z of ``(angles..., frequency, log σ, log γ, center...)``. The frequency may
    change its sign; at zero the wave becomes a blob. ``limits`` are narrower ranges of columns.
    With ``zero_frequency`` the frequency column is ignored, and the basis is the limit of frequency
    zero: the envelope, and the envelope times the offset along the wave (a blob or an edge).
    """

    sizes: tuple[int, ...]
    n_channels: int
    free_center: bool = False
    isotropic: bool = False
    offset: bool = False
    limits: tuple[tuple[str, float, float], ...] = ()  # (name, lowest, highest), units of z
    zero_frequency: bool = False

    @property
    def angle_names(self) -> tuple[str, ...]:
        """The angles of the record."""
        return RECORDS[self.n_dims].angle_names

    @property
    def columns(self) -> dict[str, int]:
        """The first column of each parameter in z."""
        names = (*self.angle_names, "frequency", "sigma", "aspect_ratio", "center")
        return {name: i for i, name in enumerate(names)}

    @property
    def free(self) -> list[int]:
        """Columns of z that are searched."""
        columns = self.columns
        fixed = [] if self.n_dims > 1 and not self.isotropic else [columns["aspect_ratio"]]
        fixed += [columns["frequency"]] if self.zero_frequency else []
        last = columns["center"] + (self.n_dims if self.free_center else 0)
        return [i for i in range(last) if i not in fixed]

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest legal value of each column; angles are not bounded."""
        largest = max(self.sizes)
        columns, n = self.columns, len(self.angle_names)
        low = [-math.inf] * n + [-0.5, math.log(0.2), math.log(0.05)]
        high = [math.inf] * n + [0.5, math.log(4.0 * largest), math.log(20.0)]
        middle = [max(size / 2, 0.5) for size in reversed(self.sizes)]
        low, high = [*low, *(-m for m in middle)], [*high, *middle]
        for name, lowest, highest in self.limits:
            for i in range(columns[name], len(low) if name == "center" else columns[name] + 1):
                low[i], high[i] = max(low[i], lowest), min(high[i], highest)
        bounds = torch.tensor([low, high], dtype=torch.float64).to(like)
        return bounds[0], bounds[1]

    def directions(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Unit wave vectors ``(batch, d)``, and their derivatives ``(batch, angles, d)``."""
        angles = {name: z[:, self.columns[name]] for name in self.angle_names}
        n, slopes = direction_and_slopes(angles, z[:, self.columns["frequency"]])
        return n, torch.stack([*slopes.values()], 1) if slopes else n.new_zeros(len(z), 0, 1)

    def at(self, z: Tensor) -> Sampled:
        """The pair, whose phase counts from the kernel's middle, and its Jacobian."""
        columns = self.columns
        frequency = z[:, columns["frequency"]]
        n, by_angle = self.directions(z)
        along = n.unsqueeze(-1) * n.unsqueeze(-2)
        ratio = (2 * z[:, columns["aspect_ratio"]]).exp()
        scale = (-2 * z[:, columns["sigma"]]).exp()[:, None, None]
        one = torch.eye(self.n_dims, dtype=z.dtype, device=z.device)
        precision = scale * (along + ratio[:, None, None] * (one - along))

        monomials = _monomials(self.sizes, z.dtype, z.device)
        center = z[:, columns["center"] :]
        envelope = (_quadratic(precision, center) @ monomials).exp_()
        rate = torch.ones_like(frequency) if self.zero_frequency else 2 * math.pi * frequency
        angle = (rate.unsqueeze(-1) * n) @ monomials[1 : 1 + self.n_dims]
        if self.zero_frequency:
            basis = torch.stack([torch.ones_like(angle), angle.neg_()], 1)
        else:
            basis = torch.stack([angle.cos(), angle.sin().neg_()], 1)
        basis *= envelope.unsqueeze(1)

        def jacobian(coefficients: Tensor) -> Tensor:
            even, odd = coefficients[..., 0, None], coefficients[..., 1, None]
            cosine, minus_sine = basis[:, :1], basis[:, 1:2]
            kernel = even * cosine + odd * minus_sine  # (batch, channels, pixels)
            slope = -odd * cosine  # by the carrier's angle
            if not self.zero_frequency:
                slope += even * minus_sine
            of_envelope, of_angle = self._slopes(z, n, by_angle, along, precision)
            J = kernel.unsqueeze(-2) * of_envelope.unsqueeze(1)
            J[:, :, : of_angle.shape[1]].addcmul_(slope.unsqueeze(-2), of_angle.unsqueeze(1))
            return J

        return basis, jacobian

    def _slopes(
        self, z: Tensor, n: Tensor, by_angle: Tensor, along: Tensor, precision: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Derivatives of log envelope ``(batch, p, pixels)`` and angle ``(batch, ≤ p, pixels)``.

        By each free column; of the angle only by the first ones, on which it depends.
        """
        columns, d = self.columns, self.n_dims
        center = z[:, columns["center"] :]
        frequency = z[:, columns["frequency"], None]
        monomials = _monomials(self.sizes, z.dtype, z.device)
        ratio = (2 * z[:, columns["aspect_ratio"]]).exp()
        scale = (-2 * z[:, columns["sigma"]]).exp()

        squeezed = (scale * (1 - ratio))[:, None, None, None]
        tilt = by_angle.unsqueeze(-1) * n[:, None, None, :]
        changes = [squeezed * (tilt + tilt.mT)]  # of the precision, by each column
        if not self.zero_frequency:
            changes.append(torch.zeros_like(precision).unsqueeze(1))  # by the frequency
        changes.append(-2 * precision.unsqueeze(1))
        if columns["aspect_ratio"] in self.free:
            changes.append((2 * (precision - scale[:, None, None] * along)).unsqueeze(1))
        rows = [_quadratic(torch.cat(changes, 1), center.unsqueeze(1))]
        if self.free_center:
            moved = rows[0].new_zeros(len(z), d, len(monomials))
            moved[:, :, 0] = -(precision @ center.unsqueeze(-1)).squeeze(-1)
            moved[:, :, 1 : 1 + d] = precision
            rows.append(moved)
        waves = by_angle.expand(-1, -1, d)
        if not self.zero_frequency:
            waves = 2 * math.pi * torch.cat([frequency.unsqueeze(-1) * waves, n.unsqueeze(1)], 1)
        return torch.cat(rows, 1) @ monomials, waves @ monomials[1 : 1 + d]

    def record(self, z: Tensor, coefficients: Tensor) -> Gabor:
        """Geometry ``(batch, 1)``, phase and amplitude ``(batch, channels)``, in float64."""
        z, coefficients, columns = z.double(), coefficients.double(), self.columns
        frequency, center = z[:, columns["frequency"]], z[:, columns["center"] :]
        fields = {name: z[:, columns[name]] for name in self.angle_names}
        fields |= {
            "wavelength": frequency.abs().reciprocal(),
            "sigma": z[:, columns["sigma"]].exp(),
            "aspect_ratio": z[:, columns["aspect_ratio"]].exp(),
            "center": center,
        }
        record = RECORDS[self.n_dims]
        fields = {name: v[:, None] for name, v in fields.items() if name in record.field_names()}
        amplitude = coefficients[..., :2].norm(dim=-1)
        phase = torch.atan2(coefficients[..., 1], coefficients[..., 0])
        wave = record(**fields, phase=phase, amplitude=amplitude)
        # Here the phase counts from the kernel's middle, in a record from the envelope's centre.
        k = wave.direction * frequency[:, None, None]
        phase = phase + 2 * math.pi * (k * center[:, None]).sum(-1)
        # A wave that runs backwards is the same with the opposite phase: cos(-φ + ψ) = cos(φ - ψ).
        phase = torch.where(frequency[:, None] < 0, -phase, phase)
        whole = wave.replace(phase=phase).canonical().as_dict()
        return record(
            **{name: v if name in ("phase", "amplitude") else v[:, :1] for name, v in whole.items()}
        )

    def rows(self, params: Gabor) -> Tensor:
        """The geometries of a record ``(batch, 1)`` as rows of z."""
        fields, n = params.as_dict(), len(params.sigma)
        columns = [fields[name] for name in self.angle_names]
        columns += [params.frequency, params.sigma.log()]
        columns.append(fields["aspect_ratio"].log() if self.n_dims > 1 else 0 * params.sigma)
        flat = torch.stack([value.reshape(n) for value in columns], -1)
        return torch.cat([flat, params.center.reshape(n, -1)], -1)


@lru_cache(maxsize=32)
def _monomials(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """1, x, y, xx, xy, yy (and so on) of every pixel's offset: ``(monomials, pixels)``."""
    u = offsets(sizes, dtype, device)
    d = len(u)
    products = [u[i] * u[j] for i in range(d) for j in range(i, d)]
    return torch.stack([torch.ones_like(u[0]), *u, *products])


def _quadratic(P: Tensor, center: Tensor) -> Tensor:
    """Coefficients of ``-½ (u - c)ᵀ P (u - c)`` for the monomials: ``(*batch, monomials)``."""
    d = P.shape[-1]
    pulled = (P @ center.unsqueeze(-1)).squeeze(-1)
    squares = [(-0.5 if i == j else -1.0) * P[..., i, j] for i in range(d) for j in range(i, d)]
    constant = -0.5 * (pulled * center).sum(-1)
    return torch.stack([constant, *pulled.unbind(-1), *squares], -1)
