"""How well inputs determine a layer's parameters: Fisher information, and what reduces it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gaborium.diagnostics.causes import Finding, by_severity, finding
from gaborium.diagnostics.remedies import recover_code
from gaborium.functions.params import POSITIVE_FIELDS
from gaborium.layers import GABOR_LAYERS, GaborLayer
from gaborium.optim.kernel_family import kernel_jacobian
from gaborium.patches import PatchStatistics

_KNOWN = 1e-6  # share of the response's power: smaller changes count as not visible
_TRADE = 0.9  # correlation of two estimates, above which they trade off
_ILL = 100.0  # factor by which the condition may exceed that on white input
_BORDER = 0.1  # by which the border's share of the power may exceed its share of the patches
_ANGLES = 16  # orientations, over half a turn
_BRIGHT = 20.0  # root mean square of inputs that look like images from 0 to 255


@dataclass(frozen=True, eq=False)
class Identifiability:
    """How well known inputs determine the learned parameters of each filter of a layer.

    The Fisher information belongs to responses ``conv(input, kernel) + bias`` with white noise.
    For the conditions, parameters are scaled to comparable units: rad, the logarithm of positive
    fields and of the amplitude, and for a centre the share of sigma.

    Args:
        names: the learned parameters: fields of the record, with the channel if each channel has
            its own value, such as ``"phase[2]"``; n of them, for each of F filters.
        information: ``(F, n, n)``, in the parameters' own units.
        bounds: Cramér-Rao bounds on the standard deviation of unbiased estimates, ``(F, n)``, in
            the parameters' own units; infinite where the responses do not depend on a parameter.
        correlation: of the estimates, ``(F, n, n)``; NaN where one has no bound.
        condition: of the information, ``(F,)``; infinite if it is singular.
        white_bounds: on white input of the same power, ``(F, n)``.
        white_condition: on white input, ``(F,)``.
        noise: standard deviation of the responses' noise for which the bounds hold, ``(F,)``.
        findings: faults of the inputs, or of the choice of what is learned.
    """

    names: tuple[str, ...]
    information: Tensor
    bounds: Tensor
    correlation: Tensor
    condition: Tensor
    white_bounds: Tensor
    white_condition: Tensor
    noise: Tensor
    findings: list[Finding]

    @property
    def trade_offs(self) -> list[list[tuple[str, str, float]]]:
        """For each filter the pairs of parameters whose estimates correlate above 0.9."""
        found = []
        for table in self.correlation:
            pairs = (table.abs() > _TRADE).triu(1).nonzero().tolist()
            found.append([(self.names[i], self.names[j], table[i, j].item()) for i, j in pairs])
        return found

    def not_identifiable(self, index: int) -> tuple[str, ...]:
        """Parameters of one filter on which the responses do not depend."""
        unknown = self.bounds[index].isinf().tolist()
        return tuple(name for name, lost in zip(self.names, unknown, strict=True) if lost)


def identifiability(
    layer: GaborLayer,
    inputs: Tensor,
    *,
    noise: float | None = None,
    targets: Tensor | None = None,
) -> Identifiability:
    """Compute how well inputs determine the parameters of a Gabor layer, in closed form.

    Args:
        layer: a Gabor layer with a real output.
        inputs: ``(batch, channels, *size)``, as the layer receives them.
        noise: standard deviation of the noise on the responses; by default the deviation of the
            responses from ``targets``, and without targets 1.
        targets: responses, of the layer's outputs' shape. The present parameters should be near
            the right ones, because their error counts as noise.

    Raises:
        TypeError: the layer is not a Gabor layer.
        ValueError: its output is an energy or a quadrature pair, its kernels are dilated, no field
            of the record is learned, or shapes do not agree.

    Example:
        >>> from gaborium import Gabor2d, GaborConv2d
        >>> edge = Gabor2d.of(orientation=0.5, wavelength=6.0, sigma=2.5)
        >>> layer = GaborConv2d(1, 1, 15, start=edge, learn=("orientation", "wavelength"))
        >>> found = identifiability(layer, torch.randn(1, 1, 64, 64), noise=0.1)
        >>> found.names, found.bounds.shape, found.findings
        (('orientation', 'wavelength'), torch.Size([1, 2]), [])
    """
    _check(layer, inputs)
    names, jacobian = kernel_jacobian(layer)
    slopes = jacobian[:, 0].cpu()  # of the one kernel of each filter
    units = _units(layer, names)
    kernels = layer.weight.detach().double().flatten(1).cpu()
    deviation = _deviation(layer, inputs, noise, targets)
    rows, shares = [], []
    for index, kernel in enumerate(kernels):
        if index % (layer.n_filters // layer.groups) == 0:  # a new group of channels
            inside = padded = filter_statistics(layer, index, inputs)
            if layer.padding_mode == "zeros":
                inside = filter_statistics(layer, index, inputs, padded=False)
        rows.append(_judge(layer, kernel, slopes[index], units[index], padded, deviation[index]))
        power = (kernel @ padded.second_moment @ kernel).clamp_min(1e-300)
        mean_share = ((padded.mean @ kernel).square() / power).item()
        shares.append((_border_power(layer, index, padded, inside), mean_share))
    columns = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    found = Identifiability(names=names, noise=deviation, findings=[], **columns)
    findings = _findings(found, layer, inputs, 1 - inside.count / padded.count, shares)
    return replace(found, findings=by_severity(findings))


def _check(layer: GaborLayer, inputs: Tensor) -> None:
    if not isinstance(layer, GABOR_LAYERS):
        raise TypeError(f"identifiability needs a Gabor layer, got {type(layer).__name__}.")
    if layer.output != "real":
        raise ValueError(
            "This needs a layer with output='real', whose responses are linear in one kernel; "
            f"got output={layer.output!r}."
        )
    if not inputs.isfinite().all():
        raise ValueError("inputs must be finite, got NaN or infinity.")
    if inputs.ndim != layer.n_dims + 2 or inputs.shape[1] != layer.in_channels:
        raise ValueError(
            f"inputs must be (batch, {layer.in_channels} channels, {layer.n_dims} axes), got "
            f"shape {tuple(inputs.shape)}."
        )
    if any(step != 1 for step in layer.dilation):
        raise ValueError(f"The kernels must not be dilated, got dilation={layer.dilation}.")


def _deviation(
    layer: GaborLayer, inputs: Tensor, noise: float | None, targets: Tensor | None
) -> Tensor:
    """Standard deviation of the noise on each filter's responses."""
    if noise is not None and not 0 < noise < math.inf:
        raise ValueError(f"noise must be a positive standard deviation, got {noise}.")
    if noise is not None or targets is None:
        return torch.full((layer.n_filters,), noise or 1.0, dtype=torch.float64)
    outputs = layer(inputs).detach()
    if targets.shape != outputs.shape:
        raise ValueError(
            f"targets must have the outputs' shape {tuple(outputs.shape)}, got "
            f"{tuple(targets.shape)}."
        )
    error = (outputs - targets).double().square()
    return error.transpose(0, 1).flatten(1).mean(1).sqrt().cpu()


