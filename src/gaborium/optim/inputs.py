"""What a layer's inputs look like: mean and second moment of their patches, as they stream by."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_WORK = 2e8  # products of pixels in one look: patches taken, times n²
_FEWEST, _MOST = 256, 32_768  # patches


def draw_patches(layer: Any, images: Tensor, generator: torch.Generator) -> Tensor:
    """Patches that the layer's kernels see, ``(patches, groups, n)`` with n = channels · pixels.

    All of them where there are few, otherwise some, drawn at random: as many as cost little beside
    a training step.

    Args:
        layer: a Gabor layer.
        images: its input, ``(batch, channels, *size)`` or without batch.
        generator: on the CPU.

    Example:
        >>> from gaborium import GaborConv2d
        >>> layer = GaborConv2d(3, 16, 7, padding=3)
        >>> draw_patches(layer, torch.rand(8, 3, 10, 10), torch.Generator()).shape
        torch.Size([800, 1, 147])
    """
    d = layer.n_dims
    images = layer.padded(_batched(layer, images)).contiguous()
    room = _room(layer, images)
    total = len(images) * math.prod(room)
    n = images.shape[1] // layer.groups * math.prod(layer.kernel_size)
    limit = int(min(max(_WORK / n**2, _FEWEST), _MOST))
    if total <= limit:
        chosen = torch.arange(total)
    else:
        chosen = torch.randint(total, (limit,), generator=generator)
    chosen = chosen.to(images.device)

    # A patch is copied row by row: along the last axis its pixels lie side by side in memory.
    gap, k = layer.dilation[-1], layer.kernel_size[-1]
    rows = images.flatten().unfold(0, gap * (k - 1) + 1, 1)[:, ::gap]
    first, inner = torch.zeros_like(chosen), torch.zeros_like(chosen[:1])
    for axis in reversed(range(d)):
        reach = images.stride(2 + axis)
        first += (chosen % room[axis]) * layer.stride[axis] * reach
        chosen = chosen // room[axis]
        if axis < d - 1:
            pixel = torch.arange(layer.kernel_size[axis], device=chosen.device)
            pixel = pixel * (layer.dilation[axis] * reach)
            inner = (pixel.unsqueeze(-1) + inner).flatten()
    first += chosen * images.stride(0)
    channel = torch.arange(images.shape[1], device=chosen.device) * images.stride(1)
    inner = (channel.unsqueeze(-1) + inner).flatten()
    patches = rows.index_select(0, (first.unsqueeze(-1) + inner).flatten())
    patches = patches.to(torch.promote_types(images.dtype, torch.float32))
    return patches.reshape(len(first), layer.groups, n)


def mean_patch(layer: Any, images: Tensor) -> Tensor:
    """The mean of all patches that the layer's kernels see, ``(groups, n)``.

    Args:
        layer: a Gabor layer.
        images: its input, ``(batch, channels, *size)`` or without batch.

    Example:
        >>> from gaborium import GaborConv2d
        >>> layer, images = GaborConv2d(3, 16, 7, padding=3), torch.rand(8, 3, 10, 10)
        >>> patches = draw_patches(layer, images, torch.Generator())
        >>> torch.allclose(mean_patch(layer, images), patches.mean(0))
        True
    """
    dtype = torch.promote_types(images.dtype, torch.float32)
    mean = layer.padded(_batched(layer, images).mean(0, keepdim=True, dtype=dtype))
    room = _room(layer, mean)
    for axis, n in enumerate(room):
        # Each of the kernel's pixels meets those of the image at the places of n positions.
        places = torch.arange(n, device=mean.device) * layer.stride[axis]
        pixels = torch.arange(layer.kernel_size[axis], device=mean.device) * layer.dilation[axis]
        met = mean.index_select(2 + axis, (pixels.unsqueeze(-1) + places).flatten())
        mean = met.unflatten(2 + axis, (len(pixels), n)).mean(3 + axis)
    return mean.reshape(layer.groups, -1)


def _batched(layer: Any, images: Tensor) -> Tensor:
    return images.detach().reshape(-1, *images.shape[-layer.n_dims - 1 :])


def _room(layer: Any, padded: Tensor) -> list[int]:
    """How many positions the kernels take along each axis."""
    return [
        (size - gap * (k - 1) - 1) // step + 1
        for size, k, gap, step in zip(
            padded.shape[2:], layer.kernel_size, layer.dilation, layer.stride, strict=True
        )
    ]


def moments_of(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(groups, n)`` and second moment ``(groups, n, n)``."""
    by_group = patches.transpose(0, 1)
    return patches.mean(0), by_group.mT @ by_group / len(patches)
