"""The numbers that describe a filter: its bars, signs, colours, orientation and noise.

All of them are shares or ratios: neither the kernel's scale nor its sign, neither the order of its
channels nor a flip or transposition changes them. They need only the kernel and the fit of a Gabor
function to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gaborium.fitting import FitResult
from gaborium.fitting.alternatives import CenterSurround, Gaussian, crossing
from gaborium.fitting.model import GaborModel
from gaborium.fitting.search import Search
from gaborium.fitting.solver import Target
from gaborium.fitting.start import StartGrid
from gaborium.functions.kernels import gabor, offsets
from gaborium.functions.params import Gabor

# A sentence part for each number, as reports show them; the order is that of tables.
NUMBERS = {
    "gabor": "share of the power that a Gabor function explains",
    "explained": "the same, less the share of noise that as many parameters would explain",
    "bars": "visible bars of alternating sign",
    "third_bar": "strength of the third bar relative to the strongest",
    "n_x": "cycles in a standard deviation of the envelope along the wave",
    "n_y": "the same across the wave, along the stripes",
    "selectivity": "for orientation: 1 is one orientation, 0 is no preference",
    "opponency": "share of the power that the mean of the channels does not hold",
    "oriented_luminance": "share of the power in the channels' mean, times its selectivity",
    "one_colour": "share of the power in one pattern that all channels have in common",
    "constant": "share of the power in the channels' means over the pixels",
    "even": "symmetry about the best point: correlation with the reversed pattern",
    "blob": "share of the power that one Gaussian explains",
    "surround": "share that a centre with its surround explains",
    "two_waves": "share that two Gabor functions explain",
    "crossing": "power of the weaker of these two relative to the stronger, if they cross",
    "noise": "floor of the spectrum, as a share of the floor with the pixels in random order",
    "snr": "signal-to-noise ratio of power that follows from it",
    "strength": "norm relative to the layer's median",
}
_N_SHUFFLES = 40
_MIN_BAR = 0.2  # strength of a visible bar relative to the strongest
_MIN_BAR_SNR = 2.0  # norm of a visible bar, in standard deviations of a pixel's noise
_MAX_SNR = 1e4  # beyond, rounding is measured
_TOLERANCE = 1e-4  # of other models: explained variances need no more
_STEPS = 60
_N_WAVES = 6  # of which any two may be a plaid
_N_PAIRS = 6  # of waves that are followed together


def checked(kernels: Any, n_dims: int) -> Tensor:
    """Kernels ``(filters, channels, *size)`` on the CPU, or an error that says what is wrong."""
    if not isinstance(kernels, Tensor) or not kernels.is_floating_point():
        given = getattr(kernels, "dtype", type(kernels).__name__)
        raise TypeError(f"kernels must be a network or a real, floating tensor, got {given}.")
    shape = tuple(kernels.shape)
    if kernels.ndim not in (n_dims + 1, n_dims + 2) or kernels.numel() == 0:
        raise ValueError(
            f"kernels must be (filters, channels, *kernel_size) or (filters, *kernel_size) with "
            f"{n_dims} axes of size and not empty, got shape {shape}."
        )
    if math.prod(shape[-n_dims:]) == 1:
        raise ValueError(f"kernels of shape {shape} have one pixel, in which there is no wave.")
    w: Tensor = kernels.detach().cpu().reshape(len(kernels), -1, *shape[-n_dims:])
    bad = int((~w.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise ValueError(f"kernels must be finite, got NaN or infinity in {bad} of {len(w)}.")
    return w


def table(params: Gabor, columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A row per filter: ``columns``, and the fields that its channels share."""
    shared = {
        name: value.reshape(len(value), -1)[:, 0].tolist()
        for name, value in params.as_dict().items()
        if name not in ("phase", "amplitude", "center")
    }
    columns = {**columns, **shared}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@torch.no_grad()
def measure(kernels: Tensor, result: FitResult, *, n_dims: int) -> dict[str, Tensor]:
    """The numbers of finite kernels ``(filters, channels, *size)``, each ``(filters,)``, float64.

    ``result`` is a fit of one geometry per filter with its centre. ``strength`` is left at 0, since
    it needs the whole layer. For filters that are zero all but ``noise`` are 0.
    """
    alive = kernels.flatten(1).any(1).nonzero().flatten()
    zero = torch.zeros(len(kernels), dtype=torch.float64, device=kernels.device)
    numbers = dict.fromkeys(NUMBERS, zero) | {"noise": zero + 1}
    if len(alive):
        found = _measured(kernels[alive].detach().double(), result[alive.tolist()], n_dims)
        numbers |= {name: numbers[name].index_copy(0, alive, v) for name, v in found.items()}
    return numbers


