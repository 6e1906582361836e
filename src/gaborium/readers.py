"""Read the files that people have: images, kernels, networks, scripts."""

from __future__ import annotations

import importlib.util
import os
import stat
import sys
import traceback
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gaborium.conversion import find_first_conv
from gaborium.layers import PLAIN_LAYERS
from gaborium.storage import load_layer
from gaborium.support import require

# Formats that hold pixels only: Pillow would hand PostScript to Ghostscript.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_WHITE = {"b1": 1.0, "u1": 255.0, "u2": 65535.0, "f2": 1.0, "f4": 1.0, "f8": 1.0}
_BITS, _PHOTOMETRIC, _BLACK_IS_ZERO = 258, 262, 1  # two TIFF tags, a value of the second
_MAX_SIDE = 256  # px of a kernel; a larger array is a photograph or holds flattened kernels
_LISTED = 12  # names in a message


# -- images -----------------------------------------------------------------------------------


def read_image(path: str | os.PathLike[str]) -> Tensor:
    r"""Read one image with Pillow, or a NumPy array. Nothing in a file is executed.

    Convention:
        - 0 is black and 1 is white; gamma and colour profiles are not applied
        - grey images have 1 channel; all others, also palettes, become colour
        - transparent pixels are laid over white; the EXIF orientation is applied

    Args:
        path: a PNG, JPEG, TIFF, BMP, GIF, WebP or PPM file, whatever its name; or a ``.npy`` array
            ``(height, width)`` or ``(height, width, 1 or 3)``, boolean, uint8, uint16 or floating.

    Returns:
        Shape ``(channels, height, width)`` with 1 channel (grey) or 3 (red, green, blue),
        float64, in [0, 1].

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no such image, damaged, an animation, has several pages, or black and
            white are not defined for its numbers.
        ImportError: Pillow is not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "stripes.pgm")
        ...     _ = file.write_text("P2\n3 2\n255\n0 255 0\n0 255 0\n")
        ...     read_image(file).tolist()
        [[[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]]
    """
    numpy = require("numpy", extra="cli", purpose="Images")
    with reading(path):
        is_array = Path(path).suffix.lower() == ".npy"
        array = numpy.load(path, allow_pickle=False) if is_array else _decode(path)
        array = array[:, :, None] if array.ndim == 2 else array
        white = _WHITE.get(array.dtype.str[1:])
        if not white or array.ndim != 3 or array.shape[2] > 4 or not array.size:
            raise ValueError(
                f"it holds {array.dtype} of shape {array.shape}, expected one image of 8 or 16 "
                "bits or floating values in [0, 1], (height, width) or (height, width, 3)"
            )
        values = torch.from_numpy(numpy.array(array.transpose(2, 0, 1), "f8", order="C")) / white
        low, high = values.aminmax()
        if not (low >= 0 and high <= 1):  # NaN compares false
            raise ValueError(
                f"it holds values from {low.item():.4g} to {high.item():.4g}, expected 0 (black) "
                "to 1 (white)"
            )
    if len(values) in (1, 3):
        return values
    return values[:-1] * values[-1:] + (1 - values[-1:])


def _decode(path: str | os.PathLike[str]) -> Any:
    """An array of one image, with the last channel for opacity where some pixels are not opaque."""
    numpy = require("numpy", extra="cli", purpose="Images")
    pillow = require("PIL.Image", extra="cli", purpose="Images")
    # Not by its name: Pillow would map the file, and not turn a TIFF.
    with Path(path).open("rb") as file:
        image = pillow.open(file, formats=_FORMATS)
        n_pages = getattr(image, "n_frames", 1)
        if n_pages > 1 and image.format != "MPO":
            raise ValueError(f"it holds {n_pages} pictures (an animation or pages), expected one")
        image.load()
    wide = image.mode.startswith("I")
    if wide and image.format == "TIFF":
        kind = (image.mode[:4], image.tag_v2[_BITS], image.tag_v2[_PHOTOMETRIC])
        if kind != ("I;16", (16,), _BLACK_IS_ZERO):
            raise ValueError("it holds other numbers than 16 bits from 0, black; save it as PNG")
    with suppress(Exception):  # broken EXIF says nothing against the pixels
        image = require("PIL.ImageOps", extra="cli", purpose="Images").exif_transpose(image)
    if wide or image.mode == "F":
        return numpy.asarray(image, "u2" if wide else "f4")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    return numpy.asarray(image.convert(mode + "A" * image.has_transparency_data))


