"""Augmentations: what is done to training images by chance, anew in each epoch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium.errors import one_of

KINDS = ("flip", "shift")
_REACH = 8  # a shift goes up to one part in so many of each side


def augment(images: Tensor, kinds: tuple[str, ...], *, draws: Tensor) -> Tensor:
    """Mirror and shift images by chance.

    Convention:
        - ``"flip"``: every other image, by chance, has left and right exchanged
        - ``"shift"``: by whole pixels, up to an eighth of each side in all directions; what comes
          in at a border is what lies beside it, mirrored
        - what is random are the ``draws`` alone, so that an image comes out the same in any batch

    Args:
        images: ``(n, channels, height, width)``.
        kinds: of ``KINDS``; none leaves the images as they are.
        draws: ``(n, 3)``, uniform in [0, 1), as ``draw`` makes them: for flip and both shifts.

    Returns:
        New images of the same shape, dtype and device.

    Raises:
        ValueError: a kind does not exist, or shapes are others.

    Example:
        >>> images = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> augment(images, ("flip",), draws=torch.tensor([[0.2, 0.5, 0.5]]))[0, 0, 0].tolist()
        [3.0, 2.0, 1.0, 0.0]
    """
    for kind in kinds:
        one_of("kinds", kind, KINDS)
    if images.ndim != 4 or tuple(draws.shape) != (len(images), 3):
        raise ValueError(
            "images must be (n, channels, height, width) with draws (n, 3), got shapes "
            f"{tuple(images.shape)} and {tuple(draws.shape)}."
        )
    draws = draws.to(images.device)
    if "flip" in kinds:
        images = torch.where((draws[:, 0] < 0.5)[:, None, None, None], images.flip(-1), images)
    return _shifted(images, draws[:, 1:]) if "shift" in kinds else images


def draw(n: int, seed: int) -> Tensor:
    """What ``augment`` needs for n images, from a seed."""
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(seed))


def _shifted(images: Tensor, draws: Tensor) -> Tensor:
    n, _, height, width = images.shape
    reach = [side // _REACH for side in (height, width)]
    padded = F.pad(images, (reach[1], reach[1], reach[0], reach[0]), mode="reflect")
    first = (draws * draws.new_tensor([2 * one + 1 for one in reach])).long()
    rows, columns = (
        first[:, axis, None] + torch.arange(side, device=images.device)
        for axis, side in enumerate((height, width))
    )
    image = torch.arange(n, device=images.device)[:, None, None]
    return padded.movedim(1, -1)[image, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
