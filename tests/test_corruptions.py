"""Questions about corruptions: what they do to an image, and that they do it again."""

import pytest
import torch

from gaborium.training.corruptions import KINDS, N_STRENGTHS, STRENGTHS, corrupt

ALL = range(1, N_STRENGTHS + 1)


@pytest.fixture
def images() -> torch.Tensor:
    """Smooth images, with white noise of a twentieth upon them."""
    wave = torch.linspace(0, 6, 28).sin()
    smooth = 0.5 + 0.4 * wave[:, None] * wave * torch.rand(3, 2, 1, 1)
    return (smooth + 0.05 * (torch.rand(3, 2, 28, 28) - 0.5)).clamp(0, 1)


def change(images: torch.Tensor, kind: str, strength: int) -> float:
    return (corrupt(images, kind, strength, seed=0) - images).square().mean().sqrt().item()


@pytest.mark.parametrize("kind", KINDS)
def test_each_strength_is_worse_than_the_last_and_stays_in_range(kind, images):
    changes = [change(images, kind, strength) for strength in ALL]
    assert changes == sorted(changes)
    assert changes[0] > 0.002
    assert len(STRENGTHS[kind]) == N_STRENGTHS
    worst = corrupt(images, kind, N_STRENGTHS, seed=0)
    assert worst.min() >= 0
    assert worst.max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_is_the_image_itself_in_new_memory(kind, images):
    same = corrupt(images, kind, 0, seed=0)
    assert torch.equal(same, images)
    assert same.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_comes_out_the_same_in_any_batch(kind, images):
    before = images.clone()
    whole = corrupt(images, kind, 3, seed=7)
    assert torch.equal(images, before)
    assert torch.equal(whole, corrupt(images, kind, 3, seed=7))
    for index in range(len(images)):
        alone = corrupt(images[index : index + 1], kind, 3, seed=7, first=index)
        # Vectorised arithmetic may round the end of a batch apart.
        torch.testing.assert_close(alone[0], whole[index], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["noise", "fog"])
def test_seeds_and_images_have_randomness_of_their_own(kind):
    grey = torch.full((2, 1, 16, 16), 0.5)
    first, other = corrupt(grey, kind, 2, seed=0), corrupt(grey, kind, 2, seed=1)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], other[0])


def test_torch_s_own_generator_is_left_alone(images):
    state = torch.get_rng_state()
    corrupt(images, "noise", 5, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_has_the_deviation_of_the_table():
    grey = torch.full((50, 1, 32, 32), 0.5, dtype=torch.float64)
    for strength, std in zip(ALL[:3], STRENGTHS["noise"], strict=False):
        # 51200 values; clipping at 4 deviations and beyond takes nothing away.
        assert abs((corrupt(grey, "noise", strength, seed=0) - grey).std().item() / std - 1) < 0.02


def test_a_blurred_point_is_a_gaussian_of_the_table_and_keeps_its_light():
    point = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    point[..., 20, 20] = 1
    for strength, std in zip(ALL, STRENGTHS["blur"], strict=True):
        spread = corrupt(point, "blur", strength, seed=0)[0, 0]
        assert abs(spread.sum().item() - 1) < 1e-12
        offsets = torch.arange(41.0, dtype=torch.float64) - 20
        found = (spread.sum(0) * offsets.square()).sum().sqrt().item()
        # Sampled, and cut at three deviations, which takes a fourteenth off the narrowest.
        assert abs(found - std) < 0.04
        assert torch.allclose(spread, spread.T)


def test_contrast_keeps_the_mean_and_scales_the_rest(images):
    weak = corrupt(images, "contrast", 4, seed=0)
    assert torch.allclose(weak.mean((1, 2, 3)), images.mean((1, 2, 3)))
    ratio = weak.std((1, 2, 3)) / images.std((1, 2, 3))
    assert torch.allclose(ratio, torch.full_like(ratio, STRENGTHS["contrast"][3]), atol=1e-5)


def test_fog_is_bright_smooth_and_alike_in_all_colours():
    black = torch.zeros(1, 3, 32, 32)
    fog = corrupt(black, "fog", 5, seed=0)[0]
    assert torch.equal(fog[0], fog[2])
    assert fog.min() >= 0.75 * 0.6 - 1e-6
    assert fog.diff(dim=-1).abs().max() < 0.05
    assert fog.std() > 0.01


def test_pixelate_leaves_the_means_of_blocks_of_the_size_in_the_table():
    image = torch.rand(1, 1, 30, 27)
    for strength, side in zip(ALL, STRENGTHS["pixelate"], strict=True):
        coarse = corrupt(image, "pixelate", strength, seed=0)
        assert coarse.unique().numel() == -(-30 // side) * -(-27 // side)
        torch.testing.assert_close(coarse[0, 0, 0, 0], image[0, 0, :side, :side].mean())
        last = 27 % side or side
        torch.testing.assert_close(coarse[0, 0, 0, -1], image[0, 0, :side, -last:].mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_dtype_and_shape_are_kept(kind, dtype, images):
    result = corrupt(images.to(dtype), kind, 2, seed=0)
    assert result.dtype == dtype
    assert result.shape == images.shape
    assert corrupt(images[:0], kind, 2, seed=0).shape == images[:0].shape


def test_bad_input_is_one_clear_line(images):
    for call, kind, word in (
        (lambda: corrupt(images, "rain", 1, seed=0), ValueError, "'noise'"),
        (lambda: corrupt(images, "noise", 6, seed=0), ValueError, "0 to 5, got 6"),
        (lambda: corrupt(images, "noise", -1, seed=0), ValueError, "got -1"),
        (lambda: corrupt(images[0], "noise", 1, seed=0), ValueError, "(2, 28, 28)"),
        (lambda: corrupt(images * 2, "noise", 1, seed=0), ValueError, "[0, 1]"),
        (lambda: corrupt(images * torch.nan, "noise", 1, seed=0), ValueError, "nan"),
        (lambda: corrupt(images.byte(), "noise", 1, seed=0), TypeError, "255"),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert word in str(caught.value)
        assert "\n" not in str(caught.value)
