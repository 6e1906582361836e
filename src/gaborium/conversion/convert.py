"""``convert``: a trained network with Gabor functions in its first convolution where they fit."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gaborium.conversion.features import checked, table
from gaborium.conversion.first_conv import find_first_conv, replace_first_conv
from gaborium.fitting import FitResult, Outcome, fit
from gaborium.functions.params import Gabor, plain
from gaborium.layers import GABOR_LAYERS, LAYERS, MixedConv
from gaborium.patches import patch_moments, sample_patches

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DAMPING = 1e-4  # added to the variance of pixels, for directions that no patch has
_MAX_SIZE = 4.0  # wavelength and sigma, in sizes of the kernel


@dataclass(frozen=True, eq=False)
class Conversion:
    """A converted network, and the errors of the conversion.

    Args:
        model: the network with Gabor filters, a copy.
        name: of the layer in it that was converted.
        is_gabor: which filters are Gabor functions now, boolean ``(filters,)``.
        kernels: the fit of the original kernels, one entry per filter.
        responses: the fit of their responses to the images, if there were any.
        response_error: root mean squared change of each filter's responses to the images, over
            their standard deviation, ``(filters,)``; 0 for filters that were not converted.
        n_first_parameters: parameters of the layer before and after, frozen ones included.
        threshold: the share that a Gabor function had to explain; ``None`` if filters were named.
    """

    model: nn.Module
    name: str
    is_gabor: Tensor
    kernels: FitResult
    responses: FitResult | None
    response_error: Tensor | None
    n_first_parameters: tuple[int, int]
    threshold: float | None

    @property
    def layer(self) -> Any:
        """The converted layer of the network; the old one where nothing was converted."""
        return self.model.get_submodule(self.name)

    @property
    def fit(self) -> FitResult:
        """The fit that the Gabor filters come from: of the responses, or else of the kernels."""
        return self.kernels if self.responses is None else self.responses

    @property
    def params(self) -> Gabor:
        """The parameters of the Gabor filters alone, ``(Gabor filters, 1 or channels)``."""
        return self.fit[self.is_gabor.nonzero().flatten().tolist()].params

    def __repr__(self) -> str:
        """A line: how many filters, and what is saved."""
        before, after = self.n_first_parameters
        return (
            f"Conversion({int(self.is_gabor.sum())} of {len(self.is_gabor)} filters of "
            f"{self.name or 'the layer'!r}: {before} numbers become {after})"
        )

    def to_table(self) -> list[dict[str, Any]]:
        """A row per filter: whether it is a Gabor function now, the share explained, its geometry.

        ``explained_variance`` is the kernel's share explained by the Gabor function nearest to it,
        ``explained_response`` the responses' share; the geometry is that of the Gabor function
        that replaces the filter, or would.
        """
        columns: dict[str, Sequence[Any]] = {
            "filter": range(len(self.is_gabor)),
            "is_gabor": self.is_gabor.tolist(),
            "outcome": [outcome.name for outcome in self.fit.outcome],
            "explained_variance": self.kernels.explained_variance.tolist(),
        }
        if self.responses is not None and self.response_error is not None:
            columns["explained_response"] = self.responses.explained_variance.tolist()
            columns["response_error"] = self.response_error.tolist()
        return table(self.fit.params, columns)

    def to_json(self, *, indent: int | None = None) -> str:
        """The whole report as JSON text; infinities and missing numbers are inf and nan."""
        document = {
            "name": self.name,
            "threshold": self.threshold,
            "n_first_parameters": self.n_first_parameters,
            "filters": self.to_table(),
            "params": json.loads(self.params.to_json()),
        }
        return json.dumps(plain(document), indent=indent, allow_nan=False)


def convert(
    model: nn.Module,
    *,
    calibrate: Tensor | Iterable[Tensor] | None = None,
    threshold: float = 0.8,
    filters: Sequence[int] | Tensor | None = None,
    name: str | None = None,
    adapt_norms: bool = True,
    learn: Collection[str] | None = None,
    n_starts: int = 12,
) -> Conversion:
    """Replace the filters of a network's first convolution by Gabor functions.

    Convention:
        - every filter keeps its channel; filters that no Gabor function explains well enough stay
          unchanged, in one ``MixedConv`` with the Gabor functions
        - with ``calibrate`` the error of the *responses* to these images is minimised, otherwise
          the error of the kernels; the bias then corrects each response's mean, and batch norms
          the spread, since a Gabor function that explains a share of a response varies less
        - one geometry per filter, centre included, and an amplitude and a phase per channel

    Args:
        model: any network; it is not changed.
        calibrate: images as the network takes them, ``(batch, channels, *size)``, or an iterable
            of such batches.
        threshold: share of a filter's variance (of its responses' if there are images) that
            its Gabor function must explain, in [0, 1]; 0 converts all filters that are not silent.
        filters: numbers of the filters to convert instead, such as
            ``census(model).filters("gabor")``.
        name: of the layer, as ``model.get_submodule`` takes it; by default the first convolution.
        adapt_norms: with ``calibrate``, change the running statistics of all batch norms by as
            much as the conversion changes their inputs on these images.
        learn: fields that train later; by default all, the centre included.
        n_starts: of the search, as for ``fit``.

    Returns:
        The converted copy in the same training mode, with a report.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no suitable convolution, one with groups, or one with kernels that are
            not finite; or an argument is out of range.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 2, 7), nn.ReLU())
        >>> from gaborium import Gabor2d, gabor
        >>> planted = Gabor2d.of(orientation=0.5, wavelength=4.0, sigma=1.5)
        >>> with torch.no_grad():
        ...     network[0].weight[1, 0] = gabor(planted, 7)
        >>> conversion = convert(network, filters=[1])
        >>> conversion
        Conversion(1 of 2 filters of '0': 100 numbers become 59)
        >>> type(conversion.model[0]).__name__
        'MixedConv'
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}.")
    place, found = find_first_conv(model, name)
    whole = copy.deepcopy(model)
    layer: Any = whole.get_submodule(place)
    weight = _kernels(layer, place)
    n_dims = weight.ndim - 2
    # Very long waves of very large amplitude fit edges too, but train badly: no step suits both.
    longest = _MAX_SIZE * max(weight.shape[2:])
    options: dict[str, Any] = {
        "bounds": {"wavelength": (0.0, longest), "sigma": (0.0, longest)},
        "n_dims": n_dims, "geometry": "filter", "center": True, "n_starts": n_starts,
    }  # fmt: skip
    kernels = responses = fit(weight, **options)
    batches: list[Tensor] = []
    mean = error = None
    if calibrate is not None:
        batches = [calibrate] if isinstance(calibrate, Tensor) else list(calibrate)
        mean, covariance = _input_moments(whole, place, batches)
        damping = _DAMPING * covariance.diagonal().mean()
        metric = covariance + damping * torch.eye(len(mean), dtype=mean.dtype)
        responses = fit(weight, metric=metric, **options)
    chosen = _chosen(responses, threshold, filters)
    result = whole
    if chosen.any():
        params = responses[chosen.nonzero().flatten().tolist()].params
        new = _converted(layer, params, chosen, learn, mean)
        result = replace_first_conv(whole, new, place)
    converted: Any = result.get_submodule(place)
    if batches:
        if chosen.any() and adapt_norms:
            _adapt_norms(whole, result, batches)
        change = weight - converted.weight.detach().cpu().double()
        error = _spread(change, covariance) / _spread(weight, covariance).clamp_min(1e-150)
    return Conversion(
        model=result,
        name=place,
        is_gabor=chosen,
        kernels=kernels,
        responses=responses if batches else None,
        response_error=error,
        n_first_parameters=(_n_parameters(found), _n_parameters(converted)),
        threshold=threshold if filters is None else None,
    )


