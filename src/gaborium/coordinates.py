"""Coordinates: how a layer stores Gabor parameters so that any optimiser step stays legal."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gaborium.functions.kernels import direction_and_slopes
from gaborium.functions.params import POSITIVE_FIELDS, RECORDS, Gabor, Waveform, unit_vector

# Raw values are clamped to these bounds when they are read, so that a runaway step gives a useless
# kernel and not a NaN. Outside them a parameter has no gradient; inside, float32 does not overflow.
_MIN_WAVELENGTH, _MAX_WAVELENGTH = 1e-4, 1e10  # px
_BOUNDS = {
    "angular_wave_vector": (-2 * math.pi / _MIN_WAVELENGTH, 2 * math.pi / _MIN_WAVELENGTH),
    "log_wavelength": (math.log(_MIN_WAVELENGTH), math.log(_MAX_WAVELENGTH)),
    "log_sigma": (math.log(1e-8), math.log(1e8)),
    "log_aspect_ratio": (math.log(1e-6), math.log(1e6)),
    "center": (-1e4, 1e4),
}
_BOUNDS |= dict.fromkeys(("orientation", "elevation", "phase"), (-1e8, 1e8))
_BOUNDS |= dict.fromkeys(("amplitude", "even", "odd"), (-1e15, 1e15))
_VECTORS = ("angular_wave_vector", "center")
_WIDTHS = (("sigma",), ("sigma", "aspect_ratio"))  # in one dimension, in more
_TINY = 1e-24  # squared length, below which a wave vector or coefficient pair has no direction


@dataclass(frozen=True)
class Coordinates:
    """A way of storing the fields of a record as unconstrained ("raw") tensors.

    ``textbook`` keeps the formula's letters: angles, phase, amplitude and centre unchanged, the
    positive fields as logarithms. ``wavevector`` stores two groups of fields jointly: direction
    and wavelength as ``angular_wave_vector`` (2πk in rad/px: no angle wraps around, zero
    frequency is an ordinary point, and a unit step changes the kernel about as much as a unit step
    of the others), amplitude and phase as the linear coefficients ``even`` and ``odd``.

    A group is stored jointly only if all its fields learn or none does: a wave vector cannot move
    while its length is frozen. In 1-D there is no direction to store.

    Args:
        n_dims: 1, 2 or 3.
        joint_wave: direction and wavelength are stored as ``angular_wave_vector``.
        joint_phase: amplitude and phase are stored as ``even`` and ``odd``.
        min_wavelength: px; wavelengths stay above it: ``λ² = raw² + min²``. ``None``: no bound.
            The closer a wavelength is to it, the smaller is its gradient.

    Example:
        >>> from gaborium import Gabor2d
        >>> wave = Coordinates.named("wavevector", n_dims=2)
        >>> raw = wave.to_raw(Gabor2d.of(orientation=0.0, wavelength=4.0, sigma=2.0))
        >>> list(raw)
        ['angular_wave_vector', 'log_sigma', 'log_aspect_ratio', 'even', 'odd', 'center']
    """

    n_dims: int
    joint_wave: bool
    joint_phase: bool
    min_wavelength: float | None = None

    @classmethod
    def named(
        cls,
        name: str,
        *,
        n_dims: int,
        learn: Collection[str] | None = None,
        min_wavelength: float | None = None,
    ) -> Coordinates:
        """The coordinates called ``"textbook"`` or ``"wavevector"``, for the fields to learn."""
        if name not in ("textbook", "wavevector"):
            raise ValueError(f"coordinates must be 'textbook' or 'wavevector', got {name!r}.")
        if min_wavelength is not None and not min_wavelength > 0:
            raise ValueError(f"min_wavelength must be positive (px), got {min_wavelength}.")
        record = RECORDS[n_dims]
        learned = set(record.field_names() if learn is None else learn)

        def is_joint(fields: set[str]) -> bool:
            return name == "wavevector" and (fields <= learned or not fields & learned)

        return cls(
            n_dims,
            joint_wave=n_dims > 1 and is_joint({*record.angle_names, "wavelength"}),
            joint_phase=is_joint({"amplitude", "phase"}),
            min_wavelength=min_wavelength,
        )

    def raw_fields(self) -> dict[str, tuple[str, ...]]:
        """The raw tensors' names, each with the fields of the record that it holds."""
        angles = RECORDS[self.n_dims].angle_names
        raw: dict[str, tuple[str, ...]] = {}
        if self.joint_wave:
            raw["angular_wave_vector"] = (*angles, "wavelength")
        else:
            raw |= {name: (name,) for name in angles} | {"log_wavelength": ("wavelength",)}
        raw["log_sigma"] = ("sigma",)
        if self.n_dims > 1:
            raw["log_aspect_ratio"] = ("aspect_ratio",)
        for name, field in (("even", "amplitude"), ("odd", "phase")):
            raw |= {name: ("amplitude", "phase")} if self.joint_phase else {field: (field,)}
        return raw | {"center": ("center",)}

    def to_raw(self, params: Gabor) -> dict[str, Tensor]:
        """Raw tensors that hold ``params``; geometry and coefficients keep their own shapes."""
        fields = params.as_dict()
        # A blob is stored as a wave of 1e10 px, which still has a direction.
        frequency = self._unbound(
            fields["wavelength"].clamp(_MIN_WAVELENGTH, _MAX_WAVELENGTH).reciprocal()
        )
        raw = {name: fields[name] for name in (*params.angle_names, "amplitude", "phase", "center")}
        raw |= {f"log_{name}": fields[name].log() for name in POSITIVE_FIELDS if name in fields}
        raw["log_wavelength"] = -frequency.log()
        if self.joint_wave:
            raw["angular_wave_vector"] = 2 * math.pi * frequency.unsqueeze(-1) * params.direction
        if self.joint_phase:
            raw["even"] = fields["amplitude"] * fields["phase"].cos()
            raw["odd"] = fields["amplitude"] * fields["phase"].sin()
        return _clamped({name: raw[name] for name in self.raw_fields()})

    def from_raw(self, raw: Mapping[str, Tensor]) -> Gabor:
        """The record of the raw tensors."""
        raw = _clamped(raw)
        record = RECORDS[self.n_dims]
        fields = {name: value for name, value in raw.items() if name in record.field_names()}
        for name in _WIDTHS[self.n_dims > 1]:
            fields[name] = raw[f"log_{name}"].exp()
        if self.joint_wave:
            k = self._wave_vector(raw)
            length = k.square().sum(-1)
            still = length < _TINY
            safe = torch.where(still.unsqueeze(-1), _first_axis(k), k)
            fields["orientation"] = torch.atan2(safe[..., 1], safe[..., 0])
            if self.n_dims == 3:
                flat = torch.linalg.vector_norm(safe[..., :2], dim=-1)
                fields["elevation"] = torch.atan2(safe[..., 2], flat)
            fields["wavelength"] = torch.where(still, torch.inf, safe.square().sum(-1).rsqrt())
        else:
            fields["wavelength"] = self._frequency(raw).reciprocal()
        if self.joint_phase:
            even, odd = raw["even"], raw["odd"]
            silent = even.square() + odd.square() < _TINY
            even = torch.where(silent, torch.ones_like(even), even)
            odd = torch.where(silent, torch.zeros_like(odd), odd)
            fields["phase"] = torch.atan2(odd, even)
            fields["amplitude"] = torch.where(silent, 0.0, torch.hypot(even, odd))
        return record(**{name: fields[name] for name in record.field_names()})

    def waveform(self, raw: Mapping[str, Tensor]) -> Waveform:
        """The waveform of the raw tensors, with gradients that are never infinite.

        Through the record they would be divided by the wave vector's length and the amplitude.
        """
        raw = _clamped(raw)
        if self.joint_wave:
            k = self._wave_vector(raw)
            squared = k.square().sum(-1, keepdim=True)
            still = squared < _TINY
            scale = torch.where(still, torch.ones_like(squared), squared).rsqrt()
            direction = torch.where(still, _first_axis(k), k * scale)
        else:
            angles = [raw[name] for name in RECORDS[self.n_dims].angle_names]
            direction = unit_vector(angles, raw["log_wavelength"])
            k = direction * self._frequency(raw).unsqueeze(-1)
        if self.joint_phase:
            even, odd = raw["even"], raw["odd"]
        else:
            even = raw["amplitude"] * raw["phase"].cos()
            odd = raw["amplitude"] * raw["phase"].sin()
        sigma = raw["log_sigma"].exp()
        ratio = raw["log_aspect_ratio"].exp() if self.n_dims > 1 else torch.ones_like(sigma)
        return Waveform(direction, k, sigma, ratio, even, odd, raw["center"])

    def slopes(self, raw: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Derivatives of the waveform's fields with respect to the raw tensors, in closed form.

        By raw tensor, then by field, each of shape ``(*batch, c, d)``: c components of the raw
        tensor, d of the field; 1 for scalars. They are never infinite, and 0 where a raw value is
        out of bounds.
        """
        given, raw = raw, _clamped(raw)
        slopes: dict[str, dict[str, Tensor]] = {}
        if self.joint_wave:
            slopes["angular_wave_vector"] = self._slopes_of_wave_vector(raw["angular_wave_vector"])
        else:
            angles = {name: raw[name] for name in RECORDS[self.n_dims].angle_names}
            direction, turns = direction_and_slopes(angles, raw["log_wavelength"])
            frequency = self._frequency(raw).unsqueeze(-1)
            for name, turn in turns.items():
                slopes[name] = {"direction": turn, "wave_vector": frequency * turn}
            unbound = (-raw["log_wavelength"]).exp().unsqueeze(-1)
            # The bound multiplies a frequency by a factor, and its slope by the factor's cube.
            fall = -unbound * (frequency / unbound) ** 3
            slopes["log_wavelength"] = {"wave_vector": fall * direction}
        for name in _WIDTHS[self.n_dims > 1]:
            slopes[f"log_{name}"] = {name: raw[f"log_{name}"].exp().unsqueeze(-1)}
        if self.joint_phase:
            one = torch.ones_like(raw["even"]).unsqueeze(-1)
            slopes |= {"even": {"even": one}, "odd": {"odd": one}}
        else:
            size, cos, sin = (
                part.unsqueeze(-1)
                for part in (raw["amplitude"], raw["phase"].cos(), raw["phase"].sin())
            )
            slopes["amplitude"] = {"even": cos, "odd": sin}
            slopes["phase"] = {"even": -size * sin, "odd": size * cos}
        slopes["center"] = {"center": _unit_matrix(raw["center"])}
        for name, by in slopes.items():
            free = (given[name] == raw[name]).unsqueeze(-1)
            if name not in _VECTORS:
                free = free.unsqueeze(-1)
                by = {field: slope.unsqueeze(-2) for field, slope in by.items()}
            slopes[name] = {field: slope * free for field, slope in by.items()}
        return slopes

    def _slopes_of_wave_vector(self, raw: Tensor) -> dict[str, Tensor]:
        """Derivatives of direction and wave vector, ``(*batch, d, d)``: columns, components."""
        one, free = _unit_matrix(raw), raw / (2 * math.pi)
        squared = free.square().sum(-1, keepdim=True)
        least = self._min_wavelength(raw) ** 2
        bound = (1 + squared * least).rsqrt()
        k = free * bound
        still = k.square().sum(-1, keepdim=True) < _TINY
        scale = torch.where(still, torch.ones_like(squared), squared).rsqrt()
        n = free * scale
        turn = (one - n.unsqueeze(-1) * n.unsqueeze(-2)) * scale.unsqueeze(-1)
        outer = k.unsqueeze(-1) * k.unsqueeze(-2)
        stretch = bound.unsqueeze(-1) * (one - least * outer)
        return {
            "direction": torch.where(still.unsqueeze(-1), 0.0, turn) / (2 * math.pi),
            "wave_vector": stretch / (2 * math.pi),
        }

    def _frequency(self, raw: Mapping[str, Tensor]) -> Tensor:
        """``1/f² = 1/raw² + min_wavelength²``: smooth, and never at the limit."""
        frequency = (-raw["log_wavelength"]).exp()
        if self.min_wavelength is None:
            return frequency
        return frequency * (1 + (frequency * self._min_wavelength(frequency)).square()).rsqrt()

    def _wave_vector(self, raw: Mapping[str, Tensor]) -> Tensor:
        k = raw["angular_wave_vector"] / (2 * math.pi)
        if self.min_wavelength is None:
            return k
        return k * (1 + k.square().sum(-1, keepdim=True) * self._min_wavelength(k) ** 2).rsqrt()

    def _unbound(self, frequency: Tensor) -> Tensor:
        """The inverse of the bound; the limit itself is stored as a point just short of it."""
        if self.min_wavelength is None:
            return frequency
        room = 1 - (frequency * self.min_wavelength).square()
        return frequency * room.clamp_min(1e-6).rsqrt()

    def _min_wavelength(self, like: Tensor) -> float:
        """``min_wavelength``, and room for rounding."""
        return (self.min_wavelength or 0.0) * (1 + 8 * torch.finfo(like.dtype).eps)


def _clamped(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clamp(*_BOUNDS[name]) for name, value in raw.items()}


def _unit_matrix(like: Tensor) -> Tensor:
    """One unit matrix for each of a batch of vectors."""
    return torch.diag_embed(torch.ones_like(like))


def _first_axis(like: Tensor) -> Tensor:
    """The unit vector along x, in the shape of a batch of vectors."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)[0].expand_as(like)
