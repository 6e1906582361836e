"""``fit`` and ``recover``: Gabor functions from kernels, or from images and responses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from gaborium.fitting.judgement import FitStatistics, judge
from gaborium.fitting.model import GaborModel
from gaborium.fitting.result import FitResult
from gaborium.fitting.robust import LOSSES, reweighted
from gaborium.fitting.search import Search
from gaborium.fitting.solver import Target, misfit, without_offset
from gaborium.fitting.start import StartGrid
from gaborium.functions.params import RECORDS
from gaborium.patches import PatchStatistics, root_of
from gaborium.support import as_sizes, one_of

_PIECE = 2**22  # numbers in the kernels that are held as a problem at a time
# Options of the search: a test for good values, and their description.
_GOOD: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n_dims": (RECORDS.__contains__, "1, 2 or 3"),
    "n_starts": (lambda value: value >= 1, "at least 1"),
    "max_iterations": (lambda value: value >= 1, "at least 1"),
    "tolerance": (lambda value: value > 0, "positive"),
    "dtype": ((torch.float32, torch.float64).__contains__, "torch.float32 or torch.float64"),
}


@contextmanager
def _full_precision() -> Iterator[None]:
    """Without a graph, and without the lower precision of autocast."""
    with (
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


@_full_precision()
def fit(
    kernels: Tensor,
    *,
    n_dims: int = 2,
    geometry: str = "pair",
    center: bool = False,
    isotropic: bool = False,
    offset: bool = False,
    weights: Tensor | None = None,
    metric: Tensor | None = None,
    loss: str = "squared",
    bounds: Mapping[str, tuple[float, float]] | None = None,
    n_starts: int = 12,
    max_iterations: int = 200,
    tolerance: float = 1e-9,
    dtype: torch.dtype = torch.float64,
) -> FitResult:
    """Find the Gabor functions nearest to kernels.

    Args:
        kernels: ``(filters, *kernel_size)``, or ``(filters, channels, *kernel_size)`` with
            ``geometry="filter"``, such as convolution weights; or one kernel without batch axis.
            They are fitted on their device.
        n_dims: spatial dimensions of a kernel: 1, 2 or 3.
        geometry: ``"pair"``: each kernel separately, leading axes are all batch.
            ``"filter"``: the kernels along the last batch axis share orientation, wavelength,
            sigma, aspect ratio and centre, and have an amplitude and a phase each.
        center: search for the envelope's centre too; otherwise it is the kernel's middle.
        isotropic: keep the aspect ratio at 1.
        offset: add a free constant to every kernel, such as the mean of a receptive field's
            estimate. It is not returned. Explained variance is then the share of the kernel's
            variance instead of its power.
        weights: weight of each pixel, not negative and of a shape that broadcasts to ``kernels``:
            the inverse of its noise's variance, up to a factor. A pixel of weight 0 is ignored,
            even if it is NaN.
        metric: symmetric, not negative, ``(channels · pixels,) * 2``: the misfit of a kernel with
            differences d is ``dᵀ metric d``. Give the inverse of the noise's covariance, or the
            covariance of the patches that the kernels will see; by default all pixels count the
            same.
        loss: ``"squared"``; or for kernels with a few wild pixels ``"huber"``, which counts large
            residuals linearly, or ``"cauchy"``, which counts them by their logarithm.
        bounds: narrower ranges, as ``{"wavelength": (3.0, 8.0)}``: of wavelength, sigma (px),
            aspect ratio and centre (px from the middle, for every axis).
        n_starts: candidates that are followed at most; the best end is returned. After an exact
            fit, or one that leaves only noise, no other is tried. From 24 on a quarter is drawn at
            random, the same for all kernels.
        max_iterations: steps at most, for each search.
        tolerance: a search has converged when a step changes the kernel by less than this share.
        dtype: precision of the search. ``torch.float32`` is faster; the last steps are in double
            precision.

    Returns:
        A result with one entry per filter, in float64. Fields have shape ``(filters,)``; with
        shared geometry ``(filters, 1)``, and phase and amplitude ``(filters, channels)``: the
        shapes that a layer's ``params`` take.

    Raises:
        ValueError: ``kernels`` has too few axes, or is empty or not floating; or an option is not
            valid.

    Example:
        >>> from gaborium import Gabor2d, gabor
        >>> planted = Gabor2d.of(orientation=0.5, wavelength=5.0, sigma=2.0, phase=1.0)
        >>> result = fit(gabor(planted, 15).double())
        >>> result.outcome[0].name, round(result.params.orientation.item(), 4)
        ('CONVERGED', 0.5)
    """
    one_of("geometry", geometry, ("pair", "filter"))
    one_of("loss", loss, LOSSES)
    _check(n_starts=n_starts, max_iterations=max_iterations, tolerance=tolerance)
    _check(dtype=dtype, n_dims=n_dims)
    shared = geometry == "filter"
    if not kernels.is_floating_point():
        raise ValueError(f"kernels must be floating, got {kernels.dtype}; use kernels.float().")
    if kernels.ndim < n_dims + shared or kernels.numel() == 0:
        wanted = "(filters, channels, *kernel_size)" if shared else "(filters, *kernel_size)"
        raise ValueError(f"kernels must be {wanted}, got shape {tuple(kernels.shape)}.")
    if metric is not None and (weights is not None or loss != "squared"):
        raise ValueError("metric goes with neither weights nor a robust loss; use one of them.")
    sizes = tuple(kernels.shape[-n_dims:])
    channels = kernels.shape[-n_dims - 1] if shared else 1
    model = _model(sizes, channels, center, isotropic, offset, bounds)
    flat = kernels.reshape(-1, channels, math.prod(sizes))
    weight = root = None
    if weights is not None:
        weight = _root_weights(weights, kernels, shared=shared, n_dims=n_dims)
    if metric is not None:
        metric = metric.detach().to(kernels.device, torch.float64)
        root = _root_of_metric(metric, channels * math.prod(sizes))

    grid = StartGrid(model, flat.new_empty(0, dtype=dtype), metric)
    rounding = 0.25 * torch.finfo(kernels.dtype).eps ** 2
    search = Search(grid, n_starts, max_iterations, tolerance, rounding)
    size, pieces = max(1, _PIECE // flat[0].numel()), []
    for start in range(0, len(flat), size):
        rows = slice(start, start + size)
        own = weight if weight is None or len(weight) == 1 else weight[rows]
        pieces.append(_fit_piece(flat[rows].double(), own, root, search, loss, shared))
    return FitResult.cat(pieces)


def _fit_piece(
    y: Tensor, weight: Tensor | None, root: Tensor | None, search: Search, loss: str, shared: bool
) -> FitResult:
    """Fit kernels ``(batch, channels, pixels)``."""
    model = search.model
    if weight is not None:
        y = torch.where(weight > 0, y, 0.0) * weight
    bad = ~y.isfinite().all(-1).all(-1) | (y == 0).all(-1).all(-1)
    y = torch.where(bad[:, None, None], 1.0, y)
    # In two steps: squares of very large or small numbers are beyond the range of floats.
    size = y.abs().amax((-2, -1), keepdim=True)
    scale = size * (y / size).square().mean((-2, -1), keepdim=True).sqrt()
    y = y / scale
    target = Target(y, None, weight)
    if root is not None:
        target = Target((y.flatten(1) @ root.T).unsqueeze(1), root)
    power = without_offset(target, model).square().sum((-2, -1))
    bad |= ~(power > 1e-24 * target.power())  # only a constant
    n_data = target.n_data()
    noise = None
    if loss == "squared":
        best = search.best(target)
        cost = best.solution.cost
    else:
        best, noise, trust = reweighted(target, search, loss)
        # Pixels that are not trusted count neither as explained nor as unexplained.
        trusted = Target(target.y * trust, None, trust if weight is None else trust * weight)
        power = without_offset(trusted, model).square().sum((-2, -1))
        cost = misfit(trusted, model, best.solution.z)
        n_data = (n_data / target.y[0].numel()) * trust.sum((-2, -1))
    n_left = (n_data - model.n_parameters).clamp_min(1.0)
    variance = cost / n_left
    statistics = FitStatistics(
        explained=1 - cost / power,
        # Less the noise that parameters explain: each explains the noise of one pixel.
        explained_signal=1 - variance * n_data / power,
        noise=variance if noise is None else noise,
        n_left=n_left,
        scale=scale[:, 0, 0],
        bad=bad,
    )
    return judge(model, target, best, statistics, shared=shared)


@_full_precision()
def recover(
    images: Tensor | Iterable[Tensor],
    responses: Tensor | Iterable[Tensor],
    kernel_size: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    center: bool = False,
    isotropic: bool = False,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    n_starts: int = 12,
    max_iterations: int = 200,
    tolerance: float = 1e-9,
) -> FitResult:
    """Find the Gabor filters that turn images into responses.

    The model of the responses is ``conv(image, kernel) + bias + noise``, with white noise. Of the
    images only the covariance of their patches is used, gathered in one pass.

    Args:
        images: ``(batch, channels, *size)``, or an iterable of such batches that need not fit in
            memory together.
        responses: ``(batch, filters, *size)`` as the convolution of these arguments gives them,
            or an iterable of such batches.
        kernel_size: pixels along each axis; a tuple has one number per dimension.
        stride: of the convolution.
        padding: zeros around the images: numbers, ``"valid"`` or ``"same"``.
        center: search for the envelope's centre too.
        isotropic: keep the aspect ratio at 1.
        bounds: narrower ranges, as for ``fit``.
        n_starts: candidates that are followed at most; the best end is returned.
        max_iterations: steps at most, for each search.
        tolerance: a search has converged when a step changes the responses by less than this
            share.

    Returns:
        A result with one entry per filter, in float64: geometry ``(filters, 1)``, phase and
        amplitude ``(filters, channels)``. Explained variance is the responses' share.

    Raises:
        ValueError: shapes do not agree, an image is smaller than the kernel, a value is not
            finite, or the images are constant.

    Example:
        >>> from gaborium import Gabor2d, GaborConv2d
        >>> planted = Gabor2d.of(orientation=[0.5], wavelength=5.0, sigma=1.5)
        >>> layer = GaborConv2d(1, 1, 11, start=planted)
        >>> image = torch.rand(1, 1, 64, 64)
        >>> result = recover(image, layer(image).detach(), kernel_size=11)
        >>> round(result.params.wavelength.item(), 3)
        5.0
    """
    settings = {"n_starts": n_starts, "max_iterations": max_iterations, "tolerance": tolerance}
    _check(**settings)
    images, responses = ([x] if isinstance(x, Tensor) else x for x in (images, responses))
    statistics = None
    for image, response in zip_longest(images, responses):
        if image is None or response is None:
            raise ValueError("images and responses must come in equal numbers.")
        if statistics is None:
            n_dims = image.ndim - 2 if isinstance(kernel_size, int) else len(kernel_size)
        _check_pair(image, response, n_dims)
        if statistics is None:
            sizes = as_sizes("kernel_size", kernel_size, n_dims)
            model = _model(sizes, image.shape[1], center, isotropic, False, bounds)
            statistics = PatchStatistics(
                sizes,
                n_channels=image.shape[1],
                n_outputs=response.shape[1],
                stride=as_sizes("stride", stride, n_dims),
                padding=(padding,) * n_dims if isinstance(padding, int) else padding,
            )
        statistics.add(image, response)
    if statistics is None or statistics.count == 0:
        raise ValueError("recover needs at least one image, got none.")
    return _solve_statistics(statistics, model, settings)


def _solve_statistics(
    statistics: PatchStatistics, model: GaborModel, settings: dict[str, Any]
) -> FitResult:
    C, c = statistics.covariance, statistics.cross_covariance
    variance, count = statistics.response_variance, statistics.count
    if statistics.is_constant:
        raise ValueError(
            "The images are constant: every kernel of the same sum gives the same responses; use "
            "images with structure."
        )
    root, inverse = root_of(C)
    scale = variance.clamp_min(1e-300).sqrt()
    bad = ~(variance > 1e-20 * C.diagonal().mean())
    y = (c / scale.unsqueeze(-1)) @ inverse.T  # (filters, m)
    y = torch.where(bad.unsqueeze(-1), torch.ones_like(y), y)
    target = Target(y.unsqueeze(1), root)
    best = Search(StartGrid(model, y, C), **settings).best(target)
    cost = best.solution.cost

    # Of the responses' variance (here 1) a free kernel explains |y|² and leaves noise; the Gabor
    # function leaves |y - R K|² more. Each contains a known part of the noise, one per parameter.
    n_free, n_parameters = len(root), model.n_parameters
    free_power = y.square().sum(-1)
    left = (1 - free_power).clamp_min(0.0)
    noise = left / max(1, count - n_free)
    gained = free_power - cost - noise * n_parameters
    missed = cost - noise * (n_free - n_parameters)
    residual = left + cost
    # The best of all Gabor functions explains some of pure noise too: it must explain more than
    # its parameters would (Bayesian information criterion).
    worth = -count * residual.log() > n_parameters * math.log(count)
    fit_statistics = FitStatistics(
        explained=1 - residual,
        explained_signal=torch.where(worth, gained / (gained + missed.clamp_min(0.0)), 0.0),
        noise=residual / max(1, count - n_parameters),  # σ² / n
        n_left=torch.full_like(noise, max(1, n_free - n_parameters)),
        scale=scale,
        bad=bad,
    )
    return judge(model, target, best, fit_statistics, shared=True)


def _model(
    sizes: tuple[int, ...],
    n_channels: int,
    center: bool,
    isotropic: bool,
    offset: bool,
    bounds: Mapping[str, tuple[float, float]] | None,
) -> GaborModel:
    """The model to search, within ``bounds``."""
    bounds = bounds or {}
    limits = tuple(_limit(name, pair) for name, pair in bounds.items())
    model = GaborModel(sizes, n_channels, center, isotropic, offset, limits)
    low, high = model.bounds(torch.zeros(1, dtype=torch.float64))
    fixed = [i for i in range(model.columns["sigma"], len(low)) if i not in model.free]  # at 0
    if (low > high).any() or (low[fixed] > 0).any() or (high[fixed] < 0).any():
        raise ValueError(
            f"bounds of {', '.join(bounds)} must leave part of the range for kernels of {sizes} px:"
            f" wavelength from 2 px, sigma from 0.2 to {4 * max(sizes)} px, aspect_ratio from 0.05 "
            "to 20 (1 if isotropic), center within the kernel (0 without center=True); got "
            f"{dict(bounds)}."
        )
    return model


def _limit(name: str, pair: tuple[float, float]) -> tuple[str, float, float]:
    """The range of a field as a range of the model's column."""
    one_of("A name in bounds", name, ("wavelength", "sigma", "aspect_ratio", "center"))
    least = -math.inf if name == "center" else 0.0
    try:
        low, high = (float(value) for value in pair)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not (least <= low <= high and high > least and low < math.inf):
        positive = "" if name == "center" else " > 0"
        raise ValueError(f"bounds of {name} must be (lowest, highest){positive}, got {pair}.")
    if name == "center":
        return name, low, high
    if name == "wavelength":
        # Without a longest wave the range includes blobs, which both signs approach.
        slowest = (-math.inf if low == 0 else -1 / low) if high == math.inf else 1 / high
        return "frequency", slowest, math.inf if low == 0 else 1 / low
    return name, math.log(low) if low else -math.inf, math.log(high)


