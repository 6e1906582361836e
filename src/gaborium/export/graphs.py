"""Networks as ONNX graphs, in which a Gabor layer is a convolution as any other."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gaborium.errors import require
from gaborium.export.plain import to_plain
from gaborium.files import write_bytes

_NEED = {"extra": "onnx", "purpose": "ONNX files"}


def to_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Tensor | tuple[Any, ...] | Mapping[str, Any],
) -> None:
    """Write a network as an ONNX file, for inference, all or nothing.

    Convention:
        - it is a copy in evaluation mode that is written, after ``to_plain``: the present
          kernels, one ``Conv`` node for each Gabor layer; an energy output adds the norm of pairs
        - the first axis of every tensor in ``example`` is the batch, of any size; the others have
          the sizes of the example
        - the network computes in its own dtype

    Args:
        model: any network with or without Gabor layers, or a layer; it is not changed.
        path: the file, in a folder that exists; an existing file is replaced.
        example: a batch, or a tuple or a dict of what ``model`` is called with, on its device.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        OSError: it cannot be written there. What was there before stays.
        TypeError: ``model`` is no module, or ``example`` none of these.
        ValueError: ``example`` holds no tensor with a batch axis; or the network does not run on
            it, depends on the size of the batch, computes what ONNX has no operator for, or has
            more than the 2 GB that one ONNX file holds.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from gaborium import GaborConv2d
        >>> network = nn.Sequential(GaborConv2d(1, 4, 7), nn.ReLU())
        >>> with TemporaryDirectory() as folder:
        ...     to_onnx(network, f"{folder}/network.onnx", torch.rand(1, 1, 16, 16))
        ...     [file.name for file in Path(folder).iterdir()]
        ['network.onnx']
    """
    onnxscript = require("onnxscript", **_NEED)
    require("onnx", **_NEED)
    plain = to_plain(model).eval()
    args, kwargs = _arguments(example)
    batch = torch.export.Dim("batch")

    def axes(value: Any) -> Any:
        return {0: batch} if isinstance(value, Tensor) and value.ndim else None

    def graph() -> Any:
        # Not by the exporter of ONNX, which fixes a batch size that cannot be free and is silent.
        program = torch.export.export(
            plain,
            args,
            kwargs,
            dynamic_shapes=pytree.tree_map(axes, kwargs or args),
            strict=False,
        )
        return torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            custom_translation_table={torch.ops.aten.hypot.default: _hypot(onnxscript)},
        )

    data = _tried(graph, lambda: plain(*args, **kwargs))
    write_bytes(path, data)


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments, in which no batch has the size 1.

    The exporter takes a size of 1 for one that never changes.
    """
    if not isinstance(example, (Tensor, tuple, Mapping)):
        raise TypeError(
            f"example must be a batch, or a tuple or a dict of arguments, got "
            f"{type(example).__name__}."
        )
    given = dict(example) if isinstance(example, Mapping) else example
    leaves = pytree.tree_leaves(given)
    tensors = [value for value in leaves if isinstance(value, Tensor) and value.ndim]
    sizes = sorted({len(value) for value in tensors})
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(
            f"example must hold tensors of one batch size, the first axis; got sizes {sizes}."
        )

    def doubled(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == 1:
            return torch.cat([value, value])
        return value

    given = pytree.tree_map(doubled, given)
    if isinstance(given, dict):
        return (), given
    return (given if isinstance(given, tuple) else (given,)), {}


def _hypot(onnxscript: Any) -> Any:
    """What the norm of a pair is in ONNX, which has no such operator."""
    op = onnxscript.opset18

    def hypot(one: Any, other: Any) -> Any:
        # Squares overflow above 1e19, where no response lies.
        return op.Sqrt(op.Add(op.Mul(one, one), op.Mul(other, other)))

    return hypot


def _tried(export: Any, run: Any) -> bytes:
    """The file's bytes, or one line that says why there are none."""
    with torch.no_grad():
        try:
            run()
        except Exception as error:
            raise ValueError(f"The network does not run on the example: {_line(error)}.") from None
    with _quiet():
        try:
            program = export()
        except Exception as error:
            cause = error.__cause__ or error
            raise ValueError(
                f"The network cannot be written as ONNX with a free batch size: {_line(cause)}."
            ) from None
        try:
            data: bytes = program.model_proto.SerializeToString()
        except Exception as error:
            raise ValueError(
                f"The network does not fit into one ONNX file of 2 GB: {_line(error)}."
            ) from None
    return data


def _line(error: BaseException) -> str:
    """The first sentence of what may be a page of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0]:.300}".rstrip(" .:")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on other packages, its future, and what is raised anyway."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
