"""Reading kernels from files: arrays, networks and folders of images."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import stat
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gaborium.conversion import find_first_conv
from gaborium.errors import require
from gaborium.images import cannot_read, read_images
from gaborium.layers import PLAIN_LAYERS
from gaborium.onnx_files import OnnxError, read_convolutions

_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MAX_SIDE = 256  # px; what is larger is a photograph, or a table of flattened kernels
_LISTED = 12  # arrays in a message before "and more"


@dataclass(frozen=True, eq=False)
class KernelFile:
    """Kernels with what tells where they came from.

    Args:
        values: floating, ``(filters, *size)``, ``(filters, channels, *size)`` or a single kernel;
            NaN and infinity as they stand in the file.
        name: of the file or folder, without its parents.
        key: the array's name in the file, or ``None`` where arrays have no names.
        sha256: of the file's bytes, without others that an ``.onnx`` file refers to; of a folder,
            of its images one after another.
    """

    values: Tensor
    name: str
    key: str | None
    sha256: str


def read_kernels(
    path: str | os.PathLike[str], *, key: str | None = None, n_dims: int = 2
) -> KernelFile:
    """Read kernels from a file, or from a folder of images.

    Reads NumPy's ``.npy`` and ``.npz``, ``.safetensors``, tensors and state dicts in ``.pt`` or
    ``.pth``, ``.onnx``, and images, of which each is one kernel. Nothing in a file is ever
    executed: what needs unpickling is refused.

    Convention:
        - axes are PyTorch's: ``(filters, channels, height, width)``, where leading ones may be
          missing
        - of a network whose file keeps the order of its layers (``.onnx``, and state dicts in
          ``.pt`` and ``.pth``), the first convolution is taken, with a warning that names it. Of
          1 x 1 pixels it is an error and not passed over: what follows does not see the image
        - of several arrays otherwise, the one that holds kernels is taken: floating rather than
          whole numbers, and of ``n_dims`` axes of at least 2 px. Where several do, the only one
          with a convolution's axes and 3 input channels is, or else 1, with a warning that names it
        - whole numbers become floating as they are, with a warning
        - of images, mid-grey is 0, black -1 and white 1; grey ones among colours get 3 channels

    Args:
        path: the file or folder.
        key: name of the array in a file with several; entries of nested dicts are joined by dots,
            as ``"state_dict.conv1.weight"``. The name of a layer stands for that of its weight.
        n_dims: spatial dimensions of a kernel: 1, 2 or 3.

    Returns:
        The kernels. Their values are float64 of images and of whole numbers, otherwise in the
        floating type of the file.

    Raises:
        FileNotFoundError: there is no such path, or the folder has no images.
        OSError: it cannot be opened, as ``PermissionError`` or what else the system says.
        ValueError: the file is empty, damaged, of another kind, or needs unpickling; it has no
            array of kernels or none called ``key``, or which one is meant is not clear; the
            images differ in size.
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
    return _read(path, key, n_dims)[0]


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Any]:
    """All arrays of a file by name, as they stand in it; one without a name is called ``""``.

    Args:
        path: of a ``.npy``, ``.npz``, ``.safetensors``, ``.pt``, ``.pth`` or ``.onnx`` file.
            Nothing is unpickled; entries of nested dicts are joined by dots; of ``.onnx`` there
            are the kernels of convolutions.

    Returns:
        Tensors, and of NumPy's files and ONNX arrays; nothing of files of another kind.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be opened.
        ValueError: the file is empty, damaged or needs unpickling.
        ImportError: NumPy, safetensors or onnx is needed and not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "model.pt")
        ...     torch.save({"state": torch.nn.Conv2d(3, 8, 5).state_dict()}, file)
        ...     list(read_arrays(file))
        ['state.weight', 'state.bias']
    """
    file, shown = Path(path), repr(os.fspath(path))
    _check(file, shown)
    reader = _READERS.get(file.suffix.lower())
    if file.is_dir() or reader is None:
        return {}
    with _reading(file, shown):
        return reader(file)


