"""Parameter records: the fields of Gabor functions in one, two and three dimensions."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

Number = float | Sequence[Any] | Tensor

UNITS = {
    "orientation": "rad",
    "elevation": "rad",
    "wavelength": "px",
    "phase": "rad",
    "sigma": "px",
    "aspect_ratio": "1",
    "amplitude": "kernel's unit",
    "center": "px",
}
POSITIVE_FIELDS = ("wavelength", "sigma", "aspect_ratio")
_JSON_VERSION = 1


class Waveform(NamedTuple):
    """A Gabor function in the form that is the same in every dimension.

    The function is ``exp(-u·P u / 2) (even·cos φ - odd·sin φ)`` with ``φ = 2π k·u``, ``u`` the
    offset from the centre and the precision ``P = (n nᵀ + γ² (1 - n nᵀ)) / σ²``. The envelope's
    axis n is a separate field, because a wave vector k of zero has no direction. Components run
    x, y, z.
    """

    direction: Tensor  # n, (*batch, d), of length 1
    wave_vector: Tensor  # k, (*batch, d), cycles/px
    sigma: Tensor  # σ, (*batch,), px
    aspect_ratio: Tensor  # γ, (*batch,)
    even: Tensor  # A cos ψ, (*batch,)
    odd: Tensor  # A sin ψ, (*batch,)
    center: Tensor  # (*batch, d), px


def unit_vector(angles: Sequence[Tensor], like: Tensor) -> Tensor:
    """Unit vector ``(*batch, d)`` with components x, y, z; ``angles`` holds d - 1 tensors."""
    if not angles:
        return torch.ones_like(like).unsqueeze(-1)
    if len(angles) == 1:
        return torch.stack([angles[0].cos(), angles[0].sin()], -1)
    orientation, elevation = torch.broadcast_tensors(*angles)
    flat = elevation.cos()
    return torch.stack([flat * orientation.cos(), flat * orientation.sin(), elevation.sin()], -1)


@dataclass(frozen=True, eq=False)
class Gabor:
    """Base of ``Gabor1d``, ``Gabor2d`` and ``Gabor3d``; make one of those instead.

    A record is a batch of Gabor functions. Its fields broadcast against each other, so that 64
    filters over 3 channels can share one geometry: ``orientation`` of shape ``(64, 1)`` and
    ``amplitude`` of shape ``(64, 3)``. Building a record checks shapes; ``of`` also checks values.
    """

    n_dims: ClassVar[int]
    angle_names: ClassVar[tuple[str, ...]]

    if TYPE_CHECKING:  # the fields every dimension has
        wavelength: Tensor
        phase: Tensor
        sigma: Tensor
        amplitude: Tensor
        center: Tensor

    def __post_init__(self) -> None:
        for name, value in self.as_dict().items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{type(self).__name__} holds tensors, got {type(value).__name__} for {name}; "
                    f"use {type(self).__name__}.of(...) for plain numbers."
                )
        if self.center.ndim == 0 or self.center.shape[-1] != self.n_dims:
            raise ValueError(
                f"center must end in an axis of {self.n_dims} (px from the kernel's middle), "
                f"got shape {tuple(self.center.shape)}."
            )
        try:
            _ = self.batch_shape
        except RuntimeError:
            shapes = {name: tuple(value.shape) for name, value in self.as_dict().items()}
            raise ValueError(
                f"The fields of {type(self).__name__} must broadcast, got {shapes}."
            ) from None

    # -- making one -------------------------------------------------------------------------

    @classmethod
    def of(
        cls,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **fields: Number,
    ) -> Self:
        """Make a record from numbers, nested sequences or tensors, and check the values.

        Args:
            dtype: floating type; by default as the first floating tensor given, or torch's
                default.
            device: where the tensors live; by default where the first tensor given lives.
            **fields: the record's fields. ``wavelength`` and ``sigma`` are required; angles,
                ``phase`` and ``center`` are 0 and ``aspect_ratio`` and ``amplitude`` are 1
                unless given. Tensors keep their graph.

        Returns:
            A record whose fields all have the batch shape of the broadcast input.

        Raises:
            TypeError: a field is missing, unknown or not made of numbers.
            ValueError: a value is not finite, or a wavelength, sigma or aspect ratio not
                positive. An infinite wavelength is a blob, a wave of zero frequency, and legal.

        Example:
            >>> edge = Gabor2d.of(orientation=0.5, wavelength=6.0, sigma=2.0)
            >>> edge.aspect_ratio.item(), edge.center.tolist()
            (1.0, [0.0, 0.0])
        """
        given: dict[str, Number] = dict.fromkeys((*cls.angle_names, "phase"), 0.0)
        given |= {"amplitude": 1.0, "center": [0.0] * cls.n_dims}
        given |= {"aspect_ratio": 1.0} if cls.n_dims > 1 else {}
        rest = {name: value for name, value in given.items() if name not in fields}
        record = cls(**as_tensors(fields | rest, dtype, device))
        record.check()
        return record.expand()

    def check(self) -> None:
        """Raise ``ValueError`` for a value outside its field's range."""
        for name, value in self.as_dict().items():
            positive, finite = name in POSITIVE_FIELDS, name != "wavelength"
            bad = (~value.isfinite() if finite else value.isnan()) | (positive & (value <= 0))
            if bad.any():
                wanted = " and ".join(["positive"] * positive + ["finite"] * finite)
                raise ValueError(
                    f"{name} must be {wanted} ({UNITS[name]}), got {value[bad][0].item():g}."
                )

    # -- looking at one ---------------------------------------------------------------------

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names of the fields, in the record's order."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def as_dict(self) -> dict[str, Tensor]:
        """The fields by name, as they are stored."""
        return {name: getattr(self, name) for name in self.field_names()}

    @property
    def batch_shape(self) -> torch.Size:
        """Shape the fields broadcast to; ``center`` has one axis more."""
        # Each shape once: torch compares them one by one, and takes its time.
        shapes = {
            value.shape[:-1] if name == "center" else value.shape
            for name, value in self.as_dict().items()
        }
        return torch.broadcast_shapes(*shapes)

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the fields."""
        return self.sigma.dtype

    @property
    def device(self) -> torch.device:
        """Device of the fields."""
        return self.sigma.device

    @property
    def frequency(self) -> Tensor:
        """Carrier frequency ``1 / wavelength`` in cycles/px."""
        return self.wavelength.reciprocal()

    @property
    def direction(self) -> Tensor:
        """Unit vector of the wave, ``(*batch, d)``, components x, y, z."""
        return unit_vector([getattr(self, name) for name in self.angle_names], self.wavelength)

    def waveform(self) -> Waveform:
        """The record in the form shared by all dimensions."""
        direction = self.direction
        return Waveform(
            direction,
            direction * self.frequency.unsqueeze(-1),
            self.sigma,
            self.as_dict().get("aspect_ratio", torch.ones_like(self.sigma)),
            self.amplitude * self.phase.cos(),
            self.amplitude * self.phase.sin(),
            self.center,
        )

    def __len__(self) -> int:
        if not self.batch_shape:
            raise TypeError(f"This {type(self).__name__} holds a single Gabor function.")
        return self.batch_shape[0]

    def __getitem__(self, index: Any) -> Self:
        whole = self.expand()
        fields = {name: value[index] for name, value in whole.as_dict().items() if name != "center"}
        # Component by component: an index such as [..., 0] must not reach center's last axis.
        center = torch.stack([part[index] for part in whole.center.unbind(-1)], -1)
        return type(self)(**fields, center=center)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{name: function(value) for name, value in self.as_dict().items()})

    # -- changing one -----------------------------------------------------------------------

    def replace(self, **fields: Number) -> Self:
        """A copy with some fields replaced; numbers become tensors of the record's dtype.

        Example:
            >>> edge = Gabor2d.of(wavelength=6.0, sigma=2.0)
            >>> edge.replace(orientation=0.5).orientation.item()
            0.5
        """
        values = {
            name: value if isinstance(value, Tensor) else self.sigma.new_tensor(value)
            for name, value in fields.items()
        }
        return dataclasses.replace(self, **values)

    def expand(self, *shape: int) -> Self:
        """A view in which every field has the full batch shape, or the shape given."""
        shape = shape or self.batch_shape
        fields = {
            name: value.expand(*shape, self.n_dims) if name == "center" else value.expand(shape)
            for name, value in self.as_dict().items()
        }
        return type(self)(**fields)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast every field, with the arguments of ``Tensor.to``."""
        return self._map(lambda value: value.to(*args, **kwargs))

    def detach(self) -> Self:
        """The same values without their graph."""
        return self._map(lambda value: value.detach())

    def canonical(self) -> Self:
        """The one representative of all records that give the same kernel.

        Convention:
            - ``(A, ψ) ~ (-A, ψ + π)``: the amplitude becomes non-negative
            - ``(θ, ψ) ~ (θ + π, -ψ)``: the orientation comes into [0, π); in 3-D it is the
              elevation that becomes non-negative, and the orientation only where that is 0
            - the phase is in (-π, π]; a 1-D record needs only the first rule
            - at zero frequency only ``A cos ψ`` matters: the phase becomes 0 or π

        Example:
            >>> one = Gabor2d.of(orientation=-0.5, wavelength=6.0, sigma=2.0, phase=1.0)
            >>> other = one.canonical()
            >>> round(other.orientation.item(), 4), round(other.phase.item(), 4)
            (2.6416, -1.0)
        """
        fields = self.as_dict()
        amplitude, phase = torch.broadcast_tensors(self.amplitude, self.phase)
        still = self.wavelength.isinf()
        amplitude = torch.where(still, amplitude * phase.cos(), amplitude)
        phase = torch.where(still, 0.0, phase)
        phase = torch.where(amplitude < 0, phase + math.pi, phase)
        if self.n_dims == 2:
            fields["orientation"], opposite = _half_turn(fields["orientation"])
            phase = torch.where(opposite, -phase, phase)
        if self.n_dims == 3:
            x, y, z = self.direction.unbind(-1)
            line, turned = _half_turn(torch.atan2(y, x))
            # A level wave rises in neither direction: it is turned like one in the plane.
            level = z == 0
            opposite = torch.where(level, turned, z < 0)
            sign = torch.where(opposite, -1.0, 1.0).to(z)
            fields["orientation"] = torch.where(level, line, torch.atan2(sign * y, sign * x))
            # An arc sine would lose half of the digits of a steep elevation.
            fields["elevation"] = torch.atan2(z.abs(), torch.hypot(x, y))
            phase = sign * phase
        # Blobs keep phase 0 or π whichever way the wave is turned.
        fields["phase"], fields["amplitude"] = torch.broadcast_tensors(
            -wrap(-phase), amplitude.abs()
        )
        return type(self)(**fields)

    def difference(self, other: Self) -> dict[str, Tensor]:
        """Signed error of each field against ``other``, on the circle and up to symmetry.

        Of the representations of ``other`` that give the same kernel, the one nearest in
        direction is compared: ``θ = 0.01`` and ``θ = π - 0.01`` differ by 0.02 rad.

        Example:
            >>> one = Gabor2d.of(orientation=0.01, wavelength=6.0, sigma=2.0)
            >>> two = Gabor2d.of(orientation=3.13159, wavelength=6.0, sigma=2.0)
            >>> round(one.difference(two)["orientation"].item(), 4)
            0.02
        """
        mine, theirs = self.expand().as_dict(), other.expand().as_dict()
        for fields in (mine, theirs):
            negative, phase = fields["amplitude"] < 0, fields["phase"]
            fields["phase"] = torch.where(negative, phase + math.pi, phase)
            fields["amplitude"] = fields["amplitude"].abs()
        result = {name: value - theirs[name] for name, value in mine.items()}
        # Two blobs agree, though their infinities have no difference.
        same = mine["wavelength"] == theirs["wavelength"]
        result["wavelength"] = torch.where(same, 0.0, result["wavelength"])
        flip = (self.expand().direction * other.expand().direction).sum(-1) < 0
        for name in (*self.angle_names, "phase"):
            value = theirs[name]
            opposite = value + math.pi if name == "orientation" else -value
            result[name] = wrap(mine[name] - torch.where(flip, opposite, value))
        return result

    def isclose(self, other: Self, *, rtol: float = 1e-5, atol: float = 1e-8) -> Tensor:
        """Whether two records mean the same Gabor functions, filter by filter: ``(*batch,)``."""
        # Blobs of different phase may be the same, which only the canonical record shows.
        mine, theirs = self.canonical(), other.canonical()
        close = []
        for name, error in mine.difference(theirs).items():
            # An angle near 2π is no less exact than one near 0: angles get no relative tolerance.
            angle = name in (*self.angle_names, "phase")
            scale = torch.ones_like(error) if angle else getattr(theirs, name).abs()
            same = error.abs() <= atol + rtol * torch.nan_to_num(scale, posinf=0.0)
            close.append(same.all(-1) if name == "center" else same)
        return torch.stack(torch.broadcast_tensors(*close)).all(0)

    # -- JSON -------------------------------------------------------------------------------

    def to_json(self, *, indent: int | None = None) -> str:
        """The record as JSON text: type, version, dtype, units and the fields as nested lists.

        Example:
            >>> edge = Gabor1d.of(wavelength=6.0, sigma=2.0)
            >>> Gabor1d.from_json(edge.to_json()).wavelength.item()
            6.0
        """
        names = self.field_names()
        document = {
            "type": type(self).__name__,
            "version": _JSON_VERSION,
            "dtype": str(self.dtype).removeprefix("torch."),
            "units": {name: UNITS[name] for name in names},
            "fields": {
                name: plain(value.detach().double().tolist())
                for name, value in self.as_dict().items()
            },
        }
        return json.dumps(document, indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote; floats come back bit for bit.

        Raises:
            ValueError: the text is not such a record, or of another dimension or version.
        """
        try:
            document = json.loads(text)
            kind, version = document["type"], document["version"]
            if (kind, version) != (cls.__name__, _JSON_VERSION):
                raise ValueError(f"it is a {kind!r:.40} of version {version!r:.40}")
            dtype = getattr(torch, document["dtype"])
            if not dtype.is_floating_point:
                raise ValueError(f"its dtype is {dtype}")
            fields = {
                name: torch.tensor(_parsed(value), dtype=torch.float64).to(dtype)
                for name, value in document["fields"].items()
            }
            if fields["center"].shape == (0,):  # an empty list does not show its second axis
                fields["center"] = fields["center"].reshape(0, cls.n_dims)
            record = cls(**fields)
            record.check()
        except Exception as error:  # a text of somebody else fails in many ways
            raise ValueError(
                f"Expected the JSON of a {cls.__name__} (version {_JSON_VERSION}): {error}."
            ) from None
        return record


@dataclass(frozen=True, eq=False)
class Gabor1d(Gabor):
    """One-dimensional Gabor functions, as of sound: ``A exp(-x²/2σ²) cos(2πx/λ + ψ)``.

    Args:
        wavelength: λ, px, > 0; aliased below 2, infinite for a blob.
        phase: ψ, rad at the envelope's centre, period 2π.
        sigma: σ, px, > 0.
        amplitude: A, the kernel's unit.
        center: ``(*batch, 1)``, px from the kernel's middle.
    """

    n_dims: ClassVar[int] = 1
    angle_names: ClassVar[tuple[str, ...]] = ()

    wavelength: Tensor
    phase: Tensor
    sigma: Tensor
    amplitude: Tensor
    center: Tensor


@dataclass(frozen=True, eq=False)
class Gabor2d(Gabor):
    """Two-dimensional Gabor functions ``A exp(-(x'² + γ²y'²)/2σ²) cos(2πx'/λ + ψ)``.

    Convention:
        - x runs along the last axis, y along the one before it (rows, downwards)
        - ``x' = x cos θ + y sin θ`` and ``y' = -x sin θ + y cos θ``
        - the kernel is not normalised: A is the height of the envelope

    Args:
        orientation: θ, rad from +x towards +y, direction of the wave vector, period π.
        wavelength: λ, px, > 0; aliased below 2, infinite for a blob.
        phase: ψ, rad at the envelope's centre, period 2π.
        sigma: σ, px, > 0: standard deviation along the wave vector.
        aspect_ratio: γ, > 0: the standard deviation along the stripes is σ/γ.
        amplitude: A, the kernel's unit.
        center: ``(*batch, 2)``, (x₀, y₀) in px from the kernel's middle.
    """

    n_dims: ClassVar[int] = 2
    angle_names: ClassVar[tuple[str, ...]] = ("orientation",)

    orientation: Tensor
    wavelength: Tensor
    phase: Tensor
    sigma: Tensor
    aspect_ratio: Tensor
    amplitude: Tensor
    center: Tensor


@dataclass(frozen=True, eq=False)
class Gabor3d(Gabor):
    """Three-dimensional Gabor functions, of volumes or of films (z is depth or time).

    The wave vector is ``(cos ε cos θ, cos ε sin θ, sin ε) / λ`` in (x, y, z) order, for kernels of
    axes (z, y, x). The envelope is round across the wave: σ along it, σ/γ in both other directions.
    In a film the stripes move at tan ε px per frame, towards -θ for positive ε.

    Args:
        orientation: θ, rad from +x towards +y of the wave vector's shadow on the image plane.
        elevation: ε, rad from the image plane towards +z, in [-π/2, π/2].
        wavelength: λ, px along the wave vector, as of ``Gabor2d``.
        phase: ψ, as of ``Gabor2d``.
        sigma: σ, as of ``Gabor2d``.
        aspect_ratio: γ, > 0: the standard deviation across the wave vector is σ/γ.
        amplitude: A, the kernel's unit.
        center: ``(*batch, 3)``, (x₀, y₀, z₀) in px from the kernel's middle.
    """

    n_dims: ClassVar[int] = 3
    angle_names: ClassVar[tuple[str, ...]] = ("orientation", "elevation")

    orientation: Tensor
    elevation: Tensor
    wavelength: Tensor
    phase: Tensor
    sigma: Tensor
    aspect_ratio: Tensor
    amplitude: Tensor
    center: Tensor


RECORDS: dict[int, type[Gabor]] = {1: Gabor1d, 2: Gabor2d, 3: Gabor3d}


def wrap(angle: Tensor) -> Tensor:
    """The same angle in [-π, π); one already there comes back bit for bit."""
    turned = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
    turned = torch.where(turned < math.pi, turned, -math.pi)  # the remainder may round up
    return torch.where((angle >= -math.pi) & (angle < math.pi), angle, turned)


def _half_turn(angle: Tensor) -> tuple[Tensor, Tensor]:
    """The angle in [0, π) of the same line, and whether it points the other way."""
    turns = torch.floor(angle / math.pi)
    rest = angle - turns * math.pi
    # Rounding can raise an angle just below 0 to π, and lower one just below π under 0.
    over = rest >= math.pi
    return torch.where(over, 0.0, rest).clamp_min(0.0), (turns + over) % 2 != 0


def as_tensors(
    values: Mapping[str, Number],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Numbers, nested sequences and tensors as tensors of one dtype on one device, as in ``of``."""
    given = [value for value in values.values() if isinstance(value, Tensor)]
    floating = [value.dtype for value in given if value.is_floating_point()]
    dtype = dtype or next(iter(floating), torch.get_default_dtype())
    device = device or (given[0].device if given else None)
    result = {}
    for name, value in values.items():
        try:
            result[name] = torch.as_tensor(value, dtype=dtype, device=device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} must be numbers or a tensor, got {value!r:.60}.") from None
    return result


def plain(value: Any) -> Any:
    """The same with infinities and NaN, which JSON cannot write, as "inf", "-inf" and "nan"."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _parsed(value: Any) -> Any:
    """The inverse of ``plain`` for a record's numbers."""
    return [_parsed(item) for item in value] if isinstance(value, list) else float(value)
