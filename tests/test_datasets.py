"""Questions about data sets: what is in them, what is in neither part twice, where they are."""

import gzip
import hashlib
import http.server
import io
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gaborium.training import fetching, readers
from gaborium.training.datasets import DATASETS, Dataset, load_dataset
from gaborium.training.fetching import Published, fetch_files

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
    assert "[Errno" not in message
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


def test_a_data_set_is_checked_when_it_is_made():
    for changes, kind, word in (
        ({"labels": torch.full((12,), 3)}, ValueError, "0 to 2"),
        ({"test_labels": torch.tensor([0, -1])}, ValueError, "got -1"),
        ({"labels": torch.zeros(11, dtype=torch.int64)}, ValueError, "one per image, 12"),
        ({"labels": torch.zeros(12)}, TypeError, "int64"),
        ({"images": torch.zeros(12, 1, 2, 2)}, TypeError, "uint8"),
        ({"images": torch.zeros(12, 2, 2).byte()}, TypeError, "float32"),
        ({"images": torch.zeros(12, 4)}, ValueError, "(12, 4)"),
        ({"test_images": torch.zeros(2, 1, 3, 2).byte()}, ValueError, "(1, 3, 2)"),
        ({"images": torch.zeros(0, 1, 2, 2).byte()}, ValueError, "not empty"),
        ({"images": torch.full((12, 1, 8), 2.0)}, ValueError, "[-1, 1]"),
        ({"images": torch.full((12, 1, 8), torch.nan)}, ValueError, "NaN"),
    ):
        refused(kind, lambda changes=changes: parts_of(**changes), word)


def test_sounds_have_one_dimension():
    sounds = {"images": torch.zeros(12, 1, 50), "test_images": torch.zeros(2, 1, 50)}
    data = parts_of(**sounds)
    assert (data.n_dims, data.image_size, data.n_channels) == (1, (50,), 1)


def test_a_subset_is_balanced_nested_and_drawn_from_the_seed_alone():
    data = parts_of(30)
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


def test_a_subset_draws_nothing_from_torchs_generator():
    state = torch.get_rng_state()
    parts_of(30).subset(2, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_subset_that_cannot_be_is_one_clear_line():
    refused(ValueError, lambda: parts_of(13).subset(5, seed=0), "at most 4", "'b'")
    refused(ValueError, lambda: parts_of().subset(0, seed=0), "at least 1")
    refused(TypeError, lambda: parts_of().subset(2.0, seed=0), "float")


# -- what comes inside packages ---------------------------------------------------------------


def test_textures_are_even_and_share_no_pixel(monkeypatch):
    pytest.importorskip("skimage.data")
    monkeypatch.setattr(socket.socket, "connect", None)  # nothing may be downloaded
    textures = load_dataset("textures")
    assert textures.images.shape == textures.test_images.shape == (3600, 1, 32, 32)
    assert (
        textures.labels.bincount().tolist() == [400] * 9 == textures.test_labels.bincount().tolist()
    )
    values = textures.images.float()
    # Brightness and contrast tell nothing; clipping moves them a little.
    assert (values.mean((1, 2, 3)) - 128).abs().max() < 3
    assert values.std((1, 2, 3)).median() == pytest.approx(40, abs=1)
    assert torch.equal(load_dataset("textures").images, textures.images)


def test_texture_patches_come_from_the_two_halves(monkeypatch):
    data = pytest.importorskip("skimage.data")
    from gaborium.training import datasets

    # A photograph whose left half holds vertical stripes and whose right half horizontal ones.
    stripes = np.zeros((512, 512), np.uint8)
    stripes[:, :256:2] = 255
    stripes[::2, 256:] = 255
    for name in datasets._PHOTOGRAPHS:
        monkeypatch.setattr(data, name, lambda: stripes)
    textures = load_dataset("textures")
    assert (textures.images[:, :, 1:] == textures.images[:, :, :-1]).all()
    assert (textures.test_images[..., 1:] == textures.test_images[..., :-1]).all()


def test_digits_are_split_and_use_the_whole_range():
    pytest.importorskip("sklearn")
    digits = load_dataset("digits")
    assert digits.images.shape == (1198, 1, 8, 8)
    assert digits.test_images.shape == (599, 1, 8, 8)
    assert (digits.images.min(), digits.images.max()) == (0, 255)
    assert digits.n_classes == 10


# -- published files --------------------------------------------------------------------------


def idx(array: Any) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def idx_files(seed: int = 0) -> dict[str, bytes]:
    labels = np.arange(20, dtype=np.uint8) % 10
    return {
        "train-images-idx3-ubyte": idx(drawn(20, 28, 28, seed=seed)),
        "train-labels-idx1-ubyte": idx(labels),
        "t10k-images-idx3-ubyte": idx(drawn(10, 28, 28, seed=seed + 1)),
        "t10k-labels-idx1-ubyte": idx(labels[:10]),
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_published_idx_files_are_read(tmp_path, name, packed):
    for file, data in idx_files().items():
        place = tmp_path / (f"{file}.gz" if packed else file)
        place.write_bytes(gzip.compress(data) if packed else data)
    data = load_dataset(name, tmp_path)
    assert data.name == name
    assert np.array_equal(data.images[:, 0].numpy(), drawn(20, 28, 28))
    assert data.labels.tolist() == [*range(10)] * 2
    assert data.classes[1] == ("1" if name == "mnist" else "Trouser")


def test_idx_files_that_do_not_belong_together_are_told(tmp_path):
    files = idx_files()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)

    def load() -> Dataset:
        return load_dataset("mnist", tmp_path)

    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.full(20, 11, np.uint8)))
    refused(ValueError, load, "labels", "0 to 9", "got 11")
    labels.write_bytes(idx(np.zeros(19, np.uint8)))
    refused(ValueError, load, "one per image, 20")
    labels.write_bytes(files["train-images-idx3-ubyte"])
    refused(ValueError, load, "3 axes, expected 1")
    labels.unlink()
    refused(FileNotFoundError, load, "lacks train-labels-idx1-ubyte", "'mnist'")