def read_images(
    path: str | os.PathLike[str], max_images: int | None = None
) -> list[tuple[str, Tensor]]:
    r"""Read an image file, or the images of a folder in the order of their names.

    Images are the files with a suffix such as ``.png`` or ``.jpg``. A warning lists other files;
    hidden files and subfolders are ignored.

    Args:
        path: a file or a folder.
        max_images: number of images to read at most; a warning says that there are more.

    Returns:
        Pairs of the file's name, without its folder, and an image of ``read_image``.

    Raises:
        OSError: as for ``read_image``, or the folder has no images.
        ValueError: as for ``read_image``, for the first file that cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("b.pgm", "a.pgm"):
        ...         _ = Path(folder, name).write_text("P2\n2 1\n255\n0 255\n")
        ...     [(name, tuple(image.shape)) for name, image in read_images(folder)]
        [('a.pgm', (1, 1, 2)), ('b.pgm', (1, 1, 2))]
    """
    place, suffixes = Path(path), (*_IMAGES, ".npy")
    if not place.is_dir():
        return [(place.name, read_image(place))]
    entries = sorted(entry for entry in place.iterdir() if entry.name[0] != ".")
    files = [entry for entry in entries if entry.suffix.lower() in suffixes and entry.is_file()]
    if not files:
        raise FileNotFoundError(f"No images in the folder {str(place)!r}: {', '.join(suffixes)}.")
    if len(files) < len(entries):
        skipped = _some(repr(entry.name) for entry in entries if entry not in files)
        warnings.warn(f"Skipped in {str(place)!r}: {skipped}.", stacklevel=2)
    if max_images is not None and len(files) > max_images:
        warnings.warn(
            f"Using the first {max_images} of {len(files)} images in {str(place)!r} "
            "(--max-images).",
            stacklevel=2,
        )
    return [(file.name, read_image(file)) for file in files[:max_images]]


def sample_image() -> Tensor:
    """The photograph that scikit-image brings along (``skimage.data.camera``).

    Returns:
        Shape ``(1, 512, 512)``, float64, in [0, 1].

    Raises:
        ImportError: scikit-image is not installed.

    Example:
        >>> tuple(sample_image().shape)
        (1, 512, 512)
    """
    data = require("skimage.data", extra="cli", purpose="Photographs")
    return torch.from_numpy(data.camera()).double().unsqueeze(0) / 255


