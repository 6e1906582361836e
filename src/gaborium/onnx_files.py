"""Reading the kernels of convolutions from ONNX files, in the order in which they run."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath
from typing import Any

from gaborium.errors import require

# Operators that convolve, but not with kernels that can be read as they stand.
_OTHERS = ("ConvTranspose", "ConvInteger", "QLinearConv", "DeformConv")


class OnnxError(ValueError):
    """A file that is no damaged one, but has no kernels to read; in one line."""


def read_convolutions(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The kernels of a graph's convolutions by name; the one that runs first comes first.

    The file is only parsed: nothing in it runs. Kernels that it keeps in another file are read
    only from its own folder and folders within.

    Args:
        path: of the ``.onnx`` file.

    Returns:
        NumPy arrays ``(out, in / groups, *kernel_size)`` under the names that the file has for
        them. Nodes within branches and loops are not looked at, and later convolutions whose
        kernels are computed or quantised are left out.

    Raises:
        ImportError: onnx is not installed.
        OSError: the file cannot be opened.
        OnnxError: no convolution is in the graph, the first is of another kind or its kernels are
            computed; or kernels lie in a file that is missing or outside of the folder.
        Exception: what its parser raises of a damaged file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import numpy, onnx
        >>> from onnx import helper
        >>> kernels = onnx.numpy_helper.from_array(numpy.ones((8, 3, 5, 5), "f4"), "conv1.weight")
        >>> ends = [helper.make_tensor_value_info(name, 1, None) for name in ("image", "out")]
        >>> node = helper.make_node("Conv", ["image", "conv1.weight"], ["out"])
        >>> graph = helper.make_graph([node], "network", ends[:1], ends[1:], [kernels])
        >>> with TemporaryDirectory() as folder:
        ...     onnx.save(helper.make_model(graph), f"{folder}/network.onnx")
        ...     found = read_convolutions(f"{folder}/network.onnx")
        >>> {name: kernels.shape for name, kernels in found.items()}
        {'conv1.weight': (8, 3, 5, 5)}
    """
    onnx = require("onnx", extra="onnx", purpose=".onnx files")
    file, shown = Path(path), repr(os.fspath(path))
    graph = onnx.load_model_from_string(file.read_bytes()).graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    found: dict[str, Any] = {}
    for node in graph.node:
        if node.op_type not in ("Conv", *_OTHERS):
            continue
        tensor = _tensor(node, held, made) if node.op_type == "Conv" else None
        if tensor is not None:
            _check_place(tensor, file, shown)
            array = onnx.numpy_helper.to_array(tensor, base_dir=str(file.parent))
            found.setdefault(node.input[1], array)
        elif not found:
            what = "computed in the graph" if node.op_type == "Conv" else "of another kind"
            raise OnnxError(
                f"{shown}: the kernels of the first convolution, the {node.op_type} "
                f"{node.name or node.output[0]!r}, are {what}, expected a Conv that holds its own; "
                "export the network without quantisation, or save the kernels with numpy.save."
            )
    if not found:
        raise OnnxError(
            f"{shown} has no Conv node among the {len(graph.node)} of its graph; was it exported "
            "to the end, and does the network convolve?"
        )
    return found


def _tensor(node: Any, held: dict[str, Any], made: dict[str, Any]) -> Any:
    """What the file holds as the kernels of a Conv, or ``None``."""
    name = node.input[1] if len(node.input) > 1 else ""
    for _ in range(len(made) + 1):  # a damaged graph may go round in circles
        if name in held:
            return held[name]
        source = made.get(name)
        if source is None:
            return None
        if source.op_type == "Constant":
            return next((one.t for one in source.attribute if one.name == "value"), None)
        if source.op_type != "Identity":
            return None
        name = source.input[0]
    return None


def _check_place(tensor: Any, file: Path, shown: str) -> None:
    """Kernels in another file must lie beside this one: a graph may name any file that there is."""
    if tensor.data_location != tensor.EXTERNAL:
        return
    place = next((one.value for one in tensor.external_data if one.key == "location"), "")
    absolute = Path(place).is_absolute() or PureWindowsPath(place).drive
    folder = file.parent.resolve()
    # Resolved, because a link beside the file may lead out of its folder, too.
    if absolute or folder not in (folder / place).resolve().parents:
        raise OnnxError(
            f"{shown} keeps {tensor.name!r} in {place!r}, which is not in its folder, and is not "
            "read; save the network as a single file."
        )
    if not (folder / place).is_file():
        raise OnnxError(
            f"{shown} keeps {tensor.name!r} in {place!r}, which is not there; copy it, too."
        )
