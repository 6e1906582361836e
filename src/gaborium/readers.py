"""Read the files that people have: images, kernels, networks, scripts."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import stat
import sys
import traceback
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gaborium.conversion import find_first_conv
from gaborium.diagnostics import TrainingSetup
from gaborium.layers import PLAIN_LAYERS
from gaborium.storage import load_layer
from gaborium.support import as_sizes, require

# Formats that hold pixels only: Pillow would hand PostScript to Ghostscript.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_WHITE_IS_ZERO, _SIGNED = 0, 2  # values of the last two
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
    shown = repr(os.fspath(path))
    with _reading(path):
        if Path(path).suffix.lower() == ".npy":
            array = numpy.load(path, allow_pickle=False)
            kind, n_bytes = array.dtype.kind, array.dtype.itemsize
            white = {"u": 2.0 ** (8 * n_bytes) - 1, "b": 1.0, "f": 1.0}.get(kind, 0.0)
        else:
            array, white = _decode(path, numpy)
    if array.ndim == 2:
        array = array[:, :, None]
    shape = array.shape
    if not white or white > 65535 or len(shape) != 3 or shape[2] > 4 or not array.size:
        raise ValueError(
            f"{shown} holds {array.dtype} of shape {shape}, expected one image of 8 or 16 bits or "
            "floating values in [0, 1], (height, width) or (height, width, 3)."
        )
    values = torch.from_numpy(numpy.array(array.transpose(2, 0, 1), numpy.float64, order="C"))
    values /= white
    low, high = values.aminmax()
    if not (low >= 0 and high <= 1):  # NaN compares false
        raise ValueError(
            f"{shown} holds values from {low.item():.4g} to {high.item():.4g}, expected 0 (black) "
            "to 1 (white)."
        )
    if len(values) in (1, 3):
        return values
    return values[:-1] * values[-1:] + (1 - values[-1:])


def _decode(path: str | os.PathLike[str], numpy: Any) -> tuple[Any, float]:
    """An array of one image and its value for white, 0 if unknown."""
    pillow = require("PIL.Image", extra="cli", purpose="Images")
    # Not by its name: Pillow would map the file, and not turn a TIFF.
    with Path(path).open("rb") as file:
        image = pillow.open(file, formats=_FORMATS)
        n_pages = getattr(image, "n_frames", 1)
        if n_pages > 1 and image.format != "MPO":
            raise ValueError(f"it holds {n_pages} pictures (an animation or pages), expected one")
        image.load()
    tags, is_16_bit_file = getattr(image, "tag_v2", {}), image.format in ("PNG", "PPM")
    if image.format != "TIFF":  # Pillow has turned a TIFF
        with suppress(Exception):  # broken EXIF says nothing against the pixels
            image = require("PIL.ImageOps", extra="cli", purpose="Images").exif_transpose(image)
    if image.mode == "F":
        return numpy.asarray(image), 1.0
    signed = _SIGNED in tags.get(_SAMPLE_FORMAT, ())
    if signed or (image.mode == "I" and not is_16_bit_file):  # or 32 bits
        return numpy.asarray(image), 0.0
    if image.mode.startswith("I"):
        array, white = numpy.asarray(image), 2.0 ** tags.get(_BITS, (16,))[0] - 1
        # Pillow inverts such images of 8 bits only.
        return white - array if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else array, white
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    clear = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    return numpy.asarray(image.convert(mode + "A" * clear)), 255.0


def read_images(path: str | os.PathLike[str]) -> list[tuple[str, Tensor]]:
    r"""Read an image file, or all images of a folder in the order of their names.

    Images are the files with a suffix such as ``.png`` or ``.jpg``. A warning lists other files;
    hidden files and subfolders are ignored.

    Args:
        path: a file or a folder.

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
        raise FileNotFoundError(
            f"No images in the folder {os.fspath(path)!r}: {', '.join(suffixes)}."
        )
    if len(files) < len(entries):
        skipped = _some(repr(entry.name) for entry in entries if entry not in files)
        warnings.warn(f"Skipped in {os.fspath(path)!r}: {skipped}.", stacklevel=2)
    return [(file.name, read_image(file)) for file in files]


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


