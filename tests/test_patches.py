"""Questions about the patches of images: which they are, and what their statistics are."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium import GaborConv2d
from gaborium import patches as module
from gaborium.layers import LAYERS
from gaborium.patches import PatchStatistics, mean_patch, patch_moments, root_of, sample_patches

F64 = torch.float64


def patches_of(layer, images: Tensor) -> Tensor:
    return sample_patches(layer, images, torch.Generator().manual_seed(0))


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
    expected = expected.mT.flatten(0, 1).unflatten(1, (layer.groups, -1))
    assert torch.equal(patches_of(layer, images), expected)
    torch.testing.assert_close(mean_patch(layer, images), expected.mean(0))


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
    monkeypatch.setattr(module, "_MOST", 300)
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
    other = sample_patches(layer, images, torch.Generator().manual_seed(1))
    assert not torch.equal(patches, other)


def test_moments_are_mean_and_mean_of_squares():
    patches = torch.randn(50, 2, 6, dtype=torch.float64) + 3
    mean, second = patch_moments(patches)
    for group in range(2):
        rows = patches[:, group]
        torch.testing.assert_close(mean[group], rows.mean(0))
        covariance = second[group] - mean[group].outer(mean[group])
        torch.testing.assert_close(covariance, rows.T.cov(correction=0))


def test_inputs_of_any_precision_and_layout_serve():
    layer = GaborConv2d(2, 2, 3)
    images = torch.randn(2, 2, 6, 6)
    expected = patches_of(layer, images)
    assert expected.dtype == torch.float32
    assert patches_of(layer, images.double()).dtype == torch.float64
    assert torch.equal(patches_of(layer, images.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(patches_of(layer, images.bfloat16()), patches_of(layer, images.bfloat16()))
    assert not patches_of(layer, images.requires_grad_()).requires_grad


# -- statistics of patches and responses --------------------------------------------------------


def statistics_of(images: Tensor, responses: Tensor, kernel: tuple[int, ...], **options):
    found = PatchStatistics(
        kernel, n_channels=images.shape[1], n_outputs=responses.shape[1], **options
    )
    found.add(images, responses)
    return found


@pytest.mark.parametrize(
    ("batch", "channels", "sizes", "kernel", "options"),
    [
        (3, 2, (12, 14), (3, 5), {}),
        (3, 2, (12, 14), (3, 5), {"stride": (2, 3)}),
        (3, 2, (12, 14), (3, 5), {"padding": (1, 2)}),
        (3, 2, (12, 14), (3, 5), {"padding": (3, 0), "stride": (3, 1)}),
        (1, 1, (60, 70), (7, 5), {"padding": "same"}),
        (2, 3, (64, 50), (5, 6), {}),
        (1, 2, (90,), (9,), {"padding": (2,)}),
        (1, 1, (50, 9), (7, 1), {}),
        (1, 2, (30, 26, 28), (3, 2, 3), {}),
    ],
    ids=str,
)
def test_statistics_are_those_of_all_patches(batch, channels, sizes, kernel, options):
    d = len(sizes)
    images = 3 + torch.rand(batch, channels, *sizes, dtype=F64)
    weight = torch.randn(4, channels, *kernel, dtype=F64)
    responses = (F.conv1d, F.conv2d, F.conv3d)[d - 1](images, weight, **options)
    found = statistics_of(images, responses, kernel, **options)
    # A layer that knows its border by itself takes the same patches.
    layer = LAYERS[d](channels, 1, kernel, **options)
    patches = sample_patches(layer, images, torch.Generator())[:, 0]
    answers = responses.movedim(1, -1).flatten(0, -2)
    both, n = torch.cat([patches, answers], 1), patches.shape[1]
    expected = torch.cov(both.T, correction=0)
    assert found.count == len(patches)
    assert not found.is_constant
    for ours, wanted in (
        (found.mean, patches.mean(0)),
        (found.covariance, expected[:n, :n]),
        (found.second_moment, patches.T @ patches / len(patches)),
        (found.cross_covariance, expected[n:, :n]),
        (found.response_variance, expected.diagonal()[n:]),
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


def test_the_squared_error_is_that_of_the_responses():
    image, kernels = torch.rand(1, 1, 40, 40, dtype=F64), torch.rand(3, 1, 5, 5, dtype=F64)
    wanted = F.conv2d(image, kernels[:1]) + 0.5
    found = statistics_of(image, wanted, (5, 5)).squared_error(kernels)
    expected = (F.conv2d(image, kernels) - wanted).square().mean((0, 2, 3))
    torch.testing.assert_close(found, expected)


def test_statistics_do_not_depend_on_the_pieces(monkeypatch):
    images, responses = torch.rand(4, 1, 20, 16, dtype=F64), torch.rand(4, 2, 16, 12, dtype=F64)

    def covariance(*sizes: int) -> Tensor:
        found = PatchStatistics((5, 5), n_channels=1, n_outputs=2)
        for pair in zip(images.split(sizes), responses.split(sizes), strict=True):
            found.add(*pair)
        return torch.cat([found.covariance, found.cross_covariance])

    once = covariance(4)
    torch.testing.assert_close(covariance(1, 3), once, rtol=1e-12, atol=1e-14)
    monkeypatch.setattr(module, "_CHUNK", 1)  # a row of positions at a time
    torch.testing.assert_close(covariance(2, 2), once, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [12, 30])  # one by one, and by correlation
def test_a_large_mean_costs_no_digits(size):
    images = torch.rand(1, 1, size, size, dtype=F64)
    responses = torch.rand(1, 1, size - 4, size - 4, dtype=F64)
    at_zero = statistics_of(images, responses, (5, 5)).covariance
    far = statistics_of(images + 1e6, responses - 1e6, (5, 5)).covariance
    # Seven digits of sixteen are lost in adding the mean, none by the sums of squares.
    torch.testing.assert_close(far, at_zero, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [12, 30])
def test_constant_images_are_constant(size):
    found = PatchStatistics((5, 5), n_channels=1)
    found.add(torch.full((2, 1, size, size), 0.3))
    assert found.is_constant


def test_the_root_leaves_out_what_no_patch_has():
    vectors = torch.randn(3, 8, dtype=F64)
    covariance = vectors.T @ vectors
    root, inverse = root_of(covariance)
    assert root.shape == inverse.shape == (3, 8)
    torch.testing.assert_close(root.T @ root, covariance)
    torch.testing.assert_close(root @ inverse.T, torch.eye(3, dtype=F64))
