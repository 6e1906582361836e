"""Reading data sets from files, strictly: what a header promises is what is read, or one line."""

from __future__ import annotations

import gzip
import math
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from gaborium.errors import require
from gaborium.readers import image_files, read_image

MAX_BYTES = 2**31  # of one array; what a file promises beyond it is not even begun

CIFAR_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
CIFAR_RECORDS = 10_000  # in each of the published files
_CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the red, green and blue planes
_CIFAR_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_CIFAR_TEST = ("test_batch.bin",)

# Decoders of bzip2 and LZMA unpack all that they are given: 4 KiB are 80 MB at the very worst,
# of which a copy or two are made.
_CHUNK = 4096
_LISTED = 8  # names in a message before "and more"


class _BadFileError(ValueError):
    """What is wrong with a file, said by us in one line."""


# -- IDX --------------------------------------------------------------------------------------


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    r"""Read an IDX file of unsigned bytes, the format of MNIST, plain or compressed by gzip.

    Args:
        path: the file. Whether it is compressed is told by its content, not by its name.

    Returns:
        uint8, of the shape that the header gives.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be opened.
        ValueError: it is no IDX file of unsigned bytes, holds fewer or more bytes than its header
            says, is cut short, or would be larger than 2 GiB.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "labels-idx1-ubyte")
        ...     _ = file.write_bytes(b"\0\0\x08\x01" + b"\0\0\0\x03" + b"\x07\x02\x01")
        ...     read_idx(file).tolist()
        [7, 2, 1]
    """
    shown = repr(os.fspath(path))
    with _reading(path, shown), Path(path).open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file) if packed else file
        start = stream.read(4)
        if len(start) < 4 or start[:3] != b"\0\0\x08" or start[3] == 0:
            raise _BadFileError(
                f"{shown} is not an IDX file of unsigned bytes: it starts with {start.hex(' ')}, "
                "expected 00 00 08 and the number of axes; check that it is the right file."
            )
        sizes = _take(stream, 4 * start[3], shown, last=False)
        shape = [int.from_bytes(sizes[at : at + 4], "big") for at in range(0, len(sizes), 4)]
        _check_amount(math.prod(shape), shown)
        return _bytes_to_tensor(_take(stream, math.prod(shape), shown)).reshape(shape)


# -- CIFAR-10 ---------------------------------------------------------------------------------


