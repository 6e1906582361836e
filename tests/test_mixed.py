"""Questions about the mixed layer: one convolution, both kinds of kernel, nothing lost."""

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

import gaborium
from gaborium import GaborConv2d, MixedConv
from gaborium.layers import GABOR_LAYERS, LAYERS


def mixed_of(n_dims: int, free: int | Tensor = 2, **kwargs) -> MixedConv:
    """Two channels in, three Gabor and two free filters of 5 px."""
    arguments = {"stride": 2, "padding": 1, "dilation": 1, "start": "random", "seed": 0}
    own = {name: kwargs.pop(name) for name in ("order", "free_bias") if name in kwargs}
    gabor = LAYERS[n_dims](2, 3, 5, **arguments | kwargs)
    return MixedConv(gabor, free, seed=1, **own)


def image_for(n_dims: int) -> Tensor:
    return torch.randn(2, 2, *[11] * n_dims)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_dims", [1, 2, 3])
def test_channels_are_the_gabor_layers_and_a_plain_ones(n_dims, bias):
    order = [3, 0, 4, 2, 1]
    layer, image = mixed_of(n_dims, bias=bias, order=order), image_for(n_dims)
    plain = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[n_dims](2, 2, 5, 2, 1, bias=bias)
    with torch.no_grad():
        plain.weight.copy_(layer.free)
        if bias:
            plain.bias.copy_(layer.free_bias)
    apart = torch.cat([layer.gabor(image), plain(image)], 1)[:, order]
    # One convolution of five kernels may add in another order than two convolutions.
    torch.testing.assert_close(layer(image), apart, rtol=1e-5, atol=1e-5)
    assert layer.is_gabor.tolist() == [False, True, False, True, True]
    assert layer.out_channels == 5


@pytest.mark.parametrize("n_dims", [1, 2, 3])
def test_it_is_one_convolution(n_dims, monkeypatch):
    layer, calls = mixed_of(n_dims), []
    convolve = gaborium.layers._CONVOLUTIONS[n_dims]
    monkeypatch.setitem(
        gaborium.layers._CONVOLUTIONS,
        n_dims,
        lambda image, weight, *rest: (calls.append(weight), convolve(image, weight, *rest))[1],
    )
    layer(image_for(n_dims))
    assert [weight.shape[0] for weight in calls] == [5]


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("n_dims", [1, 2, 3])
def test_the_plain_layer_gives_the_same(n_dims, mode):
    layer = mixed_of(n_dims, order=[4, 3, 2, 1, 0], padding_mode=mode).eval()
    plain, image = layer.to_conv(), image_for(n_dims)
    assert type(plain) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    assert torch.equal(layer(image), plain(image))
    assert not plain.training
    assert plain.weight.requires_grad
    before = layer.weight.detach().clone()
    with torch.no_grad():
        plain.weight.zero_()
    assert torch.equal(layer.weight, before)


def test_every_parameter_moves_and_the_gabor_layer_is_found():
    layer = mixed_of(2)
    before = {name: value.clone() for name, value in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(image_for(2)).square().mean().backward()
    optimizer.step()
    still = [name for name, value in layer.named_parameters() if torch.equal(value, before[name])]
    assert still == []
    assert {name.partition(".")[0] for name in before} == {"gabor", "free", "free_bias"}
    assert [part for part in layer.modules() if isinstance(part, GABOR_LAYERS)] == [layer.gabor]


def test_the_state_dict_goes_round_with_the_order():
    order = [2, 4, 0, 1, 3]
    layer, other = mixed_of(2, order=order), mixed_of(2, start="bank")
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    image = image_for(2)
    assert torch.equal(other(image), layer(image))
    assert other.order.tolist() == order
    assert torch.equal(copy.deepcopy(layer)(image), layer(image))


def test_a_quadrature_output_counts_both_members():
    layer = MixedConv(GaborConv2d(1, 6, 7, output="quadrature"), 2)
    assert layer(torch.rand(1, 1, 9, 9)).shape == (1, 8, 3, 3)


def test_free_kernels_may_be_given_and_are_copied():
    kernels, bias = torch.randn(4, 2, 5, 5), torch.randn(4)
    layer = mixed_of(2, kernels, free_bias=bias)
    assert torch.equal(layer.weight[3:], kernels)
    assert torch.equal(layer.bias[3:], bias)
    kernels.zero_()
    assert layer.weight[3:].abs().max() > 0


def test_what_is_drawn_is_as_a_plain_layers_and_comes_again_with_the_seed():
    gabor = GaborConv2d(3, 4, 9, seed=0)
    layer = MixedConv(gabor, 400, seed=3)
    # Uniform within one over the root of the fan-in, as nn.Conv2d draws.
    bound = 1 / math.sqrt(3 * 81)
    assert 0.99 * bound < layer.free.abs().max() <= bound
    assert 0.9 * bound < layer.free_bias.abs().max() <= bound
    drawn = layer.free.detach().clone()
    state = torch.get_rng_state()
    layer.reset_parameters()
    assert torch.equal(layer.free, drawn)
    assert torch.equal(torch.get_rng_state(), state)


def test_dtype_and_device_follow_the_gabor_layer():
    gabor = GaborConv2d(1, 2, 5, dtype=torch.float64)
    layer = MixedConv(gabor, torch.randn(2, 1, 5, 5))
    assert layer.free.dtype == layer(torch.rand(1, 1, 8, 8).double()).dtype == torch.float64
    assert layer.to("meta").order.device.type == "meta"


def test_bad_input_is_one_clear_line():
    gabor = GaborConv2d(2, 4, 5)
    for call, kind, word in (
        (lambda: MixedConv(nn.Conv2d(2, 4, 5), 2), TypeError, "got Conv2d"),
        (lambda: MixedConv(GaborConv2d(2, 4, 5, groups=2), 2), ValueError, "groups=2"),
        (lambda: MixedConv(GaborConv2d(2, 4, 5, output="energy"), 2), ValueError, "'energy'"),
        (lambda: MixedConv(gabor, 0), ValueError, "at least 1"),
        (lambda: MixedConv(gabor, 2.5), ValueError, "got 2.5"),
        (lambda: MixedConv(gabor, torch.rand(2, 2, 7, 7)), ValueError, "(2, 2, 7, 7)"),
        (lambda: MixedConv(gabor, 2, order=[0, 1, 2, 3, 4, 4]), ValueError, "0 to 5"),
        (lambda: MixedConv(gabor, 2, order=[0, 1]), ValueError, "0 to 5"),
        (lambda: MixedConv(gabor, 2, free_bias=torch.rand(3)), ValueError, "(2,)"),
        (
            lambda: MixedConv(GaborConv2d(2, 4, 5, bias=False), 2, free_bias=torch.rand(2)),
            ValueError,
            "bias=False",
        ),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert word in str(caught.value)
        assert "\n" not in str(caught.value)