# -- kernels ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class KernelFile:
    """Kernels and where they come from.

    Args:
        values: floating, ``(filters, *size)``, ``(filters, channels, *size)`` or a single kernel;
            NaN and infinity are kept.
        n_dims: spatial dimensions of a kernel.
        key: the array's name in the file; empty where arrays have no names.
        arrays: all tensors of the file by name, for ``weights_with``.
        found: the layer of a script or of a file of ``save_layer``.
    """

    values: Tensor
    n_dims: int
    key: str
    arrays: Mapping[str, Tensor]
    found: Any = None

    @property
    def bias_key(self) -> str:
        """Name of the kernels' bias: the key with ``bias`` in place of ``weight``."""
        stem, weight, _ = (self.key or "weight").rpartition("weight")
        return f"{stem}bias" if weight else f"{self.key}_bias"

    def weights_with(self, layer: Any) -> dict[str, Tensor]:
        """All tensors, with the kernels and the bias of another layer in their places."""
        values = {self.key or "weight": layer.weight.detach()}
        if layer.bias is not None:
            values[self.bias_key] = layer.bias.detach()
        named = {name: array for name, array in self.arrays.items() if name}
        return named | {name: value.to(self.values.dtype) for name, value in values.items()}

    def layer(self, *, stride: int = 1, padding: int | None = None) -> Any:
        """Return the layer that was found, or an ``nn.ConvNd`` of at least float32.

        Args:
            stride: of a layer from weights.
            padding: of a layer from weights; by default half a kernel.
        """
        if self.found is not None:
            return self.found
        axes, size = self.values.shape[: -self.n_dims], self.values.shape[-self.n_dims :]
        in_channels = axes[-1] if len(axes) > 1 else 1
        # Half precision is for storage: not every machine convolves in it.
        dtype = torch.promote_types(self.values.dtype, torch.float32)
        state = {"weight": self.values.to(dtype).reshape(-1, in_channels, *size)}
        bias, n_filters = self.arrays.get(self.bias_key), len(state["weight"])
        if bias is not None and bias.shape == (n_filters,):
            state["bias"] = bias.to(dtype)
        around = tuple(side // 2 for side in size) if padding is None else padding
        layer: Any = PLAIN_LAYERS[self.n_dims](
            in_channels, n_filters, size, stride, around, bias="bias" in state, device="meta"
        )
        layer.load_state_dict(state, assign=True)
        return layer


def read_kernels(
    path: str | os.PathLike[str], *, key: str | None = None, n_dims: int = 2
) -> KernelFile:
    """Read kernels from a file of arrays, images, a saved layer or a script's network.

    Reads NumPy's ``.npy`` and ``.npz``, ``.safetensors``, tensors and state dicts in ``.pt`` or
    ``.pth``, ``.onnx``, images and folders of images; files of ``save_layer``; and Python files as
    for ``run_setup``. Only the last are executed: what needs unpickling is refused.

    Convention:
        - axes are PyTorch's: ``(filters, channels, height, width)``; the first ones may be missing
        - ``.onnx``, ``.pt``, ``.pth`` and networks keep the order of layers: the first convolution
          is taken, and a warning names it where others follow
        - otherwise the only array of kernels is taken: floating, with ``n_dims`` axes of at least
          2 px. Of several, it is the only one with 3 input channels, or else with 1
        - of images, mid-grey is 0, black -1 and white 1; next to colours, grey gets 3 channels

    Args:
        path: the file or folder.
        key: name of the array, with dots between nested dicts: ``"state_dict.conv1.weight"``. The
            name of a layer stands for its weight.
        n_dims: spatial dimensions of a kernel in a file: 1, 2 or 3.

    Returns:
        The kernels, in the floating type of the file, or float64 of images and whole numbers.

    Raises:
        OSError: the file cannot be opened, or a folder has no images.
        ValueError: it is damaged, of another kind, or needs unpickling; the array of kernels is
            missing or not clear; or as for ``run_setup``.
        ImportError: safetensors, onnx or Pillow is needed and not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "model.pt")
        ...     torch.save({"conv1": nn.Conv2d(3, 8, 5).state_dict()}, file)
        ...     kernels = read_kernels(file)
        >>> kernels.key, kernels.layer()
        ('conv1.weight', Conv2d(3, 8, kernel_size=(5, 5), stride=(1, 1), padding=(2, 2)))
    """
    file = Path(path)
    is_script = file.suffix == ".py"
    if is_script or (file.is_file() and b"gaborium.layer" in file.read_bytes()[:1_000_000]):
        network = run_setup(file)[0] if is_script else load_layer(file)
        name, layer = find_first_conv(network, key)
        arrays = {name: value.detach() for name, value in network.state_dict().items()}
        weight: Any = layer.weight
        name += ".weight" if name else "weight"
        return KernelFile(weight.detach(), weight.ndim - 2, name, arrays, layer)
    arrays = _read_arrays(file)
    name = _chosen(file, arrays, key, n_dims)
    values, what = arrays[name], f"{name!r} of {str(file)!r}" if name else repr(str(file))
    n_least = n_dims + 2 if file.suffix.lower() == ".onnx" else n_dims
    is_kernels = values.ndim >= n_least and values.numel() > 0
    if not is_kernels or not 1 < max(values.shape[-n_dims:]) <= _MAX_SIDE:
        raise ValueError(
            f"{what} has shape {_by(values.shape)}, expected kernels of {n_dims} dimensions "
            f"(--n-dims) of 2 to {_MAX_SIDE} px, after axes for filters and channels; choose "
            "another array with key (--key), or reshape flattened kernels."
        )
    values = values if values.is_floating_point() else values.double()
    return KernelFile(values, n_dims, name, arrays)


def _chosen(file: Path, arrays: Mapping[str, Tensor], key: str | None, n_dims: int) -> str:
    """The name of the array of kernels."""
    if key is not None:
        if found := [name for name in (key, f"{key}.weight") if name in arrays]:
            return found[0]
        raise ValueError(f"{str(file)!r} has no array {key!r}, only {_listing(arrays)}.")
    if len(arrays) == 1:
        return next(iter(arrays))
    # A vector is probably a bias.
    shapes = {
        name: array.shape
        for name, array in arrays.items()
        if array.is_floating_point() and array.ndim >= max(n_dims, 2)
    }
    kernels = chosen = [name for name, shape in shapes.items() if min(shape[-n_dims:]) > 1]
    layers = [name for name, shape in shapes.items() if len(shape) == n_dims + 2]
    if layers and file.suffix.lower() in (".pt", ".pth", ".onnx"):  # in the order of a network
        kernels, chosen = layers, layers[:1]
    elif len(kernels) > 1:
        for n_channels in (1, 3):  # later convolutions of one channel each have 1 input channel too
            first = [name for name in kernels if name in layers and shapes[name][1] == n_channels]
            chosen = first or chosen
    if len(chosen) != 1:
        raise ValueError(
            f"{str(file)!r} holds {'several arrays' if chosen else 'no array'} that may be "
            f"kernels: {_listing({name: arrays[name] for name in chosen or arrays})}; choose one "
            "with key (--key)."
        )
    if len(kernels) > 1:
        warnings.warn(
            f"Reading {chosen[0]!r} of {str(file)!r}, {_by(shapes[chosen[0]])}, the first layer of "
            f"{len(kernels)}; key (--key) takes another.",
            stacklevel=3,
        )
    return chosen[0]


# -- scripts ----------------------------------------------------------------------------------


def run_setup(path: str | os.PathLike[str]) -> tuple[nn.Module, Any, Any, Any]:
    """Run a script and call its ``setup()``.

    The script runs as when it is imported, with its folder on the path: run only scripts that you
    trust.

    Args:
        path: a Python file that defines ``setup()``, without arguments, which returns a network;
            or ``(module, loss, (inputs, targets))``, or these and the optimizer.

    Returns:
        Module, loss, (inputs, targets) and optimizer; ``None`` for what was not returned.

    Raises:
        OSError: the file cannot be read.
        ValueError: the script or ``setup()`` failed, or returned something else.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     script = Path(folder, "mine.py")
        ...     _ = script.write_text("from torch import nn; setup = lambda: nn.Conv2d(1, 2, 7)")
        ...     run_setup(script)[0]
        Conv2d(1, 2, kernel_size=(7, 7), stride=(1, 1))
    """
    file = Path(path).resolve(strict=True)
    spec: Any = importlib.util.spec_from_file_location(f"_gaborium_script_{file.stem}", file)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    sys.path.insert(0, str(file.parent))
    try:
        with script_errors(path):
            spec.loader.exec_module(script)
            if not callable(getattr(script, "setup", None)):
                raise ValueError(f"{os.fspath(path)!r} defines no function setup().")
            returned = script.setup()
    finally:
        sys.path.remove(str(file.parent))
    parts = returned if isinstance(returned, tuple) else (returned,)
    match parts if len(parts) > 3 else (*parts, None):
        case (nn.Module() as module, None):
            return module, None, None, None
        case (nn.Module() as module, loss, (inputs, targets), optimizer) if callable(loss):
            if optimizer is None or isinstance(optimizer, torch.optim.Optimizer):
                return module, loss, (inputs, targets), optimizer
    raise ValueError(
        f"setup() in {os.fspath(path)!r} must return a network, or (module, loss, (inputs, "
        f"targets)), or these and the optimizer, got {', '.join(type(p).__name__ for p in parts)}."
    )


@contextmanager
def script_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors that pass through a script's code become one line with the number of its line."""
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        file = Path(path).resolve()
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file]
        if isinstance(error, SyntaxError) and Path(error.filename or "").resolve() == file:
            lines = [error.lineno]
        if not lines and isinstance(error, (TypeError, ValueError)):
            raise
        place = os.fspath(path) + (f", line {lines[-1]}" if lines else "")
        what = f"{type(error).__name__}: {' '.join(str(error).split()):.200}".rstrip(": ")
        raise ValueError(f"{place}: {what}") from error


