"""Trained layers and Gabor layers: what a first layer's filters are, and replacing the layer.

``census`` says of every filter what it is: ``measures`` has the numbers, ``classes`` the questions
that are put to them, ``pairs`` who belongs to whom. ``first_conv`` finds the layer.
"""

from gaborium.conversion.classes import CLASSES
from gaborium.conversion.filter_census import Census, census
from gaborium.conversion.first_conv import find_first_conv, replace_first_conv
from gaborium.conversion.measures import NUMBERS
from gaborium.conversion.pairs import Pair

__all__ = [
    "CLASSES",
    "NUMBERS",
    "Census",
    "Pair",
    "census",
    "find_first_conv",
    "replace_first_conv",
]
