"""A fit in shards: more kernels than memory holds, many processes, and a run that may be killed."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gaborium.errors import one_of, require
from gaborium.files import locked_folder, write_text
from gaborium.fitting.api import fit
from gaborium.fitting.result import FitResult
from gaborium.params import RECORDS

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FORMAT = 1
_MANIFEST = "manifest.json"
_PATIENCE = 3  # deaths of the workers, one after the other, without a shard in between


@dataclass(frozen=True)
class FitShards:
    """The results of ``fit_shards``: a sequence of ``FitResult`` that lies on disk.

    A shard is read when it is asked for, so that a loop over all of them holds one at a time.

    Args:
        folder: where the shards are.
        n_kernels: kernels in all shards together.
        shard_size: kernels in each shard but the last, which may have fewer.
    """

    folder: Path
    n_kernels: int
    shard_size: int

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> FitShards:
        """Open a folder that ``fit_shards`` has finished.

        Raises:
            OSError: there is no such folder, or it cannot be read.
            ValueError: its manifest is damaged, or shards are missing.
        """
        manifest = _read_manifest(Path(folder))
        shards = cls(Path(folder).resolve(), manifest["shape"][0], manifest["shard_size"])
        missing = sum(not shards.path(index).exists() for index in range(len(shards)))
        if missing:
            raise ValueError(
                f"{str(folder)!r} lacks {missing} of {len(shards)} shards; call fit_shards again "
                "as before, and it goes on."
            )
        return shards

    def __len__(self) -> int:
        return math.ceil(self.n_kernels / self.shard_size)

    def __getitem__(self, index: int) -> FitResult:
        return FitResult.load(self.path(range(len(self))[index]))

    def __iter__(self) -> Iterator[FitResult]:
        return (self[index] for index in range(len(self)))

    def result(self) -> FitResult:
        """All shards as one result, in memory: half a kilobyte a kernel, for a while twice."""
        return FitResult.cat(list(self))

    def path(self, index: int) -> Path:
        """The file of a shard."""
        return self.folder / f"shard-{index:06}.safetensors"


def fit_shards(
    kernels: Tensor | NDArray[Any] | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    shard_size: int = 4096,
    n_jobs: int | None = None,
    options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> FitShards:
    """Fit kernels shard by shard into a folder; called again after a kill, it goes on.

    The workers are joblib's. To have those of Dask, Ray or another engine, call inside
    ``joblib.parallel_config(backend=...)``; every worker must see ``folder``. A worker that dies
    costs the shard that it was at, which is fitted again.

    Args:
        kernels: as for ``fit``, with the batch axis first: a tensor, an array, or the path of a
            ``.npy`` file, of which every worker reads its own shards only.
        folder: where the shards go: a new folder, an empty one, or that of an earlier call.
        shard_size: kernels in a shard. A shard is what a worker holds, and what a kill costs.
        n_jobs: workers, as joblib counts them; by default one, or what ``parallel_config`` says.
        options: keyword arguments of ``fit``, the same for all kernels.
        on_progress: called with the kernels that are done and those there are; first with those
            that an earlier call has done.

    Returns:
        The shards, unread. Their parameters are those of one ``fit`` of all kernels.

    Raises:
        ImportError: joblib, numpy, safetensors or filelock is not installed.
        ValueError: an option or the kernels are none for ``fit``, or the folder holds shards of
            other kernels, options, shard size or version.
        OSError: a file cannot be read or written; as ``FileExistsError``, the folder holds other
            things; as ``BlockingIOError``, another process is working in it; as
            ``ChildProcessError``, workers die again and again. Finished shards stay.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from gaborium import Gabor2d, gabor
        >>> kernels = gabor(Gabor2d.of(wavelength=[5.0, 6.0, 7.0], sigma=2.0), 11)
        >>> with TemporaryDirectory() as folder:
        ...     shards = fit_shards(kernels, folder, shard_size=2, options={"n_starts": 2})
        ...     for result in shards:
        ...         result
        FitResult(2 x Gabor2d: 2 CONVERGED)
        FitResult(1 x Gabor2d: 1 CONVERGED)
    """
    report = on_progress or (lambda *_: None)
    if not isinstance(shard_size, int) or shard_size < 1:
        raise ValueError(f"shard_size must be a positive whole number, got {shard_size!r}.")
    source, options = _source(kernels), _all_options(options or {})
    n_results = _n_results(source, options)
    n_kernels = len(_array(source))
    # A full path, because a worker may have another working directory.
    shards = FitShards(Path(folder).resolve(), n_kernels, shard_size)
    jobs = [
        _Job(i, shards.path(i), source, rows, n_results * (rows.stop - rows.start))
        for i, rows in enumerate(_slices(n_kernels, shard_size))
    ]
    with locked_folder(shards.folder, _MANIFEST):
        for part in shards.folder.glob(".gaborium-*.part"):  # of a process that was killed
            part.unlink(missing_ok=True)
        _claim(shards.folder, _manifest(source, shard_size, options))
        todo = {job.number: job for job in jobs if not job.is_done()}
        damaged = [job.path.name for job in todo.values() if job.path.exists()]
        if damaged:
            warnings.warn(
                f"{len(damaged)} damaged shards are fitted again: {', '.join(damaged[:3])}"
                f"{', ...' if len(damaged) > 3 else ''}.",
                stacklevel=2,
            )
        n_left = sum(job.n_kernels for job in todo.values())
        report(n_kernels - n_left, n_kernels)
        # Closed here, so that after an interrupt no worker goes on when the lock is gone.
        with closing(_run(todo, options, n_jobs)) as finished:
            for number in finished:
                n_left -= jobs[number].n_kernels
                report(n_kernels - n_left, n_kernels)
    return shards


# -- the workers --------------------------------------------------------------------------------


class _Job(NamedTuple):  # a tuple, because Dask would keep a large object on one worker alone
    """A shard, as a worker gets it."""

    number: int
    path: Path
    source: Path | NDArray[Any]
    rows: slice
    n_results: int

    @property
    def n_kernels(self) -> int:
        return self.rows.stop - self.rows.start

    def read(self) -> NDArray[Any]:
        return _read(self.source, self.rows)

    def packed(self) -> _Job:
        """The same with these kernels alone, which is what travels."""
        if isinstance(self.source, Path):
            return self
        return self._replace(source=self.read(), rows=slice(0, self.n_kernels))

    def is_done(self) -> bool:
        try:
            return len(FitResult.load(self.path)) == self.n_results
        except (FileNotFoundError, ValueError):
            return False


def _fit_job(job: _Job, options: Mapping[str, Any], run: int) -> int:
    """Do a job of process ``run``, unless it is done."""
    if os.getppid() == run:
        _end_with(run)
    torch.set_num_threads(1)  # the other cores have shards of their own
    # An engine may start a job again when only its answer was lost.
    if not job.is_done():
        fit(torch.from_numpy(job.read()), **options).save(job.path)
    return job.number


@cache  # once in a process
def _end_with(parent: int) -> None:
    """End this process soon after its parent was killed; joblib's would go on and then wait."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(
    todo: dict[int, _Job], options: Mapping[str, Any], n_jobs: int | None
) -> Generator[int, None, None]:
    """Do all jobs, in any order, and yield the number of each that is done."""
    joblib = require("joblib", extra="shards", purpose="Shards")
    n_threads, deaths = torch.get_num_threads(), 0
    try:
        while todo:
            # Without max_nbytes, joblib would put kernels into files of its own.
            pool = joblib.Parallel(
                n_jobs=n_jobs, return_as="generator_unordered", batch_size=1, max_nbytes=None
            )
            work = joblib.delayed(_fit_job)
            answers = pool(work(job.packed(), options, os.getpid()) for job in list(todo.values()))
            try:
                for number in answers:
                    del todo[number]
                    deaths = 0
                    yield number
            except BrokenProcessPool:
                deaths += 1
                if deaths == _PATIENCE:
                    raise ChildProcessError(
                        f"Workers died {deaths} times and no shard was finished in between, often "
                        "for lack of memory; take a smaller shard_size or n_jobs, and call again."
                    ) from None
                warnings.warn(
                    f"A worker died; {len(todo)} shards that are not done are taken up again.",
                    stacklevel=3,
                )
            finally:
                with warnings.catch_warnings():  # joblib's, about the work that is not wanted now
                    warnings.simplefilter("ignore")
                    answers.close()
    finally:
        torch.set_num_threads(n_threads)