# -- arrays in files --------------------------------------------------------------------------


def _read_arrays(file: Path) -> dict[str, Tensor]:
    """All tensors of real numbers by name, in their order; one without a name is called ``""``."""
    if file.is_dir() or file.suffix.lower() in _IMAGES:
        named = read_images(file)
        n_channels = max(len(image) for _, image in named)
        sizes = sorted({tuple(image.shape[1:]) for _, image in named})
        if len(sizes) > 1:
            raise ValueError(
                f"The images in {str(file)!r} must have one size to be kernels, got "
                f"{_some(map(_by, sizes))} px."
            )
        warnings.warn(f"{str(file)!r} is read as kernels whose 0 is mid-grey.", stacklevel=3)
        values = torch.stack([image.expand(n_channels, -1, -1) for _, image in named])
        return {"": 2 * values - 1}
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{str(file)!r} must be {', '.join(_READERS)}, an image or a folder of images."
        )
    with reading(file):
        arrays = {
            name: array
            for name, array in reader(file)
            if array.layout is torch.strided and not array.is_quantized
            if not array.is_complex() and array.dtype != torch.bool
        }
        if not arrays:
            raise ValueError("it holds no arrays of real numbers")
    return arrays


def _read_numpy(file: Path) -> Iterator[tuple[str, Tensor]]:
    numpy = require("numpy", extra="cli", purpose="Kernel files")
    with file.open("rb") as stream:
        content = numpy.load(stream, allow_pickle=False)
        for key in getattr(content, "files", [""]):
            with suppress(ValueError, TypeError):  # texts and objects next to the kernels
                array = content[key] if key else content
                yield key, torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))


