"""The numbers that tell what a filter is: stripes, signs, colours, orientation, noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gaborium.fitting import FitResult
from gaborium.fitting.rivals import main_pattern, rivals, weaker_sign
from gaborium.kernels import gabor, offsets

_SHUFFLES = 200


def measure(kernels: Tensor, result: FitResult, *, n_dims: int) -> dict[str, Tensor]:
    sizes = tuple(kernels.shape[-n_dims:])
    w = torch.nan_to_num(kernels.detach().double(), nan=0.0, posinf=0.0, neginf=0.0).flatten(2)
    norm = w.flatten(1).norm(dim=1)
    w = w / norm.clamp_min(1e-300)[:, None, None]
    fitted = torch.nan_to_num(gabor(result.params, sizes).flatten(2))
    fitted = fitted / norm.clamp_min(1e-300)[:, None, None]
    others = rivals(kernels, result, n_dims=n_dims)
    channels, pixels = w.shape[1:]
    left = w - fitted
    n_data = channels * pixels
    n_par = 2 * channels + {1: 3, 2: 6, 3: 8}[n_dims]
    luminance = w.mean(1)
    lum_share = channels * luminance.square().sum(1)
    pattern = main_pattern(w)
    bars = bar_strengths(result, sizes, fitted)
    top = bars.sort(dim=1, descending=True).values
    top = torch.nn.functional.pad(top, (0, 3))[:, :3] / top[:, :1].clamp_min(1e-300)
    noise = left.square().sum((1, 2)) / max(1, n_data - n_par)
    structure, _ = against_shuffled(w, sizes)
    rest, _ = against_shuffled(left, sizes)
    sigma = result.params.sigma.flatten()
    wavelength = result.params.wavelength.flatten()
    gamma = result.params.as_dict().get("aspect_ratio", torch.ones_like(sigma)).flatten()
    return {
        "explained": result.explained_variance,
        "explained_fair": 1 - noise * n_data,
        "blob": others.blob,
        "surround": others.surround,
        "two_waves": others.two_waves,
        "crossing": others.crossing,
        "ring": others.ring,
        "n_x": sigma / wavelength,
        "n_y": sigma / gamma / wavelength,
        "bar2": top[:, 1],
        "bar3": top[:, 2],
        "bar3_sn": top[:, 2] * bars.amax(1) / noise.sqrt().clamp_min(1e-12),
        "weak_sign": weaker_sign(pattern),
        "lum_weak_sign": weaker_sign(luminance),
        "one_colour": torch.linalg.svdvals(w)[:, 0].square(),
        "osi": selectivity(pattern, sizes),
        "osi_lum": selectivity(luminance, sizes),
        "osi_all": selectivity(w, sizes),
        "opponency": 1 - lum_share,
        "constant": w.mean(2).square().sum(1) * pixels,
        "structure": structure,
        "noise": noise_share(w, sizes),
        "patch": one_patch(w, pattern),
        "oriented_lum": lum_share * selectivity(luminance, sizes),
        "left_structure": rest,
        "strength": norm / norm.median().clamp_min(1e-300),
    }


def bar_strengths(result: FitResult, sizes: tuple[int, ...], fitted: Tensor) -> Tensor:
    """Norm over the pixels of each half cycle of the fitted wave, in the channels' main pattern."""
    params = result.params
    k = (params.direction * params.frequency.unsqueeze(-1)).reshape(len(result), -1)
    u = offsets(sizes, torch.float64, k.device)
    center = params.center.reshape(len(result), -1)
    turn = torch.einsum("bd,bdn->bn", k, u.unsqueeze(0) - center.unsqueeze(-1))  # cycles
    pattern = main_pattern(fitted)
    # Phase of the pattern: from the channels' weights in it.
    weight = (fitted @ pattern.unsqueeze(-1)).squeeze(-1)
    amplitude, phase = params.amplitude, params.phase
    even = (weight * amplitude * phase.cos()).sum(1)
    odd = (weight * amplitude * phase.sin()).sum(1)
    psi = torch.atan2(odd, even)
    half = torch.nan_to_num(2 * turn + psi.unsqueeze(1) / math.pi + 0.5).floor().long()
    half = half - half.amin(1, keepdim=True)
    sums = pattern.new_zeros(len(half), int(half.max()) + 1)
    return sums.scatter_add(1, half, pattern.square()).sqrt() * fitted.flatten(1).norm(dim=1, keepdim=True)


def spectrum(patterns: Tensor, sizes: tuple[int, ...]) -> Tensor:
    axes = tuple(range(-len(sizes), 0))
    padded = [2 * s for s in sizes]
    f = torch.fft.fftn(patterns.unflatten(-1, sizes), s=padded, dim=axes).abs().square()
    return f.flatten(-len(sizes))


def selectivity(patterns: Tensor, sizes: tuple[int, ...]) -> Tensor:
    if patterns.ndim == 3:
        power = spectrum(patterns, sizes).sum(1)
    else:
        power = spectrum(patterns, sizes)
    f = torch.meshgrid(*[torch.fft.fftfreq(2 * s).double() for s in sizes], indexing="ij")
    f = torch.stack([x.flatten() for x in f])  # (d, F)
    d = len(sizes)
    r2 = f.square().sum(0)
    unit = f / r2.sqrt().clamp_min(1e-12)
    keep = (r2 > 0) & (f.abs() < 0.5 - 1e-9).all(0)
    power = power * keep
    M = torch.einsum("bf,if,jf->bij", power, unit, unit)
    top = torch.linalg.eigvalsh(M)[:, -1]
    total = power.sum(-1).clamp_min(1e-300)
    return ((d * top / total - 1) / (d - 1)) if d > 1 else torch.ones_like(total)


def against_shuffled(w: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Concentration of the spectrum, in standard deviations above that of shuffled pixels."""
    key = w.square().sum(1)
    order = key.sort(dim=1, stable=True).indices
    flat = w.gather(2, order.unsqueeze(1).expand_as(w))
    n = w.shape[-1]
    g = torch.Generator().manual_seed(0)
    perms = torch.stack([torch.randperm(n, generator=g) for _ in range(_SHUFFLES)])

    def stat(x: Tensor) -> Tensor:
        p = spectrum(x, sizes).sum(-2)
        return (p.square().sum(-1) / p.sum(-1).square().clamp_min(1e-300)).log()

    own = stat(w)
    null = torch.stack([stat(flat[:, :, p]) for p in perms])
    return (own - null.mean(0)) / null.std(0).clamp_min(1e-12), null.mean(0)


def one_patch(w: Tensor, pattern: Tensor) -> Tensor:
    """Share of the power that is in one colour and of one sign."""
    first = (w @ pattern.unsqueeze(-1)).square().sum((1, 2))
    signs = torch.stack([pattern.clamp_min(0.0), pattern.clamp_max(0.0)], 1)
    return first * signs.square().sum(-1).amax(1)


def noise_share(w: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The floor of the spectrum, as a share of what white noise of the same power would have."""
    axes = tuple(range(-len(sizes), 0))

    def floor(x: Tensor) -> Tensor:
        p = torch.fft.fftn(x.unflatten(-1, sizes), dim=axes).abs().square().sum(1).flatten(1)
        return p.quantile(0.5, dim=1) / p.mean(1).clamp_min(1e-300)

    g = torch.Generator().manual_seed(0)
    white = torch.randn(400, *w.shape[1:], generator=g, dtype=w.dtype)
    return floor(w) / floor(white).mean()
