"""Trained layers and Gabor layers: what the filters of a first layer are, and converting it.

``census`` says of every filter what it is: ``measures`` has the numbers, ``classes`` the questions
that are put to them, ``pairs`` who belongs to whom. ``first_conv`` finds the layer and replaces it;
``convert`` does so with the Gabor functions nearest to its filters. ``load_network`` gets trained
networks by name.
"""

from gaborium.conversion.classes import CLASSES
from gaborium.conversion.conversion import Conversion, convert
from gaborium.conversion.filter_census import Census, census
from gaborium.conversion.first_conv import find_first_conv, replace_first_conv
from gaborium.conversion.measures import NUMBERS
from gaborium.conversion.named_networks import load_network, names_network
from gaborium.conversion.pairs import Pair

__all__ = [
    "CLASSES",
    "NUMBERS",
    "Census",
    "Conversion",
    "Pair",
    "census",
    "convert",
    "find_first_conv",
    "load_network",
    "names_network",
    "replace_first_conv",
]
