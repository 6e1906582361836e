"""Trained layers and Gabor layers: the classes of a first layer's filters, and its conversion.

``features`` has the numbers that describe a filter, ``census`` makes classes of them.
``first_conv`` finds the layer and replaces it; ``convert`` replaces it by the Gabor functions
nearest to its filters.
"""

from gaborium.conversion.census import CLASSES, Census, Pair, census
from gaborium.conversion.convert import Conversion, convert
from gaborium.conversion.features import NUMBERS
from gaborium.conversion.first_conv import find_first_conv, replace_first_conv

__all__ = [
    "CLASSES",
    "NUMBERS",
    "Census",
    "Conversion",
    "Pair",
    "census",
    "convert",
    "find_first_conv",
    "replace_first_conv",
]
