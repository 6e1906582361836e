"""Trained networks: what comes out of a training's folder is what was measured, or one line."""

import shutil
from pathlib import Path

import pytest
import torch

from gaborium import Gabor2d, GaborConv2d, MixedConv
from gaborium.storage import save_layer
from gaborium.training import Dataset, Recipe, load_state, load_trained, train
from gaborium.training.trained import NETWORK_FILE, is_trained
from gaborium.training.trainer import Trainer

pytest.importorskip("lightning_fabric")
pytest.importorskip("safetensors")
pytest.importorskip("filelock")

TINY = Recipe(
    n_filters=4, kernel_size=5, epochs=2, batch_size=7, seeds=(3, 1), compare_with=("free",),
    accelerator="cpu", learning_rate=1e-2,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(stripes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mine"
    train(TINY, dataset=stripes, folder=folder)
    return folder


def told(path: Path, **options: object) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        load_trained(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- what comes back ----------------------------------------------------------------------------


def test_it_is_the_network_that_was_measured(place, stripes):
    result = train(TINY, dataset=stripes, folder=place)  # which only reads what is there
    for run in result.runs:
        trained = load_trained(place, variant=run.variant, seed=run.seed)
        network = trained.network
        assert not network.training
        assert (trained.variant, trained.seed, trained.recipe) == (run.variant, run.seed, TINY)
        with torch.no_grad():
            scores = network(trained.preprocess(stripes.test_images))
        loss = torch.nn.functional.cross_entropy(scores, stripes.test_labels).item()
        assert loss == pytest.approx(run.curve[-1]["test_loss"], rel=1e-4)
        assert torch.equal(network.first.weight.detach(), run.kernels[-1])
        hits = (scores.argmax(1) == stripes.test_labels).double().mean().item()
        assert hits == pytest.approx(run.accuracy)


def test_by_default_it_is_the_recipes_first_layer_and_first_seed(place):
    trained = load_trained(place)
    assert (trained.variant, trained.seed) == ("gabor", 3)
    assert isinstance(trained.network.first, GaborConv2d)
    assert trained.inputs.classes == ("up", "flat")


def test_images_are_seen_as_in_the_training(place, stripes):
    trained = load_trained(place)
    seen = trained.preprocess(stripes.images)
    assert seen.mean().item() == pytest.approx(0, abs=1e-5)
    assert seen.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(trained.preprocess(stripes.images.float() / 255), seen)
    with pytest.raises(ValueError, match=r"images must be \(n, 1, 12, 12\), got \(1, 3, 12, 12\)"):
        trained.preprocess(torch.zeros(1, 3, 12, 12))


def test_the_file_alone_is_enough(place, tmp_path):
    copy = tmp_path / "mine.safetensors"
    shutil.copy(place / "free-1" / NETWORK_FILE, copy)
    assert is_trained(copy)
    for path in (copy, place / "free-1"):
        trained = load_trained(path, variant="free")
        assert (trained.variant, trained.seed) == ("free", 1)
        assert "is of variant 'free' and seed 1, no other" in told(path, variant="gabor")
        assert "is of variant 'free' and seed 1, no other" in told(path, seed=3)


@pytest.mark.parametrize(
    "options",
    [
        {"first_layer": "mixed", "network": "energy", "compare_with": ("gabor-fixed",)},
        {"network": "texture", "precision": "64-true", "start": "equal"},
        {"learn": ("orientation",), "optimizer": "natural", "stride": 2, "compare_with": ()},
    ],
)
def test_every_kind_of_network_comes_back(stripes, tmp_path, options):
    recipe = TINY.replace(epochs=1, seeds=(0,), **options)
    result = train(recipe, dataset=stripes, folder=tmp_path)
    for run in result.runs:
        trained = load_trained(tmp_path, variant=run.variant)
        scores = trained.network(trained.preprocess(stripes.test_images))
        assert scores.dtype == (torch.float64 if "precision" in options else torch.float32)
        loss = torch.nn.functional.cross_entropy(scores, stripes.test_labels).item()
        assert loss == pytest.approx(run.curve[-1]["test_loss"], rel=1e-4)
        if "learn" in options:
            assert trained.network.first.learn == {"orientation"}


def test_sounds_come_back(tmp_path):
    sounds = torch.rand(20, 1, 400, generator=torch.Generator().manual_seed(0)) - 0.5
    labels = torch.arange(20) % 2
    data = Dataset("sounds", sounds, labels, sounds, labels, ("a", "b"))
    train(TINY.replace(seeds=(0,), compare_with=()), dataset=data, folder=tmp_path)
    trained = load_trained(tmp_path)
    assert trained.inputs.n_dims == 1
    assert trained.network(trained.preprocess(sounds)).shape == (20, 2)


def test_a_start_of_ones_own_is_remembered(stripes, tmp_path):
    start = Gabor2d.of(orientation=torch.rand(4, 1), wavelength=4.0, sigma=1.0)
    recipe = TINY.replace(epochs=1, seeds=(0,), compare_with=())
    train(recipe, dataset=stripes, start=start, folder=tmp_path)
    again = load_trained(tmp_path).network.first.start
    assert torch.equal(again.orientation, start.orientation)


def test_a_network_of_ones_own_must_be_given_again(stripes, tmp_path, place):
    def own(n_hidden: int = 8) -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 5), torch.nn.ReLU(), torch.nn.Flatten(),
            torch.nn.Linear(4 * 64, n_hidden), torch.nn.Linear(n_hidden, 2),
        )  # fmt: skip

    recipe = TINY.replace(first_layer="mixed", seeds=(0,), compare_with=())
    result = train(recipe, model=own(), dataset=stripes, folder=tmp_path)
    trained = load_trained(tmp_path, model=own())
    assert isinstance(trained.network[0], MixedConv)
    assert torch.equal(trained.network[0].weight.detach(), result.runs[0].kernels[-1])
    assert "was trained with a network of yours; give it as model" in told(tmp_path)
    assert "does not hold this model (RuntimeError: " in told(tmp_path, model=own(9))
    assert "with the recipe's own network; leave model out" in told(place, model=own())


# -- what goes wrong ----------------------------------------------------------------------------


def test_what_is_not_there_is_told(place, tmp_path):
    assert "variant must be one of 'gabor', 'free', got 'mixed'" in told(place, variant="mixed")
    assert "seed must be one of 3, 1, for which" in told(place, seed=0)
    assert f"No trained network at {str(tmp_path / 'no')!r}" in told(tmp_path / "no")
    assert "holds neither recipe.toml nor network.safetensors" in told(tmp_path)


def test_an_unfinished_or_stopped_training_is_told(stripes, tmp_path, monkeypatch):
    step = Trainer._step

    def spoiled(self: Trainer, *args: object) -> None:
        if self.seed == 1:
            raise KeyboardInterrupt
        with torch.no_grad():
            self.network.classifier.weight.fill_(torch.nan)
        step(self, *args)

    monkeypatch.setattr(Trainer, "_step", spoiled)
    with pytest.warns(UserWarning, match="is not finite"), pytest.raises(KeyboardInterrupt):
        train(TINY, dataset=stripes, folder=tmp_path)
    assert "seed 3: The loss of gabor, seed 3 is not finite" in told(tmp_path)
    assert "seed 1: its training has not ended; train again, and it" in told(tmp_path, seed=1)
    assert "its training has not ended" in told(tmp_path, variant="free")


def test_a_file_that_is_gone_is_told(place, tmp_path):
    shutil.copytree(place, tmp_path / "mine")
    (tmp_path / "mine/gabor-3" / NETWORK_FILE).unlink()
    assert "its file is gone; train again with --overwrite" in told(tmp_path / "mine")


@pytest.mark.parametrize("where", [3, 40, 700, -1])
def test_a_flipped_bit_and_a_cut_are_noticed(place, tmp_path, where):
    data = bytearray((place / "gabor-3" / NETWORK_FILE).read_bytes())
    copy = tmp_path / NETWORK_FILE
    copy.write_bytes(data[:where])
    assert "is not a saved network of gaborium, or is damaged" in told(copy)
    data[where] ^= 4
    copy.write_bytes(data)
    assert "is damaged" in told(copy)
    assert repr(str(copy)) in told(copy)


def test_files_of_another_kind_are_told(place, tmp_path):
    save_layer(GaborConv2d(1, 2, 5), tmp_path / "layer.safetensors")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "pickle.pt")
    checkpoint = next((place / "gabor-3").glob("checkpoint-*"))
    for path in (tmp_path / "layer.safetensors", checkpoint):
        assert not is_trained(path)
        assert "expected a saved network" in told(path)
    assert "is not a saved network of gaborium" in told(tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="expected a saved checkpoint"):
        load_state(place / "gabor-3" / NETWORK_FILE)
