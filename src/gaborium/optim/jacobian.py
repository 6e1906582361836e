"""How the kernels of a Gabor layer change with its raw parameters, in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gaborium.kernels import even_odd, log_slopes, with_unit_amplitude
from gaborium.layers import FAINTEST
from gaborium.params import Waveform

Pair = tuple[Tensor, Tensor]  # something of an even part, and the same of an odd part


def kernels_and_slopes(
    layer: Any, raw: Mapping[str, Tensor], names: Iterable[str]
) -> tuple[Tensor, Tensor]:
    """The kernels of a layer at some raw parameters, and their derivatives.

    Args:
        layer: a Gabor layer.
        raw: all of its raw tensors, in the layer's shapes.
        names: of the raw tensors to differentiate by, in the order of the columns.

    Returns:
        Kernels ``(filters, members, n)`` and derivatives ``(filters, members, p, n)``, with
        n = channels · pixels and p = raw numbers per filter.

    Example:
        >>> from gaborium import GaborConv2d
        >>> layer = GaborConv2d(3, 16, 7, bias=False)
        >>> raw = dict(layer.named_parameters()) | dict(layer.named_buffers())
        >>> kernels, slopes = kernels_and_slopes(layer, raw, ["log_sigma", "even"])
        >>> kernels.shape, slopes.shape
        (torch.Size([16, 1, 147]), torch.Size([16, 1, 4, 147]))
    """
    wave, tangents = layer.raw_coordinates.waveform(raw), layer.raw_coordinates.slopes(raw)
    in_pairs = layer.output != "real"
    functions, weights = _Functions(layer, wave), _weights_of(wave)
    kernels = _combined(weights, functions.values, in_pairs)
    norm = _Norm(wave, functions.values, in_pairs) if layer.unit_norm else None

    columns = []
    for name in names:
        tangent = tangents[name]
        if "even" in tangent or "odd" in tangent:
            change = _change_of_weights(tangent)
            slope = _combined(change, functions.values, in_pairs)
            if norm is not None:
                change = norm.change_of_weights(change)
                slope = norm.slope(kernels, slope, _combined(change, functions.values, in_pairs))
        else:
            turned = functions.slopes(tangent)
            slope = _combined(weights, turned, in_pairs)
            if norm is not None:
                slope = norm.slope(kernels, slope, _combined(norm.weights, turned, in_pairs))
        if raw[name][0].numel() > slope.shape[2]:
            # Every channel has numbers of its own, which leave the others' kernels alone.
            slope = torch.diag_embed(slope.movedim(3, -1), dim1=2, dim2=4).flatten(2, 3)
        columns.append(slope.flatten(3))
    if norm is not None:
        kernels = kernels / norm.size
    return kernels.squeeze(2).flatten(2), torch.cat(columns, 2)


def _combined(weights: Pair, functions: Pair, in_pairs: bool) -> Tensor:
    """Kernels of weights ``(filters, c, channels)``: ``(filters, members, c, channels, pixels)``.

    The functions have shape ``(filters, c, 1 or channels, pixels)``; the axis c is that of the
    components by which something is differentiated, otherwise 1.
    """
    (a, b), (even, odd) = (part.unsqueeze(-1) for part in weights), functions
    kernel = a * even - b * odd
    if not in_pairs:
        return kernel.unsqueeze(1)
    return torch.stack([kernel, b * even + a * odd], 1)


def _weights_of(wave: Waveform) -> Pair:
    return wave.even.unsqueeze(1), wave.odd.unsqueeze(1)


def _change_of_weights(tangent: Mapping[str, Tensor]) -> Pair:
    parts = {field: slope.squeeze(-1).movedim(-1, 1) for field, slope in tangent.items()}
    none = torch.zeros_like(next(iter(parts.values())))
    return parts.get("even", none), parts.get("odd", none)


class _Functions:
    """The even and the odd function of every filter, as the layer combines them."""

    def __init__(self, layer: Any, wave: Waveform) -> None:
        self.of_envelope, self.of_phase = log_slopes(wave, layer.kernel_size)
        self.whole = _flat(even_odd(wave, layer.kernel_size))
        self.envelope: Tensor | None = None
        self.values = self.whole
        if layer.dc == "remove":
            still = wave._replace(wave_vector=torch.zeros_like(wave.wave_vector))
            self.envelope = _flat(even_odd(still, layer.kernel_size))[0]
            self.sum = self.envelope.sum(-1, keepdim=True).clamp_min(1e-30)
            even, odd = self.whole
            self.values = even - self._share(even), odd - self._share(odd)

    def slopes(self, tangent: Mapping[str, Tensor]) -> Pair:
        """Derivatives by a raw tensor, given the waveform's."""
        of_envelope = _along(tangent, self.of_envelope)
        of_phase = _along(tangent, self.of_phase)
        even, odd = self.whole
        turned = even * of_envelope - odd * of_phase, odd * of_envelope + even * of_phase
        if self.envelope is None:
            return turned
        grown = self.envelope * of_envelope
        grown = (grown - self._share(grown) * (self.sum > 1e-30)) / self.sum
        moved_even, moved_odd = (
            moved - self._share(moved) - part.sum(-1, keepdim=True) * grown
            for part, moved in zip(self.whole, turned, strict=True)
        )
        return moved_even, moved_odd

    def _share(self, part: Tensor) -> Tensor:
        """What of the envelope has the same sum."""
        assert self.envelope is not None
        return part.sum(-1, keepdim=True) / self.sum * self.envelope


def _flat(parts: Pair) -> Pair:
    even, odd = (part.flatten(2).unsqueeze(1) for part in parts)
    return even, odd


def _along(tangent: Mapping[str, Tensor], slopes: Mapping[str, Tensor]) -> Tensor | float:
    """Derivatives ``(filters, c, 1 or channels, pixels)``; 0 where nothing moves."""
    moved = [tangent[field] @ slopes[field] for field in tangent if field in slopes]
    return sum(moved[1:], moved[0]).movedim(2, 1) if moved else 0.0


class _Norm:
    """What divides the kernels where the amplitude is their norm."""

    def __init__(self, wave: Waveform, functions: Pair, in_pairs: bool) -> None:
        self.weights = _weights_of(with_unit_amplitude(wave))
        self.unit = _combined(self.weights, functions, in_pairs)
        mean = self.unit.square().sum((1, -1), keepdim=True) / self.unit.shape[1]
        self.size = mean.sqrt().clamp_min(FAINTEST)  # (filters, 1, 1, channels, 1)
        self.is_free = mean.sqrt() > FAINTEST
        self.amplitude = torch.hypot(*_weights_of(wave))

    def change_of_weights(self, change: Pair) -> Pair:
        """How the weights of amplitude 1 change when those of the kernel do."""
        a, b = self.weights
        turn = (a * change[1] - b * change[0]) / self.amplitude.clamp_min(1e-12)
        turn = torch.where(self.amplitude < 1e-12, 0.0, turn)
        return -b * turn, a * turn

    def slope(self, kernels: Tensor, slope: Tensor, of_unit: Tensor) -> Tensor:
        """The derivative of the kernels when they have been divided."""
        of_size = (self.unit * of_unit).sum((1, -1), keepdim=True) / self.unit.shape[1] / self.size
        return (slope - kernels * (of_size / self.size) * self.is_free) / self.size
