"""Models in folders of the Hub's form: round trips without a network, and what is refused."""

from __future__ import annotations

import copy
import json
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from gaborium import Gabor2d, GaborConv1d, GaborConv2d, GaborConv3d
from gaborium.export import add_hub, to_plain

pytest.importorskip("huggingface_hub")
safetensors = pytest.importorskip("safetensors.torch")

START = Gabor2d.of(orientation=[0.3, 1.1], wavelength=[5.0, 7.0], sigma=1.5, dtype=torch.float64)


@add_hub
class Network(nn.Module):
    """One of a user's own."""

    def __init__(
        self, n_filters: int = 4, *, kernel_size: int = 7, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.first = GaborConv2d(1, n_filters, kernel_size, dtype=dtype)
        self.norm = nn.BatchNorm2d(n_filters, dtype=dtype)
        self.last = nn.Linear(n_filters, 2, dtype=dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(input)).mean((2, 3)))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(
        value.dtype == theirs[name].dtype and torch.equal(value, theirs[name])
        for name, value in mine.items()
    )


@pytest.mark.parametrize(
    ("kind", "args", "arguments"),
    [
        (GaborConv2d, (3, 8), {"kernel_size": 9}),
        (GaborConv1d, (2, 4, 15, 2), {"learn": {"phase", "sigma"}, "output": "energy"}),
        (GaborConv3d, (1, 2, (3, 5, 7)), {"dtype": torch.bfloat16, "device": "cpu"}),
        (GaborConv2d, (1, 2, "auto"), {"start": START, "dtype": torch.float64, "seed": 3}),
    ],
)
def test_a_layer_comes_back_exactly(kind, args, arguments, tmp_path):
    layer = add_hub(kind)(*args, **arguments)
    assert isinstance(layer, kind)
    layer.save_pretrained(tmp_path / "layer")
    again = add_hub(kind).from_pretrained(tmp_path / "layer")
    assert repr(again) == repr(layer)
    assert same(again, layer)
    assert not again.training
    files = {path.name for path in (tmp_path / "layer").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors"}
    assert "device" not in json.loads((tmp_path / "layer" / "config.json").read_text())
    # A second generation is the same.
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "layer" / name).read_bytes()


def test_a_network_comes_back_exactly(tmp_path):
    network = Network(3, kernel_size=5, dtype=torch.float64)
    network(torch.rand(4, 1, 9, 9, dtype=torch.float64))  # moves the statistics
    network.save_pretrained(tmp_path)
    again = Network.from_pretrained(str(tmp_path))
    assert same(network, again)
    image = torch.rand(2, 1, 9, 9, dtype=torch.float64)
    assert torch.equal(network.eval()(image), again(image))
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "n_filters": 3,
        "kernel_size": 5,
        "dtype": {"dtype": "float64"},
    }


def test_the_class_is_still_what_it_was():
    assert (Network.__name__, Network.__doc__) == ("Network", "One of a user's own.")
    network = Network(3)
    assert same(copy.deepcopy(network), network)
    image = torch.rand(2, 1, 9, 9)
    network.eval()
    assert torch.equal(to_plain(network)(image), network(image))


def test_the_weights_are_anybodys_safetensors(tmp_path):
    network = Network()
    network.save_pretrained(tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    assert set(tensors) == set(network.state_dict())


def test_what_the_config_cannot_hold_is_told_before_anything_is_written(tmp_path):
    model = add_hub(nn.Sequential)(nn.ReLU())
    with pytest.raises(ValueError, match=r"^Sequential was built with args, which config\.json"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(TypeError, match="model must be a class of modules, got"):
        add_hub(GaborConv2d(1, 1, 3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Network().save_pretrained(tmp_path)
    return tmp_path


def refusal(folder: Path, kind: type = ValueError) -> str:
    with pytest.raises(kind, match=r"\w") as error:
        Network.from_pretrained(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_files_are_told(folder):
    assert "There is no folder" in refusal(folder / "nothing", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        Network.from_pretrained("./nothing")
    (folder / "model.safetensors").rename(folder / "old")
    # Not the pickle that the Hub's own code would fall back to.
    torch.save(Network().state_dict(), folder / "pytorch_model.bin")
    assert "has no model.safetensors" in refusal(folder, FileNotFoundError)
    (folder / "old").rename(folder / "model.safetensors")
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder, FileNotFoundError)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "holds no arguments by name"),
        ('{"n_filters": 5}', "is no Network: "),
        ('{"n_filters": "many"}', "is no Network: "),
        ('{"dtype": {"dtype": "load"}}', "there is no dtype 'load'"),
    ],
)
def test_a_wrong_config_is_told(folder, config, message):
    (folder / "config.json").write_text(config)
    assert message in refusal(folder)


def test_damaged_and_foreign_weights_are_told(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for place in range(0, len(data), 211):
        wrong = bytearray(data)
        wrong[place] ^= 1
        file.write_bytes(wrong)
        refusal(folder)
        file.write_bytes(data[:place])
        assert "is cut off" in refusal(folder)
    torch.save(Network().state_dict(), file)
    assert "is not weights of save_pretrained" in refusal(folder)


def test_every_tensor_must_be_there(folder):
    network = Network()
    del network.norm
    network._save_pretrained(folder)
    assert "Missing key" in refusal(folder)
    Network().save_pretrained(folder)
    assert same(Network.from_pretrained(folder), Network.from_pretrained(folder))