def _check(**options: Any) -> None:
    for name, value in options.items():
        is_good, expected = _GOOD[name]
        if not is_good(value):
            raise ValueError(f"{name} must be {expected}, got {value}.")


def _root_weights(weights: Tensor, kernels: Tensor, *, shared: bool, n_dims: int) -> Tensor:
    """Square roots of weights of mean 1: ``(filters, channels, pixels)``, or for all the same."""
    try:
        torch.broadcast_to(weights, kernels.shape)
    except RuntimeError:
        raise ValueError(
            f"weights must have a shape that broadcasts to the kernels' shape "
            f"{tuple(kernels.shape)}, got {tuple(weights.shape)}."
        ) from None
    weights = weights.detach().to(kernels.device, torch.float64)
    if not (weights.isfinite().all() and (weights >= 0).all() and (weights > 0).any()):
        raise ValueError("weights must be finite and not negative, and some of them positive.")
    weights = weights[(None,) * (kernels.ndim - weights.ndim)]
    one = kernels.ndim - n_dims - shared  # batch axes
    shape = kernels.shape
    if weights.shape[:one].numel() == 1:
        shape = torch.Size([1] * one) + shape[one:]
    root = torch.broadcast_to(weights / weights.mean(), shape).sqrt()
    channels = shape[one] if shared else 1
    return root.reshape(-1, channels, math.prod(shape[-n_dims:]))


def _root_of_metric(metric: Tensor, n: int) -> Tensor:
    if metric.shape != (n, n) or not metric.isfinite().all():
        raise ValueError(
            f"metric must be finite and of shape ({n}, {n}), channels times pixels, got shape "
            f"{tuple(metric.shape)}."
        )
    size, least = metric.abs().max(), torch.linalg.eigvalsh(metric)[0]
    if not ((metric - metric.T).abs().max() <= 1e-6 * size and least >= -1e-6 * size and size > 0):
        raise ValueError(
            "metric must be symmetric and have no negative eigenvalues, like a covariance; the "
            f"least eigenvalue is {least:.3g}."
        )
    return root_of(metric)[0]


def _check_pair(image: Tensor, response: Tensor, d: int) -> None:
    for name, value in (("images", image), ("responses", response)):
        if value.ndim != d + 2 or d not in RECORDS:
            raise ValueError(
                f"{name} must be (batch, channels, *size) with {d if d in RECORDS else '1 to 3'} "
                f"axes of size, got shape {tuple(value.shape)}."
            )
        if not value.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity.")
    if len(image) != len(response):
        raise ValueError(
            f"images and responses must come in equal numbers, got {len(image)} and "
            f"{len(response)}."
        )
