"""A convolution layer in which some filters are Gabor functions and the others are free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gaborium.layers.gabor import GABOR_LAYERS, GaborLayer, draw_uniform, plain_conv


class MixedConv(nn.Module):
    """A convolution in which some filters are Gabor functions and the others are free.

    First layers of trained networks are mixed: next to oriented edges they have colour contrasts
    and other kernels that no Gabor function fits. Both kinds go through one convolution.

    Convention:
        - output channel ``i`` belongs to filter ``order[i]``; filters are counted from the Gabor
          layer's channels to the free ones
        - arguments of the convolution (stride, padding, ...) are the Gabor layer's, for all
        - the layer is convolved with ``weight``: ``gabor.forward`` and its hooks are not called

    Args:
        gabor: a ``GaborConvNd`` with ``groups=1`` and an output of ``"real"`` or ``"quadrature"``.
            It becomes a part of this layer, under the name ``gabor``.
        free: how many free filters, drawn as ``nn.ConvNd`` draws its own; or their kernels,
            ``(filters, in_channels, *kernel_size)``, which are copied.
        free_bias: of the free filters ``(filters,)``; by default drawn as ``nn.ConvNd`` does, if
            the Gabor layer has a bias.
        order: the filter of each output channel, a permutation; by default Gabor first.
        seed: of the random draws; by default torch's global generator.

    Attributes:
        gabor: the Gabor layer.
        free: the free kernels, a parameter.
        free_bias: their bias, a parameter, or ``None``.
        order: int64 ``(out_channels,)``, a buffer.

    Raises:
        TypeError: ``gabor`` is no Gabor layer, or a value is of another type.
        ValueError: its groups or its output are others, a shape does not fit, or ``order`` is no
            permutation.

    Example:
        >>> from gaborium import GaborConv2d
        >>> layer = MixedConv(GaborConv2d(3, 12, 7, padding=3), free=4)
        >>> layer(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 16, 32, 32])
        >>> layer.gabor.params.orientation.shape, layer.free.shape
        (torch.Size([12, 1]), torch.Size([4, 3, 7, 7]))
    """

    order: Tensor
    free_bias: nn.Parameter | None

    def __init__(
        self,
        gabor: GaborLayer,
        free: int | Tensor,
        *,
        free_bias: Tensor | None = None,
        order: Sequence[int] | Tensor | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(gabor, GABOR_LAYERS):
            raise TypeError(
                f"gabor must be a GaborConv1d, GaborConv2d or GaborConv3d, got "
                f"{type(gabor).__name__}."
            )
        if gabor.groups != 1 or gabor.output == "energy":
            raise ValueError(
                "gabor must have groups=1 and output='real' or 'quadrature', so that its kernels "
                f"fit with free ones; got groups={gabor.groups}, output={gabor.output!r}."
            )
        is_number = isinstance(free, int) and not isinstance(free, bool)
        if not is_number and not (isinstance(free, Tensor) and free.is_floating_point()):
            kind = free.dtype if isinstance(free, Tensor) else type(free).__name__
            raise TypeError(f"free must be a number of filters or floating kernels, got {kind}.")
        n_free = len(free) if isinstance(free, Tensor) else free
        if n_free < 1:
            raise ValueError(f"free must be at least 1 filter, got {n_free}.")

        self.gabor = gabor
        self.n_dims: int = gabor.n_dims
        self.in_channels, self.groups = gabor.in_channels, 1
        self.out_channels = gabor.out_channels + n_free
        self.kernel_size: Any = gabor.kernel_size
        self.stride, self.padding, self.dilation = gabor.stride, gabor.padding, gabor.dilation
        self.padding_mode = gabor.padding_mode
        self.seed = seed
        like = gabor.log_sigma.detach()
        self.free = nn.Parameter(like.new_empty(n_free, gabor.in_channels, *gabor.kernel_size))
        bias = None if gabor.bias is None else nn.Parameter(like.new_empty(n_free))
        self.register_parameter("free_bias", bias)
        self.register_buffer("order", _permutation(order, self.out_channels).to(like.device))
        self.reset_free()
        if free_bias is not None and bias is None:
            raise ValueError("free_bias needs a Gabor layer with a bias; this one has bias=False.")
        for name, given in (("free", free), ("free_bias", free_bias)):
            own = getattr(self, name)
            if not isinstance(given, Tensor):
                continue
            if given.shape != own.shape:
                raise ValueError(
                    f"{name} must have shape {tuple(own.shape)}, got {tuple(given.shape)}."
                )
            with torch.no_grad():
                own.copy_(given)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(batch, in_channels, *size)``, or the same without batch."""
        weight, bias = self.gabor.weight_and_bias(input)
        weight = torch.cat([weight, self.free])[self.order]
        if bias is not None:
            free = bias.new_zeros(len(self.free)) if self.free_bias is None else self.free_bias
            bias = torch.cat([bias, free])[self.order]
        return self.gabor.convolve(input, weight, bias)

    @property
    def weight(self) -> Tensor:
        """All kernels, ``(out_channels, in_channels, *kernel_size)``, sampled at this moment."""
        return torch.cat([self.gabor.weight, self.free])[self.order]

    @property
    def bias(self) -> Tensor | None:
        """The bias of each output channel, or ``None``."""
        if self.gabor.bias is None or self.free_bias is None:
            return None
        return torch.cat([self.gabor.bias, self.free_bias])[self.order]

    @property
    def is_gabor(self) -> Tensor:
        """Which output channels are Gabor filters, boolean ``(out_channels,)``."""
        return self.order < self.gabor.out_channels

    def reset_parameters(self) -> None:
        """Begin again: the Gabor layer from its start, the free filters as ``nn.ConvNd`` does."""
        self.gabor.reset_parameters()
        self.reset_free()

    def reset_free(self) -> None:
        """Draw the free filters and their bias as ``nn.ConvNd`` draws its own."""
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        for value in (self.free, self.free_bias):
            draw_uniform(value, math.prod(self.free.shape[1:]), generator)

    def to_conv(self) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
        """A plain ``nn.ConvNd`` with the present kernels, equal outputs and no Gabor inside.

        Returns:
            A new layer on the same device, of the same dtype and training mode; all its kernels
            learn freely.

        Example:
            >>> from gaborium import GaborConv1d
            >>> layer = MixedConv(GaborConv1d(1, 3, 9), free=2)
            >>> sound = torch.rand(1, 1, 50)
            >>> torch.equal(layer(sound), layer.to_conv()(sound))
            True
        """
        return plain_conv(self, self.weight, self.bias)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        places = state_dict.get(f"{prefix}order")
        if isinstance(places, Tensor) and places.shape == self.order.shape:
            _permutation(places, self.out_channels)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Channels, and how many filters are free."""
        return f"{self.in_channels}, {self.out_channels}, free={len(self.free)}"


def _permutation(order: Sequence[int] | Tensor | None, n: int) -> Tensor:
    places = torch.arange(n) if order is None else torch.as_tensor(order).flatten()
    if places.is_floating_point() or sorted(places.tolist()) != list(range(n)):
        raise ValueError(
            f"order must hold each of 0 to {n - 1} once, the filter of each output channel; got "
            f"{places.tolist()!s:.60}."
        )
    return places.to(torch.int64)