def read_cifar10(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read CIFAR-10's binary version: five files to learn from and one to test with.

    Args:
        folder: with ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``; or the
            published archive ``cifar-10-binary.tar.gz`` with the same six inside, which is read
            without unpacking it to the disk.

    Returns:
        ``x_train``, uint8 ``(50000, 3, 32, 32)``, ``y_train``, uint8 ``(50000,)``, ``x_test`` and
        ``y_test``.

    Raises:
        FileNotFoundError: there is no such file, or one of the six is missing.
        OSError: one cannot be opened.
        ValueError: one has another size than was published or a label above 9, or the archive is
            damaged, cut short, or holds more than it should.
    """
    place = Path(folder)
    packed = place.is_file()
    batches = _cifar_archive(place) if packed else _cifar_folder(place)
    result = {}
    for part, names in (("train", _CIFAR_TRAIN), ("test", _CIFAR_TEST)):
        whole = torch.cat([batches[name] for name in names])
        result[f"x_{part}"] = whole[:, 1:].reshape(-1, 3, 32, 32)
        result[f"y_{part}"] = whole[:, 0]
    return result


def _cifar_folder(folder: Path) -> dict[str, Tensor]:
    batches = {}
    for name in (*_CIFAR_TRAIN, *_CIFAR_TEST):
        shown = repr(str(folder / name))
        with _reading(folder / name, shown), (folder / name).open("rb") as file:
            batches[name] = _cifar_batch(file, (folder / name).stat().st_size, shown)
    return batches


def _cifar_archive(archive: Path) -> dict[str, Tensor]:
    shown, batches = repr(str(archive)), {}
    wanted = (*_CIFAR_TRAIN, *_CIFAR_TEST)
    # The batches, and room for names, a text or two and padding.
    limit = len(wanted) * CIFAR_RECORDS * _CIFAR_RECORD + 2**20
    with _reading(archive, shown), gzip.open(archive) as content:
        stream: Any = _Limited(content, limit, shown)
        with tarfile.open(fileobj=stream, mode="r|") as members:
            for member in members:
                name = member.name.rpartition("/")[2]
                if name not in wanted or not member.isfile():
                    continue
                file = members.extractfile(member)
                assert file is not None  # of a file there is content
                batches[name] = _cifar_batch(file, member.size, f"{name!r} in {shown}")
        while stream.read(_CHUNK):  # to the checksum at the end
            pass
    missing = [name for name in wanted if name not in batches]
    if missing:
        raise _BadFileError(
            f"{shown} lacks {', '.join(missing)}; expected CIFAR-10's binary version, "
            "cifar-10-binary.tar.gz."
        )
    return batches


def _cifar_batch(file: IO[bytes], size: int, shown: str) -> Tensor:
    wanted = CIFAR_RECORDS * _CIFAR_RECORD
    if size != wanted:
        raise _BadFileError(
            f"{shown} has {size:,} bytes, expected {wanted:,}: {CIFAR_RECORDS:,} records of a "
            "label and 3 x 32 x 32 values; copy it again, or take CIFAR-10's binary version."
        )
    records = _bytes_to_tensor(_take(file, wanted, shown)).reshape(-1, _CIFAR_RECORD)
    highest = int(records[:, 0].max())
    if highest >= len(CIFAR_CLASSES):
        raise _BadFileError(
            f"{shown} holds the label {highest}, expected 0 to {len(CIFAR_CLASSES) - 1}; take "
            "CIFAR-10's binary version, and copy it again."
        )
    return records


class _Limited:
    """A stream that fails after ``limit`` bytes; archives can unpack to any amount."""

    def __init__(self, stream: Any, limit: int, shown: str) -> None:
        self._stream, self._left, self._shown = stream, limit, shown

    def read(self, size: int) -> bytes:
        block: bytes = self._stream.read(min(size, self._left + 1))
        self._left -= len(block)
        if self._left < 0:
            raise _BadFileError(
                f"{self._shown} unpacks to more than CIFAR-10's six files; take the published "
                "cifar-10-binary.tar.gz."
            )
        return block


# -- arrays -----------------------------------------------------------------------------------


def npz_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of the arrays in an ``.npz`` file, none of which is read.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be opened.
        ValueError: it is no archive, or damaged.
    """
    shown = repr(os.fspath(path))
    with _reading(path, shown), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        return tuple(name.removesuffix(".npy") for name in names if name.endswith(".npy"))


def read_npz(path: str | os.PathLike[str], wanted: Mapping[str, str]) -> dict[str, Any]:
    """Read some arrays of an ``.npz`` file, each of the kind that is expected.

    Nothing is unpickled, and no array is unpacked beyond the size in its header.

    Args:
        path: the file.
        wanted: names of arrays, and of each the kind of its values and its number of axes, or
            several, as in ``{"x": "u1 3,4", "name": "U 1"}``. Kinds: ``u1`` (uint8), ``i``
            (whole numbers), ``f`` (floating values), ``U`` (texts).

    Returns:
        NumPy arrays by name, of the machine's byte order.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be opened.
        ValueError: it is no archive or damaged, an array is missing or of another kind, would be
            larger than 2 GiB, holds more or less than its header says, or needs unpickling.
        ImportError: NumPy is not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import numpy
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "data.npz")
        ...     numpy.savez_compressed(file, y=numpy.array([3, 1], numpy.uint8))
        ...     read_npz(file, {"y": "i 1"})["y"].tolist()
        [3, 1]
    """
    shown = repr(os.fspath(path))
    arrays = {}
    with _reading(path, shown), zipfile.ZipFile(path) as archive:
        held = {info.filename: info for info in archive.infolist()}
        for name, kind in wanted.items():
            info = held.get(f"{name}.npy")
            if info is None:
                listed = [entry.removesuffix(".npy") for entry in held]
                more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
                raise _BadFileError(
                    f"{shown} has no array {name!r}, only "
                    f"{', '.join(map(repr, listed[:_LISTED])) or 'none'}{more}; check that it is "
                    "the right file."
                )
            with archive.open(info) as stream:
                arrays[name] = _read_array(stream, info.file_size, kind, f"{name!r} of {shown}")
    return arrays


def _read_array(stream: IO[bytes], promised: int, wanted: str, shown: str) -> Any:
    numpy = require("numpy", extra="train", purpose="Data sets")
    npy = require("numpy.lib.format", extra="train", purpose="Data sets")
    version = npy.read_magic(stream)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise _BadFileError(
            f"{shown} is a NumPy array of format {version}, expected 1.0 or 2.0; save it again."
        )
    shape, by_columns, dtype = readers[version](stream)
    if dtype.hasobject:
        raise _BadFileError(
            f"{shown} needs unpickling, which can run code, and is not read; save it as plain "
            "numbers or texts."
        )
    kind, _, axes = wanted.partition(" ")
    kinds = {"u1": "uint8", "i": "whole numbers", "f": "floating values", "U": "texts"}
    fits = {"u1": dtype == numpy.uint8, "i": dtype.kind in "iu"}.get(kind, dtype.kind == kind)
    if not fits or str(len(shape)) not in axes.split(","):
        raise _BadFileError(
            f"{shown} holds {dtype} of shape {shape}, expected {kinds[kind]} with "
            f"{axes.replace(',', ' or ')} axes; check that it is the right file."
        )
    amount = math.prod(shape) * dtype.itemsize
    _check_amount(amount, shown)
    if promised - stream.tell() != amount:
        raise _BadFileError(
            f"{shown} should hold {amount:,} bytes by its shape {shape}, but the archive has "
            f"{promised - stream.tell():,}; copy or save it again."
        )
    values = numpy.frombuffer(_take(stream, amount, shown), dtype)
    return values.reshape(shape, order="F" if by_columns else "C").astype(dtype.newbyteorder("="))


def decode_jpegs(blob: Any, offsets: Any, shown: str) -> Tensor:
    """Decode JPEG images of one size that lie one after another in an array of bytes.

    Args:
        blob: uint8 ``(bytes,)``, a NumPy array.
        offsets: where each image begins, and where the last one ends: ``(images + 1,)``.
        shown: what a message calls them.

    Returns:
        uint8 ``(images, 3, height, width)``.

    Raises:
        ValueError: the offsets do not divide the bytes, an image is damaged or of another size
            than the first.
        ImportError: Pillow is not installed.
    """
    numpy = require("numpy", extra="train", purpose="Data sets")
    pillow = require("PIL.Image", extra="train", purpose="Data sets")
    places = offsets.astype(numpy.int64)
    divided = len(places) > 1 and places[0] == 0 and places[-1] == len(blob)
    if not divided or bool((numpy.diff(places) <= 0).any()):
        raise _BadFileError(
            f"The offsets of {shown} must rise from 0 to its {len(blob):,} bytes, one per image "
            "and one for the end; save the file again."
        )
    images: Any = None
    for index, (start, end) in enumerate(pairwise(places)):
        try:
            image = pillow.open(BytesIO(blob[start:end].tobytes()), formats=("JPEG",))
            if images is None:
                shape = (len(places) - 1, image.height, image.width, 3)
                _check_amount(math.prod(shape), shown)
                images = numpy.empty(shape, numpy.uint8)
            if (image.height, image.width) != images.shape[1:3]:
                raise _BadFileError(
                    f"Image {index} of {shown} has {image.height} x {image.width} px, expected "
                    f"{images.shape[1]} x {images.shape[2]} like the first; scale or crop it."
                )
            images[index] = numpy.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, pillow.DecompressionBombError) as error:
            raise _BadFileError(
                f"Image {index} of {shown} is damaged or no JPEG: {_detail(error)}; save the file "
                "again."
            ) from None
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