def filter_statistics(
    layer: GaborLayer,
    index: int,
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    padded: bool = True,
) -> PatchStatistics:
    """Statistics of one filter's patches, and of its targets less its bias."""
    n_inputs = layer.in_channels // layer.groups
    group = index // (layer.out_channels // layer.groups)
    own = inputs[:, group * n_inputs : (group + 1) * n_inputs].detach().double()
    answer = None
    if targets is not None:
        answer = targets[:, index : index + 1].detach().double()
        if layer.bias is not None:
            answer = answer - layer.bias[index].detach().double()
    statistics = PatchStatistics(
        layer.kernel_size, n_channels=n_inputs, n_outputs=int(targets is not None),
        stride=layer.stride,
    )  # fmt: skip
    statistics.add(layer.padded(own) if padded else own, answer)
    return statistics


# -- one filter ---------------------------------------------------------------------------------


def _units(layer: GaborLayer, names: tuple[str, ...]) -> Tensor:
    """The unit in which each parameter is compared with others, ``(filters, parameters)``."""
    fields = layer.params.detach().to(torch.float64).expand().as_dict()
    columns = []
    for name in names:
        field, _, channel = name.rstrip("]").partition("[")
        unit = torch.ones_like(fields["sigma"])
        if field in (*POSITIVE_FIELDS, "amplitude"):
            unit = fields[field].abs()
        elif field.startswith("center"):
            unit = fields["sigma"]
        # A blob's wavelength is infinite, a silent channel's amplitude is 0.
        unit = torch.where(unit.isfinite() & (unit > 0), unit, 1.0)
        columns.append(unit[:, int(channel or 0)])
    return torch.stack(columns, 1).cpu()


