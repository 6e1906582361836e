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

from gaborium import Gabor2d, GaborConv2d, files
from gaborium.training import (
    Checkpoints,
    Dataset,
    Recipe,
    journal,
    load_state,
    load_trained,
    train,
    trainer,
)
from gaborium.training.trained import NETWORK_FILE
from gaborium.training.trainer import Trainer, make_optimizers

pytest.importorskip("lightning_fabric")
pytest.importorskip("safetensors")
pytest.importorskip("filelock")

TINY = Recipe(
    n_filters=4, kernel_size=5, epochs=3, batch_size=7, seeds=(0,), compare_with=(),
    accelerator="cpu", learning_rate=1e-2,
)  # fmt: skip
EVERY = {"checkpoint_steps": 2, "log_steps": 3}


@pytest.fixture(scope="module")
def data(stripes: Dataset) -> Dataset:
    return stripes


def files_of(folder: Path) -> dict[str, bytes]:
    """All that a training has written, less the seconds that it took."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors" and path.name != NETWORK_FILE:
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
    train(TINY.replace(compare_with=("free",), epochs=2), dataset=data, folder=folder, **EVERY)
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
            train(recipe, dataset=data, folder=tmp_path, **EVERY)
    result = train(recipe, dataset=data, folder=tmp_path, **EVERY)
    assert same(files_of(tmp_path), whole)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines if line["kind"] == "step"] == [3, 6] * 2
    assert [line["step"] for line in lines if line["kind"] == "epoch"] == [0, 4, 8] * 2
    assert result.runs[0].epochs == [0, 1, 2]


def test_augmented_images_are_other_ones_in_each_epoch_and_the_same_after_a_kill(
    data, tmp_path, monkeypatch
):
    recipe = TINY.replace(epochs=2, augmentation=("flip", "shift"))
    seen: list[torch.Tensor] = []
    augmented = trainer.augment

    def spy(images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(augmented(images, *args, **kwargs))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "augment", spy)
        train(recipe, dataset=data, folder=tmp_path / "whole", **EVERY)
    first, second = (
        torch.cat(part)[trainer.sample_order(0, epoch, len(data.labels)).argsort()]
        for epoch, part in enumerate((seen[:4], seen[4:]))
    )
    plain = data.images.float() / 255
    assert not torch.equal(first, second)
    draws = trainer.draw(len(data.labels), trainer._key(0, 1, "augmentation"))
    assert torch.allclose(augmented(plain, recipe.augmentation, draws=draws), second)
    for image in (first, second):
        assert (image != plain).flatten(1).any(1).double().mean() > 0.2
    with monkeypatch.context() as patch:
        killed_after(patch, 6, strike)
        with pytest.raises(Struck):
            train(recipe, dataset=data, folder=tmp_path / "cut", **EVERY)
    train(recipe, dataset=data, folder=tmp_path / "cut", **EVERY)
    assert same(files_of(tmp_path / "cut"), files_of(tmp_path / "whole"))


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
                train(recipe, dataset=data, folder=tmp_path / folder, **EVERY)

        return one

    assert in_processes(n, work("whole")) == [0] * n
    assert in_processes(n, work("killed", 11))[0] == -signal.SIGKILL
    assert not (tmp_path / "killed/gabor-0/run.safetensors").exists()
    assert in_processes(n, work("killed")) == [0] * n
    assert same(files_of(tmp_path / "killed"), files_of(tmp_path / "whole"))
    assert load_state(tmp_path / "whole/gabor-0/run.safetensors")["run"]["accuracy"] > 0.6


def simple_network() -> torch.nn.Module:
    """Without batch normalisation, which sees other batches in other numbers of processes."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 5, padding=2), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(4 * 144, 2),
    )  # fmt: skip


def nearly_same(one: Any, other: Any) -> None:
    """Sums in another order have other last digits, and nothing else."""
    assert torch.allclose(one.runs[0].kernels, other.runs[0].kernels, atol=1e-5)
    for mine, theirs in zip(one.runs[0].curve, other.runs[0].curve, strict=True):
        for name in ("test_loss", "test_accuracy"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3)
    for name in ("loss", "accuracy"):
        assert one.runs[0].curve[-1][name] == pytest.approx(other.runs[0].curve[-1][name], rel=1e-3)