# -- folders of images ------------------------------------------------------------------------


def read_image_folder(
    folder: str | os.PathLike[str],
) -> tuple[list[list[Path]], list[Tensor], tuple[str, ...]]:
    """Read a folder that holds a folder of images for each class.

    Convention:
        - classes are numbered in the order of their folders' names; hidden ones are left out
        - images of a class are in the order of their names' numbers and letters, so that
          ``2.png`` comes before ``10.png``
        - grey images among coloured ones get 3 channels

    Args:
        folder: ``folder/<class>/<image>``.

    Returns:
        Of each class its files, and its images, uint8 ``(images, channels, height, width)``; and
        the names of the classes.

    Raises:
        FileNotFoundError: there is no such folder, it has no folders in it, or one of them has no
            images.
        OSError: something cannot be opened.
        ValueError: the images differ in size, or one is damaged or too large.
        ImportError: Pillow is not installed.
    """
    place, shown = Path(folder), repr(os.fspath(folder))
    found = sorted(entry for entry in place.iterdir() if entry.is_dir())
    classes = [entry for entry in found if entry.name[0] != "."]
    if not classes:
        raise FileNotFoundError(
            f"{shown} holds no folders, expected one of images for each class "
            "(folder/<class>/*.png)."
        )
    files = [sorted(image_files(entry), key=_by_number) for entry in classes]
    first: tuple[Path, Tensor] | None = None
    images, total = [], 0
    for group in files:
        own = []
        for file in group:
            image = (read_image(file) * 255).round().to(torch.uint8)
            first = first or (file, image)
            if image.shape[1:] != first[1].shape[1:]:
                raise _BadFileError(
                    f"The images in {shown} must have one size, got {_size(first[1])} px for "
                    f"{_within(first[0])} and {_size(image)} px for {_within(file)}; scale or "
                    "crop them."
                )
            total += image.numel()
            _check_amount(total, f"The images in {shown}, read as one array,")
            own.append(image)
        images.append(own)
    n_channels = max(len(image) for own in images for image in own)
    stacks = [torch.stack([image.expand(n_channels, -1, -1) for image in own]) for own in images]
    return files, stacks, tuple(entry.name for entry in classes)


