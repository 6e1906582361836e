"""What the diagnoses see of a Gabor layer: its patches, its kernels' slopes, its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gaborium.kernels import gabor_jacobian
from gaborium.layers import GABOR_LAYERS, GaborConv1d, GaborConv2d, GaborConv3d
from gaborium.patches import PatchStatistics

GaborLayer = GaborConv1d | GaborConv2d | GaborConv3d
_AXES = ("x", "y", "z")


def find_gabor_layer(module: nn.Module) -> tuple[str, GaborLayer | None]:
    """The first Gabor layer in a module, and its name; ``""`` is the module itself."""
    for name, part in module.named_modules():
        if isinstance(part, GABOR_LAYERS):
            return name, part
    return "", None


def filter_moments(
    layer: GaborLayer,
    index: int,
    inputs: Tensor,
    targets: Tensor | None,
    *,
    mixing: Tensor | None = None,
    padded: bool = True,
) -> PatchStatistics:
    """Moments of the patches that one filter sees, and of what it should answer less its bias.

    With ``mixing``, ``(mixtures, channels)``, they are those of mixtures of its channels.
    """
    n_inputs = layer.in_channels // layer.groups
    group = index // (layer.out_channels // layer.groups)
    own = inputs[:, group * n_inputs : (group + 1) * n_inputs].detach().double()
    if mixing is not None:
        own = torch.einsum("mc,bc...->bm...", mixing.to(own), own)
    if padded:
        own = layer.padded(own)
    answer = None
    if targets is not None:
        answer = targets[:, index : index + 1].detach().double()
        if layer.bias is not None:
            answer = answer - layer.bias[index].detach().double()
    moments = PatchStatistics(
        layer.kernel_size,
        n_channels=own.shape[1],
        n_outputs=int(answer is not None),
        stride=layer.stride,
    )
    moments.add(own, answer)
    return moments


def kernel_slopes(layer: GaborLayer) -> tuple[tuple[str, ...], Tensor]:
    """Derivatives of each filter's kernel by its learned parameters, in float64.

    Returns:
        The parameters' names: fields of the record, with the channel for those that each channel
        has of its own, such as ``"phase[2]"``, and ``"center_x"``; and the derivatives
        ``(filters, parameters, channels · pixels)``, in the parameters' own units.

    Raises:
        ValueError: the layer's output is an energy or a quadrature pair.
    """
    if layer.output != "real":
        raise ValueError(
            f"This needs a layer with output='real', whose responses are linear in one kernel; "
            f"got output={layer.output!r}."
        )
    params = layer.params.detach().to(torch.float64)
    n_filters, channels = params.batch_shape
    names, rows = [], []

    def add(name: str, slope: Tensor, *, own: bool) -> None:
        """Take in a slope ``(filters, channels, *size)`` of one field."""
        if not own or channels == 1:
            names.append(name)
            rows.append(slope.reshape(n_filters, -1))
            return
        for channel in range(channels):
            alone = torch.zeros_like(slope)
            alone[:, channel] = slope[:, channel]
            names.append(f"{name}[{channel}]")
            rows.append(alone.flatten(1))

    slopes = gabor_jacobian(params, layer.kernel_size) if is_plain(layer) else _by_autograd(layer)
    for field in params.field_names():
        if field not in layer.learn:
            continue
        own = field in ("phase", "amplitude") or layer.geometry == "pair"
        if field == "center":
            for axis, part in zip(_AXES, slopes[field].unbind(2), strict=False):
                add(f"center_{axis}", part, own=own)
        else:
            add(field, slopes[field], own=own)
    if not names:
        raise ValueError("The layer learns no field of its record; give it learn=(...).")
    return tuple(names), torch.stack(rows, 1).cpu()


def is_plain(layer: GaborLayer) -> bool:
    """Whether its kernels are those of ``gabor(layer.params)``."""
    return layer.output == "real" and layer.dc == "keep" and not layer.unit_norm


def _by_autograd(layer: GaborLayer) -> dict[str, Tensor]:
    """The slopes of kernels that are normalised or freed of their mean."""
    params = layer.params.detach().to(torch.float64).expand()
    slopes = {}
    for field, value in params.as_dict().items():
        columns = [...] if field != "center" else [(..., axis) for axis in range(params.n_dims)]
        found = []
        for column in columns:
            direction = torch.zeros_like(value)
            direction[column] = 1.0

            def kernels(moved: Tensor, field: str = field) -> Tensor:
                record = params.replace(**{field: moved})
                return layer.kernels_at(layer.raw_coordinates.to_raw(record))

            found.append(torch.autograd.functional.jvp(kernels, value.contiguous(), direction)[1])
        slopes[field] = found[0] if field != "center" else torch.stack(found, 2)
    return slopes


def recover_options(layer: GaborLayer) -> dict[str, Any] | None:
    """The further arguments of ``recover`` for a layer, or ``None`` if it cannot say."""
    if layer.groups > 1 or layer.padding_mode != "zeros" or layer.dc != "keep" or layer.unit_norm:
        return None
    options: dict[str, Any] = {}
    if any(step != 1 for step in layer.stride):
        options["stride"] = tuple(layer.stride)
    if isinstance(layer.padding, str) or any(layer.padding):
        options["padding"] = layer.padding
    return options


def recover_arguments(layer: GaborLayer) -> str | None:
    """The same as code that goes on after other arguments."""
    options = recover_options(layer)
    if options is None:
        return None
    return "".join(f", {name}={value!r}" for name, value in options.items())