# -- the kernels --------------------------------------------------------------------------------


def _source(kernels: Tensor | NDArray[Any] | str | os.PathLike[str]) -> Path | NDArray[Any]:
    """Kernels as a full path or an array, of floating type."""
    np = require("numpy", extra="shards", purpose="Shards")
    source: Path | NDArray[Any]
    if isinstance(kernels, (str, os.PathLike)):
        source = Path(kernels).resolve()
    elif isinstance(kernels, Tensor):
        kernels = kernels.detach().cpu()
        # numpy has no bfloat16
        source = (kernels.float() if kernels.dtype == torch.bfloat16 else kernels).numpy()
    elif isinstance(kernels, np.ndarray):
        source = kernels
    else:
        raise TypeError(
            "kernels must be a tensor, an array or the path of a .npy file, got "
            f"{type(kernels).__name__}."
        )
    dtype = _array(source).dtype
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise ValueError(f"kernels must be float16, float32 or float64, got {dtype}.")
    return source


def _array(source: Path | NDArray[Any]) -> NDArray[Any]:
    """The array; a file is opened and not read."""
    if not isinstance(source, Path):
        return source
    np = require("numpy", extra="shards", purpose="Shards")
    try:
        return np.lib.format.open_memmap(source, mode="r")
    except ValueError as error:
        raise ValueError(f"{str(source)!r} is no whole .npy file of numbers: {error}.") from None