def test_cifar10_is_read_from_a_folder_and_from_the_unpacked_archives(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CIFAR_RECORDS", 2)
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    records = drawn(6, 2, 3073) % 10
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    for name, batch in zip(names, records, strict=True):
        (inner / name).write_bytes(batch.tobytes())
    for place in (tmp_path, inner):
        data = load_dataset("cifar10", place)
        assert data.images.shape == (10, 3, 32, 32)
        assert data.labels.tolist() == records[:5, :, 0].flatten().tolist()
        assert data.classes[9] == "truck"


# -- .npz files -------------------------------------------------------------------------------


def jpegs(n: int) -> tuple[Any, Any]:
    blobs = []
    for index in range(n):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), 10 * index, np.uint8)).save(buffer, "JPEG")
        blobs.append(buffer.getvalue())
    return np.frombuffer(b"".join(blobs), np.uint8), np.cumsum([0, *map(len, blobs)])


def test_npz_of_images_is_read_by_name_and_by_path(tmp_path):
    arrays = {
        "x_train": drawn(20, 28, 28),
        "y_train": np.arange(20, dtype=np.uint8) % 10,
        "x_test": drawn(10, 28, 28, seed=1),
        "y_test": np.arange(10, dtype=np.int64),
    }
    (tmp_path / "images").mkdir()
    np.savez_compressed(tmp_path / "images" / "fashion_mnist.npz", **arrays)
    for folder in (tmp_path, tmp_path / "images"):
        data = load_dataset("fashion-mnist", folder)
        assert np.array_equal(data.images[:, 0].numpy(), arrays["x_train"])
        assert data.classes[0] == "T-shirt/top"
    data = load_dataset(str(tmp_path / "images" / "fashion_mnist.npz"))
    assert data.name == "fashion_mnist"
    assert data.classes == tuple(map(str, range(10)))


def test_npz_of_colours_has_channels_last_and_its_own_classes(tmp_path):
    file, colours = tmp_path / "mine.npz", drawn(4, 6, 5, 3)
    labels = np.array([0, 1, 0, 1])
    np.savez(
        file, x_train=colours, y_train=labels, x_test=colours, y_test=labels, classes=["u", "v"]
    )
    data = load_dataset(file)
    assert data.images.shape == (4, 3, 6, 5)
    assert data.images[2, 1, 3, 4] == colours[2, 3, 4, 1]
    assert data.classes == ("u", "v")
    np.savez(
        file, x_train=colours, y_train=labels + 1, x_test=colours, y_test=labels, classes=["u", "v"]
    )
    refused(ValueError, lambda: load_dataset(file), "0 to 1", "got 2")


def test_npz_of_jpegs(tmp_path):
    blob, offsets = jpegs(10)
    labels = np.arange(10, dtype=np.uint8)
    parts = {
        f"{key}_{part}": value
        for part in ("train", "test")
        for key, value in (("jpeg", blob), ("offset", offsets), ("y", labels))
    }
    np.savez(tmp_path / "cifar10_jpeg.npz", **parts)
    data = load_dataset("cifar10", tmp_path)
    assert data.images.shape == (10, 3, 8, 8)
    assert data.images[7].unique().tolist() == [70]


def test_npz_of_materials_splits_after_image_five(tmp_path):
    x, y = drawn(18, 16, 16), np.repeat([0, 1], 9).astype(np.uint8)
    image = np.tile(np.arange(1, 10), 2)
    np.savez(tmp_path / "kth_tips_grey.npz", x=x, y=y, image=image, classes=["cork", "linen"])
    data = load_dataset("kth-tips", tmp_path)
    assert np.array_equal(data.images[:, 0].numpy(), x[image <= 5])
    assert data.test_labels.tolist() == [0] * 4 + [1] * 4
    assert data.classes == ("cork", "linen")


