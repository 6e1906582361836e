"""The scipy side of `benchmarks/fit.py`: the same fits, as one writes them without this library.

    python benchmarks/fit_scipy.py     # the reference for real kernels: ten minutes on one core

Nothing here uses gaborium's mathematics. `fit_by_grid` is what a script does with `curve_fit`: one
start after the other, for one kernel at a time. `best_of_starts` is the reference for kernels that
are no Gabor functions: `least_squares` from many starts on the family that `gaborium.fit` searches
(one geometry for all channels, within the same limits). The run writes a file per network to
benchmarks/results/fit_scipy and goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _report import RESULTS, ROOT, write_json
from scipy.optimize import OptimizeWarning, curve_fit, least_squares

DATA = ROOT.parent / "shared" / "data"
FIELDS = ("orientation", "frequency", "log_sigma", "log_aspect_ratio", "center_x", "center_y")
N_STARTS, N_DRAWN = 20, 100  # each start is the best of so many random geometries
Array = np.ndarray


def pixels(size: int) -> tuple[Array, Array]:
    """x and y of every pixel from the kernel's middle, flattened."""
    offsets = np.arange(size) - (size - 1) / 2
    y, x = np.meshgrid(offsets, offsets, indexing="ij")
    return x.ravel(), y.ravel()


# -- a script's way: curve_fit from a grid of starts ----------------------------------------------


def gabor(xy: tuple[Array, Array], *parameters: float) -> Array:
    """The formula: orientation, wavelength, phase, sigma, aspect ratio, amplitude."""
    theta, wavelength, psi, sigma, gamma, amplitude = parameters
    x, y = xy
    along = x * np.cos(theta) + y * np.sin(theta)
    across = y * np.cos(theta) - x * np.sin(theta)
    envelope = np.exp(-(along**2 + (gamma * across) ** 2) / (2 * sigma**2))
    return amplitude * envelope * np.cos(2 * np.pi * along / wavelength + psi)


def gabor_slopes(xy: tuple[Array, Array], *parameters: float) -> Array:
    """Derivatives of ``gabor`` by its parameters, ``(pixels, 6)``."""
    theta, wavelength, psi, sigma, gamma, amplitude = parameters
    x, y = xy
    along = x * np.cos(theta) + y * np.sin(theta)
    across = y * np.cos(theta) - x * np.sin(theta)
    envelope = np.exp(-(along**2 + (gamma * across) ** 2) / (2 * sigma**2))
    rate = 2 * np.pi / wavelength
    wave = envelope * np.cos(rate * along + psi)
    even, odd = amplitude * wave, -amplitude * envelope * np.sin(rate * along + psi)
    return np.stack(
        [
            even * (gamma**2 - 1) * along * across / sigma**2 + odd * rate * across,
            -odd * rate * along / wavelength,
            odd,
            even * (along**2 + (gamma * across) ** 2) / sigma**3,
            -even * gamma * across**2 / sigma**2,
            wave,
        ],
        1,
    )


def grid_of_starts(size: int) -> Iterator[tuple[float, ...]]:
    """18 orientations; more wavelengths or phases cost more and find no more planted kernels."""
    for i in range(18):
        yield i * math.pi / 18, math.sqrt(2.5 * size), 0.0, size / 5, 0.8


def fit_by_grid(
    kernel: Array, *, derivatives: bool = False, enough: float = 0.0
) -> tuple[Array, float]:
    """Best parameters over all starts, and their misfit as a share of the kernel's power.

    ``enough`` is a misfit at which the starts that are left are not tried; with 0 all are.
    """
    xy, values = pixels(len(kernel)), kernel.ravel()
    power = values @ values
    slopes = gabor_slopes if derivatives else None
    best, least = np.full(6, math.nan), math.inf
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", OptimizeWarning)
        for start in grid_of_starts(len(kernel)):
            guess = (*start, np.abs(values).max())
            try:
                found, _ = curve_fit(gabor, xy, values, guess, jac=slopes)
            except RuntimeError:  # it ran out of calls
                continue
            rest = values - gabor(xy, *found)
            if (misfit := rest @ rest / power) < least:
                best, least = found, misfit
            if least <= enough:
                break
    return best, least


