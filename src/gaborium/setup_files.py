"""Reading what to diagnose from a file: a set-up in a script of somebody's, or a saved layer."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gaborium.coordinates import Coordinates
from gaborium.diagnostics import Diagnosis, TrainingSetup, health
from gaborium.kernel_files import read_arrays, read_kernels
from gaborium.kernels import suggest_kernel_size
from gaborium.layers import LAYERS, PLAIN_LAYERS

_EXPECTED = "(module, loss, (inputs, targets)) or (module, loss, (inputs, targets), optimizer)"
_LARGEST = 101  # px; an envelope that needs more is a plane wave to whoever looks
_LONGEST = 200  # characters of somebody else's message


_NO_DATA = "A file of kernels holds no inputs, no targets and no loss."
_NO_OPTIONS = (
    "A state dict does not tell them; where the code of a remedy names them, put in your layer's."
)


class ScriptError(ValueError):
    """A script failed; the message is one line that says where and why."""


# -- scripts ----------------------------------------------------------------------------------


def run_setup(path: str | os.PathLike[str]) -> TrainingSetup:
    """Run a script and call its ``setup()``.

    The script runs as a module would when it is imported, with its own folder on the path. What it
    does is up to it, as with every program: run only scripts that you trust.

    Args:
        path: a Python file that defines ``setup()``, without arguments, which returns
            ``(module, loss, (inputs, targets))``, or these and the optimizer.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ScriptError: the script or ``setup()`` failed, or returned something else.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     script = Path(folder, "mine.py")
        ...     _ = script.write_text('''
        ... import torch
        ... from gaborium import GaborConv2d
        ...
        ...
        ... def setup():
        ...     layer, image = GaborConv2d(1, 2, 7), torch.rand(1, 1, 16, 16)
        ...     return layer, torch.nn.functional.mse_loss, (image, 0 * layer(image).detach())
        ... ''')
        ...     type(run_setup(script).module).__name__
        'GaborConv2d'
    """
    file, shown = Path(path), repr(os.fspath(path))
    if not file.exists():
        raise FileNotFoundError(f"There is no file {shown}; check the path.")
    if not file.is_file():
        raise ValueError(f"{shown} is not a file; name a Python file that defines setup().")
    name = f"_gaborium_script_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    with _own_place(name, script, file), one_line(file):
        spec.loader.exec_module(script)
        setup = getattr(script, "setup", None)
        if not callable(setup):
            raise ScriptError(f"{shown} defines no function setup(); it must return {_EXPECTED}.")
        return _checked(setup(), shown)


@contextmanager
def one_line(path: str | os.PathLike[str], *, ours: bool = False) -> Iterator[None]:
    """Whatever fails in a script's code becomes one line: the line's number, and why.

    Args:
        path: of the script.
        ours: whether the block is this library's work, whose own messages are left as they are.

    Raises:
        ScriptError: the block raised, also ``SystemExit``.
    """
    try:
        yield
    except (ScriptError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        lines = _lines(error, Path(path))
        if ours and not lines and isinstance(error, (ValueError, TypeError)):
            raise
        raise ScriptError(_told(error, Path(path), lines)) from error


def _lines(error: BaseException, file: Path) -> list[int | None]:
    """The numbers of the script's lines that were being run, the outermost first."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == file.resolve()
    ]
    if isinstance(error, SyntaxError) and Path(error.filename or "").resolve() == file.resolve():
        lines.append(error.lineno)
    return lines


def _told(error: BaseException, file: Path, lines: list[int | None]) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    text = " ".join(text.split())
    if len(text) > _LONGEST:
        text = text[:_LONGEST].rstrip() + "…"
    kind = type(error).__name__
    place = f"{os.fspath(file)!r}" + (f", line {lines[-1]}" if lines else "")
    return f"{place}: {kind}: {text}" if text else f"{place}: {kind}"