def center_crop(image: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Cut the middle out of an image.

    Convention:
        - where an odd number of pixels is cut off, the extra one goes from the bottom and right

    Args:
        image: shape ``(*batch, height, width)``.
        size: height and width of the result in px; one number for a square.

    Returns:
        Shape ``(*batch, *size)``, a view of ``image``.

    Raises:
        ValueError: ``size`` is larger than the image, or not positive whole numbers.

    Example:
        >>> center_crop(torch.arange(20.0).reshape(1, 4, 5), 2).tolist()
        [[[6.0, 7.0], [11.0, 12.0]]]
    """
    height, width = as_sizes("size", size, 2)
    if image.ndim < 2 or image.shape[-2] < height or image.shape[-1] < width:
        raise ValueError(
            f"center_crop needs an image of at least {height} x {width} pixels, got shape "
            f"{tuple(image.shape)}; choose a smaller size or a larger image."
        )
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]


# -- kernels ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class KernelFile:
    """Kernels and where they come from.

    Args:
        values: floating, ``(filters, *size)``, ``(filters, channels, *size)`` or a single kernel;
            NaN and infinity are kept.
        name: of the file or folder, without its parents.
        key: the array's name in the file, or ``None`` where arrays have no names.
        sha256: of the file; of a folder, of its images one after another.
        arrays: all tensors of the file by name, for ``weights_with``.
    """

    values: Tensor
    name: str
    key: str | None
    sha256: str
    arrays: dict[str, Tensor] = field(default_factory=dict)

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


def read_kernels(
    path: str | os.PathLike[str], *, key: str | None = None, n_dims: int = 2
) -> KernelFile:
    """Read kernels from a file of arrays, an image or a folder of images.

    Reads NumPy's ``.npy`` and ``.npz``, ``.safetensors``, tensors and state dicts in ``.pt`` or
    ``.pth``, and ``.onnx``. Nothing in a file is executed: what needs unpickling is refused.

    Convention:
        - axes are PyTorch's: ``(filters, channels, height, width)``; the first ones may be missing
        - ``.onnx``, ``.pt`` and ``.pth`` keep the order of layers: the first convolution is taken
        - otherwise the only array of kernels is taken: floating, with ``n_dims`` axes of at least
          2 px. Of several, it is the only one with 3 input channels, or else with 1
        - a warning names the array where others were possible
        - of images, mid-grey is 0, black -1 and white 1; next to colours, grey gets 3 channels

    Args:
        path: the file or folder.
        key: name of the array, with dots between nested dicts: ``"state_dict.conv1.weight"``. The
            name of a layer stands for its weight.
        n_dims: spatial dimensions of a kernel: 1, 2 or 3.

    Returns:
        The kernels, in the floating type of the file, or float64 of images and whole numbers.

    Raises:
        OSError: the file cannot be opened, or a folder has no images.
        ValueError: it is damaged, of another kind, or needs unpickling; or the array of kernels is
            missing or not clear.
        ImportError: safetensors, onnx or Pillow is needed and not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "model.pt")
        ...     torch.save(torch.nn.Conv2d(3, 8, 5).state_dict(), file)
        ...     kernels = read_kernels(file)
        >>> kernels.key, tuple(kernels.values.shape)
        ('weight', (8, 3, 5, 5))
    """
    file = Path(path)
    if file.is_dir() or file.suffix.lower() in _IMAGES:
        if key is not None:
            raise ValueError(f"{os.fspath(path)!r} holds images, which have no key.")
        return _image_kernels(file)
    arrays = _read_arrays(file)
    name, n_candidates = _chosen(file, arrays, key, n_dims)
    values, what = arrays[name], f"{name!r} of {os.fspath(file)!r}" if name else repr(str(file))
    if not _is_real(values):
        raise ValueError(f"{what} holds {values.dtype}, expected real numbers.")
    size = tuple(values.shape[-n_dims:])
    onnx = file.suffix.lower() == ".onnx"
    if values.ndim < n_dims or values.numel() == 0 or (onnx and values.ndim != n_dims + 2):
        raise ValueError(
            f"{what} has shape {tuple(values.shape)}, expected kernels of {n_dims} dimensions, "
            "after axes for filters and channels (n_dims, --n-dims)."
        )
    if not 1 < max(size) <= _MAX_SIDE:
        raise ValueError(
            f"{what} would be kernels of {_by(size)} px, expected 2 to {_MAX_SIDE} px a side; "
            "choose another array with key (--key), or reshape flattened kernels."
        )
    if n_candidates > 1:
        warnings.warn(
            f"Reading {what}, {_by(values.shape)}, the first layer of {n_candidates}; key (--key) "
            "takes another.",
            stacklevel=2,
        )
    if values.ndim == 4 and values.shape[0] == values.shape[1] and values.shape[2] in (1, 3):
        warnings.warn(
            f"{what} of shape {tuple(values.shape)} looks like (height, width, in, out), "
            "expected (out, in, height, width).",
            stacklevel=2,
        )
    if not values.is_floating_point():
        warnings.warn(
            f"{what} holds {str(values.dtype)[6:]}, in which 0 is taken as 0; if another value "
            "means 0, subtract it before saving.",
            stacklevel=2,
        )
        values = values.double()
    return KernelFile(values, file.absolute().name, name or None, _sha256([file]), arrays)


def _image_kernels(path: Path) -> KernelFile:
    shown = repr(str(path))
    images = read_images(path)
    sizes = {tuple(image.shape[1:]) for _, image in images}
    if len(sizes) > 1 or max(max(sizes)) > _MAX_SIDE:
        raise ValueError(
            f"The images in {shown} must have one size of at most {_MAX_SIDE} px a side to be "
            f"kernels, got {_some(map(_by, sorted(sizes)))} px."
        )
    n_channels = max(len(image) for _, image in images)
    values = torch.stack([image.expand(n_channels, -1, -1) for _, image in images])
    warnings.warn(f"{shown} is read as kernels whose 0 is mid-grey.", stacklevel=2)
    files = [path / name for name, _ in images] if path.is_dir() else [path]
    return KernelFile(2 * values - 1, path.absolute().name, None, _sha256(files))


def _chosen(file: Path, arrays: dict[str, Tensor], key: str | None, n_dims: int) -> tuple[str, int]:
    """The name of the array of kernels, and how many others may be meant."""
    shown, ordered = repr(str(file)), file.suffix.lower() in (".pt", ".pth", ".onnx")
    if key is not None:
        found = next((name for name in (key, f"{key}.weight") if name in arrays), None)
        if found is None:
            raise ValueError(f"{shown} has no array {key!r}, only {_listing(arrays)}.")
        return found, 1
    if len(arrays) == 1:
        return next(iter(arrays)), 1
    floating = {name: array for name, array in arrays.items() if array.is_floating_point()}
    layers = [
        name
        for name, array in floating.items()
        if array.ndim == n_dims + 2 and (name.endswith("weight") or file.suffix.lower() == ".onnx")
    ]
    # A vector is probably a bias.
    shaped = {name: a for name, a in floating.items() if a.ndim >= max(n_dims, 2)}
    kernels = [name for name, array in shaped.items() if min(array.shape[-n_dims:]) > 1]
    n_candidates = len(kernels)
    if ordered and layers:
        kernels, n_candidates = layers[:1], len(layers)
    elif n_candidates > 1:
        # Later convolutions of one channel each have 1 input channel too.
        convs = {name: arrays[name].shape[1] for name in kernels if arrays[name].ndim == n_dims + 2}
        colored = [name for name, n_channels in convs.items() if n_channels == 3]
        kernels = colored or [name for name, n in convs.items() if n == 1] or kernels
    if len(kernels) != 1:
        candidates = {name: arrays[name] for name in kernels} or arrays
        raise ValueError(
            f"{shown} holds {'several arrays' if kernels else 'no array'} that may be kernels: "
            f"{_listing(candidates)}; choose one with key (--key)."
        )
    return kernels[0], n_candidates


def _is_real(array: Tensor) -> bool:
    plain = array.layout is torch.strided and not array.is_quantized
    return plain and not array.is_complex() and array.dtype != torch.bool


# -- layers -----------------------------------------------------------------------------------


def read_layer(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    n_dims: int = 2,
    stride: int = 1,
    padding: int | None = None,
) -> tuple[Any, KernelFile]:
    """Read a convolution from a file of weights, a script or a file of ``save_layer``.

    Args:
        path: as for ``read_kernels``; or a file of ``save_layer``; or a Python file as for
            ``run_setup``, whose ``setup()`` may also return the network alone.
        key: of weights, as for ``read_kernels``; of a script, the layer's name.
        n_dims: spatial dimensions of a kernel in a file: 1, 2 or 3.
        stride: of a layer from weights.
        padding: of a layer from weights; by default half a kernel.

    Returns:
        The layer (a Gabor layer, or an ``nn.ConvNd`` of at least float32), and its kernels with
        all tensors of the network.

    Raises:
        ValueError: as for ``read_kernels`` and ``run_setup``; or a bias is not one number per
            filter.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "model.pt")
        ...     torch.save({"conv1": nn.Conv2d(3, 8, 5).state_dict()}, file)
        ...     layer, kernels = read_layer(file)
        >>> layer, kernels.key
        (Conv2d(3, 8, kernel_size=(5, 5), stride=(1, 1), padding=(2, 2)), 'conv1.weight')
    """
    file = Path(path)
    if file.suffix == ".py":
        network = _run(file)
        network = network[0] if isinstance(network, tuple) else network
        if not isinstance(network, nn.Module):
            raise ScriptError(f"setup() in {str(file)!r} must return an nn.Module (first).")
        name, layer = find_first_conv(network, key)
        name += "." if name else ""
    elif file.is_file() and b"gaborium.layer" in file.read_bytes()[:1_000_000]:
        network = layer = load_layer(file)
        name = ""
    else:
        kernels = read_kernels(file, key=key, n_dims=n_dims)
        return _conv(kernels, n_dims, stride, padding), kernels
    arrays = {key: value.detach() for key, value in network.state_dict().items()}
    weight: Any = layer.weight
    return layer, KernelFile(weight.detach(), file.name, f"{name}weight", _sha256([file]), arrays)


def _conv(kernels: KernelFile, n_dims: int, stride: int, padding: int | None) -> Any:
    weight, bias = kernels.values, kernels.arrays.get(kernels.bias_key)
    if weight.ndim == n_dims:
        weight = weight.unsqueeze(0)
    if weight.ndim == n_dims + 1:
        weight = weight.unsqueeze(1)
    weight = weight.flatten(0, -n_dims - 2)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{kernels.bias_key!r} in {kernels.name!r} must have one number for each of "
            f"{len(weight)} filters, got shape {tuple(bias.shape)}."
        )
    size = tuple(weight.shape[2:])
    around = tuple(side // 2 for side in size) if padding is None else padding
    layer: Any = PLAIN_LAYERS[n_dims](
        weight.shape[1], len(weight), size, stride, around, bias=bias is not None, device="meta"
    )
    # Half precision is for storage: not every machine convolves in it.
    layer.weight = nn.Parameter(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(layer.weight))
    return layer


# -- scripts ----------------------------------------------------------------------------------


class ScriptError(ValueError):
    """A script failed; the message is one line that says where and why."""


def run_setup(path: str | os.PathLike[str]) -> TrainingSetup:
    """Run a script and call its ``setup()``.

    The script runs as when it is imported, with its folder on the path: run only scripts that you
    trust.

    Args:
        path: a Python file that defines ``setup()``, without arguments, which returns
            ``(module, loss, (inputs, targets))``, or these and the optimizer.

    Raises:
        OSError: the file cannot be read.
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
    returned = _run(path)
    match returned:
        case (nn.Module(), loss, (inputs, targets), *rest) if callable(loss) and len(rest) < 2:
            if not rest or rest[0] is None or isinstance(rest[0], torch.optim.Optimizer):
                return TrainingSetup(returned[0], loss, inputs, targets, *rest)
    parts = returned if isinstance(returned, tuple) else (returned,)
    raise ScriptError(
        f"setup() in {os.fspath(path)!r} must return (module, loss, (inputs, targets)) or (module, "
        f"loss, (inputs, targets), optimizer), got {', '.join(type(p).__name__ for p in parts)}."
    )


