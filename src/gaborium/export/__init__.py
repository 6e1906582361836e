"""Gabor layers and networks in other forms: files, tables, plain convolutions, ONNX.

``saved`` keeps a layer in a file of its own, ``tables`` its parameters. ``plain`` makes ordinary
convolutions of Gabor layers, and ``graphs`` an ONNX file of the network. ``folders`` writes a layer
or a trained network in several of these forms.
"""

from gaborium.export.folders import write_formats
from gaborium.export.graphs import to_onnx
from gaborium.export.plain import to_plain
from gaborium.export.saved import load_layer, save_layer
from gaborium.export.tables import from_csv, read_params, to_csv, write_params

__all__ = [
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
