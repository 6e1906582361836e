"""Data files are read as their headers promise, and each bad file is one clear line."""

import bz2
import gzip
import io
import lzma
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gaborium.training import readers
from gaborium.training.readers import (
    decode_jpegs,
    npz_names,
    read_cifar10,
    read_idx,
    read_image_folder,
    read_npz,
)

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


def peak_memory(call: Callable[[], object]) -> int:
    """The most bytes that Python held while the call ran."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# -- IDX --------------------------------------------------------------------------------------


def idx(shape: tuple[int, ...], content: bytes, kind: int = 8) -> bytes:
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, kind, len(shape), *shape) + content


@pytest.mark.parametrize("packed", [False, True])
def test_idx_comes_out_in_the_shape_of_its_header(tmp_path, packed):
    values = np.arange(2 * 5 * 7, dtype=np.uint8).reshape(2, 5, 7)
    data = idx(values.shape, values.tobytes())
    # The name says nothing: published files are often unpacked under the name of the archive.
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(data) if packed else data)
    assert torch.equal(read_idx(file), torch.from_numpy(values))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (idx((3,), b"abc", kind=0x0D), ("00 00 0d", "expected 00 00 08")),
        (b"\x89PNG\r\n\x1a\n", ("89 50 4e 47",)),
        (b"\0\0\x08\0abc", ("00 00 08 00",)),
        (b"\0\0", ("00 00,",)),
        (idx((2, 3), b"abcde"), ("5 of the 6 bytes", "header promises")),
        (idx((2, 3), b"abcdefg"), ("more than the 6 bytes",)),
        (b"\0\0\x08\x03\0\0\0\x02\0", ("5 of the 12 bytes",)),
        (idx((2**31, 2**31), b""), ("more than the 2,147,483,648",)),
    ],
)
def test_a_bad_idx_file_is_one_clear_line(tmp_path, data, words, packed):
    file = tmp_path / "bad"
    file.write_bytes(gzip.compress(data) if packed else data)
    refused(ValueError, lambda: read_idx(file), repr(str(file)), *words)


def test_a_truncated_or_altered_gzip_is_one_clear_line(tmp_path):
    file = tmp_path / "labels.gz"
    whole = gzip.compress(idx((4000,), np.random.default_rng(0).bytes(4000)))
    for data in (whole[:-1], whole[:-9], whole[: len(whole) // 2], whole[:12], whole[:3]):
        file.write_bytes(data)
        refused(ValueError, lambda: read_idx(file), "labels.gz", "copy it again")
    altered = bytearray(whole)
    altered[len(whole) // 2] ^= 1
    file.write_bytes(altered)
    refused(ValueError, lambda: read_idx(file), "damaged or cut short")


def test_a_gzip_bomb_is_not_unpacked_beyond_its_header(tmp_path):
    file = tmp_path / "bomb.gz"
    file.write_bytes(gzip.compress(idx((10,), bytes(60_000_000)), 9))
    assert file.stat().st_size < 250_000
    assert peak_memory(lambda: refused(ValueError, lambda: read_idx(file), "more than")) < 5e6


def test_files_that_are_none_are_told(tmp_path):
    (tmp_path / "empty").touch()
    refused(FileNotFoundError, lambda: read_idx(tmp_path / "none"), "No data at")
    refused(ValueError, lambda: read_idx(tmp_path), "is a folder")
    refused(ValueError, lambda: read_idx(tmp_path / "empty"), "empty (0 bytes)")
    refused(ValueError, lambda: read_idx("/dev/null"), "pipe or device")


# -- CIFAR-10 ---------------------------------------------------------------------------------

BATCHES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]


@pytest.fixture
def few_records(monkeypatch) -> int:
    """Three records to a file, where the published ones have ten thousand."""
    monkeypatch.setattr(readers, "CIFAR_RECORDS", 3)
    return 3


def batches(n: int) -> dict[str, bytes]:
    drawn = np.random.default_rng(0).integers(0, 256, (len(BATCHES), n, 3073), np.uint8)
    drawn[:, :, 0] %= 10
    return {name: batch.tobytes() for name, batch in zip(BATCHES, drawn, strict=True)}


def write_tar(path: Path, files: dict[str, bytes], folder: str = "cifar-10-batches-bin/") -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(folder + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_is_read_from_its_files_and_from_the_archive(tmp_path, few_records, packed):
    files = batches(few_records)
    place = tmp_path / "cifar-10-binary.tar.gz" if packed else tmp_path
    if packed:
        write_tar(place, {"readme.html": b"text"} | files)
    else:
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
    arrays = read_cifar10(place)
    assert arrays["x_train"].shape == (15, 3, 32, 32)
    last = np.frombuffer(files["data_batch_5.bin"], np.uint8).reshape(3, 3073)[2]
    assert arrays["y_train"][14] == last[0]
    # Planes of colour, each row by row.
    assert torch.equal(arrays["x_train"][14].flatten(), torch.from_numpy(last[1:].copy()))
    assert arrays["x_test"].shape == (3, 3, 32, 32)
    assert arrays["y_test"][0] == files["test_batch.bin"][0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("data_batch_3.bin", lambda data: data[:-1], ("9,218 bytes", "expected 9,219")),
        ("test_batch.bin", lambda data: data + data[:3073], ("12,292 bytes",)),
        ("data_batch_1.bin", lambda data: b"\x0b" + data[1:], ("label 11", "0 to 9")),
    ],
)
def test_a_bad_cifar10_file_is_one_clear_line(tmp_path, few_records, name, change, words, packed):
    files = batches(few_records)
    files[name] = change(files[name])
    place = tmp_path / "it.tar.gz" if packed else tmp_path
    if packed:
        write_tar(place, files)
    else:
        for key, data in files.items():
            (tmp_path / key).write_bytes(data)
    refused(ValueError, lambda: read_cifar10(place), name, *words)


def test_a_missing_cifar10_file_is_named(tmp_path, few_records):
    files = batches(few_records)
    del files["data_batch_4.bin"]
    write_tar(tmp_path / "it.tar.gz", files)
    refused(ValueError, lambda: read_cifar10(tmp_path / "it.tar.gz"), "lacks data_batch_4.bin")
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    refused(FileNotFoundError, lambda: read_cifar10(tmp_path), "data_batch_4.bin")


def test_a_damaged_archive_is_one_clear_line(tmp_path, few_records):
    file = tmp_path / "it.tar.gz"
    write_tar(file, batches(few_records))
    whole = file.read_bytes()
    for data in (whole[:-5], whole[: len(whole) // 2], whole[:30], b"not an archive at all"):
        file.write_bytes(data)
        refused(ValueError, lambda: read_cifar10(file), "it.tar.gz")


def test_an_archive_bomb_is_not_unpacked(tmp_path, few_records):
    file = tmp_path / "bomb.tar.gz"
    write_tar(file, {"zeros": bytes(30_000_000)} | batches(few_records))
    refused(ValueError, lambda: read_cifar10(file), "unpacks to more")
    # A "name" of thirty megabytes, which would be read as a whole.
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 30_000_000
    file.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(info.size)))
    call = lambda: refused(ValueError, lambda: read_cifar10(file), "unpacks to more")  # noqa: E731
    assert peak_memory(call) < 1e7


# -- NumPy's archives -------------------------------------------------------------------------

Y = np.array([3, 1, 2], np.uint8)
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def npy(array: Any, version: tuple[int, int] = (1, 0)) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), version=version)
    return buffer.getvalue()


def write_zip(path: Path, method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_arrays_come_out_as_they_went_in(tmp_path, method):
    arrays = {
        "x": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        "columns": np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
        "big": np.array([1, 2, -3], ">i4"),
        "sound": np.array([0.5, -0.5], np.float32),
        "name": np.array(["D1", "D104"]),
        "rate": np.array(8000, np.int32),
    }
    kinds = {"x": "u1 3,4", "columns": "u1 2", "big": "i 1", "sound": "f 1"}
    kinds |= {"name": "U 1", "rate": "i 0"}
    path = write_zip(tmp_path / "it.npz", method, **{k: npy(a) for k, a in arrays.items()})
    assert npz_names(path) == tuple(arrays)
    found = read_npz(path, kinds)
    for name, array in arrays.items():
        assert np.array_equal(found[name], array)
        assert found[name].dtype.isnative
    assert torch.from_numpy(found["big"].astype(np.int64)).tolist() == [1, 2, -3]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npy(Y.astype(float)), ("float64 of shape (3,)", "expected whole numbers with 1 axes")),
        (npy(Y[:, None]), ("shape (3, 1)",)),
        (npy(Y)[:-1], ("should hold 3 bytes by its shape (3,), but the archive has 2",)),
        (npy(Y) + b"more", ("but the archive has 7",)),
        (npy(Y)[:9], ("damaged or cut short",)),
        (npy(Y)[:40], ("damaged or cut short",)),
        (b"no array", ("damaged or cut short",)),
        (npy(Y, (3, 0)), ("format (3, 0)",)),
        (npy(np.array([{}, 1, 2], object)), ("needs unpickling",)),
        (pickle.dumps(Y), ("damaged or cut short",)),
        (npy(Y).replace(b"(3,)", b"(-3,)"), ("",)),
        (npy(Y).replace(b"(3,), }  ", b"(2**31,)}"), ("",)),
    ],
)
def test_a_bad_array_is_one_clear_line(tmp_path, data, words):
    path = write_zip(tmp_path / "it.npz", y=data)
    with pytest.raises(ValueError, match=r"\.$") as caught:
        read_npz(path, {"y": "i 1"})
    assert "it.npz" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert any(word in str(caught.value) for word in words)


def test_a_missing_array_and_a_damaged_archive_are_told(tmp_path):
    path = write_zip(tmp_path / "it.npz", y=npy(Y))
    refused(ValueError, lambda: read_npz(path, {"x": "u1 3"}), "no array 'x', only 'y'")
    whole = path.read_bytes()
    for data in (whole[:-30], whole[:40], b"PK\x05\x06", b"something else"):
        path.write_bytes(data)
        refused(ValueError, lambda: read_npz(path, {"y": "i 1"}), "it.npz")
        refused(ValueError, lambda: npz_names(path), "it.npz")
    # The archive's directory promises less, or more, than there is.
    for size in (-1, 1):
        stored = write_zip(path, zipfile.ZIP_STORED, y=npy(Y)).read_bytes()
        true = struct.pack("<II", len(npy(Y)), len(npy(Y)))
        path.write_bytes(stored.replace(true, struct.pack("<II", *[len(npy(Y)) + size] * 2)))
        refused(ValueError, lambda: read_npz(path, {"y": "i 1"}), "it.npz")
    altered = bytearray(write_zip(path, zipfile.ZIP_STORED, y=npy(Y)).read_bytes())
    altered[whole.find(b"\x93NUMPY") + 128] ^= 1
    path.write_bytes(altered)
    refused(ValueError, lambda: read_npz(path, {"y": "i 1"}), "damaged")


@pytest.mark.parametrize("method", METHODS[1:])
def test_an_array_is_never_unpacked_beyond_its_header(tmp_path, method):
    # 20 MB behind a header that promises 3 bytes; the archive tells its size, or lies about it.
    path = write_zip(tmp_path / "bomb.npz", method, y=npy(Y) + bytes(20_000_000))
    assert path.stat().st_size < 100_000
    call = lambda: refused(ValueError, lambda: read_npz(path, {"y": "i 1"}), "20,000,003")  # noqa: E731
    # Decoders of bzip2 and LZMA have no limit; what they are given has.
    assert peak_memory(call) < (5e6 if method == zipfile.ZIP_DEFLATED else 60e6)


def test_an_array_larger_than_any_is_refused_before_it_is_begun(tmp_path):
    header = npy(np.empty(0, np.uint8)).replace(b"(0,), }         ", b"(9999999999,), }")
    path = write_zip(tmp_path / "it.npz", y=header)
    refused(ValueError, lambda: read_npz(path, {"y": "i 1"}), "9,999,999,999 bytes")


# -- JPEGs in an array ------------------------------------------------------------------------


def jpeg(height: int, width: int, grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), grey, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def joined(*images: bytes) -> tuple[Any, Any]:
    blob = np.frombuffer(b"".join(images), np.uint8)
    return blob, np.cumsum([0, *map(len, images)])


def test_jpegs_are_cut_at_their_offsets():
    images = decode_jpegs(*joined(jpeg(8, 6, 10), jpeg(8, 6, 200)), "it")
    assert images.shape == (2, 3, 8, 6)
    assert images.float().mean((1, 2, 3)).tolist() == [10, 200]


def test_bad_jpegs_are_one_clear_line():
    blob, offsets = joined(jpeg(8, 8, 0), jpeg(8, 9, 0))
    refused(ValueError, lambda: decode_jpegs(blob, offsets, "it"), "Image 1 of it has 8 x 9 px")
    good, places = joined(jpeg(8, 8, 0), jpeg(8, 8, 0))
    for bad in (places[1:], places + 1, places[::-1], places[:1], np.array([0, 0, len(good)])):
        refused(ValueError, lambda bad=bad: decode_jpegs(good, bad, "it"), "offsets of it")
    cut, short = joined(jpeg(8, 8, 0), jpeg(64, 64, 0)[:200])
    refused(ValueError, lambda: decode_jpegs(cut, short, "it"), "Image 1 of it is damaged")
    other, ends = joined(b"no picture")
    refused(ValueError, lambda: decode_jpegs(other, ends, "it"), "Image 0 of it is damaged")


# -- folders of images ------------------------------------------------------------------------


def picture(path: Path, size: tuple[int, ...] = (6, 5), grey: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, grey, np.uint8)).save(path)


def test_a_folder_of_images_is_read_in_the_order_of_numbers(tmp_path):
    for number in (1, 2, 10):
        picture(tmp_path / "cats" / f"{number}.png", grey=number)
    picture(tmp_path / "ants" / "a.png", (6, 5, 3), 50)
    picture(tmp_path / ".hidden" / "a.png", (1, 1))
    files, images, classes = read_image_folder(tmp_path)
    assert classes == ("ants", "cats")
    assert [one.shape for one in images] == [(1, 3, 6, 5), (3, 3, 6, 5)]
    assert images[1][:, 2, 0, 0].tolist() == [1, 2, 10]
    assert [file.name for file in files[1]] == ["1.png", "2.png", "10.png"]


def test_a_bad_folder_of_images_is_one_clear_line(tmp_path):
    refused(FileNotFoundError, lambda: read_image_folder(tmp_path / "none"), "folder of images")
    refused(FileNotFoundError, lambda: read_image_folder(tmp_path), "holds no folders")
    (tmp_path / "ants").mkdir()
    refused(FileNotFoundError, lambda: read_image_folder(tmp_path), "ants", "No images")
    picture(tmp_path / "ants" / "a.png")
    picture(tmp_path / "bees" / "b.png", (7, 5))
    refused(
        ValueError, lambda: read_image_folder(tmp_path), "'ants/a.png'", "7 x 5", "'bees/b.png'"
    )
    (tmp_path / "bees" / "b.png").write_bytes(b"no picture")
    refused(ValueError, lambda: read_image_folder(tmp_path), "b.png", "not an image")


def test_a_png_bomb_is_refused_from_its_header(tmp_path):
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    def png(width: int, height: int, pixels: bytes) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        parts = (b"IHDR", header), (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)

    picture(tmp_path / "ants" / "a.png")
    bomb = tmp_path / "ants" / "b.png"
    bomb.write_bytes(png(4000, 4000, bytes(4000 * 4001)))
    refused(ValueError, lambda: read_image_folder(tmp_path), "4000 x 4000", "allowed")
    # More content than the header promises is not unpacked.
    bomb.write_bytes(png(5, 6, bytes(50_000_000)))
    assert peak_memory(lambda: read_image_folder(tmp_path)) < 5e6


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_other_archives_are_not_mistaken(tmp_path, pack):
    file = tmp_path / "it"
    file.write_bytes(pack(b"something else"))
    refused(ValueError, lambda: read_idx(file), "IDX")
    refused(ValueError, lambda: npz_names(file), "damaged")