def test_npz_of_albums_tests_with_the_lower_halves(tmp_path):
    x = np.zeros((2, 94, 72), np.uint8)  # one row short of two patches in each half
    x[0], x[1] = 10, 20
    x[:, 47:] += 100
    np.savez(tmp_path / "brodatz24.npz", x=x, name=["D1", "D4"])
    data = load_dataset("brodatz", tmp_path)
    assert data.images.shape == (6, 1, 24, 24)
    assert data.images[:, 0, 0, 0].tolist() == [10] * 3 + [20] * 3
    assert data.test_images.unique().tolist() == [110, 120]
    assert data.classes == ("D1", "D4")
    np.savez(tmp_path / "brodatz24.npz", x=x[:, :40], name=["D1", "D4"])
    refused(ValueError, lambda: load_dataset("brodatz", tmp_path), "40 x 72 px")


def sounds(**changes: Any) -> dict[str, Any]:
    clips = [np.full(n, n % 1000, np.int16) for n in (3000, 9000, 8000)]
    return {
        "samples": np.concatenate(clips),
        "offset": np.cumsum([0, 3000, 9000, 8000]),
        "digit": np.array([4, 5, 6], np.uint8),
        "take": np.array([5, 6, 4], np.uint8),
        "rate": np.array(8000, np.int32),
    } | changes


def test_npz_of_sounds_has_a_second_of_each_and_tests_with_the_first_takes(tmp_path):
    clips = sounds()
    clips["samples"][3000:12000] = -(2**15)
    np.savez(tmp_path / "fsdd.npz", **clips)
    data = load_dataset("spoken-digits", tmp_path)
    assert data.images.shape == (2, 1, 8000)
    assert data.images.dtype == torch.float32
    assert data.labels.tolist() == [4, 5]
    assert data.test_labels.tolist() == [6]
    assert (data.images[0, 0, 3000:] == 0).all()
    assert (data.images[1] == -1).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offset": np.array([0, 3000, 12000])}, ("'offset'", "20,000 samples")),
        ({"offset": np.array([0, 12000, 3000, 20000])}, ("'offset'",)),
        ({"rate": np.array(16000)}, ("at 8000 Hz, got int16 at 16000 Hz",)),
        ({"samples": np.zeros(20000, np.int64)}, ("int64",)),
        ({"take": np.array([5, 6])}, ("as many of each",)),
        ({"digit": np.array([4, 10, 6])}, ("got 10",)),
    ],
)
def test_bad_sounds_are_one_clear_line(tmp_path, changes, words):
    np.savez(tmp_path / "fsdd.npz", **sounds(**changes))
    refused(ValueError, lambda: load_dataset("spoken-digits", tmp_path), *words)


def test_an_npz_of_something_else_is_told(tmp_path):
    np.savez(tmp_path / "it.npz", weights=drawn(3, 3))
    refused(ValueError, lambda: load_dataset(tmp_path / "it.npz"), "'weights'", "x_train, y_train")


@pytest.mark.parametrize("name", ["kth-tips", "brodatz", "spoken-digits"])
def test_the_real_collections_load(shared, name):
    data = load_dataset(name, shared)
    shapes = {
        "kth-tips": ((450, 1, 128, 128), 360),
        "brodatz": ((8112, 1, 24, 24), 8112),
        "spoken-digits": ((1000, 1, 8000), 250),
    }
    assert (tuple(data.images.shape), len(data.test_images)) == shapes[name]
    assert set(data.labels.tolist()) == set(data.test_labels.tolist()) == set(range(data.n_classes))


# -- a user's own -----------------------------------------------------------------------------


def picture(path: Path, grey: int = 0, size: tuple[int, ...] = (6, 5)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, grey, np.uint8)).save(path)


def test_a_folder_with_train_and_test(tmp_path):
    for part, n in (("train", 3), ("test", 2)):
        for number in range(n):
            picture(tmp_path / part / "ants" / f"{number}.png", number)
            picture(tmp_path / part / "bees" / f"{number}.jpg", 100)
    picture(tmp_path / "test" / "bees" / "colour.png", 7, (6, 5, 3))
    data = load_dataset(str(tmp_path))
    assert data.images.shape == (6, 3, 6, 5)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 0, 1, 1, 1]
    assert data.classes == ("ants", "bees")
    assert data.name == tmp_path.name
    picture(tmp_path / "train" / "wasps" / "a.png")
    refused(ValueError, lambda: load_dataset(tmp_path), "'wasps'", "one of them only")


