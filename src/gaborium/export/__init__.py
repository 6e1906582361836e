"""Gabor layers and networks in other forms: files, tables, plain convolutions, ONNX, the Hub.

``saved`` keeps a layer in a file of its own, ``tables`` its parameters. ``plain`` makes ordinary
convolutions of Gabor layers, and ``graphs`` an ONNX file of the network. ``folders`` writes a layer
or a trained network in several of these forms. ``hub`` gives a class of modules the methods of the
Hugging Face Hub.
"""

from gaborium.export.folders import write_formats
from gaborium.export.graphs import to_onnx
from gaborium.export.hub import add_hub
from gaborium.export.plain import to_plain
from gaborium.export.saved import load_layer, save_layer
from gaborium.export.tables import from_csv, read_params, to_csv, write_params

__all__ = [
    "add_hub",
    "from_csv",
    "load_layer",
    "read_params",
    "save_layer",
    "to_csv",
    "to_onnx",
    "to_plain",
    "write_formats",
    "write_params",
]
