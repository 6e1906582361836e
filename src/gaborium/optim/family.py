"""The kernels that a Gabor layer can have, as a function of the numbers that it learns."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from gaborium.optim.jacobian import kernels_and_slopes
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
        self._index: Tensor | None = None
        self.dtype = torch.promote_types(layer.log_sigma.dtype, torch.float32)
        parameters = dict(layer.named_parameters(recurse=False))
        self._raw_names = list(layer.raw_coordinates.raw_fields())
        self._parameters = [name for name in self._raw_names if name in parameters]

    def parameters(self) -> list[Tensor]:
        """The layer's raw parameters, whether they require a gradient at present or not."""
        return [getattr(self.layer, name) for name in self._parameters]

    @property
    def names(self) -> list[str]:
        """The raw tensors in the order of z's columns: those that require a gradient now."""
        return [name for name in self._parameters if getattr(self.layer, name).requires_grad]

    def only(self, index: Tensor) -> KernelFamily:
        """The same for some filters, whose rows of z are then all there are."""
        part = copy.copy(self)
        part._index = index if self._index is None else self._index[index]
        part.n_filters = len(index)
        return part

    def read(self) -> Tensor:
        """The present z, ``(filters, p)``."""
        return torch.cat([self._value(name).flatten(1) for name in self.names], 1)

    def write(self, z: Tensor) -> None:
        """Set the layer's parameters."""
        with torch.no_grad():
            for name, value in self._split(z).items():
                getattr(self.layer, name).copy_(value)

    def kernels(self, z: Tensor) -> Tensor:
        """``(filters, members, n)``."""
        return self.layer.kernels_at(self._raw(z)).reshape(len(z), self.n_members, -1)

    def jacobian(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The kernels, and their derivatives ``(filters, members, p, n)``."""
        return kernels_and_slopes(self.layer, self._raw(z), self.names)

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
        """The record that z means."""
        params: Gabor = self.layer.raw_coordinates.from_raw(self._raw(z))
        return params

    def rows_of(self, params: Gabor) -> Tensor:
        """The z of a record in the layer's shapes; what the layer does not learn is left out."""
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
