"""Saved fits and shards: the same results as one fit, whatever is killed, damaged or changed."""

import enum
import math
import shutil
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("joblib", reason="shards need the shards extra")
pytest.importorskip("safetensors", reason="shards need the shards extra")
import joblib
import numpy as np

from gaborium import FitResult, Gabor2d, Outcome, fit, fit_shards, gabor
from gaborium.fitting import result as module

SIZE, N = 12, 80  # kernels in a shard and in all: six shards and two thirds
QUICK = {"n_starts": 1}
RUN = """
import sys
from gaborium import fit_shards

if __name__ == "__main__":
    kernels, folder = sys.argv[1:]
    options, show = {"n_starts": 1}, lambda done, total: print(done, flush=True)
    fit_shards(kernels, folder, shard_size=12, n_jobs=2, options=options, on_progress=show)
"""


def noisy(n: int) -> Tensor:
    """Planted kernels of 7 x 7 px, float32, with noise."""
    draw = torch.Generator().manual_seed(0)
    a, b, c = torch.rand(3, n, generator=draw)
    planted = Gabor2d.of(orientation=math.pi * a, wavelength=3 + 3 * b, sigma=1.5, phase=6 * c)
    kernels = gabor(planted, 7)
    return kernels + 0.02 * torch.randn(kernels.shape, generator=draw)


def run(kernels, folder, on_progress=None, **others) -> list[Path]:
    arguments = {"shard_size": SIZE, "options": QUICK, "on_progress": on_progress} | others
    return fit_shards(kernels, folder, **arguments)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "kernels.npy"
    np.save(path, noisy(N).numpy())
    return path


@pytest.fixture(scope="module")
def finished(file) -> Path:
    """Return the folder of a run that nothing has disturbed."""
    return run(file, file.parent / "out")[0].parent


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """Return a copy of the finished folder, with the times of its files."""
    return Path(shutil.copytree(finished, tmp_path / "shards"))


