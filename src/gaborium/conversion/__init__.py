"""Trained layers and Gabor layers: finding a network's first convolution, and replacing it."""

from gaborium.conversion.first_conv import find_first_conv, replace_first_conv

__all__ = ["find_first_conv", "replace_first_conv"]
