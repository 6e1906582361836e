"""Saved layers come back exactly, and a damaged or foreign file is told in one line."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import re
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from gaborium import Gabor2d, GaborConv1d, GaborConv2d, GaborConv3d, MixedConv, files
from gaborium import gabor as sample
from gaborium.export import load_layer, save_layer

safetensors = pytest.importorskip("safetensors.torch")

START = Gabor2d.of(orientation=[0.3, 1.1], wavelength=[5.0, 7.0], sigma=2.0, dtype=torch.float64)
OLD = Path(__file__).parent / "data" / "layer_format_1.safetensors"

LAYERS = {
    "plain": lambda: GaborConv2d(3, 8, 9),
    "every argument": lambda: GaborConv2d(
        *(4, 8, (7, 9), (2, 1), (3, 0), (1, 2), 2, False, "reflect"),
        dtype=torch.float64,
        learn=("orientation", "phase"),
        coordinates="textbook",
        geometry="pair",
        start="random",
        seed=7,
        dc="remove",
        unit_norm=True,
        output="quadrature",
        min_wavelength=2.5,
    ),
    "a record as start": lambda: GaborConv2d(1, 2, "auto", padding="same", start=START),
    "energy": lambda: GaborConv1d(2, 4, 15, output="energy", learn=()),
    "bfloat16": lambda: GaborConv3d(1, 2, 5, dtype=torch.bfloat16),
    "mixed": lambda: MixedConv(GaborConv2d(3, 4, 7, stride=2), 3, order=[6, 5, 0, 1, 2, 3, 4]),
    "mixed without bias": lambda: MixedConv(
        GaborConv1d(2, 4, 9, bias=False, output="quadrature"), torch.ones(2, 2, 9), seed=3
    ),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    made = LAYERS[request.param]()
    with torch.no_grad():  # as after training: nothing is where the start had put it
        for value in made.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return made


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r"\w") as error:
        load_layer(path)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    assert text.startswith(repr(str(path)))
    return text


def header_of(data: bytes) -> tuple[dict, dict, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    return header, json.loads(header["__metadata__"]["gaborium"]), data[end:]


def with_facts(path: Path, target: Path, change, *, tensors: dict | None = None) -> Path:
    """A file that says something else, and is whole: its checksum is right."""
    _, facts, _ = header_of(path.read_bytes())
    change(facts)
    facts.pop("sha256")
    kept = safetensors.load(path.read_bytes())
    files.write_tensors(target, tensors or kept, facts)
    return target


# -- round trips ------------------------------------------------------------------------------


def test_a_layer_comes_back_exactly(layer, tmp_path):
    save_layer(layer, tmp_path / "layer.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_layer(tmp_path / "layer.safetensors")
    assert type(again) is type(layer)
    assert repr(again) == repr(layer)
    one, two = layer.state_dict(), again.state_dict()
    assert list(one) == list(two)
    for name, value in one.items():
        assert value.dtype == two[name].dtype
        assert torch.equal(value, two[name]), name
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in again.named_parameters()]
    inner, other = getattr(layer, "gabor", layer), getattr(again, "gabor", again)
    image = torch.rand(2, inner.in_channels, *[24] * inner.n_dims).to(inner.log_sigma.dtype)
    assert torch.equal(layer(image), again(image))
    # Starting again from a seed or a record is the same, too.
    for one in (inner, other):
        torch.manual_seed(5)
        one.reset_parameters()
    assert torch.equal(inner.weight, other.weight)


def test_equal_layers_make_equal_bytes(layer, tmp_path):
    save_layer(layer, tmp_path / "a")
    again = load_layer(tmp_path / "a")
    save_layer(again, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_extreme_values_come_back(tmp_path):
    layer = GaborConv2d(1, 3, 5, min_wavelength=3.0)
    with torch.no_grad():
        layer.log_sigma.copy_(torch.tensor([[1e30], [-1e30], [float("nan")]]))
        layer.angular_wave_vector.mul_(1e20)
    save_layer(layer, tmp_path / "a")
    again = load_layer(tmp_path / "a")
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)


def test_a_tensor_keeps_a_dtype_of_its_own(tmp_path):
    layer = GaborConv2d(1, 2, 5)
    layer.bias = nn.Parameter(torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    save_layer(layer, tmp_path / "a")
    assert torch.equal(load_layer(tmp_path / "a").bias, layer.bias)


def test_what_is_frozen_stays_frozen(tmp_path):
    layer = GaborConv2d(1, 2, 5)
    layer.even.requires_grad_(False)
    save_layer(layer, tmp_path / "a")
    assert [n for n, p in load_layer(tmp_path / "a").named_parameters() if not p.requires_grad] == [
        "even"
    ]


def test_every_argument_of_the_constructor_is_kept(tmp_path):
    """A new argument comes into the file by itself; then FORMAT must be raised."""
    save_layer(GaborConv2d(1, 2, 5), tmp_path / "a")
    _, facts, _ = header_of((tmp_path / "a").read_bytes())
    assert {*facts["arguments"], "device"} == set(inspect.signature(GaborConv2d).parameters)
    assert len(facts["arguments"]) == 19, "raise FORMAT, keep a reader for the old one"


def test_the_metadata_is_what_the_docstring_says(tmp_path):
    save_layer(GaborConv2d(3, 8, 9, stride=2), tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    _, facts, _ = header_of(data)
    assert facts["name"] == "gaborium.layer"
    assert (facts["format"], facts["class"], facts["frozen"]) == (1, "GaborConv2d", [])
    assert facts["arguments"]["stride"] == [2, 2]
    assert facts["units"]["sigma"] == "px"
    blank = data.replace(facts["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(blank).hexdigest() == facts["sha256"]
    # Anybody's reader of safetensors finds the state dict.
    assert set(safetensors.load(data)) == set(GaborConv2d(3, 8, 9).state_dict())


def test_the_oldest_format_loads():
    layer = load_layer(OLD)
    assert repr(layer.gabor) == repr(GaborConv2d(2, 2, 5, padding=1, dtype=torch.float64))
    expected = sample(layer.gabor.params, 5)
    torch.testing.assert_close(layer.weight[[1, 0]], expected, rtol=0, atol=1e-12)
    assert layer.order.tolist() == [1, 0, 2]
    torch.testing.assert_close(
        layer.gabor.params.orientation[:, 0],
        torch.tensor([0.3, 1.1], dtype=torch.float64),
        rtol=0,
        atol=1e-12,  # kept as a wave vector
    )
    assert layer.free.flatten()[:3].tolist() == [0.0, 0.125, 0.25]


# -- what cannot be saved ---------------------------------------------------------------------


class Derived(GaborConv2d):
    pass


@pytest.mark.parametrize("module", [nn.Conv2d(1, 1, 3), Derived(1, 1, 3), "no layer"], ids=repr)
def test_other_modules_are_refused(module, tmp_path):
    with pytest.raises((TypeError), match=r"^layer must be a GaborConv1d, .* got \w+; save the"):
        save_layer(module, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    save_layer(GaborConv2d(1, 2, 5), tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_layer(GaborConv2d(1, 2, 7), tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == before


# -- damaged and foreign files ----------------------------------------------------------------


@pytest.fixture
def good(tmp_path: Path) -> Path:
    save_layer(GaborConv2d(3, 4, 5, seed=0), tmp_path / "good")
    return tmp_path / "good"


@pytest.mark.parametrize(
    "change",
    [
        {"in_channels": 3 << 30},
        {"out_channels": 4 << 30},
        {"out_channels": -4},
        {"out_channels": 4.0},
        {"groups": 0},
        {"kernel_size": [1 << 40, 1 << 40]},
        {"kernel_size": []},
        {"kernel_size": None},
        {"stride": "many"},
        {"stride": [2]},
        {"dilation": [0.5, 1]},
        {"padding_mode": "none"},
        {"dtype": "load"},
        {"dtype": 3},
        {"start": "nowhere"},
        {"start": {"type": "Gabor3d"}},
        {"learn": ["everything"]},
        {"coordinates": "polar"},
        {"unknown": 1},
        {"bias": False},
        {"min_wavelength": -1.0},
    ],
    ids=str,
)
def test_arguments_that_make_no_such_layer_are_told(change, good, tmp_path):
    bad = with_facts(good, tmp_path / "bad", lambda facts: facts["arguments"].update(change))
    tracemalloc.start()
    try:
        text = refusal(bad)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert re.search("does not hold a whole layer .*; save the layer again with save_layer", text)


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.pop("class"),
        lambda facts: facts.update({"class": "Linear"}),
        lambda facts: facts.update({"class": "MixedConv"}),
        lambda facts: facts.update({"class": ["GaborConv2d"]}),
        lambda facts: facts.update({"arguments": None}),
        lambda facts: facts["arguments"].pop("min_wavelength"),
        lambda facts: facts.update({"frozen": ["nothing"]}),
        lambda facts: facts.update({"frozen": 3}),
    ],
)
def test_facts_that_make_no_layer_are_told(change, good, tmp_path):
    assert "does not hold a whole layer" in refusal(with_facts(good, tmp_path / "bad", change))


def test_tensors_that_do_not_fit_are_told(good, tmp_path):
    tensors = safetensors.load(good.read_bytes())
    for name in tensors:
        fewer = {key: value for key, value in tensors.items() if key != name}
        bad = with_facts(good, tmp_path / "bad", lambda _: None, tensors=fewer)
        assert "does not hold a whole layer" in refusal(bad)
        other = tensors | {name: torch.zeros(5, 5, 5)}
        bad = with_facts(good, tmp_path / "bad", lambda _: None, tensors=other)
        assert "does not hold a whole layer" in refusal(bad)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^No layer at '.*nothing'; check the path"):
        load_layer(tmp_path / "nothing")