def test_another_number_of_processes_goes_on_with_a_warning(data, tmp_path, monkeypatch):
    model, recipe = simple_network(), TINY.replace(learning_rate=1e-3)

    def work(rank: int) -> None:
        with monkeypatch.context() as patch:
            if rank == 0:
                killed_after(patch, 11, kill)
            train(recipe, model=model, dataset=data, folder=tmp_path, **EVERY)

    assert in_processes(2, work)[0] == -signal.SIGKILL
    with pytest.warns(UserWarning, match="begun on 2 processes and goes on with 1"):
        result = train(recipe, model=model, dataset=data, folder=tmp_path, **EVERY)
    nearly_same(result, train(recipe, model=model, dataset=data))


def test_processes_started_here_do_what_one_does(data):
    model, recipe = simple_network(), TINY.replace(epochs=1, learning_rate=1e-3)
    lines: list[dict[str, Any]] = []
    parts = recipe.replace(devices=2, accumulate=2)
    result = train(parts, model=model, dataset=data, progress=lines.append)
    nearly_same(result, train(recipe, model=model, dataset=data))
    assert [line["step"] for line in lines] == [0, 4]
    assert lines[-1]["n_steps"] == 4


# -- what is measured ---------------------------------------------------------------------------


def test_a_gabor_layer_learns_moves_and_loses_when_reset_filters(data):
    recipe = TINY.replace(
        compare_with=("gabor-fixed", "free"), epochs=6, seeds=(0, 1), start="random"
    )
    result = train(recipe.replace(gabor_learning_rate=0.1), dataset=data)
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
    assert (free.params, free.displacement, free.accuracy_reset) == (None, {}, None)
    assert (gabor.n_first_parameters, fixed.n_first_parameters) == (24, 0)
    assert free.n_first_parameters == 100
    assert gabor.n_parameters - 24 == free.n_parameters - 100
    assert torch.equal(gabor.kernels[0], fixed.kernels[-1])
    assert not torch.equal(gabor.kernels[0], gabor.kernels[-1])
    assert gabor.kernels.shape == (7, 4, 1, 5, 5)


def test_reset_filters_means_the_start_and_nothing_else(data, monkeypatch):
    seen = []
    reset = Trainer._reset_filters

    def spied(self: Trainer) -> torch.nn.Module:
        network = reset(self)
        seen.append((self.network.state_dict(), network.state_dict(), self._params()))
        assert self.start.isclose(network.first.params.detach()).all()
        return network

    monkeypatch.setattr(Trainer, "_reset_filters", spied)
    train(TINY, dataset=data)
    trained, restored, _ = seen[0]
    moved = {name for name in trained if not torch.equal(trained[name], restored[name])}
    assert moved
    assert all(name.startswith("first.") for name in moved)


@pytest.mark.parametrize(
    "options",
    [
        {"network": "energy"},
        {"network": "texture"},
        {"network": "energy", "first_layer": "mixed", "compare_with": ("free",)},
        {"first_layer": "mixed", "learn": ("orientation",), "compare_with": ("gabor-fixed",)},
        {"start": "equal", "precision": "bf16-mixed"},
        {"precision": "64-true", "stride": 2, "weight_decay": 0.01},
    ],
    ids=str,
)
def test_every_part_of_a_recipe_trains(data, options):
    result = train(TINY.replace(**{"epochs": 1, **options}), dataset=data)
    for run in result.runs:
        assert math.isfinite(run.curve[-1]["loss"])
        assert run.kernels.shape[1:] == (4, 1, 5, 5)
        assert run.kernels.isfinite().all()
        if run.variant != "gabor-fixed":
            assert not torch.equal(run.kernels[0], run.kernels[-1])
    if options == {"network": "texture"}:
        assert min(result.runs[0].displacement.values()) > 1e-6, "every field moves"
    if "learn" in options:
        moved = {name for name, value in result.runs[0].displacement.items() if value > 1e-6}
        assert moved == {"orientation"}


