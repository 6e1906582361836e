"""What images and responses say about a kernel, gathered in one pass: patch covariances.

For a squared error the images matter only through the covariance C of their patches, and the
responses only through their covariance c with the patches and their variance. These have the size
of the kernel, whatever the size of the images, and are summed up piece by piece.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium.errors import one_of

_CHUNK = 2**22  # numbers in a piece of the patch matrix: 32 MB in float64


class PatchStatistics:
    """Running sums over patches ``p`` and responses ``r`` of one or many images.

    Args:
        kernel_size: pixels along each axis.
        n_channels: channels of the images.
        n_outputs: channels of the responses.
        stride: as of the convolution that made the responses.
        padding: zeros around the images, as of that convolution: numbers, "valid" or "same".

    Example:
        >>> statistics = PatchStatistics((3, 3), n_channels=1, n_outputs=2)
        >>> image = torch.rand(1, 1, 16, 16)
        >>> statistics.add(image, torch.nn.Conv2d(1, 2, 3)(image).detach())
        >>> statistics.count, statistics.covariance().shape
        (196, torch.Size([9, 9]))
    """

    def __init__(
        self,
        kernel_size: tuple[int, ...],
        *,
        n_channels: int,
        n_outputs: int,
        stride: tuple[int, ...] | None = None,
        padding: tuple[int, ...] | str = "valid",
    ) -> None:
        d = len(kernel_size)
        self.kernel_size, self.n_channels, self.n_outputs = kernel_size, n_channels, n_outputs
        self.stride = stride or (1,) * d
        if isinstance(padding, str):
            one_of("padding", padding, ("valid", "same"))
        self.padding = padding
        n = n_channels * math.prod(kernel_size) + n_outputs
        # The first patches' mean is subtracted from everything, so that sums of squares do not
        # drown the variances that are wanted; where it lies does not matter otherwise.
        self.origin: Tensor | None = None
        self.count = 0
        self.total = torch.zeros(n, dtype=torch.float64)
        self.squares = torch.zeros(n, n, dtype=torch.float64)

    def add(self, images: Tensor, responses: Tensor) -> None:
        """Take in ``images`` ``(batch, channels, *size)`` and ``responses`` ``(batch, out, *)``."""
        for image, response in zip(images, responses, strict=True):
            self._add(image.detach().double(), response.detach().double())

    def _add(self, image: Tensor, response: Tensor) -> None:
        d = len(self.kernel_size)
        patches = F.pad(image, self._border())
        if any(a < size for a, size in zip(patches.shape[1:], self.kernel_size, strict=True)):
            raise ValueError(
                f"Images must not be smaller than the kernel, got {tuple(patches.shape[1:])} px "
                f"with their padding for kernel_size {self.kernel_size}."
            )
        if (len(image), len(response)) != (self.n_channels, self.n_outputs):
            raise ValueError(
                f"Channels must stay the same, {self.n_channels} of images and {self.n_outputs} "
                f"of responses, got {len(image)} and {len(response)}."
            )
        for axis, (size, step) in enumerate(zip(self.kernel_size, self.stride, strict=True)):
            patches = patches.unfold(1 + axis, size, step)  # (C, *positions, *kernel)
        if patches.shape[1 : 1 + d] != response.shape[1:]:
            raise ValueError(
                f"responses must have size {tuple(patches.shape[1 : 1 + d])} for this image, "
                f"kernel_size, stride and padding, got {tuple(response.shape[1:])}."
            )
        patches = patches.movedim(0, d)  # (*positions, C, *kernel)
        rows = max(1, _CHUNK // (math.prod(patches.shape[1:d]) * math.prod(patches.shape[d:])))
        for first in range(0, patches.shape[0], rows):
            piece = patches[first : first + rows].flatten(d).flatten(0, d - 1)
            answer = response[:, first : first + rows].flatten(1).T
            both = torch.cat([piece, answer], 1)
            if self.origin is None:
                self.origin = both.mean(0)
            both = both - self.origin
            self.count += len(both)
            self.total += both.sum(0).cpu()
            self.squares += (both.T @ both).cpu()

    def covariance(self) -> Tensor:
        """Covariance C of the patches, ``(channels · pixels,) * 2``."""
        n = self.total.numel() - self.n_outputs
        return self._centred()[:n, :n]

    def cross_covariance(self) -> Tensor:
        """Covariance c of every response with the patches, ``(out, channels · pixels)``."""
        n = self.total.numel() - self.n_outputs
        return self._centred()[n:, :n]

    def response_variance(self) -> Tensor:
        """Variance of every response, ``(out,)``."""
        return self._centred().diagonal()[-self.n_outputs :]

    def _centred(self) -> Tensor:
        mean = self.total / self.count
        return self.squares / self.count - mean.outer(mean)

    def _border(self) -> list[int]:
        if isinstance(self.padding, str):
            total = [size - 1 if self.padding == "same" else 0 for size in self.kernel_size]
            return [n for t in reversed(total) for n in (t // 2, t - t // 2)]
        return [n for pad in reversed(self.padding) for n in (pad, pad)]


def root_of(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """``R`` with ``RᵀR = C``, and ``R⁻ᵀ``; directions that no patch has are left out.

    Both have shape ``(m, n)``; an image of one orientation only, say, has m < n.
    """
    values, vectors = torch.linalg.eigh(covariance)
    seen = values > 1e-13 * values[-1]
    values, vectors = values[seen], vectors[:, seen]
    return values.sqrt().unsqueeze(-1) * vectors.T, values.rsqrt().unsqueeze(-1) * vectors.T
