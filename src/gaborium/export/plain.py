"""A copy of a network in which every Gabor layer is an ordinary convolution."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from gaborium.layers import GABOR_LAYERS, MixedConv, PairEnergy, plain_conv

LAYERS_OF_OURS: tuple[Any, ...] = (*GABOR_LAYERS, MixedConv)


def to_plain(model: nn.Module) -> nn.Module:
    """A copy of a network with the present kernels, equal outputs and no Gabor function inside.

    Convention:
        - every ``GaborConvNd`` and ``MixedConv`` becomes one ``nn.ConvNd``; one with an energy
          output a ``PairEnergy`` around it: the norm of each pair of channels, then the bias
        - a layer that the network holds in several places stays one layer
        - all kernels of the copy are parameters and learn freely; hooks of the layers that are
          replaced do not come along

    Args:
        model: any network, or a layer; it is not changed.

    Returns:
        The copy, on the same devices, of the same dtypes and training modes.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a class derived from one of the layers computes something else than they do.

    Example:
        >>> import torch
        >>> from gaborium import GaborConv2d
        >>> network = nn.Sequential(GaborConv2d(3, 8, 9, output="energy"), nn.ReLU())
        >>> plain = to_plain(network)
        >>> image = torch.rand(1, 3, 32, 32)
        >>> torch.equal(plain(image), network(image)), plain[0].pairs
        (True, Conv2d(3, 16, kernel_size=(9, 9), stride=(1, 1), bias=False))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}.")
    result = copy.deepcopy(model)
    if isinstance(result, LAYERS_OF_OURS):
        return _plain(result, type(result).__name__)
    _replace_in(result, "", {})
    return result


def _replace_in(module: nn.Module, prefix: str, done: dict[nn.Module, nn.Module]) -> None:
    """Replace what lies in a module, from the outside in: a mixed layer before its Gabor layer."""
    for name, part in module._modules.items():
        if isinstance(part, LAYERS_OF_OURS):
            if part not in done:
                done[part] = _plain(part, prefix + name)
            setattr(module, name, done[part])
        elif part is not None:
            _replace_in(part, f"{prefix}{name}.", done)


def _plain(layer: Any, name: str) -> nn.Module:
    kind = next(kind for kind in LAYERS_OF_OURS if isinstance(layer, kind))
    if type(layer).forward is not kind.forward:
        raise ValueError(
            f"{name!r} is a {type(layer).__name__}, whose forward is not that of {kind.__name__}; "
            "put what it does beside the convolution into a module of its own."
        )
    if isinstance(layer, MixedConv) or layer.output != "energy":
        return layer.to_conv()
    energy = PairEnergy(plain_conv(layer, layer.weight, None), layer.bias)
    return energy.train(layer.training)
