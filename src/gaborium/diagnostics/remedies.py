"""Remedies that change the module: Gabor layers that replace another layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gaborium.diagnostics.causes import NEW_OPTIMIZER, RECOVER, REPLACE
from gaborium.diagnostics.sandbox import Trace, TrainingSetup, copied, equal
from gaborium.fitting import fit
from gaborium.layers import GABOR_LAYERS, LAYERS, GaborLayer


def replace_by_gabor(module: nn.Module, name: str, inputs: Any) -> nn.Module:
    """Replace one layer of a module by a Gabor layer that learns.

    The layer must be a convolution of its input, however it makes its kernels. It is run, and
    Gabor functions are fitted to its kernels; the new layer starts with them.

    Args:
        module: any module; it is not changed.
        name: of the layer, as ``module.get_submodule`` takes it; ``""`` is the module itself.
        inputs: a batch, or a tuple of the arguments of ``module``.

    Returns:
        A copy of the module with a ``GaborConvNd`` under that name, with the same arguments; if
        ``name`` is empty, that layer.

    Raises:
        ValueError: the layer does not return one convolution of its input.

    Example:
        >>> from gaborium import GaborConv2d
        >>> plain = GaborConv2d(1, 4, 9, seed=0).to_conv()
        >>> image = torch.rand(1, 1, 16, 16)
        >>> layer = replace_by_gabor(plain, "", image)
        >>> bool((layer(image) - plain(image)).abs().max() < 1e-4)
        True
    """
    found = convolution_of(module, name, inputs)
    if found is None:
        raise ValueError(
            f"{name or type(module).__name__!r} must be one convolution of its input, without "
            "other steps, to be replaced by a Gabor layer."
        )
    return _replaced(module, name, _layer_like(found))


def rebuild_layer(module: nn.Module, name: str, **changes: Any) -> nn.Module:
    """Rebuild one Gabor layer of a module with its present parameters and other arguments.

    Args:
        module: any module; it is not changed.
        name: of the layer, as ``module.get_submodule`` takes it; ``""`` is the module itself.
        changes: arguments of the layer's class. Wavelengths below a new ``min_wavelength`` start
            10 % above it.

    Returns:
        A copy of the module with the new layer under that name; if ``name`` is empty, that layer.

    Raises:
        TypeError: the layer is not a Gabor layer.

    Example:
        >>> from gaborium import GaborConv2d
        >>> layer = GaborConv2d(1, 4, 9, seed=0, learn="orientation")
        >>> rebuild_layer(layer, "", dc="remove").dc
        'remove'
    """
    layer: Any = module.get_submodule(name)
    if not isinstance(layer, GABOR_LAYERS):
        raise TypeError(f"rebuild_layer needs a Gabor layer, got {type(layer).__name__}.")
    start = layer.params.detach()
    if "min_wavelength" in changes:
        least = 1.1 * changes["min_wavelength"]
        start = start.replace(wavelength=start.wavelength.clamp_min(least))
    new = type(layer)(**(layer.arguments() | {"start": start} | changes))
    if layer.bias is not None:
        new.bias.data.copy_(layer.bias.data)
    return _replaced(module, name, new)


def replacement_code(module: nn.Module, name: str, inputs: Any) -> str:
    """Code that replaces a layer by a Gabor layer; ``""`` if it cannot be replaced."""
    try:
        if convolution_of(module, name, inputs) is None:
            return ""
    except Exception:  # a part of somebody else's module may not run alone
        return ""
    return REPLACE.format(name=name) + NEW_OPTIMIZER


def recover_options(layer: GaborLayer) -> dict[str, Any] | None:
    """The further arguments of ``recover`` for a layer; ``None`` if it has none for it."""
    if layer.groups > 1 or layer.padding_mode != "zeros" or layer.dc != "keep" or layer.unit_norm:
        return None
    options: dict[str, Any] = {}
    if any(step != 1 for step in layer.stride):
        options["stride"] = tuple(layer.stride)
    if isinstance(layer.padding, str) or any(layer.padding):
        options["padding"] = layer.padding
    return options


def recover_code(layer: GaborLayer) -> str | None:
    """Code that sets the parameters of a module, which is this layer, by ``recover``."""
    options = recover_options(layer)
    if options is None:
        return None
    return RECOVER.format(arguments="".join(f", {n}={value!r}" for n, value in options.items()))


def convolution_of(module: nn.Module, name: str, inputs: Any) -> dict[str, Any] | None:
    """Arguments and output of the convolution that a layer is; ``None`` if it is something else.

    A layer that also does something else, such as a nonlinearity or a padding, is not one.
    """
    trial, trace = copied(module), Trace()
    found: list[dict[str, Any]] = []

    def before(*_: Any) -> None:
        trace.convolutions.clear()

    def after(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        found[:] = [
            one
            for one in trace.convolutions
            if equal(one["input"], given) and equal(one["output"], output)
        ]

    layer = trial.get_submodule(name)
    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)
    TrainingSetup(trial, lambda *_: torch.zeros(()), inputs, None).run(trial, trace=trace)
    return found[0] if len(found) == 1 else None


def _replaced(module: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """A copy of the module with another layer under that name, in the module's mode."""
    new.train(module.training)
    if not name:
        return new
    parent, _, last = name.rpartition(".")
    result: nn.Module = copied(module)
    setattr(result.get_submodule(parent), last, new)
    return result


def _layer_like(convolution: dict[str, Any]) -> Any:
    weight, bias, groups = (convolution[name] for name in ("weight", "bias", "groups"))
    n_out, n_in, *size = weight.shape
    layer = LAYERS[len(size)](
        n_in * groups,
        n_out,
        tuple(size),
        convolution["stride"],
        convolution["padding"],
        convolution["dilation"],
        groups,
        bias is not None,
        device=weight.device,
        dtype=weight.dtype,
        geometry="pair" if n_in > 1 else "filter",
        start="random",
    )
    with torch.no_grad():
        drawn = layer.params.expand().as_dict()
        params = fit(weight.float(), n_dims=len(size), geometry="pair", center=True).params.expand()
        fields = {n: v.reshape(drawn[n].shape) for n, v in params.as_dict().items()}
        # A kernel that could not be fitted, such as zero, starts at random. A blob's wavelength
        # is infinite.
        lost = [v.isnan() if n == "wavelength" else ~v.isfinite() for n, v in fields.items()]
        good = ~torch.stack([one.reshape(n_out, n_in, -1).any(-1) for one in lost]).any(0)
        size_of_good = fields["amplitude"][good].abs().mean() if bool(good.any()) else 1.0
        drawn["amplitude"] = torch.full_like(fields["amplitude"], float(size_of_good))
        layer.params = type(params)(**{
            field: torch.where(good[..., None] if field == "center" else good, value, drawn[field])
            for field, value in fields.items()
        })  # fmt: skip
        if bias is not None:
            layer.bias.copy_(bias)
    return layer