# -- the reference: least_squares with variable projection ----------------------------------------


class Family(NamedTuple):
    """Gabor functions of one geometry, with an amplitude and a phase for each channel.

    A geometry is a row of FIELDS; its limits are those that ``gaborium.fit`` states.
    """

    size: int

    def limits(self) -> tuple[Array, Array]:
        half = self.size / 2
        low = [-math.inf, -0.5, math.log(0.2), math.log(0.05), -half, -half]
        high = [math.inf, 0.5, math.log(4 * self.size), math.log(20.0), half, half]
        return np.array(low), np.array(high)

    def draw(self, n: int, rng: np.random.Generator) -> Array:
        """Random geometries, of sizes and places as filters have them."""
        reach = self.size / 3
        low = [0.0, 0.0, math.log(0.4), math.log(0.2), -reach, -reach]
        high = [math.pi, 0.5, math.log(self.size), math.log(3.0), reach, reach]
        return rng.uniform(low, high, (n, 6))

    def basis(self, z: Array) -> tuple[Array, Array, Array]:
        """Envelope times cosine and minus sine ``(..., 2, pixels)``; x' and y'."""
        theta, frequency, log_sigma, log_gamma, x0, y0 = np.moveaxis(z, -1, 0)[..., None]
        x, y = pixels(self.size)
        cos, sin = np.cos(theta), np.sin(theta)
        along = (x - x0) * cos + (y - y0) * sin
        across = (y - y0) * cos - (x - x0) * sin
        envelope = np.exp(
            -0.5 * (along**2 + np.exp(2 * log_gamma) * across**2) * np.exp(-2 * log_sigma)
        )
        angle = 2 * np.pi * frequency * along
        return np.stack([envelope * np.cos(angle), -envelope * np.sin(angle)], -2), along, across

    def slopes(self, z: Array, along: Array, across: Array) -> tuple[Array, Array]:
        """How the envelope's logarithm and the wave's angle turn with z: ``(6, pixels)`` each."""
        theta, frequency, log_sigma, log_gamma = z[:4]
        cos, sin = np.cos(theta), np.sin(theta)
        precision, squeeze, rate = np.exp(-2 * log_sigma), np.exp(2 * log_gamma), 2 * np.pi
        wide, none = squeeze * across**2 * precision, np.zeros_like(along)
        pull = along * precision, squeeze * across * precision
        of_envelope = [
            (squeeze - 1) * along * across * precision,
            none,
            along**2 * precision + wide,
            -wide,
            pull[0] * cos - pull[1] * sin,
            pull[0] * sin + pull[1] * cos,
        ]
        of_angle = [
            rate * frequency * across,
            rate * along,
            none,
            none,
            none - rate * frequency * cos,
            none - rate * frequency * sin,
        ]
        return np.stack(of_envelope), np.stack(of_angle)


def orthonormal(basis: Array) -> tuple[Array, Array]:
    """Orthonormal rows that span the two of ``basis``, and the matrix that makes them of it.

    A row that is almost a multiple of the other becomes zero, as the sine at zero frequency.
    """
    first, second = basis[..., 0, :], basis[..., 1, :]
    length = np.linalg.norm(first, axis=-1, keepdims=True) + 1e-150
    q = first / length
    part = (second * q).sum(-1, keepdims=True)
    rest = second - part * q
    norm = np.linalg.norm(rest, axis=-1, keepdims=True)
    sound = norm > 1e-7 * np.linalg.norm(second, axis=-1, keepdims=True) + 1e-30
    inverse = np.where(sound, 1 / np.where(sound, norm, 1.0), 0.0)
    made = np.concatenate([1 / length, 0 * part, -part / length * inverse, inverse], -1)
    return np.stack([q, rest * inverse], -2), made.reshape(*part.shape[:-1], 2, 2)


