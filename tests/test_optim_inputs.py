"""Questions about the patches that a layer sees: all of them, as the convolution takes them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium import GaborConv1d, GaborConv2d, GaborConv3d
from gaborium.optim import inputs
from gaborium.optim.inputs import draw_patches, moments_of

LAYERS = {1: GaborConv1d, 2: GaborConv2d, 3: GaborConv3d}


def patches_of(layer, images: Tensor) -> Tensor:
    return draw_patches(layer, images, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stride": 2},
        {"stride": (1, 3), "padding": (2, 1)},
        {"dilation": (2, 1), "padding": 2},
        {"groups": 2, "stride": 2, "padding": 1, "dilation": 2},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
        {"padding": "same", "padding_mode": "reflect"},
        {"padding": 3, "padding_mode": "circular"},
        {"padding": (1, 2), "padding_mode": "replicate", "groups": 4},
    ],
    ids=str,
)
def test_patches_are_those_that_unfold_gives(arguments):
    layer = GaborConv2d(4, 8, (4, 3), **arguments)
    images = torch.randn(3, 4, 11, 12)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(images, layer.border(), mode=mode)
    expected = F.unfold(padded, (4, 3), layer.dilation, stride=layer.stride)
    expected = expected.mT.flatten(0, 1).unflatten(1, (layer.groups, -1)).double()
    assert torch.equal(patches_of(layer, images), expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("n_dims", [1, 2, 3])
def test_patches_times_kernels_are_the_responses(n_dims, groups):
    sizes = (3, 4, 2)[:n_dims]
    layer = LAYERS[n_dims](
        2, 4, sizes, stride=2, padding=1, groups=groups, bias=False, dtype=torch.float64
    )
    images = torch.randn(2, 2, *(9, 8, 7)[:n_dims], dtype=torch.float64)
    responses = layer(images).movedim(1, -1).flatten(0, -2)
    kernels = layer.weight.reshape(groups, 4 // groups, -1)
    expected = torch.einsum("pgn,gfn->pgf", patches_of(layer, images), kernels).flatten(1)
    torch.testing.assert_close(responses, expected)
    one = patches_of(layer, images[0])
    assert torch.equal(one, patches_of(layer, images[:1]))


def test_few_are_drawn_of_many(monkeypatch):
    monkeypatch.setattr(inputs, "_MOST", 300)
    layer = GaborConv2d(1, 2, 3)
    images = torch.arange(4 * 20 * 20.0).reshape(4, 1, 20, 20)
    patches = patches_of(layer, images)
    assert patches.shape == (300, 1, 9)
    # Every patch is one of the images', and all of the images have their share.
    corner = patches[:, 0, 0]
    assert torch.equal(patches[:, 0] - corner[:, None], patches[:1, 0].expand(300, -1) - corner[0])
    share = torch.bincount((corner / 400).long(), minlength=4)
    assert share.min() > 40
    assert torch.equal(patches, patches_of(layer, images))
    other = draw_patches(layer, images, torch.Generator().manual_seed(1))
    assert not torch.equal(patches, other)


def test_moments_are_mean_and_mean_of_squares():
    patches = torch.randn(50, 2, 6, dtype=torch.float64) + 3
    mean, second = moments_of(patches)
    for group in range(2):
        rows = patches[:, group]
        torch.testing.assert_close(mean[group], rows.mean(0))
        covariance = second[group] - mean[group].outer(mean[group])
        torch.testing.assert_close(covariance, rows.T.cov(correction=0))


def test_inputs_of_any_precision_and_layout_serve():
    layer = GaborConv2d(2, 2, 3)
    images = torch.randn(2, 2, 6, 6)
    expected = patches_of(layer, images)
    assert expected.dtype == torch.float64
    assert torch.equal(patches_of(layer, images.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(patches_of(layer, images.bfloat16()), patches_of(layer, images.bfloat16()))
    assert not patches_of(layer, images.requires_grad_()).requires_grad
