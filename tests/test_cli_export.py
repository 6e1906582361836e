"""``gaborium export`` as a person meets it: the files, and one line where there are none."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("cyclopts", reason="the command line needs the cli extra")
from commands import one_line, run
from gaborium import GaborConv1d, GaborConv2d, GaborConv3d, MixedConv
from gaborium.export import folders as forms
from gaborium.export import load_layer, read_params, save_layer, to_plain
from gaborium.training import Recipe, load_trained, train

pytestmark = pytest.mark.usefixtures("empty_folder")

safetensors = pytest.importorskip("safetensors.torch")


TINY = Recipe(
    n_filters=4, kernel_size=5, epochs=1, batch_size=7, seeds=(3, 1), compare_with=("free",),
    accelerator="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(stripes, tmp_path_factory) -> Path:
    """The folder of a training."""
    pytest.importorskip("lightning_fabric")
    folder = tmp_path_factory.mktemp("runs") / "mine"
    train(TINY, dataset=stripes, folder=folder)
    return folder


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
    names = {path.name for path in folder.iterdir()}
    assert names == {*forms.FORMATS.values(), "result.json", "report.html"}
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
    assert names == {"params.json", "params.csv", "plain.safetensors", "result.json", "report.html"}


def test_bad_input_is_one_line_and_leaves_nothing(layer, capsys):
    Path("text").write_text("orientation\n" * 9)
    save_layer(GaborConv1d(1, 1, 5), "sound")
    for tokens, message in {
        ("nothing",): "No layer at 'nothing'; check the path",
        ("text",): "is not a layer of save_layer",
        ("first.safetensors", "--size", "0"): "--size must be at least 1, got 0",
        ("first.safetensors", "--name", "a/b"): "--name must be a plain folder name",
        (
            "first.safetensors",
            "--variant",
            "gabor",
        ): "--variant is an option of a training's folder",
        ("first.safetensors", "--seed", "0"): "--seed is an option of a training's folder",
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


# -- trained networks ---------------------------------------------------------------------------


def test_a_trained_network_is_written_whole(trained, stripes, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert run("export", trained) == 0
    folder = Path("runs/export")
    names = {"layer.safetensors", "params.json", "params.csv", "plain.safetensors", "network.onnx"}
    assert {path.name for path in folder.iterdir()} == names | {"result.json", "report.html"}
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.splitlines()[-1] == f"All runs: {Path('runs', 'index.html')}"
    assert 'href="export/report.html"' in Path("runs/index.html").read_text(encoding="utf-8")

    mine = load_trained(trained)
    first = load_layer(folder / "layer.safetensors")
    assert torch.equal(first.weight, mine.network.first.weight)
    assert read_params(folder / "params.json").isclose(first.params.detach()).all()
    plain = to_plain(load_trained(trained, seed=1).network).eval()  # of other numbers
    plain.load_state_dict(safetensors.load_file(folder / "plain.safetensors"))
    seen = mine.preprocess(stripes.test_images)
    assert torch.equal(plain(seen), mine.network(seen))

    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert (record["facts"]["first layer"], record["facts"]["seed"]) == ("gabor", "3")
    file = trained / "gabor-3/network.safetensors"
    assert record["facts"]["SHA-256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    wanted = record["input"]
    assert (wanted["n_channels"], wanted["size"], wanted["classes"]) == (
        1,
        [12, 12],
        ["up", "flat"],
    )
    images = stripes.test_images.numpy() / wanted["divided_by"]
    images = ((images - wanted["mean"]) / wanted["std"]).astype("float32")
    session = onnxruntime.InferenceSession(folder / "network.onnx")
    for some in (images, images[:1]):
        (scores,) = session.run(None, {session.get_inputs()[0].name: some})
        with torch.no_grad():
            expected = mine.network(mine.preprocess(stripes.test_images[: len(some)])).numpy()
        assert abs(scores - expected).max() <= 1e-6


def test_side_and_seed_choose_the_network(trained):
    for name, options, path in (
        ("one", ("--seed", 1), "gabor-1"),
        ("two", ("--variant", "free", "--seed", 1), "free-1"),
        ("three", (), "free-1/network.safetensors"),
    ):
        file = trained / path if name == "three" else trained
        assert run("export", file, *options, "--name", name, "--formats", "plain") == 0
        tensors = safetensors.load_file(Path("runs", name, "plain.safetensors"))
        network = load_trained(trained / path.partition("/")[0]).network
        assert torch.equal(tensors["first.weight"], network.first.weight)


def test_a_network_without_a_gabor_layer_has_no_parameters(trained, capsys):
    pytest.importorskip("onnxscript")
    assert run("export", trained, "--variant", "free") == 0
    names = {path.name for path in Path("runs/export").iterdir()}
    assert names == {"plain.safetensors", "network.onnx", "result.json", "report.html"}
    capsys.readouterr()
    assert run("export", trained, "--variant", "free", "--formats", "csv", "--name", "other") == 2
    assert "its formats are 'plain', 'onnx', got 'csv'" in one_line(capsys)
    assert not Path("runs/other").exists()


@pytest.mark.filterwarnings("default")
def test_without_onnx_the_graph_is_left_out_with_a_note(trained, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert run("export", trained) == 0
    assert "Note: network.onnx is left out: ONNX files need onnx: pip" in one_line(capsys)
    assert not Path("runs/export/network.onnx").exists()
    assert run("export", trained, "--formats", "onnx", "--name", "other") == 2
    assert "ONNX files need onnx" in one_line(capsys)
    assert not Path("runs/other").exists()


def test_a_network_that_is_not_there_is_one_line(trained, capsys):
    Path("other").mkdir()
    shutil.copytree(trained, "half")
    shutil.rmtree("half/free-3")
    shutil.copytree(trained, "damaged")
    file = Path("damaged/gabor-3/network.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    Path("cut.safetensors").write_bytes(data[:-100])
    checkpoint = next((trained / "gabor-3").glob("checkpoint-*"))
    for tokens, message in {
        ("missing",): "No layer at 'missing'; check the path",
        ("other",): "'other' holds neither recipe.toml nor network.safetensors",
        ("half", "--variant", "free"): "seed 3: its training has not ended; train again",
        ("damaged",): "is damaged: its checksum is wrong",
        ("cut.safetensors",): "or is damaged",
        (trained, "--variant", "mixed"): "variant must be one of 'gabor', 'free', got 'mixed'",
        (trained, "--seed", 7): "seed must be one of 3, 1",
        (trained, "--size", 32): "--size is no option of a network",
        (checkpoint,): "expected a saved layer",
        (trained / "recipe.toml",): "is not a layer of save_layer",
    }.items():
        assert run("export", *tokens) == 2
        assert message in one_line(capsys)
        assert not Path("runs").exists()
