"""Training: what is measured is right, and no kill changes a bit of it."""

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gaborium import Gabor2d, GaborConv2d, MixedConv, support
from gaborium.training import Dataset, Recipe, Run, load_trained, train, trainer
from gaborium.training.results import load_checkpoint
from gaborium.training.trainer import _Trainer, make_optimizers

pytest.importorskip("lightning_fabric")
pytest.importorskip("filelock")

TINY = Recipe(
    n_filters=4, kernel_size=5, epochs=3, batch_size=7, seeds=(0,), compare_with=(),
    accelerator="cpu", learning_rate=1e-2,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(stripes: Dataset) -> Dataset:
    return stripes


@pytest.fixture(autouse=True)
def save_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_LOG_STEPS", 3)
    monkeypatch.setattr(trainer, "_CHECKPOINT_STEPS", 2)


def files_of(folder: Path) -> dict[str, Any]:
    """All that a training has written, without the seconds that it took."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            found[name] = load_checkpoint(path)
            found[name]["run"].seconds = 0.0
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def same(one: object, other: object) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (Run, Gabor2d)):
        return same(vars(one), vars(other))
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_LOG_STEPS", 3)
        patch.setattr(trainer, "_CHECKPOINT_STEPS", 2)
        train(TINY.replace(compare_with=("free",), epochs=2), data, folder=folder)
    return files_of(folder)


# There are 4 steps in an epoch, 8 in a run and 16 in all.
@pytest.mark.parametrize("n_steps", [0, 1, 3, 4, 7, 8, 11])
def test_interrupted_anywhere_and_resumed_equals_uninterrupted(
    data, whole, tmp_path, monkeypatch, n_steps
):
    recipe = TINY.replace(compare_with=("free",), epochs=2)
    with monkeypatch.context() as patch:
        killed_after(patch, n_steps, strike)
        with pytest.raises(Struck):
            train(recipe, data, folder=tmp_path)
    result = train(recipe, data, folder=tmp_path)
    assert same(files_of(tmp_path), whole)
    for variant in ("gabor-0", "free-0"):
        lines = lines_of(tmp_path / variant)
        assert [line["step"] for line in lines if line["kind"] == "step"] == [3, 6]
        assert [line["step"] for line in lines if line["kind"] == "epoch"] == [0, 4, 8]
    assert result.runs[0].epochs == [0, 1, 2]
    before = files_of(tmp_path)
    again = train(recipe, data, folder=tmp_path)  # reads what is there
    assert same(files_of(tmp_path), before)
    assert same(again.runs[1].curve, result.runs[1].curve)


@pytest.mark.parametrize("optimizer", ["adam", "natural"])
@pytest.mark.parametrize("n", [1, 2])
def test_killed_for_good_and_resumed_equals_uninterrupted(
    data, tmp_path, monkeypatch, n, optimizer
):
    recipe = TINY.replace(optimizer=optimizer, schedule="cosine")

    def work(folder: str, after: int | None = None) -> Any:
        def one(rank: int) -> None:
            with monkeypatch.context() as patch:
                if after is not None and rank == 0:
                    killed_after(patch, after, kill)
                train(recipe, data, folder=tmp_path / folder)

        return one

    assert in_processes(n, work("whole")) == [0] * n
    assert in_processes(n, work("killed", 11))[0] == -signal.SIGKILL
    killed = load_checkpoint(tmp_path / "killed/gabor-0/checkpoint.pt")
    assert (killed["step"], killed["run"].accuracy) == (10, None)
    assert in_processes(n, work("killed")) == [0] * n
    assert same(files_of(tmp_path / "killed"), files_of(tmp_path / "whole"))
    finished = load_checkpoint(tmp_path / "whole/gabor-0/checkpoint.pt")
    assert finished["run"].accuracy > 0.6


def test_two_processes_do_what_one_does(data, tmp_path):
    # Without batch normalisation, which sees other batches in other numbers of processes.
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 5, padding=2), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(4 * 144, 2),
    )  # fmt: skip
    recipe = TINY.replace(learning_rate=1e-3)
    options = {"network": network, "folder": tmp_path}
    assert in_processes(2, lambda _: train(recipe, data, **options)) == [0, 0]
    two, one = train(recipe, data, **options).runs[0], train(recipe, data, network=network).runs[0]
    # Sums in another order have other last digits, and nothing else.
    assert torch.allclose(one.kernels, two.kernels, atol=1e-5)
    for mine, theirs in zip(one.curve, two.curve, strict=True):
        for name in {"test_loss", "test_accuracy", "loss", "accuracy"} & set(mine):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3)


def test_random_parts_of_a_network_and_augmentations_resume_exactly(data, tmp_path, monkeypatch):
    seen: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def augment(images: torch.Tensor, indices: torch.Tensor, seed: int) -> torch.Tensor:
        seen.append((images, indices, seed))
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
        return images + 0.1 * noise

    network = own_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    options = {"network": network, "augment": augment}
    whole = train(TINY, data, **options)
    assert [seed for _, _, seed in seen] == [
        seen[4 * epoch][2] for epoch in (0, 1, 2) for _ in "1234"
    ]
    assert len({seed for _, _, seed in seen}) == 3
    indices = torch.cat([rows for _, rows, _ in seen[:4]])
    assert sorted(indices.tolist()) == list(range(25))
    assert torch.equal(torch.cat([images for images, _, _ in seen[:4]]), data.images[indices] / 255)
    assert whole.runs[0].kernels.shape == (4, 6, 1, 4, 4)
    assert whole.runs[0].n_first_parameters == 36
    with monkeypatch.context() as patch:
        killed_after(patch, 6, strike)
        with pytest.raises(Struck):
            train(TINY, data, folder=tmp_path, **options)
    resumed = train(TINY, data, folder=tmp_path, **options)
    assert same(resumed.runs[0].curve, whole.runs[0].curve)
    assert torch.equal(resumed.runs[0].kernels, whole.runs[0].kernels)
    assert same(dict(network.state_dict()), before)
    with pytest.raises(ValueError, match="was trained with other data, network or start"):
        train(TINY, data, network=own_network(), folder=tmp_path)


# -- what is measured ---------------------------------------------------------------------------


def test_a_gabor_layer_learns_moves_and_loses_when_reset(data):
    recipe = TINY.replace(
        compare_with=("gabor-fixed", "free"), epochs=6, seeds=(0, 1), start="random",
        gabor_learning_rate=0.1,
    )  # fmt: skip
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    result = train(recipe, data)
    assert torch.equal(torch.rand(3), wanted), "no random number of the caller's is drawn"
    assert [(run.variant, run.seed) for run in result.runs] == [
        (variant, seed) for variant in ("gabor", "gabor-fixed", "free") for seed in (0, 1)
    ]
    gabor, fixed, free = (result.runs_of(variant)[0] for variant in result.variants)
    assert gabor.accuracy > 0.9
    assert all(value > 0 for value in gabor.displacement.values())
    assert set(gabor.displacement) == {
        "orientation", "wavelength", "phase", "sigma", "aspect_ratio", "amplitude"
    }  # fmt: skip
    difference = gabor.end.difference(gabor.start)["orientation"].abs().quantile(0.5)
    assert gabor.displacement["orientation"] == pytest.approx(difference.item(), rel=1e-5)
    assert gabor.accuracy_reset is not None
    assert fixed.accuracy_reset is None
    assert set(fixed.displacement.values()) == {0.0}
    assert (free.params, free.displacement, free.accuracy_reset) == ([], {}, None)
    assert (gabor.n_first_parameters, fixed.n_first_parameters) == (24, 0)
    assert free.n_first_parameters == 100
    assert gabor.n_parameters - 24 == free.n_parameters - 100
    assert torch.equal(gabor.kernels[0], fixed.kernels[-1])
    assert not torch.equal(gabor.kernels[0], gabor.kernels[-1])
    assert gabor.kernels.shape == (7, 4, 1, 5, 5)


def test_reset_means_the_start_and_nothing_else(data, monkeypatch):
    seen, test = [], _Trainer._test

    def spied(self: _Trainer) -> tuple[float, float]:
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        seen.append((state, self.first.params.detach(), self.start))
        return test(self)

    monkeypatch.setattr(_Trainer, "_test", spied)
    train(TINY, data)
    (trained, _, _), (reset, params, start) = seen[-2:]
    assert start.isclose(params).all()
    moved = {name for name in trained if not torch.equal(trained[name], reset[name])}
    assert moved
    assert all(name.startswith("network.first.") for name in moved)


@pytest.mark.parametrize(
    "options",
    [
        {"compare_with": ("free",), "start": "v1"},
        {"first_layer": "mixed", "learn": ("orientation",), "compare_with": ("gabor-fixed",)},
        {"start": "random", "precision": "bf16-mixed", "optimizer": "natural"},
        {"precision": "64-true", "stride": 2, "weight_decay": 0.01},
    ],
    ids=str,
)
def test_every_part_of_a_recipe_trains_and_can_be_loaded(data, tmp_path, options):
    result = train(TINY.replace(**{"epochs": 1, **options}), data, folder=tmp_path)
    for run in result.runs:
        assert math.isfinite(run.curve[-1]["loss"])
        assert run.kernels.shape[1:] == (4, 1, 5, 5)
        assert run.kernels.isfinite().all()
        if run.variant != "gabor-fixed":
            assert not torch.equal(run.kernels[0], run.kernels[-1])
        trained = load_trained(tmp_path, variant=run.variant)
        logits = trained(data.test_images)
        assert logits.dtype == (torch.float64 if "64-true" in options.values() else torch.float32)
        loss = F.cross_entropy(logits, data.test_labels).item()
        coarse = "bf16-mixed" in options.values()
        assert loss == pytest.approx(run.curve[-1]["test_loss"], rel=0.05 if coarse else 1e-4)
    if "learn" in options:
        moved = {name for name, value in result.runs[0].displacement.items() if value > 1e-6}
        assert moved == {"orientation"}


def test_sounds(data, tmp_path):
    sounds = torch.sin(torch.arange(64.0) * torch.tensor([0.5, 1.5])[data.labels, None])[:, None]
    sound = Dataset("tones", sounds, data.labels, sounds, data.labels, ("low", "high"))
    result = train(TINY.replace(epochs=2), sound, folder=tmp_path)
    assert result.runs[0].kernels.shape == (3, 4, 1, 5)
    assert result.runs[0].accuracy > 0.6
    trained = load_trained(tmp_path)
    assert trained(sounds).shape == (25, 2)


@pytest.mark.parametrize("n", [1, 2])
def test_the_network_in_the_checkpoint_is_the_one_that_was_measured(data, tmp_path, n):
    recipe = TINY.replace(compare_with=("free",), seeds=(3, 1))
    assert in_processes(n, lambda _: train(recipe, data, folder=tmp_path)) == [0] * n
    result = train(recipe, data, folder=tmp_path)
    for run in result.runs:
        trained = load_trained(tmp_path, variant=run.variant, seed=run.seed)
        assert not trained.training
        with torch.no_grad():
            logits = trained(data.test_images)
        loss = F.cross_entropy(logits, data.test_labels).item()
        # Losses this small have few digits in single precision.
        assert run.curve[-1]["test_loss"] == pytest.approx(loss, rel=1e-4 if n == 1 else 0.01)
        hits = (logits.argmax(1) == data.test_labels).double().mean().item()
        assert run.accuracy == pytest.approx(hits)
        assert torch.equal(trained.network.first.weight.detach(), run.kernels[-1])
    default, first = load_trained(tmp_path), result.runs[0]
    assert (first.variant, first.seed, default.classes) == ("gabor", 3, ("up", "flat"))
    assert torch.equal(default.network.first.weight.detach(), first.kernels[-1])
    images = default.preprocess(data.images)
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(default.preprocess(data.images / 255), images)


def test_filters_may_start_from_a_record(data, tmp_path):
    record = Gabor2d.of(
        orientation=torch.tensor([0.1, 0.5, 1.0, 2.0])[:, None], wavelength=4.0, sigma=1.0,
        phase=torch.zeros(4, 1), amplitude=torch.ones(4, 1),
    )  # fmt: skip
    recipe = TINY.replace(epochs=1)
    start = train(recipe, data, start=record, folder=tmp_path).runs[0].start
    assert torch.allclose(start.orientation, record.orientation)
    assert torch.allclose(start.wavelength, torch.tensor(4.0))
    with pytest.raises(ValueError, match="other data, network or start"):
        train(recipe, data, folder=tmp_path)


def own_network(n_hidden: int = 8) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 4, stride=2, padding=1), torch.nn.BatchNorm2d(6), torch.nn.ReLU(),
        torch.nn.Dropout(0.3), torch.nn.Flatten(), torch.nn.Linear(6 * 36, n_hidden),
        torch.nn.Linear(n_hidden, 2),
    )  # fmt: skip


def make_linear(variant: str, seed: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A function of the caller's, which builds a network and its first layer."""
    assert (variant, seed) == ("mixed", 0)
    first = GaborConv2d(1, 2, 5, padding=2, seed=seed)
    return torch.nn.Sequential(first, torch.nn.Flatten(), torch.nn.Linear(2 * 144, 2)), first


def test_a_network_of_ones_own_must_be_given_again(data, tmp_path):
    recipe = TINY.replace(first_layer="mixed", epochs=1)
    result = train(recipe, data, network=own_network(), folder=tmp_path / "module")
    trained = load_trained(tmp_path / "module", network=own_network())
    assert isinstance(trained.network[0], MixedConv)
    assert torch.equal(trained.network[0].weight.detach(), result.runs[0].kernels[-1])
    result = train(recipe, data, network=make_linear, folder=tmp_path / "function")
    assert result.runs[0].kernels.shape == (2, 2, 1, 5, 5)
    assert result.runs[0].displacement["orientation"] > 0
    trained = load_trained(tmp_path / "function", network=make_linear)
    assert torch.equal(trained.network[0].weight.detach(), result.runs[0].kernels[-1])
    for network in (None, own_network(9)):
        with pytest.raises(ValueError, match=r"is of another network; give the one"):
            load_trained(tmp_path / "module", network=network)
    dilated = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, dilation=2), torch.nn.Flatten())
    with pytest.raises(ValueError, match="must have groups=1, dilation=1"):
        train(TINY, data, network=dilated)


