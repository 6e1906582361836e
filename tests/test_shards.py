"""Shards: the same results as one fit, whatever is killed, damaged or changed in between."""

from __future__ import annotations

import enum
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("joblib", reason="shards need the shards extra")
pytest.importorskip("safetensors", reason="shards need the shards extra")
import joblib
import numpy as np

from gaborium import FitResult, Gabor2d, Outcome, fit, gabor
from gaborium.fitting import FitShards, fit_shards

SIZE = 16  # kernels in a shard
N = 120  # kernels: seven shards and a half
QUICK = {"n_starts": 2}

RUN = """
import sys
from gaborium.fitting import fit_shards

def show(done, total):
    print(done, flush=True)

if __name__ == "__main__":
    kernels, folder = sys.argv[1:]
    options = {"n_starts": 2}
    fit_shards(kernels, folder, shard_size=16, n_jobs=2, options=options, on_progress=show)
"""


def noisy(n: int, seed: int = 0) -> Tensor:
    """Planted kernels of 7 x 7 px, float32, with noise."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    planted = Gabor2d.of(
        orientation=uniform(0, math.pi),
        wavelength=uniform(3, 6),
        phase=uniform(-math.pi, math.pi),
        sigma=uniform(1.2, 2),
        aspect_ratio=uniform(0.7, 1.4),
    )
    kernels = gabor(planted, 7)
    return kernels + 0.02 * torch.randn(kernels.shape, generator=generator)


@pytest.fixture(scope="module")
def kernels() -> Tensor:
    return noisy(N)


@pytest.fixture(scope="module")
def everything(kernels: Tensor) -> FitResult:
    return fit(kernels, **QUICK)


@pytest.fixture(scope="module")
def finished(kernels: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that nothing has disturbed; copy it, and leave it alone."""
    folder = tmp_path_factory.mktemp("shards") / "finished"
    run(kernels, folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished folder, with the times of its files."""
    return Path(shutil.copytree(finished, tmp_path / "shards"))


@pytest.fixture
def file(kernels: Tensor, tmp_path: Path) -> Path:
    np.save(tmp_path / "kernels.npy", kernels.numpy())
    return tmp_path / "kernels.npy"


def run(kernels: object, folder: Path, on_progress: object = None, **others: object) -> FitShards:
    arguments = {"shard_size": SIZE, "options": QUICK, "on_progress": on_progress} | others
    return fit_shards(kernels, folder, **arguments)


def content(folder: Path) -> dict[str, bytes]:
    """Every file but hidden ones: the lock stays."""
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a shard is written again, even with the same bytes."""
    shards = {path.name: path.stat() for path in folder.glob("shard-*")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in shards.items()}


def assert_same(found: FitResult, wanted: FitResult, rtol: float = 0.0) -> None:
    assert found.outcome == wanted.outcome
    assert found.names == wanted.names
    pairs = [
        (found.explained_variance, wanted.explained_variance),
        *zip(found.params.as_dict().values(), wanted.params.as_dict().values(), strict=True),
    ]
    if rtol == 0:
        pairs += [(found.correlation, wanted.correlation)]
        pairs += [(found.n_iterations, wanted.n_iterations)]
        pairs += [(found.standard_error[n], e) for n, e in wanted.standard_error.items()]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol, equal_nan=True)


def one_line(kind: type[Exception], call: Callable[[], object], *words: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# -- one result in one file ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed() -> FitResult:
    """Every kind of number: infinite errors, NaN of a bad kernel, shared geometry."""
    kernels = noisy(6).reshape(3, 2, 7, 7)
    kernels[1] = 0
    kernels[2, :, 0, 0] = math.nan
    return fit(kernels, geometry="filter", center=True)


def test_a_saved_result_comes_back(mixed: FitResult, tmp_path: Path) -> None:
    mixed.save(tmp_path / "fit")
    loaded = FitResult.load(tmp_path / "fit")
    assert type(loaded.params) is type(mixed.params)
    assert_same(loaded, mixed)
    assert Outcome.BAD_INPUT in loaded.outcome
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "fit").read_bytes()