@contextmanager
def _own_place(name: str, script: Any, file: Path) -> Iterator[None]:
    """The script among the modules, and its folder first on the path, as when it is run."""
    folder = str(file.resolve().parent)
    sys.modules[name] = script  # dataclasses look their module up
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _checked(returned: Any, shown: str) -> TrainingSetup:
    """The set-up, or one line that says which part of it is not what it should be."""
    if not isinstance(returned, tuple) or len(returned) not in (3, 4):
        what = type(returned).__name__
        if isinstance(returned, tuple):
            what = f"a tuple of {len(returned)}"
        raise ScriptError(f"setup() in {shown} must return {_EXPECTED}, got {what}.")
    module, loss, data, *rest = returned
    optimizer = rest[0] if rest else None
    expected = {
        "an nn.Module first": (module, isinstance(module, nn.Module)),
        "a function loss(output, target) second": (loss, callable(loss)),
        "a pair (inputs, targets) third": (
            data,
            isinstance(data, (tuple, list)) and len(data) == 2,
        ),
        "an optimizer or None fourth": (
            optimizer,
            optimizer is None or isinstance(optimizer, torch.optim.Optimizer),
        ),
    }
    for what, (got, good) in expected.items():
        if not good:
            raise ScriptError(
                f"setup() in {shown} must return {what}, got {type(got).__name__}; it must "
                f"return {_EXPECTED}."
            )
    inputs, targets = data
    return TrainingSetup(module, loss, inputs, targets, optimizer)


# -- saved layers -----------------------------------------------------------------------------


def read_layer(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    kernel_size: int | None = None,
    n_dims: int = 2,
) -> tuple[nn.Module, dict[str, str]]:
    """Read a layer for ``health``: a Gabor layer's state dict, or else any kernels.

    A state dict holds no kernel size, and does not tell a real output from an energy, nor whether
    wavelengths were bounded. The layer returned has a real output, unbounded wavelengths and, if
    no kernel size is given, one that holds every envelope.

    Args:
        path: a file or folder that ``read_kernels`` can read. Nothing in it is executed.
        key: prefix of the Gabor layer's names in a file with several (``"conv1"`` for
            ``"conv1.log_sigma"``), or the name of an array of kernels.
        kernel_size: of the Gabor layer, px.
        n_dims: spatial dimensions of kernels; of a Gabor layer they are known.

    Returns:
        A Gabor layer, or a plain convolution with the kernels; and where it comes from, by name.

    Raises:
        FileNotFoundError: there is no such path.
        OSError: it cannot be opened.
        ValueError: the file is none of those kinds, damaged, holds several layers and no ``key``
            is given, or parts of the layer are missing or disagree in shape.
        ImportError: NumPy, safetensors or Pillow is needed and not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from gaborium import GaborConv2d
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "model.pt")
        ...     torch.save(nn.Sequential(GaborConv2d(3, 8, 9), nn.ReLU()).state_dict(), file)
        ...     layer, facts = read_layer(file, kernel_size=9)
        >>> layer.n_filters, facts["layer"]
        (8, '0')
    """
    shown = repr(os.fspath(path))
    arrays = {n: a for n, a in read_arrays(path).items() if isinstance(a, Tensor)}
    prefixes = [n.removesuffix("log_sigma") for n in arrays if n.rpartition(".")[2] == "log_sigma"]
    if key is not None:
        prefixes = [p for p in prefixes if p.rstrip(".") == key.rstrip(".")]
    if len(prefixes) > 1:
        names = ", ".join(repr(prefix.rstrip(".")) for prefix in prefixes)
        raise ValueError(f"{shown} holds several Gabor layers: {names}; choose one with --key.")
    if prefixes:
        prefix = prefixes[0]
        state = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        layer = _gabor_layer(state, prefix, shown, kernel_size)
        size = " × ".join(map(str, layer.kernel_size))
        guessed = "" if kernel_size else ", suggested from sigma: the file does not tell"
        return layer, {
            "file": Path(path).name,
            **({"layer": prefix.rstrip(".")} if prefix else {}),
            "kernel size": size + guessed,
        }
    if kernel_size is not None:
        raise ValueError(f"{shown} holds no Gabor layer, so --kernel-size has no meaning.")
    found = read_kernels(path, key=key, n_dims=n_dims)
    values = found.values
    if values.ndim == n_dims:
        values = values.unsqueeze(0)
    if values.ndim == n_dims + 1:
        values = values.unsqueeze(1)
    values = values.flatten(0, -n_dims - 2)
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    conv = PLAIN_LAYERS[n_dims](
        values.shape[1], len(values), tuple(values.shape[2:]), bias=False, device="meta"
    )
    conv.weight = nn.Parameter(values)
    return conv, {
        "file": found.name,
        **({"array": found.key} if found.key else {}),
        "shape": " × ".join(map(str, found.values.shape)),
        "SHA-256": found.sha256,
    }


