"""Small networks in which the first layer can be compared: everything behind it is the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium.errors import as_sizes, one_of
from gaborium.layers import LAYERS, PLAIN_LAYERS, MixedConv, PairEnergy
from gaborium.params import RECORDS, Gabor
from gaborium.starts import STARTS

KINDS = ("free", "gabor", "gabor-fixed", "mixed")
FIRST_STARTS = (*STARTS, "equal")
# Networks, and what each wants of its first layer.
FIRST_OUTPUTS = {"cnn": "real", "energy": "energy", "texture": "energy"}
NETWORKS = tuple(FIRST_OUTPUTS)

_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_AVERAGES = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_LARGEST: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
# Cells of the grid on which responses are pooled, along each axis.
_CNN_GRID = {1: 16, 2: 4, 3: 2}
_ENERGY_GRID = {1: 16, 2: 7, 3: 4}
_TEXTURE_GRID = {1: 4, 2: 3, 3: 2}  # few: a texture looks much the same everywhere
# Energies are told apart down to this, where white input of unit variance gives some 0.5.
_FAINT = 0.02
# Pixels between two places of an energy that are compared, diagonally as many along both axes.
_DISTANCES = (1, 2, 4)
# The variance of the norm of a pair of independent normal responses, in that of one of them.
_NORM_VARIANCE = 2 - math.pi / 2


# -- first layers -----------------------------------------------------------------------------


def make_first_layer(
    kind: str,
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
    """A first layer of one of the kinds that are compared, otherwise alike.

    Convention:
        - ``"free"``: an ordinary convolution, which begins as ``nn.ConvNd`` does; ``"gabor"``:
          Gabor filters that learn; ``"gabor-fixed"``: the same filters, of which nothing learns;
          ``"mixed"``: Gabor filters in the first half of the channels, free ones in the second
        - all begin at one scale: white input of unit variance gives responses of variance 1/3
        - none has a bias, since batch normalisation follows
        - with ``output="energy"`` a free channel is the norm of a pair of free kernels, as a
          Gabor one is of an even and an odd kernel

    Args:
        kind: one of ``KINDS``.
        n_dims: spatial dimensions of the input: 1, 2 or 3.
        in_channels: channels of the input.
        n_filters: channels of the output.
        kernel_size: pixels along each axis.
        stride: along each axis.
        padding: as of ``nn.ConvNd``; by default half a kernel.
        start: where Gabor filters begin: ``"bank"``, ``"random"``, ``"v1"``, or ``"equal"``: one
            Gabor function, drawn as for ``"random"``, in all channels; or a record, ``(filters,
            channels or 1)``.
        output: ``"real"`` or ``"energy"``.
        learn: fields of the record that train, by default all that ``GaborConvNd`` trains; of
            ``"gabor"`` and ``"mixed"`` alone.
        seed: of what is drawn. torch's global generator is left alone.

    Returns:
        A layer with ``in_channels``, ``out_channels`` and ``output``.

    Raises:
        ValueError: a name is none of the above, a number is out of range, or ``learn`` is given
            where no Gabor function learns.

    Example:
        >>> from gaborium.layers import n_learned
        >>> for kind in KINDS:
        ...     layer = make_first_layer(kind, n_dims=2, in_channels=1, n_filters=8, kernel_size=9)
        ...     print(kind, n_learned(layer))
        free 648
        gabor 48
        gabor-fixed 0
        mixed 348
    """
    one_of("kind", kind, KINDS)
    if isinstance(start, str):
        one_of("start", start, FIRST_STARTS)
    one_of("output", output, ("real", "energy"))
    if n_dims not in LAYERS:
        raise ValueError(f"n_dims must be 1, 2 or 3, got {n_dims!r}.")
    if learn is not None and kind not in ("gabor", "mixed"):
        raise ValueError(
            f"learn is for kinds 'gabor' and 'mixed', got kind={kind!r}, of which no Gabor "
            "function learns; leave it out."
        )
    if n_filters < (2 if kind == "mixed" else 1):
        raise ValueError(f"n_filters must be at least 1 (mixed: 2), got {n_filters}.")
    size = as_sizes("kernel_size", kernel_size, n_dims)
    padding = tuple(side // 2 for side in size) if padding is None else padding
    shared: dict[str, Any] = {"stride": stride, "padding": padding, "bias": False}
    if kind == "free":
        n_kernels = n_filters * (2 if output == "energy" else 1)
        plain: Any = PLAIN_LAYERS[n_dims](in_channels, n_kernels, size, **shared, device="meta")
        plain.weight = nn.Parameter(_free_kernels(plain.weight.shape, output, seed))
        return plain if output == "real" else PairEnergy(plain)
    n_free = n_filters // 2 if kind == "mixed" else 0
    # What a Gabor layer makes of pairs by itself, a mixed one leaves to PairEnergy.
    inner = "quadrature" if n_free and output == "energy" else output
    per_channel = 2 if inner == "quadrature" else 1
    n_gabor = n_filters - n_free
    gabor = LAYERS[n_dims](
        in_channels,
        per_channel * n_gabor,
        size,
        **shared,
        learn=() if kind == "gabor-fixed" else learn,
        start=_start(start, output, inner, n_dims, (n_gabor, in_channels), size, seed),
        seed=seed,
        output=inner,
    )
    if isinstance(start, str) and start == "equal":
        _make_equal(gabor)
    if not n_free:
        return gabor
    shape = torch.Size((per_channel * n_free, in_channels, *size))
    mixed = MixedConv(gabor, _free_kernels(shape, output, seed), seed=seed)
    return mixed if output == "real" else PairEnergy(mixed)


def _start(
    start: str | Gabor,
    output: str,
    inner: str,
    n_dims: int,
    shape: tuple[int, int],
    size: tuple[int, ...],
    seed: int,
) -> str | Gabor:
    """A start that a Gabor layer knows by name or, where it knows none, its record."""
    if isinstance(start, Gabor) or (start != "equal" and inner == output):
        return start
    n_filters, n_channels = shape
    equal = start == "equal"
    drawn = LAYERS[n_dims](
        n_channels,
        1 if equal else n_filters,
        size,
        bias=False,
        dtype=torch.float64,
        start="random" if equal else start,
        seed=seed,
        output=output,
    )
    params: Gabor = drawn.params.detach().expand()
    fields = {
        name: value.expand(n_filters, *value.shape[1:]) for name, value in params.as_dict().items()
    }
    return RECORDS[n_dims](**fields)


def _make_equal(gabor: nn.Module) -> None:
    """Copy what is stored of the first filter: arithmetic on a vector may round its end apart."""
    with torch.no_grad():
        for value in gabor.state_dict(keep_vars=True).values():
            value.copy_(value[:1].clone().expand_as(value))


def _free_kernels(shape: torch.Size, output: str, seed: int) -> Tensor:
    """Kernels as ``nn.ConvNd`` draws them; those of a pair so that its norm has their variance."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    if output == "energy":
        bound /= math.sqrt(_NORM_VARIANCE)
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)


