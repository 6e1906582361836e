"""Augmented images are those of the set, mirrored and moved, and the same in any batch."""

import re

import pytest
import torch

from gaborium.training.augmentations import KINDS, augment, draw


def photographs(n: int = 40) -> torch.Tensor:
    """Every pixel of every image has a value of its own."""
    return torch.arange(n * 2 * 16 * 24.0).reshape(n, 2, 16, 24)


def test_flip_exchanges_left_and_right_of_half_the_images():
    images = photographs()
    found = augment(images, ("flip",), draws=draw(40, 0))
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(found, images, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(found, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 10 <= sum(mirrored) <= 30


def test_shift_moves_whole_images_by_up_to_an_eighth_and_mirrors_at_the_border():
    images = photographs()
    seen = set()
    for image, found in zip(images, augment(images, ("shift",), draws=draw(40, 1)), strict=True):
        fits = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-3, 4)
            if torch.equal(
                found[:, max(0, dy) : 16 + min(0, dy), max(0, dx) : 24 + min(0, dx)],
                image[:, max(0, -dy) : 16 - max(0, dy), max(0, -dx) : 24 - max(0, dx)],
            )
        ]
        assert len(fits) == 1
        seen.update(fits)
        if fits[0][0] > 0:
            assert torch.equal(found[:, 0], found[:, 2 * fits[0][0]])
    assert {dy for dy, _ in seen} == set(range(-2, 3))
    assert {dx for _, dx in seen} == set(range(-3, 4))


@pytest.mark.parametrize("kinds", [(), *((kind,) for kind in KINDS), KINDS])
def test_an_image_comes_out_the_same_in_any_batch(kinds):
    images, draws = photographs(6), draw(6, 3)
    whole = augment(images, kinds, draws=draws)
    rows = torch.tensor([4, 1, 5])
    assert torch.equal(augment(images[rows], kinds, draws=draws[rows]), whole[rows])
    assert whole.dtype == images.dtype
    assert not kinds or not torch.equal(whole, images)
    assert torch.equal(draw(6, 3), draws)
    assert not torch.equal(draw(6, 4), draws)


def test_small_images_are_not_shifted():
    images = torch.rand(3, 1, 7, 7)
    assert torch.equal(augment(images, ("shift",), draws=draw(3, 0)), images)


@pytest.mark.parametrize(
    ("images", "kinds", "words"),
    [
        (photographs(3), ("turn",), "kinds must be one of 'flip', 'shift', got 'turn'"),
        (photographs(3)[0], ("flip",), "(2, 16, 24)"),
        (photographs(2), ("flip",), "(3, 3)"),
    ],
)
def test_bad_input_is_told_in_a_line(images, kinds, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        augment(images, kinds, draws=draw(3, 0))
    assert "\n" not in str(caught.value)
