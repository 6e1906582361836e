"""A convolution layer in which some filters are Gabor functions and the others are free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gaborium.layers import GABOR_LAYERS, GaborConv1d, GaborConv2d, GaborConv3d, plain_conv

GaborLayer = GaborConv1d | GaborConv2d | GaborConv3d


class MixedConv(nn.Module):
    """A convolution whose kernels are Gabor functions and, some of them, free.

    First layers of trained networks are mixed: beside oriented edges they hold colour contrasts
    and others that no Gabor function is. Both kinds of kernel go through one convolution.

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
        seed: of what is drawn; by default torch's global generator.

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
                f"fit beside free ones; got groups={gabor.groups}, output={gabor.output!r}."
            )
        shape = (gabor.in_channels, *gabor.kernel_size)
        if isinstance(free, bool) or not isinstance(free, (int, Tensor)):
            raise TypeError(
                f"free must be a number of filters or their kernels, got {type(free).__name__}."
            )
        if isinstance(free, Tensor) and tuple(free.shape[1:]) != shape:
            raise ValueError(
                f"free must have shape {('filters', *shape)} as the Gabor layer wants it, got "
                f"{tuple(free.shape)}."
            )
        n_free = free if isinstance(free, int) else len(free)
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
        self.free = nn.Parameter(like.new_empty(n_free, *shape))
        if gabor.bias is not None:
            self.free_bias = nn.Parameter(like.new_empty(n_free))
        else:
            self.register_parameter("free_bias", None)
        places = _permutation(order, self.out_channels)
        self.register_buffer("order", places.to(like.device))
        self.reset_free()
        with torch.no_grad():
            if isinstance(free, Tensor):
                if not free.is_floating_point():
                    raise TypeError(f"free must be of a real floating type, got {free.dtype}.")
                self.free.copy_(free)
            if free_bias is not None:
                if self.free_bias is None:
                    raise ValueError(
                        "free_bias needs a Gabor layer with a bias; this one has bias=False."
                    )
                if free_bias.shape != self.free_bias.shape:
                    raise ValueError(
                        f"free_bias must have shape ({n_free},), one per free filter, got "
                        f"{tuple(free_bias.shape)}."
                    )
                self.free_bias.copy_(free_bias)

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
        """Which output channels are Gabor filters', boolean ``(out_channels,)``."""
        return self.order < self.gabor.out_channels

    def reset_parameters(self) -> None:
        """Begin again: the Gabor layer as it starts, the free filters as ``nn.ConvNd`` does."""
        self.gabor.reset_parameters()
        self.reset_free()

    def reset_free(self) -> None:
        """Draw the free filters and their bias as ``nn.ConvNd`` draws its own."""
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        bound = 1 / math.sqrt(math.prod(self.free.shape[1:]))
        with torch.no_grad():
            for value in (self.free, self.free_bias):
                if value is not None:
                    # Drawn on the CPU, so that a seed gives the same layer on every device.
                    drawn = torch.empty_like(value, device="cpu")
                    value.copy_(drawn.uniform_(-bound, bound, generator=generator))

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
        """What there is beside the Gabor layer."""
        return f"{self.in_channels}, {self.out_channels}, free={len(self.free)}"


def _permutation(order: Sequence[int] | Tensor | None, n: int) -> Tensor:
    if order is None:
        return torch.arange(n)
    places = torch.as_tensor(order)
    if places.is_floating_point() or sorted(places.flatten().tolist()) != list(range(n)):
        raise ValueError(
            f"order must hold each of 0 to {n - 1} once, the filter of each output channel; got "
            f"{_shortened(places)}."
        )
    return places.to(torch.int64).flatten()


def _shortened(places: Tensor) -> str:
    values = places.flatten().tolist()
    return f"{values[:8]}" + (f" and {len(values) - 8} more" if len(values) > 8 else "")
