"""The page of an export shows the filters with their numbers, and code that reads every file."""

import json
import re
from html import escape, unescape
from pathlib import Path

import pytest
import torch

from gaborium import Gabor2d, GaborConv1d, GaborConv2d, GaborConv3d, MixedConv, gabor
from gaborium.export import load_layer, write_formats
from gaborium.export.folders import FORMATS
from gaborium.layers import PairEnergy
from gaborium.reporting import report_export, write_export
from gaborium.training import Inputs, Recipe, Trained, build_network, make_first_layer

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

HOSTILE = "</script><script>alert('x')</script><img src=http://example.com/x.png>"


def cells(page: str) -> list[list[str]]:
    """The texts of the table of parameters, row by row."""
    found = re.findall(r"<tr>(.*?)</tr>", page.partition("<tbody>")[2], re.DOTALL)
    return [[unescape(t) for t in re.findall(r'data-by="[^"]*">(.*?)</td>', row)] for row in found]


def run_codes(page: str) -> dict[str, dict[str, object]]:
    """Run what the page says of each file, and return the variables it makes, by file."""
    found = {}
    for article in re.findall(r'<article class="file">(.*?)</article>', page, re.DOTALL):
        (name,) = re.findall(r"<h3>(.*?)</h3>", article)
        (code,) = re.findall(r"<pre><code>(.*?)</code></pre>", article, re.DOTALL)
        found[name] = {}
        exec(unescape(code), found[name])
    return found


def trained(kind: str, network: str = "cnn", n_channels: int = 1) -> Trained:
    output = "real" if network == "cnn" else "energy"
    first = make_first_layer(
        kind, n_dims=2, in_channels=n_channels, n_filters=4, kernel_size=5, output=output
    )
    model = build_network(network, first=first, image_size=(16, 20), n_classes=2)
    inputs = Inputs((16, 20), ("up", HOSTILE), (0.5,) * n_channels, (0.25,) * n_channels)
    return Trained(model.eval(), Recipe(), kind, 0, inputs)


