"""Remedies: Gabor layers that take another layer's place, and the code that says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gaborium.diagnostics.causes import NEW_OPTIMIZER, RENEW_OPTIMIZER
from gaborium.diagnostics.sandbox import Sandbox, Trace, copied, equal
from gaborium.fitting import fit
from gaborium.layers import LAYERS
from gaborium.params import Gabor
from gaborium.starts import start as draw_start


def replace_by_gabor(module: nn.Module, name: str, inputs: Any) -> nn.Module:
    """The module with one of its layers replaced by a Gabor layer that learns.

    The layer must be a convolution of its input, however it makes its kernels: it is run, and what
    it convolves with is fitted by Gabor functions, with which the new layer begins.

    Args:
        module: any module; it is not changed.
        name: of the layer, as ``module.get_submodule`` takes it; ``""`` is the module itself.
        inputs: a batch, or a tuple of what ``module`` is called with.

    Returns:
        A copy of the module with a ``GaborConvNd`` under that name, of the same arguments; if
        ``name`` is empty, that layer.

    Raises:
        ValueError: what the layer returns is not one convolution of what it gets.

    Example:
        >>> from gaborium import GaborConv2d
        >>> plain = GaborConv2d(1, 4, 9, seed=0).to_conv()
        >>> image = torch.rand(1, 1, 16, 16)
        >>> layer = replace_by_gabor(plain, "", image)
        >>> bool((layer(image) - plain(image)).abs().max() < 1e-4)
        True
    """
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    found = convolution_of(module, name, given)
    if found is None:
        raise ValueError(
            f"{name or type(module).__name__!r} must be one convolution of its input, and nothing "
            "else, to be replaced by a Gabor layer."
        )
    new = _layer_like(found)
    if not name:
        return new.train(module.training)
    parent, _, last = name.rpartition(".")
    result = copied(module)
    setattr(result.get_submodule(parent), last, new.train(module.training))
    return result


def replacement_code(name: str) -> str:
    """The code that replaces the layer called ``name``."""
    return (
        "from gaborium.diagnostics import replace_by_gabor\n"
        f"module = replace_by_gabor(module, {name!r}, inputs)\n{NEW_OPTIMIZER}"
    )


def is_replaceable(module: nn.Module, name: str, inputs: tuple[Any, ...]) -> bool:
    """Whether ``replace_by_gabor`` can do it."""
    return convolution_of(module, name, inputs) is not None


def rebuilding_code(layer: Any, name: str, **changes: str) -> str:
    """Code that rebuilds a Gabor layer with its present parameters and other arguments.

    Args:
        layer: a ``GaborConvNd``.
        name: of the layer in ``module``; ``""`` is the module itself.
        changes: arguments and their code, which may name the old layer ``layer``.
    """
    kind = type(layer).__name__
    arguments = {
        "stride": repr(layer.stride),
        "padding": repr(layer.padding),
        "dilation": repr(layer.dilation),
        "groups": repr(layer.groups),
        "bias": repr(layer.bias is not None),
        "padding_mode": repr(layer.padding_mode),
        "device": "layer.log_sigma.device",
        "dtype": "layer.log_sigma.dtype",
        "learn": repr(tuple(sorted(layer.learn))),
        "coordinates": repr(layer.coordinates),
        "geometry": repr(layer.geometry),
        "start": "layer.params",
        "dc": repr(layer.dc),
        "unit_norm": repr(layer.unit_norm),
        "output": repr(layer.output),
        "min_wavelength": repr(layer.raw_coordinates.min_wavelength),
    } | {key: code for key, code in changes.items() if key != "kernel_size"}
    size = changes.get("kernel_size", repr(layer.kernel_size))
    listed = "".join(f"    {key}={code},\n" for key, code in arguments.items())
    code = (
        f"from gaborium import {kind}\n"
        f"layer = module.get_submodule({name!r})\n"
        f"new = {kind}(\n    {layer.in_channels}, {layer.out_channels}, {size},\n{listed})\n"
    )
    if layer.bias is not None:
        code += "new.bias.data.copy_(layer.bias.data)\n"
    code += "new.train(layer.training)\n"
    if name:
        parent, _, last = name.rpartition(".")
        code += f"setattr(module.get_submodule({parent!r}), {last!r}, new)\n"
    else:
        code += "module = new\n"
    return code + RENEW_OPTIMIZER


def convolution_of(module: nn.Module, name: str, inputs: tuple[Any, ...]) -> dict[str, Any] | None:
    """The convolution that a layer is when ``module`` is called; ``None`` if it is something else.

    A layer may convolve and go on, as with a nonlinearity, or pad its input first.
    """
    trial = copied(module)
    trace = Trace()
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
    Sandbox(trial, inputs).run(trial, trace=trace)
    return found[0] if len(found) == 1 else None


def _layer_like(convolution: dict[str, Any]) -> Any:
    weight, bias, groups = (convolution[name] for name in ("weight", "bias", "groups"))
    n_out, n_in, *size = weight.shape
    params = fit(weight.float(), n_dims=len(size), geometry="pair", center=True).params
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
        start=_without_gaps(params, (n_out, n_in), tuple(size)),
    )
    if bias is not None:
        with torch.no_grad():
            layer.bias.copy_(bias)
    return layer


def _without_gaps(params: Gabor, shape: tuple[int, int], kernel_size: tuple[int, ...]) -> Gabor:
    """Filters that could not be fitted, such as those that are zero, begin at random."""
    whole = params.expand()
    whole = type(params)(**{n: v.reshape(*shape, *v.shape[1:]) for n, v in whole.as_dict().items()})
    n_filters, n_channels = shape
    drawn = draw_start(
        "random", n_filters=n_filters, n_channels=n_channels, kernel_size=kernel_size
    )
    lost = ~_finite(whole)
    size = whole.amplitude[~lost].abs().mean() if bool((~lost).any()) else torch.tensor(1.0)
    fresh = drawn.expand().to(whole.sigma).as_dict()
    fresh["amplitude"] = torch.full_like(whole.amplitude, float(size))
    return type(whole)(
        **{
            name: torch.where(lost[..., None] if name == "center" else lost, fresh[name], value)
            for name, value in whole.as_dict().items()
        }
    )


def _finite(params: Gabor) -> Tensor:
    """Which Gabor functions are whole; a blob's wavelength may be infinite."""
    fields = params.as_dict()
    good = ~fields["wavelength"].isnan()
    for name, value in fields.items():
        if name != "wavelength":
            finite = value.isfinite()
            good = good & (finite.all(-1) if name == "center" else finite)
    return good
