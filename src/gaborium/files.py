"""Writing files and folders so that an interrupted run leaves the old content or the new, whole."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gaborium.errors import require

if TYPE_CHECKING:
    from torch import Tensor

_NO_DIGEST = "0" * 64  # stands where the checksum comes, and is part of what it is taken of
_LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit


def write_text(path: str | os.PathLike[str], text: str) -> None:
    r"""Write ``text`` in UTF-8, all or nothing; line ends are written as they come.

    Args:
        path: the file, in a folder that exists. An existing file is replaced and keeps its
            permissions; a link is followed; a pipe or device such as ``/dev/stdout`` is written to.
        text: what the file will hold.

    Raises:
        OSError: it cannot be written there, as ``FileNotFoundError`` (no such folder),
            ``NotADirectoryError``, ``IsADirectoryError``, ``PermissionError``, or itself (disk
            full). What was there before stays.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_text(Path(folder, "result.json"), '{"loss": 0.5}\n')
        ...     Path(folder, "result.json").read_text()
        '{"loss": 0.5}\n'
    """
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    r"""Write ``data``, all or nothing.

    Args:
        path: the file, as for ``write_text``.
        data: what the file will hold.

    Raises:
        OSError: it cannot be written there, as for ``write_text``.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_bytes(Path(folder, "kernel.bin"), b"\x00\x01")
        ...     Path(folder, "kernel.bin").read_bytes()
        b'\x00\x01'
    """
    try:
        if _is_stream(path):
            # Replacing /dev/null by a file would harm the whole machine.
            Path(path).write_bytes(data)
        else:
            _replace_file(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise _cannot_write(path, error) from None


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    r"""Rows with the same keys as CSV, under a line of the keys; floats come back bit for bit.

    Example:
        >>> csv_text([{"filter": 0, "sigma (px)": 2.5}, {"filter": 1, "sigma (px)": 3.0}])
        'filter,sigma (px)\n0,2.5\n1,3.0\n'
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    extra: str,
    purpose: str,
) -> None:
    """Write tensors by name, and facts about them, into a safetensors file, all or nothing.

    The file carries its own SHA-256, so that damage is noticed, and holds no code. Equal content
    makes equal bytes.

    Args:
        path: the file, as for ``write_text``.
        tensors: on any device; those that share memory get their own.
        facts: what JSON can hold, with the whole number ``format`` among them.
        extra: of this project, that installs safetensors.
        purpose: what needs it, as for ``require``.

    Raises:
        ImportError: safetensors is not installed.
        OSError: it cannot be written there, as for ``write_text``.
    """
    safetensors = require("safetensors.torch", extra=extra, purpose=purpose)
    data: bytes = safetensors.save(
        {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
        # One entry, because the format does not keep the order of several.
        {"gaborium": json.dumps({**facts, "sha256": _NO_DIGEST})},
    )
    digest = hashlib.sha256(data).hexdigest()
    write_bytes(path, data.replace(_NO_DIGEST.encode(), digest.encode(), 1))


def read_tensors(
    path: str | os.PathLike[str], *, newest: int, what: str, again: str, extra: str, purpose: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``write_tensors`` has written, and verify its checksum.

    Args:
        path: the file.
        newest: the highest ``format`` that the caller reads.
        what: the file should be, as ``"a result of FitResult.save"``.
        again: what to do about a damaged one, as ``"fit again"``.
        extra: of this project, that installs safetensors.
        purpose: what needs it, as for ``require``.

    Returns:
        The tensors, on the CPU, and the facts.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be read.
        ValueError: it is cut off or damaged, is none of these files, or has a newer format.
    """
    safetensors = require("safetensors.torch", extra=extra, purpose=purpose)
    damages = (require("safetensors", extra=extra, purpose=purpose).SafetensorError, LookupError)
    try:
        # A pipe would be waited for, and a device may have no end.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ValueError(f"is no ordinary file; give {what}.")
        with Path(path).open("rb") as file:
            data, facts = _verified(file, newest, what, again)
        try:
            return safetensors.load(data), facts
        except damages as error:
            raise ValueError(f"is damaged ({' '.join(str(error).split())}); {again}.") from None
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} {error}") from None


def _verified(file: IO[bytes], newest: int, what: str, again: str) -> tuple[bytes, dict[str, Any]]:
    """A file's bytes and what it says about its tensors.

    No more is read than the file's own parts make plausible, and no more memory taken than its
    size: of a strange one the first bytes only. ``ValueError`` ends a sentence on what is wrong.
    """
    again = f"{again}, or take it from a copy."
    strange = f"is not {what}, or its first bytes are damaged; give such a file."
    size = os.fstat(file.fileno()).st_size
    # A safetensors file begins with the length of a header, and the header tells all others.
    data = file.read(9)
    start = 8 + int.from_bytes(data[:8], "little")
    if size < 9 or (data[8:] == b"{" and size < start):
        raise ValueError(f"is cut off after {size} bytes; {again}")
    if data[8:] != b"{" or start > _LARGEST_HEADER:
        raise ValueError(strange)
    data += file.read(start - 9)
    try:
        header = json.loads(data[8:])
        facts = json.loads(header.pop("__metadata__")["gaborium"])
        version, digest = int(facts["format"]), str(facts["sha256"])
        end = start + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError):
        raise ValueError(strange) from None
    if version > newest:
        raise ValueError(
            f"has format {version}, and this version reads up to {newest}; update gaborium"
            f"{_to_writer(facts)}."
        )
    if size < end:
        raise ValueError(f"is cut off: {size} of {end} bytes are there; {again}")
    if size > end:
        raise ValueError(f"is damaged: {size - end} bytes follow its end; {again}")
    data += file.read(end - start)
    blank = data.replace(digest.encode(), _NO_DIGEST.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != digest:
        raise ValueError(f"is damaged: its checksum does not agree with its content; {again}")
    return data, facts


def _to_writer(facts: Mapping[str, Any]) -> str:
    """The version that wrote a file, as the end of an advice, where the file tells it."""
    writer = facts.get("gaborium")
    known = isinstance(writer, str) and re.fullmatch(r"\d[\w.+-]{0,30}", writer)
    return f" to {writer} or newer" if known else ""


@contextmanager
def new_folder(
    path: str | os.PathLike[str], *, overwrite: bool, marker: str = "result.json"
) -> Iterator[Path]:
    """Fill a folder that appears under its name only when it is complete.

    The block works in a hidden folder beside ``path``, which takes that name when the block ends.
    If the block raises, also by Ctrl-C, the hidden folder is removed and nothing has changed.

    Args:
        path: the folder to make; missing parents are made too.
        overwrite: whether to replace an earlier result. It stays in place until the block ends.
        marker: a file that every finished folder holds. A folder without it is never replaced, so
            that a mistyped path loses nothing.

    Yields:
        The hidden folder to write into, in the same parent as ``path``.

    Raises:
        FileExistsError: ``path`` exists and is not to be replaced; told before the block starts.
        OSError: no folder can be made there, with its reason, also before the block starts. If
            it is only at the end that the name cannot be taken, because something else took it
            meanwhile, the finished folder is kept and the message says where.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as parent:
        ...     with new_folder(Path(parent, "first"), overwrite=False) as folder:
        ...         write_text(folder / "result.json", "{}")
        ...     sorted(str(file.relative_to(parent)) for file in Path(parent).rglob("*.json"))
        ['first/result.json']
    """
    shown = repr(os.fspath(path))
    # The real path, so that a link to a run is followed and not itself renamed away.
    target = Path(os.path.realpath(path))
    _check_free(target, shown, overwrite=overwrite, marker=marker)
    temporary = _temporary_name(target.parent)
    made = [parent for parent in target.parents if not parent.exists()]  # innermost first
    keep = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        _remove_empty(made)
        raise _cannot_write(path, error) from None
    try:
        yield temporary
        try:
            _check_free(target, shown, overwrite=overwrite, marker=marker)
            _install(temporary, target)
        except OSError as error:
            # The work is done and may have taken hours: a name is no reason to lose it.
            keep = True
            clear = error if error.strerror is None else _cannot_write(path, error)
            raise _same_kind(
                clear, f"{clear} The finished work is in {str(temporary)!r}."
            ) from None
    except BaseException:
        if not keep:
            shutil.rmtree(temporary, ignore_errors=True)
            _remove_empty(made)
        raise


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, up to one in which something else has come to lie."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _is_stream(path: str | os.PathLike[str]) -> bool:
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _replace_file(target: Path, data: bytes) -> None:
    if target.is_dir():
        raise IsADirectoryError("it is a folder; give the name of a file")
    temporary = _temporary_name(target.parent)
    try:
        # Not tempfile: its files are for their owner only, and the result would be so too.
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            # Without it a power cut may keep the new name and lose the new content.
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            shutil.copymode(target, temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _install(new: Path, target: Path) -> None:
    """Give ``new`` the name ``target``; at no point is there neither the old nor the new."""
    if not os.path.lexists(target):
        new.rename(target)
        return
    old = _temporary_name(target.parent)
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    try:
        shutil.rmtree(old)
    except OSError as error:
        warnings.warn(
            f"'{target}' is complete, but what it replaced could not be removed from '{old}': "
            f"{_reason(error)}.",
            stacklevel=4,
        )


def _check_free(target: Path, shown: str, *, overwrite: bool, marker: str) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        found = "exists and is not a folder; choose another name (--name)."
    elif not (target / marker).is_file():
        found = (
            f"exists and has no {marker}, so it may hold other work and is never replaced; "
            "choose another name (--name)."
        )
    elif not overwrite:
        found = (
            f"exists and holds {marker}; choose another name (--name) or replace it with "
            "overwrite=True (--overwrite)."
        )
    else:
        return
    raise FileExistsError(f"{shown} {found}")


def _temporary_name(folder: Path) -> Path:
    # Without the target's name in it, which may be as long as names can be.
    return folder / f".gaborium-{os.urandom(6).hex()}.part"


def _cannot_write(path: str | os.PathLike[str], error: OSError) -> OSError:
    """One line that says what is in the way, as the same kind of error."""
    parent = Path(path).absolute().parent
    existing = next((p for p in (parent, *parent.parents) if os.path.lexists(p)), parent)
    shown = repr(os.fspath(path))
    if not existing.is_dir():
        return NotADirectoryError(
            f"Cannot write {shown}: {str(existing)!r} is not a folder; choose another place."
        )
    if isinstance(error, FileNotFoundError) and existing != parent:
        return FileNotFoundError(
            f"Cannot write {shown}: there is no folder {str(parent)!r}; make it first."
        )
    reason = _reason(error)
    advice = "" if ";" in reason else "; choose another place"
    return _same_kind(error, f"Cannot write {shown}: {reason}{advice}.")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _same_kind(error: OSError, message: str) -> OSError:
    # One argument, so that the text is the message alone, without "[Errno 13]" before it.
    clear = type(error)(message)
    clear.errno = error.errno
    return clear


@contextmanager
def alone_in(
    folder: Path, mark: str, *, extra: str, purpose: str, patience: float = 0.0
) -> Iterator[bool]:
    """Make a folder of work, and keep other processes out of it until the block ends.

    Args:
        folder: the place; it may be there if it is empty or holds ``mark``.
        mark: name of the file by which such work is known.
        extra: the extra that brings filelock, and
        purpose: what needs it, for the message where it is missing.
        patience: s to wait for another process.

    Yields:
        Whether the work was there before.

    Raises:
        NotADirectoryError: the place is a file.
        FileExistsError: the folder holds other things.
        BlockingIOError: another process works there.
        ImportError: filelock is not installed.
    """
    filelock = require("filelock", extra=extra, purpose=purpose)
    shown = repr(str(folder))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{shown} is not a folder; choose another place.")
    folder.mkdir(parents=True, exist_ok=True)
    found = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    if found and mark not in found:
        raise FileExistsError(
            f"{shown} holds {found[0]!r} and no {mark}, so it may be other work; choose another "
            "folder."
        )
    # The system holds the lock: however a process ends, its lock ends with it.
    lock = filelock.FileLock(folder / ".lock", timeout=patience)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BlockingIOError(
            f"Another process is working in {shown}; let it finish, or choose another folder."
        ) from None
    try:
        yield bool(found)
    finally:
        lock.release()
