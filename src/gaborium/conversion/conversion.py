"""The same network with Gabor functions in its first convolution, where they are good enough."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gaborium.conversion.first_conv import find_first_conv, replace_first_conv
from gaborium.conversion.measures import geometry
from gaborium.fitting import FitResult, Outcome, fit
from gaborium.layers import GABOR_LAYERS, LAYERS, MixedConv
from gaborium.optim.quadratic import Metric
from gaborium.params import Gabor, plain
from gaborium.patches import patch_moments, sample_patches

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# A direction that no patch has must not become free to choose.
_DAMPING = 1e-4
_LONGEST = 4.0  # sizes of the kernel, of waves and envelopes


@dataclass(frozen=True, eq=False)
class Conversion:
    """A converted network, and what the conversion cost.

    Args:
        model: the network with Gabor filters, a copy.
        name: of the layer in it that was converted.
        is_gabor: which filters are Gabor functions now, boolean ``(filters,)``.
        kernels: the fit of the kernels as they are, one entry per filter.
        responses: the fit of their responses to the images, if there were any.
        response_error: root of the mean squared difference of each filter's responses to the
            images before and after, over their standard deviation, ``(filters,)``; 0 where the
            filter stayed.
        output_error: the same of the network's outputs, all together; ``nan`` where they are no
            tensor.
        n_first_parameters: numbers that the layer can learn, before and after; those of a network
            that was frozen count too.
        threshold: what a filter's Gabor function had to explain; ``None`` where filters were named.
    """

    model: nn.Module
    name: str
    is_gabor: Tensor
    kernels: FitResult
    responses: FitResult | None
    response_error: Tensor | None
    output_error: float | None
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
        chosen = self.is_gabor
        fields = {name: value[chosen] for name, value in self.fit.params.as_dict().items()}
        return type(self.fit.params)(**fields)

    def __repr__(self) -> str:
        """A line: how many filters, and what is saved."""
        before, after = self.n_first_parameters
        return (
            f"Conversion({int(self.is_gabor.sum())} of {len(self.is_gabor)} filters of "
            f"{self.name or 'the layer'!r}: {before} numbers become {after})"
        )

    def to_table(self) -> list[dict[str, Any]]:
        """A row per filter: whether it is a Gabor function now, what it explains, its geometry.

        ``explained_variance`` is of the kernel by the Gabor function nearest to it,
        ``explained_response`` of the responses by the one nearest to them; the geometry is that of
        the Gabor function that replaces the filter, or would.
        """
        rows = []
        for i, (outcome, fields) in enumerate(
            zip(self.fit.outcome, geometry(self.fit.params), strict=True)
        ):
            row = {
                "filter": i,
                "is_gabor": bool(self.is_gabor[i]),
                "outcome": outcome.name,
                "explained_variance": self.kernels.explained_variance[i].item(),
            }
            if self.responses is not None and self.response_error is not None:
                row["explained_response"] = self.responses.explained_variance[i].item()
                row["response_error"] = self.response_error[i].item()
            rows.append(row | fields)
        return rows

    def to_json(self, *, indent: int | None = None) -> str:
        """All that was found as JSON text; infinities and missing numbers are inf and nan."""
        document = {
            "name": self.name,
            "threshold": self.threshold,
            "n_first_parameters": self.n_first_parameters,
            "output_error": self.output_error,
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
    fold_norm: bool = False,
    adapt_norms: bool = True,
    learn: Collection[str] | None = None,
    n_starts: int = 12,
    seed: int = 0,
) -> Conversion:
    """Replace the filters of a network's first convolution by Gabor functions.

    Convention:
        - every filter keeps its place among the channels; those that no Gabor function explains
          well enough stay as they are, in one ``MixedConv`` beside the Gabor functions
        - with ``calibrate`` the error of the *responses* to these images is made small, otherwise
          that of the kernels; the bias then takes care of what is left of each response's mean,
          and batch norms of what became of the spread: a Gabor function that explains a share of
          a response varies less
        - one geometry per filter, centre included, and an amplitude and a phase per channel

    Args:
        model: any network; it is not changed.
        calibrate: images as the network takes them, ``(batch, channels, *size)``, or an iterable
            of such batches.
        threshold: share of a filter's variance (of its responses' where there are images) that
            its Gabor function must explain, in [0, 1]; with 0 all filters are converted that are
            not silent.
        filters: which filters to convert, by number, whatever they explain; such as
            ``census(model).filters("gabor")``.
        name: of the layer, as ``model.get_submodule`` takes it; by default the first convolution.
        fold_norm: fold the batch norm that follows the layer into it first; it becomes an
            identity. By default it is kept.
        adapt_norms: with ``calibrate``, move the running statistics of all batch norms by as much
            as the conversion moves their inputs' on these images.
        learn: fields that train later; by default all, the centre included.
        n_starts: of the search, as for ``fit``.
        seed: of the choice of patches.

    Returns:
        The converted copy in the same training mode, with a report.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no suitable convolution, one with groups, or one with kernels that are
            not finite; or an argument is out of range, or there is no batch norm to fold.

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
    if fold_norm:
        whole = _folded(whole, place)
    layer: Any = whole.get_submodule(place)
    weight = _kernels(layer, place)
    n_dims = weight.ndim - 2
    # An edge may also be an all but endless wave of all but endless amplitude, but that cannot be
    # trained: a step that is nothing to one of them is far too much for the other.
    longest = _LONGEST * max(weight.shape[2:])
    options: dict[str, Any] = {
        "bounds": {"wavelength": (0.0, longest), "sigma": (0.0, longest)},
        "n_dims": n_dims, "geometry": "filter", "center": True, "n_starts": n_starts,
    }  # fmt: skip
    kernels = responses = fit(weight, **options)
    seen = None if calibrate is None else _Seen(whole, place, calibrate, seed)
    if seen is not None:
        responses = fit(weight, metric=seen.metric(), **options)
    chosen = _chosen(responses, threshold, filters)
    result = whole
    if chosen.any():
        new = _converted(layer, weight, responses.params, chosen, learn, seen)
        result = replace_first_conv(whole, new, place)
        if seen is not None and adapt_norms:
            _adapt_norms(whole, result, seen.batches)
    converted: Any = result.get_submodule(place)
    error = output_error = None
    if seen is not None:
        error = seen.error(weight, converted.weight.detach().cpu().double())
        output_error = seen.output_error(model, result)
    return Conversion(
        model=result,
        name=place,
        is_gabor=chosen,
        kernels=kernels,
        responses=None if seen is None else responses,
        response_error=error,
        output_error=output_error,
        n_first_parameters=(_n_parameters(found), _n_parameters(converted)),
        threshold=threshold if filters is None else None,
    )


