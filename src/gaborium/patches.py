"""Statistics of image patches: mean, covariance, and covariance with a convolution's responses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 2**22  # numbers in a piece of the patch matrix: 32 MB in float64
_WORK = 2e8  # products of pixels per sample: patches drawn, times n²
_FEWEST, _MOST = 256, 32_768  # patches in a sample
_MIN_EIGENVALUE = 1e-13  # share of the largest; below, no patch has the direction


class PatchStatistics:
    """Running first and second moments of patches ``p`` and responses ``r``, in float64.

    For a squared error the images matter only through the covariance C of their patches, and the
    responses only through their covariance c with the patches and their variance. These have the
    size of the kernel, n = channels · pixels, whatever the size of the images. Where neighbouring
    patches overlap much, C comes from the autocorrelation of the image; otherwise patches are
    summed one by one. Stride and padding are of the convolution that made the responses.

    Example:
        >>> image = torch.rand(1, 1, 16, 16)
        >>> statistics = PatchStatistics((3, 3), n_channels=1, n_outputs=2)
        >>> statistics.add(image, torch.nn.Conv2d(1, 2, 3)(image).detach())
        >>> statistics.count, statistics.covariance.shape
        (196, torch.Size([9, 9]))
    """

    def __init__(
        self,
        kernel_size: tuple[int, ...],
        *,
        n_channels: int,
        n_outputs: int = 0,
        stride: tuple[int, ...] | None = None,
        padding: tuple[int, ...] | str = "valid",
    ) -> None:
        if isinstance(padding, str) and padding not in ("valid", "same"):
            raise ValueError(f"padding must be one of 'valid', 'same', got {padding!r}.")
        self.kernel_size, self.n_channels, self.n_outputs = kernel_size, n_channels, n_outputs
        self.stride, self.padding = stride or (1,) * len(kernel_size), padding
        self._n = n_channels * math.prod(kernel_size)
        # Subtracted from everything, so that sums of squares do not swamp the variances.
        self._level: tuple[Tensor, Tensor] | None = None
        # Sum of z zᵀ over all positions, where z is a patch, its responses, and a one.
        self._sums = torch.zeros(2 * (self._n + n_outputs + 1,), dtype=torch.float64)

    def add(self, images: Tensor, responses: Tensor | None = None) -> None:
        """Add ``images`` ``(batch, channels, *size)`` and ``responses`` ``(batch, out, *)``."""
        d = len(self.kernel_size)
        x = F.pad(images.detach().double(), self._border())
        sizes = tuple(x.shape[2:])
        room = [a - k + 1 for a, k in zip(sizes, self.kernel_size, strict=True)]
        if min(room) < 1:
            raise ValueError(
                f"Images must not be smaller than the kernel, got {sizes} px with their padding "
                f"for kernel_size {self.kernel_size}."
            )
        positions = tuple((r - 1) // step + 1 for r, step in zip(room, self.stride, strict=True))
        y = x.new_zeros(len(x), 0, *positions) if responses is None else responses.detach().double()
        if (x.shape[1], y.shape[1]) != (self.n_channels, self.n_outputs):
            raise ValueError(
                f"Channels must stay the same, {self.n_channels} of images and {self.n_outputs} "
                f"of responses, got {x.shape[1]} and {y.shape[1]}."
            )
        if y.shape[2:] != positions:
            raise ValueError(
                f"responses must have size {positions} for this image, kernel_size, stride and "
                f"padding, got {tuple(y.shape[2:])}."
            )
        if len(x) == 0:
            return
        if self._level is None:
            axes = (0, *range(2, 2 + d))
            self._level = x.mean(axes), y.mean(axes)
        x, y = (
            part - level.reshape(-1, *[1] * d)
            for part, level in zip((x, y), self._level, strict=True)
        )
        y = torch.cat([y, y.new_ones(len(y), 1, *positions)], 1)
        touching = math.prod(a + k - 1 for a, k in zip(sizes, self.kernel_size, strict=True))
        overlapping = positions == tuple(room) and touching < 1.5 * math.prod(room)
        n_images = max(1, _CHUNK // (x[0].numel() * math.prod(self.kernel_size)))
        for image, response in zip(x.split(n_images), y.split(n_images), strict=True):
            if overlapping:
                sums = _by_correlation(image, response, self.kernel_size)
            else:
                sums = _one_by_one(image, response, self.kernel_size, self.stride)
            self._sums += sums.cpu()

    @property
    def count(self) -> int:
        """Patches so far."""
        return int(self._sums[-1, -1])

    @property
    def mean(self) -> Tensor:
        """Mean patch, ``(n,)``."""
        return self._means()[: self._n]

    @property
    def covariance(self) -> Tensor:
        """Covariance C of the patches, ``(n, n)``."""
        return self._centred()[: self._n, : self._n]

    @property
    def second_moment(self) -> Tensor:
        """``E[p pᵀ]``, ``(n, n)``: the covariance and the means."""
        return self.covariance + self.mean.outer(self.mean)

    @property
    def cross_covariance(self) -> Tensor:
        """Covariance c of each response with the patches, ``(out, n)``."""
        return self._centred()[self._n :, : self._n]

    @property
    def response_variance(self) -> Tensor:
        """Variance of each response, ``(out,)``."""
        return self._centred().diagonal()[self._n :]

    @property
    def is_constant(self) -> bool:
        """Whether the patches vary by no more than rounding."""
        power = self._sums.diagonal()[: self._n].mean() / self.count
        return not self.covariance.diagonal().mean() > 1e-12 * (power + 1e-30)

    def squared_error(self, kernels: Tensor) -> Tensor:
        """Mean squared error of the only response to kernels ``(batch, channels, *size)``.

        It is ``w·C w - 2 c·w + var(r) + (m·w - mean(r))²``, with the mean patch m.
        """
        w, (cross,), (variance,) = kernels.flatten(1), self.cross_covariance, self.response_variance
        spread = ((w @ self.covariance) * w).sum(1) - 2 * w @ cross + variance
        return spread.clamp_min(0) + (w @ self.mean - self._means()[-1]).square()

    def _means(self) -> Tensor:
        assert self._level is not None
        level, response_level = (part.cpu() for part in self._level)
        level = level.repeat_interleave(math.prod(self.kernel_size))
        return torch.cat([level, response_level]) + self._sums[-1, :-1] / self.count

    def _centred(self) -> Tensor:
        mean = self._sums[-1, :-1] / self.count
        return self._sums[:-1, :-1] / self.count - mean.outer(mean)

    def _border(self) -> list[int]:
        if isinstance(self.padding, str):
            total = [size - 1 if self.padding == "same" else 0 for size in self.kernel_size]
            return [n for t in reversed(total) for n in (t // 2, t - t // 2)]
        return [n for pad in reversed(self.padding) for n in (pad, pad)]


def root_of(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """``R`` with ``RᵀR = C``, and ``R⁻ᵀ``, without the directions that no patch has.

    Both have shape ``(m, n)``; an image of one orientation only, for example, has m < n.
    """
    values, vectors = torch.linalg.eigh(covariance)
    present = values > _MIN_EIGENVALUE * values[-1]
    values, vectors = values[present], vectors[:, present]
    return values.sqrt().unsqueeze(-1) * vectors.T, values.rsqrt().unsqueeze(-1) * vectors.T


def sample_patches(layer: Any, images: Tensor, generator: torch.Generator) -> Tensor:
    """Patches of a layer's input, ``(patches, groups, n)`` with n = channels · pixels.

    All patches if there are few, otherwise a random sample whose covariance costs little compared
    with a training step. The generator is on the CPU.
    """
    images = layer.padded(_batched(layer, images))
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    patches = _patches_of(images, layer.kernel_size, layer.stride, layer.dilation)
    positions, size = patches.shape[: layer.n_dims + 1], patches.shape[layer.n_dims + 1 :]
    n, total = math.prod(size) // layer.groups, math.prod(positions)
    limit = int(min(max(_WORK / n**2, _FEWEST), _MOST))
    few = total <= limit
    chosen = torch.arange(total) if few else torch.randint(total, (limit,), generator=generator)
    places = torch.unravel_index(chosen.to(images.device), positions)
    return patches[places].reshape(len(chosen), layer.groups, n)


def mean_patch(layer: Any, images: Tensor) -> Tensor:
    """The mean of all patches of a layer's input, ``(groups, n)``."""
    dtype = torch.promote_types(images.dtype, torch.float32)
    mean = layer.padded(_batched(layer, images).mean(0, keepdim=True, dtype=dtype))
    sizes = zip(mean.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for axis, (size, k, step, gap) in enumerate(sizes):
        # Each pixel of the kernel meets n pixels of the image, one per position.
        n = (size - gap * (k - 1) - 1) // step + 1
        places = torch.arange(n, device=mean.device) * step
        pixels = torch.arange(k, device=mean.device) * gap
        met = mean.index_select(2 + axis, (pixels.unsqueeze(-1) + places).flatten())
        mean = met.unflatten(2 + axis, (k, n)).mean(3 + axis)
    return mean.reshape(layer.groups, -1)


def patch_moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(groups, n)`` and second moment ``(groups, n, n)`` of ``(patches, groups, n)``."""
    by_group = patches.transpose(0, 1)
    return patches.mean(0), by_group.mT @ by_group / len(patches)


def _batched(layer: Any, images: Tensor) -> Tensor:
    return images.detach().reshape(-1, *images.shape[-layer.n_dims - 1 :])


def _patches_of(
    images: Tensor, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """All patches without a copy: ``(batch, *positions, channels, *kernel)``."""
    for axis, (k, step, gap) in enumerate(zip(kernel_size, stride, dilation, strict=True)):
        images = images.unfold(2 + axis, gap * (k - 1) + 1, step)[..., ::gap]
    return images.movedim(1, 1 + len(kernel_size))


# -- sums of z zᵀ over positions, where z is a patch of x followed by the channels of y ------------


def _one_by_one(
    x: Tensor, y: Tensor, kernel_size: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    d = len(kernel_size)
    patches, y = _patches_of(x, kernel_size, stride, (1,) * d), y.movedim(1, d + 1)
    n_rows = max(1, _CHUNK // math.prod(patches.shape[2:]))
    sums: Tensor | float = 0.0
    for part, answer in zip(patches.split(n_rows, 1), y.split(n_rows, 1), strict=True):
        z = torch.cat([part.flatten(d + 1), answer], -1).flatten(0, d)
        sums = sums + z.T @ z
    return torch.as_tensor(sums)


def _by_correlation(x: Tensor, y: Tensor, kernel_size: tuple[int, ...]) -> Tensor:
    """The same at stride 1, from Fourier transforms of whole images.

    Summed over all positions in which a patch touches the image, padded with zeros, the product of
    two pixels depends on their distance only. The few positions beyond the image are subtracted.
    """
    d = len(kernel_size)
    axes = tuple(range(-d, 0))
    lengths = [-(-(a + k - 1) // 16) * 16 for a, k in zip(x.shape[2:], kernel_size, strict=True)]
    waves = torch.fft.rfftn(x, s=lengths, dim=axes)
    power = torch.einsum("bc...,be...->ce...", waves.conj(), waves)
    pairs = torch.fft.irfftn(power, s=lengths, dim=axes)  # by the distance of two pixels
    for axis, (k, length) in enumerate(zip(kernel_size, lengths, strict=True)):
        distance = torch.arange(1 - k, k, device=x.device) % length
        pairs = pairs.index_select(2 + axis, distance).unfold(2 + axis, k, 1)
    pairs = pairs.flip(tuple(range(2, 2 + d))).movedim(1, 1 + d)  # (C, *kernel, C, *kernel)
    squares = pairs.flatten(0, d).flatten(1)
    for patches in _patches_beyond(x, kernel_size):
        squares = squares - patches.T @ patches

    rows, corner = [], (slice(None), *map(slice, kernel_size))
    for answer in y.unbind(1):
        spectrum = torch.fft.rfftn(answer, s=lengths, dim=axes).unsqueeze(1)
        both = torch.fft.irfftn((spectrum.conj() * waves).sum(0), s=lengths, dim=axes)
        rows.append(both[corner].flatten())
    cross, flat = torch.stack(rows), y.transpose(0, 1).flatten(1)
    return torch.cat([torch.cat([squares, cross.T], 1), torch.cat([cross, flat @ flat.T], 1)])


def _patches_beyond(x: Tensor, kernel_size: tuple[int, ...]) -> Iterator[Tensor]:
    """Patches of the image, padded with zeros, at positions that reach outside the image."""
    d = len(kernel_size)
    padded = F.pad(x, [k - 1 for k in reversed(kernel_size) for _ in range(2)])
    for axis, k in enumerate(kernel_size):
        if k == 1:
            continue
        inside = padded.shape[2 + axis] - 2 * (k - 1)
        for first in (0, inside):
            part = padded.narrow(2 + axis, first, 2 * (k - 1))
            part = _patches_of(part, kernel_size, (1,) * d, (1,) * d)
            yield part.flatten(d + 1).flatten(0, d)
        # The remaining positions are inside along this axis.
        padded = padded.narrow(2 + axis, k - 1, inside)
