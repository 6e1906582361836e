"""Fits of more kernels than memory holds, in many processes, in runs that may be killed."""

from __future__ import annotations

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

from gaborium.fitting.api import fit
from gaborium.fitting.result import FitResult
from gaborium.support import locked_folder, require, write_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MANIFEST = "manifest.json"


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

    The workers are joblib's, or inside ``joblib.parallel_config(backend=...)`` the workers of Dask,
    Ray or another backend. Every worker must see ``folder``.

    Args:
        kernels: as for ``fit``, with the batch axis first: a tensor, an array, or the path of a
            ``.npy`` file, which is read shard by shard.
        folder: a new or empty folder for the shards, or the folder of an earlier call.
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
    array = _open(kernels)
    fit(_tensor(array[:1]), **options)  # shows whether the options are good
    if array.ndim < 1 + options.get("n_dims", 2) + (options.get("geometry") == "filter"):
        raise ValueError(f"kernels must have a batch axis first, got shape {array.shape}.")
    folder, n = Path(folder).resolve(), len(array)
    parts = [array[start : start + shard_size] for start in range(0, n, shard_size)]
    shards = {folder / f"shard-{i:06}.safetensors": part for i, part in enumerate(parts)}
    # Tensors as arrays, because their content must count.
    arrays = {k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in options.items()}
    manifest = {
        "gaborium": version("gaborium"),
        "shape": array.shape,
        "shard_size": shard_size,
        "options": {name: repr(value) for name, value in options.items()},
        "hash": joblib.hash([array, arrays], coerce_mmap=True),
    }
    text = json.dumps(manifest, indent=2) + "\n"
    with locked_folder(folder, _MANIFEST) as known:
        if known and (folder / _MANIFEST).read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{str(folder)!r} holds shards of another fit; choose another folder, or give the "
                "same kernels, options and shard_size in the same version of gaborium."
            )
        write_text(folder / _MANIFEST, text)
        for part in folder.glob(".gaborium-*.part"):  # of a process that was killed
            part.unlink(missing_ok=True)
        todo = [path for path in shards if not _is_whole(path)]
        n_done = n - sum(len(shards[path]) for path in todo)
        report(n_done, n)
        # Workers open a .npy file themselves; max_nbytes would put other kernels into files too.
        pool = joblib.Parallel(n_jobs, return_as="generator_unordered", max_nbytes=None)
        finished = pool(
            joblib.delayed(_fit_shard)(path, shards[path], options, os.getpid()) for path in todo
        )
        try:
            for path in finished:
                n_done += len(shards[path])
                report(n_done, n)
        finally:  # or workers would continue after an interrupt, when the lock is gone
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                finished.close()
    return list(shards)


def _fit_shard(path: Path, part: NDArray[Any], options: Mapping[str, Any], caller: int) -> Path:
    if os.getppid() == caller:
        _end_with(caller)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the other cores fit other shards
    try:
        fit(_tensor(part), **options).save(path)
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


def _open(kernels: Tensor | NDArray[Any] | str | os.PathLike[str]) -> NDArray[Any]:
    """The kernels as an array; a file is not read yet."""
    np = require("numpy", extra="shards", purpose="Shards")
    if not isinstance(kernels, (str, os.PathLike)):
        array: NDArray[Any] = np.asarray(
            kernels.detach().cpu() if isinstance(kernels, Tensor) else kernels
        )
        return array
    try:
        return np.lib.format.open_memmap(kernels, mode="r")
    except ValueError as error:
        raise ValueError(f"{os.fspath(kernels)!r} is not a whole .npy file: {error}") from None


def _tensor(part: NDArray[Any]) -> Tensor:
    """A copy; torch needs the machine's byte order."""
    return torch.from_numpy(part.astype(part.dtype.newbyteorder("="), order="C"))


def _is_whole(path: Path) -> bool:
    try:
        FitResult.load(path)
    except (FileNotFoundError, ValueError):  # missing or damaged
        return False
    return True
