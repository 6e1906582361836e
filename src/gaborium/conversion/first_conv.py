"""Finding the first convolution of any network, and putting another layer in its place."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gaborium.layers import GABOR_LAYERS, PLAIN_LAYERS, MixedConv

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (*PLAIN_LAYERS.values(), *GABOR_LAYERS, MixedConv, *_TRANSPOSED)


def find_first_conv(
    module: nn.Module, name: str | None = None, *, inputs: Any = None
) -> tuple[str, nn.Module]:
    """The first convolution of a network, as a layer that a Gabor layer can replace.

    Convention:
        - with ``inputs`` a copy of the network is run, and the first is the one executed first;
          without, the one registered first, which is the same in networks that register their
          layers in the order in which they run them
        - the first one counts, suitable or not: a 1 x 1 convolution at the start is an error and
          not skipped, since the layers after it do not see the image

    Args:
        module: any network, or a convolution itself.
        name: of the layer, as ``module.get_submodule`` takes it, to choose it yourself.
        inputs: a batch, or a tuple or dict of the arguments of ``module``.

    Returns:
        The layer's name in ``module``, ``""`` for the module itself, and the layer:
        ``nn.ConvNd``, ``GaborConvNd`` or ``MixedConv``.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: there is no convolution, none is executed, or no layer has that ``name``; or
            it is transposed, not floating, not initialised, or of 1 x 1 pixels.

    Example:
        >>> network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 5), nn.Conv2d(8, 8, 3))
        >>> find_first_conv(network)
        ('1', Conv2d(3, 8, kernel_size=(5, 5), stride=(1, 1)))
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}.")
    kind = type(module).__name__
    known = [at for at, part in module.named_modules() if isinstance(part, _CONVOLUTIONS)]
    if name is None:
        known = known if inputs is None else _executed(module, inputs)
        if not known:
            raise ValueError(
                f"{kind} {'holds' if inputs is None else 'executed'} no convolution (nn.Conv1d, "
                "nn.Conv2d or nn.Conv3d); name the layer to take."
            )
        name = known[0]
    elif name not in dict(module.named_modules(remove_duplicate=False)):
        raise ValueError(f"{kind} has no layer {name!r}; its first convolutions are {known[:8]}.")
    layer = module.get_submodule(name)
    problem = _problem(layer)
    if problem:
        what = f"{name or kind!r} ({type(layer).__name__})"
        raise ValueError(f"{what} {problem}; or name another layer to take.")
    return name, layer


def replace_first_conv(
    module: nn.Module,
    replacement: nn.Module | Callable[[nn.Module], nn.Module],
    name: str | None = None,
    *,
    inputs: Any = None,
) -> nn.Module:
    """A copy of a network with another layer in place of its first convolution.

    Args:
        module: any network; it is not changed.
        replacement: the new layer, which is used itself; or a function that makes it from
            a copy of the old one, as ``lambda conv: GaborConv2d(conv.in_channels, ...)``.
        name: of the layer to replace, as for ``find_first_conv``.
        inputs: as for ``find_first_conv``.

    Returns:
        The copy. The new layer has the old one's training mode, and its own device and dtype.
        Where a network holds the old layer in several places, all are replaced. If ``module`` is
        itself the convolution, the new layer.

    Raises:
        TypeError: ``replacement`` is neither, or makes no module.
        ValueError: as for ``find_first_conv``; or the new layer has other numbers of channels.

    Example:
        >>> from gaborium import GaborConv2d
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 11, padding=5), nn.ReLU())
        >>> mine = replace_first_conv(network, GaborConv2d(3, 8, 11, padding=5))
        >>> type(mine[0]).__name__, type(network[0]).__name__
        ('GaborConv2d', 'Conv2d')
    """
    place, _ = find_first_conv(module, name, inputs=inputs)
    result = copy.deepcopy(module)
    old: Any = result.get_submodule(place)
    is_function = callable(replacement) and not isinstance(replacement, nn.Module)
    new: Any = replacement(old) if is_function else replacement
    if not isinstance(new, nn.Module):
        raise TypeError(
            "replacement must be a layer, or a function that makes one from the old, got "
            f"{type(new).__name__}."
        )
    for attribute in ("in_channels", "out_channels"):
        wanted = getattr(old, attribute)
        given = getattr(new, attribute, wanted)
        if given != wanted:
            raise ValueError(
                f"The layer in place of {place or type(old).__name__!r} must have "
                f"{attribute}={wanted} like the old, got {given}."
            )
    new.train(old.training)
    if old is result:
        return new
    for at, part in list(result.named_modules(remove_duplicate=False)):
        if part is old:
            parent, _, last = at.rpartition(".")
            setattr(result.get_submodule(parent), last, new)
    return result


def _executed(module: nn.Module, inputs: Any) -> list[str]:
    """Names of the convolutions in the order in which a copy in evaluation mode runs them."""
    trial = copy.deepcopy(module).eval()
    names: list[str] = []
    for name, part in trial.named_modules():
        if isinstance(part, _CONVOLUTIONS):
            part.register_forward_pre_hook(lambda _, __, name=name: names.append(name))
    with torch.no_grad():
        if isinstance(inputs, dict):
            trial(**inputs)
        else:
            trial(*inputs if isinstance(inputs, tuple) else (inputs,))
    return names


def _problem(layer: Any) -> str:
    """Why no Gabor layer can replace this layer, or an empty text."""
    if not isinstance(layer, _CONVOLUTIONS):
        return "is no convolution; expected nn.Conv1d, nn.Conv2d or nn.Conv3d"
    if isinstance(layer, _TRANSPOSED):
        return "is a transposed convolution, which spreads pixels"
    if any(isinstance(v, nn.UninitializedParameter) for v in layer.parameters()):
        return "has no shape yet; run the network once on a batch"
    if not layer.weight.is_floating_point():
        return f"holds {layer.weight.dtype}, and Gabor layers are real and floating"
    size = tuple(layer.weight.shape[2:])
    if math.prod(size) == 1:
        return f"has kernels of {' x '.join(map(str, size))} px, in which there is no wave"
    return ""