def best_of_starts(kernel: Array, rng: np.random.Generator) -> tuple[Array, float]:
    """The geometry of least misfit to ``(channels, size, size)``, and its explained variance."""
    channels, size = kernel.shape[:2]
    family = Family(size)
    y = kernel.reshape(channels, -1) / np.linalg.norm(kernel)
    low, high = family.limits()

    def residual(z: Array) -> Array:
        q, _ = orthonormal(family.basis(z)[0])
        return (y - (y @ q.T) @ q).ravel()

    def jacobian(z: Array) -> Array:
        basis, along, across = family.basis(z)
        q, made = orthonormal(basis)
        coefficients = (y @ q.T) @ made
        wave, turned = coefficients @ basis, coefficients @ np.stack([basis[1], -basis[0]])
        of_envelope, of_angle = family.slopes(z, along, across)
        moved = wave * of_envelope[:, None] + turned * of_angle[:, None]
        # Kaufman: what the coefficients can make up for does not count.
        return ((moved @ q.T) @ q - moved).reshape(6, -1).T

    drawn = family.draw(N_STARTS * N_DRAWN, rng)
    q, _ = orthonormal(family.basis(drawn)[0])
    explained = np.square(q @ y.T).sum((-2, -1)).reshape(N_STARTS, N_DRAWN)
    starts = drawn[np.arange(N_STARTS) * N_DRAWN + explained.argmax(1)]

    def search(start: Array, method: str, tolerance: float, calls: int) -> tuple[float, Array]:
        inside = np.clip(start, low + 1e-9, high - 1e-9)
        with np.errstate(all="ignore"):
            end = least_squares(
                residual, inside, jacobian, (low, high), method, x_scale="jac",
                ftol=tolerance, xtol=tolerance, gtol=1e-14, max_nfev=calls,
            )  # fmt: skip
        return 2 * end.cost, end.x

    ends = sorted((search(start, "trf", 1e-8, 200) for start in starts), key=lambda end: end[0])
    # "dogbox" reaches limits that "trf" only comes near to.
    polished = [search(z, method, 1e-13, 1000) for _, z in ends[:3] for method in ("trf", "dogbox")]
    cost, z = min([*ends, *polished], key=lambda end: end[0])
    return z, 1 - cost


# -- real kernels ---------------------------------------------------------------------------------


def real_kernels(data: Path) -> dict[str, Array]:
    """First layers of trained networks and measured receptive fields: (filters, channels, k, k)."""
    files = sorted((data / "kernels").glob("*.npz"))
    kernels = {
        path.stem: np.load(path)["weights"].astype(np.float64)
        for path in files
        if not path.stem.startswith("NEGATIVE")
    }
    fields = np.load(data / "v1" / "macaque_v1_rf.npz")
    for name in ("rf24", "rf32"):
        kernels[f"macaque_v1_{name}"] = fields[name][:, None].astype(np.float64)
    return kernels


def reference(name: str, folder: Path = RESULTS / "fit_scipy") -> dict[str, Any] | None:
    """What an earlier run has found for one network, if there was one."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of kernels/ and v1/")
    parser.add_argument("--output", type=Path, default=RESULTS / "fit_scipy")
    options = parser.parse_args()
    for name, kernels in real_kernels(options.data).items():
        if reference(name, options.output) is not None:
            continue
        begin = time.process_time()
        rng = np.random.default_rng(0)
        rows = [best_of_starts(kernel, rng) for kernel in kernels]
        geometry = np.array([z for z, _ in rows]).round(10)
        results = {
            "shape": list(kernels.shape),
            "n_starts": N_STARTS,
            "cpu_seconds": round(time.process_time() - begin, 1),
            "explained_variance": [round(share, 10) for _, share in rows],
            "geometry": dict(zip(FIELDS, geometry.T.tolist(), strict=True)),
        }
        write_json(options.output / f"{name}.json", results)


if __name__ == "__main__":
    main()
