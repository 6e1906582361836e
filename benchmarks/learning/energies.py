"""Networks on the energies of a first layer, for the experiments, and a start of equal filters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gaborium.functions.params import Gabor
from gaborium.layers import LAYERS, PLAIN_LAYERS, PairEnergy
from gaborium.training import Dataset, Recipe
from gaborium.training.networks import GridPool, output_shape, seeded

_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
# The variance of the norm of two independent normal responses of variance 1.
_NORM_VARIANCE = 2 - math.pi / 2


def make_energy_layer(
    variant: str, *, n_dims: int, in_channels: int, start: str | Gabor, recipe: Recipe, seed: int
) -> nn.Module:
    """A first layer of energies, ``"free"``, ``"gabor"`` or ``"gabor-fixed"``.

    A free channel is the norm of two free kernels, as a Gabor channel is the norm of an even and
    an odd kernel. White input of unit variance gives energies of variance 1/3 at the start.
    """
    size = (recipe.kernel_size,) * n_dims
    shared: dict[str, Any] = {
        "stride": recipe.stride,
        "padding": tuple(side // 2 for side in size),
        "bias": False,
    }
    if variant == "free":
        n_kernels = 2 * recipe.n_filters
        plain = PLAIN_LAYERS[n_dims](in_channels, n_kernels, size, **shared, device="meta")
        bound = 1 / math.sqrt(in_channels * math.prod(size) * _NORM_VARIANCE)
        kernels = torch.empty(plain.weight.shape, device="cpu")
        kernels.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        plain.weight = nn.Parameter(kernels)
        return PairEnergy(plain)
    return LAYERS[n_dims](
        in_channels,
        recipe.n_filters,
        size,
        **shared,
        learn=() if variant == "gabor-fixed" else recipe.learn,
        start=start,
        seed=seed,
        output="energy",
    )


def make_equal_start(recipe: Recipe, data: Dataset, seed: int, output: str) -> Gabor:
    """One Gabor function, drawn as for ``"random"``, in all filters."""
    n_dims = len(data.image_size)
    layer = LAYERS[n_dims](
        data.images.shape[1],
        1,
        (recipe.kernel_size,) * n_dims,
        bias=False,
        dtype=torch.float64,
        start="random",
        seed=seed,
        output=output,
    )
    params: Gabor = layer.params.detach().expand()
    return type(params)(
        **{
            name: value.expand(recipe.n_filters, *value.shape[1:])
            for name, value in params.as_dict().items()
        }
    )


class EnergyNetwork:
    """What ``train`` takes as ``network``: a classifier of the energies of a first layer."""

    def __init__(
        self, kind: type[nn.Module], recipe: Recipe, data: Dataset, start: str | Gabor
    ) -> None:
        self.kind, self.recipe, self.data, self.start = kind, recipe, data, start

    def __call__(self, variant: str, seed: int) -> tuple[nn.Module, nn.Module]:
        size = self.data.image_size
        first: Any = make_energy_layer(
            variant,
            n_dims=len(size),
            in_channels=self.data.images.shape[1],
            start=self.start,
            recipe=self.recipe,
            seed=seed,
        )
        with seeded(seed):
            network = self.kind(first, self.data.n_classes, image_size=size)
        return network, getattr(first, "pairs", first)


class EnergyClassifier(nn.Module):
    """A linear classifier of the first layer's energies, averaged over the cells of a grid.

    The averages are normalised over the batch, channel by channel. The only nonlinear step is the
    norm in the first layer. Inputs should have mean 0: a brightness that all images share would
    dominate the energies of free kernels.
    """

    def __init__(self, first: nn.Module, n_classes: int, *, image_size: tuple[int, ...]) -> None:
        super().__init__()
        self.first = first
        n_channels, *size = output_shape(first, image_size)
        self.pool = GridPool({1: 16, 2: 7, 3: 4}[len(size)])
        self.norm = _NORMS[len(size)](n_channels)
        n_features = self.pool(torch.zeros(1, n_channels, *size)).numel()
        self.classifier = nn.Linear(n_features, n_classes)

    def forward(self, input: Tensor) -> Tensor:
        """Logits ``(batch, n_classes)``."""
        return self.classifier(self.norm(self.pool(self.first(input))).flatten(1))