def test_label_smoothing_takes_away_from_the_labels(data):
    other = dataclasses.replace(data, labels=data.labels.flip(0))
    plain, smooth, even, swapped = (
        train(TINY.replace(epochs=1, label_smoothing=share), some).runs[0]
        for share, some in ((0.0, data), (0.5, data), (1.0, data), (1.0, other))
    )
    assert not torch.equal(plain.kernels[-1], smooth.kernels[-1])
    # Evenly over all classes: nothing is left of what the labels say.
    assert torch.equal(even.kernels[-1], swapped.kernels[-1])


def test_gabor_parameters_have_an_optimizer_of_their_own():
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3))
    adam = make_optimizers(module, Recipe(learning_rate=0.5, optimizer="natural"))
    assert [group["lr"] for group in adam[0].param_groups] == [0.5]
    gabor = torch.nn.Sequential(GaborConv2d(1, 2, 5), torch.nn.Linear(2, 2))
    rates = {"learning_rate": 0.5, "gabor_learning_rate": 0.25, "weight_decay": 0.1}
    (adam,) = make_optimizers(gabor, Recipe(**rates))
    groups = [(g["lr"], g["weight_decay"], len(g["params"])) for g in adam.param_groups]
    assert groups == [(0.25, 0.0, 5), (0.5, 0.1, 3)]
    assert sum(len(g["params"]) for g in adam.param_groups) == len(list(gabor.parameters()))
    natural, rest = make_optimizers(gabor, Recipe(optimizer="natural", **rates))
    assert natural.param_groups[0]["lr"] == 0.25
    assert {id(p) for p in rest.param_groups[0]["params"]} == {
        id(p) for p in (gabor[0].bias, *gabor[1].parameters())
    }
    with pytest.raises(ValueError, match="lr must be"):
        make_optimizers(gabor, Recipe(optimizer="natural", gabor_learning_rate=3.0))
    (default,) = make_optimizers(gabor, Recipe())
    assert default.param_groups[0]["lr"] == 0.04
    assert make_optimizers(gabor, Recipe(optimizer="natural"))[0].param_groups[0]["lr"] == 1.0