def _n_parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


class _Seen:
    """What a layer sees of some images: mean and covariance of its patches."""

    def __init__(
        self, network: nn.Module, name: str, images: Tensor | Iterable[Tensor], seed: int
    ) -> None:
        self.batches = [images] if isinstance(images, Tensor) else list(images)
        if not self.batches:
            raise ValueError("calibrate needs at least one batch of images, got none.")
        inputs: list[Tensor] = []
        trial = copy.deepcopy(network).eval()
        trial.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments: inputs.append(arguments[0].detach())
        )
        with torch.no_grad():
            for batch in self.batches:
                trial(batch)
        if not inputs:
            raise ValueError(f"The network does not run {name!r} on these images.")
        layer: Any = network.get_submodule(name)
        twin = LAYERS[layer.weight.ndim - 2](
            *(layer.in_channels, 1, layer.kernel_size, layer.stride, layer.padding),
            dilation=layer.dilation,
            padding_mode=layer.padding_mode,
        )
        draw = torch.Generator().manual_seed(seed)
        drawn = torch.cat([sample_patches(twin, part, draw) for part in inputs]).cpu().double()
        if not drawn.isfinite().all():
            raise ValueError("calibrate must lead to finite inputs, got NaN or infinity.")
        mean, second = patch_moments(drawn)
        self.mean = mean[0]
        self.covariance = second[0] - self.mean.outer(self.mean)
        if not self.covariance.diagonal().mean() > 1e-12 * second[0].diagonal().mean():
            raise ValueError(
                "calibrate must hold images with structure: in constant ones all kernels of the "
                "same sum respond alike."
            )

    def metric(self) -> Tensor:
        """The covariance, and a little of every pixel."""
        return Metric.damped(self.covariance[None], _DAMPING).covariance[0]

    def shift(self, change: Tensor) -> Tensor:
        """How much kernels ``(filters, channels, *size)`` change the responses' means."""
        return change.flatten(1) @ self.mean

    def error(self, weight: Tensor, new: Tensor) -> Tensor:
        """Root mean squared difference of the responses over their deviation, ``(filters,)``."""
        metric = Metric(self.covariance[None])
        whole, left = (metric.length(k.flatten(1)[:, None]) for k in (weight, weight - new))
        return left / whole.clamp_min(1e-150)

    @torch.no_grad()
    def output_error(self, old: nn.Module, new: nn.Module) -> float:
        """The same of what two networks return, over all their outputs."""
        left = power = 0.0
        before, after = (copy.deepcopy(one).eval() for one in (old, new))
        for batch in self.batches:
            was, now = before(batch), after(batch)
            if not isinstance(was, Tensor):
                was, now = getattr(was, "logits", None), getattr(now, "logits", None)
            if was is None or now is None:
                return math.nan
            left += (now - was).double().square().sum().item()
            power += (was - was.mean(0)).double().square().sum().item()
        return math.sqrt(left / power) if power > 0 else math.nan


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
    weight: Tensor = layer.weight.detach().cpu().double()
    if not weight.isfinite().all():
        bad = int((~weight.flatten(1).isfinite().all(1)).sum())
        raise ValueError(
            f"{what} must have finite kernels, got NaN or infinity in {bad} of {len(weight)}."
        )
    return weight


