"""Trained layers and Gabor layers: finding a first convolution, replacing it, converting it."""

from gaborium.conversion.conversion import Conversion, convert
from gaborium.conversion.first_conv import find_first_conv, replace_first_conv

__all__ = ["Conversion", "convert", "find_first_conv", "replace_first_conv"]