# Of torch's own, when it loads its forward derivatives.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_learning_rates_follow_the_schedule_to_zero(data, monkeypatch):
    seen, step = [], _Trainer._do_step

    def spied(self: _Trainer, *args: Any) -> None:
        step(self, *args)
        seen.append([g["lr"] for one in self.optimizers for g in one.optimizer.param_groups])

    monkeypatch.setattr(_Trainer, "_do_step", spied)
    train(TINY.replace(optimizer="natural", schedule="cosine", epochs=2), data)
    shares = [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert seen == [pytest.approx([share, 1e-2 * share]) for share in shares]
    seen.clear()
    train(TINY.replace(epochs=1), data)
    assert seen == [[0.04, 1e-2]] * 4


def test_the_test_images_may_be_used_once(data):
    (run,) = train(TINY.replace(n_evaluations=1), data).runs
    assert [line["epoch"] for line in run.curve] == [3]
    assert run.accuracy == train(TINY, data).runs[0].accuracy
    assert run.epochs == [0, 3]


# -- what goes wrong ----------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_its_run_only(data, tmp_path, monkeypatch):
    recipe, step = TINY.replace(compare_with=("free",)), _Trainer._do_step

    def spoiled(self: _Trainer, rows: torch.Tensor, epoch: int, number: int) -> None:
        if self.run.variant == "gabor" and (epoch, number) == (1, 2):
            with torch.no_grad():
                self.model.network.classifier.weight.fill_(torch.nan)
        step(self, rows, epoch, number)

    monkeypatch.setattr(_Trainer, "_do_step", spoiled)
    with pytest.warns(UserWarning, match="of gabor, seed 0 is not finite at step 8; try smaller"):
        result = train(recipe, data, folder=tmp_path)
    gabor, free = result.runs
    assert gabor.accuracy is None
    assert "is not finite at step 8" in gabor.stopped
    assert str(tmp_path / "gabor-0") in gabor.stopped
    assert free.accuracy > 0.5
    latest = load_checkpoint(tmp_path / "gabor-0/checkpoint.pt")
    assert latest["step"] == 6
    assert all(value.isfinite().all() for value in latest["model"].values())
    assert lines_of(tmp_path / "gabor-0")[-1]["reason"] == gabor.stopped
    row = result.to_table()[0]
    assert (row["accuracy"], row["n_stopped"]) == (None, 1)
    assert json.loads(result.to_json())["table"][0]["accuracy"] is None
    for options, place in (({}, "gabor-0"), ({"seed": 7}, "gabor-7"), ({"variant": "x"}, "x-0")):
        with pytest.raises(FileNotFoundError, match=f"{place}.checkpoint.pt' does not exist, or"):
            load_trained(tmp_path, **options)


def test_a_folder_is_of_one_recipe_one_data_set_and_one_process(data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_LOCK_TIMEOUT", 0.1)
    recipe = TINY.replace(epochs=1)
    train(recipe, data, folder=tmp_path)
    with pytest.raises(ValueError, match=r"another recipe: epochs \(1 there, 2 here\); choose"):
        train(TINY.replace(epochs=2), data, folder=tmp_path)
    other = dataclasses.replace(data, labels=1 - data.labels)
    with pytest.raises(ValueError, match="was trained with other data"):
        train(recipe, other, folder=tmp_path)
    filelock = pytest.importorskip("filelock")
    with (
        filelock.FileLock(tmp_path / ".lock"),
        pytest.raises(BlockingIOError, match="Another process is working in"),
    ):
        train(recipe, data, folder=tmp_path)
    train(TINY.replace(epochs=2), data, folder=tmp_path, resume=False)
    assert lines_of(tmp_path / "gabor-0")[-1]["epoch"] == 2


def test_a_full_disk_stops_with_a_line_and_loses_nothing(data, tmp_path, monkeypatch):
    save, saved = support.os.fsync, []

    def full(file: int) -> None:
        saved.append(file)
        if len(saved) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file)

    with monkeypatch.context() as patch:
        patch.setattr(support.os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            train(TINY, data, folder=tmp_path / "a")
    train(TINY, data, folder=tmp_path / "a")
    train(TINY, data, folder=tmp_path / "b")
    assert same(files_of(tmp_path / "a"), files_of(tmp_path / "b"))


@pytest.mark.parametrize("damage", [lambda c: c[:500], lambda c: c[:-9] + b"?" + c[-8:]])
def test_a_damaged_checkpoint_is_noticed(data, tmp_path, damage):
    train(TINY, data, folder=tmp_path)
    before = files_of(tmp_path)
    checkpoint = tmp_path / "gabor-0/checkpoint.pt"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    for read in (lambda: train(TINY, data, folder=tmp_path), lambda: load_trained(tmp_path)):
        with pytest.raises(ValueError, match=r"checkpoint\.pt' is damaged; delete it, and its"):
            read()
    checkpoint.unlink()
    train(TINY, data, folder=tmp_path)
    assert same(files_of(tmp_path), before)


def test_no_code_in_a_checkpoint_is_executed(tmp_path):
    class Harm:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "harm"),)

    from gaborium.training.results import save_checkpoint

    save_checkpoint(tmp_path / "checkpoint.pt", {"x": Harm()})
    with pytest.raises(Exception, match="Weights only load failed"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "harm").exists()


def test_missing_devices_are_named(data):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"accelerator='cuda' with devices=1 is not available"):
            train(TINY.replace(accelerator="cuda"), data)


def test_tensorboard_gets_the_lines(data, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines: list[Any] = []
    options = {"tensorboard": True, "progress": lines.append}
    train(TINY.replace(epochs=1), data, folder=tmp_path, **options)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (value,) = events.Scalars("gabor, seed 0/epoch loss")
    line = lines_of(tmp_path / "gabor-0")[-1]
    assert (value.step, value.value) == (line["step"], pytest.approx(line["loss"], rel=1e-6))
    assert lines[-1] == line | {"n_steps": 4}
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ImportError, match="tensorboard"):
        train(TINY.replace(epochs=1), data, folder=tmp_path, tensorboard=True)