@pytest.mark.parametrize("where", [[], [0], slice(0, 2)], ids=str)
def test_a_part_of_a_result_is_saved(mixed: FitResult, tmp_path: Path, where: object) -> None:
    mixed[where].save(tmp_path / "fit")
    assert_same(FitResult.load(tmp_path / "fit"), mixed[where])


def test_an_outcome_may_change_its_place(
    mixed: FitResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gaborium.fitting import result

    mixed.save(tmp_path / "fit")
    turned = enum.Enum("Outcome", {one.name: one.value for one in reversed(Outcome)})
    monkeypatch.setattr(result, "Outcome", turned)
    found = [outcome.name for outcome in FitResult.load(tmp_path / "fit").outcome]
    assert found == [outcome.name for outcome in mixed.outcome]


def test_fields_may_share_memory(mixed: FitResult, tmp_path: Path) -> None:
    result = replace(mixed, standard_error=mixed.params.as_dict())
    result.save(tmp_path / "fit")
    assert_same(FitResult.load(tmp_path / "fit"), result)


def test_no_damage_goes_unnoticed(everything: FitResult, tmp_path: Path) -> None:
    path = tmp_path / "fit"
    everything[:2].save(path)
    data = path.read_bytes()
    for n in range(0, len(data), 7):
        path.write_bytes(data[:n])
        one_line(ValueError, lambda: FitResult.load(path), "/fit'")
        path.write_bytes(data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :])
        one_line(ValueError, lambda: FitResult.load(path), "/fit'")


def test_what_is_wrong_with_a_file_is_told(everything: FitResult, tmp_path: Path) -> None:
    from safetensors.torch import save

    path = tmp_path / "fit"
    everything[:2].save(path)
    data = path.read_bytes()
    cases = {
        data[:300]: "not a saved fit",
        data[:-1] + b"\xff": "damaged",
        save({"weight": torch.zeros(3)}): "not a saved fit",
        data.replace(b'"format\\": 1', b'"format\\": 2'): "update gaborium",
    }
    for content, word in cases.items():
        path.write_bytes(content)
        one_line(ValueError, lambda: FitResult.load(path), repr(str(path)), word)
    with pytest.raises(FileNotFoundError):
        FitResult.load(tmp_path / "none")


