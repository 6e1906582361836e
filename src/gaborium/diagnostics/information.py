"""What inputs can tell about a layer's parameters: Fisher information, and what it is lost to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gaborium.diagnostics.causes import Finding, Severity, by_severity
from gaborium.diagnostics.sandbox import check_inputs
from gaborium.diagnostics.views import (
    GaborLayer,
    filter_moments,
    find_gabor_layer,
    is_plain,
    kernel_slopes,
    recover_arguments,
)
from gaborium.params import POSITIVE_FIELDS, Gabor
from gaborium.patches import PatchStatistics

_SEEN = 1e-6  # of the response's own power: what changes it less is not seen
_TRADE = 0.9  # correlation of two estimates, above which they trade off
_ILL = 100.0  # times worse conditioned than on white input
_BORDER = 0.1  # by which the border's share of the power may exceed its share of the patches
_TURNS = 16  # orientations, over half a turn
_BRIGHT = 20.0  # root mean square of inputs, above which they are taken for 0...255 images


@dataclass(frozen=True, eq=False)
class Identifiability:
    """How well known inputs determine the learned parameters of each filter of a layer.

    The Fisher information is that of responses ``conv(input, kernel) + bias`` with white noise.
    Conditions are those of the information in units in which parameters compare: rad, the
    logarithm of positive fields and of the amplitude, and for a centre its share of sigma.

    Args:
        names: the learned parameters: fields of the record, with the channel for those that each
            channel has of its own, such as ``"phase[2]"``; n of them, for each of F filters.
        information: ``(F, n, n)``, in the parameters' own units.
        bounds: Cramér-Rao bounds on the standard deviation of unbiased estimates, ``(F, n)``, in
            the parameters' own units; infinite where nothing is known.
        correlation: of the estimates, ``(F, n, n)``; NaN where one has no bound.
        condition: of the information, ``(F,)``; infinite if it is singular.
        white_bounds: on white input of the same power, ``(F, n)``.
        white_condition: on white input, ``(F,)``.
        valid_condition: if the images were not padded, ``(F,)``.
        noise: standard deviation of the responses' noise for which the bounds hold, ``(F,)``.
        border_share: share of the information about each parameter that comes from patches which
            reach into the padding, ``(F, n)``.
        border_area: share of such patches.
        border_power: the largest share of the responses' power that comes from such patches, over
            all orientations that the filter may take, ``(F,)``.
        mean_share: share of the responses' power that is the image's mean, ``(F,)``.
        input_rms: root mean square of the inputs.
        has_zeros: whether there is a padding, of zeros.
        layer_name: the Gabor layer's name within the module, ``""`` for the module itself.
        remedies: code, by cause.
    """

    names: tuple[str, ...]
    information: Tensor
    bounds: Tensor
    correlation: Tensor
    condition: Tensor
    white_bounds: Tensor
    white_condition: Tensor
    valid_condition: Tensor
    noise: Tensor
    border_share: Tensor
    border_area: float
    border_power: Tensor
    mean_share: Tensor
    input_rms: float
    has_zeros: bool
    layer_name: str
    remedies: dict[str, str]

    @property
    def trade_offs(self) -> list[list[tuple[str, str, float]]]:
        """For each filter the pairs of parameters whose estimates correlate above 0.9."""
        found = []
        for table in self.correlation:
            pairs = (table.abs() > _TRADE).triu(1).nonzero().tolist()
            found.append([(self.names[i], self.names[j], table[i, j].item()) for i, j in pairs])
        return found

    def not_identifiable(self, index: int) -> tuple[str, ...]:
        """Parameters of one filter that the responses say nothing about."""
        unknown = self.bounds[index].isinf().tolist()
        return tuple(name for name, lost in zip(self.names, unknown, strict=True) if lost)

    @property
    def findings(self) -> list[Finding]:
        """What about the inputs, or about what is learned, stands in the way."""
        return by_severity(_findings(self))


def identifiability(
    layer: nn.Module,
    inputs: Tensor,
    *,
    noise: float | None = None,
    targets: Tensor | None = None,
) -> Identifiability:
    """Ask how well inputs determine the parameters of a Gabor layer, in closed form.

    Args:
        layer: a Gabor layer with a real output, or a module whose first layer it is.
        inputs: ``(batch, channels, *size)``, as the layer is given them.
        noise: standard deviation of the noise on the responses; by default what ``targets``
            leave, and without them 1.
        targets: responses, of the layer's outputs' shape. The noise is estimated from what the
            present parameters leave of them, so they should be near.

    Raises:
        ValueError: there is no Gabor layer, its output is an energy or a quadrature pair, its
            kernels are dilated, nothing of the record is learned, or shapes do not agree.

    Example:
        >>> from gaborium import Gabor2d, GaborConv2d
        >>> edge = Gabor2d.of(orientation=0.5, wavelength=6.0, sigma=2.5)
        >>> layer = GaborConv2d(1, 1, 15, start=edge, learn=("orientation", "wavelength"))
        >>> found = identifiability(layer, torch.randn(1, 1, 64, 64), noise=0.1)
        >>> found.names, found.bounds.shape, found.findings
        (('orientation', 'wavelength'), torch.Size([1, 2]), [])
    """
    name, inner = find_gabor_layer(layer)
    if inner is None:
        raise ValueError(f"There is no Gabor layer in this {type(layer).__name__}.")
    _check(inner, inputs, noise, targets)
    names, slopes = kernel_slopes(inner)
    scales = _scales(inner, names)
    kernels = inner.weight.detach().double().flatten(1).cpu()
    rows = []
    for index in range(inner.n_filters):
        padded = filter_moments(inner, index, inputs, None)
        inside = filter_moments(inner, index, inputs, None, padded=False)
        deviation = _noise(inner, index, inputs, noise, targets)
        rows.append(_judge(inner, kernels[index], slopes[index], scales[index], padded, inside))
        rows[-1]["border_power"] = _border_power(inner, index, padded, inside)
        rows[-1]["noise"] = torch.tensor(deviation)
        rows[-1]["bounds"] = rows[-1]["bounds"] * deviation
        rows[-1]["white_bounds"] = rows[-1]["white_bounds"] * deviation
        rows[-1]["information"] = rows[-1]["information"] / max(deviation, 1e-30) ** 2
    whole = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    border = 1 - inside.count / padded.count
    return Identifiability(
        names=names,
        information=whole["information"],
        bounds=whole["bounds"],
        correlation=whole["correlation"],
        condition=whole["condition"],
        white_bounds=whole["white_bounds"],
        white_condition=whole["white_condition"],
        valid_condition=whole["valid_condition"],
        noise=whole["noise"],
        border_share=whole["border_share"],
        border_area=border,
        border_power=whole["border_power"],
        mean_share=whole["mean_share"],
        input_rms=inputs.detach().double().square().mean().sqrt().item(),
        has_zeros=inner.padding_mode == "zeros" and border > 0,
        layer_name=name,
        remedies=_remedies(name, inner, names, inputs, targets),
    )


def _check(layer: GaborLayer, inputs: Tensor, noise: float | None, targets: Tensor | None) -> None:
    check_inputs(layer, inputs)
    if inputs.ndim != layer.n_dims + 2 or inputs.shape[1] != layer.in_channels:
        raise ValueError(
            f"inputs must be (batch, {layer.in_channels} channels, {layer.n_dims} axes), got "
            f"shape {tuple(inputs.shape)}."
        )
    if any(step != 1 for step in layer.dilation):
        raise ValueError(f"The kernels must not be dilated, got dilation={layer.dilation}.")
    if noise is not None and not 0 < noise < math.inf:
        raise ValueError(f"noise must be a positive standard deviation, got {noise}.")
    if not inputs.isfinite().all():
        raise ValueError("inputs must be finite, got NaN or infinity.")
    if targets is not None:
        with torch.no_grad():
            shape = layer(inputs).shape
        if targets.shape != shape:
            raise ValueError(
                f"targets must have the outputs' shape {tuple(shape)}, got {tuple(targets.shape)}."
            )


def _scales(layer: GaborLayer, names: tuple[str, ...]) -> Tensor:
    """What a unit of each parameter is, ``(filters, parameters)``, to compare them in."""
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


def _noise(
    layer: GaborLayer, index: int, inputs: Tensor, noise: float | None, targets: Tensor | None
) -> float:
    if noise is not None:
        return noise
    if targets is None:
        return 1.0
    with torch.no_grad():
        left = (layer(inputs) - targets)[:, index].double()
    return left.square().mean().sqrt().item()


def _judge(
    layer: GaborLayer,
    kernel: Tensor,
    J: Tensor,
    scale: Tensor,
    padded: PatchStatistics,
    inside: PatchStatistics,
) -> dict[str, Tensor]:
    """What is known of one filter for noise of standard deviation 1."""

    def metric(moments: PatchStatistics) -> Tensor:
        # A bias that learns takes up the mean, which then tells nothing.
        return moments.covariance if layer.bias is not None else moments.second_moment

    unit = J * scale[:, None]
    seen, valid = (unit @ metric(moments) @ unit.T for moments in (padded, inside))
    # White input of the same power has the same variance in every pixel, and no mean.
    per_pixel = metric(padded).diagonal().mean()
    white = per_pixel * unit @ unit.T
    power, white_power = kernel @ metric(padded) @ kernel, per_pixel * kernel.square().sum()
    valid_power = kernel @ metric(inside) @ kernel

    covariance, condition = _inverse(seen, power)
    white_covariance, white_condition = _inverse(white, white_power)
    deviation = covariance.diagonal().sqrt()
    whole, rest = (
        (unit @ moments.second_moment @ unit.T).diagonal() * moments.count
        for moments in (padded, inside)
    )
    constant = (padded.mean @ kernel).square()
    return {
        "information": J @ metric(padded) @ J.T * padded.count,
        "bounds": deviation * scale / math.sqrt(padded.count),
        "correlation": covariance / deviation.outer(deviation),
        "condition": condition,
        "white_bounds": white_covariance.diagonal().sqrt() * scale / math.sqrt(padded.count),
        "white_condition": white_condition,
        "valid_condition": _inverse(valid, valid_power)[1],
        "border_share": (1 - rest / whole.clamp_min(1e-300)).clamp(0, 1),
        "mean_share": constant / (kernel @ padded.second_moment @ kernel).clamp_min(1e-300),
    }


def _border_power(
    layer: GaborLayer, index: int, padded: PatchStatistics, inside: PatchStatistics
) -> Tensor:
    """The border's largest share of the responses' power as the filter turns around.

    The filter as it stands may not see the edge that the padding makes; turned along it, it does.
    """
    params: Gabor = layer.params.detach().to(torch.float64)[index]
    fields = {n: v.expand(_TURNS, *v.shape) for n, v in params.as_dict().items()}
    if "orientation" in fields:
        turns = torch.arange(_TURNS, dtype=torch.float64, device=params.device) * (math.pi / _TURNS)
        fields["orientation"] = fields["orientation"] + turns[:, None]
    if layer.geometry == "filter":
        shared = [name for name in fields if name not in ("phase", "amplitude")]
        fields |= {name: fields[name][:, :1] for name in shared}
    params = type(params)(**fields)
    with torch.no_grad():
        kernels = layer.kernels_at(layer.raw_coordinates.to_raw(params)).flatten(1).cpu()
    whole, rest = (
        ((kernels @ moments.second_moment) * kernels).sum(1) * moments.count
        for moments in (padded, inside)
    )
    return (1 - rest / whole.clamp_min(1e-300)).clamp(0, 1).max()


def _inverse(information: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance of the estimates, infinite for what is unknown, and the condition."""
    values, vectors = torch.linalg.eigh(information)
    known = values > _SEEN * power
    inverse = torch.where(known, values.clamp_min(1e-300).reciprocal(), 0.0)
    covariance = (vectors * inverse) @ vectors.T
    lost = vectors[:, ~known].square().sum(1) > 1e-4
    covariance[lost, :] = covariance[:, lost] = math.inf
    condition = values[-1] / values[0] if known.all() else values.new_tensor(math.inf)
    return covariance, condition


