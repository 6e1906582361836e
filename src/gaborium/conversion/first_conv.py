"""Finding the first convolution of any network, and putting another layer in its place."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gaborium.layers import GABOR_LAYERS, MixedConv

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (*_PLAIN, *GABOR_LAYERS, MixedConv)
_LISTED = 8  # names in a message before "and more"


def find_first_conv(
    module: nn.Module, name: str | None = None, *, inputs: Any = None
) -> tuple[str, nn.Module]:
    """The first convolution of a network, as a layer that a Gabor layer can replace.

    Convention:
        - with ``inputs`` the first is the one that is executed first, in a copy that is run;
          without, the one that was registered first, which is the same wherever layers are written
          down in the order in which they run
        - the first one counts, suitable or not: a 1 x 1 convolution at the start is an error and
          not passed over, since what follows it does not see the image

    Args:
        module: any network, or a convolution itself.
        name: of the layer, as ``module.get_submodule`` takes it, to choose it yourself.
        inputs: a batch, or a tuple or dict of what ``module`` is called with.

    Returns:
        The layer's name in ``module``, ``""`` for the module itself, and the layer:
        ``nn.ConvNd``, ``GaborConvNd`` or ``MixedConv``.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: there is no convolution, none is executed, or no layer has that ``name``; or
            it is transposed, quantised, complex, not initialised, or of 1 x 1 pixels.

    Example:
        >>> network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 5), nn.Conv2d(8, 8, 3))
        >>> find_first_conv(network)
        ('1', Conv2d(3, 8, kernel_size=(5, 5), stride=(1, 1)))
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}.")
    if name is not None:
        found = name, _named(module, name)
    elif inputs is not None:
        found = _first_executed(module, inputs)
    else:
        found = _first_registered(module)
    _check(module, *found)
    return found


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
        replacement: the new layer, which is put in as it is; or a function that makes it from
            a copy of the old one, as ``lambda conv: GaborConv2d(conv.in_channels, ...)``.
        name: of the layer to replace, as for ``find_first_conv``.
        inputs: as for ``find_first_conv``.

    Returns:
        The copy. The new layer has the old one's training mode; device and dtype are as it brings
        them. Where a network holds the old layer in several places, all are replaced. If
        ``module`` is itself the convolution, the new layer.

    Raises:
        TypeError: ``replacement`` is neither, or makes no module.
        ValueError: as for ``find_first_conv``; or the new layer takes or gives other numbers of
            channels, or works in other dimensions.

    Example:
        >>> from gaborium import GaborConv2d
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 11, padding=5), nn.ReLU())
        >>> mine = replace_first_conv(network, GaborConv2d(3, 8, 11, padding=5))
        >>> type(mine[0]).__name__, type(network[0]).__name__
        ('GaborConv2d', 'Conv2d')
    """
    found, _ = find_first_conv(module, name, inputs=inputs)
    result = copy.deepcopy(module)
    old = result.get_submodule(found)
    if not isinstance(replacement, nn.Module) and not callable(replacement):
        raise TypeError(
            "replacement must be a layer, or a function that makes one from the old, got "
            f"{type(replacement).__name__}."
        )
    new = replacement if isinstance(replacement, nn.Module) else replacement(old)
    if not isinstance(new, nn.Module):
        raise TypeError(f"replacement must make an nn.Module, got {type(new).__name__}.")
    _check_fit(old, new, found)
    new.train(old.training)
    if old is result:
        return new
    for place in [
        name for name, part in result.named_modules(remove_duplicate=False) if part is old
    ]:
        parent, _, last = place.rpartition(".")
        setattr(result.get_submodule(parent), last, new)
    return result


# -- finding ----------------------------------------------------------------------------------


def _named(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        known = [at or "''" for at, part in module.named_modules() if _is_convolution(part)]
        more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
        raise ValueError(
            f"{type(module).__name__} has no layer {name!r}; its convolutions are "
            f"{', '.join(known[:_LISTED]) or 'none'}{more}."
        ) from None


def _first_registered(module: nn.Module) -> tuple[str, nn.Module]:
    for name, part in module.named_modules():
        if _is_convolution(part):
            return name, part
    raise ValueError(
        f"{type(module).__name__} holds no convolution (nn.Conv1d, nn.Conv2d or nn.Conv3d); name "
        "the layer to take instead."
    )


def _first_executed(module: nn.Module, inputs: Any) -> tuple[str, nn.Module]:
    """Run a copy, in evaluation mode, so that neither statistics nor hooks' records change."""
    trial = copy.deepcopy(module).eval()
    executed: list[str] = []
    for name, part in trial.named_modules():
        if _is_convolution(part):
            part.register_forward_pre_hook(lambda _, __, name=name: executed.append(name))
    arguments = (inputs,) if not isinstance(inputs, (tuple, dict)) else inputs
    with torch.no_grad():
        if isinstance(arguments, dict):
            trial(**arguments)
        else:
            trial(*arguments)
    if not executed:
        raise ValueError(
            f"{type(module).__name__} executed no convolution layer with these inputs; name the "
            "layer to take."
        )
    return executed[0], module.get_submodule(executed[0])


def _is_convolution(part: nn.Module) -> bool:
    return isinstance(part, (*_CONVOLUTIONS, *_TRANSPOSED)) or _is_quantized(part)


def _is_quantized(part: nn.Module) -> bool:
    # By name, because importing torch's own quantised layers warns of their end.
    kind = type(part)
    return "quantized" in kind.__module__ and "Conv" in kind.__name__


# -- judging ----------------------------------------------------------------------------------


def _check(module: nn.Module, name: str, layer: nn.Module) -> None:
    what = f"{name or type(module).__name__!r} ({type(layer).__name__})"
    advice = "name another layer to take"
    if not _is_convolution(layer):
        raise ValueError(
            f"{what} is no convolution; expected nn.Conv1d, nn.Conv2d or nn.Conv3d: {advice}."
        )
    if isinstance(layer, _TRANSPOSED):
        raise ValueError(f"{what} is a transposed convolution, which spreads pixels; {advice}.")
    if _is_quantized(layer):
        raise ValueError(
            f"{what} is quantised, and has no kernels that learn; take the network before it was "
            "quantised."
        )
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
        raise ValueError(f"{what} has no shape yet; run the network once on a batch.")
    weight: Any = layer.weight
    if weight.is_complex():
        raise ValueError(f"{what} is complex, and Gabor layers are real; {advice}.")
    if not weight.is_floating_point():
        raise ValueError(
            f"{what} holds {weight.dtype}, expected real floating kernels; take the network before "
            "it was quantised."
        )
    size = tuple(weight.shape[2:])
    if math.prod(size) == 1:
        raise ValueError(
            f"{what} has kernels of {' x '.join(map(str, size))} px, in which there is no wave; "
            f"{advice}."
        )


def _check_fit(old: Any, new: Any, name: str) -> None:
    what = f"The layer in place of {name or type(old).__name__!r}"
    wanted = {"in_channels": old.in_channels, "out_channels": old.out_channels}
    for attribute, number in wanted.items():
        given = getattr(new, attribute, number)
        if given != number:
            raise ValueError(f"{what} must have {attribute}={number} like the old, got {given}.")
    weight = getattr(new, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim > 2 and weight.ndim != old.weight.ndim:
        raise ValueError(
            f"{what} must convolve in {old.weight.ndim - 2} dimensions like the old, got "
            f"{weight.ndim - 2}."
        )