def _measured(kernels: Tensor, result: FitResult, n_dims: int) -> dict[str, Tensor]:
    sizes = tuple(kernels.shape[-n_dims:])
    w = kernels.flatten(2) / kernels.flatten(2).abs().amax((1, 2), keepdim=True)
    w = w / w.flatten(1).norm(dim=1)[:, None, None]
    channels, pixels = w.shape[1:]

    fitted = gabor(result.params, sizes).double().flatten(2)
    fitted = fitted / kernels.flatten(1).norm(dim=1)[:, None, None]
    n_data = channels * pixels
    n_parameters = 2 * channels + {1: 3, 2: 6, 3: 8}[n_dims]
    noise = (w - fitted).square().sum((1, 2)) / max(1, n_data - n_parameters)
    strengths = _bars(result, sizes, fitted)
    ordered = torch.nn.functional.pad(strengths.sort(dim=1, descending=True).values, (0, 3))
    first = ordered[:, :1].clamp_min(1e-300)
    visible = (strengths >= _MIN_BAR * first) & (
        strengths > _MIN_BAR_SNR * noise.sqrt().unsqueeze(1)
    )

    pattern, luminance = _main_pattern(w), w.mean(1)
    in_luminance = channels * luminance.square().sum(1)
    floor, params = _noise_floor(w, sizes), result.params
    cycles = params.sigma.flatten() / params.wavelength.flatten()
    across = params.as_dict().get("aspect_ratio", torch.ones_like(params.sigma)).flatten()
    return {
        "gabor": result.explained_variance.double(),
        "explained": 1 - noise * n_data,
        "bars": visible.sum(1).double(),
        "third_bar": ordered[:, 2] / first[:, 0],
        "n_x": cycles,
        "n_y": cycles / across,
        "selectivity": _selectivity(pattern, sizes),
        "opponency": (1 - in_luminance).clamp(0.0, 1.0),
        "oriented_luminance": in_luminance * _selectivity(luminance, sizes),
        "one_colour": torch.linalg.svdvals(w)[:, 0].square(),
        "constant": w.mean(2).square().sum(1) * pixels,
        "even": _symmetry(pattern, sizes),
        **_other_models(kernels, result, sizes),
        "noise": floor,
        "snr": (1 / floor.clamp_min(1 / _MAX_SNR) - 1).clamp_min(0.0),
    }


