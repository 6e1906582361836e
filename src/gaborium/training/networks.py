"""Small networks that differ in their first layer alone."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Collection, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium.conversion import replace_first_conv
from gaborium.errors import as_sizes, one_of
from gaborium.layers import LAYERS, PLAIN_LAYERS, MixedConv, PairEnergy
from gaborium.params import Gabor
from gaborium.training.recipe import Recipe, Start, Variant

_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_MEANS: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMA: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
# The variance of the norm of two independent normal responses of variance 1.
_NORM_VARIANCE = 2 - math.pi / 2


# -- first layers -----------------------------------------------------------------------------


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
    output: str = "real",
    learn: Collection[str] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Make a first layer; the variants differ in their kernels alone.

    Convention:
        - ``"free"``: an ordinary convolution, initialised like ``nn.ConvNd``; ``"gabor"``: Gabor
          filters that learn; ``"gabor-fixed"``: the same filters without learning; ``"mixed"``:
          Gabor filters in the first half of the channels, free ones in the second
        - all start at one scale: white input of unit variance gives responses of variance 1/3
        - none has a bias, since batch normalisation follows
        - with ``output="energy"`` a free channel is the norm of two free kernels, as a Gabor
          channel is the norm of an even and an odd kernel

    Args:
        variant: ``"free"``, ``"gabor"``, ``"gabor-fixed"`` or ``"mixed"``.
        n_dims: spatial dimensions of the input: 1, 2 or 3.
        in_channels: channels of the input.
        n_filters: channels of the output.
        kernel_size: pixels along each axis.
        stride: stride along each axis.
        padding: as for ``nn.ConvNd``; by default half a kernel.
        start: start of the Gabor filters: ``"bank"``, ``"random"``, ``"v1"``, or ``"equal"``, one
            Gabor function, drawn as for ``"random"``, in all channels; or a record of shape
            ``(filters, channels or 1)``.
        output: ``"real"`` or ``"energy"``.
        learn: fields of the record that train, by default the layer's own choice; of no effect
            for ``"free"`` and ``"gabor-fixed"``.
        seed: seed of random kernels. torch's global generator is not used.

    Returns:
        A layer with ``in_channels``, ``out_channels`` and ``output``.

    Raises:
        ValueError: a name is none of the above, or a number is out of range.

    Example:
        >>> from gaborium.layers import n_learned
        >>> for name in ("free", "gabor", "gabor-fixed", "mixed"):
        ...     layer = make_first_layer(name, n_dims=2, in_channels=1, n_filters=8, kernel_size=9)
        ...     print(name, n_learned(layer))
        free 648
        gabor 48
        gabor-fixed 0
        mixed 348
    """
    one_of("variant", variant, get_args(Variant))
    if isinstance(start, str):
        one_of("start", start, get_args(Start))
    one_of("output", output, ("real", "energy"))
    if n_dims not in LAYERS:
        raise ValueError(f"n_dims must be 1, 2 or 3, got {n_dims!r}.")
    if n_filters < (2 if variant == "mixed" else 1):
        raise ValueError(f"n_filters must be at least 1 (mixed: 2), got {n_filters}.")
    size = as_sizes("kernel_size", kernel_size, n_dims)
    padding = tuple(side // 2 for side in size) if padding is None else padding
    shared: dict[str, Any] = {"stride": stride, "padding": padding, "bias": False}
    if variant == "free":
        n_kernels = n_filters * (2 if output == "energy" else 1)
        plain: Any = PLAIN_LAYERS[n_dims](in_channels, n_kernels, size, **shared, device="meta")
        plain.weight = nn.Parameter(_free_kernels(plain.weight.shape, output, seed))
        return plain if output == "real" else PairEnergy(plain)
    n_free = n_filters // 2 if variant == "mixed" else 0
    # A Gabor layer computes the energy itself; for a mixed layer PairEnergy does.
    inner = "quadrature" if n_free and output == "energy" else output
    n_kernels = 2 if inner == "quadrature" else 1  # of each channel
    equal = start == "equal"
    options: dict[str, Any] = {"start": "random" if equal else start, "seed": seed}
    gabor = LAYERS[n_dims](
        in_channels,
        n_kernels * (n_filters - n_free),
        size,
        **shared,
        **options,
        learn=() if variant == "gabor-fixed" else learn,
        output=inner,
    )
    if equal or (inner != output and isinstance(start, str)):
        # One filter for all channels; or filters with the amplitudes of an energy.
        n_drawn = 1 if equal else n_filters - n_free
        drawn = LAYERS[n_dims](in_channels, n_drawn, size, bias=False, output=output, **options)
        values = drawn.state_dict()
        with torch.no_grad():
            for name, value in gabor.state_dict(keep_vars=True).items():
                value.copy_(values[name].expand_as(value))
    if not n_free:
        return gabor
    shape = torch.Size((n_kernels * n_free, in_channels, *size))
    mixed = MixedConv(gabor, _free_kernels(shape, output, seed), seed=seed)
    return mixed if output == "real" else PairEnergy(mixed)


def _free_kernels(shape: torch.Size, output: str, seed: int) -> Tensor:
    """Kernels as ``nn.ConvNd`` draws them; for energies larger, so that norms have their scale."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    if output == "energy":
        bound /= math.sqrt(_NORM_VARIANCE)
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)


# -- networks ---------------------------------------------------------------------------------


def build_network(
    kind: str | type[nn.Module],
    *,
    first: nn.Module,
    image_size: tuple[int, ...],
    n_classes: int,
    seed: int = 0,
) -> nn.Module:
    """Build a classifier of images or sounds around a given first layer.

    Args:
        kind: ``"cnn"``, see ``SmallCNN``, or ``"energy"``, see ``EnergyClassifier``; or a class of
            yours that is called as they are: ``(first, n_classes, image_size=...)``.
        first: the first layer, as from ``make_first_layer``; it becomes the network's ``first``.
        image_size: ``(height, width)`` of images, ``(samples,)`` of sounds.
        n_classes: number of classes.
        seed: seed of all weights after the first layer. torch's global generator is not changed.

    Returns:
        A network from ``(batch, in_channels, *image_size)`` to logits ``(batch, n_classes)``.

    Raises:
        ValueError: there is no such network, or the first layer does not fit.

    Example:
        >>> first = make_first_layer("gabor", n_dims=2, in_channels=1, n_filters=8, kernel_size=7)
        >>> network = build_network("cnn", first=first, image_size=(28, 28), n_classes=10)
        >>> network(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    make: Any = NETWORKS[one_of("kind", kind, NETWORKS)] if isinstance(kind, str) else kind
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds the generators of all devices.
        torch.default_generator.manual_seed(seed)
        network: nn.Module = make(first, n_classes, image_size=tuple(image_size))
    return network


def make_network(
    recipe: Recipe,
    variant: str,
    seed: int,
    *,
    shape: tuple[int, ...],
    n_classes: int,
    network: nn.Module | type[nn.Module] | None = None,
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
    if not isinstance(network, nn.Module):
        kind: Any = NETWORKS[recipe.network] if network is None else network
        first = make(
            in_channels=shape[0],
            n_filters=recipe.n_filters,
            kernel_size=recipe.kernel_size,
            stride=recipe.stride,
            output=kind.first_output,
        )
        options: dict[str, Any] = {"image_size": shape[1:], "n_classes": n_classes, "seed": seed}
        return build_network(kind, first=first, **options), first
    made: list[nn.Module] = []

    def replacement(conv: Any) -> nn.Module:
        if conv.groups != 1 or set(conv.dilation) != {1} or conv.padding_mode != "zeros":
            raise ValueError(
                "The first convolution of network must have groups=1, dilation=1 and "
                f"padding_mode='zeros', got {conv}."
            )
        layer = make(
            in_channels=conv.in_channels,
            n_filters=conv.out_channels,
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
        )
        made.append(layer)
        return layer

    return replace_first_conv(network, replacement), made[0]


class SmallCNN(nn.Module):
    """A first layer, two 3-pixel convolutions, and a linear classifier of pooled responses.

    After each convolution: batch normalisation, ReLU, and max pooling over 2 (in 1-D: 4) pixels
    along every axis while enough pixels are left. At the end the mean over each cell of a grid of
    4 x 4 (in 1-D: 16, in 3-D: 2 x 2 x 2).
    """

    first_output = "real"

    def __init__(self, first: nn.Module, n_classes: int, *, image_size: tuple[int, ...]) -> None:
        super().__init__()
        self.first = first
        n_channels, *size = output_shape(first, image_size)
        n_dims = len(size)
        step, grid = (4 if n_dims == 1 else 2), {1: 16, 2: 4, 3: 2}[n_dims]
        layers: list[nn.Module] = []
        for width in (64, 64, None):
            layers += [_NORMS[n_dims](n_channels), nn.ReLU()]
            if min(size) >= step * grid:
                layers.append(_MAXIMA[n_dims](step))
                size = [side // step for side in size]
            if width is not None:
                layers.append(PLAIN_LAYERS[n_dims](n_channels, width, 3, padding=1, bias=False))
                n_channels = width
        self.body = nn.Sequential(*layers, GridPool(grid))
        self.classifier = nn.Linear(n_channels * n_cells(size, grid), n_classes)

    def forward(self, input: Tensor) -> Tensor:
        """Return logits ``(batch, n_classes)``."""
        return self.classifier(self.body(self.first(input)).flatten(1))


class EnergyClassifier(nn.Module):
    """A linear classifier of the first layer's energies, averaged over the cells of a grid.

    The averages are normalised over the batch, channel by channel. The only nonlinear step is the
    norm in the first layer. Inputs should have mean 0: a brightness that all images share would
    dominate the energies of free kernels.
    """

    first_output = "energy"

    def __init__(self, first: nn.Module, n_classes: int, *, image_size: tuple[int, ...]) -> None:
        super().__init__()
        one_of("output of the first layer", getattr(first, "output", "real"), ("energy",))
        self.first = first
        n_channels, *size = output_shape(first, image_size)
        grid = {1: 16, 2: 7, 3: 4}[len(size)]
        self.pool, self.norm = GridPool(grid), _NORMS[len(size)](n_channels)
        self.classifier = nn.Linear(n_channels * n_cells(size, grid), n_classes)

    def forward(self, input: Tensor) -> Tensor:
        """Return logits ``(batch, n_classes)``."""
        return self.classifier(self.norm(self.pool(self.first(input))).flatten(1))


NETWORKS: dict[str, type[nn.Module]] = {"cnn": SmallCNN, "energy": EnergyClassifier}


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
        return _MEANS[input.ndim - 2](input, cell, cell, ceil_mode=True)


def n_cells(size: Sequence[int], grid: int) -> int:
    """Return the number of cells that ``GridPool`` makes of an input of this size."""
    return math.prod(-(-side // -(-side // grid)) for side in size)


def output_shape(first: Any, image_size: tuple[int, ...]) -> list[int]:
    """Return channels and size of a first layer's output, measured with a copy of the layer."""
    trial = copy.deepcopy(first).eval()
    like = next((v for v in trial.state_dict().values() if v.is_floating_point()), torch.empty(0))
    with torch.no_grad():
        return list(trial(like.new_zeros(1, first.in_channels, *image_size)).shape[1:])
