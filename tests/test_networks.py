"""Questions about first layers and the networks behind them: alike in all but the kernels."""

import copy
import math
import re
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium import GaborConv2d, MixedConv
from gaborium.layers import GABOR_LAYERS, n_learned
from gaborium.training.networks import (
    NETWORKS,
    GridPool,
    PairEnergy,
    SmallCNN,
    build_network,
    make_first_layer,
)
from gaborium.training.recipe import Start, Variant

OUTPUTS = ("real", "energy")
KINDS, FIRST_STARTS = get_args(Variant), get_args(Start)


def layer_of(kind: str, **kwargs) -> nn.Module:
    arguments = {"n_dims": 2, "in_channels": 1, "n_filters": 8, "kernel_size": 7} | kwargs
    return make_first_layer(kind, **arguments)


def gabor_of(layer: nn.Module):
    return next(part for part in layer.modules() if isinstance(part, GABOR_LAYERS))


def kernels_of(layer: nn.Module) -> Tensor:
    return (layer.pairs if isinstance(layer, PairEnergy) else layer).weight.detach()


# -- first layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("start", FIRST_STARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_begin_at_one_scale(kind, start, output):
    n_filters = 64 if kind in ("free", "mixed") else 8
    layer = layer_of(kind, start=start, output=output, n_filters=n_filters, in_channels=3)
    with torch.no_grad():
        responses = layer(torch.randn(4, 3, 48, 48))[..., 4:-4, 4:-4]
    parts = responses.split(32, dim=1) if kind == "mixed" else [responses]
    for part in parts:
        variance = part.var((0, 2, 3)).mean().item()
        # 8 filters of 6400 correlated responses each; and the norm of a pair whose members are
        # not of one power varies more than that of equal ones.
        tolerance = 0.2 if output == "real" else 0.35
        assert abs(variance * 3 - 1) < tolerance


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("n_dims", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_shape_and_lives(kind, n_dims, output):
    layer = layer_of(kind, n_dims=n_dims, in_channels=2, stride=2, output=output, kernel_size=5)
    image = torch.randn(2, 2, *[12] * n_dims)
    assert layer(image).shape == (2, 8, *[6] * n_dims)
    assert (layer.in_channels, layer.out_channels) == (2, 8)
    assert sum("bias" in name for name, _ in layer.named_parameters()) == 0
    if kind == "gabor-fixed":
        assert n_learned(layer) == 0
        return
    (layer(image) * torch.randn(2, 8, *[6] * n_dims)).mean().backward()
    assert [n for n, v in layer.named_parameters() if v.grad is None or not v.grad.any()] == []


def test_a_fixed_layer_begins_where_a_learned_one_does():
    for start in FIRST_STARTS:
        learned, fixed = (layer_of(kind, start=start, seed=4) for kind in ("gabor", "gabor-fixed"))
        assert torch.equal(kernels_of(learned), kernels_of(fixed))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", ["gabor", "gabor-fixed", "mixed"])
def test_equal_means_equal_to_the_last_bit(kind, output):
    layer = layer_of(kind, start="equal", n_filters=37, output=output, in_channels=2, seed=5)
    gabor = gabor_of(layer)
    for value in gabor.state_dict().values():
        assert torch.equal(value, value[:1].expand_as(value))
    assert gabor.n_filters == (19 if kind == "mixed" else 37)
    other = gabor_of(layer_of(kind, start="equal", output=output, in_channels=2, seed=6))
    assert other.params.orientation[0, 0] != gabor.params.orientation[0, 0]


def test_a_seed_gives_the_same_layer_and_leaves_torchs_generator_alone():
    state = torch.get_rng_state()
    for kind in KINDS:
        for output in OUTPUTS:
            one, same, other = (
                kernels_of(layer_of(kind, start="random", seed=seed, output=output))
                for seed in (0, 0, 1)
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


def test_a_mixed_energy_pairs_gabor_with_gabor_and_free_with_free():
    layer = layer_of("mixed", output="energy", n_filters=6)
    inner = layer.pairs
    assert isinstance(inner, MixedConv)
    assert inner.is_gabor.tolist() == [True] * 6 + [False] * 6
    image = torch.randn(1, 1, 16, 16)
    # The Gabor half is what a Gabor layer's own energy is.
    alone = layer_of("gabor", output="energy", n_filters=3)
    torch.testing.assert_close(layer(image)[:, :3], alone(image), rtol=1e-4, atol=1e-5)


def test_learn_chooses_fields():
    layer = layer_of("gabor", learn=("orientation", "wavelength"))
    assert isinstance(layer, GaborConv2d)
    assert layer.learn == {"orientation", "wavelength"}
    assert gabor_of(layer_of("mixed", learn=("sigma",))).learn == {"sigma"}


def test_first_layers_refuse_in_one_clear_line():
    for kwargs, word in (
        ({"kind": "gobar"}, "'gabor-fixed'"),
        ({"start": "best"}, "'equal'"),
        ({"output": "quadrature"}, "'energy'"),
        ({"n_dims": 4}, "1, 2 or 3"),
        ({"n_filters": 0}, "at least 1"),
        ({"kind": "mixed", "n_filters": 1}, "mixed: 2"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"learn": ("size",)}, "'size'"),
    ):
        with pytest.raises(ValueError, match=re.escape(word)) as caught:
            layer_of(**({"kind": "gabor"} | kwargs))
        assert "\n" not in str(caught.value)


# -- networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    ("n_channels", "size", "kernel_size", "stride"),
    [(1, (8, 8), 5, 1), (3, (24, 24), 7, 1), (1, (28, 28), 7, 1), (3, (64, 48), 11, 2)],
)
def test_images_of_all_sizes_give_logits(name, n_channels, size, kernel_size, stride):
    output = NETWORKS[name].first_output
    first = layer_of(
        "gabor", in_channels=n_channels, kernel_size=kernel_size, stride=stride, output=output
    )
    network = build_network(name, first=first, image_size=size, n_classes=5)
    assert network.first is first
    assert network(torch.rand(2, n_channels, *size)).shape == (2, 5)
    assert n_learned(network.classifier) < 8000