def _run(path: str | os.PathLike[str]) -> Any:
    file = Path(path).resolve(strict=True)
    spec = importlib.util.spec_from_file_location(f"_gaborium_script_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{os.fspath(path)!r} is not a Python file.")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    sys.path.insert(0, str(file.parent))
    try:
        with script_errors(path):
            spec.loader.exec_module(script)
            if callable(getattr(script, "setup", None)):
                return script.setup()
    finally:
        sys.path.remove(str(file.parent))
    raise ScriptError(f"{os.fspath(path)!r} defines no function setup().")


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
        text = str(error)
        if isinstance(error, SyntaxError) and Path(error.filename or "").resolve() == file:
            lines, text = [error.lineno], error.msg
        if not lines and isinstance(error, (TypeError, ValueError)):
            raise
        place = os.fspath(path) + (f", line {lines[-1]}" if lines else "")
        what = f"{type(error).__name__}: {' '.join(text.split()):.200}".rstrip(": ")
        raise ScriptError(f"{place}: {what}") from error


# -- arrays in files --------------------------------------------------------------------------


def _read_arrays(file: Path) -> dict[str, Tensor]:
    """All tensors of a file by name, in its order; one without a name is called ``""``."""
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{str(file)!r} must be {', '.join(_READERS)}, an image or a folder of images."
        )
    with _reading(file):
        arrays = dict(reader(file))
    if not arrays:
        raise ValueError(f"{str(file)!r} holds no arrays of numbers.")
    return arrays