def _other_models(kernels: Tensor, result: FitResult, sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """How much of kernels other models explain, with one geometry for all channels.

    In one dimension a Gabor function can have a surround, and no two waves cross.
    """
    y = kernels.flatten(2) / kernels.flatten(2).abs().amax((-2, -1), keepdim=True)
    y = y / y.square().sum((-2, -1), keepdim=True).sqrt()  # misfits are shares then
    target, channels, n_dims = Target(y), y.shape[1], len(sizes)
    model = GaborModel(sizes, channels, free_center=True)
    grid = StartGrid(model, y.new_empty(0))
    search = Search(grid, n_starts=_N_WAVES, max_iterations=_STEPS, tolerance=_TOLERANCE)

    power = y.square().sum(1)
    patterns = torch.stack([power, _smoothed(power, sizes)], 1)
    peaks = offsets(sizes, y.dtype, y.device).T[patterns.argmax(-1)]
    centers = torch.cat([peaks, torch.zeros_like(peaks[:, :1])], 1)
    gaussian = Gaussian(sizes, channels, free_center=True, zero_frequency=True)
    ends = search.best_of_model(gaussian, target, gaussian.starts(target, centers))
    blob = surround = 1 - ends.cost
    two_waves = result.explained_variance.to(y)
    crossed = torch.zeros_like(blob)
    if n_dims > 1:
        rings = CenterSurround(sizes, channels)
        ends = search.best_of_model(rings, target, rings.starts(target, patterns.sqrt()))
        surround = 1 - ends.cost
        pair, ends = search.best_pair(target, model.rows(result.params), _N_PAIRS)
        crossed = crossing(pair, ends.z, ends.coefficients)
        two_waves = torch.maximum(1 - ends.cost, two_waves)
    return {"blob": blob, "surround": surround, "two_waves": two_waves, "crossing": crossed}


def _smoothed(values: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Means over three pixels along each axis."""
    shaped = values.unflatten(-1, sizes)
    for axis in range(-len(sizes), 0):
        if shaped.shape[axis] >= 3:
            moved = torch.nn.functional.pad(shaped.movedim(axis, -1), (1, 1))
            shaped = (moved[..., :-2] + moved[..., 1:-1] + moved[..., 2:]).movedim(-1, axis) / 3
    return shaped.flatten(1)


def _main_pattern(kernels: Tensor) -> Tensor:
    """The pattern that explains most of all channels, up to sign: ``(batch, pixels)``."""
    return torch.linalg.svd(kernels, full_matrices=False).Vh[:, 0]


def _bars(result: FitResult, sizes: tuple[int, ...], fitted: Tensor) -> Tensor:
    """Norms of the fitted function's pixels in each half cycle, its bars: ``(filters, bars)``.

    Several channels are reduced to their common pattern, which is a Gabor function too. Only
    pixels within the kernel count.
    """
    params, n = result.params, len(result)
    k = (params.direction * params.frequency.unsqueeze(-1)).double().reshape(n, -1)
    u = offsets(sizes, torch.float64, k.device)
    away = u.unsqueeze(0) - params.center.double().reshape(n, -1, 1)
    cycles = (k.unsqueeze(-1) * away).sum(1)
    pattern = _main_pattern(fitted)
    of_channel = (fitted @ pattern.unsqueeze(-1)).squeeze(-1)
    even = (of_channel * params.amplitude * params.phase.cos()).sum(1)
    odd = (of_channel * params.amplitude * params.phase.sin()).sum(1)
    phase = torch.atan2(odd, even).unsqueeze(1) / (2 * math.pi)
    number = torch.nan_to_num(2 * (cycles + phase) + 0.5).floor().long()
    number = number - number.amin(1, keepdim=True)
    power = pattern.square() * fitted.square().sum((1, 2)).unsqueeze(1)
    bars = power.new_zeros(n, int(number.max()) + 1)
    return bars.scatter_add(1, number, power).sqrt()


def _spectrum(patterns: Tensor, sizes: tuple[int, ...], padded: int) -> Tensor:
    """Power at every frequency, ``(..., frequencies)``."""
    axes = tuple(range(-len(sizes), 0))
    size = [padded * n for n in sizes]
    spectrum = torch.fft.fftn(patterns.unflatten(-1, sizes), s=size, dim=axes)
    return spectrum.abs().square().flatten(-len(sizes))


def _selectivity(patterns: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """How much of the power is along one axis of frequencies, 0 to 1; in 1-D always 1.

    In the plane it is 1 minus the circular variance of doubled angles, with the power as weight.
    """
    d = len(sizes)
    if d == 1:
        return torch.ones_like(patterns[:, 0])
    axes = [torch.fft.fftfreq(2 * n, dtype=torch.float64, device=patterns.device) for n in sizes]
    f = torch.stack([grid.flatten() for grid in torch.meshgrid(*axes, indexing="ij")])
    size = f.norm(dim=0)
    # The highest frequency has both signs at once, and so no direction.
    counts = (size > 0) & (f.abs() < 0.5 - 1e-9).all(0)
    power = _spectrum(patterns, sizes, 2) * counts
    unit = f / torch.where(size > 0, size, 1.0)
    spread = torch.einsum("bf,if,jf->bij", power, unit, unit)
    total = power.sum(-1)
    share = torch.linalg.eigvalsh(spread)[:, -1] / torch.where(total > 0, total, 1.0)
    return ((d * share - 1) / (d - 1)).clamp(0.0, 1.0)


def _symmetry(patterns: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Largest correlation of each pattern with its reverse, over all shifts: ``(batch,)``."""
    axes = tuple(range(-len(sizes), 0))
    spectrum = torch.fft.fftn(patterns.unflatten(-1, sizes), s=[2 * n for n in sizes], dim=axes)
    both = torch.fft.ifftn(spectrum.square(), dim=axes).real.flatten(1)
    return both.amax(1) / patterns.square().sum(-1).clamp_min(1e-300)


def _noise_floor(w: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Median of the spectrum, relative to its median with shuffled pixels and random signs.

    The signs are random too, because a constant keeps its one frequency however it is shuffled.
    """
    # In an order that no flip or transposition changes, so that the same shuffles come out.
    order = w.square().sum(1).sort(dim=1, stable=True).indices
    pixels = w.gather(2, order.unsqueeze(1).expand_as(w))
    draw = torch.Generator().manual_seed(0)

    def floor(kernels: Tensor, size: tuple[int, ...]) -> Tensor:
        return _spectrum(kernels, size, 1).sum(1).quantile(0.5, dim=1)

    total = torch.zeros_like(w[:, 0, 0])
    for _ in range(_N_SHUFFLES):
        place = torch.randperm(w.shape[-1], generator=draw).to(w.device)
        sign = 2.0 * torch.randint(2, (w.shape[-1],), generator=draw).to(w) - 1
        total += floor((pixels * sign)[:, :, place], tuple(sorted(sizes)))
    return floor(w, sizes) * _N_SHUFFLES / torch.where(total > 0, total, 1.0)