def content(folder: Path) -> dict[str, bytes]:
    """Every file but hidden ones: the lock stays."""
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a shard is written again, even with the same bytes."""
    shards = {path.name: path.stat() for path in folder.glob("shard-*")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in shards.items()}


# -- one result in one file ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed() -> FitResult:
    """Every kind of number: infinite errors, NaN of a bad kernel, shared geometry."""
    kernels = noisy(6).reshape(3, 2, 7, 7)
    kernels[1] = 0
    kernels[2, :, 0, 0] = math.nan
    return fit(kernels, geometry="filter", center=True)


@pytest.mark.parametrize("where", [slice(None), [], [0], slice(0, 2)], ids=str)
def test_a_saved_result_comes_back(mixed, tmp_path, where):
    result = mixed[where]
    shared = replace(result, standard_error=result.params.as_dict())  # the same memory twice
    for one in (result, shared):
        one.save(tmp_path / "fit")
        loaded = FitResult.load(tmp_path / "fit")
        assert loaded.to_json() == one.to_json()
        loaded.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "fit").read_bytes()
    assert Outcome.BAD_INPUT in mixed.outcome


def test_outcomes_are_saved_by_name(mixed, tmp_path, monkeypatch):
    mixed.save(tmp_path / "fit")
    turned = enum.Enum("Outcome", {one.name: one.value for one in reversed(Outcome)})
    monkeypatch.setattr(module, "Outcome", turned)
    names = [outcome.name for outcome in FitResult.load(tmp_path / "fit").outcome]
    assert names == [outcome.name for outcome in mixed.outcome]
    monkeypatch.setattr(module, "Outcome", {})
    with pytest.raises(ValueError, match=f"{names[0]}.*update gaborium"):
        FitResult.load(tmp_path / "fit")


def test_no_damage_goes_unnoticed(mixed, tmp_path):
    path = tmp_path / "fit"
    mixed.save(path)
    data = path.read_bytes()
    for n in range(0, len(data), 53):
        for harmed in (data[:n], data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :]):
            path.write_bytes(harmed)
            with pytest.raises(ValueError, match="/fit'"):
                FitResult.load(path)


# -- many shards: the same results --------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "size", "options"),
    [
        ((9, 7, 7), 1, QUICK),
        ((9, 7, 7), 50, QUICK),
        ((5, 2, 7, 7), 2, {"geometry": "filter"} | QUICK),
        ((5, 2, 7, 7), 2, {"metric": torch.eye(49)} | QUICK),
    ],
    ids=["one by one", "one shard", "shared geometry", "metric"],
)
def test_shards_are_the_parts_of_one_fit(tmp_path, shape, size, options):
    kernels, n_threads = noisy(math.prod(shape[:-2])).reshape(shape), torch.get_num_threads()
    kernels[-1] = 0
    arguments = {"shard_size": size, "options": options}
    paths = run(kernels, tmp_path / "out", **arguments)
    assert torch.get_num_threads() == n_threads
    results = [FitResult.load(path) for path in paths]
    assert len(results) == math.ceil(len(kernels) / size)
    # Sums of a batch run in another order than those of a single kernel, and a search ends where a
    # step changes the kernel by less than 1e-9.
    whole, wanted = FitResult.cat(results), fit(kernels, **options)
    assert (whole.outcome, whole.names) == (wanted.outcome, wanted.names)
    close = {"rtol": 1e-8, "atol": 1e-8, "equal_nan": True}
    torch.testing.assert_close(whole.explained_variance, wanted.explained_variance, **close)
    torch.testing.assert_close(whole.params.as_dict(), wanted.params.as_dict(), **close)
    before, counts = identities(tmp_path / "out"), []
    run(kernels, tmp_path / "out", lambda *numbers: counts.append(numbers), **arguments)
    assert identities(tmp_path / "out") == before
    assert counts == [(len(kernels),) * 2]


def test_the_form_of_the_kernels_does_not_matter(finished, file, tmp_path):
    array, before = np.load(file), identities(finished)
    for form in (str(file), np.load(file, mmap_mode="r"), array, torch.from_numpy(array)):
        run(form, finished)  # refused, if these were not the same kernels
    assert identities(finished) == before
    swapped = np.asfortranarray(array.astype(array.dtype.newbyteorder()))
    run(swapped, tmp_path)
    assert (
        content(tmp_path)["shard-000000.safetensors"]
        == content(finished)["shard-000000.safetensors"]
    )


def test_dask_does_the_work_too(tmp_path, finished, file):
    distributed = pytest.importorskip("distributed", reason="dask is one of joblib's backends")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.LocalCluster(processes=False, **options) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        run(file, tmp_path / "out")
    assert content(tmp_path / "out") == content(finished)


# -- failures -----------------------------------------------------------------------------------


def test_a_killed_run_continues(finished, file, tmp_path):
    psutil = pytest.importorskip("psutil")
    folder, script = tmp_path / "shards", tmp_path / "run.py"
    script.write_text(RUN)
    command = [sys.executable, script, file, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == SIZE:
                with pytest.raises(BlockingIOError, match="Another process"):
                    run(file, folder)
            if int(line) >= 2 * SIZE:
                break
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive  # joblib's would continue, and then wait for minutes
    before = identities(folder)
    assert 2 <= len(before) < 7
    (folder / ".gaborium-0123.part").write_bytes(b"half a shard")  # as the kill may leave it

    counts: list[int] = []
    run(file, folder, lambda done, total: counts.append(done))
    assert (len(counts), counts[-1]) == (7 - len(before) + 1, N)
    assert before.items() <= identities(folder).items()
    assert content(folder) == content(finished)
    assert not list(folder.glob(".gaborium-*"))


@pytest.mark.parametrize(("n_jobs", "kill"), [(1, False), (2, False), (2, True)])
def test_an_interrupt_and_a_killed_worker_leave_what_is_done(
    finished, file, tmp_path, n_jobs, kill
):
    psutil = pytest.importorskip("psutil")

    def stop(done: int, total: int) -> None:
        if done >= 2 * SIZE and not kill:
            raise KeyboardInterrupt
        children = psutil.Process().children() if done == 2 * SIZE else []
        for worker in [one for one in children if "popen_loky" in " ".join(one.cmdline())]:
            worker.kill()

    folder = tmp_path / "shards"
    with pytest.raises(BrokenProcessPool if kill else KeyboardInterrupt):
        run(file, folder, stop, n_jobs=n_jobs)
    before = identities(folder)
    assert 2 <= len(before) < 7
    time.sleep(0.3)  # in which a worker that continues would finish a shard
    assert identities(folder) == before
    run(file, folder)
    assert before.items() <= identities(folder).items()
    assert content(folder) == content(finished)


def test_a_harmed_shard_is_fitted_again(folder, finished, file):
    before = identities(folder)
    first, second, third = (folder / f"shard-{i:06}.safetensors" for i in (1, 2, 5))
    data = first.read_bytes()
    first.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    second.write_bytes(data[:1000])
    third.unlink()
    run(file, folder)
    assert content(folder) == content(finished)
    after = identities(folder)
    again = {name for name in after if after[name] != before[name]}
    assert again == {first.name, second.name, third.name}


def test_another_fit_is_refused(folder):
    before, kernels = content(folder), noisy(N)
    changed = kernels.clone()
    changed[77, 3, 3] += 1e-6
    for one, options in (
        (changed, {}),
        (kernels[1:], {}),
        (kernels.double(), {}),
        (kernels, {"options": QUICK | {"center": True}}),
        (kernels, {"options": QUICK | {"metric": torch.eye(49)}}),
        (kernels, {"shard_size": 8}),
    ):
        with pytest.raises(ValueError, match="of another fit; choose another folder"):
            run(one, folder, **options)
    assert content(folder) == before


@pytest.mark.parametrize(
    ("kernels", "options", "kind", "words"),
    [
        (noisy(3), {"options": {"n_strats": 2}}, TypeError, "n_strats"),
        (noisy(3), {"options": {"n_dims": 4}}, ValueError, "n_dims must be 1, 2 or 3, got 4"),
        (noisy(3), {"shard_size": 2.5}, ValueError, "shard_size must be a positive whole number"),
        (torch.ones(7, 7), {}, ValueError, r"a batch axis first, got shape \(7, 7\)"),
        (noisy(3), {"options": {"geometry": "filter"}}, ValueError, "a batch axis first"),
        (torch.ones(0, 7, 7), {}, ValueError, r"got shape \(0, 7, 7\)"),
        (torch.ones(3, 7, 7).int(), {}, ValueError, r"must be floating, got torch\.int32"),
        ("none.npy", {}, FileNotFoundError, "none"),
        (__file__, {}, ValueError, "test_shards.py' is not a whole"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, kernels, options, kind, words):
    with pytest.raises(kind, match=words):
        run(kernels, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("old")
    with pytest.raises(FileExistsError, match="thesis"):
        run(noisy(2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