# -- networks ---------------------------------------------------------------------------------


def build_network(
    name: str, *, first: nn.Module, image_size: tuple[int, ...], n_classes: int, seed: int = 0
) -> nn.Module:
    """A classifier of images or sounds behind a given first layer.

    Args:
        name: ``"cnn"``, see ``SmallCNN``, ``"energy"``, see ``EnergyClassifier``, or
            ``"texture"``, see ``TextureClassifier``.
        first: the first layer, as from ``make_first_layer``; it becomes the network's ``first``.
        image_size: ``(height, width)`` of images, ``(samples,)`` of sounds.
        n_classes: how many classes to tell apart.
        seed: of all weights behind the first layer. torch's global generator is left alone.

    Returns:
        A network that takes ``(batch, in_channels, *image_size)`` and gives ``(batch,
        n_classes)`` logits.

    Raises:
        ValueError: there is no such network, or the first layer does not suit it or the size.

    Example:
        >>> first = make_first_layer("gabor", n_dims=2, in_channels=1, n_filters=8, kernel_size=7)
        >>> network = build_network("cnn", first=first, image_size=(28, 28), n_classes=10)
        >>> network(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    one_of("network", name, NETWORKS)
    if not n_classes >= 2:
        raise ValueError(f"n_classes must be at least 2, got {n_classes}.")
    kinds: dict[str, Any] = {
        "cnn": SmallCNN,
        "energy": EnergyClassifier,
        "texture": TextureClassifier,
    }
    with _seeded(seed):
        network: nn.Module = kinds[name](first, n_classes, image_size=tuple(image_size))
    return network


class SmallCNN(nn.Module):
    """First layer, two 3-pixel convolutions, and a linear classifier of what is pooled.

    Behind each convolution: batch normalisation, ReLU and the largest of each 2 (in 1-D: 4)
    pixels along every axis, as long as there are more than the grid has cells; in the end the
    mean over each cell of a grid of 4 x 4 (in 1-D: 16, in 3-D: 2 x 2 x 2).

    Args:
        first: the first layer; its input is 24 to 64 px a side, or a waveform.
        n_classes: how many classes to tell apart.
        image_size: of the input.
        widths: channels of the further convolutions.

    Raises:
        ValueError: the first layer does not say its ``out_channels``, or leaves too few pixels.
    """

    def __init__(
        self,
        first: nn.Module,
        n_classes: int,
        *,
        image_size: tuple[int, ...],
        widths: tuple[int, ...] = (64, 64),
    ) -> None:
        super().__init__()
        n_dims = len(image_size)
        n_channels, size = _n_channels(first), _size_after(first, image_size)
        self.first = first
        step, grid = (4 if n_dims == 1 else 2), _CNN_GRID[n_dims]
        layers: list[nn.Module] = []
        for index in range(len(widths) + 1):
            layers += [_NORMS[n_dims](n_channels), nn.ReLU()]
            if min(size) >= step * grid:
                layers.append(_LARGEST[n_dims](step))
                size = tuple(side // step for side in size)
            if index < len(widths):
                width = widths[index]
                layers.append(PLAIN_LAYERS[n_dims](n_channels, width, 3, padding=1, bias=False))
                n_channels = width
        layers.append(GridPool(grid, n_dims))
        self.body = nn.Sequential(*layers)
        n_cells = math.prod(_cells(side, grid) for side in size)
        self.classifier = nn.Linear(n_channels * n_cells, n_classes)

    def forward(self, input: Tensor) -> Tensor:
        """Logits ``(batch, n_classes)``."""
        return self.classifier(self.body(self.first(input)).flatten(1))


class EnergyClassifier(nn.Module):
    """A linear classifier of a first layer's energies, pooled over the cells of a grid.

    Energies are averaged over each cell, normalised over the batch channel by channel, and
    classified linearly: all that is not linear is the first layer's norm of each pair. Inputs
    should have mean 0: no normalisation lies before the norm, and a brightness common to all
    images would drown what differs in free kernels' energies.

    Args:
        first: a layer with ``output="energy"``.
        n_classes: how many classes to tell apart.
        image_size: of the input.
        grid: cells along each axis; by default 7, in 1-D 16 and in 3-D 4.

    Raises:
        ValueError: the first layer's output is no energy, or leaves no pixel.
    """

    grids = _ENERGY_GRID

    def __init__(
        self,
        first: nn.Module,
        n_classes: int,
        *,
        image_size: tuple[int, ...],
        grid: int | None = None,
    ) -> None:
        super().__init__()
        if getattr(first, "output", None) != "energy":
            raise ValueError(
                f"{type(self).__name__} needs a first layer with output='energy', got "
                f"{getattr(first, 'output', type(first).__name__)!r}."
            )
        n_dims = len(image_size)
        self.first = first
        self.pool = GridPool(self.grids[n_dims] if grid is None else grid, n_dims)
        n_numbers, self.norm = self._numbers(_n_channels(first), _size_after(first, image_size))
        self.classifier = nn.Linear(n_numbers, n_classes)

    def _numbers(self, n_channels: int, size: tuple[int, ...]) -> tuple[int, nn.Module]:
        """How many numbers of energies of a size are classified, and what normalises them."""
        n_cells = math.prod(_cells(side, self.pool.grid) for side in size)
        return n_channels * n_cells, _NORMS[self.pool.n_dims](n_channels)

    def forward(self, input: Tensor) -> Tensor:
        """Logits ``(batch, n_classes)``."""
        return self.classifier(self.norm(self.pool(self.first(input))).flatten(1))


class TextureClassifier(EnergyClassifier):
    """A linear classifier of what describes a texture in a first layer's energies.

    Of each channel, in each cell of a grid, three logarithms:

    - strength, the mean, less its average over the image's channels and cells: how much of a wave
      there is, compared with others
    - spread, the standard deviation over the mean: whether it is everywhere or in places
    - flatness, the geometric mean over the mean: whether it ever goes, which a few strong edges
      do not hide

    and over the whole image, of the logarithms of energies, correlations

    - of each channel with itself 1, 2 and 4 pixels aside, along the axes and diagonally: how far a
      wave goes on, and at what distance it comes again
    - of each pair of channels: which waves come at the same place

    Contrast is an offset of all logarithms, and makes no difference. All numbers are normalised
    over the batch, one by one, and classified linearly.

    Args:
        first: a layer with ``output="energy"``.
        n_classes: how many classes to tell apart.
        image_size: of the input.
        grid: cells along each axis; by default 3, in 1-D 4 and in 3-D 2.

    Raises:
        ValueError: the first layer's output is no energy, or leaves no pixel; or, in training, a
            batch of one image.

    Reference:
        Manjunath & Ma (1996), IEEE Trans. Pattern Anal. Mach. Intell. 18(8),
        doi:10.1109/34.531803: mean and deviation of the energy as features, there of the whole
        image and without logarithms. Portilla & Simoncelli (2000), Int. J. Comput. Vis. 40(1),
        doi:10.1023/A:1026553619983: correlations of energies among what makes a texture.

    Example:
        >>> first = make_first_layer(
        ...     "gabor", n_dims=2, in_channels=1, n_filters=8, kernel_size=9, output="energy"
        ... )
        >>> network = TextureClassifier(first, 10, image_size=(64, 64))
        >>> energy = torch.rand(3, 8, 64, 64)
        >>> network.statistics(energy).shape  # 3 * 8 * 9, 12 * 8 and 8 * 7 / 2
        torch.Size([3, 340])
    """

    grids = _TEXTURE_GRID

    def _numbers(self, n_channels: int, size: tuple[int, ...]) -> tuple[int, nn.Module]:
        of_cells, _ = super()._numbers(n_channels, size)
        of_pairs = n_channels * (n_channels - 1) // 2
        n_numbers = 3 * of_cells + n_channels * len(_shifts(size)) + of_pairs
        return n_numbers, nn.BatchNorm1d(n_numbers)

    def statistics(self, energy: Tensor) -> Tensor:
        """Of energies ``(batch, channels, *size)`` what is classified, ``(batch, numbers)``.

        Strength, spread and flatness in each cell, then correlations, of each channel with itself
        and of pairs of channels.
        """
        # Under autocast energies may come in half precision, too coarse for differences of squares.
        energy = energy if energy.dtype == torch.float64 else energy.float()
        logs = (energy + _FAINT).log()
        mean = self.pool(energy)
        variance = (self.pool(energy.square()) - mean.square()).clamp_min(0.0)
        strength = (mean + _FAINT).log()
        spread = (variance + _FAINT**2).log() / 2 - strength
        flatness = self.pool(logs) - strength
        strength = strength.flatten(1)
        relative = strength - strength.mean(1, keepdim=True)
        of_cells = [relative, spread.flatten(1), flatness.flatten(1)]
        standard = _standardised(logs)
        return torch.cat([*of_cells, _autocorrelations(standard), _correlations(standard)], dim=1)

    def forward(self, input: Tensor) -> Tensor:
        """Logits ``(batch, n_classes)``."""
        if self.training and len(input) < 2:
            raise ValueError(
                "TextureClassifier normalises its numbers over the batch and needs at least 2 "
                f"images in training, got {len(input)}; take larger batches."
            )
        return self.classifier(self.norm(self.statistics(self.first(input))))


def _standardised(values: Tensor) -> Tensor:
    """Each channel of ``(batch, channels, *size)`` with mean 0 and variance 1, less if flat."""
    axes = tuple(range(2, values.ndim))
    values = values - values.mean(axes, keepdim=True)
    return values / (values.square().mean(axes, keepdim=True) + _FAINT**2).sqrt()


def _autocorrelations(standard: Tensor) -> Tensor:
    """Of each channel with itself, moved by each of the shifts, ``(batch, channels * shifts)``."""
    size, axes = standard.shape[2:], tuple(range(2, standard.ndim))
    shifts = _shifts(tuple(size))
    if not shifts:
        return standard.new_zeros(len(standard), 0)
    # All sums of products at once, as a power spectrum; zeros keep the borders apart.
    padded = [side + max(_DISTANCES) for side in size]
    spectrum = torch.fft.rfftn(standard, s=padded, dim=axes)
    power = spectrum.real.square() + spectrum.imag.square()
    sums = torch.fft.irfftn(power, s=padded, dim=axes)
    n_pairs = [
        math.prod(side - abs(step) for side, step in zip(size, shift, strict=True))
        for shift in shifts
    ]
    places: Any = (..., *torch.tensor(shifts, device=sums.device).unbind(1))
    return (sums[places] / sums.new_tensor(n_pairs)).flatten(1)


def _shifts(size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Pixels along each axis from one place to another, one of each two that are opposite."""
    nowhere = (0,) * len(size)
    ways = [way for way in product((-1, 0, 1), repeat=len(size)) if way > nowhere]
    distances = [distance for distance in _DISTANCES if distance < min(size)]
    return [tuple(distance * step for step in way) for distance in distances for way in ways]


