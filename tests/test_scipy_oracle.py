"""SciPy as oracle: on the same small problems, its least squares finds nothing better than ``fit``.

The model is written out here in numpy, so that no formula of the library checks itself.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares

from gaborium import Gabor2d, Outcome, fit

SIZE = 7
OFFSETS = np.arange(SIZE) - (SIZE - 1) / 2
Y, X = (axis.ravel() for axis in np.meshgrid(OFFSETS, OFFSETS, indexing="ij"))
# Orientation, frequency, log sigma, log aspect ratio, centre: where `fit` searches.
HALF = SIZE / 2
LOW = np.array([-np.inf, -0.5, math.log(0.2), math.log(0.05), -HALF, -HALF])
HIGH = np.array([np.inf, 0.5, math.log(4 * SIZE), math.log(20), HALF, HALF])


def pair(z: np.ndarray) -> np.ndarray:
    """The even and the odd kernel of a geometry, ``(pixels, 2)``."""
    orientation, frequency, log_sigma, log_ratio = z[:4]
    x, y = X - z[4], Y - z[5]
    along = x * np.cos(orientation) + y * np.sin(orientation)
    across = y * np.cos(orientation) - x * np.sin(orientation)
    squares = along**2 + (np.exp(log_ratio) * across) ** 2
    envelope = np.exp(-squares / (2 * np.exp(2 * log_sigma)))
    angle = 2 * np.pi * frequency * along
    return envelope[:, None] * np.stack([np.cos(angle), -np.sin(angle)], 1)


def best_of_starts(kernel: np.ndarray, starts: list[np.ndarray], n: int) -> tuple[float, Gabor2d]:
    """Least misfit as a share of the power, and its record; the first ``n`` of z are free."""
    kernel = kernel.ravel()

    def coefficients(z: np.ndarray) -> np.ndarray:
        return np.linalg.lstsq(pair(z), kernel, rcond=1e-12)[0]

    def whole(free: np.ndarray) -> np.ndarray:
        return np.concatenate([free, np.zeros(6 - n)])

    def residual(free: np.ndarray) -> np.ndarray:
        z = whole(free)
        return kernel - pair(z) @ coefficients(z)

    bounds, scale = (LOW[:n], HIGH[:n]), np.array([1.0, 0.1, 1.0, 1.0, 1.0, 1.0])[:n]
    settings = {"jac": "3-point", "bounds": bounds, "x_scale": scale, "xtol": 1e-12, "ftol": 1e-12}
    ends = [least_squares(residual, start[:n], **settings) for start in starts]
    end = min(ends, key=lambda end: end.cost)
    z = whole(end.x)
    even, odd = coefficients(z)
    record = Gabor2d.of(
        orientation=z[0] + math.pi * (z[1] < 0),  # a wave of negative frequency runs backwards
        wavelength=1 / abs(z[1]),
        phase=math.atan2(odd, even),
        sigma=math.exp(z[2]),
        aspect_ratio=math.exp(z[3]),
        amplitude=math.hypot(even, odd),
        center=z[4:].tolist(),
        dtype=torch.float64,
    )
    return 2 * end.cost / (kernel @ kernel), record.canonical()


@pytest.mark.parametrize("free", [False, True], ids=["fixed centre", "free centre"])
@pytest.mark.parametrize("noise", [0.0, 0.3], ids=["exact", "noisy"])
def test_scipy_finds_nothing_better(noise, free):
    n_kernels, n = 3, 6 if free else 4
    rng = np.random.default_rng(n)
    reach = SIZE / 8 if free else 0.0
    low = [0.0, 1 / 6, math.log(1.0), math.log(0.5), -reach, -reach]
    high = [math.pi, 1 / 3, math.log(2.0), math.log(1.5), reach, reach]
    planted = rng.uniform(low, high, (n_kernels, 6))
    kernels = np.stack([pair(z) @ rng.normal(size=2) for z in planted])
    size = noise * np.sqrt(np.mean(kernels**2, 1, keepdims=True))
    kernels = (kernels + size * rng.normal(size=kernels.shape)).reshape(-1, SIZE, SIZE)
    result = fit(torch.from_numpy(kernels), center=free)
    assert result.outcome == (Outcome.CONVERGED,) * n_kernels

    for i, kernel in enumerate(kernels):
        middle = np.array([0.0, 0.25, math.log(1.5), math.log(0.8), 0.0, 0.0])
        turns = [middle + np.eye(6)[0] * angle for angle in np.arange(4) * math.pi / 4]
        theirs, record = best_of_starts(kernel, [planted[i], *turns], n)
        ours = 1 - result.explained_variance[i].item()
        assert ours <= theirs + 1e-6, f"kernel {i}: {ours} of the power is left, scipy: {theirs}"
        assert theirs <= ours + 1e-6, f"kernel {i}: the oracle itself is no better than {theirs}"
        # Where the same minimum was found, it is the same Gabor function.
        for name, error in result.params[[i]].difference(record).items():
            allowed = 0.01 * result.standard_error[name][i].max().item() + 1e-5
            assert error.abs().max().item() < allowed, f"kernel {i}: {name}"
