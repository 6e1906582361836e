"""Tables of parameters: what their columns mean, and that they come back exactly."""

from __future__ import annotations

import csv
import io
import math

import pytest
import torch
from torch import nn

from gaborium import Gabor1d, Gabor2d, Gabor3d, GaborConv1d, GaborConv2d, MixedConv, gabor
from gaborium.export import from_csv, read_params, to_csv, write_params

F64 = torch.float64


def random_record(kind: type, *shape: int, dtype: torch.dtype = F64):
    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype).uniform_(low, high)

    fields = {name: uniform(-3, 3) for name in kind.field_names() if name != "center"}
    for name in ("wavelength", "sigma", "aspect_ratio"):
        if name in fields:
            fields[name] = uniform(0.3, 9)
    return kind(**fields, center=torch.zeros(*shape, kind.n_dims, dtype=dtype))


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def same(one, other) -> bool:
    if type(one) is not type(other) or one.batch_shape != other.batch_shape:
        return False
    other = other.expand()
    return all(
        value.dtype == other.as_dict()[name].dtype and torch.equal(value, other.as_dict()[name])
        for name, value in one.expand().as_dict().items()
    )


# -- our own words ----------------------------------------------------------------------------


def test_the_columns_are_the_fields_with_their_units():
    record = Gabor2d.of(orientation=0.5, wavelength=6.0, sigma=2.0, center=[0.25, -1.0])
    assert to_csv(record) == (
        "filter,orientation (rad),wavelength (px),phase (rad),sigma (px),aspect_ratio,"
        "amplitude (kernel's unit),center[0] (px),center[1] (px)\n"
        "0,0.5,6.0,0.0,2.0,1.0,1.0,0.25,-1.0\n"
    )


def test_there_is_a_row_for_each_filter_and_channel():
    layer = GaborConv2d(3, 4, 9)
    rows = rows_of(to_csv(layer))
    assert [(row["filter"], row["channel"]) for row in rows] == [
        (str(i), str(j)) for i in range(4) for j in range(3)
    ]
    # What the channels share stands in the row of each.
    assert rows[3]["sigma (px)"] == rows[5]["sigma (px)"] == str(layer.params.sigma[1, 0].item())


@pytest.mark.parametrize("kind", [Gabor1d, Gabor2d, Gabor3d])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_record_comes_back_bit_for_bit(kind, shape, dtype):
    record = random_record(kind, *shape, dtype=dtype)
    record = record.replace(center=torch.randn_like(record.center))
    assert same(from_csv(to_csv(record), dtype=dtype), record)


def test_a_layer_comes_back_and_can_be_set():
    layer, other = GaborConv2d(3, 4, 9, dtype=F64), GaborConv2d(3, 4, 9, dtype=F64, start="random")
    other.params = from_csv(to_csv(layer))
    torch.testing.assert_close(other.weight, layer.weight, rtol=0, atol=1e-14)
    mixed = MixedConv(layer, 2)
    assert to_csv(mixed) == to_csv(layer)


def test_blobs_and_rows_in_any_order():
    record = Gabor2d.of(wavelength=[math.inf, 4.0], sigma=2.0, dtype=F64)
    head, first, second, _ = to_csv(record).split("\n")
    assert ",inf," in first
    assert same(from_csv(f"\ufeff{head}\r\n{second}\r\n\r\n{first}"), record)


def test_columns_may_stand_in_any_order_behind_the_places():
    record = random_record(Gabor1d, 2, 2)
    rows = rows_of(to_csv(record))
    names = list(rows[0])
    names = [*names[:2], *reversed(names[2:])]
    text = "\n".join([",".join(names), *(",".join(row[name] for name in names) for row in rows)])
    assert same(from_csv(text), record)


# -- other libraries' words -------------------------------------------------------------------


@pytest.mark.parametrize("words", ["skimage", "opencv"])
@pytest.mark.parametrize("shape", [(4,), (3, 2)], ids=str)
def test_other_words_come_back(words, shape):
    record = random_record(Gabor2d, *shape)
    again = from_csv(to_csv(record, words))
    assert again.batch_shape == shape
    for name, value in record.as_dict().items():
        # A reciprocal of a reciprocal, and a product and its quotient, lose the last digits.
        torch.testing.assert_close(again.as_dict()[name], value, rtol=1e-14, atol=0)


def test_a_row_for_skimage_makes_the_layers_kernel():
    skimage = pytest.importorskip("skimage.filters")
    layer = GaborConv2d(2, 3, 25, dtype=F64, start="random", seed=1)
    for row in rows_of(to_csv(layer, "skimage")):
        given = {name.partition(" ")[0]: float(value) for name, value in row.items()}
        i, j, scale = int(given.pop("filter")), int(given.pop("channel")), given.pop("scale")
        kernel = scale * torch.from_numpy(skimage.gabor_kernel(n_stds=5, **given).real)
        expected = gabor(layer.params[i, j], tuple(kernel.shape))
        torch.testing.assert_close(kernel, expected, rtol=0, atol=1e-12)