def test_sounds(data):
    sounds = torch.sin(torch.arange(64.0) * torch.tensor([0.5, 1.5])[data.labels, None])[:, None]
    sound = Dataset("tones", sounds, data.labels, sounds, data.labels, ("low", "high"))
    result = train(TINY.replace(epochs=2), dataset=sound)
    assert result.runs[0].kernels.shape == (3, 4, 1, 5)
    assert result.runs[0].accuracy > 0.6
    with pytest.raises(ValueError, match="corruption is for images, and 'tones' has none"):
        train(TINY.replace(corruption=("noise",)), dataset=sound)
    with pytest.raises(ValueError, match="augmentation is for images"):
        train(TINY.replace(augmentation=("flip",)), dataset=sound)


def test_corruption_is_measured_for_each_kind_and_strength(data, monkeypatch):
    seen = []

    def corrupted(images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((*args, kwargs, images.aminmax()))
        return torch.zeros_like(images) if args == ("noise", 3) else images

    monkeypatch.setattr(trainer, "corrupt", corrupted)
    monkeypatch.setattr(trainer, "_EVALUATED", 20)
    recipe = TINY.replace(corruption=("noise", "fog"), epochs=4)
    result = train(recipe, dataset=data)
    (run,) = result.runs
    assert [call[:2] for call in seen[::2]] == [
        (kind, strength) for kind in ("noise", "fog") for strength in range(1, 6)
    ]
    assert [call[2] for call in seen[:2]] == [{"seed": 0, "first": 0}, {"seed": 0, "first": 20}]
    assert max(call[3].max for call in seen) <= 1
    shares = [(data.test_labels == label).double().mean().item() for label in (0, 1)]
    assert run.corrupted["noise"].pop(2) in shares
    assert run.corrupted["noise"] + run.corrupted["fog"] == [run.accuracy] * 9


@pytest.mark.parametrize("n", [1, 2])
def test_what_is_measured_is_that_of_the_network_in_the_checkpoint(data, tmp_path, monkeypatch, n):
    monkeypatch.setattr(trainer, "_EVALUATED", 8)
    assert in_processes(n, lambda _: train(TINY, dataset=data, folder=tmp_path)) == [0] * n
    network, _ = trainer.make_network(TINY, None, data, "gabor", 0)
    network.load_state_dict(Checkpoints(tmp_path / "gabor-0").latest()["network"])
    unit, mean, std = data.test_images / 255, *torch.std_mean(data.images / 255)[::-1]
    with torch.no_grad():
        scores = network.eval()((unit - mean) / std)
    line = lines_of(tmp_path)[-1]
    loss = torch.nn.functional.cross_entropy(scores, data.test_labels).item()
    # Losses this small have few digits in single precision.
    assert line["test_loss"] == pytest.approx(loss, rel=0.01)
    hits = (scores.argmax(1) == data.test_labels).double().mean().item()
    assert line["test_accuracy"] == pytest.approx(hits)
    kept = load_trained(tmp_path).network.state_dict()
    assert same(dict(kept), dict(network.state_dict()))


def test_images_are_normalised_by_the_training_images(data, monkeypatch):
    seen, look = [], Trainer._seen
    monkeypatch.setattr(Trainer, "_seen", lambda *args: seen.append(look(*args)) or seen[-1])
    train(TINY.replace(epochs=1, batch_size=25), dataset=data)
    batch = max(seen, key=lambda one: len(one) == 25)
    assert batch.mean().item() == pytest.approx(0, abs=1e-5)
    assert batch.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_no_random_number_of_the_callers_is_drawn(data):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    train(TINY.replace(epochs=1), dataset=data)
    assert torch.equal(torch.rand(3), wanted)


# -- networks of the caller's -------------------------------------------------------------------


def own_network(n_classes: int = 2) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 4, stride=2, padding=1), torch.nn.BatchNorm2d(6), torch.nn.ReLU(),
        torch.nn.Dropout(0.3), torch.nn.Flatten(), torch.nn.Linear(6 * 36, n_classes),
    )  # fmt: skip


