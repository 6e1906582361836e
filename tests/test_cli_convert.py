"""``gaborium convert`` as a person meets it: a layer of a file, before and after."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

import commands

pytest.importorskip("cyclopts", reason="the command line needs the cli extra")
from gaborium import Gabor2d, GaborConv2d, MixedConv, gabor
from gaborium.storage import load_layer

pytest.importorskip("safetensors")


def run(*tokens: object, figures: bool = False) -> int:
    return commands.run("convert", "--n-starts", "2", *tokens, figures=figures)


@pytest.fixture
def weights(empty_folder: Path) -> dict[str, torch.Tensor]:
    """A network's, of whose three filters the first two are Gabor functions."""
    shapes = Gabor2d.of(orientation=[0.3, 1.4], wavelength=[4.0, 5.0], sigma=1.7)
    draw = torch.Generator().manual_seed(0)
    kernels = torch.cat([gabor(shapes, 9), torch.randn(1, 9, 9, generator=draw)]).unsqueeze(1)
    state = {
        "stem.weight": kernels.expand(-1, 3, -1, -1).clone(),
        "head.weight": torch.randn(2, 3, 3, 3, generator=draw),
    }
    torch.save(state, "net.pt")
    return state


def photographs(folder: Path) -> Path:
    from PIL import Image
    from skimage import data

    folder.mkdir()
    Image.fromarray(data.camera()[:90, :120]).save(folder / "grey.png")
    Image.fromarray(data.astronaut()[:128, :100]).save(folder / "colour.png")
    return folder


def test_waves_are_converted_and_the_weights_are_those_of_the_network(weights, capsys):
    assert run("net.pt", "--key", "stem.weight", "--stride", 2, figures=True) == 0
    folder, record = Path("runs", "convert"), commands.written("convert")
    layer = load_layer(folder / "layer.safetensors")
    assert isinstance(layer, MixedConv)
    assert layer.is_gabor.tolist() == [True, True, False]
    assert layer.stride == (2, 2)
    from safetensors.torch import load_file

    after = load_file(folder / "weights.safetensors")
    assert set(after) == set(weights)
    assert torch.equal(after["head.weight"], weights["head.weight"])
    assert torch.equal(after["stem.weight"], layer.weight.detach())
    assert torch.allclose(after["stem.weight"], weights["stem.weight"], atol=1e-4)
    assert record["format"] == "gaborium.conversion"
    assert [row["is_gabor"] for row in record["result"]["filters"]] == [True, True, False]
    with (folder / "result.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["wavelength"]) for row in rows[:2]] == pytest.approx([4.0, 5.0], abs=1e-3)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "</html>" in page
    assert (folder / "conversion.png").stat().st_size > 0
    assert (
        "Gabor functions replace 2 of 3 filters (67 %); the layer had 729 parameters, now 267. "
        "A filter is converted where its Gabor function explains at least 80 % of the variance of "
        "its kernel. Explained variance of the converted filters: median 100 %, worst 100 %."
    ) in commands.shown(capsys)


@pytest.mark.filterwarnings("default")  # shown, as to a user
def test_with_images_the_responses_are_kept_and_a_new_bias_is_told(weights, empty_folder, capsys):
    folder = photographs(empty_folder / "pictures")
    assert run("net.pt", "--key", "stem.weight", "--images", folder, "--threshold", 0) == 0
    layer = load_layer("runs/convert/layer.safetensors")
    assert isinstance(layer, GaborConv2d)
    assert layer.bias is not None
    record = commands.written("convert")
    errors = [row["response_error"] for row in record["result"]["filters"]]
    assert max(errors[:2]) < 1e-2 < errors[2]
    assert record["facts"]["images"] == f"2 from {folder}"
    note = "Note: weights.safetensors has a new bias 'stem.bias', for the responses' means.\n"
    assert commands.one_line(capsys) == note


def test_where_nothing_is_converted_all_stays_and_it_is_said(weights, capsys):
    assert run("net.pt", "--key", "head.weight", "--threshold", 0.99) == 0
    assert not Path("runs/convert/layer.safetensors").exists()
    from safetensors.torch import load_file

    after = load_file("runs/convert/weights.safetensors")
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert "Gabor functions replace 0 of 2 filters (0 %); the layer had 54 parameters, now 54." in (
        commands.shown(capsys)
    )


def test_the_network_of_a_script_is_converted_with_the_stride_that_it_has(empty_folder):
    Path("mine.py").write_text(
        "import torch\nfrom gaborium import Gabor2d, gabor\n\ndef setup():\n"
        "    conv = torch.nn.Conv2d(1, 3, 7, stride=2)\n"
        "    edges = Gabor2d.of(orientation=[[0.3], [1.4]], wavelength=3.5, sigma=1.4)\n"
        "    conv.weight.data[:2] = gabor(edges, 7)\n"
        "    return torch.nn.Sequential(conv, torch.nn.ReLU())\n"
    )
    assert run("mine.py") == 0
    layer = load_layer("runs/convert/layer.safetensors")
    assert layer.stride == (2, 2)
    assert layer.is_gabor[:2].tolist() == [True, True]
    from safetensors.torch import load_file

    assert torch.equal(load_file("runs/convert/weights.safetensors")["0.weight"], layer.weight)


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (["none.pt"], "No such file or directory: 'none.pt'"),
        (["net.pt", "--key", "stem.wieght"], "no array 'stem.wieght', only 'stem.weight' (3 × 3"),
        (
            ["net.pt", "--key", "stem", "--threshold", "90"],
            "--threshold must be from 0 to 1, got 90",
        ),
        (["net.pt", "--key", "stem", "--filters", "3"], "filters must be"),
        (["net.pt", "--key", "stem", "--stride", "0"], "--stride must be at least 1, got 0."),
        (["net.pt", "--key", "stem", "--images", "none"], "No such file or directory: 'none'"),
        (["graph.onnx"], "'graph.onnx' cannot be read"),
        (["cut.safetensors"], "'cut.safetensors' cannot be read"),
        (["huge.safetensors"], "'huge.safetensors' cannot be read"),
        (["small.pt"], "has shape 2 × 1 × 1 × 1, expected kernels of 2 dimensions (--n-dims) of 2"),
        (["complex.pt"], "'complex.pt' cannot be read: it holds no arrays of real numbers."),
        (["nan.pt"], "be finite"),
        (["linear.pt"], "has shape 5, expected kernels of 2 dimensions"),
        (["five.pt", "--images", "net.pt"], "--images needs kernels of 1 or 3 channels and 2 dim"),
    ],
)
def test_bad_input_is_told_in_one_line_and_nothing_is_written(weights, capsys, tokens, told):
    torch.save({"weight": torch.ones(2, 5, 3, 3)}, "five.pt")
    Path("graph.onnx").write_bytes(b"graph")
    from safetensors.torch import save

    whole = save({"weight": torch.ones(2, 1, 5, 5)})
    Path("cut.safetensors").write_bytes(whole[:-40])
    Path("huge.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + whole[8:])
    broken = torch.ones(2, 1, 5, 5)
    broken[1, 0, 0, 0] = torch.nan
    torch.save({"weight": broken}, "nan.pt")
    torch.save({"weight": torch.ones(2, 1, 1, 1)}, "small.pt")
    torch.save({"weight": torch.ones(2, 1, 5, 5, dtype=torch.complex64)}, "complex.pt")
    torch.save({"weight": torch.ones(5)}, "linear.pt")
    assert run(*tokens) == 2
    assert told in commands.one_line(capsys)
    assert not Path("runs").exists()
    assert not Path("pwned").exists()
