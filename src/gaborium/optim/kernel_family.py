"""The kernels of a Gabor layer as a function of its parameters, with derivatives in closed form."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gaborium.functions.kernels import even_odd, log_slopes, with_unit_amplitude
from gaborium.functions.params import POSITIVE_FIELDS, Gabor, Waveform
from gaborium.layers import FAINTEST

_MIN_SIGMA = 0.2  # px; a smaller sigma leaves one pixel
_MAX_ASPECT_RATIO = 20.0  # and its inverse is the smallest
_MAX_FREQUENCY = 0.5  # cycles/px; above it a wave is aliased

EvenOdd = tuple[Tensor, Tensor]


class KernelFamily:
    """The kernels ``W(z)`` of one layer, where z is a row of raw parameters per filter.

    The kernels of a filter have shape ``(members, n)``: two members where the output is a
    quadrature pair or an energy, otherwise one, and n = channels · pixels.

    Example:
        >>> from gaborium import GaborConv2d
        >>> family = KernelFamily(GaborConv2d(3, 16, 7))
        >>> z = family.read()
        >>> z.shape, family.kernels(z).shape, family.jacobian(z).shape
        (torch.Size([16, 10]), torch.Size([16, 1, 147]), torch.Size([16, 1, 10, 147]))
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.n_filters: int = layer.n_filters
        self.n_members = 1 if layer.output == "real" else 2
        self.n_pixels = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        self.dtype = torch.promote_types(layer.log_sigma.dtype, torch.float32)
        self._index: Tensor | None = None
        self._raw_names = list(layer.raw_coordinates.raw_fields())
        own = dict(layer.named_parameters(recurse=False))
        self._parameters = [name for name in self._raw_names if name in own]

    def parameters(self) -> list[Tensor]:
        """The layer's raw parameters, also those that require no gradient at present."""
        return [getattr(self.layer, name) for name in self._parameters]

    @property
    def names(self) -> list[str]:
        """The raw parameters that require a gradient, in the order of z's columns."""
        return [name for name in self._parameters if getattr(self.layer, name).requires_grad]

    def select(self, index: Tensor) -> KernelFamily:
        """The family of the filters ``index`` only; z has a row for each of them."""
        part = copy.copy(self)
        part._index = index if self._index is None else self._index[index]
        part.n_filters = len(index)
        return part

    def read(self) -> Tensor:
        """The layer's present z, ``(filters, p)``."""
        return torch.cat([self._value(name).flatten(1) for name in self.names], 1)

    def write(self, z: Tensor) -> None:
        """Set the layer's parameters."""
        with torch.no_grad():
            for name, value in self._split(z).items():
                getattr(self.layer, name).copy_(value)

    def kernels(self, z: Tensor) -> Tensor:
        """``(filters, members, n)``."""
        return self.layer.kernels_at(self._raw(z)).reshape(len(z), self.n_members, -1)

    def jacobian(self, z: Tensor) -> Tensor:
        """Derivatives of the kernels, ``(filters, members, p, n)``."""
        return _jacobian(self.layer, self.layer.raw_coordinates, self._raw(z), self.names)

    def excess(self, z: Tensor) -> Tensor:
        """Distance of each filter from the range that pixels can show, ``(filters,)``; 0 inside.

        In octaves and kernel lengths: of an envelope narrower than a pixel or wider than the
        kernel, a wave above 0.5 cycles/px, a centre outside the kernel.
        """
        params = self.record(z)
        largest = max(self.layer.kernel_size)
        beyond = [(params.sigma / largest).log2(), (_MIN_SIGMA / params.sigma).log2()]
        if params.n_dims > 1:
            ratio = params.as_dict()["aspect_ratio"]
            beyond += [(ratio / _MAX_ASPECT_RATIO).log2(), (1 / _MAX_ASPECT_RATIO / ratio).log2()]
        beyond += [params.frequency - _MAX_FREQUENCY, params.center.abs().amax(-1) / largest - 0.5]
        total = torch.stack([part.clamp_min(0).flatten(1).sum(1) for part in beyond]).sum(0)
        return torch.where(z.isfinite().all(1), total, torch.inf)

    def record(self, z: Tensor) -> Gabor:
        """The Gabor functions of z."""
        params: Gabor = self.layer.raw_coordinates.from_raw(self._raw(z))
        return params

    def rows(self, params: Gabor) -> Tensor:
        """The z of a record in the layer's shapes, without the fields that it does not learn."""
        raw = self.layer.raw_coordinates.to_raw(params)
        return torch.cat([raw[name].flatten(1) for name in self.names], 1)

    def _raw(self, z: Tensor) -> dict[str, Tensor]:
        """All raw tensors, learned or not."""
        moving = self._split(z)
        return {
            name: moving[name] if name in moving else self._value(name) for name in self._raw_names
        }

    def _value(self, name: str) -> Tensor:
        value: Tensor = getattr(self.layer, name)
        value = value.detach().to(self.dtype)
        return value if self._index is None else value[self._index]

    def _split(self, z: Tensor) -> dict[str, Tensor]:
        shapes = {name: getattr(self.layer, name).shape[1:] for name in self.names}
        parts = z.split([math.prod(shape) for shape in shapes.values()], 1)
        return {
            name: part.reshape(len(z), *shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }


def kernel_jacobian(layer: Any) -> tuple[tuple[str, ...], Tensor]:
    """Derivatives of a layer's kernels by the fields that it learns, in closed form and float64.

    Convention:
        - derivatives are in the fields' units: per rad, per px
        - of fields that each channel has for itself, every channel counts: ``"phase[2]"``
        - the components of the centre are ``"center_x"``, ``"center_y"``, ``"center_z"``
        - options of the layer count: ``dc``, ``unit_norm``, ``output``

    Returns:
        The parameters' names, and derivatives ``(filters, members, parameters, n)``.

    Example:
        >>> from gaborium import GaborConv2d
        >>> layer = GaborConv2d(2, 16, 7, learn=("sigma", "phase"))
        >>> names, slopes = kernel_jacobian(layer)
        >>> names, slopes.shape
        (('phase[0]', 'phase[1]', 'sigma'), torch.Size([16, 1, 3, 98]))
    """
    params = layer.params.detach().to(torch.float64)
    coordinates = dataclasses.replace(
        layer.raw_coordinates, joint_wave=False, joint_phase=False, min_wavelength=None
    )
    raw = coordinates.to_raw(params)
    raw_names = {field: name for name, (field,) in coordinates.raw_fields().items()}
    names: list[str] = []
    columns = []
    for field, value in params.as_dict().items():
        if field not in layer.learn:
            continue
        slope = _jacobian(layer, coordinates, raw, [raw_names[field]])
        # The positive fields are stored as logarithms.
        columns.append(slope / value[:, None, :, None] if field in POSITIVE_FIELDS else slope)
        parts = [f"center_{axis}" for axis in "xyz"[: params.n_dims]]
        parts = parts if field == "center" else [field]
        n_channels = value.shape[1]
        names += [
            f"{part}[{c}]" if n_channels > 1 else part for c in range(n_channels) for part in parts
        ]
    if not names:
        raise ValueError("The layer learns no field of its record; give it learn=(...).")
    return tuple(names), torch.cat(columns, 2)


def _jacobian(
    layer: Any, coordinates: Any, raw: Mapping[str, Tensor], names: Iterable[str]
) -> Tensor:
    """Derivatives ``(filters, members, p, n)`` by the raw tensors ``names``, in their order."""
    wave, tangents = coordinates.waveform(raw), coordinates.slopes(raw)
    in_pairs = layer.output != "real"
    weights, basis = (wave.even.unsqueeze(1), wave.odd.unsqueeze(1)), _Basis(layer, wave)
    norm = _Norm(wave, basis.functions, in_pairs) if layer.unit_norm else None
    columns = []
    for name in names:
        tangent = tangents[name]
        if "even" in tangent or "odd" in tangent:
            change, functions = _weights_tangent(tangent), basis.functions
            unit_change = norm.unit_weights_tangent(change) if norm else None
        else:
            change, functions = weights, basis.tangent(tangent)
            unit_change = norm.unit_weights if norm else None
        slope = _combine(change, functions, in_pairs)
        if norm is not None and unit_change is not None:
            slope = norm.quotient_rule(slope, _combine(unit_change, functions, in_pairs))
        if raw[name][0].numel() > slope.shape[2]:
            # Each channel has its own numbers, which do not change the other channels' kernels.
            slope = torch.diag_embed(slope.movedim(3, -1), dim1=2, dim2=4).flatten(2, 3)
        columns.append(slope.flatten(3))
    return torch.cat(columns, 2)


def _combine(weights: EvenOdd, functions: EvenOdd, in_pairs: bool) -> Tensor:
    """Kernels ``(filters, members, c, channels, pixels)`` of weights ``(filters, c, channels)``.

    The functions have shape ``(filters, c, 1 or channels, pixels)``. The axis c holds the
    components of the parameter of a derivative; otherwise it has length 1.
    """
    (a, b), (even, odd) = (part.unsqueeze(-1) for part in weights), functions
    kernel = a * even - b * odd
    if not in_pairs:
        return kernel.unsqueeze(1)
    return torch.stack([kernel, b * even + a * odd], 1)


def _weights_tangent(tangent: Mapping[str, Tensor]) -> EvenOdd:
    parts = {field: slope.squeeze(-1).movedim(-1, 1) for field, slope in tangent.items()}
    zero = torch.zeros_like(next(iter(parts.values())))
    return parts.get("even", zero), parts.get("odd", zero)


class _Basis:
    """The even and odd functions of every filter, less their sums where ``dc`` is removed."""

    def __init__(self, layer: Any, wave: Waveform) -> None:
        self.log_envelope_slopes, self.angle_slopes = log_slopes(wave, layer.kernel_size)
        self.gabor = _flat(even_odd(wave, layer.kernel_size))
        self.functions = self.gabor
        self.envelope: Tensor | None = None
        if layer.dc == "remove":
            blob = wave._replace(wave_vector=torch.zeros_like(wave.wave_vector))
            self.envelope = _flat(even_odd(blob, layer.kernel_size))[0]
            self.envelope_sum = self.envelope.sum(-1, keepdim=True).clamp_min(1e-30)
            even, odd = self.gabor
            self.functions = even - self._with_sum_of(even), odd - self._with_sum_of(odd)

    def tangent(self, tangent: Mapping[str, Tensor]) -> EvenOdd:
        """Derivatives of the functions, given the waveform's."""
        of_envelope = _contract(tangent, self.log_envelope_slopes)
        of_angle = _contract(tangent, self.angle_slopes)
        even, odd = self.gabor
        slopes = even * of_envelope - odd * of_angle, odd * of_envelope + even * of_angle
        if self.envelope is None:
            return slopes
        share = self.envelope * of_envelope
        share = (share - self._with_sum_of(share) * (self.envelope_sum > 1e-30)) / self.envelope_sum
        even_slope, odd_slope = (
            slope - self._with_sum_of(slope) - part.sum(-1, keepdim=True) * share
            for part, slope in zip(self.gabor, slopes, strict=True)
        )
        return even_slope, odd_slope

    def _with_sum_of(self, part: Tensor) -> Tensor:
        """The multiple of the envelope that has the same sum."""
        assert self.envelope is not None
        return part.sum(-1, keepdim=True) / self.envelope_sum * self.envelope


def _flat(parts: EvenOdd) -> EvenOdd:
    even, odd = (part.flatten(2).unsqueeze(1) for part in parts)
    return even, odd


def _contract(tangent: Mapping[str, Tensor], slopes: Mapping[str, Tensor]) -> Tensor | float:
    """Chain rule over the waveform's fields: ``(filters, c, 1 or channels, pixels)`` or 0."""
    terms = [tangent[field] @ slopes[field] for field in tangent if field in slopes]
    return sum(terms[1:], terms[0]).movedim(2, 1) if terms else 0.0


class _Norm:
    """The norm that divides the kernels of a layer with ``unit_norm``."""

    def __init__(self, wave: Waveform, functions: EvenOdd, in_pairs: bool) -> None:
        weights, unit = (
            (w.even.unsqueeze(1), w.odd.unsqueeze(1)) for w in (wave, with_unit_amplitude(wave))
        )
        self.unit_weights = unit
        self.kernels = _combine(weights, functions, in_pairs)
        self.unit_kernels = _combine(unit, functions, in_pairs)
        n_members = self.kernels.shape[1]
        mean = self.unit_kernels.square().sum((1, -1), keepdim=True) / n_members
        self.norm = mean.sqrt().clamp_min(FAINTEST)  # (filters, 1, 1, channels, 1)
        self.is_above_least = mean.sqrt() > FAINTEST
        self.amplitude = torch.hypot(*weights)

    def unit_weights_tangent(self, change: EvenOdd) -> EvenOdd:
        """Change of the weights at amplitude 1 for a change of the kernel's weights."""
        a, b = self.unit_weights
        turn = (a * change[1] - b * change[0]) / self.amplitude.clamp_min(1e-12)
        turn = torch.where(self.amplitude < 1e-12, 0.0, turn)
        return -b * turn, a * turn

    def quotient_rule(self, slope: Tensor, unit_slope: Tensor) -> Tensor:
        """Derivative of the normalised kernels, from the slopes of numerator and denominator."""
        n_members = self.kernels.shape[1]
        of_norm = (
            (self.unit_kernels * unit_slope).sum((1, -1), keepdim=True) / n_members / self.norm
        )
        return (slope - self.kernels * (of_norm / self.norm) * self.is_above_least) / self.norm
