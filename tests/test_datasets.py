"""Data sets: what is in them, that no part overlaps another, and what is refused."""

import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gaborium.training import Dataset, datasets, load_dataset
from gaborium.training.datasets import DATASETS

np = pytest.importorskip("numpy")
pytest.importorskip("PIL")
from PIL import Image  # noqa: E402


def refused(kind: type[Exception], call: Callable[[], object], *words: str) -> None:
    """Assert that the call raises ``kind``, in one line that holds the words."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    for word in words:
        assert word in message


def parts_of(n: int = 12, n_classes: int = 3, **changes: Any) -> Dataset:
    fields = {
        "images": torch.arange(n * 4).reshape(n, 1, 2, 2).byte(),
        "labels": torch.arange(n) % n_classes,
        "test_images": torch.zeros(2, 1, 2, 2, dtype=torch.uint8),
        "test_labels": torch.tensor([0, n_classes - 1]),
        "classes": tuple("abcdefgh"[:n_classes]),
    }
    return Dataset("it", **(fields | changes))


def drawn(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# -- the record -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"labels": torch.full((12,), 3)}, "each 0 to 2, got torch.int64 of shape (12,), [3]"),
        ({"test_labels": torch.tensor([0, -1])}, "test_labels of 'it' must be int64 (2,), each 0"),
        ({"labels": torch.zeros(11, dtype=torch.int64)}, "int64 (12,)"),
        ({"labels": torch.zeros(12)}, "got torch.float32"),
        ({"images": torch.zeros(12, 1, 2, 2)}, "uint8"),
        ({"images": torch.zeros(12, 2, 2).byte()}, "float32"),
        ({"images": torch.zeros(12, 4)}, "(12, 4)"),
        ({"test_images": torch.zeros(2, 1, 3, 2).byte()}, "(2, 1, 3, 2)"),
        ({"images": torch.zeros(0, 1, 2, 2).byte()}, "not empty"),
    ],
)
def test_a_data_set_is_checked_when_it_is_made(changes, word):
    refused(ValueError, lambda: parts_of(**changes), word)


def test_a_subset_is_balanced_nested_and_drawn_from_the_seed_alone():
    data, state = parts_of(30), torch.get_rng_state()
    small, large = data.subset(3, seed=5), data.subset(7, seed=5)
    assert small.labels.bincount().tolist() == [3, 3, 3]
    assert torch.equal(data.subset(3, seed=5).images, small.images)
    assert not torch.equal(data.subset(3, seed=6).images, small.images)
    first = {tuple(image.flatten().tolist()) for image in small.images}
    assert first < {tuple(image.flatten().tolist()) for image in large.images}
    places = [data.images.flatten(1).tolist().index(one.flatten().tolist()) for one in small.images]
    assert places == sorted(places)
    assert torch.equal(data.labels[places], small.labels)
    assert small.test_images is data.test_images
    assert data.subset(None, seed=0) is data
    assert torch.equal(torch.get_rng_state(), state)
    refused(ValueError, lambda: parts_of(13).subset(5, seed=0), "1 to 4", "'b'")
    refused(ValueError, lambda: parts_of().subset(0, seed=0), "got 0")


# -- data sets by name ------------------------------------------------------------------------


def test_textures_are_even_and_share_no_pixel(monkeypatch):
    data = pytest.importorskip("skimage.data")
    monkeypatch.setattr(socket.socket, "connect", None)  # nothing may be downloaded
    textures = load_dataset("textures")
    assert textures.images.shape == textures.test_images.shape == (3600, 1, 32, 32)
    for labels in (textures.labels, textures.test_labels):
        assert labels.bincount().tolist() == [400] * 9
    values = textures.images.float()
    # All have one brightness and contrast; clipping changes them a little.
    assert (values.mean((1, 2, 3)) - 128).abs().max() < 3
    assert values.std((1, 2, 3)).median() == pytest.approx(40, abs=1)
    assert torch.equal(load_dataset("textures").images, textures.images)
    # A photograph whose left half holds vertical stripes and whose right half horizontal ones.
    stripes = np.zeros((512, 512), np.uint8)
    stripes[:, :256:2] = 255
    stripes[::2, 256:] = 255
    for name in textures.classes:
        monkeypatch.setattr(data, name, lambda: stripes)
    striped = load_dataset("textures")
    assert (striped.images[:, :, 1:] == striped.images[:, :, :-1]).all()
    assert (striped.test_images[..., 1:] == striped.test_images[..., :-1]).all()


def test_digits_are_split_and_use_the_whole_range():
    pytest.importorskip("sklearn")
    digits = load_dataset("digits")
    assert digits.images.shape == (1198, 1, 8, 8)
    assert digits.test_images.shape == (599, 1, 8, 8)
    assert (digits.images.min(), digits.images.max()) == (0, 255)
    assert digits.n_classes == 10


def test_published_data_come_from_openml(monkeypatch):
    sklearn = pytest.importorskip("sklearn.datasets")
    pixels, targets = drawn(7, 3 * 32 * 32), np.array(list("3013010"))

    def fetch(name: str, *, version: int, as_frame: bool, parser: str) -> Any:
        assert (name, version, as_frame) == ("CIFAR_10", 1, False)
        return SimpleNamespace(data=pixels.astype(float), target=targets)

    monkeypatch.setattr(sklearn, "fetch_openml", fetch)
    monkeypatch.setitem(datasets._PUBLISHED, "cifar10", ("CIFAR_10", 5, (3, 32, 32)))
    data = load_dataset("cifar10")
    assert (data.name, data.classes) == ("cifar10", ("0", "1", "3"))
    assert data.labels.tolist() == [2, 0, 1, 2, 0]
    assert np.array_equal(data.test_images.flatten(1).numpy(), pixels[5:])

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("<urlopen error no route>")

    monkeypatch.setattr(sklearn, "fetch_openml", fail)
    refused(ConnectionError, lambda: load_dataset("mnist"), "'mnist'", "no route", "network")


def test_what_is_no_data_set_is_named():
    refused(ValueError, lambda: load_dataset("minst"), "'minst'", *DATASETS)


# -- your own files ---------------------------------------------------------------------------


def npz(file: Path, shape: tuple[int, ...] = (6, 5), **changes: Any) -> Path:
    parts = {
        "x_train": drawn(4, *shape), "y_train": np.array([0, 1, 0, 1], np.uint8),
        "x_test": drawn(2, *shape, seed=1), "y_test": np.arange(2),
    }  # fmt: skip
    np.savez(file, **{key: value for key, value in (parts | changes).items() if value is not None})
    return file


def test_npz_files_hold_grey_images_colours_or_sounds(tmp_path):
    data = load_dataset(npz(tmp_path / "grey.npz"))
    assert np.array_equal(data.images[:, 0].numpy(), drawn(4, 6, 5))
    assert (data.name, data.classes) == ("grey", ("0", "1"))
    data = load_dataset(str(npz(tmp_path / "colours.npz", (6, 5, 3), classes=["u", "v"])))
    assert data.images.shape == (4, 3, 6, 5)
    assert data.images[2, 1, 3, 4] == drawn(4, 6, 5, 3)[2, 3, 4, 1]
    assert data.classes == ("u", "v")
    sounds = {
        name: np.full((n, 1, 8), 0.5, np.float32) for name, n in (("x_train", 4), ("x_test", 2))
    }
    assert load_dataset(npz(tmp_path / "sounds.npz", **sounds)).image_size == (8,)


def test_bad_npz_files_are_one_clear_line(tmp_path):
    file = tmp_path / "it.npz"
    refused(ValueError, lambda: load_dataset(npz(file, x_test=None)), "x_test is not a file in")
    refused(ValueError, lambda: load_dataset(npz(file, y_train=np.array([{}] * 4))), "unpickling")
    refused(
        ValueError, lambda: load_dataset(npz(file, classes=["u"])), "each 0 to 0, got", "[0, 1]"
    )
    refused(ValueError, lambda: load_dataset(npz(file, x_train=np.zeros((4, 6, 5)))), "uint8")
    whole = npz(file).read_bytes()
    for damaged in (whole[:-30], whole[:300], b"", b"text", whole[:250] + b"xyz" + whole[253:]):
        file.write_bytes(damaged)
        refused(ValueError, lambda: load_dataset(file), "it.npz", "cannot be read")


def picture(path: Path, grey: int = 0, size: tuple[int, ...] = (6, 5)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, grey, np.uint8)).save(path)


def test_a_folder_with_train_and_test(tmp_path):
    for part, n in (("train", 3), ("test", 2)):
        for number in range(n):
            picture(tmp_path / part / "ants" / f"{number}.png", number)
            picture(tmp_path / part / "bees" / f"{number}.jpg", 100)
    picture(tmp_path / "test" / "bees" / "colour.png", 7, (6, 5, 3))
    (tmp_path / "train" / ".hidden").mkdir()
    data = load_dataset(str(tmp_path))
    assert data.images.shape == (6, 3, 6, 5)
    assert data.images[:3, 0, 0, 0].tolist() == [0, 1, 2]
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 0, 1, 1, 1]
    assert data.classes == ("ants", "bees")
    assert data.name == tmp_path.name
    picture(tmp_path / "train" / "wasps" / "a.png")
    refused(ValueError, lambda: load_dataset(tmp_path), "only one of them for 'wasps'")


def test_a_folder_of_classes_tests_with_the_last_fifth(tmp_path):
    for number in range(11):
        picture(tmp_path / "ants" / f"{number:02}.png", number)
    picture(tmp_path / "bees" / "a.png", 50)
    picture(tmp_path / "bees" / "b.png", 51)
    data = load_dataset(tmp_path)
    assert data.images[:, 0, 0, 0].tolist() == [*range(8), 50]
    assert data.test_images[:, 0, 0, 0].tolist() == [8, 9, 10, 51]
    picture(tmp_path / "bees" / "c.png", 50, (6, 7))
    refused(ValueError, lambda: load_dataset(tmp_path), "one size", "(6, 7)")
    for name in "bc":
        (tmp_path / "bees" / f"{name}.png").unlink()
    refused(ValueError, lambda: load_dataset(tmp_path), "only one of them for 'bees'")
    (tmp_path / "empty").mkdir()
    refused(FileNotFoundError, lambda: load_dataset(tmp_path / "empty"), "no folders")