def test_a_folder_of_classes_tests_with_the_last_fifth(tmp_path):
    for number in range(1, 12):
        picture(tmp_path / "ants" / f"{number}.png", number)
    picture(tmp_path / "bees" / "a.png", 50)
    picture(tmp_path / "bees" / "b.png", 51)
    data = load_dataset(tmp_path)
    assert data.images[:, 0, 0, 0].tolist() == [*range(1, 9), 50]
    assert data.test_images[:, 0, 0, 0].tolist() == [9, 10, 11, 51]
    (tmp_path / "bees" / "b.png").unlink()
    refused(ValueError, lambda: load_dataset(tmp_path), "bees", "expected at least 2")


def test_what_is_no_data_set_is_told(tmp_path):
    refused(ValueError, lambda: load_dataset("minst"), "'minst'", *DATASETS)
    (tmp_path / "it.txt").write_text("text")
    refused(ValueError, lambda: load_dataset(tmp_path / "it.txt"), "neither a folder")
    refused(ValueError, lambda: load_dataset("mnist"), "folder", "--folder")
    refused(ValueError, lambda: load_dataset("textures", tmp_path), "no folder")
    refused(ValueError, lambda: load_dataset("digits", download=True), "no download")
    refused(FileNotFoundError, lambda: load_dataset("mnist", tmp_path / "none"), "does not exist")
    refused(FileNotFoundError, lambda: load_dataset("brodatz", tmp_path), "brodatz24.npz")
    refused(FileNotFoundError, lambda: load_dataset("cifar10", tmp_path), "cifar-10-binary.tar.gz")
    refused(TypeError, lambda: load_dataset(3), "int")
    refused(ValueError, lambda: load_dataset("brodatz", tmp_path, download=True), "cifar10")


# -- fetching ---------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder that a local server publishes as MNIST; its files are as they should be."""
    published = tmp_path / "published"
    published.mkdir()
    files = []
    for name, data in idx_files().items():
        packed = gzip.compress(data)
        (published / f"{name}.gz").write_bytes(packed)
        digest = hashlib.md5(packed, usedforsecurity=False).hexdigest()
        files.append(Published(f"{name}.gz", len(packed), digest))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(published))

        def log_message(self, *args: Any) -> None:
            pass

    class Server(http.server.HTTPServer):
        def handle_error(self, *args: Any) -> None:
            """Say nothing of a client that has seen enough."""

    with Server(("127.0.0.1", 0), Quiet) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        base = f"http://127.0.0.1:{httpd.server_port}/"
        monkeypatch.setitem(fetching.ADDRESSES, "mnist", (base, tuple(files)))
        yield published
        httpd.shutdown()
        thread.join()


def test_a_data_set_is_fetched_once(tmp_path, server):
    place = tmp_path / "new" / "mnist"
    data = load_dataset("mnist", place, download=True)
    assert np.array_equal(data.images[:, 0].numpy(), drawn(20, 28, 28))
    assert sorted(file.name for file in place.iterdir()) == sorted(
        file.name for file in server.iterdir()
    )
    for file in server.iterdir():
        file.unlink()
    assert fetch_files("mnist", place) == []
    assert torch.equal(load_dataset("mnist", place, download=True).images, data.images)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda data: data[:-1], ValueError, ("bytes, expected",)),
        (lambda data: data + bytes(10**7), ValueError, ("more than",)),
        (lambda data: data[:-1] + b"x", ValueError, ("MD5", "not the published file")),
        (None, ConnectionError, ("not found", "yourself")),
    ],
)
def test_what_is_not_the_published_file_is_never_kept(tmp_path, server, change, kind, words):
    file = server / "t10k-images-idx3-ubyte.gz"
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))
    place = tmp_path / "mnist"
    refused(kind, lambda: load_dataset("mnist", place, download=True), file.name, *words)
    assert sorted(one.name for one in place.iterdir()) == [
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
    ]


def test_no_network_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    _, files = fetching.ADDRESSES["mnist"]
    # Nobody listens at port 9 of this machine.
    monkeypatch.setitem(fetching.ADDRESSES, "mnist", ("http://127.0.0.1:9/", files))
    refused(
        ConnectionError,
        lambda: load_dataset("mnist", tmp_path, download=True),
        "Cannot fetch http://127.0.0.1:9/train-images-idx3-ubyte.gz",
        "check the network",
    )
    assert [*tmp_path.iterdir()] == []


def test_a_server_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetching, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        base = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setitem(fetching.ADDRESSES, "mnist", (base, fetching.ADDRESSES["mnist"][1]))
        refused(ConnectionError, lambda: fetch_files("mnist", tmp_path), "timed out")


def test_published_sums_are_sums():
    for base, files in fetching.ADDRESSES.values():
        assert base.endswith("/")
        for file in files:
            assert len(bytes.fromhex(file.md5)) == 16
            assert file.size > 1000