def _read(source: Path | NDArray[Any], rows: slice) -> NDArray[Any]:
    """A copy of some rows, in the machine's order of bytes; the file is closed again."""
    np = require("numpy", extra="shards", purpose="Shards")
    part = _array(source)[rows]
    return np.array(part, dtype=part.dtype.newbyteorder("="), order="C")


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _all_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the defaults of ``fit``, so that a change of these is noticed, too."""
    parameters = inspect.signature(fit).parameters.values()
    known = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    for name in options:
        one_of("An option of fit", name, known)
    return known | dict(options)


def _n_results(source: Path | NDArray[Any], options: dict[str, Any]) -> int:
    """How many results a kernel gives; fitting the first one shows whether the options are good."""
    kernels = _array(source)
    if options["n_dims"] in RECORDS:
        least = 1 + options["n_dims"] + (options["geometry"] == "filter")
        if kernels.ndim < least or len(kernels) == 0:
            raise ValueError(
                f"kernels must have at least {least} axes, the first of them that of the batch and "
                f"not empty, got shape {kernels.shape}."
            )
    return len(fit(torch.from_numpy(_read(source, slice(0, 1))), **options))


# -- the folder ---------------------------------------------------------------------------------


def _manifest(
    source: Path | NDArray[Any], shard_size: int, options: dict[str, Any]
) -> dict[str, Any]:
    """What the shards of one folder have in common."""
    kernels, digest = _array(source), hashlib.sha256()
    for rows in _slices(len(kernels), shard_size):
        digest.update(_read(source, rows).data)
    manifest = {
        "format": _FORMAT,
        "gaborium": version("gaborium"),
        "shape": kernels.shape,
        "kernel_dtype": kernels.dtype.newbyteorder("=").name,
        "sha256": digest.hexdigest(),
        "shard_size": shard_size,
        "options": options,
    }
    return json.loads(json.dumps(manifest, default=_told))


def _told(value: object) -> str:
    """An option that JSON has no word for."""
    if not isinstance(value, Tensor):
        return repr(value)
    data = value.detach().cpu().contiguous().numpy()
    return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data.data).hexdigest()}"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version_there = manifest["format"]
        _ = manifest["shape"][0], manifest["shard_size"], manifest["options"].items()
    except (AttributeError, LookupError, TypeError, ValueError):
        raise ValueError(f"{str(path)!r} is damaged; fit again, into another folder.") from None
    if version_there > _FORMAT:
        raise ValueError(
            f"{str(path)!r} has format {version_there}, and this version reads up to {_FORMAT}; "
            "update gaborium."
        )
    return manifest


def _claim(folder: Path, manifest: dict[str, Any]) -> None:
    """Make the folder that of this fit, or see that it is."""
    path = folder / _MANIFEST
    if not path.exists():
        write_text(path, json.dumps(manifest, indent=2) + "\n")
        return
    there = _read_manifest(folder)
    ours, theirs = ({**one, **one["options"]} for one in (manifest, there))
    different = [
        f"{name} ({theirs.get(name)!r:.40} there, {ours.get(name)!r:.40} here)"
        for name in {**ours, **theirs}
        if name != "options" and ours.get(name) != theirs.get(name)
    ]
    if different:
        raise ValueError(
            f"{str(folder)!r} holds shards of another fit: {', '.join(different)}; choose another "
            "folder, or give what was given then."
        )