def _read_numpy(file: Path) -> Iterator[tuple[str, Tensor]]:
    numpy = require("numpy", extra="cli", purpose="Kernel files")
    with file.open("rb") as stream:
        content = numpy.load(stream, allow_pickle=False)
        if file.suffix.lower() == ".npy":
            yield "", _tensor(content)
            return
        for key in content.files:
            with suppress(ValueError, TypeError):  # texts and objects next to the kernels
                yield key, _tensor(content[key])


def _tensor(array: Any) -> Tensor:
    """A NumPy array as a tensor, in the machine's byte order; float64 in place of wider types."""
    dtype = array.dtype.newbyteorder("=")
    wide = dtype.kind == "f" and dtype.itemsize > 8
    return torch.from_numpy(array.astype("f8" if wide else dtype, order="C"))


def _read_safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    safetensors = require("safetensors", extra="cli", purpose=".safetensors files")
    with safetensors.safe_open(file, framework="pt") as content:
        yield from ((key, content.get_tensor(key)) for key in content.keys())  # noqa: SIM118


def _read_torch(file: Path) -> Iterator[tuple[str, Tensor]]:
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
    found = False
    for node in graph.node:  # sorted: a node comes after those that it needs
        if node.op_type == "Constant":
            held[node.output[0]] = next((a.t for a in node.attribute if a.name == "value"), None)
        elif node.op_type == "Identity" and node.input[0] in held:
            held[node.output[0]] = held[node.input[0]]
        elif node.op_type == "Conv" and held.get(node.input[1]) is not None:
            found = True
            # onnx reads other files from the folder of this one only.
            array = onnx.numpy_helper.to_array(held[node.input[1]], base_dir=str(file.parent))
            yield node.input[1], torch.from_numpy(array.copy())
        elif "Conv" in node.op_type and not found:
            raise ValueError(
                f"the first convolution, the {node.op_type} {node.name or node.output[0]!r}, has "
                "no stored kernels: they are computed, quantised, or of another kind"
            )
    if not found:
        raise ValueError(f"it has no Conv among its {len(graph.node)} nodes")


_READERS = {
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".onnx": _read_onnx,
}


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
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


def _sha256(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _some(names: Iterable[str]) -> str:
    first = [*itertools.islice(names, _LISTED + 1)]
    return ", ".join(first[:_LISTED]) + (", ..." if len(first) > _LISTED else "")


def _listing(arrays: dict[str, Tensor]) -> str:
    return _some(f"{k!r} ({_by(a.shape)}, {str(a.dtype)[6:]})" for k, a in arrays.items())


def _by(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape)) or "a single value"