@dataclass(frozen=True, eq=False)
class LayerFile:
    """A convolution with the weights of a file or network, and all else that it holds.

    Args:
        layer: ``nn.ConvNd`` on the CPU.
        arrays: everything in the file that is numbers, or the network's state, by name.
        name: of the file, without its parents; or of the network.
        key: of the kernels among the arrays.
        bias_key: of the bias among the arrays, where one is or would be.
        sha256: of the file's bytes; ``None`` of a network.
    """

    layer: Any
    arrays: dict[str, Tensor]
    name: str
    key: str
    bias_key: str
    sha256: str | None

    @classmethod
    def of(cls, network: nn.Module, name: str, layer: str | None = None) -> LayerFile:
        """The first convolution of a network, or the one that is called ``layer``.

        Raises:
            ValueError: as for ``find_first_conv``.
        """
        found, conv = find_first_conv(network, layer)
        stem = f"{found}." if found else ""
        state = {key: value.detach().clone() for key, value in network.state_dict().items()}
        return cls(copy.deepcopy(conv), state, name, f"{stem}weight", f"{stem}bias", None)

    def weights_with(self, layer: Any) -> dict[str, Tensor]:
        """The file's arrays with kernels and bias of another layer in their places."""
        old = self.arrays[self.key]
        values = {self.key: layer.weight.detach()}
        if layer.bias is not None:
            values[self.bias_key] = layer.bias.detach()
        return self.arrays | {name: value.to(old.dtype) for name, value in values.items()}