def _read_safetensors(file: Path) -> Iterable[tuple[str, Tensor]]:
    safetensors = require("safetensors.torch", extra="cli", purpose=".safetensors files")
    return safetensors.load_file(file).items()


def _read_torch(file: Path) -> Iterable[tuple[str, Tensor]]:
    if not zipfile.is_zipfile(file):
        raise ValueError("torch.save has not written it")
    return _tensors(torch.load(file, map_location="cpu", weights_only=True), "")


def _tensors(content: Any, key: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dicts and lists, with dots between their names."""
    if isinstance(content, Tensor):
        yield key, content.detach()
    elif isinstance(content, (dict, list, tuple)):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for name, item in items:
            yield from _tensors(item, f"{key}.{name}" if key else str(name))


def _read_onnx(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Kernels of a graph's convolutions, in the order in which they run; nothing is executed."""
    onnx = require("onnx", extra="onnx", purpose=".onnx files")
    graph = onnx.load_model_from_string(file.read_bytes()).graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:  # sorted: a node comes after those that it needs
        if "Conv" not in node.op_type:
            continue
        if node.op_type != "Conv" or node.input[1] not in held:
            return  # its kernels are computed, quantised, or of another kind
        # onnx reads other files from the folder of this one only.
        array = onnx.numpy_helper.to_array(held[node.input[1]], base_dir=str(file.parent))
        yield node.input[1], torch.from_numpy(array.copy())


_READERS = {
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".onnx": _read_onnx,
}


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever fails in a decoder becomes one line that names the file; warnings are silenced."""
    shown = repr(os.fspath(path))
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError(f"{shown} is not a file.")  # opening a pipe would wait for its writer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # damaged files make decoders fail in many ways
            if isinstance(error, OSError) and error.errno is not None:
                raise
            text = " ".join(str(error).split())
            if "allow_pickle" in text or "weights_only" in text or "Weights only" in text:
                text = "it needs unpickling, which can run code; save the numbers or the state dict"
            raise ValueError(f"{shown} cannot be read: {text.rstrip('.'):.250}.") from None


def _some(names: Iterable[str]) -> str:
    first = [*names]
    return ", ".join(first[:_LISTED]) + (", ..." if len(first) > _LISTED else "")


def _listing(arrays: Mapping[str, Tensor]) -> str:
    return _some(f"{k!r} ({_by(a.shape)}, {str(a.dtype)[6:]})" for k, a in arrays.items())


def _by(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape)) or "a single value"