def look_at_filters(layer: nn.Module, name: str = "") -> Diagnosis:
    """The diagnosis of a layer without inputs and loss: of its filters alone.

    Args:
        layer: such as ``read_layer`` returns.
        name: of the layer in the network that it comes from, for the code of remedies.

    Example:
        >>> from gaborium import GaborConv2d
        >>> [found.cause for found in look_at_filters(GaborConv2d(1, 8, 9, seed=0)).findings]
        ['DC leak']
    """
    found = health(layer, name=name)
    skipped = dict.fromkeys(("gradients", "landscapes", "step limit", "trials"), _NO_DATA)
    if any("stride=" in one.remedy for one in found.findings):
        skipped["stride, padding, learn and the like"] = _NO_OPTIONS
    nothing = (float("nan"), float("nan"))
    setup = TrainingSetup(_network(layer, name), _no_loss, None, None)
    part = f"health of {name}" if name else "health"
    return Diagnosis(found.findings, {part: found}, skipped, [], nothing, setup)


def _network(layer: nn.Module, name: str) -> nn.Module:
    """A module that has nothing in it but the layer under its name."""
    for step in reversed(name.split(".") if name else []):
        whole = nn.Module()
        whole.add_module(step, layer)
        layer = whole
    return layer


def _no_loss(output: Any, target: Any) -> Tensor:  # noqa: ARG001
    raise ValueError("A layer that was read from a file has no loss.")


def _gabor_layer(state: dict[str, Tensor], prefix: str, shown: str, size: int | None) -> Any:
    """The layer whose raw tensors these are."""
    what = f"The Gabor layer {prefix.rstrip('.')!r} in {shown}" if prefix else f"{shown}"
    if (
        "center" not in state
        or state["center"].ndim != 3
        or state["center"].shape[-1] not in LAYERS
    ):
        raise ValueError(
            f"{what} has log_sigma but no center of shape (filters, channels, 1 to 3); save the "
            "whole layer.state_dict()."
        )
    n_dims = state["center"].shape[-1]
    coordinates = Coordinates(
        n_dims, joint_wave="angular_wave_vector" in state, joint_phase="even" in state
    )
    missing = [name for name in coordinates.raw_fields() if name not in state]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}; save the whole layer.state_dict().")
    raw = {name: state[name].double() for name in coordinates.raw_fields()}
    strange = [name for name, value in raw.items() if not bool(value.isfinite().all())]
    if strange:
        raise ValueError(f"{what} holds NaN or infinity in {', '.join(strange)}.")
    try:
        params = coordinates.from_raw(raw).expand()
    except (RuntimeError, ValueError):
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in raw.items())
        raise ValueError(f"{what} has parameters whose shapes do not agree: {shapes}.") from None
    n_filters, n_channels = params.batch_shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the findings say it
        return LAYERS[n_dims](
            n_channels,
            n_filters,
            size or tuple(min(side, _LARGEST) for side in suggest_kernel_size(params)),
            bias=False,
            geometry="filter" if raw["log_sigma"].shape[1] == 1 else "pair",
            start=params,
        )
