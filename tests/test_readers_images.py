"""Images come out as they look in a viewer, and each bad file is one clear line."""

import os
import pickle
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from gaborium.readers import read_image, read_images, sample_image

np = pytest.importorskip("numpy")
pytest.importorskip("PIL")
from PIL import Image  # noqa: E402

GREY = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], -1)
WIDE = GREY.astype(np.uint16) * 257 + 3


def encoded(array: Any, kind: str, **options: Any) -> bytes:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(array: Any, **tags: Any) -> bytes:
    """A TIFF in which some tags are other than Pillow would write."""
    tifffile = pytest.importorskip("tifffile")
    buffer = BytesIO()
    tifffile.imwrite(buffer, array, **tags)
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def read(folder: Path, data: bytes, name: str = "it.png") -> torch.Tensor:
    (folder / name).write_bytes(data)
    return read_image(folder / name)


def expected(array: Any, white: float) -> torch.Tensor:
    values = torch.tensor(array.astype(np.float64)) / white
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


def refused(kind: type[Exception], call: Callable[[], object], *words: str) -> None:
    """Assert that the call raises exactly ``kind``, in one line that holds the words."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    for word in words:
        assert word in message


# -- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "array", "white"),
    [
        pytest.param(encoded(GREY, "PNG"), GREY, 255, id="8-bit grey"),
        pytest.param(encoded(COLOUR, "PNG"), COLOUR, 255, id="8-bit colour"),
        pytest.param(encoded(GREY > 100, "PNG"), GREY > 100, 1, id="1-bit"),
        pytest.param(encoded(WIDE, "PNG"), WIDE, 65535, id="16-bit grey PNG"),
        pytest.param(encoded(WIDE, "TIFF"), WIDE, 65535, id="16-bit grey TIFF"),
        pytest.param(
            b"P5 6 4 65535\n" + WIDE.astype(">u2").tobytes(), WIDE, 65535, id="16-bit PGM"
        ),
        pytest.param(b"P2 2 1 1000 0 1000 ", np.array([[0, 1]]), 1, id="text PGM"),
        pytest.param(encoded((GREY / 255).astype("f4"), "TIFF"), (GREY / 255).astype("f4"), 1),
        pytest.param(encoded(COLOUR, "BMP"), COLOUR, 255, id="BMP"),
        pytest.param(encoded(COLOUR, "WEBP", lossless=True), COLOUR, 255, id="WebP"),
        pytest.param(
            encoded(Image.fromarray(COLOUR).quantize(256), "GIF"),
            np.asarray(Image.fromarray(COLOUR).quantize(256).convert("RGB")),
            255,
            id="palette",
        ),
        pytest.param(
            encoded(Image.fromarray(COLOUR).convert("CMYK"), "TIFF"),
            COLOUR,
            255,
            id="CMYK",
        ),
    ],
)
def test_values_are_fractions_of_white(tmp_path: Path, data: bytes, array: Any, white: int) -> None:
    image = read(tmp_path, data)
    assert image.dtype == torch.float64
    assert image.is_contiguous()
    torch.testing.assert_close(image, expected(array, white), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "bool", "float16", ">f8"])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (2, 4, 3)])
def test_numpy_arrays(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    white = {"uint8": 255, ">u2": 65535}.get(dtype, 1)
    array = (np.linspace(0, 1, 24) * white).astype(dtype).reshape(shape)
    image = read(tmp_path, npy(array), "it.npy")
    torch.testing.assert_close(image, expected(array, white), rtol=0, atol=1e-15)


def test_a_jpeg_is_close(tmp_path: Path) -> None:
    image = read(tmp_path, encoded(np.full((16, 16), 128, np.uint8), "JPEG"), "it.jpg")
    assert image.shape == (1, 16, 16)
    assert (image - 128 / 255).abs().max() <= 2 / 255


def tiff_of_12_bits() -> bytes:
    """Two values in three bytes: 0xFFF and 0x800."""
    entries = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (279, 3)]
    data = b"II*\0" + struct.pack("<I", 12) + b"\xff\xf8\x00\0"
    data += struct.pack("<H", len(entries))
    data += b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    return data + b"\0\0\0\0"


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_lies_over_white(tmp_path: Path, mode: str) -> None:
    array = np.zeros((1, 3, len(mode)), np.uint8)
    array[0, :, -1] = 0, 51, 255  # black of three opacities
    image = read(tmp_path, encoded(array, "PNG"))
    assert image.shape == (len(mode) - 1, 1, 3)
    torch.testing.assert_close(image[-1, 0], torch.tensor([1.0, 0.8, 0.0]).double())


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_colour_that_stands_for_transparent(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode)
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 255, 255, 255])
    data = encoded(image, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)
    values = read(tmp_path, data)
    assert values.shape[0] == (3 if mode in ("P", "RGB") else 1)
    assert (values[:, 0, 0] == 1).all()


@pytest.mark.parametrize("array", [GREY, COLOUR, WIDE], ids=["grey", "colour", "16 bit"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),  # the phone was held upright
        (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation_is_applied(
    tmp_path: Path, orientation: int, upright: Callable[[Any], Any], kind: str, array: Any
) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    image = read(tmp_path, encoded(array, kind, exif=exif))
    white = 65535 if array is WIDE else 255
    torch.testing.assert_close(image, expected(upright(array), white), rtol=0, atol=1e-15)


def test_broken_exif_says_nothing_against_the_pixels(tmp_path: Path) -> None:
    data = encoded(GREY, "PNG")
    broken = data[:33] + chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff") + data[33:]
    torch.testing.assert_close(read(tmp_path, broken), expected(GREY, 255))


def test_a_phones_jpeg_with_previews_is_its_photograph(tmp_path: Path) -> None:
    photo, preview = (Image.fromarray(np.full(s, 90, np.uint8)) for s in ((16, 24), (8, 8)))
    data = encoded(photo, "MPO", save_all=True, append_images=[preview])
    assert read(tmp_path, data, "it.jpg").shape == (1, 16, 24)


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    assert read(tmp_path, encoded(GREY, "PNG"), "it.jpg").shape == (1, 4, 6)


# -- bad input ------------------------------------------------------------------------------


EXECUTED = []


class Bomb:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return execute, ()


def execute() -> None:
    EXECUTED.append(True)


NOISE = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
ANIMATION = {"save_all": True, "append_images": [Image.fromarray(255 - NOISE)]}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(b"", ["cannot identify image file"], id="empty"),
        pytest.param(b"hello\nworld\n", ["cannot identify image file"], id="text"),
        pytest.param(POSTSCRIPT, ["cannot identify image file"], id="PostScript"),
        pytest.param(encoded(NOISE, "PNG")[:5], ["cannot be read"], id="stub"),
        pytest.param(encoded(NOISE, "PNG")[:2000], ["cannot be read"], id="cut PNG"),
        pytest.param(encoded(NOISE, "JPEG")[:1000], ["cannot be read"], id="cut JPEG"),
        pytest.param(encoded(NOISE, "TIFF")[:1000], ["cannot be read"], id="cut TIFF"),
        pytest.param(encoded(NOISE, "WEBP")[:500], ["cannot be read"], id="cut WebP"),
        pytest.param(encoded(NOISE, "GIF", **ANIMATION), ["2 pictures", "expected one"], id="GIF"),
        pytest.param(encoded(NOISE, "PNG", **ANIMATION), ["2 pictures", "animation"], id="APNG"),
        pytest.param(encoded(NOISE, "TIFF", **ANIMATION), ["2 pictures", "pages"], id="pages"),
        pytest.param(png_header(100_000, 100_000), ["exceeds limit"], id="bomb"),
        pytest.param(encoded(np.array([[0, np.nan, 1]], "f4"), "TIFF"), ["from nan"], id="NaN"),
        pytest.param(
            encoded(np.array([[-1.5, 200]], "f4"), "TIFF"),
            ["from -1.5 to 200", "expected 0 (black) to 1 (white)"],
            id="range",
        ),
        pytest.param(tiff(GREY.astype("u4")), ["16 bits from 0, black"], id="32-bit"),
        pytest.param(tiff(GREY.astype("i2")), ["16 bits from 0, black"], id="signed 16"),
        pytest.param(tiff_of_12_bits(), ["16 bits from 0, black"], id="12-bit"),
        pytest.param(
            tiff(WIDE, photometric="miniswhite", byteorder="<"),
            ["16 bits from 0, black", "save it as PNG"],
            id="white is zero",
        ),
        pytest.param(tiff(NOISE / 255, photometric="rgb"), ["cannot identify"], id="float64"),
    ],
)
def test_a_bad_image_is_one_line(tmp_path: Path, data: bytes, words: list[str]) -> None:
    refused(ValueError, lambda: read(tmp_path, data), "it.png'", *words)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npy(GREY)[:-5], ["cannot be read"]),
        (b"hello", ["cannot be read"]),
        (npy(GREY.astype("i8")), ["int64 of shape (4, 6", "expected one image of 8 or 16 bits"]),
        (npy(GREY.astype("c8")), ["complex64"]),
        (npy(GREY.astype("u8")), ["uint64"]),
        (npy(np.zeros(5)), ["shape (5,)", "(height, width, 3)"]),
        (npy(np.zeros((3, 4, 6))), ["shape (3, 4, 6)", "(height, width, 3)"]),
        (npy(np.zeros((0, 4))), ["it.npy"]),
        (npy(np.full((2, 2), 7.0)), ["from 7 to 7"]),
        (npy(np.array([[Bomb()]], dtype=object)), ["needs unpickling"]),
        (pickle.dumps(Bomb()), ["cannot be read"]),
    ],
)
def test_a_bad_array_is_one_line(tmp_path: Path, data: bytes, words: list[str]) -> None:
    refused(ValueError, lambda: read(tmp_path, data, "it.npy"), "it.npy'", *words)
    assert not EXECUTED


@pytest.mark.parametrize("function", [read_image, read_images])
def test_a_missing_file_is_one_line(tmp_path: Path, function: Callable[[Path], object]) -> None:
    refused(FileNotFoundError, lambda: function(tmp_path / "no.png"), "/no.png'")
    refused(ValueError, lambda: read_image(tmp_path), "is not a file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    refused(ValueError, lambda: read_image(tmp_path / "pipe.png"), "is not a file")


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    (tmp_path / "it.png").write_bytes(b"anything")
    with pytest.raises(ImportError, match=r"^Images need PIL: pip install .gaborium\[cli\]"):
        read_image(tmp_path / "it.png")


# -- folders --------------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for index, name in enumerate(["c.PNG", "a.png", "b.png", ".hidden.png", ".DS_Store"]):
        (tmp_path / name).write_bytes(encoded(GREY + np.uint8(index), "PNG"))
    pairs = read_images(tmp_path)  # any warning would be an error
    assert [name for name, _ in pairs] == ["a.png", "b.png", "c.PNG"]
    assert [round(image[0, 0, 0].item() * 255) for _, image in pairs] == [1, 2, 0]
    ((name, image),) = read_images(tmp_path / "a.png")
    assert name == "a.png"
    assert torch.equal(image, pairs[0][1])


def test_what_a_folder_holds_besides_is_listed(tmp_path: Path) -> None:
    (tmp_path / "it.png").write_bytes(encoded(GREY, "PNG"))
    (tmp_path / "deeper.png").mkdir()
    for name in "abcdefghijklm":
        (tmp_path / f"{name}.txt").touch()
    with pytest.warns(UserWarning, match=r"^Skipped in '.*': 'a.txt', .*'deeper.png'.*, \.\.\.\.$"):
        pairs = read_images(tmp_path)
    assert [name for name, _ in pairs] == ["it.png"]


def test_of_many_images_the_first_are_read(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(encoded(GREY, "PNG"))
    with pytest.warns(UserWarning, match=r"^Using the first 2 of 3 images in .*--max-images\)\.$"):
        assert [name for name, _ in read_images(tmp_path, 2)] == ["a.png", "b.png"]


def test_a_folder_without_images_is_one_line(tmp_path: Path) -> None:
    refused(FileNotFoundError, lambda: read_images(tmp_path), "No images", ".png")


def test_a_damaged_image_in_a_folder_is_named_and_not_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(GREY, "PNG"))
    (tmp_path / "b.png").write_bytes(encoded(NOISE, "PNG")[:2000])
    refused(ValueError, lambda: read_images(tmp_path), "/b.png'", "cannot be read")


# -- the default photograph -----------------------------------------------------------------


def test_the_sample_needs_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    pytest.importorskip("skimage")

    def refuse(*args: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    image = sample_image()
    assert image.shape == (1, 512, 512)
    assert image.dtype == torch.float64
    assert image.min() == 0
    assert image.max() == 1


def test_the_warning_filters_of_the_caller_stay(tmp_path: Path) -> None:
    before = list(warnings.filters)
    read(tmp_path, encoded(GREY, "PNG"))
    assert warnings.filters == before
