"""Convolution layers of Gabor kernels, and the layer that has free kernels too."""

from gaborium.layers.gabor import (
    FAINTEST,
    GABOR_LAYERS,
    LAYERS,
    PLAIN_LAYERS,
    GaborConv1d,
    GaborConv2d,
    GaborConv3d,
    GaborLayer,
    KernelGradientHook,
    PairEnergy,
    n_learned,
    pair_norms,
    plain_conv,
)
from gaborium.layers.mixed import MixedConv

__all__ = [
    "FAINTEST",
    "GABOR_LAYERS",
    "LAYERS",
    "PLAIN_LAYERS",
    "GaborConv1d",
    "GaborConv2d",
    "GaborConv3d",
    "GaborLayer",
    "KernelGradientHook",
    "MixedConv",
    "PairEnergy",
    "n_learned",
    "pair_norms",
    "plain_conv",
]
