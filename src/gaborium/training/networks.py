"""Small networks that differ in their first layer alone."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium.conversion import find_first_conv, replace_first_conv
from gaborium.functions.params import Gabor
from gaborium.layers import LAYERS, PLAIN_LAYERS, MixedConv
from gaborium.support import as_sizes, one_of
from gaborium.training.recipe import Recipe, Variant

# A module of the caller's; or a function from variant and seed to a network and its first layer.
Network = nn.Module | Callable[[str, int], tuple[nn.Module, nn.Module]]


def make_first_layer(
    variant: str,
    *,
    n_dims: int,
    in_channels: int,
    n_filters: int,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str | None = None,
    start: str | Gabor = "bank",
    learn: Collection[str] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Make a first layer; the variants differ in their kernels alone.

    Convention:
        - ``"free"``: an ordinary convolution, initialised like ``nn.ConvNd``; ``"gabor"``: Gabor
          filters that learn; ``"gabor-fixed"``: the same filters without learning; ``"mixed"``:
          Gabor filters in the first half of the channels, free ones in the second
        - all start at one scale: white input of unit variance gives responses of variance 1/3
        - they have no bias, since batch normalisation follows

    Args:
        variant: ``"free"``, ``"gabor"``, ``"gabor-fixed"`` or ``"mixed"``.
        n_dims: spatial dimensions of the input: 1, 2 or 3.
        in_channels: channels of the input.
        n_filters: channels of the output.
        kernel_size: pixels along each axis.
        stride: stride along each axis.
        padding: as for ``nn.ConvNd``; by default half a kernel.
        start: start of the Gabor filters: ``"bank"``, ``"random"``, ``"v1"``, or a record of shape
            ``(filters, channels or 1)``.
        learn: fields of the record that train in ``"gabor"`` and ``"mixed"``; by default the
            layer's own choice.
        seed: seed of random kernels. torch's global generator is not used.

    Raises:
        ValueError: a name is unknown, or a number is out of range.

    Example:
        >>> for name in ("free", "gabor", "gabor-fixed", "mixed"):
        ...     layer = make_first_layer(name, n_dims=2, in_channels=1, n_filters=8, kernel_size=9)
        ...     print(name, n_learned(layer))
        free 648
        gabor 48
        gabor-fixed 0
        mixed 348
    """
    one_of("variant", variant, get_args(Variant))
    if n_filters < (2 if variant == "mixed" else 1):
        raise ValueError(f"n_filters must be at least 1 (mixed: 2), got {n_filters}.")
    size = as_sizes("kernel_size", kernel_size, n_dims)
    padding = tuple(side // 2 for side in size) if padding is None else padding
    shared: dict[str, Any] = {"stride": stride, "padding": padding, "bias": False}
    n_free = {"free": n_filters, "mixed": n_filters // 2}.get(variant, 0)
    bound = 1 / math.sqrt(in_channels * math.prod(size))
    free = torch.empty(n_free, in_channels, *size, device="cpu")
    free.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    if variant == "free":
        plain: Any = PLAIN_LAYERS[n_dims](in_channels, n_filters, size, **shared, device="meta")
        plain.weight = nn.Parameter(free)
        return plain
    gabor = LAYERS[n_dims](
        in_channels,
        n_filters - n_free,
        size,
        **shared,
        start=start,
        learn=() if variant == "gabor-fixed" else learn,
        seed=seed,
    )
    return MixedConv(gabor, free, seed=seed) if n_free else gabor


def make_network(
    recipe: Recipe,
    variant: str,
    seed: int,
    *,
    shape: tuple[int, ...],
    n_classes: int,
    network: Network | None = None,
    start: Gabor | None = None,
) -> tuple[nn.Module, nn.Module]:
    """Return an untrained network for images of a shape, and its first layer; see ``train``."""
    make = functools.partial(
        make_first_layer,
        variant,
        n_dims=len(shape) - 1,
        start=recipe.start if start is None else start,
        learn=recipe.learn,
        seed=seed,
    )
    if network is None:
        sizes = {name: getattr(recipe, name) for name in ("n_filters", "kernel_size", "stride")}
        first = make(in_channels=shape[0], **sizes)
        return SmallCNN(first, n_classes, image_size=shape[1:], seed=seed), first
    if not isinstance(network, nn.Module):
        return network(variant, seed)

    def replacement(conv: Any) -> nn.Module:
        if conv.groups != 1 or set(conv.dilation) != {1} or conv.padding_mode != "zeros":
            raise ValueError(
                "The first convolution of network must have groups=1, dilation=1 and "
                f"padding_mode='zeros', got {conv}."
            )
        names = ("in_channels", "kernel_size", "stride", "padding")
        return make(n_filters=conv.out_channels, **{name: getattr(conv, name) for name in names})

    changed = replace_first_conv(network, replacement)
    return changed, find_first_conv(changed)[1]


class SmallCNN(nn.Module):
    """A first layer, two 3-pixel convolutions, and a linear classifier of pooled responses.

    After each convolution: batch normalisation, ReLU, and max pooling over 2 (in 1-D: 4) pixels
    along every axis while enough pixels are left. At the end the mean over each cell of a grid of
    4 x 4 (in 1-D: 16, in 3-D: 2 x 2 x 2).

    Args:
        first: the first layer, as from ``make_first_layer``; it becomes the network's ``first``.
        n_classes: number of classes.
        image_size: ``(height, width)`` of images, 24 to 64 px; ``(samples,)`` of sounds.
        seed: seed of all weights after the first layer. torch's global generator is not changed.

    Example:
        >>> first = make_first_layer("gabor", n_dims=2, in_channels=1, n_filters=8, kernel_size=7)
        >>> SmallCNN(first, 10, image_size=(28, 28))(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, first: Any, n_classes: int, *, image_size: tuple[int, ...], seed: int = 0
    ) -> None:
        super().__init__()
        self.first = first
        n_channels, *size = output_shape(first, image_size)
        n_dims = len(size)
        step, grid = (4 if n_dims == 1 else 2), {1: 16, 2: 4, 3: 2}[n_dims]
        layers: list[nn.Module] = []
        with seeded(seed):
            for width in (64, 64, None):
                layers += [getattr(nn, f"BatchNorm{n_dims}d")(n_channels), nn.ReLU()]
                if min(size) >= step * grid:
                    layers.append(getattr(nn, f"MaxPool{n_dims}d")(step))
                    size = [side // step for side in size]
                if width is not None:
                    layers.append(PLAIN_LAYERS[n_dims](n_channels, width, 3, padding=1, bias=False))
                    n_channels = width
            self.body = nn.Sequential(*layers, GridPool(grid))
            n_cells = math.prod(-(-side // -(-side // grid)) for side in size)
            self.classifier = nn.Linear(n_channels * n_cells, n_classes)

    def forward(self, input: Tensor) -> Tensor:
        """Return logits ``(batch, n_classes)``."""
        return self.classifier(self.body(self.first(input)).flatten(1))


class GridPool(nn.Module):
    """The mean over each cell of a grid with at most ``grid`` cells along each axis.

    All cells have one size, except for the last ones, which the border cuts. Unlike adaptive
    pooling, its gradient is the same in every run, on any device.
    """

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, input: Tensor) -> Tensor:
        """Return means ``(batch, channels, *cells)``."""
        cell = [-(-side // self.grid) for side in input.shape[2:]]
        return getattr(F, f"avg_pool{input.ndim - 2}d")(input, cell, cell, ceil_mode=True)


def n_learned(module: nn.Module) -> int:
    """How many numbers of a module train."""
    return sum(value.numel() for value in module.parameters() if value.requires_grad)


def output_shape(first: Any, image_size: tuple[int, ...]) -> list[int]:
    """Return channels and size of a first layer's output, measured with a copy of the layer."""
    trial = copy.deepcopy(first).eval()
    like = next((v for v in trial.state_dict().values() if v.is_floating_point()), torch.empty(0))
    with torch.no_grad():
        return list(trial(like.new_zeros(1, first.in_channels, *image_size)).shape[1:])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator of the CPU for a block, without a change after it."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds the generators of all devices.
        torch.default_generator.manual_seed(seed)
        yield
