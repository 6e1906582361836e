"""The kernels that a Gabor layer can have, as a function of the numbers that it learns."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from gaborium.params import Gabor

_NARROWEST = 0.2  # px: a smaller sigma leaves one pixel
_STRETCHED = 20.0
_FASTEST = 0.5  # cycles/px: above it a wave is aliased


class KernelFamily:
    """One layer's kernels ``W(z)``, with a row z of raw numbers per filter.

    A filter's kernels are a tensor ``(members, n)``: two members where the output is a quadrature
    pair or an energy, otherwise one, and n = channels · pixels.

    Args:
        layer: a Gabor layer that learns at least one field.

    Example:
        >>> from gaborium import GaborConv2d
        >>> family = KernelFamily(GaborConv2d(3, 16, 7))
        >>> z = family.read()
        >>> z.shape, family.kernels(z).shape, family.jacobian(z)[1].shape
        (torch.Size([16, 10]), torch.Size([16, 1, 147]), torch.Size([16, 1, 10, 147]))
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.n_filters: int = layer.n_filters
        self.n_members = 1 if layer.output == "real" else 2
        parameters = dict(layer.named_parameters(recurse=False))
        names = layer.raw_coordinates.raw_fields()
        self.names = [name for name in names if name in parameters]
        self.frozen = [name for name in names if name not in parameters]
        self.shapes = {name: parameters[name].shape[1:] for name in self.names}

    def parameters(self) -> list[Tensor]:
        """The layer's raw parameters, in the order of z's columns."""
        return [getattr(self.layer, name) for name in self.names]

    def read(self) -> Tensor:
        """The present z, ``(filters, p)``, in float64."""
        rows = [value.detach().double().flatten(1) for value in self.parameters()]
        return torch.cat(rows, 1)

    def write(self, z: Tensor) -> None:
        """Set the layer's parameters."""
        with torch.no_grad():
            for name, value in self._split(z).items():
                getattr(self.layer, name).copy_(value)

    def kernels(self, z: Tensor) -> Tensor:
        """``(filters, members, n)``."""
        raw = self._split(z)
        for name in self.frozen:
            raw[name] = getattr(self.layer, name).double()
        return self.layer.kernels_at(raw).reshape(len(z), self.n_members, -1)

    def jacobian(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The kernels, and their derivatives ``(filters, members, p, n)``."""
        p = z.shape[1]
        tangents = torch.eye(p, dtype=z.dtype, device=z.device)[:, None].expand(p, *z.shape)

        def along(tangent: Tensor) -> Any:
            return jvp(self.kernels, (z,), (tangent,))

        kernels, slopes = vmap(along)(tangents)
        return kernels[0], slopes.movedim(0, 2)

    def excess(self, z: Tensor) -> Tensor:
        """How far each filter lies beyond what pixels can show, ``(filters,)``; 0 within.

        In octaves and kernel lengths: of an envelope narrower than a pixel or wider than the
        kernel, a wave above 0.5 cycles/px, a centre outside.
        """
        params = self.record(z)
        largest = max(self.layer.kernel_size)
        beyond = [(params.sigma / largest).log2(), (_NARROWEST / params.sigma).log2()]
        if params.n_dims > 1:
            ratio = params.as_dict()["aspect_ratio"]
            beyond += [(ratio / _STRETCHED).log2(), (1 / _STRETCHED / ratio).log2()]
        beyond += [params.frequency - _FASTEST, params.center.abs().amax(-1) / largest - 0.5]
        total = torch.stack([part.clamp_min(0).flatten(1).sum(1) for part in beyond]).sum(0)
        return torch.where(z.isfinite().all(1), total, torch.inf)

    def record(self, z: Tensor) -> Gabor:
        """The record that z means, in float64."""
        raw = self._split(z)
        for name in self.frozen:
            raw[name] = getattr(self.layer, name).detach().double()
        params: Gabor = self.layer.raw_coordinates.from_raw(raw)
        return params

    def rows_of(self, params: Gabor) -> Tensor:
        """The z of a record in the layer's shapes; what the layer does not learn is left out."""
        raw = self.layer.raw_coordinates.to_raw(params)
        return torch.cat([raw[name].flatten(1) for name in self.names], 1)

    def _split(self, z: Tensor) -> dict[str, Tensor]:
        widths = [math.prod(shape) for shape in self.shapes.values()]
        parts = z.split(widths, 1)
        return {
            name: part.reshape(len(z), *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
