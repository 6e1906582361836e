"""Fits of more kernels than memory holds, in many processes, in runs that may be killed."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gaborium.errors import require
from gaborium.files import locked_folder, write_text
from gaborium.fitting.api import fit
from gaborium.fitting.result import FitResult

if TYPE_CHECKING:
    from numpy.typing import NDArray


def fit_shards(
    kernels: Tensor | NDArray[Any] | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    shard_size: int = 4096,
    n_jobs: int | None = None,
    options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Fit kernels shard by shard into a folder; called again after a failure, it continues.

    The workers are joblib's. Inside ``joblib.parallel_config(backend=...)`` they are those of Dask,
    Ray or another backend; every worker must see ``folder``.

    Args:
        kernels: as for ``fit``, with the batch axis first: a tensor, an array, or the path of a
            ``.npy`` file, of which every worker reads only its own shards.
        folder: a new or empty folder for the shards, or that of an earlier call.
        shard_size: kernels that a worker holds at a time, and that a failure costs.
        n_jobs: workers, as joblib counts them; by default one, or what ``parallel_config`` says.
        options: keyword arguments of ``fit``, the same for all kernels.
        on_progress: called with the number of finished kernels and of all kernels; first with
            those that an earlier call has finished.

    Returns:
        The files of the shards, each a saved ``FitResult``, in the order of the kernels. Together
        they are the result of one ``fit``.

    Raises:
        ImportError: joblib, numpy, safetensors or filelock is not installed.
        TypeError: ``fit`` has no such option.
        ValueError: an option or the kernels are not valid for ``fit``, or the folder holds shards
            of other kernels, options, shard size or version.
        OSError: a file cannot be read or written; as ``FileExistsError``, the folder holds other
            things; as ``BlockingIOError``, another process is working in it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from gaborium import FitResult, Gabor2d, gabor
        >>> kernels = gabor(Gabor2d.of(wavelength=[5.0, 6.0, 7.0], sigma=2.0), 11)
        >>> with TemporaryDirectory() as folder:
        ...     for path in fit_shards(kernels, folder, shard_size=2, options={"n_starts": 2}):
        ...         print(path.name, FitResult.load(path))
        shard-000000.safetensors FitResult(2 x Gabor2d: 2 CONVERGED)
        shard-000001.safetensors FitResult(1 x Gabor2d: 1 CONVERGED)
    """
    joblib = require("joblib", extra="shards", purpose="Shards")
    report, options = on_progress or (lambda *_: None), dict(options or {})
    if not isinstance(shard_size, int) or shard_size < 1:
        raise ValueError(f"shard_size must be a positive whole number, got {shard_size!r}.")
    source: Path | NDArray[Any]
    if isinstance(kernels, Tensor):
        source = kernels.detach().cpu().numpy()
    else:  # a full path, because a worker may have another working directory
        source = Path(kernels).resolve() if isinstance(kernels, (str, os.PathLike)) else kernels
    # The first kernel shows whether the options are good, and how many results a kernel gives.
    per_kernel = len(fit(torch.from_numpy(_read(source, slice(0, 1))), **options))
    n, *shape = _open(source).shape
    if len(shape) < options.get("n_dims", 2) + (options.get("geometry") == "filter"):
        raise ValueError(f"kernels must have a batch axis first, got shape {(n, *shape)}.")
    folder = Path(folder).resolve()
    shards = {
        folder / f"shard-{i:06}.safetensors": slice(start, min(start + shard_size, n))
        for i, start in enumerate(range(0, n, shard_size))
    }
    sizes = {path: rows.stop - rows.start for path, rows in shards.items()}
    with locked_folder(folder, "manifest.json"):
        for part in folder.glob(".gaborium-*.part"):  # of a process that was killed
            part.unlink(missing_ok=True)
        _claim(folder / "manifest.json", source, list(shards.values()), options)
        todo = [path for path, size in sizes.items() if not _is_done(path, per_kernel * size)]
        n_done = n - sum(sizes[path] for path in todo)
        report(n_done, n)
        # Without max_nbytes, joblib would put kernels into files of its own.
        pool = joblib.Parallel(n_jobs, return_as="generator_unordered", max_nbytes=None)
        finished = pool(
            joblib.delayed(_fit_shard)(path, *_work(source, shards[path]), options, os.getpid())
            for path in todo
        )
        try:
            for path in finished:
                n_done += sizes[path]
                report(n_done, n)
        finally:  # or workers would continue after an interrupt, when the lock is gone
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                finished.close()
    return list(shards)


def _work(source: Path | NDArray[Any], rows: slice) -> tuple[Path | NDArray[Any], slice]:
    """What is sent to a worker: a path, or only its own kernels."""
    return (source, rows) if isinstance(source, Path) else (_read(source, rows), slice(None))


def _fit_shard(
    path: Path,
    source: Path | NDArray[Any],
    rows: slice,
    options: Mapping[str, Any],
    caller: int,
) -> Path:
    if os.getppid() == caller:
        _end_with(caller)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the other cores have shards of their own
    try:
        fit(torch.from_numpy(_read(source, rows)), **options).save(path)
    finally:
        torch.set_num_threads(n_threads)
    return path


@cache  # once in a process
def _end_with(parent: int) -> None:
    """End this process soon after its parent was killed; joblib's would continue, then wait."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _is_done(path: Path, n_results: int) -> bool:
    try:
        return len(FitResult.load(path)) == n_results
    except (FileNotFoundError, ValueError):  # missing or damaged
        return False


def _open(source: Path | NDArray[Any]) -> NDArray[Any]:
    np = require("numpy", extra="shards", purpose="Shards")
    if not isinstance(source, Path):
        array: NDArray[Any] = np.asarray(source)
        return array
    try:
        return np.lib.format.open_memmap(source, mode="r")
    except ValueError as error:
        raise ValueError(f"{str(source)!r} is not a whole .npy file: {error}") from None


def _read(source: Path | NDArray[Any], rows: slice) -> NDArray[Any]:
    """A copy of some kernels, in the machine's byte order."""
    part = _open(source)[rows]
    return part.astype(part.dtype.newbyteorder("="), order="C")


def _claim(
    path: Path, source: Path | NDArray[Any], shards: list[slice], options: Mapping[str, Any]
) -> None:
    """Write what the shards of a folder have in common, or check that it is the same."""
    digest, array = hashlib.sha256(), _open(source)
    for rows in shards:
        digest.update(_read(source, rows).data)
    manifest = {
        "gaborium": version("gaborium"),
        "shape": list(array.shape),
        "dtype": array.dtype.newbyteorder("=").name,
        "sha256": digest.hexdigest(),
        "shards": len(shards),
        "shard_size": shards[0].stop,
        "options": {name: _text(value) for name, value in options.items()},
    }
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    if not path.exists():
        write_text(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{str(path)!r} is of another fit; choose another folder, or give the same kernels, "
            "options and shard_size in the same version of gaborium."
        )


def _text(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    data = value.detach().cpu().contiguous().numpy().data
    return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
