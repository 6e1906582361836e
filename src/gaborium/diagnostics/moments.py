"""The squared error of one filter as a quadratic in its kernel, from one pass over the images.

For responses ``y = w·p + b`` to patches p the mean squared error is
``w·C w - 2 c·w + var(y - b) + (m·w - mean(y - b))²``, with the covariance C of the patches, their
mean m and their covariance c with the targets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium.fitting.statistics import PatchStatistics


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of patches and one response, all in float64.

    Args:
        covariance: C of the patches, ``(n, n)`` with n = channels · pixels.
        mean: m of the patches, ``(n,)``.
        cross: c, their covariance with the response, ``(n,)``.
        variance: of the response.
        response_mean: of the response.
        count: patches.
    """

    covariance: Tensor
    mean: Tensor
    cross: Tensor
    variance: float
    response_mean: float
    count: int

    def squared_error(self, kernels: Tensor) -> Tensor:
        """Mean squared error of the response to kernels ``(batch, channels, *size)``."""
        w = kernels.flatten(1)
        spread = ((w @ self.covariance) * w).sum(1) - 2 * w @ self.cross + self.variance
        return spread.clamp_min(0) + (w @ self.mean - self.response_mean).square()

    @property
    def second_moment(self) -> Tensor:
        """``E[p pᵀ]``: the covariance and the means."""
        return self.covariance + self.mean.outer(self.mean)


def patch_moments(
    images: Tensor,
    responses: Tensor | None,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...] | None = None,
) -> Moments:
    """Moments of the patches of images that are padded already.

    Where patches overlap much, as those of a photograph do, the covariance is read off the
    autocorrelation of the image: in all positions in which a patch touches the image, padded with
    zeros, it depends on the distance of two pixels only, and the few positions that are too many
    are taken off again. Otherwise patches are summed up one by one.

    Args:
        images: ``(batch, channels, *size)``.
        responses: ``(batch, 1, *positions)``, or none.
        kernel_size: pixels along each axis.
        stride: of the positions; by default 1.

    Example:
        >>> image = torch.rand(1, 1, 40, 40, dtype=torch.float64)
        >>> kernel = torch.rand(1, 1, 5, 5, dtype=torch.float64)
        >>> moments = patch_moments(image, F.conv2d(image, kernel), (5, 5))
        >>> moments.squared_error(kernel).item() < 1e-12
        True
    """
    d = len(kernel_size)
    stride = stride or (1,) * d
    images = images.detach().double()
    sizes = tuple(images.shape[2:])
    room = [a - k + 1 for a, k in zip(sizes, kernel_size, strict=True)]
    if min(room) < 1:
        raise ValueError(
            f"Images must not be smaller than the kernel, got {sizes} px with their padding for "
            f"kernel_size {kernel_size}."
        )
    if responses is None:
        steps = [(r - 1) // s + 1 for r, s in zip(room, stride, strict=True)]
        responses = images.new_zeros(len(images), 1, *steps)
    responses = responses.detach().double()
    touching = math.prod(a + k - 1 for a, k in zip(sizes, kernel_size, strict=True))
    if all(step == 1 for step in stride) and touching < 1.5 * math.prod(room):
        return _by_autocorrelation(images, responses, kernel_size)
    statistics = PatchStatistics(
        kernel_size, n_channels=images.shape[1], n_outputs=1, stride=stride
    )
    statistics.add(images, responses)
    assert statistics.origin is not None
    means = statistics.origin.cpu() + statistics.total / statistics.count
    return Moments(
        statistics.covariance(),
        means[:-1],
        statistics.cross_covariance()[0],
        statistics.response_variance().item(),
        means[-1].item(),
        statistics.count,
    )


def _by_autocorrelation(x: Tensor, y: Tensor, kernel_size: tuple[int, ...]) -> Moments:
    d = len(kernel_size)
    axes = tuple(range(-d, 0))
    room = [a - k + 1 for a, k in zip(x.shape[2:], kernel_size, strict=True)]
    count = len(x) * math.prod(room)
    # Without their mean, the images' sums of squares do not drown the variances that are wanted.
    level = x.mean((0, *range(2, x.ndim)))
    x = x - level.reshape(-1, *[1] * d)
    y_mean = y.mean()
    y = y - y_mean

    lengths = [_fast_length(a + k - 1) for a, k in zip(x.shape[2:], kernel_size, strict=True)]
    waves = torch.fft.rfftn(x, s=lengths, dim=axes)
    power = torch.einsum("bc...,be...->ce...", waves.conj(), waves)
    lags = torch.fft.irfftn(power, s=lengths, dim=axes)
    for axis, k in enumerate(kernel_size):
        lags = lags.index_select(2 + axis, torch.arange(1 - k, k, device=x.device) % lengths[axis])
    grids = torch.meshgrid(*(torch.arange(k, device=x.device) for k in kernel_size), indexing="ij")
    place = torch.zeros(math.prod(kernel_size), math.prod(kernel_size), dtype=torch.long)
    place = place.to(x.device)
    for pixel, k in zip(grids, kernel_size, strict=True):
        pixel = pixel.flatten()
        place = place * (2 * k - 1) + (pixel[None, :] - pixel[:, None] + k - 1)
    squares = lags.flatten(2)[:, :, place].movedim(1, 2).flatten(2).flatten(0, 1)
    for patches in _patches_beyond(x, kernel_size, room):
        squares = squares - patches.T @ patches

    total = x.sum(0)
    for axis, (k, r) in enumerate(zip(kernel_size, room, strict=True)):
        running = F.pad(total.cumsum(1 + axis).movedim(1 + axis, -1), (1, 0))
        total = (running[..., r : r + k] - running[..., :k]).movedim(-1, 1 + axis)
    mean = total.flatten() / count

    answer = torch.fft.rfftn(y, s=lengths, dim=axes)
    both = torch.fft.irfftn((answer.conj() * waves).sum(0), s=lengths, dim=axes)
    for axis, k in enumerate(kernel_size):
        both = both.narrow(1 + axis, 0, k)
    return Moments(
        (squares / count - mean.outer(mean)).cpu(),
        (mean + level.repeat_interleave(math.prod(kernel_size))).cpu(),
        (both.flatten() / count).cpu(),
        y.square().mean().item(),
        y_mean.item(),
        count,
    )


def _patches_beyond(x: Tensor, kernel_size: tuple[int, ...], room: list[int]) -> list[Tensor]:
    """Patches of the image, padded with zeros, in the positions that reach out of the image."""
    d = len(kernel_size)
    padded = F.pad(x, [k - 1 for k in reversed(kernel_size) for _ in range(2)])
    found = []
    for axis, (k, r) in enumerate(zip(kernel_size, room, strict=True)):
        if k == 1:
            continue
        for first, n in ((0, k - 1), (k - 1 + r, k - 1)):
            part = padded.narrow(2 + axis, first, n + k - 1)
            for other, size in enumerate(kernel_size):
                part = part.unfold(2 + other, size, 1)
            found.append(part.movedim(1, d + 1).flatten(d + 1).flatten(0, d))
        # What this axis leaves over lies inside along it.
        padded = padded.narrow(2 + axis, k - 1, padded.shape[2 + axis] - 2 * (k - 1))
    return found


def _fast_length(n: int) -> int:
    """The next number that has no prime factor above 5."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1
