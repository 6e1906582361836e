"""``fit`` and ``recover``: the two ways to put the question."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import zip_longest

import torch
from torch import Tensor

from gaborium.errors import as_sizes, one_of
from gaborium.fitting.result import FitResult, Outcome
from gaborium.fitting.solver import Family, Solution, Target, geometry, solve
from gaborium.fitting.start import starts
from gaborium.fitting.statistics import PatchStatistics, root_of
from gaborium.kernels import gabor_jacobian
from gaborium.params import RECORDS, Gabor

_BATCH = 256  # problems solved at once
_LITTLE = 0.5  # share of the explainable power below which a kernel is called no Gabor


def fit(
    kernels: Tensor,
    *,
    n_dims: int = 2,
    geometry: str = "pair",
    center: bool = False,
    isotropic: bool = False,
    metric: Tensor | None = None,
    n_starts: int = 3,
    max_iterations: int = 200,
    tolerance: float = 1e-9,
) -> FitResult:
    """Find the Gabor functions nearest to kernels.

    Args:
        kernels: ``(filters, *kernel_size)``, or ``(filters, channels, *kernel_size)`` with
            ``geometry="filter"``; or one kernel without batch axis. Convolution weights are the
            latter.
        n_dims: spatial dimensions of a kernel: 1, 2 or 3.
        geometry: ``"pair"``: every kernel for itself, leading axes are all batch.
            ``"filter"``: the kernels along the last batch axis share orientation, wavelength,
            sigma, aspect ratio and centre, and have an amplitude and a phase each.
        center: search for the envelope's centre as well; otherwise it is the kernel's middle.
        isotropic: keep the aspect ratio at 1.
        metric: symmetric, not negative, ``(channels · pixels,) * 2``: the misfit of a kernel is
            ``dᵀ metric d`` of its differences d. The inverse of the noise's covariance, or the
            covariance of the patches that the kernels will see; by default all pixels count alike.
        n_starts: candidates that are followed; the best end is returned.
        max_iterations: steps at most, for each start.
        tolerance: a search has arrived when a step changes the kernel by less than this share.

    Returns:
        A result with one entry per filter, in float64. Fields have shape ``(filters,)``; with
        shared geometry ``(filters, 1)``, and phase and amplitude ``(filters, channels)``: the
        shapes that a layer's ``params`` take.

    Raises:
        ValueError: ``kernels`` has too few axes, or is empty or not floating.

    Example:
        >>> from gaborium import Gabor2d, gabor
        >>> planted = Gabor2d.of(orientation=0.5, wavelength=5.0, sigma=2.0, phase=1.0)
        >>> result = fit(gabor(planted, 15).double())
        >>> result.outcome[0].name, round(result.params.orientation.item(), 4)
        ('CONVERGED', 0.5)
    """
    one_of("geometry", geometry, ("pair", "filter"))
    shared = geometry == "filter"
    if n_dims not in RECORDS:
        raise ValueError(f"n_dims must be 1, 2 or 3, got {n_dims}.")
    if not kernels.is_floating_point():
        raise ValueError(f"kernels must be floating, got {kernels.dtype}; use kernels.float().")
    if kernels.ndim < n_dims + shared or kernels.numel() == 0:
        wanted = "(filters, channels, *kernel_size)" if shared else "(filters, *kernel_size)"
        raise ValueError(f"kernels must be {wanted}, got shape {tuple(kernels.shape)}.")
    sizes = tuple(kernels.shape[-n_dims:])
    channels = kernels.shape[-n_dims - 1] if shared else 1
    w = kernels.detach().double().reshape(-1, channels, math.prod(sizes))
    family = Family(sizes, channels, free_center=center, isotropic=isotropic)

    root = None
    if metric is not None:
        metric = metric.detach().double()
        root = _root_of_metric(metric, channels * math.prod(sizes))

    pieces = []
    for piece in w.split(_BATCH):
        bad = ~piece.isfinite().all((-2, -1)) | (piece == 0).all(-1).all(-1)
        clean = torch.where(bad[:, None, None], torch.ones_like(piece), piece)
        scale = clean.square().mean((-2, -1), keepdim=True).sqrt()
        clean = clean / scale
        cross, target = clean, Target(clean, None)
        if metric is not None and root is not None:
            cross = (clean.flatten(1) @ metric).reshape(clean.shape)
            target = Target((clean.flatten(1) @ root.T).unsqueeze(1), root)
        solution = _best(target, cross, metric, family, n_starts, max_iterations, tolerance)
        power = target.y.square().sum((-2, -1))
        explained = 1 - solution.cost / power
        n_pixels = target.y[0].numel()
        noise = solution.cost / max(1, n_pixels - _n_parameters(family))
        # Noise in the pixels would flatter the fit, too: a parameter explains as much of it as a
        # pixel has.
        share = 1 - noise * n_pixels / power
        pieces.append(
            _result(family, solution, root, noise, scale[:, 0, 0], explained, share, bad, shared)
        )
    return FitResult.cat(pieces)


def recover(
    images: Tensor | Iterable[Tensor],
    responses: Tensor | Iterable[Tensor],
    kernel_size: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    center: bool = False,
    isotropic: bool = False,
    n_starts: int = 5,
    max_iterations: int = 200,
    tolerance: float = 1e-9,
) -> FitResult:
    """Find the Gabor filters that turn images into responses.

    The responses are taken as ``conv(image, kernel) + bias + noise``, with white noise. The
    images enter by the covariance of their patches only, gathered in one pass.

    Args:
        images: ``(batch, channels, *size)``, or an iterable of such batches that need not fit in
            memory together.
        responses: ``(batch, filters, *size)`` as the convolution of these arguments gives them,
            or an iterable beside that of the images.
        kernel_size: pixels along each axis; their number is the number of dimensions when it is a
            tuple, otherwise the images' axes tell.
        stride: of the convolution.
        padding: zeros around the images: numbers, ``"valid"`` or ``"same"``.
        center: search for the envelope's centre as well.
        isotropic: keep the aspect ratio at 1.
        n_starts: candidates that are followed; the best end is returned.
        max_iterations: steps at most, for each start.
        tolerance: a search has arrived when a step changes the responses by less than this share.

    Returns:
        A result with one entry per filter, in float64: geometry ``(filters, 1)``, phase and
        amplitude ``(filters, channels)``. Explained variance is that of the responses.

    Raises:
        ValueError: shapes do not agree, an image is smaller than the kernel, a value is not
            finite, or the images are constant, so that nothing can be recovered.

    Example:
        >>> from gaborium import Gabor2d, GaborConv2d
        >>> planted = Gabor2d.of(orientation=[0.5], wavelength=5.0, sigma=1.5)
        >>> layer = GaborConv2d(1, 1, 11, start=planted)
        >>> image = torch.rand(1, 1, 64, 64)
        >>> result = recover(image, layer(image).detach(), kernel_size=11)
        >>> round(result.params.wavelength.item(), 3)
        5.0
    """
    if isinstance(images, Tensor):
        images = [images]
    if isinstance(responses, Tensor):
        responses = [responses]
    statistics = None
    n_dims = 0
    sizes: tuple[int, ...] = ()
    for image, response in zip_longest(images, responses):
        if image is None or response is None:
            raise ValueError("images and responses must come in equal numbers.")
        if statistics is None:
            n_dims = image.ndim - 2 if isinstance(kernel_size, int) else len(kernel_size)
            if n_dims not in RECORDS:
                raise ValueError(
                    f"images must be (batch, channels, *size) with 1 to 3 axes of size, got shape "
                    f"{tuple(image.shape)}."
                )
            sizes = as_sizes("kernel_size", kernel_size, n_dims)
            _check_pair(image, response, n_dims)
            statistics = PatchStatistics(
                sizes,
                n_channels=image.shape[1],
                n_outputs=response.shape[1],
                stride=as_sizes("stride", stride, n_dims),
                padding=(padding,) * n_dims if isinstance(padding, int) else padding,
            )
        _check_pair(image, response, n_dims)
        statistics.add(image, response)
    if statistics is None or statistics.count == 0:
        raise ValueError("recover needs at least one image, got none.")
    return _recover(statistics, center, isotropic, n_starts, max_iterations, tolerance)


def _recover(
    statistics: PatchStatistics,
    center: bool,
    isotropic: bool,
    n_starts: int,
    max_iterations: int,
    tolerance: float,
) -> FitResult:
    family = Family(
        statistics.kernel_size, statistics.n_channels, free_center=center, isotropic=isotropic
    )
    C, c = statistics.covariance(), statistics.cross_covariance()
    variance, count = statistics.response_variance(), statistics.count
    mean_square = C.diagonal().mean()
    if not mean_square > 1e-12 * (statistics.squares.diagonal().mean() / count + 1e-30):
        raise ValueError(
            "The images are constant: every kernel of the same sum gives the same responses, so "
            "nothing can be recovered; use images with structure."
        )
    root, inverse = root_of(C)
    scale = variance.clamp_min(1e-300).sqrt()
    bad = ~(variance > 1e-20 * mean_square)
    y = (c / scale.unsqueeze(-1)) @ inverse.T  # (filters, m)
    y = torch.where(bad.unsqueeze(-1), torch.ones_like(y), y)
    target = Target(y.unsqueeze(1), root)
    cross = (c / scale.unsqueeze(-1)).reshape(len(c), family.n_channels, -1)
    solution = _best(target, cross, C, family, n_starts, max_iterations, tolerance)

    # Of the responses' variance (here 1) a free kernel explains |y|² and leaves noise; the Gabor
    # leaves |y - R K|² more. In each there is a known part of the noise, one per parameter.
    n_free, n_parameters = len(root), _n_parameters(family)
    free_power = y.square().sum(-1)
    left = (1 - free_power).clamp_min(0.0)
    noise = left / max(1, count - n_free)
    gained = free_power - solution.cost - noise * n_parameters
    missed = solution.cost - noise * (n_free - n_parameters)
    residual = left + solution.cost
    # The best of all Gabor functions explains some of pure noise, too: it must be worth its
    # parameters (Bayesian information criterion).
    worth = -count * residual.log() > n_parameters * math.log(count)
    share = torch.where(worth, gained / (gained + missed.clamp_min(0.0)), 0.0)
    per_response = residual / max(1, count - n_parameters)  # σ² / n
    return _result(
        family, solution, root, per_response, scale, 1 - residual, share, bad, shared=True
    )


def _root_of_metric(metric: Tensor, n: int) -> Tensor:
    if metric.shape != (n, n) or not metric.isfinite().all():
        raise ValueError(
            f"metric must be finite and of shape ({n}, {n}), channels times pixels, got shape "
            f"{tuple(metric.shape)}."
        )
    return root_of(metric)[0]


def _best(
    target: Target,
    cross: Tensor,
    covariance: Tensor | None,
    family: Family,
    n_starts: int,
    max_iterations: int,
    tolerance: float,
) -> Solution:
    """Solve from every start and keep, for each problem, the end of least misfit."""
    if n_starts < 1:
        raise ValueError(f"n_starts must be at least 1, got {n_starts}.")
    z = starts(target, cross, covariance, family, n_starts)
    batch, n_starts = z.shape[:2]
    wide = Target(target.y.repeat_interleave(n_starts, 0), target.root)
    solution = solve(
        wide, family, z.flatten(0, 1), max_iterations=max_iterations, tolerance=tolerance
    )
    cost = solution.cost.reshape(batch, n_starts)
    # Among ends as good as the best, prefer one that arrived.
    arrived = solution.converged.reshape(batch, n_starts)
    good = cost <= cost.amin(1, keepdim=True) * (1 + 1e-6) + 1e-24
    chosen = (good.long() + (good & arrived).long()).argmax(1)
    chosen += torch.arange(batch, device=chosen.device) * n_starts
    best = Solution(*(value[chosen] for value in solution))

    # Where hardly a wave is left, try none: the misfit is flat there, and the search is slow.
    column = family.columns["frequency"]
    turn = 2 * math.pi * best.z[:, column].abs() * best.z[:, family.columns["sigma"]].exp()
    slow = (turn < 0.3).nonzero().flatten()  # rad within a standard deviation
    z = best.z[slow]
    z[:, column] = 0.0
    still = solve(
        Target(target.y[slow], target.root),
        family,
        z,
        max_iterations=max_iterations,
        tolerance=tolerance,
    )
    as_good = still.cost <= best.cost[slow] * (1 + 1e-6) + 1e-24
    for value, other in zip(best, still, strict=True):
        value[slow[as_good]] = other[as_good]
    return best


def _result(
    family: Family,
    solution: Solution,
    root: Tensor | None,
    noise: Tensor,
    scale: Tensor,
    explained: Tensor,
    share: Tensor,
    bad: Tensor,
    shared: bool,
) -> FitResult:
    """Turn solutions of targets divided by ``scale`` into records with errors and outcomes."""
    params = _record(family, solution)  # (B, 1) and (B, C)
    standard_error, correlation, names = _errors(family, params, root, noise)
    params = params.replace(amplitude=params.amplitude * scale.unsqueeze(-1))
    standard_error["amplitude"] = standard_error["amplitude"] * scale.unsqueeze(-1)

    unknown = torch.stack(
        [error.isinf().flatten(1).any(1) for error in standard_error.values()]
    ).any(0)
    outcomes = []
    for is_bad, is_off, has_arrived, is_unknown in zip(
        bad.tolist(),
        (~(share >= _LITTLE)).tolist(),
        solution.converged.tolist(),
        unknown.tolist(),
        strict=True,
    ):
        if is_bad:
            outcomes.append(Outcome.BAD_INPUT)
        elif not has_arrived:
            outcomes.append(Outcome.STALLED)
        elif is_off:
            outcomes.append(Outcome.OFF_MODEL)
        else:
            outcomes.append(Outcome.NOT_IDENTIFIABLE if is_unknown else Outcome.CONVERGED)

    def masked(value: Tensor) -> Tensor:
        flat = torch.where(bad.reshape(-1, *[1] * (value.ndim - 1)), torch.nan, value)
        return flat if shared or flat.ndim < 2 else flat[:, 0]

    return FitResult(
        params=type(params)(**{name: masked(v) for name, v in params.as_dict().items()}),
        outcome=tuple(outcomes),
        explained_variance=torch.where(bad, torch.nan, explained),
        standard_error={name: masked(value) for name, value in standard_error.items()},
        correlation=correlation,
        names=names,
        n_iterations=solution.n_iterations,
    )


def _record(family: Family, solution: Solution) -> Gabor:
    angles, frequency, sigma, aspect_ratio, center = geometry(family, solution.z)
    coefficients = solution.coefficients
    phase = torch.atan2(coefficients[..., 1], coefficients[..., 0])
    backwards = frequency < 0
    if family.n_dims == 1:  # no direction to turn: cos(-φ + ψ) = cos(φ - ψ)
        phase = torch.where(backwards.unsqueeze(-1), -phase, phase)
    else:
        angles["orientation"] = angles["orientation"] + backwards * math.pi
    if family.n_dims == 3:
        angles["elevation"] = torch.where(backwards, -angles["elevation"], angles["elevation"])
    fields = angles | {
        "wavelength": frequency.abs().reciprocal(),
        "sigma": sigma,
        "aspect_ratio": aspect_ratio,
        "center": center,
    }
    record = RECORDS[family.n_dims]
    columns = {
        name: value[:, None] for name, value in fields.items() if name in record.field_names()
    }
    params = record(**columns, phase=phase, amplitude=coefficients.norm(dim=-1))
    whole = params.canonical().as_dict()
    return record(
        **{name: v if name in ("phase", "amplitude") else v[:, :1] for name, v in whole.items()}
    )


def _errors(
    family: Family, params: Gabor, root: Tensor | None, noise: Tensor
) -> tuple[dict[str, Tensor], Tensor, tuple[str, ...]]:
    """Standard errors and correlations, from the Fisher information at the solution."""
    slopes = gabor_jacobian(params, family.sizes)
    n_channels, d = family.n_channels, family.n_dims
    columns: dict[str, Tensor] = {}
    for name, slope in slopes.items():
        if name in ("phase", "amplitude"):
            for channel in range(n_channels):
                alone = torch.zeros_like(slope)
                alone[:, channel] = slope[:, channel]
                columns[f"{name}[{channel}]"] = alone.flatten(1)
        elif name == "center":
            if family.free_center:
                for axis in range(d):
                    columns[f"center[{axis}]"] = slope[:, :, axis].flatten(1)
        elif name != "aspect_ratio" or not family.isotropic:
            columns[name] = slope.flatten(1)
    J = torch.stack(list(columns.values()), 1)  # (B, p, channels · pixels)
    if root is not None:
        J = J @ root.T
    F = J @ J.mT
    size = F.diagonal(dim1=-2, dim2=-1).sqrt()
    silent = size <= 1e-12 * size.amax(-1, keepdim=True)
    safe = torch.where(silent, 1.0, size)
    values, vectors = torch.linalg.eigh(F / (safe.unsqueeze(-1) * safe.unsqueeze(-2)))
    weak = values < 1e-11
    inverse = torch.where(weak, 0.0, 1 / torch.where(weak, 1.0, values))
    covariance = (vectors * inverse.unsqueeze(-2)) @ vectors.mT
    # A parameter that takes part in a direction without information is not determined.
    free = (vectors.square() * weak.unsqueeze(-2)).sum(-1) > 1e-2
    spread = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    error = torch.where(free | silent, torch.inf, spread / safe * noise.unsqueeze(-1).sqrt())
    unit = torch.where(spread > 0, spread, 1.0)
    correlation = covariance / (unit.unsqueeze(-1) * unit.unsqueeze(-2))

    found = dict(zip(columns, error.unbind(-1), strict=True))
    nothing = torch.zeros_like(noise)
    result = {}
    for name in params.field_names():
        if name in ("phase", "amplitude"):
            result[name] = torch.stack([found[f"{name}[{i}]"] for i in range(n_channels)], -1)
        elif name == "center":
            parts = [found.get(f"center[{i}]", nothing) for i in range(d)]
            result[name] = torch.stack(parts, -1).unsqueeze(1)
        else:
            result[name] = found.get(name, nothing).unsqueeze(-1)
    return result, correlation, tuple(columns)


def _n_parameters(family: Family) -> int:
    return len(family.free) + 2 * family.n_channels


def _check_pair(image: Tensor, response: Tensor, d: int) -> None:
    for name, value in (("images", image), ("responses", response)):
        if value.ndim != d + 2:
            raise ValueError(
                f"{name} must be (batch, channels, *size) with {d} axes of size, got shape "
                f"{tuple(value.shape)}."
            )
        if not value.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity.")
    if len(image) != len(response):
        raise ValueError(
            f"images and responses must come in equal numbers, got {len(image)} and "
            f"{len(response)}."
        )
