"""Networks come by their names with the weights that were saved, and bring no code along."""

import json
import logging
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gaborium.conversion import find_first_conv, load_network, names_network

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@pytest.fixture
def folder(tmp_path) -> Path:
    transformers = pytest.importorskip("transformers")
    small = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3)
    transformers.ResNetForImageClassification(small).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def timm(monkeypatch) -> types.ModuleType:
    """A stand-in: timm itself needs torchvision, which nothing here does."""
    module = types.ModuleType("timm")
    module.create_model = lambda name, *, pretrained: torch.nn.Sequential(
        torch.nn.Conv2d(3, len(name), 5 if pretrained else 3)
    )
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


class Exploding:
    """Unpickled, it would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.trace,))


def refused(name: Any, error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        load_network(name)
    message = str(caught.value)
    assert type(caught.value) is error
    assert "\n" not in message
    assert len(message) < 450
    assert message.endswith(".")
    for word in words:
        assert word in message, message


# -- what is loaded ---------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "transformers:"])
def test_a_saved_network_comes_back_with_its_head(folder, prefix):
    network = load_network(f"{prefix}{folder}")
    assert type(network).__name__ == "ResNetForImageClassification"
    assert not network.training
    saved = pytest.importorskip("safetensors.torch").load_file(folder / "model.safetensors")
    name, conv = find_first_conv(network)
    assert torch.equal(conv.weight, saved[f"{name}.weight"])


def test_a_class_that_the_library_does_not_have_is_not_looked_for(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Names of the library that are no networks are not called either.
    config["architectures"] = ["MyResNet", "logging", "AutoTokenizer"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert type(load_network(folder)).__name__ == "ResNetModel"


def test_timm_is_asked_for_trained_weights(timm):
    network = load_network("timm:resnet50")
    assert find_first_conv(network)[1].weight.shape == (8, 3, 5, 5)
    assert not network.training


def test_weights_that_are_missing_are_named(folder):
    safetensors = pytest.importorskip("safetensors.torch")
    state = safetensors.load_file(folder / "model.safetensors")
    first = next(name for name in state if "convolution" in name)
    del state[first]
    safetensors.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=f"lack {first}; these are random"):
        load_network(folder)


def test_which_names_are_those_of_networks(folder):
    for name in (folder, str(folder), "timm:resnet50", "transformers:a/b", "timm:"):
        assert names_network(name)
    for name in (folder.parent, "resnet50", "model.pt", "other:resnet50", "timm", ""):
        assert not names_network(name)


# -- what is not run --------------------------------------------------------------------------


def test_pickled_weights_of_transformers_are_not_read(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Exploding(tmp_path / "trace")}, folder / "pytorch_model.bin")
    refused(folder, OSError, "transformers cannot load", "model.safetensors")
    assert not (tmp_path / "trace").exists()


def test_code_that_comes_with_a_network_is_not_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "mine", "architectures": ["Mine"]}
    config["auto_map"] = {"AutoConfig": "mine.MyConfig", "AutoModel": "mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    code = f"from pathlib import Path\nPath({str(tmp_path / 'trace')!r}).touch()\n"
    (folder / "mine.py").write_text(code, encoding="utf-8")
    refused(folder, ValueError, "code of its own, which is never run")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("before", [None, "0"])
def test_pickled_weights_of_timm_are_not_read(timm, tmp_path, monkeypatch, before):
    monkeypatch.delenv(FORCED, raising=False)
    if before is not None:
        monkeypatch.setenv(FORCED, before)
    torch.save({"weight": Exploding(tmp_path / "trace")}, tmp_path / "model.bin")
    timm.create_model = lambda name, *, pretrained: torch.load(
        tmp_path / "model.bin", weights_only=False
    )
    refused("timm:resnet50", ValueError, "timm cannot load 'resnet50'", "unpickling")
    assert not (tmp_path / "trace").exists()
    assert os.environ.get(FORCED) == before


# -- what is told -----------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_a_library_that_is_missing_is_named(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    refused(f"{library}:resnet", ImportError, f"pip install {library}.")


def test_a_name_that_cannot_be_fetched_is_told_in_one_line(monkeypatch):
    transformers = pytest.importorskip("transformers")
    logger = logging.getLogger("huggingface_hub")
    before, heard = logger.level, []

    def unreachable(name: str, **options: Any) -> None:
        heard.append(logger.isEnabledFor(logging.WARNING))  # of retries
        raise OSError(
            f"We cannot connect to the hub for {name},\nand found no file. " + 9 * "Try. "
        )

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    refused(
        "transformers:microsoft/none", OSError,
        "transformers cannot load 'microsoft/none'", "for microsoft/none, and found no file; check",
    )  # fmt: skip
    assert heard == [False]
    assert logger.level == before


def test_a_library_is_quiet_from_its_first_call_on(monkeypatch, tmp_path, caplog):
    # Imported, libraries set the levels of their loggers.
    code = (
        "import logging\n"
        "logging.getLogger('timm').setLevel(logging.WARNING)\n"
        "def create_model(name, pretrained):\n"
        "    logging.getLogger('timm').warning('Retrying in 8s.')\n"
        "    raise OSError('There is no network.')\n"
    )
    (tmp_path / "timm.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    refused("timm:resnet", OSError, "There is no network; check")
    assert caplog.records == []
    monkeypatch.delitem(sys.modules, "timm")


def test_a_name_that_timm_does_not_know(timm):
    def unknown(name: str, *, pretrained: bool) -> None:
        raise RuntimeError(f"Unknown model ({name})")

    timm.create_model = unknown
    refused("timm:resnet", ValueError, "timm cannot load 'resnet': Unknown model (resnet); check")


@pytest.mark.parametrize("name", ["resnet50", "keras:resnet50", ""])
def test_other_names_are_refused(name):
    refused(name, ValueError, "transformers:NAME, timm:NAME", repr(name))


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_a_damaged_folder(folder, damage):
    whole = (folder / damage).read_bytes()
    (folder / damage).write_bytes(whole[: len(whole) // 2])
    with pytest.raises((OSError, ValueError), match="transformers cannot load") as caught:
        load_network(folder)
    assert "\n" not in str(caught.value)
