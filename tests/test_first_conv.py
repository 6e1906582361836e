"""Questions about the first convolution: which one it is, and what is left when it is replaced."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gaborium import GaborConv1d, GaborConv2d, GaborConv3d, MixedConv
from gaborium.conversion import find_first_conv, replace_first_conv
from transformer_networks import resnet, videomae, wav2vec2

LAYERS = {1: GaborConv1d, 2: GaborConv2d, 3: GaborConv3d}


def gabor_like(conv: Any) -> nn.Module:
    return LAYERS[len(conv.kernel_size)](
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        bias=conv.bias is not None,
    )


@pytest.mark.parametrize("make", [resnet, wav2vec2, videomae])
def test_a_real_network_learns_with_a_gabor_first_layer(make: Callable):
    pytest.importorskip("transformers")
    network, batch, name = make()
    network.eval()
    before = copy.deepcopy(network.state_dict())
    found, conv = find_first_conv(network)
    assert found == name == find_first_conv(network, inputs=batch)[0]
    assert conv is network.get_submodule(name)

    mine = replace_first_conv(network, gabor_like)
    layer = mine.get_submodule(name)
    assert isinstance(layer, tuple(LAYERS.values()))
    assert not layer.training
    assert network.get_submodule(name) is conv
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())

    shape = network(batch).logits.shape
    # Normalised values have a fixed mean, and a fixed mean square, and no gradient of either.
    mixture = torch.randn(shape)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    start = layer.weight.detach()
    (mine(batch).logits * mixture).mean().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, start)

    # The same kernels back in place give the same network.
    back = replace_first_conv(mine, conv)
    assert torch.equal(back(batch).logits, network(batch).logits)


def test_a_mixed_layer_takes_the_place_too():
    network = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 4, 3))
    mine = replace_first_conv(network, MixedConv(GaborConv2d(3, 6, 5, padding=2), 2))
    assert mine(torch.rand(1, 3, 12, 12)).shape == network(torch.rand(1, 3, 12, 12)).shape
    assert find_first_conv(mine)[1] is mine[0]  # and not the Gabor layer inside
    assert find_first_conv(mine, inputs=torch.rand(1, 3, 12, 12))[0] == "0"


class Backwards(nn.Module):
    """Registers its convolutions in the other order than it runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(4, 4, 3)
        self.first = nn.Conv2d(1, 4, 3)
        self.unused = nn.Conv2d(1, 4, 5)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, image: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return scale * self.second(self.norm(self.first(image)))


def test_execution_decides_where_inputs_are_given():
    network, image = Backwards(), torch.rand(2, 1, 9, 9)
    before = copy.deepcopy(network.state_dict())
    assert find_first_conv(network)[0] == "second"
    for inputs in (image, (image, 2.0), {"image": image}):
        assert find_first_conv(network, inputs=inputs)[0] == "first"
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.training
    assert not any(part._forward_pre_hooks for part in network.modules())
    mine = replace_first_conv(network, gabor_like, inputs=image)
    assert isinstance(mine.first, GaborConv2d)


def test_a_name_chooses_the_layer():
    network = Backwards()
    assert find_first_conv(network, "unused") == ("unused", network.unused)
    assert isinstance(replace_first_conv(network, gabor_like, "unused").unused, GaborConv2d)


def test_the_module_itself_may_be_the_convolution():
    conv = nn.Conv2d(1, 4, 5)
    assert find_first_conv(conv) == ("", conv)
    new = GaborConv2d(1, 4, 5)
    assert replace_first_conv(conv.eval(), new) is new
    assert not new.training


def test_a_layer_in_several_places_is_replaced_in_all():
    conv = nn.Conv2d(1, 1, 3, padding=1)
    network = nn.Sequential(conv, nn.ReLU(), nn.ModuleDict({"again": conv}))
    mine = replace_first_conv(network, gabor_like)
    assert mine[0] is mine[2]["again"]
    assert isinstance(mine[0], GaborConv2d)


def test_a_factory_cannot_reach_the_callers_layer():
    network = nn.Sequential(nn.Conv2d(1, 2, 3))

    def spoil(conv: Any) -> nn.Module:
        with torch.no_grad():
            conv.weight.zero_()
        return conv

    assert replace_first_conv(network, spoil)[0].weight.abs().max() == 0
    assert network[0].weight.abs().max() > 0


def whole_numbers() -> nn.Module:
    conv = nn.Conv2d(1, 2, 3)
    conv.weight = nn.Parameter(torch.zeros(2, 1, 3, 3, dtype=torch.int8), requires_grad=False)
    return conv


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (nn.Sequential(nn.Linear(3, 3)), ("holds no convolution",)),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3)), ("'0'", "1 x 1 px")),
        (nn.Conv1d(3, 8, 1), ("'Conv1d'", "of 1 px")),
        (nn.Sequential(nn.ConvTranspose2d(3, 8, 3)), ("transposed",)),
        (nn.Conv2d(3, 8, 3, dtype=torch.complex64), ("torch.complex64", "real")),
        (whole_numbers(), ("torch.int8",)),
        (nn.LazyConv2d(8, 3), ("no shape yet",)),
    ],
)
def test_what_cannot_be_replaced_is_said_in_one_line(network, words):
    for call in (find_first_conv, lambda module: replace_first_conv(module, gabor_like)):
        with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
            call(network)
        assert all(word in str(caught.value) for word in words)
        assert "\n" not in str(caught.value)


def test_bad_arguments_are_one_clear_line():
    network = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU())

    def replace(new: Any, **kwargs: Any) -> nn.Module:
        return replace_first_conv(network, new, **kwargs)

    for call, kind, word in (
        (lambda: find_first_conv("resnet"), TypeError, "got str"),
        (lambda: find_first_conv(network, "2"), ValueError, "its first convolutions are ['0']"),
        (lambda: find_first_conv(network, "1"), ValueError, "is no convolution"),
        (lambda: replace(3), TypeError, "got int"),
        (lambda: replace(lambda conv: 3), TypeError, "got int"),
        (lambda: replace(GaborConv2d(1, 8, 5)), ValueError, "in_channels=3"),
        (lambda: replace(GaborConv2d(3, 4, 5)), ValueError, "out_channels=8"),
    ):
        with pytest.raises(kind, match=re.escape(word)) as caught:
            call()
        assert "\n" not in str(caught.value)


class Idle(nn.Module):
    """Has a convolution that it does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image


def test_a_convolution_that_is_not_run_is_not_the_first():
    with pytest.raises(ValueError, match="executed no convolution"):
        find_first_conv(Idle(), inputs=torch.rand(1))