def _folded(network: nn.Module, name: str) -> nn.Module:
    """The network, with the batch norm behind a convolution folded into it."""
    conv: Any = network.get_submodule(name)
    parts = [(at, part) for at, part in network.named_modules() if not any(part.children())]
    behind = parts[[at for at, _ in parts].index(name) + 1 :]
    norm: Any = None
    for at, part in behind:
        if isinstance(part, _NORMS) and part.num_features == conv.out_channels:
            norm, place = part, at
        break
    if norm is None or norm.running_mean is None:
        raise ValueError(
            f"fold_norm needs a batch norm with running statistics right behind {name!r}, and "
            "there is none; leave it out."
        )
    conv.weight, conv.bias = torch.nn.utils.fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    parent, _, last = place.rpartition(".")
    setattr(network.get_submodule(parent), last, nn.Identity())
    return network


def _adapt_norms(old: nn.Module, new: nn.Module, batches: Sequence[Any]) -> None:
    """Move running statistics by the change of what two networks' batch norms see."""
    before, after = (_norm_inputs(one, batches) for one in (old, new))
    for name, (mean, variance) in before.items():
        norm: Any = new.get_submodule(name)
        new_mean, new_variance = after[name]
        norm.running_mean += new_mean - mean
        # Differences and ratios, because the images' own statistics are those of a few.
        norm.running_var *= torch.where(variance > 0, new_variance / variance, 1.0)


@torch.no_grad()
def _norm_inputs(network: nn.Module, batches: Sequence[Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of what each batch norm sees, where those before it use the batch's own."""
    trial = copy.deepcopy(network).eval()
    norms = {
        name: part
        for name, part in trial.named_modules()
        if isinstance(part, _NORMS) and part.running_mean is not None
    }
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # all batches count alike
        norm.train()
    try:
        for batch in batches:
            trial(batch)
    except ValueError as error:  # torch's, of a batch that has one value of a channel
        warnings.warn(
            f"Batch norms keep their statistics, since {error}; calibrate with larger batches.",
            stacklevel=4,
        )
        return {}
    seen: dict[str, Any] = {
        name: (norm.running_mean, norm.running_var)
        for name, norm in norms.items()
        if norm.num_batches_tracked
    }
    return seen


def _chosen(found: FitResult, threshold: float, filters: Sequence[int] | Tensor | None) -> Tensor:
    """Which filters become Gabor functions, boolean ``(filters,)``."""
    n = len(found)
    dead = torch.tensor([outcome is Outcome.BAD_INPUT for outcome in found.outcome])
    if filters is None:
        return (found.explained_variance >= threshold) & ~dead
    numbers = torch.as_tensor(filters).flatten().tolist()
    if any(isinstance(i, (bool, float)) or not 0 <= i < n for i in numbers):
        raise ValueError(f"filters must be numbers from 0 to {n - 1}, got {numbers[:8]}.")
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[numbers] = True
    if (chosen & dead).any():
        first = int((chosen & dead).nonzero()[0])
        raise ValueError(f"filters must not name silent kernels: number {first} is zero.")
    return chosen


def _converted(
    layer: Any,
    weight: Tensor,
    params: Gabor,
    chosen: Tensor,
    learn: Collection[str] | None,
    seen: _Seen | None,
) -> nn.Module:
    """The layer with Gabor functions where they are chosen."""
    fields = {name: value[chosen] for name, value in params.as_dict().items()}
    bias = None if layer.bias is None else layer.bias.detach()
    if seen is not None and bias is None:
        bias = layer.weight.new_zeros(len(weight))
    with warnings.catch_warnings():  # an envelope that the kernel cuts was cut before
        warnings.simplefilter("ignore")
        gabor = LAYERS[weight.ndim - 2](
            *(layer.in_channels, int(chosen.sum()), layer.kernel_size),
            *(layer.stride, layer.padding, layer.dilation, 1, bias is not None),
            layer.padding_mode,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
            learn=params.field_names() if learn is None else learn,
            start=type(params)(**fields),
        )
    if bias is not None:
        if seen is not None:
            change = torch.zeros_like(weight)
            change[chosen] = weight[chosen] - gabor.weight.detach().cpu().double()
            bias = bias + seen.shift(change).to(bias)
        gabor.bias = nn.Parameter(bias[chosen].clone())
    if chosen.all():
        return gabor
    numbers = torch.cat([chosen.nonzero().flatten(), (~chosen).nonzero().flatten()])
    return MixedConv(
        gabor,
        layer.weight.detach()[~chosen],
        free_bias=None if bias is None else bias[~chosen],
        order=numbers.argsort(),
    )