def _judge(
    layer: GaborLayer,
    kernel: Tensor,
    J: Tensor,
    unit: Tensor,
    patches: PatchStatistics,
    noise: Tensor,
) -> dict[str, Tensor]:
    """Information about one filter."""
    # A learned bias absorbs the mean, which then carries no information.
    C = patches.covariance if layer.bias is not None else patches.second_moment
    scaled = J * unit[:, None]
    covariance, condition = _inverse(scaled @ C @ scaled.T, kernel @ C @ kernel)
    # White input of the same power has the same variance in every pixel, and no mean.
    power = C.diagonal().mean()
    white, white_condition = _inverse(power * scaled @ scaled.T, power * kernel.square().sum())
    deviation = covariance.diagonal().sqrt()
    root = math.sqrt(patches.count)
    return {
        "information": J @ C @ J.T * patches.count / noise.clamp_min(1e-30).square(),
        "bounds": deviation * unit / root * noise,
        "correlation": covariance / deviation.outer(deviation),
        "condition": condition,
        "white_bounds": white.diagonal().sqrt() * unit / root * noise,
        "white_condition": white_condition,
    }


def _inverse(information: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance of the estimates, infinite for unknown ones, and the condition."""
    values, vectors = torch.linalg.eigh(information)
    known = values > _KNOWN * power
    inverse = torch.where(known, values.clamp_min(1e-300).reciprocal(), 0.0)
    covariance = (vectors * inverse) @ vectors.T
    lost = vectors[:, ~known].square().sum(1) > 1e-4
    covariance[lost, :] = covariance[:, lost] = math.inf
    condition = values[-1] / values[0] if known.all() else values.new_tensor(math.inf)
    return covariance, condition


def _border_power(
    layer: GaborLayer, index: int, padded: PatchStatistics, inside: PatchStatistics
) -> float:
    """The border's largest share of the responses' power, over all orientations of the filter.

    At its present orientation the filter may not see the edge that the padding makes.
    """
    params = layer.params.detach().to(torch.float64)
    fields = {n: v[index].expand(_ANGLES, *v.shape[1:]) for n, v in params.as_dict().items()}
    if "orientation" in fields:
        angles = torch.arange(_ANGLES, dtype=torch.float64) * (math.pi / _ANGLES)
        fields["orientation"] = fields["orientation"] + angles[:, None].to(params.device)
    turned = layer.raw_coordinates.to_raw(type(params)(**fields))
    kernels = layer.kernels_at(turned).flatten(1).cpu()
    whole, rest = (
        ((kernels @ patches.second_moment) * kernels).sum(1) * patches.count
        for patches in (padded, inside)
    )
    return (1 - rest / whole.clamp_min(1e-300)).clamp(0, 1).max().item()


# -- findings -----------------------------------------------------------------------------------


def _findings(
    found: Identifiability,
    layer: GaborLayer,
    inputs: Tensor,
    border_area: float,
    shares: list[tuple[float, float]],
) -> Iterator[Finding]:
    rms = inputs.detach().double().square().mean().sqrt().item()
    if rms > _BRIGHT:
        yield finding("image scale", input_rms=rms)
    for index, (power, mean) in enumerate(shares):
        about: Any = partial(finding, location=(index,), filter=str(index))
        lost = found.not_identifiable(index)
        if lost:
            code = _freezing_code(layer, lost)
            yield finding(
                "not identifiable", lost, remedy=code, n_lost=len(lost), filter=float(index)
            )
        condition, white = found.condition[index].item(), found.white_condition[index].item()
        if _ILL * white < condition < math.inf:
            code = recover_code(layer) or ""
            numbers = {"condition": condition, "white_condition": white}
            yield about("ill-conditioned input", remedy=code, **numbers)
        if power > border_area + _BORDER:
            numbers = {"border_power": power, "border_area": border_area}
            yield about("zero padding", remedy=_cutting_code(layer), **numbers)
        if mean > 0.5:
            yield about("image mean", mean_share=mean)
        for one, other, r in found.trade_offs[index]:
            yield finding("trade-off", (one, other), filter=str(index), correlation=r)


def _cutting_code(layer: GaborLayer) -> str:
    """Code that leaves responses at the border out of the loss."""
    border = layer.border()[::-1]  # after and before, first axis first
    cuts = []
    for axis, stride in enumerate(layer.stride):
        last, first = (-(-n // stride) for n in border[2 * axis : 2 * axis + 2])
        cuts.append(f"{first}:{-last or None}")
    inner = f"[..., {', '.join(cuts)}]"
    return f"whole = loss\nloss = lambda output, target: whole(output{inner}, target{inner})\n"


def _freezing_code(layer: GaborLayer, names: Iterable[str]) -> str:
    """Code that excludes parameters from learning."""
    lost = {"center" if name.startswith("center") else name.partition("[")[0] for name in names}
    return "".join(
        f'module.get_parameter("{raw}").requires_grad_(False)\n'
        for raw, fields in layer.raw_coordinates.raw_fields().items()
        if not lost.isdisjoint(fields)
    )
