"""Needed by every room: optional packages, checks of arguments, files written all or nothing."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_NO_CHECKSUM = "0" * 64  # in the checksum's place while the checksum is computed


def require(package: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package; without it, name the extra of this project that installs it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        top = package.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # the package is there; something it needs is not
        raise ImportError(
            f'{purpose} need {top}: pip install "gaborium[{extra}]".', name=top
        ) from None


def one_of(what: str, value: str, choices: Collection[str]) -> str:
    """Return ``value`` if it is one of ``choices``; otherwise raise one clear line."""
    if value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return value


def as_sizes(what: str, value: int | Iterable[Any], n_dims: int) -> tuple[int, ...]:
    """Return ``value`` as ``n_dims`` positive whole numbers; one number serves every axis."""
    sizes = (value,) * n_dims if isinstance(value, int) else tuple(value)
    if len(sizes) != n_dims:
        raise ValueError(f"{what} must be {n_dims} numbers (one per axis), got {value!r}.")
    if any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"{what} must be positive whole numbers, got {value!r}.")
    return sizes


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` in UTF-8 with its own line ends, as ``write_bytes`` does."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file, all or nothing: after an ``OSError`` the old file is still there.

    A file that is replaced keeps its permissions, a link is followed, and a pipe or device such as
    ``/dev/stdout`` is written to.
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary(target)
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(data)  # a pipe; for a folder this raises
            return
        # tempfile would make a file that only its owner can read.
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could keep the name and lose the content
        with suppress(FileNotFoundError):
            shutil.copymode(target, temporary)
        temporary.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys as CSV, below a line of the keys; floats keep every bit."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write named tensors and metadata into a safetensors file, all or nothing.

    The metadata are JSON values, among them ``name`` (``"gaborium.fit"``) and ``format`` (1). The
    file's SHA-256 is added, because safetensors does not notice a changed bit. Equal content makes
    equal bytes.
    """
    safetensors = require("safetensors.torch", extra="save", purpose="Saved files")
    data: bytes = safetensors.save(
        # Cloned, because safetensors refuses tensors that share memory.
        {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
        # One entry, because safetensors does not keep the order of several.
        {"gaborium": json.dumps({**metadata, "sha256": _NO_CHECKSUM})},
    )
    checksum = hashlib.sha256(data).hexdigest()
    write_bytes(path, data.replace(_NO_CHECKSUM.encode(), checksum.encode(), 1))


def read_tensors(
    path: str | os.PathLike[str], *, kind: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors, on the CPU, and the metadata of ``write_tensors``.

    ``kind`` is ``"fit"`` where the metadata's ``name`` is ``"gaborium.fit"``. A file that is
    damaged, of another kind or of a format above 1 raises ``ValueError``. No code in a file is
    executed.
    """
    safetensors = require("safetensors.torch", extra="save", purpose="Saved files")
    path, shown = Path(path), repr(os.fspath(path))
    if path.exists() and not path.is_file():
        raise ValueError(f"{shown} is not a file.")  # reading from a pipe would wait for ever
    data = path.read_bytes()
    try:
        tensors = safetensors.load(data)
        # A safetensors file begins with the length of its header, then the header as JSON.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = json.loads(header["__metadata__"]["gaborium"])
        found = str(metadata["name"]).removeprefix("gaborium.")
        version, checksum = int(metadata["format"]), str(metadata["sha256"])
    except Exception:  # a damaged file fails in many ways
        raise ValueError(f"{shown} is not a saved {kind} of gaborium, or is damaged.") from None
    if found != kind:
        raise ValueError(f"{shown} is a saved {found:.40}, expected a saved {kind}.")
    if version > 1:
        raise ValueError(f"{shown} has format {version}, and this gaborium reads 1; update it.")
    blank = data.replace(checksum.encode(), _NO_CHECKSUM.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != checksum:
        raise ValueError(f"{shown} is damaged: its checksum is wrong; use a copy of it.")
    return tensors, metadata


@contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Fill a folder that gets its name only when it is complete.

    The block writes into the hidden folder that it is given. When the block ends, that folder takes
    the name ``path``; if the block raises, also by Ctrl-C, it is removed and ``path`` is unchanged.
    With ``overwrite`` an earlier folder is replaced, but only one with a ``result.json``, so that a
    mistyped path loses nothing. Raises ``FileExistsError`` before the block starts.
    """
    target = Path(os.path.realpath(path))  # a link to a run stays a link
    _check_free(target, overwrite=overwrite)
    temporary, old = _temporary(target), _temporary(target)
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    finished = False
    try:
        yield temporary
        finished = True
        _check_free(target, overwrite=overwrite)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        if finished and isinstance(error, OSError):  # a name is no reason to lose hours of work
            raise type(error)(f"{error} The finished work is in {str(temporary)!r}.") from None
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked_folder(folder: Path, marker: str, *, timeout: float = 0.0) -> Iterator[bool]:
    """Make a folder of work, and keep other processes out of it until the block ends.

    The folder may exist if it is empty or holds the file ``marker``; the block is given whether it
    did. Raises ``FileExistsError`` for a folder with other things in it, and ``BlockingIOError`` if
    another process still works there after ``timeout`` seconds.
    """
    filelock = require("filelock", extra="train", purpose="Locked folders")
    folder.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    if names and marker not in names:
        raise FileExistsError(
            f"{str(folder)!r} holds {names[0]!r} and no {marker}, so it may be other work; choose "
            "another folder."
        )
    lock = filelock.FileLock(folder / ".lock", timeout=timeout)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BlockingIOError(f"Another process is working in {str(folder)!r}.") from None
    try:  # the system also releases the lock when the process is killed
        yield bool(names)
    finally:
        lock.release()


def _check_free(target: Path, *, overwrite: bool) -> None:
    if os.path.lexists(target) and not (target / "result.json").is_file():
        raise FileExistsError(
            f"{str(target)!r} exists without a result.json, so it is never replaced; choose "
            "another name."
        )
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"{str(target)!r} exists; choose another name, or replace it with overwrite=True "
            "(--overwrite)."
        )


def _temporary(target: Path) -> Path:
    return target.with_name(f".gaborium-{os.urandom(6).hex()}.part")