def test_a_network_of_ones_own_is_copied_and_resumed_exactly(data, tmp_path, monkeypatch):
    model = own_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = train(TINY, model=model, dataset=data)
    assert whole.runs[0].kernels.shape == (4, 6, 1, 4, 4)
    assert whole.runs[0].n_first_parameters == 36
    with monkeypatch.context() as patch:
        killed_after(patch, 6, strike)
        with pytest.raises(Struck):
            train(TINY, model=model, dataset=data, folder=tmp_path, **EVERY)
    resumed = train(TINY, model=model, dataset=data, folder=tmp_path, **EVERY)
    assert same(resumed.runs[0].curve, whole.runs[0].curve)
    assert torch.equal(resumed.runs[0].kernels, whole.runs[0].kernels)
    assert same(dict(model.state_dict()), before)
    with pytest.raises(ValueError, match="was trained on other data"):
        train(TINY, model=own_network(), dataset=data, folder=tmp_path)


def test_a_network_that_does_not_suit_is_told(data):
    with pytest.raises(ValueError, match=r"must return \(batch, 2\), .* got shape \(35, 3\)"):
        train(TINY, model=own_network(3), dataset=data)
    dilated = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, dilation=2), torch.nn.Flatten())
    with pytest.raises(ValueError, match="must have groups=1, dilation=1"):
        train(TINY, model=dilated, dataset=data)


# -- what goes wrong ----------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_its_run_only(data, tmp_path, monkeypatch):
    recipe = TINY.replace(compare_with=("free",))
    step = Trainer._step

    def spoiled(self: Trainer, rows: torch.Tensor, epoch: int, number: int) -> None:
        if self.variant == "gabor" and (epoch, number) == (1, 2):
            with torch.no_grad():
                self.network.classifier.weight.fill_(torch.nan)
        step(self, rows, epoch, number)

    monkeypatch.setattr(Trainer, "_step", spoiled)
    with pytest.warns(UserWarning, match="The loss of gabor, seed 0 is not finite at step 7; try"):
        result = train(recipe, dataset=data, folder=tmp_path, checkpoint_steps=3, log_steps=2)
    gabor, free = result.runs
    assert gabor.accuracy is None
    assert "is not finite at step 7" in gabor.stopped
    assert str(tmp_path / "gabor-0") in gabor.stopped
    assert free.accuracy > 0.5
    latest = Checkpoints(tmp_path / "gabor-0").latest()
    assert latest["step"] == 6
    assert all(value.isfinite().all() for value in latest["network"].values())
    assert lines_of(tmp_path)[-1]["variant"] == "free"
    assert [line["step"] for line in lines_of(tmp_path) if line["kind"] == "stopped"] == [8]
    row = result.to_table()[0]
    assert (row["accuracy"], row["n_stopped"]) == (None, 1)
    json.loads(result.to_json(), parse_constant=lambda token: pytest.fail(token))


