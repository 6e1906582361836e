"""Random mirroring of training images, for the experiments on starts."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def make_flip(n_images: int) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Return an ``augment`` for ``train`` that exchanges left and right of every other image.

    What is random depends on the seed and the index of an image alone, so that an image is the
    same in any batch.
    """

    @functools.lru_cache(maxsize=1)
    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(n_images, 3, generator=generator)[:, 0] < 0.5

    def flip(images: Tensor, indices: Tensor, seed: int) -> Tensor:
        flipped = draw(seed)[indices].to(images.device)
        return torch.where(flipped[:, None, None, None], images.flip(-1), images)

    return flip