def test_an_unknown_outcome_is_told(
    everything: FitResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gaborium.fitting import result

    everything.save(tmp_path / "fit")
    monkeypatch.setattr(result, "Outcome", {one.name: one for one in everything.outcome})
    assert_same(FitResult.load(tmp_path / "fit"), everything)  # the others do not occur
    monkeypatch.setattr(result, "Outcome", {})
    one_line(
        ValueError, lambda: FitResult.load(tmp_path / "fit"), everything.outcome[0].name, "update"
    )


# -- many shards: the same results --------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, SIZE, N, 10 * N])
def test_any_shard_size_gives_the_results_of_one_fit(
    kernels: Tensor, everything: FitResult, tmp_path: Path, size: int
) -> None:
    n = 20 if size == 1 else N
    shards = run(kernels[:n], tmp_path / "out", shard_size=size)
    assert len(shards) == math.ceil(n / size)
    assert [len(result) for result in shards][:-1] == [size] * (len(shards) - 1)
    # Sums of a batch run in another order than those of a single kernel, and a search ends where a
    # step changes the kernel by less than 1e-9.
    assert_same(shards.result(), everything[:n], rtol=1e-8)


def test_shards_are_a_sequence(finished: Path, kernels: Tensor) -> None:
    shards = FitShards.load(finished)
    assert len(shards) == 8
    assert_same(shards[-1], fit(kernels[7 * SIZE :], **QUICK))
    with pytest.raises(IndexError):
        shards[8]


@pytest.mark.parametrize("form", ["path", "text", "memmap", "array", "swapped", "fortran"])
def test_the_form_of_the_kernels_does_not_matter(
    folder: Path, kernels: Tensor, file: Path, form: str
) -> None:
    array = kernels.numpy()
    given = {
        "path": file,
        "text": str(file),
        "memmap": np.load(file, mmap_mode="r"),
        "array": array,
        "swapped": array.astype(array.dtype.newbyteorder()),
        "fortran": np.asfortranarray(array),
    }[form]
    before = content(folder)
    (folder / "shard-000003.safetensors").unlink()
    run(given, folder)  # refused, were it not the same kernels
    assert content(folder) == before


def test_float16_and_bfloat16_are_taken(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        kernels = noisy(3).to(dtype)
        shards = run(kernels, tmp_path / str(dtype), shard_size=2)
        assert_same(shards.result(), fit(kernels, **QUICK), rtol=1e-9)


def test_kernels_with_channels(tmp_path: Path) -> None:
    weight = noisy(6).reshape(3, 2, 7, 7)
    for options in ({"geometry": "filter"}, {"geometry": "pair"}, {"metric": torch.eye(49)}):
        shards = run(weight, tmp_path / repr(options)[:20], shard_size=2, options=options)
        assert_same(shards.result(), fit(weight, **options), rtol=1e-9)
        before = identities(shards.folder)
        run(weight, shards.folder, shard_size=2, options=options)
        assert identities(shards.folder) == before


def test_bad_kernels_are_told_one_by_one(tmp_path: Path) -> None:
    kernels = noisy(8)
    kernels[0], kernels[5, 2, 2] = 0, math.nan
    result = run(kernels, tmp_path / "out", shard_size=4).result()
    bad = [i for i, outcome in enumerate(result.outcome) if outcome is Outcome.BAD_INPUT]
    assert bad == [0, 5]


def test_the_callers_threads_are_left_alone(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    run(noisy(3), tmp_path / "out")
    assert torch.get_num_threads() == 2


# -- going on -----------------------------------------------------------------------------------


def test_a_finished_folder_is_left_as_it_is(folder: Path, kernels: Tensor) -> None:
    before, seen = identities(folder), []
    run(kernels, folder, on_progress=lambda *numbers: seen.append(numbers))
    assert identities(folder) == before
    assert seen == [(N, N)]


def test_a_run_killed_in_the_middle_goes_on(finished: Path, file: Path, tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    folder, script = tmp_path / "shards", tmp_path / "script.py"
    script.write_text(RUN)
    with subprocess.Popen(
        [sys.executable, script, file, folder], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == SIZE:
                # It lives, and the folder is its own.
                one_line(BlockingIOError, lambda: run(file, folder), "Another process")
            if int(line) >= 2 * SIZE:
                break
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive  # joblib's would go on, and then wait for minutes
    before = identities(folder)
    assert 2 <= len(before) < 8
    (folder / ".gaborium-0123.part").write_bytes(b"half a shard")  # as the kill may leave it

    counts: list[int] = []
    run(file, folder, on_progress=lambda done, total: counts.append(done))
    assert len(counts) == 8 - len(before) + 1
    assert counts[-1] == N
    assert before.items() <= identities(folder).items()
    assert content(folder) == content(finished)
    assert not list(folder.glob(".gaborium-*"))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def exchange(path: Path) -> None:
    shutil.copy(path.with_name("shard-000007.safetensors"), path)  # whole, and of half the size


@pytest.mark.parametrize("harm", [damage, cut, exchange])
def test_a_harmed_shard_is_fitted_again(
    folder: Path, finished: Path, kernels: Tensor, harm: Callable[[Path], None]
) -> None:
    before = identities(folder)
    harmed = ["shard-000002.safetensors", "shard-000005.safetensors"]
    for name in harmed:
        harm(folder / name)
    with pytest.warns(UserWarning, match="damaged shards") as warned:
        run(kernels, folder)
    assert len(warned) == 1
    assert all(name in str(warned[0].message) for name in harmed)
    assert content(folder) == content(finished)
    after = identities(folder)
    assert {name for name in after if after[name] != before[name]} == set(harmed)


def test_another_fit_is_refused(folder: Path, kernels: Tensor) -> None:
    before = content(folder)
    changed = kernels.clone()
    changed[77, 3, 3] += 1e-6
    for arguments, word in (
        ({"kernels": changed}, "sha256"),
        ({"kernels": kernels[1:]}, "shape"),
        ({"kernels": kernels.double()}, "dtype ('float32' there, 'float64' here)"),
        ({"options": QUICK | {"center": True}}, "center (False there, True here)"),
        ({"options": {}}, "n_starts (2 there"),
        ({"options": QUICK | {"metric": torch.eye(49)}}, "metric"),
        ({"shard_size": 8}, "shard_size (16 there, 8 here)"),
    ):
        call = {"kernels": kernels, "folder": folder} | arguments
        one_line(ValueError, lambda: run(**call), word, "choose another folder")  # noqa: B023
    assert content(folder) == before


def test_another_metric_is_refused(tmp_path: Path) -> None:
    kernels, metric = noisy(2), torch.eye(49)
    run(kernels, tmp_path / "out", options={"metric": metric})
    run(kernels, tmp_path / "out", options={"metric": metric.clone()})
    one_line(
        ValueError,
        lambda: run(kernels, tmp_path / "out", options={"metric": 2 * metric}),
        "metric",
    )


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"options": {"n_strats": 2}}, ["n_strats", "n_starts"]),
        ({"options": {"kernels": 2}}, ["'kernels'", "n_starts"]),
        ({"options": {"geometry": "pear"}}, ["pear", "pair"]),
        ({"options": {"n_starts": 0}}, ["n_starts"]),
        ({"options": {"n_dims": 4}}, ["n_dims", "4"]),
        ({"shard_size": 0}, ["shard_size", "0"]),
        ({"shard_size": 2.5}, ["shard_size", "2.5"]),
        ({"kernels": torch.ones(7, 7)}, ["at least 3 axes", "(7, 7)"]),
        ({"kernels": torch.ones(3, 7, 7), "options": {"geometry": "filter"}}, ["4 axes"]),
        ({"kernels": torch.ones(0, 7, 7)}, ["empty"]),
        ({"kernels": torch.ones(3, 7, 7, dtype=torch.int64)}, ["float32", "int64"]),
        ({"kernels": torch.ones(3, 7, 7).numpy() + 1j}, ["float32", "complex"]),
    ],
    ids=str,
)
def test_bad_input_is_told_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, object], words: list[str]
) -> None:
    call = {"kernels": noisy(3), "folder": tmp_path / "out", "options": {}} | arguments
    one_line(ValueError, lambda: run(**call), *words)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_array_is_told(tmp_path: Path, file: Path) -> None:
    whole, path = file.read_bytes(), tmp_path / "bad.npy"
    np.savez(tmp_path / "many.npz", a=np.ones(3))
    objects = np.array([{}, []], dtype=object)
    for write in (
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(whole[:-1]),
        lambda: path.write_bytes(whole[:20]),
        lambda: path.write_text("1, 2, 3"),
        lambda: shutil.copy(tmp_path / "many.npz", path),
        lambda: np.save(path, objects, allow_pickle=True),
    ):
        write()
        one_line(ValueError, lambda: run(path, tmp_path / "out"), "/bad.npy'", "whole .npy")
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "none.npy", tmp_path / "out")
    one_line(TypeError, lambda: run([[1.0]], tmp_path / "out"), "list")


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("old")
    one_line(FileExistsError, lambda: run(noisy(2), tmp_path), "thesis.tex", "another folder")
    one_line(NotADirectoryError, lambda: run(noisy(2), tmp_path / "thesis.tex"), "not a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unfinished_or_damaged_folder_is_not_opened(folder: Path, kernels: Tensor) -> None:
    (folder / "shard-000003.safetensors").unlink()
    one_line(ValueError, lambda: FitShards.load(folder), "lacks 1 of 8", "fit_shards")
    newer = json.loads((folder / "manifest.json").read_text()) | {"format": 2}
    (folder / "manifest.json").write_text(json.dumps(newer))
    one_line(ValueError, lambda: FitShards.load(folder), "update gaborium")
    (folder / "manifest.json").write_text("{")
    one_line(ValueError, lambda: FitShards.load(folder), "damaged")
    one_line(ValueError, lambda: run(kernels, folder), "damaged")
    with pytest.raises(FileNotFoundError):
        FitShards.load(folder.parent)


# -- workers ------------------------------------------------------------------------------------


class Killer:
    """Counts what is done, and kills a worker once, in the middle."""

    def __init__(self, folder: Path, kill: Callable[[], None]) -> None:
        self.folder, self.kill = folder, kill
        self.counts: list[int] = []
        self.done_before: dict[str, tuple[int, int]] = {}

    def __call__(self, done: int, total: int) -> None:
        self.counts.append(done)
        if done >= 2 * SIZE and not self.done_before:
            self.kill()
            self.done_before = identities(self.folder)

    def check(self, finished: Path) -> None:
        """Nothing is lost, and nothing is done or counted twice."""
        assert self.done_before
        assert self.done_before.items() <= identities(self.folder).items()
        assert content(self.folder) == content(finished)
        steps = [b - a for a, b in zip(self.counts, self.counts[1:], strict=False)]
        assert sorted(steps) == [N % SIZE] + [SIZE] * 7


def test_a_killed_worker_loses_nothing(finished: Path, file: Path, tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")

    def kill() -> None:
        children = psutil.Process().children()
        next(one for one in children if "popen_loky" in " ".join(one.cmdline())).kill()

    killer = Killer(tmp_path / "shards", kill)
    with pytest.warns(UserWarning, match="A worker died"):
        run(file, killer.folder, killer, n_jobs=2)
    killer.check(finished)


@pytest.mark.parametrize("n_jobs", [2, 1])  # first with the workers that the test above has left
def test_an_interrupt_leaves_what_is_done(
    finished: Path, kernels: Tensor, tmp_path: Path, n_jobs: int
) -> None:
    def stop(done: int, total: int) -> None:
        if done >= 2 * SIZE:
            raise KeyboardInterrupt

    folder = tmp_path / "shards"
    with pytest.raises(KeyboardInterrupt):
        run(kernels, folder, on_progress=stop, n_jobs=n_jobs)
    before = identities(folder)
    assert 2 <= len(before) < 8
    time.sleep(0.3)  # in which a worker that goes on would finish a shard
    assert identities(folder) == before
    run(kernels, folder)
    assert content(folder) == content(finished)


def test_workers_that_always_die_are_given_up(
    kernels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures.process import BrokenProcessPool

    def die(*args: object) -> int:
        raise BrokenProcessPool

    monkeypatch.setattr("gaborium.fitting.shards._fit_job", die)
    with pytest.warns(UserWarning, match="A worker died") as warned:
        one_line(ChildProcessError, lambda: run(kernels, tmp_path / "out"), "shard_size", "n_jobs")
    assert len(warned) == 2


def test_a_job_that_an_engine_starts_again_is_not_done_again(
    kernels: Tensor, tmp_path: Path
) -> None:
    from gaborium.fitting.shards import _fit_job, _Job

    path = tmp_path / "shard-000000.safetensors"
    job = _Job(0, path, kernels[:3].numpy(), slice(0, 3), 3)
    _fit_job(job, {}, os.getpid())
    before = identities(tmp_path)
    _fit_job(job, {}, os.getpid())
    assert identities(tmp_path) == before


def test_two_dask_workers_one_of_them_killed(finished: Path, file: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="dask is one of joblib's engines")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        killer = Killer(
            tmp_path / "shards", lambda: os.kill(cluster.workers[0].pid, signal.SIGKILL)
        )
        run(file, killer.folder, killer)
    killer.check(finished)
