"""Questions about first layers and the small network: equal in all but the kernels."""

import copy
import math
import re
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium import GaborConv2d
from gaborium.layers import GABOR_LAYERS, PairEnergy
from gaborium.training import SmallCNN, make_first_layer
from gaborium.training.networks import GridPool, n_learned
from gaborium.training.recipe import Variant

VARIANTS = get_args(Variant)
STARTS = ("bank", "random", "v1")


def layer_of(variant: str, **kwargs) -> nn.Module:
    arguments = {"n_dims": 2, "in_channels": 1, "n_filters": 8, "kernel_size": 7} | kwargs
    return make_first_layer(variant, **arguments)


def gabor_of(layer: nn.Module):
    return next(part for part in layer.modules() if isinstance(part, GABOR_LAYERS))


# -- first layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_begin_at_one_scale(variant, start):
    n_filters = 64 if variant in ("free", "mixed") else 8
    layer = layer_of(variant, start=start, n_filters=n_filters, in_channels=3)
    with torch.no_grad():
        responses = layer(torch.randn(4, 3, 48, 48))[..., 4:-4, 4:-4]
    for part in responses.split(32, dim=1) if variant == "mixed" else [responses]:
        # 8 filters of 6400 correlated responses each.
        assert abs(part.var((0, 2, 3)).mean().item() * 3 - 1) < 0.2


@pytest.mark.parametrize("n_dims", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_the_same_shape_and_lives(variant, n_dims):
    layer = layer_of(variant, n_dims=n_dims, in_channels=2, stride=2, kernel_size=5)
    image = torch.randn(2, 2, *[12] * n_dims)
    assert layer(image).shape == (2, 8, *[6] * n_dims)
    assert (layer.in_channels, layer.out_channels) == (2, 8)
    assert sum("bias" in name for name, _ in layer.named_parameters()) == 0
    if variant == "gabor-fixed":
        assert n_learned(layer) == 0
        return
    (layer(image) * torch.randn(2, 8, *[6] * n_dims)).mean().backward()
    assert [n for n, v in layer.named_parameters() if v.grad is None or not v.grad.any()] == []


def test_a_fixed_layer_begins_where_a_learned_one_does():
    for start in STARTS:
        learned, fixed = (layer_of(name, start=start, seed=4) for name in ("gabor", "gabor-fixed"))
        assert torch.equal(learned.weight, fixed.weight)


def test_a_seed_gives_the_same_layer_and_leaves_torchs_generator_alone():
    state = torch.get_rng_state()
    for variant in VARIANTS:
        one, same, other = (
            layer_of(variant, start="random", seed=seed).weight for seed in (0, 0, 1)
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_free_layer_begins_as_torchs_own():
    layer = layer_of("free", n_filters=100, in_channels=3)
    assert type(layer) is nn.Conv2d
    bound = 1 / math.sqrt(3 * 49)
    assert 0.99 * bound < layer.weight.abs().max() <= bound
    assert abs(layer.weight.std().item() / (bound / math.sqrt(3)) - 1) < 0.02


def test_learn_chooses_fields():
    layer = layer_of("gabor", learn=("orientation", "wavelength"))
    assert isinstance(layer, GaborConv2d)
    assert layer.learn == {"orientation", "wavelength"}
    assert gabor_of(layer_of("mixed", learn=("sigma",))).learn == {"sigma"}


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"variant": "gobar"}, "'gabor-fixed'"),
        ({"start": "best"}, "'v1'"),
        ({"n_filters": 0}, "at least 1"),
        ({"variant": "mixed", "n_filters": 1}, "mixed: 2"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"learn": ("size",)}, "'size'"),
    ],
)
def test_first_layers_refuse_in_one_clear_line(kwargs, word):
    with pytest.raises(ValueError, match=re.escape(word)) as caught:
        layer_of(**({"variant": "gabor"} | kwargs))
    assert "\n" not in str(caught.value)


def test_energies_of_pairs_are_those_of_a_gabor_layer_and_have_a_gradient_at_zero():
    gabor = GaborConv2d(1, 3, 7, output="energy", bias=False, seed=0)
    pair = GaborConv2d(1, 6, 7, output="quadrature", bias=False, start=gabor.params.detach())
    image = torch.randn(1, 1, 12, 12)
    torch.testing.assert_close(PairEnergy(pair)(image), gabor(image))
    zero = PairEnergy(nn.Conv2d(1, 4, 3, bias=False))
    zero(torch.zeros(1, 1, 5, 5)).sum().backward()
    assert zero.pairs.weight.grad.isfinite().all()
    with pytest.raises(ValueError, match="got 3"):
        PairEnergy(nn.Conv2d(1, 3, 3))


# -- the network --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_channels", "size", "kernel_size", "stride"),
    [
        (1, (8, 8), 5, 1),
        (3, (24, 24), 7, 1),
        (1, (28, 28), 7, 1),
        (3, (64, 48), 11, 2),
        (1, (8000,), 65, 4),
        (1, (8, 16, 16), 5, 1),
    ],
)
def test_images_sounds_and_clips_of_all_sizes_give_logits(n_channels, size, kernel_size, stride):
    options = {"n_dims": len(size), "in_channels": n_channels, "stride": stride}
    first = layer_of("gabor", kernel_size=kernel_size, **options)
    network = SmallCNN(first, 5, image_size=size)
    assert network.first is first
    assert network(torch.rand(2, n_channels, *size)).shape == (2, 5)
    assert n_learned(network.classifier) < 8000


def test_all_other_weights_depend_on_the_seed_and_not_on_the_first_layer():
    def others(variant: str, seed: int) -> dict[str, Tensor]:
        network = SmallCNN(layer_of(variant), 3, image_size=(28, 28), seed=seed)
        return {n: v for n, v in network.state_dict().items() if not n.startswith("first.")}

    state = torch.get_rng_state()
    free, gabor, other = others("free", 0), others("gabor", 0), others("free", 1)
    assert all(torch.equal(free[name], gabor[name]) for name in free)
    assert not torch.equal(free["classifier.weight"], other["classifier.weight"])
    assert torch.equal(torch.get_rng_state(), state)


def test_building_does_not_touch_the_first_layer():
    first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    first.in_channels = 1
    before = copy.deepcopy(first.state_dict())
    SmallCNN(first, 3, image_size=(24, 24))
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
    assert first.training


def test_every_variant_learns_to_distinguish_stripes():
    wave = (torch.arange(24) * (2 * math.pi / 6)).sin()
    images = torch.stack([wave.expand(24, 24), wave[:, None].expand(24, 24)])[:, None]
    images = images.repeat(8, 1, 1, 1) + 0.1 * torch.randn(16, 1, 24, 24)
    labels = torch.arange(2).repeat(8)
    for variant in VARIANTS:
        network = SmallCNN(layer_of(variant, start="random"), 2, image_size=(24, 24))
        optimizer = torch.optim.Adam(network.parameters(), 0.02)
        for _ in range(12):
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.1


def test_grid_pooling_averages_whole_and_cut_cells():
    image = torch.arange(5.0).expand(1, 1, 5)
    assert GridPool(3)(image).flatten().tolist() == [0.5, 2.5, 4.0]
    assert GridPool(9)(image).flatten().tolist() == [0, 1, 2, 3, 4]
    assert GridPool(1)(image).flatten().tolist() == [2]