def _by_number(file: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", file.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _within(file: Path) -> str:
    return repr(f"{file.parent.name}/{file.name}")


def _size(image: Tensor) -> str:
    return f"{image.shape[1]} x {image.shape[2]}"


# -- streams ----------------------------------------------------------------------------------


def _take(stream: Any, amount: int, shown: str, *, last: bool = True) -> bytearray:
    """Exactly ``amount`` bytes, after which nothing may follow if they are the ``last``."""
    content = bytearray()
    while len(content) < amount:
        block = stream.read(min(_CHUNK, amount - len(content)))
        if not block:
            raise _BadFileError(
                f"{shown} is cut short: it has {len(content):,} of the {amount:,} bytes that its "
                "header promises; copy or save it again."
            )
        content += block
    if last and stream.read(1):
        raise _BadFileError(
            f"{shown} holds more than the {amount:,} bytes that its header promises; copy or save "
            "it again."
        )
    return content


def _check_amount(amount: int, shown: str) -> None:
    if amount > MAX_BYTES:
        raise _BadFileError(
            f"{shown} would be {amount:,} bytes, more than the {MAX_BYTES:,} that are read; cut "
            "it into parts, or check that it is the right file."
        )


def _bytes_to_tensor(content: bytearray) -> Tensor:
    if not content:  # frombuffer refuses it
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(content, dtype=torch.uint8)


@contextmanager
def _reading(path: str | os.PathLike[str], shown: str) -> Iterator[None]:
    """Whatever a decoder stumbles over becomes one line."""
    try:
        found = Path(path).stat()
        if stat.S_ISDIR(found.st_mode):
            raise _BadFileError(f"{shown} is a folder, expected a file; give the file's own name.")
        if not stat.S_ISREG(found.st_mode):
            # Opening a pipe would wait for its writer, perhaps for ever.
            raise _BadFileError(f"{shown} is a pipe or device, expected a file; save it to a file.")
        if found.st_size == 0:
            raise _BadFileError(f"{shown} is empty (0 bytes); copy it again.")
        yield
    except (MemoryError, ImportError, _BadFileError):
        raise
    except OSError as error:
        if error.errno is None:  # a decoder's own
            raise _damaged(shown, error) from None
        raise
    except Exception as error:  # damaged files make decoders fail in every way there is
        raise _damaged(shown, error) from None


def _damaged(shown: str, error: Exception) -> ValueError:
    return _BadFileError(f"{shown} is damaged or cut short: {_detail(error)}; copy it again.")


def _detail(error: Exception) -> str:
    text = " ".join(str(error).split())[:120].rstrip(".")
    return text if " " in text else type(error).__name__