def read_layer(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    n_dims: int = 2,
    stride: int = 1,
    padding: int | None = None,
) -> LayerFile:
    """Read the kernels of a file as a convolution, with the bias that lies beside them.

    Args:
        path: of a file, as for ``read_kernels``, but no images.
        key: name of the kernels' array, as for ``read_kernels``. The bias is looked for under the
            same name with ``bias`` in place of ``weight``.
        n_dims: spatial dimensions of a kernel: 1, 2 or 3.
        stride: of the layer; weights do not tell.
        padding: of the layer; by default half a kernel.

    Returns:
        The layer, in the floating type of the file or at least float32.

    Raises:
        ValueError: as for ``read_kernels``; or the kernels have no axes ``(filters, channels,
            *size)``, or a bias is not one number for each filter.
        OSError: as for ``read_kernels``.
        ImportError: as for ``read_kernels``.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "model.pt")
        ...     torch.save({"conv1": nn.Conv2d(3, 8, 5).state_dict()}, file)
        ...     found = read_layer(file)
        >>> found.key, found.layer
        ('conv1.weight', Conv2d(3, 8, kernel_size=(5, 5), stride=(1, 1), padding=(2, 2)))
    """
    shown = repr(os.fspath(path))
    if Path(path).is_dir() or Path(path).suffix.lower() in _IMAGES:
        raise ValueError(f"{shown} holds images, which are no layer; give a file of weights.")
    if Path(path).suffix.lower() == ".onnx":
        raise ValueError(
            f"{shown} is a graph, of which no layer can be replaced; give the weights of the "
            "network that it was made from."
        )
    kernels, held = _read(path, key, n_dims)
    weight = kernels.values
    if weight.ndim == n_dims + 1:
        weight = weight.unsqueeze(1)
    if weight.ndim != n_dims + 2:
        raise ValueError(
            f"{shown} must hold kernels (filters, channels, *size), got shape "
            f"{tuple(kernels.values.shape)}."
        )
    arrays = {
        name or "weight": array if isinstance(array, Tensor) else _tensor(array)
        for name, array in held.items()
        if isinstance(array, Tensor) or _kind(array) in ("floating", "whole")
    }
    own = kernels.key or "weight"
    stem, _, last = own.rpartition("weight")
    bias_key = f"{stem}bias" if last in ("", "s") and stem != own else f"{own}_bias"
    bias = arrays.get(bias_key)
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ValueError(
            f"{bias_key!r} of {shown} must be a number for each of {len(weight)} filters, got "
            f"shape {tuple(bias.shape)}."
        )
    size = tuple(weight.shape[2:])
    around = tuple(side // 2 for side in size) if padding is None else padding
    layer: Any = PLAIN_LAYERS[n_dims](
        weight.shape[1], len(weight), size, stride, around, bias=bias is not None, device="meta"
    )
    # Half precision is for storage; not every machine convolves in it.
    layer.weight = nn.Parameter(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(layer.weight))
    return LayerFile(layer, arrays, kernels.name, own, bias_key, kernels.sha256)


def _read(
    path: str | os.PathLike[str], key: str | None, n_dims: int
) -> tuple[KernelFile, dict[str, Any]]:
    """The kernels, and all arrays of the file; of images none."""
    file, shown = Path(path), repr(os.fspath(path))
    suffix = file.suffix.lower()
    _check(file, shown)
    if file.is_dir() or suffix in _IMAGES:
        if key is not None:
            raise ValueError(f"{shown} holds images, which have no names; leave out key (--key).")
        values, files = _read_folder(file, shown)
        return KernelFile(values, _name(file), None, _sha256(files)), {}
    if suffix not in _READERS:
        raise ValueError(
            f"{shown} must be {', '.join(_READERS)}, an image or a folder of images; save the "
            "kernels with numpy.save."
        )
    arrays = read_arrays(file)
    chosen, array = _choose(arrays, key, n_dims, suffix, shown)
    what = f"{chosen!r} of {shown}" if chosen else shown
    if suffix == ".onnx" and array.ndim != n_dims + 2:
        raise ValueError(
            f"{what} ({_by(array.shape)}) convolves in {array.ndim - 2} dimensions, not {n_dims}; "
            "set n_dims (--n-dims)."
        )
    values = _floating(array, what)
    _check_kernels(values, n_dims, what)
    return KernelFile(values, _name(file), chosen or None, _sha256([file])), arrays


# -- before reading ---------------------------------------------------------------------------


def _check(file: Path, shown: str) -> None:
    try:
        found = file.stat()
    except OSError as error:
        raise cannot_read(shown, error, what="kernels") from None
    if stat.S_ISDIR(found.st_mode):
        return
    if not stat.S_ISREG(found.st_mode):
        # Opening a pipe would wait for its writer, perhaps for ever.
        raise ValueError(f"{shown} is a pipe or device; save the kernels to a file.")
    if found.st_size == 0:
        raise ValueError(f"{shown} is empty (0 bytes); copy or save it again.")


def _name(file: Path) -> str:
    return file.name or file.resolve().name  # of "." and ".."


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# -- reading ----------------------------------------------------------------------------------


@contextmanager
def _reading(file: Path, shown: str) -> Iterator[None]:
    """Whatever a reader stumbles over becomes one line; of its warnings nothing is heard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (MemoryError, ImportError, OnnxError):
            raise
        except OSError as error:
            if error.errno is None:  # a reader's own
                raise _damaged(shown, error) from None
            raise cannot_read(shown, error, what="kernels") from None
        except Exception as error:  # damaged files make readers fail in every way there is
            text = str(error)
            if "allow_pickle" in text or "weights_only" in text or "Weights only" in text:
                raise ValueError(
                    f"{shown} needs unpickling, which can run code, and is not read; save the "
                    f"{'numbers as a plain array' if file.suffix[:3] == '.np' else 'state dict'} "
                    "or a .safetensors file instead."
                ) from None
            raise _damaged(shown, error) from None


def _damaged(shown: str, error: Exception) -> ValueError:
    detail = " ".join(str(error).split())[:120].rstrip(".")
    if " " not in detail:  # a number or a key, which tell nothing by themselves
        detail = type(error).__name__
    return ValueError(
        f"{shown} is damaged or not what its name says: {detail}; copy or save it again."
    )


def _read_npy(file: Path) -> dict[str, Any]:
    npy = require("numpy.lib.format", extra="cli", purpose="Kernel files")
    with file.open("rb") as content:
        return {"": npy.read_array(content, allow_pickle=False)}


def _read_npz(file: Path) -> dict[str, Any]:
    numpy = require("numpy", extra="cli", purpose="Kernel files")
    if not zipfile.is_zipfile(file):
        raise ValueError("it is no zip archive")
    arrays = {}
    with numpy.load(file, allow_pickle=False) as content:
        for key in content.files:
            try:
                arrays[key] = content[key]
            except ValueError as error:
                # Texts and the like beside the kernels do not stand in the way of them.
                if "allow_pickle" not in str(error) or len(content.files) == 1:
                    raise
    return arrays


def _read_safetensors(file: Path) -> dict[str, Any]:
    safetensors = require("safetensors", extra="cli", purpose=".safetensors files")
    with safetensors.safe_open(file, framework="pt") as content:
        return {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118


def _read_torch(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        start = content.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # an archive or, by older releases, pickles
        raise ValueError("torch.save has not written it")
    return dict(_tensors(torch.load(file, map_location="cpu", weights_only=True), ""))


def _tensors(content: Any, key: str) -> Iterator[tuple[str, Any]]:
    """All tensors of nested dicts and lists, with their places joined by dots."""
    if isinstance(content, Tensor):
        yield key, content.detach()
    elif isinstance(content, (dict, list, tuple)):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for name, item in items:
            yield from _tensors(item, f"{key}.{name}" if key else str(name))


_READERS = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".onnx": read_convolutions,
}
# Of networks, files in which layers stand in the order in which they were registered or run. That
# of safetensors is by the size of their numbers and by name, that of .npz whatever one liked.
_IN_ORDER = (".pt", ".pth", ".onnx")


def _read_folder(path: Path, shown: str) -> tuple[Tensor, list[Path]]:
    """Kernels ``(filters, channels, height, width)``, with 1 channel or 3, and their files."""
    if path.is_dir() and any(path.glob("*.npy")):
        raise ValueError(
            f"{shown} holds .npy files, expected images; stack the arrays into one file with "
            "numpy.stack and numpy.save."
        )
    images = read_images(path)
    first, size = images[0][0], images[0][1].shape[1:]
    for name, image in images:
        if image.shape[1:] != size:
            raise ValueError(
                f"The images in {shown} must have one size, got {_by(size)} px for {first!r} and "
                f"{_by(image.shape[1:])} px for {name!r}; scale or crop them, or fit them apart."
            )
    if max(size) > _MAX_SIDE:
        raise ValueError(
            f"{first!r} in {shown} has {_by(size)} px, expected at most {_MAX_SIDE} px a side; "
            "scale the images down, or cut the kernels out."
        )
    channels = max(len(image) for _, image in images)
    values = torch.stack([image.expand(channels, -1, -1) for _, image in images])
    what = f"Each image in {shown}" if path.is_dir() else shown
    warnings.warn(f"{what} is read as a kernel whose 0 is mid-grey.", stacklevel=4)
    return 2 * values - 1, [path / name for name, _ in images] if path.is_dir() else [path]


# -- choosing ---------------------------------------------------------------------------------


def _choose(
    arrays: dict[str, Any], key: str | None, n_dims: int, suffix: str, shown: str
) -> tuple[str, Any]:
    """The name and the array of the kernels; without names, the name is empty."""
    if list(arrays) == [""]:
        if key is not None:
            raise ValueError(f"{shown} holds one array without a name; leave out key (--key).")
        return "", arrays[""]
    if not arrays:
        raise ValueError(f"{shown} holds no arrays; save the kernels with numpy.save.")
    if key is not None:
        key = key if key in arrays else f"{key}.weight" if f"{key}.weight" in arrays else key
        if key not in arrays:
            raise ValueError(f"{shown} has no array {key!r}; it has {_listing(arrays)}.")
        return key, arrays[key]
    if len(arrays) == 1:
        return next(iter(arrays.items()))
    layer = _first_layer(arrays, n_dims, suffix, shown)
    if layer is not None:
        return layer, arrays[layer]

    shaped = {k: a for k, a in arrays.items() if _is_shaped(a, n_dims)}
    candidates = {k: a for k, a in shaped.items() if _kind(a) == "floating"} or {
        k: a for k, a in shaped.items() if _kind(a) == "whole"
    }
    if not candidates:
        raise ValueError(
            f"{shown} holds no kernels of {n_dims} axes, only {_listing(arrays)}; name an array "
            "with key (--key) if one of them is meant."
        )
    if len(candidates) == 1:
        return next(iter(candidates.items()))
    # Convolutions channel by channel, further up, have 1 input channel, too.
    for n_channels in (3, 1):
        first = [
            k for k, a in candidates.items() if a.ndim == n_dims + 2 and a.shape[1] == n_channels
        ]
        if len(first) == 1:
            warnings.warn(
                f"{shown}: reading {first[0]!r}, {_by(candidates[first[0]].shape)}, the only array "
                f"with {n_channels} input channel{'s' if n_channels > 1 else ''}; key (--key) "
                "takes another.",
                stacklevel=4,
            )
            return first[0], candidates[first[0]]
        if first:
            break
    raise ValueError(
        f"{shown} holds several arrays that may be kernels: {_listing(candidates)}; choose one "
        "with key (--key)."
    )


def _first_layer(arrays: dict[str, Any], n_dims: int, suffix: str, shown: str) -> str | None:
    """The name of a network's first convolution, or ``None`` where the file does not tell it."""
    layers = {
        name: array
        for name, array in arrays.items()
        if suffix == ".onnx" or (name.rpartition(".")[2] == "weight" and _kind(array) == "floating")
        if array.ndim == n_dims + 2
    }
    pointlike = [name for name, array in layers.items() if math.prod(array.shape[2:]) == 1]
    if suffix in _IN_ORDER and layers:
        first = next(iter(layers))
        if first in pointlike:
            raise ValueError(
                f"{shown}: the first convolution, {first!r} ({_by(layers[first].shape)}), has "
                "kernels of one pixel, in which there is no wave; name another with key (--key)."
            )
        if len(layers) > 1:
            warnings.warn(
                f"{shown}: reading {first!r}, {_by(layers[first].shape)}, the first of "
                f"{len(layers)} convolutions; key (--key) takes another.",
                stacklevel=5,
            )
        return first
    facing = [name for name in pointlike if layers[name].shape[1] in (1, 3)]
    if facing:
        raise ValueError(
            f"{shown}: {facing[0]!r} ({_by(layers[facing[0]].shape)}) may be the first "
            "convolution, whose kernels of one pixel hold no wave, and the file does not tell the "
            "order of layers; name the one to take with key (--key)."
        )
    return None


def _is_shaped(array: Any, n_dims: int) -> bool:
    """Whether the last axes look like those of kernels; a vector is rather a bias."""
    return array.ndim >= max(n_dims, 2) and all(size > 1 for size in array.shape[-n_dims:])


def _kind(array: Any) -> str:
    """What the numbers are: ``"floating"``, ``"whole"`` or, if no numbers for kernels, else."""
    if isinstance(array, Tensor):
        if array.layout is not torch.strided or array.is_quantized:
            return "sparse or quantized values"
        if array.is_floating_point():
            return "floating"
        return "whole" if not array.is_complex() and array.dtype != torch.bool else _dtype(array)
    return {"f": "floating", "i": "whole", "u": "whole"}.get(array.dtype.kind, _dtype(array))


def _floating(array: Any, what: str) -> Tensor:
    kind = _kind(array)
    if kind not in ("floating", "whole"):
        raise ValueError(f"{what} holds {kind}, expected plain real numbers; convert it.")
    values = array if isinstance(array, Tensor) else _tensor(array)
    if kind == "whole":
        warnings.warn(
            f"{what} holds {_dtype(array)}: its values are taken as they are, so that 0 is 0; if "
            "another value stands for 0, subtract it before saving.",
            stacklevel=4,
        )
        values = values.double()
    return values


def _tensor(array: Any) -> Tensor:
    """NumPy's numbers as torch's; those that are wider than torch has them as float64."""
    numpy = require("numpy", extra="cli", purpose="Kernel files")
    native = array.dtype.newbyteorder("=")
    wide = native.kind == "f" and native.itemsize > 8
    return torch.from_numpy(numpy.array(array, numpy.float64 if wide else native, order="C"))


def _check_kernels(values: Tensor, n_dims: int, what: str) -> None:
    shape = tuple(values.shape)
    if values.ndim < n_dims or values.numel() == 0:
        axes = ("length", "height, width", "depth, height, width")[n_dims - 1]
        raise ValueError(
            f"{what} must be (filters, {axes}) or (filters, channels, {axes}) and not empty, got "
            f"shape {shape}."
        )
    size = shape[-n_dims:]
    if max(size) > _MAX_SIDE:
        raise ValueError(
            f"{what} of shape {shape} would be kernels of {_by(size)} px, expected at most "
            f"{_MAX_SIDE} px a side; give flattened kernels their axes with reshape."
        )
    if max(size) == 1:
        raise ValueError(
            f"{what} of shape {shape} would be kernels of one pixel, in which there is no wave; "
            "choose another array with key (--key)."
        )
    if n_dims == 2 and len(shape) == 4 and shape[0] == shape[1] and shape[2] in (1, 3):
        warnings.warn(
            f"{what} of shape {shape} looks like (height, width, in, out), expected (out, in, "
            "height, width); if so, transpose it before saving.",
            stacklevel=4,
        )


def _listing(arrays: dict[str, Any]) -> str:
    shown = [f"{k!r} ({_by(a.shape)}, {_dtype(a)})" for k, a in list(arrays.items())[:_LISTED]]
    more = f" and {len(arrays) - _LISTED} more" if len(arrays) > _LISTED else ""
    return ", ".join(shown) + more


def _by(shape: Any) -> str:
    return " × ".join(map(str, shape)) or "a single value"


def _dtype(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")
