"""Reading photographs from files as tensors of values in [0, 1]."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gaborium.errors import as_sizes, require

# Only formats that hold pixels and nothing to execute: Pillow would hand PostScript to Ghostscript.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
_SUFFIXES = (
    *(".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
_MAX_PIXELS = 50_000_000
_LISTED = 5  # names in a message before "and more"

# What undoes each EXIF orientation: exchange the axes, then step down and right by 1 or -1.
_UPRIGHT = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}
_ORIENTATION, _BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 274, 258, 262, 339  # TIFF and EXIF tags
_WHITE_IS_ZERO, _SIGNED = 0, 2


def read_image(path: str | os.PathLike[str], *, max_pixels: int = _MAX_PIXELS) -> Tensor:
    r"""Read one image file.

    Needs Pillow (``pip install "gaborium[cli]"``) and reads PNG, JPEG, TIFF, BMP, GIF, WebP and the
    PPM family, whatever the file is called, and NumPy's ``.npy``, which must be called so.
    Nothing in a file is ever executed.

    Convention:
        - 0 is black, 1 is white: 8-bit values are divided by 255 and 16-bit values by 65535;
          floating values must lie in [0, 1] already
        - values are as stored: gamma is not undone and colour profiles are not applied
        - grey stays grey (1 channel); palettes, CMYK and all of WebP become colour (3 channels)
        - transparent pixels are laid over white, as on a page
        - the camera's EXIF orientation is applied: height and width are those seen in a viewer
        - 16-bit grey keeps its 16 bits; of 16-bit colour, Pillow keeps the upper 8
        - animations and files of several pages are refused, not cut to their first page; of a
          phone's JPEG with previews inside, the photograph itself is read

    Args:
        path: the file. A ``.npy`` array has shape ``(height, width)``, ``(height, width, 1)`` or
            ``(height, width, 3)`` and is boolean, uint8, uint16 or floating.
        max_pixels: the most pixels (height times width) to decode. A larger image is refused from
            its header, since a small file can unpack to more than fits in memory.

    Returns:
        Shape ``(channels, height, width)`` with 1 channel (grey) or 3 (red, green, blue),
        float64, in [0, 1].

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder; see ``read_images``.
        OSError: it cannot be opened, as ``PermissionError`` or what else the system says.
        ValueError: it is empty, not an image, damaged, too large, of several pages, or its
            numbers have no agreed black and white (NaN, beyond [0, 1], signed or 32-bit).
        ImportError: Pillow is not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "stripes.pgm")
        ...     _ = file.write_text("P2\n3 2\n255\n0 255 0\n0 255 0\n")
        ...     read_image(file).tolist()
        [[[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]]
    """
    shown = repr(os.fspath(path))
    numpy = require("numpy", extra="cli", purpose="Photographs")
    try:
        _check_file(path, shown)
        with Path(path).open("rb") as file:
            if Path(path).suffix.lower() == ".npy":
                array, white = _read_npy(path, shown, max_pixels)
            else:
                array, white = _read_picture(file, shown, max_pixels)
    except OSError as error:
        if error.strerror is None:  # ours
            raise
        raise cannot_read(shown, error) from None
    if array.ndim == 2:
        array = array[:, :, None]
    values = torch.from_numpy(numpy.array(array.transpose(2, 0, 1), numpy.float64, order="C"))
    return _over_white(_to_unit_range(values, white, shown))


def read_images(
    path: str | os.PathLike[str], *, max_pixels: int = _MAX_PIXELS
) -> list[tuple[str, Tensor]]:
    r"""Read an image file, or every image in a folder in the order of their names.

    Which files of a folder are images is told by the ends of their names (``.png``, ``.jpg``, ...),
    upper or lower case. Hidden files are left out, subfolders are not entered, and one warning
    lists whatever else was skipped. A damaged image is an error and not skipped: half of a data
    set would otherwise pass for the whole.

    Args:
        path: a file or a folder.
        max_pixels: for each image, as for ``read_image``.

    Returns:
        Pairs of the file's name, without its folder, and an image as from ``read_image``. Images
        may differ in shape; all are in memory at once, 8 bytes per value.

    Raises:
        FileNotFoundError: there is no such path, or the folder has no images.
        OSError: as for ``read_image``.
        ValueError: as for ``read_image``, for the first file that cannot be read.
        ImportError: Pillow is not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("b.pgm", "a.pgm"):
        ...         _ = Path(folder, name).write_text("P2\n2 1\n255\n0 255\n")
        ...     [(name, tuple(image.shape)) for name, image in read_images(folder)]
        [('a.pgm', (1, 1, 2)), ('b.pgm', (1, 1, 2))]
    """
    folder = Path(path)
    files = image_files(folder) if folder.is_dir() else [folder]
    return [(file.name, read_image(file, max_pixels=max_pixels)) for file in files]


def image_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files of a folder that ``read_images`` would read, in the order of their names.

    Warns of what it leaves out, and raises as ``read_images`` does where there is nothing.
    """
    folder, shown = Path(path), repr(os.fspath(path))
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise cannot_read(shown, error) from None
    files, skipped = [], []
    for entry in entries:
        if entry.suffix.lower() in _SUFFIXES and entry.is_file() and entry.name[0] != ".":
            files.append(entry)
        elif entry.name[0] != ".":
            skipped.append(entry.name)
    if not files:
        found = f"only {_listing(skipped)}" if skipped else "nothing"
        raise FileNotFoundError(
            f"No images in the folder {shown}, {found}; give a folder with files that end in "
            f"{', '.join(_SUFFIXES)} (subfolders are not searched)."
        )
    if skipped:
        warnings.warn(f"Skipped in {shown}: {_listing(skipped)}.", stacklevel=3)
    return files


def camera() -> Tensor:
    """The default photograph: scikit-image's cameraman, which its package brings along.

    Returns:
        Shape ``(1, 512, 512)``, float64, in [0, 1]; a new tensor at each call.

    Raises:
        ImportError: scikit-image is not installed.

    Example:
        >>> image = camera()
        >>> tuple(image.shape), image.dtype, round(image.mean().item(), 3)
        ((1, 512, 512), torch.float64, 0.506)
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
        >>> image = torch.arange(20.0).reshape(1, 4, 5)
        >>> center_crop(image, 2).tolist()
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


# -- before decoding ------------------------------------------------------------------------


def _check_file(path: str | os.PathLike[str], shown: str) -> None:
    found = Path(path).stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(f"{shown} is a folder, not an image; read_images reads folders.")
    if not stat.S_ISREG(found.st_mode):
        # Opening a pipe would wait for its writer, perhaps for ever.
        raise ValueError(f"{shown} is a pipe or device, not an image file; save it to a file.")
    if found.st_size == 0:
        raise ValueError(f"{shown} is empty (0 bytes), not an image; copy or save it again.")


def _check_size(height: int, width: int, max_pixels: int, shown: str) -> None:
    if height * width > max_pixels:
        raise ValueError(
            f"{shown} has {height} x {width} = {height * width:,} pixels, more than the "
            f"{max_pixels:,} allowed; scale it down, or raise max_pixels if you trust the file."
        )


def cannot_read(shown: str, error: OSError, *, what: str = "image") -> OSError:
    """One line that says what is in the way, as the same kind of error."""
    if isinstance(error, FileNotFoundError):
        message = f"No {what} at {shown}; check the path (this runs in {str(Path.cwd())!r})."
    elif isinstance(error, PermissionError):
        message = f"Cannot read {shown}: permission denied; make it readable or copy it elsewhere."
    else:
        message = f"Cannot read {shown}: {error.strerror or error}; check the path."
    clear = type(error)(message)
    clear.errno = error.errno
    return clear


# -- decoding -------------------------------------------------------------------------------


def _read_picture(file: BinaryIO, shown: str, max_pixels: int) -> tuple[Any, float]:
    """Decode with Pillow: an array ``(height, width[, channels])`` and its value for white."""
    pillow = require("PIL.Image", extra="cli", purpose="Photographs")
    start = file.read(8)
    try:
        with _decoding(
            shown, passing=(pillow.UnidentifiedImageError, pillow.DecompressionBombError)
        ):
            image = pillow.open(file, formats=_FORMATS)
    except pillow.UnidentifiedImageError:
        raise ValueError(
            f"{shown} is not an image that can be read: it starts with {start!r}, expected "
            f"{', '.join(_FORMATS)} or a .npy file; copy it again or, if a viewer opens it, "
            "save it as PNG there."
        ) from None
    except pillow.DecompressionBombError:
        limit = min(max_pixels, 2 * pillow.MAX_IMAGE_PIXELS)
        raise ValueError(
            f"{shown} has more than the {limit:,} pixels allowed; scale it down, or raise "
            "max_pixels and PIL.Image.MAX_IMAGE_PIXELS if you trust the file."
        ) from None
    _check_size(image.height, image.width, max_pixels, shown)
    with _decoding(shown):
        n_pages = getattr(image, "n_frames", 1)
    if n_pages > 1 and image.format != "MPO":  # a phone's JPEG with previews behind it
        raise ValueError(
            f"{shown} holds {n_pages} pictures (an animation or several pages), expected one; "
            "save the one you want to a file of its own."
        )
    with _decoding(shown):
        image.load()
    array, white = _pixels(image, shown)
    return _upright(array, image), white


@contextmanager
def _decoding(shown: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Whatever a decoder stumbles over becomes one line; of its warnings nothing is heard."""
    with warnings.catch_warnings():
        # They tell of odd metadata, and of sizes that max_pixels judges.
        warnings.simplefilter("ignore")
        try:
            yield
        except MemoryError:
            raise
        except passing:
            raise
        except Exception as error:  # damaged files make decoders fail in every way there is
            detail = " ".join(str(error).split())[:120].rstrip(".") or type(error).__name__
            raise ValueError(
                f"{shown} is damaged or cut short: {detail}; copy or save it again."
            ) from None


def _upright(array: Any, image: Any) -> Any:
    """Turn the array ``(height, width, ...)`` as the EXIF orientation of its image says."""
    if image.format == "TIFF":  # Pillow has done it; its older releases leave the tag in place
        return array
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # broken EXIF says nothing against the pixels
        return array
    on_its_side, down, right = _UPRIGHT.get(orientation, (False, 1, 1))
    return (array.swapaxes(0, 1) if on_its_side else array)[::down, ::right]


def _pixels(image: Any, shown: str) -> tuple[Any, float]:
    """The decoded values as an array whose channels are grey or colour, perhaps with alpha."""
    numpy = require("numpy", extra="cli", purpose="Photographs")
    tags = getattr(image, "tag_v2", {})
    wide = image.mode == "I" and image.format not in ("PNG", "PPM")
    if wide or _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        raise ValueError(
            f"{shown} holds signed or 32-bit integers, which have no agreed white; save it with "
            "8 or 16 bits, or as floating values in [0, 1]."
        )
    if image.mode == "F" or image.mode.startswith("I"):
        array = numpy.array(image)
        white = 1.0 if image.mode == "F" else 2.0 ** tags.get(_BITS, (16,))[0] - 1
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow turns only 8-bit values round
            array = white - array
        clear = image.info.get("transparency")
        if clear is not None:  # a grey value that stands for "nothing here"
            array = numpy.stack([array, numpy.where(array == clear, 0, white)], -1)
        return array, white
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        mode += "A"
    with _decoding(shown):
        return numpy.asarray(image.convert(mode)), 255.0


def _read_npy(path: str | os.PathLike[str], shown: str, max_pixels: int) -> tuple[Any, float]:
    """Map a NumPy array of numbers; object arrays, which would unpickle code, are refused."""
    npy = require("numpy.lib.format", extra="cli", purpose="Photographs")
    with _decoding(shown):
        array = npy.open_memmap(path, mode="r")
    kind, n_bytes = array.dtype.kind, array.dtype.itemsize
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))
    if not shaped or array.size == 0 or not (kind in "bf" or (kind == "u" and n_bytes <= 2)):
        raise ValueError(
            f"{shown} holds {array.dtype} of shape {array.shape}, expected uint8, uint16 or "
            "floating values of shape (height, width) or (height, width, 3); convert it."
        )
    _check_size(array.shape[0], array.shape[1], max_pixels, shown)
    return array, 2.0 ** (8 * n_bytes) - 1 if kind == "u" else 1.0


# -- values ---------------------------------------------------------------------------------


def _to_unit_range(values: Tensor, white: float, shown: str) -> Tensor:
    values /= white
    n_bad = int((~values.isfinite()).sum())
    if n_bad:
        raise ValueError(
            f"{shown} holds NaN or infinity at {n_bad:,} of {values.numel():,} values; replace "
            "them before saving."
        )
    low, high = values.aminmax()
    if low < 0 or high > 1:
        raise ValueError(
            f"{shown} holds values from {low.item():.4g} to {high.item():.4g}, expected 0 (black) "
            "to 1 (white); divide by the value of white before saving."
        )
    return values


def _over_white(values: Tensor) -> Tensor:
    """Lay an image with alpha, its last of 2 or 4 channels, over white."""
    if len(values) in (1, 3):
        return values
    alpha = values[-1:]
    return values[:-1] * alpha + (1 - alpha)


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more