@pytest.mark.parametrize("name", NETWORKS)
def test_waveforms_and_clips_give_logits(name):
    output = NETWORKS[name].first_output
    for n_dims, size, kernel_size, stride in ((1, (8000,), 65, 4), (3, (8, 16, 16), 5, 1)):
        first = layer_of(
            "mixed", n_dims=n_dims, kernel_size=kernel_size, stride=stride, output=output
        )
        network = build_network(name, first=first, image_size=size, n_classes=4)
        assert network(torch.rand(2, 1, *size)).shape == (2, 4)


def test_what_lies_behind_depends_on_the_seed_and_not_on_the_first_layer():
    def behind(kind: str, seed: int) -> dict[str, Tensor]:
        network = build_network(
            "cnn", first=layer_of(kind), image_size=(28, 28), n_classes=3, seed=seed
        )
        return {n: v for n, v in network.state_dict().items() if not n.startswith("first.")}

    state = torch.get_rng_state()
    free, gabor, other = behind("free", 0), behind("gabor", 0), behind("free", 1)
    assert all(torch.equal(free[name], gabor[name]) for name in free)
    assert not torch.equal(free["classifier.weight"], other["classifier.weight"])
    assert torch.equal(torch.get_rng_state(), state)


def test_building_does_not_touch_the_first_layer():
    first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    first.in_channels, first.out_channels = 1, 4
    before = copy.deepcopy(first.state_dict())
    SmallCNN(first, 3, image_size=(24, 24))
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
    assert first.training


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_learns_to_tell_stripes_apart(name):
    wave = (torch.arange(24) * (2 * math.pi / 6)).sin()
    images = torch.stack([wave.expand(24, 24), wave[:, None].expand(24, 24)])[:, None]
    images = images.repeat(8, 1, 1, 1) + 0.1 * torch.randn(16, 1, 24, 24)
    labels = torch.arange(2).repeat(8)
    for kind in KINDS:
        first = layer_of(kind, start="random", output=NETWORKS[name].first_output)
        network = build_network(name, first=first, image_size=(24, 24), n_classes=2)
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


def test_energy_of_pairs_is_what_a_gabor_layer_gives_and_has_a_gradient_at_zero():
    gabor = GaborConv2d(1, 3, 7, output="energy", bias=False, seed=0)
    pair = GaborConv2d(1, 6, 7, output="quadrature", bias=False, start=gabor.params.detach())
    image = torch.randn(1, 1, 12, 12)
    torch.testing.assert_close(PairEnergy(pair)(image), gabor(image))
    still = PairEnergy(nn.Conv2d(1, 4, 3, bias=False))
    still(torch.zeros(1, 1, 5, 5)).sum().backward()
    assert still.pairs.weight.grad.isfinite().all()


def test_networks_refuse_in_one_clear_line():
    real, plain = layer_of("gabor"), nn.Conv2d(1, 8, 3)
    for name, first, word in (
        ("vgg", real, "kind must be one of 'cnn', 'energy', got 'vgg'"),
        ("energy", real, "must be one of 'energy', got 'real'"),
        ("energy", plain, "got 'real'"),
    ):
        with pytest.raises(ValueError, match=re.escape(word)) as caught:
            build_network(name, first=first, image_size=(28, 28), n_classes=3)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="got 3"):
        PairEnergy(nn.Conv2d(1, 3, 3))
