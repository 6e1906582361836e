"""``gaborium export`` as a person meets it: the files, and one line where there are none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("cyclopts", reason="the command line needs the cli extra")
from commands import one_line, run
from gaborium import GaborConv1d, GaborConv2d, GaborConv3d, MixedConv
from gaborium.export import folders as forms
from gaborium.export import read_params, save_layer, to_plain

pytestmark = pytest.mark.usefixtures("empty_folder")

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def layer(empty_folder: Path) -> GaborConv2d:
    layer = GaborConv2d(3, 4, 9, output="energy")
    save_layer(layer, "first.safetensors")
    return layer


def test_every_form_is_written(layer, capsys):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    every = [*forms.FORMATS]
    assert run("export", "first.safetensors", "--formats", *every, "--size", 20) == 0
    folder = Path("runs", "export")
    assert {path.name for path in folder.iterdir()} == {*forms.FORMATS.values(), "result.json"}
    printed = capsys.readouterr()
    assert printed.err == ""
    assert all(str(path) in printed.out for path in folder.iterdir())

    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert (record["format"], record["version"]) == ("gaborium.export", 1)
    assert record["facts"]["file"] == "first.safetensors"
    data = Path("first.safetensors").read_bytes()
    assert record["facts"]["SHA-256"] == hashlib.sha256(data).hexdigest()
    for name, digest in record["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest

    for name in ("params.json", "params.csv", "skimage.csv", "opencv.csv"):
        assert read_params(folder / name).isclose(layer.params.detach().expand()).all()
    plain = to_plain(layer)
    torch.nn.init.zeros_(plain.pairs.weight)
    plain.load_state_dict(safetensors.load_file(folder / "plain.safetensors"))
    image = torch.rand(1, 3, 20, 20)
    assert torch.equal(plain(image), layer(image))


@pytest.mark.parametrize(
    "layer",
    [GaborConv1d(2, 4, 9), GaborConv3d(1, 2, 5), MixedConv(GaborConv2d(1, 2, 5), 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_other_layers_are_written(layer):
    save_layer(layer, "layer")
    assert run("export", "layer", "--name", "mine", "--out", "there") == 0
    names = {path.name for path in Path("there", "mine").iterdir()}
    assert names == {"params.json", "params.csv", "plain.safetensors", "result.json"}


def test_bad_input_is_one_line_and_leaves_nothing(layer, capsys):
    Path("text").write_text("orientation\n" * 9)
    save_layer(GaborConv1d(1, 1, 5), "sound")
    for tokens, message in {
        ("nothing",): "No layer at 'nothing'; check the path",
        ("text",): "is not a layer of save_layer",
        ("first.safetensors", "--size", "0"): "--size must be at least 1, got 0",
        ("first.safetensors", "--name", "a/b"): "--name must be a plain folder name",
        ("first.safetensors", "--formats", "png"): 'Invalid value "png" for --formats',
        ("sound", "--formats", "json", "opencv"): "OpenCV has two-dimensional Gabor functions",
    }.items():
        assert run("export", *tokens) == 2
        assert message in one_line(capsys)
        assert not Path("runs").exists()


def test_a_graph_of_images_too_small_is_told(layer, capsys):
    pytest.importorskip("onnxscript")
    assert run("export", "first.safetensors", "--formats", "json", "onnx", "--size", "5") == 2
    assert "does not run on the example" in one_line(capsys)
    assert not Path("runs").exists()


def test_an_earlier_run_stays_unless_it_is_to_be_replaced(layer, capsys):
    assert run("export", "first.safetensors", "--formats", "json") == 0
    before = {path.name: path.read_bytes() for path in Path("runs/export").iterdir()}
    assert run("export", "first.safetensors") == 2
    assert "--overwrite" in one_line(capsys)
    save_layer(GaborConv2d(1, 1, 5, unit_norm=True), "unit")
    assert run("export", "unit", "--formats", "json", "opencv", "--overwrite") == 2
    assert "give layer.params" in one_line(capsys)
    assert {path.name: path.read_bytes() for path in Path("runs/export").iterdir()} == before
    assert run("export", "unit", "--overwrite") == 0
    assert {path.name for path in Path("runs/export").iterdir()} > {"params.csv"}


def test_an_interrupted_run_leaves_nothing(layer, capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(forms, "_write_plain", interrupted)
    assert run("export", "first.safetensors") == 130
    assert "Interrupted" in one_line(capsys)
    assert not Path("runs").exists()