def test_a_row_for_opencv_makes_the_layers_kernel():
    cv2 = pytest.importorskip("cv2")
    layer = GaborConv2d(2, 3, 11, dtype=F64, start="random", seed=1)
    for row in rows_of(to_csv(layer, "opencv")):
        given = {name.partition(" ")[0]: float(value) for name, value in row.items()}
        i, j, scale = int(given.pop("filter")), int(given.pop("channel")), given.pop("scale")
        kernel = scale * torch.from_numpy(cv2.getGaborKernel((11, 11), **given, ktype=cv2.CV_64F))
        torch.testing.assert_close(kernel, layer.weight[i, j].detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("source", "words", "kind", "message"),
    [
        (
            nn.Conv2d(1, 1, 3),
            "gaborium",
            TypeError,
            "Expected a Gabor layer or a record, got Conv2d",
        ),
        (Gabor2d.of(wavelength=[], sigma=[]), "gaborium", ValueError, "not empty, got (0,)"),
        (random_record(Gabor1d, 2, 2, 2), "gaborium", ValueError, "got (2, 2, 2)"),
        (random_record(Gabor1d, 2), "matlab", ValueError, "words must be one of 'gaborium', 'skim"),
        (random_record(Gabor1d, 2), "opencv", TypeError, "expected a Gabor2d, got Gabor1d"),
        (GaborConv1d(1, 1, 5), "skimage", TypeError, "expected a Gabor2d, got Gabor1d"),
        (GaborConv2d(1, 1, 5, unit_norm=True), "opencv", ValueError, "give layer.params"),
        (GaborConv2d(1, 1, 5, dc="remove"), "skimage", ValueError, "dc='remove'"),
        (
            Gabor2d.of(wavelength=4.0, sigma=1.0, center=[1.0, 0.0]),
            *("opencv", ValueError, "no off-centre Gabor functions"),
        ),
        (
            random_record(Gabor1d, 2).replace(sigma=torch.tensor([1.0, math.nan], dtype=F64)),
            *("gaborium", ValueError, "sigma must be positive and finite"),
        ),
    ],
)
def test_what_no_table_can_hold_is_told(source, words, kind, message):
    with pytest.raises(kind) as error:
        to_csv(source, words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# -- tables that are wrong --------------------------------------------------------------------

GOOD = to_csv(Gabor1d.of(wavelength=[[4.0, 5.0], [6.0, 7.0]], sigma=1.0)).splitlines()


def changed(line: int, text: str | None) -> str:
    lines = list(GOOD)
    lines[line : line + 1] = [] if text is None else [text]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must begin with a line of to_csv's columns"),
        ("\n\n", "must begin with a line of to_csv's columns"),
        ("\0\1", "must begin with a line of to_csv's columns"),
        (GOOD[0], "has no rows"),
        (GOOD[0].replace(",", ";"), "must begin with a line of to_csv's columns"),
        (changed(0, GOOD[0].replace("sigma (px)", "sigma")), "must begin"),
        (changed(0, GOOD[0] + ",note"), "must begin"),
        (changed(0, GOOD[0].replace("phase (rad)", "sigma (px)")), "must begin"),
        (changed(2, "0,1,5.0,0.0"), "Line 3 has 4 entries, expected 7."),
        (changed(2, GOOD[2] + ",1"), "Line 3 has 8 entries, expected 7."),
        (changed(2, "0,1,5.0,0.0,wide,1.0,0.0"), "Line 3 must have a number for sigma (px)"),
        (changed(2, "0,1.0,5.0,0.0,1.0,1.0,0.0"), "Line 3 must have a channel counted from 0"),
        (changed(2, "-1,1,5.0,0.0,1.0,1.0,0.0"), "Line 3 must have a filter counted from 0"),
        (changed(2, "999999999,1,5.0,0.0,1.0,1.0,0.0"), "Line 3 must have a filter counted from 0"),
        (changed(2, GOOD[1]), "Line 3 has filter 0 and channel 0 for the second time."),
        (changed(2, None), "has 3 rows, expected 4: one for each of 2 x 2 filters and channels."),
        (changed(2, "0,1,5.0,0.0,-1.0,1.0,0.0"), "sigma must be positive and finite (px), got -1"),
        (changed(2, "0,1,5.0,nan,1.0,1.0,0.0"), "phase must be finite"),
    ],
)
def test_a_wrong_table_is_told_in_one_line(text, message):
    with pytest.raises(ValueError, match=r"\w") as error:
        from_csv(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# -- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Gabor1d, Gabor2d, Gabor3d])
def test_files_come_back(kind, tmp_path):
    record = random_record(kind, 3, 1, dtype=torch.float32)
    write_params(record, tmp_path / "a.json")
    assert same(read_params(tmp_path / "a.json"), record)
    write_params(record, tmp_path / "a.CSV")
    assert same(read_params(tmp_path / "a.CSV", dtype=torch.float32), record)


def test_a_layers_json_is_its_record(tmp_path):
    layer = GaborConv2d(3, 4, 9)
    write_params(layer, tmp_path / "a.json")
    assert same(read_params(tmp_path / "a.json"), layer.params.detach())


def test_bad_files_are_told(tmp_path):
    record = random_record(Gabor2d, 2)
    with pytest.raises(
        ValueError, match=r"^Parameters go into \.json or \.csv files, got 'a\.txt'"
    ):
        write_params(record, "a.txt")
    with pytest.raises(ValueError, match=r"^words='opencv' are for a \.csv file, got"):
        write_params(record, tmp_path / "a.json", "opencv")
    write_params(record, tmp_path / "a.csv")
    before = (tmp_path / "a.csv").read_bytes()
    with pytest.raises(ValueError, match="sigma must be"):
        write_params(record.replace(sigma=-record.sigma), tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes() == before
    for name, data in {
        "bytes.csv": b"\xff\xfe\0",
        "bytes.json": b"\xff\xfe\0",
        "words.json": b"[1, 2]",
        "deep.json": b"[" * 100_000,
        "huge.csv": b"a" * 200_000,
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}': ") as error:
            read_params(tmp_path / name)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 700
    with pytest.raises(FileNotFoundError):
        read_params(tmp_path / "nothing.csv")
