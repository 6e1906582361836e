"""Training: what is measured is right, and no kill changes a bit of it."""

import json
import multiprocessing
import os
import signal
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from gaborium.training import Recipe, train
from gaborium.training.checkpoints import load_state
from gaborium.training.datasets import Dataset

pytest.importorskip("lightning_fabric")
pytest.importorskip("safetensors")
pytest.importorskip("filelock")

TINY = Recipe(
    n_filters=4, kernel_size=5, epochs=3, batch_size=7, seeds=(0,), beside=(), accelerator="cpu",
    learning_rate=1e-2,
)  # fmt: skip
EVERY = {"checkpoint_steps": 2, "log_steps": 3}


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Upright and lying stripes of any phase, under noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    phase = 6.28 * torch.rand(60, 1, 1, 1, generator=generator)
    x = torch.arange(12.0).expand(60, 1, 12, 12)
    waves = torch.sin(x * 1.3 + phase)
    waves = torch.where(labels[:, None, None, None] == 0, waves, waves.mT)
    noise = torch.randn(60, 1, 12, 12, generator=generator)
    images = (127 + 50 * waves + 20 * noise).clamp(0, 255).to(torch.uint8)
    return Dataset("stripes", images[:25], labels[:25], images[25:], labels[25:], ("up", "flat"))


def files_of(folder: Path) -> dict[str, bytes]:
    """All that a training has written, less the seconds that it took."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            state = load_state(path)
            state.pop("seconds", None)
            state.get("run", {}).pop("seconds", None)
            found[name] = state
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def same(one: object, other: object) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def killed_after(monkeypatch: pytest.MonkeyPatch, n_steps: int, how: Any) -> None:
    """Let ``how`` strike in the middle of a step."""
    left, backward = [n_steps], torch.Tensor.backward

    def struck(*args: Any, **kwargs: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            how()
        backward(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", struck)


class Struck(BaseException):
    """No error that anything would handle."""


def strike() -> None:
    raise Struck


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_processes(n: int, work: Any) -> list[int]:
    """Run ``work`` in n processes as torchrun would start them; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank: int) -> None:
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            work(rank)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(rank,)) for rank in range(n)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads
        for one in processes:
            one.start()
    # When one was killed, the others wait for it.
    for one in processes:
        one.join(20 if all(other.exitcode in (None, 0) for other in processes) else 0.5)
        one.kill() if one.is_alive() else None
        one.join()
    return [one.exitcode for one in processes]


# -- kills --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(TINY.replace(beside=("free",), epochs=2), dataset=data, folder=folder, **EVERY)
    return files_of(folder)


# There are 4 steps in an epoch, 8 in a run and 16 in all.
@pytest.mark.parametrize("n_steps", [0, 1, 3, 4, 7, 8, 11])
def test_interrupted_anywhere_and_resumed_equals_uninterrupted(
    data, whole, tmp_path, monkeypatch, n_steps
):
    recipe = TINY.replace(beside=("free",), epochs=2)
    with monkeypatch.context() as patch:
        killed_after(patch, n_steps, strike)
        with pytest.raises(Struck):
            train(recipe, dataset=data, folder=tmp_path, **EVERY)
    result = train(recipe, dataset=data, folder=tmp_path, **EVERY)
    assert same(files_of(tmp_path), whole)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines if line["kind"] == "step"] == [3, 6] * 2
    assert [line["step"] for line in lines if line["kind"] == "epoch"] == [0, 4, 8] * 2
    assert result.runs[0].epochs == [0, 1, 2]


@pytest.mark.parametrize("n", [1, 2])
def test_killed_for_good_and_resumed_equals_uninterrupted(data, tmp_path, monkeypatch, n):
    def work(folder: str, after: int | None = None) -> Any:
        def one(rank: int) -> None:
            with monkeypatch.context() as patch:
                if after is not None and rank == 0:
                    killed_after(patch, after, kill)
                train(TINY, dataset=data, folder=tmp_path / folder, **EVERY)

        return one

    assert in_processes(n, work("whole")) == [0] * n
    assert in_processes(n, work("killed", 9))[0] == -signal.SIGKILL
    assert not (tmp_path / "killed/gabor-0/run.safetensors").exists()
    assert in_processes(n, work("killed")) == [0] * n
    assert same(files_of(tmp_path / "killed"), files_of(tmp_path / "whole"))
    assert load_state(tmp_path / "whole/gabor-0/run.safetensors")["run"]["accuracy"] > 0.6