def _n_parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def _spread(kernels: Tensor, covariance: Tensor) -> Tensor:
    """Standard deviation of the responses to patches of this covariance: ``(filters,)``."""
    w = kernels.flatten(1)
    return ((w @ covariance) * w).sum(1).clamp_min(0).sqrt()


def _input_moments(
    network: nn.Module, name: str, batches: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the patches that a layer gets from some images."""
    if not batches:
        raise ValueError("calibrate needs at least one batch of images, got none.")
    inputs: list[Tensor] = []
    trial = copy.deepcopy(network).eval()
    trial.get_submodule(name).register_forward_pre_hook(
        lambda _, arguments: inputs.append(arguments[0].detach())
    )
    with torch.no_grad():
        for batch in batches:
            trial(batch)
    if not inputs:
        raise ValueError(f"The network does not run {name!r} on these images.")
    layer: Any = network.get_submodule(name)
    twin = LAYERS[layer.weight.ndim - 2](
        *(layer.in_channels, 1, layer.kernel_size, layer.stride, layer.padding),
        dilation=layer.dilation,
        padding_mode=layer.padding_mode,
    )
    draw = torch.Generator().manual_seed(0)
    patches = torch.cat([sample_patches(twin, part, draw) for part in inputs]).cpu().double()
    if not patches.isfinite().all():
        raise ValueError("calibrate must lead to finite inputs, got NaN or infinity.")
    (mean,), (second,) = patch_moments(patches)
    covariance = second - mean.outer(mean)
    if not covariance.diagonal().mean() > 1e-12 * second.diagonal().mean():
        raise ValueError(
            "calibrate must hold images with structure: on constant images all kernels of the "
            "same sum respond equally."
        )
    return mean, covariance


def _kernels(layer: Any, name: str) -> Tensor:
    """The kernels on the CPU in double precision, ``(filters, channels, *size)``."""
    what = f"{name or 'The layer'} ({type(layer).__name__})"
    if isinstance(layer, (*GABOR_LAYERS, MixedConv)):
        raise ValueError(f"{what} is a Gabor layer already; nothing is to be converted.")
    if layer.groups != 1:
        raise ValueError(
            f"{what} has groups={layer.groups}, and only a convolution over all channels is "
            "converted (groups=1); name another layer."
        )
    return checked(layer.weight, layer.weight.ndim - 2).double()


def _adapt_norms(old: nn.Module, new: nn.Module, batches: Sequence[Any]) -> None:
    """Change running statistics as the batch norms' inputs change between two networks."""
    before, after = (_norm_inputs(one, batches) for one in (old, new))
    for name, (mean, variance) in before.items():
        norm: Any = new.get_submodule(name)
        new_mean, new_variance = after[name]
        norm.running_mean += new_mean - mean
        # Differences and ratios, because a few images have other statistics than the training set.
        norm.running_var *= torch.where(variance > 0, new_variance / variance, 1.0)


@torch.no_grad()
def _norm_inputs(network: nn.Module, batches: Sequence[Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of each batch norm's input, with the batch's statistics before it."""
    trial = copy.deepcopy(network).eval()
    norms = {
        name: part
        for name, part in trial.named_modules()
        if isinstance(part, _NORMS) and part.running_mean is not None
    }
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    try:
        for batch in batches:
            trial(batch)
    except ValueError as error:  # torch's, for a batch with one value per channel
        warnings.warn(
            f"Batch norms keep their statistics, since {error}; calibrate with larger batches.",
            stacklevel=4,
        )
        return {}
    moments: dict[str, Any] = {
        name: (norm.running_mean, norm.running_var)
        for name, norm in norms.items()
        if norm.num_batches_tracked
    }
    return moments


def _chosen(found: FitResult, threshold: float, filters: Sequence[int] | Tensor | None) -> Tensor:
    """Which filters become Gabor functions, boolean ``(filters,)``."""
    n = len(found)
    dead = torch.tensor([outcome is Outcome.BAD_INPUT for outcome in found.outcome])
    if filters is None:
        return (found.explained_variance >= threshold) & ~dead
    numbers = torch.as_tensor(filters).flatten().tolist()
    if any(isinstance(i, (bool, float)) or not 0 <= i < n or dead[i] for i in numbers):
        raise ValueError(
            f"filters must be numbers from 0 to {n - 1} of kernels that are not zero, got "
            f"{numbers[:8]}."
        )
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[numbers] = True
    return chosen


def _converted(
    layer: Any, params: Gabor, chosen: Tensor, learn: Collection[str] | None, mean: Tensor | None
) -> nn.Module:
    """The layer with Gabor functions where they are chosen, on patches of this mean."""
    weight: Tensor = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    if mean is not None and bias is None:
        bias = weight.new_zeros(len(weight))
    with warnings.catch_warnings():  # an envelope that the kernel cuts was cut before
        warnings.simplefilter("ignore")
        gabor = LAYERS[weight.ndim - 2](
            *(layer.in_channels, int(chosen.sum()), layer.kernel_size),
            *(layer.stride, layer.padding, layer.dilation, 1, bias is not None),
            layer.padding_mode,
            device=weight.device,
            dtype=weight.dtype,
            learn=params.field_names() if learn is None else learn,
            start=params,
        )
    if bias is not None:
        if mean is not None:
            change = torch.zeros_like(weight, dtype=torch.float64, device="cpu")
            change[chosen] = weight.cpu().double()[chosen] - gabor.weight.detach().cpu().double()
            bias = bias + (change.flatten(1) @ mean).to(bias)
        gabor.bias = nn.Parameter(bias[chosen].clone())
    if chosen.all():
        return gabor
    order = torch.cat([chosen.nonzero().flatten(), (~chosen).nonzero().flatten()]).argsort()
    free_bias = None if bias is None else bias[~chosen]
    return MixedConv(gabor, weight[~chosen], free_bias=free_bias, order=order)