# -- findings -----------------------------------------------------------------------------------


def _remedies(
    name: str, layer: GaborLayer, names: tuple[str, ...], inputs: Tensor, targets: Tensor | None
) -> dict[str, str]:
    """Code by cause; for what is not identifiable, by the parameter's name."""
    held = layer.raw_coordinates.raw_fields()
    prefix = name and name + "."
    remedies = {}
    for parameter in names:
        field = "center" if parameter.startswith("center") else parameter.partition("[")[0]
        remedies[parameter] = "\n".join(
            f'module.get_parameter("{prefix}{raw}").requires_grad_(False)'
            for raw, fields in held.items()
            if field in fields
        )
    axes = (0, *range(2, inputs.ndim))
    both = targets is not None
    remedies["image scale"] = "scale = inputs.std()\ninputs = inputs / scale"
    remedies["image mean"] = f"inputs = inputs - inputs.mean({axes}, keepdim=True)"
    if both:
        remedies["image scale"] += "\ntargets = targets / scale"
        remedies["image mean"] += f"\ntargets = targets - targets.mean({axes}, keepdim=True)"
    border = layer.border()[::-1]  # after and before, first axis first
    cuts = []
    for axis in range(layer.n_dims):
        after, before = border[2 * axis], border[2 * axis + 1]
        first, last = (-(-n // layer.stride[axis]) for n in (before, after))
        cuts.append(f"{first}:{-last or None}")
    inner = f"[..., {', '.join(cuts)}]"
    remedies["zero padding"] = (
        f"whole = loss\nloss = lambda output, target: whole(output{inner}, target{inner})"
    )
    arguments = recover_arguments(layer) if is_plain(layer) and not name else None
    if arguments is not None:
        remedies["ill-conditioned input"] = (
            "from gaborium import recover\n"
            "module.params = recover(\n"
            f"    inputs, targets, module.kernel_size{arguments}\n"
            ").params"
        )
    return remedies


def _findings(found: Identifiability) -> list[Finding]:
    findings = []
    if found.input_rms > _BRIGHT:
        findings.append(
            Finding(
                "image scale",
                Severity.SEVERE,
                f"The inputs' values are large, {found.input_rms:.3g} in the mean, as of images "
                "from 0 to 255: curvatures grow with their square, and a usual step is far too "
                "long.",
                {"input_rms": found.input_rms},
                found.remedies["image scale"],
            )
        )
    for index in range(len(found.bounds)):
        findings += _findings_of_filter(found, index)
    return findings


def _findings_of_filter(found: Identifiability, index: int) -> list[Finding]:
    findings = []
    lost = found.not_identifiable(index)
    if lost:
        remedy = "\n".join(dict.fromkeys(found.remedies[name] for name in lost))
        findings.append(
            Finding(
                "not identifiable",
                Severity.SEVERE,
                f"The responses of filter {index} do not depend on {', '.join(lost)}, or only "
                "together with another of them: there is nothing to learn them from.",
                {"n_lost": float(len(lost)), "filter": float(index)},
                remedy,
                lost,
            )
        )
    condition = found.condition[index].item()
    white = found.white_condition[index].item()
    if condition < math.inf and condition > _ILL * white:
        findings.append(
            Finding(
                "ill-conditioned input",
                Severity.WARNING,
                f"These inputs determine some parameters of filter {index} much worse than others: "
                f"the condition is {condition:.3g}, and {white:.3g} on white input.",
                {"condition": condition, "white_condition": white},
                found.remedies.get("ill-conditioned input", ""),
                (str(index),),
                0.5,
            )
        )
    border = found.border_power[index].item()
    if found.has_zeros and border > found.border_area + _BORDER:
        findings.append(
            Finding(
                "zero padding",
                Severity.WARNING,
                "Images whose mean is not 0 end in an edge where they are padded with zeros: "
                f"turned along it, filter {index} gets {border:.0%} of its response from the "
                f"{found.border_area:.0%} of patches at the border. That adds minima to the loss.",
                {"border_power": border, "border_area": found.border_area},
                found.remedies["zero padding"],
                (str(index),),
                0.8,
            )
        )
    mean = found.mean_share[index].item()
    if mean > 0.5:
        findings.append(
            Finding(
                "image mean",
                Severity.WARNING,
                f"{mean:.0%} of the power of filter {index}'s responses is the mean of the inputs: "
                "brightness drowns the pattern.",
                {"mean_share": mean},
                found.remedies["image mean"],
                (str(index),),
                0.6,
            )
        )
    for one, other, r in found.trade_offs[index]:
        findings.append(
            Finding(
                "trade-off",
                Severity.NOTE,
                f"Errors of filter {index}'s {one} and {other} go together (correlation {r:.2f}): "
                "one makes up for the other.",
                {"correlation": r},
                "",
                (one, other),
                0.3,
            )
        )
    return findings