@pytest.mark.parametrize(
    "layer",
    [
        GaborConv2d(3, 4, 9, padding="same", padding_mode="reflect"),
        GaborConv2d(1, 4, (7, 9), output="energy", dtype=torch.float64),
        GaborConv2d(2, 4, 5, output="quadrature", bias=False),
        MixedConv(GaborConv2d(1, 2, 5), 3),
    ],
    ids=["colour", "energy", "quadrature", "mixed"],
)
def test_the_code_of_every_form_reads_its_file(layer, tmp_path, monkeypatch):
    for package in ("onnxscript", "onnxruntime", "skimage", "cv2"):
        pytest.importorskip(package)
    write_export(layer, tmp_path, FORMATS, size=20, facts={})
    monkeypatch.chdir(tmp_path)
    found = run_codes((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert list(found) == list(FORMATS.values())
    image = torch.rand(2, layer.in_channels, 20, 20, dtype=layer.weight.dtype)
    assert torch.equal(found["layer.safetensors"]["layer"](image), layer(image))
    assert torch.equal(found["plain.safetensors"]["layer"](image), layer(image))
    inner = layer.gabor if isinstance(layer, MixedConv) else layer
    for name in ("params.json", "params.csv"):
        assert found[name]["params"].isclose(inner.params.detach().expand()).all()
    kernel = torch.from_numpy(found["opencv.csv"]["kernel"])
    assert torch.allclose(kernel, inner.weight[0, 0].double(), atol=1e-6)
    kernel = torch.from_numpy(found["skimage.csv"]["kernel"])
    wanted = gabor(inner.params.detach()[0, :1], tuple(kernel.shape))[0]
    assert torch.allclose(kernel, wanted.double(), atol=1e-6)
    assert found["layer.onnx"]["responses"].shape[:2] == (2, layer.out_channels)


@pytest.mark.parametrize("network", ["cnn", "energy"])
@pytest.mark.parametrize("kind", ["gabor", "mixed", "free"])
def test_the_code_of_a_network_reads_its_files(kind, network, tmp_path, monkeypatch):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    source = trained(kind, network, n_channels=3)
    dtype = torch.float64 if kind == "mixed" else torch.float32
    source.network.to(dtype)
    write_export(source, tmp_path, facts={})
    monkeypatch.chdir(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = run_codes(page)
    dark = source.network(source.preprocess(torch.zeros(2, 3, 16, 20, dtype=torch.uint8))).float()
    scores = torch.from_numpy(found["network.onnx"]["scores"])
    assert torch.allclose(scores, dark, atol=1e-5)
    assert found["network.onnx"]["classes"] == [source.inputs.classes[i] for i in dark.argmax(1)]
    record = json.loads(Path("result.json").read_text(encoding="utf-8"))
    n_gabor, n_free = {"gabor": (4, 0), "mixed": (2, 2), "free": (0, 4)}[kind]
    assert page.count('alt="filter ') == len(cells(page)) == n_gabor
    assert page.count('alt="free filter ') == n_free
    assert record["filters"] == {"gabor": n_gabor, "free": n_free, "size": [5, 5]}


def test_the_table_has_the_numbers_of_the_strongest_channel(tmp_path):
    start = Gabor2d.of(
        orientation=[[0.5], [1.0]], wavelength=[[4.0], [5.0]], sigma=1.5,
        phase=[[0.0, 1.0], [-0.5, 0.0]], amplitude=[[0.1, 0.3], [-2.0, 1.0]],
    )  # fmt: skip
    layer = GaborConv2d(2, 2, 9, start=start)
    write_formats(layer, tmp_path, ["csv"])
    page = report_export(layer, tmp_path)
    first, second = cells(page)
    assert first == ["0", "28.6", "4.000", "57.3", "1.500", "1.000", "0.3000"]
    assert [second[0], second[1], second[2], second[6]] == ["1", "57.3", "5.000", "2.000"]
    assert "Of the 2 channels of a filter it is the one of largest amplitude" in page


def test_a_centre_has_columns_where_it_is_used(tmp_path):
    start = Gabor2d.of(
        orientation=[[0.5]], wavelength=4.0, sigma=1.5, center=torch.tensor([[[1.0, -0.5]]])
    )
    layer = GaborConv2d(1, 1, 9, start=start, learn=("center",))
    write_formats(layer, tmp_path, ["csv"])
    page = report_export(layer, tmp_path)
    assert cells(page)[0][-2:] == ["1.000", "−0.5000"]
    assert "centre y" in page


@pytest.mark.parametrize("layer", [GaborConv1d(1, 3, 21), GaborConv3d(2, 3, 5)])
def test_sounds_and_volumes_have_a_page(layer, tmp_path):
    write_export(layer, tmp_path, facts={})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('alt="filter ') == len(cells(page)) == 3
    assert ("elevation" in page) == (layer.n_dims == 3)


def test_the_page_refers_to_nothing_outside_and_shows_texts_as_texts(tmp_path):
    source = trained("gabor")
    write_export(source, tmp_path, ["layer", "plain"], facts={"file": HOSTILE})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in page
    assert page.count(escape(HOSTILE, quote=False)[:20]) >= 2  # a fact and a class
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    record = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    for name, digest in record["files"].items():
        assert name in page
        assert digest in page


def test_what_cannot_be_written_is_told(tmp_path):
    with pytest.raises(TypeError, match="must be a Gabor layer or a Trained network, got Conv2d"):
        write_formats(torch.nn.Conv2d(1, 2, 3), tmp_path)
    with pytest.raises(ValueError, match="size is for a layer; this network takes images of 16 x"):
        write_formats(trained("gabor"), tmp_path, size=5)
    with pytest.raises(ValueError, match="formats must be one of"):
        write_formats(GaborConv1d(1, 2, 5), tmp_path, ["png"])
    assert list(tmp_path.iterdir()) == []


def test_the_layer_of_a_pair_is_saved_as_what_it_is(tmp_path):
    source = trained("mixed", "energy")
    assert isinstance(source.network.first, PairEnergy)
    write_formats(source, Path(tmp_path), ["layer"])
    assert isinstance(load_layer(tmp_path / "layer.safetensors"), MixedConv)