def _correlations(standard: Tensor) -> Tensor:
    """Of each pair of channels, ``(batch, pairs)``."""
    values = standard.flatten(2)
    with torch.autocast(values.device.type, enabled=False):
        products = values @ values.mT / values.shape[2]
    n_channels = values.shape[1]
    one, other = torch.triu_indices(n_channels, n_channels, offset=1, device=values.device)
    return products[:, one, other]


class GridPool(nn.Module):
    """The mean over each cell of a grid, of at most ``grid`` cells along each axis.

    Cells are of one size, but for the last ones, which are cut by the border. Unlike adaptive
    pooling, the same gradient comes out of every run, on any device.

    Example:
        >>> GridPool(4, 2)(torch.rand(1, 3, 14, 14)).shape
        torch.Size([1, 3, 4, 4])
    """

    def __init__(self, grid: int, n_dims: int) -> None:
        super().__init__()
        if grid < 1:
            raise ValueError(f"grid must be at least 1 cell, got {grid}.")
        self.grid, self.n_dims = grid, n_dims

    def forward(self, input: Tensor) -> Tensor:
        """Means ``(batch, channels, *cells)``."""
        cell = [-(-side // self.grid) for side in input.shape[2:]]
        average: Any = _AVERAGES[self.n_dims]
        return average(input, cell, cell, ceil_mode=True)

    def extra_repr(self) -> str:
        """The number of cells."""
        return f"{self.grid}"


def _cells(side: int, grid: int) -> int:
    return -(-side // -(-side // grid))


def _n_channels(layer: nn.Module) -> int:
    n_channels = getattr(layer, "out_channels", None)
    if not isinstance(n_channels, int):
        raise ValueError(
            f"A first layer must say its out_channels, got {type(layer).__name__} without; set "
            "that attribute."
        )
    return n_channels


def _size_after(first: nn.Module, image_size: tuple[int, ...]) -> tuple[int, ...]:
    """What the first layer leaves of the size: told by running a copy of it."""
    trial = copy.deepcopy(first).eval()
    held = [*trial.parameters(), *trial.buffers()]
    like = next((value for value in held if value.is_floating_point()), torch.empty(0))
    n_channels = getattr(first, "in_channels", None) or 1
    try:
        with torch.no_grad():
            size = trial(like.new_zeros(1, n_channels, *image_size)).shape[2:]
    except (RuntimeError, ValueError) as error:
        detail = " ".join(str(error).split())[:160].rstrip(".")
        raise ValueError(
            f"The first layer cannot take {n_channels} channels of {image_size} px: {detail}."
        ) from None
    if len(size) != len(image_size) or 0 in size:
        raise ValueError(
            f"The first layer must keep the axes of {image_size} px and leave pixels along each, "
            f"got {tuple(size)}; take a smaller kernel or stride, or larger images."
        )
    return tuple(size)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from torch's CPU generator as if it had been seeded, and leave it as it was."""
    state = torch.get_rng_state()
    try:
        # Not torch.manual_seed, which seeds the generators of all devices.
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(state)