def test_label_smoothing_takes_away_from_the_labels(data):
    other = dataclasses.replace(data, labels=data.labels.flip(0))
    recipe = TINY.replace(epochs=1, compare_with=())
    plain, smooth, even, swapped = (
        train(recipe.replace(label_smoothing=share), dataset=some).runs[0]
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
    with pytest.raises(ValueError, match=r"gabor_learning_rate must be at most 1 with"):
        make_optimizers(gabor, Recipe(optimizer="natural", gabor_learning_rate=3.0))
    (default,) = make_optimizers(gabor, Recipe())
    assert default.param_groups[0]["lr"] == 0.04
    assert make_optimizers(gabor, Recipe(optimizer="natural"))[0].param_groups[0]["lr"] == 1.0


def test_a_folder_is_of_one_recipe_one_data_set_and_one_process(data, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_PATIENCE", 0.1)
    recipe = TINY.replace(epochs=1)
    train(recipe, dataset=data, folder=tmp_path)
    with pytest.raises(ValueError, match=r"another recipe: epochs \(1 there, 2 here\); choose"):
        train(TINY.replace(epochs=2), dataset=data, folder=tmp_path)
    other = dataclasses.replace(data, labels=1 - data.labels)
    with pytest.raises(ValueError, match="was trained on other data of the name 'stripes'"):
        train(recipe, dataset=other, folder=tmp_path)
    filelock = pytest.importorskip("filelock")
    with (
        filelock.FileLock(tmp_path / ".lock"),
        pytest.raises(BlockingIOError, match="Another process is working in"),
    ):
        train(recipe, dataset=data, folder=tmp_path)
    before = files_of(tmp_path)
    train(recipe, dataset=data, folder=tmp_path)
    assert same(files_of(tmp_path), before)
    train(TINY.replace(epochs=2), dataset=data, folder=tmp_path, resume=False)
    assert lines_of(tmp_path)[-1]["epoch"] == 2


def test_a_journal_that_lost_lines_is_not_continued(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed_after(patch, 6, strike)
        with pytest.raises(Struck):
            train(TINY, dataset=data, folder=tmp_path, **EVERY)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics\.jsonl' has 0 bytes, and had \d+ when"):
        train(TINY, dataset=data, folder=tmp_path, **EVERY)


def test_a_full_disk_stops_with_a_line_and_loses_nothing(data, tmp_path, monkeypatch):
    save, saved = files.write_bytes, []

    def full(path: Any, content: bytes) -> None:
        saved.append(path)
        if len(saved) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", full)
        with pytest.raises(OSError, match="No space left on device"):
            train(TINY, dataset=data, folder=tmp_path / "a", **EVERY)
    train(TINY, dataset=data, folder=tmp_path / "a", **EVERY)
    train(TINY, dataset=data, folder=tmp_path / "b", **EVERY)
    assert same(files_of(tmp_path / "a"), files_of(tmp_path / "b"))


# Of torch's own, when it loads its forward derivatives.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_learning_rates_follow_the_schedule_to_zero(data, monkeypatch):
    seen, step = [], Trainer._step

    def spied(self: Trainer, *args: Any) -> None:
        step(self, *args)
        rates = [g["lr"] for one in self.optimizers for g in one.optimizer.param_groups]
        seen.append(rates)

    monkeypatch.setattr(Trainer, "_step", spied)
    train(TINY.replace(optimizer="natural", schedule="cosine", epochs=2), dataset=data)
    shares = [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert seen == [pytest.approx([share, 1e-2 * share]) for share in shares]
    seen.clear()
    train(TINY.replace(epochs=1), dataset=data)
    assert seen == [[0.04, 1e-2]] * 4


def test_the_test_images_may_be_looked_at_once(data, monkeypatch):
    result = train(TINY.replace(n_evaluations=1), dataset=data)
    (run,) = result.runs
    assert [line["epoch"] for line in run.curve] == [3]
    assert run.accuracy == train(TINY, dataset=data).runs[0].accuracy
    assert run.epochs == [0, 1, 2, 3]


@pytest.mark.parametrize("output", ["cnn", "energy"])
def test_filters_may_start_from_a_record(data, tmp_path, output):
    record = Gabor2d.of(
        orientation=torch.tensor([0.1, 0.5, 1.0, 2.0])[:, None], wavelength=4.0, sigma=1.0,
        phase=torch.zeros(4, 1), amplitude=torch.ones(4, 1),
    )  # fmt: skip
    recipe = TINY.replace(epochs=1, network=output)
    result = train(recipe, dataset=data, start=record, folder=tmp_path)
    start = result.runs[0].start
    assert torch.allclose(start.orientation, record.orientation)
    assert torch.allclose(start.wavelength, torch.tensor(4.0))
    with pytest.raises(ValueError, match="was trained on other data"):
        train(recipe, dataset=data, folder=tmp_path)


def test_too_small_batches_and_missing_devices_are_told(data):
    for options, told in (
        ({"checkpoint_steps": 0}, "checkpoint_steps must be at least 1, got 0"),
        ({"log_steps": 0}, "log_steps must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=told):
            train(TINY, dataset=data, **options)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"accelerator='cuda' with devices=1 is not to be had"):
            train(TINY.replace(accelerator="cuda"), dataset=data)


def test_tensorboard_gets_the_lines(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(TINY.replace(epochs=1), dataset=data, folder=tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (value,) = events.Scalars("gabor, seed 0/epoch loss")
    (line,) = [one for one in lines_of(tmp_path) if one["epoch"] == 1]
    assert (value.step, value.value) == (line["step"], pytest.approx(line["loss"], rel=1e-6))


def test_without_tensorboard_a_line_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.warns(UserWarning, match="TensorBoard is not installed"):
        train(TINY.replace(epochs=1), dataset=data, folder=tmp_path, tensorboard=True)
