"""Corruptions of images, in five strengths each, to test a trained network with."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium.support import one_of

# What each of the five strengths means, mild to severe.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "noise": (0.04, 0.08, 0.12, 0.18, 0.26),  # standard deviation; 1 is black to white
    "blur": (0.5, 0.75, 1.0, 1.5, 2.0),  # standard deviation of the Gaussian, px
    "contrast": (0.7, 0.5, 0.35, 0.2, 0.1),  # what is left of the differences to the mean
    "fog": (0.2, 0.35, 0.5, 0.65, 0.75),  # share of the light that comes from the fog
    "pixelate": (2, 3, 4, 5, 6),  # side of a block of one colour, px
}
KINDS = tuple(STRENGTHS)
N_STRENGTHS = 5

_FOG_GRID = 4  # points of the fog's random field along each axis
_FOG_DARKEST = 0.6  # its brightness is between this and 1


def corrupt(images: Tensor, kind: str, strength: int, *, seed: int, first: int = 0) -> Tensor:
    """Corrupt images as noise, a poor lens, weak light, fog or few pixels would.

    Convention:
        - what is random depends on the seed, the image's index and its shape alone, so that an
          image comes out the same in any batch; and not on the strength, which scales it
        - values stay in [0, 1]

    Args:
        images: floating, in [0, 1], ``(n, channels, height, width)``.
        kind: one of ``KINDS``: ``"noise"``, ``"blur"``, ``"contrast"``, ``"fog"`` or
            ``"pixelate"``.
        strength: 1 (mild) to 5 (severe), see ``STRENGTHS``; 0 returns the images as they are.
        seed: of noise and fog.
        first: the index of the first image, where these are a part of a larger set.

    Returns:
        New images of the same shape, dtype and device.

    Raises:
        TypeError: the images are not floating.
        ValueError: their shape or range is another, or a kind or strength that does not exist.

    Example:
        >>> images = torch.rand(4, 1, 16, 16)
        >>> worse = [corrupt(images, "noise", strength, seed=0) for strength in (1, 5)]
        >>> [bool((one - images).square().mean().sqrt() < 0.1) for one in worse]
        [True, False]
    """
    one_of("kind", kind, KINDS)
    if strength not in range(N_STRENGTHS + 1):
        raise ValueError(f"strength must be 0 to {N_STRENGTHS}, got {strength!r}.")
    if not images.is_floating_point():
        raise TypeError(
            f"images must be floating, in [0, 1], got {images.dtype}; divide uint8 by 255."
        )
    if images.ndim != 4:
        raise ValueError(
            f"images must be (n, channels, height, width), got shape {tuple(images.shape)}."
        )
    if images.numel() == 0 or strength == 0:
        return images.clone()
    if not bool(((images >= 0) & (images <= 1)).all()):
        low, high = (value.item() for value in images.aminmax())
        raise ValueError(f"images must lie in [0, 1], got {low:g} to {high:g}.")
    apply = _APPLY[kind]
    amount = STRENGTHS[kind][strength - 1]
    return apply(images, amount, seed, first).clamp(0, 1)


def _noise(images: Tensor, std: float, seed: int, first: int) -> Tensor:
    shape = tuple(images.shape[1:])
    drawn = _draw(images, shape, torch.randn, seed, first)
    return images + std * drawn


def _blur(images: Tensor, std: float, *_: int) -> Tensor:
    reach = math.ceil(3 * std)
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    profile = torch.exp(-0.5 * (offsets / std) ** 2)
    profile = profile / profile.sum()
    single = F.pad(images.flatten(0, 1).unsqueeze(1), [reach] * 4, mode="replicate")
    along_x = F.conv2d(single, profile.reshape(1, 1, 1, -1))
    return F.conv2d(along_x, profile.reshape(1, 1, -1, 1)).reshape(images.shape)


def _contrast(images: Tensor, share: float, *_: int) -> Tensor:
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + share * (images - mean)


def _fog(images: Tensor, share: float, seed: int, first: int) -> Tensor:
    field = _draw(images, (1, _FOG_GRID, _FOG_GRID), torch.rand, seed, first)
    size = list(images.shape[2:])
    field = F.interpolate(field, size=size, mode="bilinear", align_corners=True)
    light = _FOG_DARKEST + (1 - _FOG_DARKEST) * field
    return (1 - share) * images + share * light


def _pixelate(images: Tensor, side: float, *_: int) -> Tensor:
    block, (height, width) = int(side), images.shape[2:]
    means = F.avg_pool2d(images, block, ceil_mode=True)  # the last blocks are cut by the border
    whole = means.repeat_interleave(block, 2).repeat_interleave(block, 3)
    return whole[..., :height, :width]


_APPLY: dict[str, Callable[[Tensor, float, int, int], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "fog": _fog,
    "pixelate": _pixelate,
}


def _draw(
    images: Tensor, shape: tuple[int, ...], sample: Callable[..., Tensor], seed: int, first: int
) -> Tensor:
    """One random tensor for each image, by its index."""
    generator = torch.Generator()
    drawn = []
    for index in range(first, first + len(images)):
        # Hashed, so that image 1 of seed 0 is not image 0 of seed 1.
        digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=4).digest()
        generator.manual_seed(int.from_bytes(digest, "big"))
        drawn.append(sample(shape, generator=generator, device="cpu"))
    return torch.stack(drawn).to(images)
