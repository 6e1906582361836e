"""Checkpoints come back exactly, and neither a full disk nor a damaged bit is fatal."""

import errno
import os
import re

import pytest
import torch

from gaborium import files
from gaborium.training.checkpoints import Checkpoints, load_state, save_state

pytest.importorskip("safetensors")


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    adam = torch.optim.AdamW(
        [
            {"params": module[0].parameters(), "lr": 0.1},
            {"params": module[1].parameters(), "weight_decay": 0.0},
        ]
    )
    for _ in range(3):
        module(torch.randn(5, 3)).square().sum().backward()
        adam.step()
        adam.zero_grad()
    return module, adam


def same(one: object, other: object) -> bool:
    """Whether two states are equal in every type, key and bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_optimizer_and_network_come_back_exactly(tmp_path):
    module, adam = trained()
    state = {
        "network": dict(module.state_dict()),
        "optimizers": [adam.state_dict()],
        "odd": {"none": None, "yes": True, "texts": ("é", ""), "empty": [], 3: 0.1 + 0.2},
        "shared": [module[0].weight.detach()] * 2,
        "kinds": [torch.tensor(7), torch.zeros(0, 3), torch.ones(2, dtype=torch.bfloat16)],
    }
    save_state(tmp_path / "a", state)
    back = load_state(tmp_path / "a")
    assert same(back, state)
    steps = [one["step"] for one in back["optimizers"][0]["state"].values()]
    assert steps == [torch.tensor(3.0)] * 4

    other, fresh = trained()
    other.load_state_dict(back["network"])
    fresh.load_state_dict(back["optimizers"][0])
    for one, optimizer in ((module, adam), (other, fresh)):
        one(torch.ones(2, 3) * torch.tensor([[1.0], [2.0]])).square().sum().backward()
        optimizer.step()
    assert same(dict(module.state_dict()), dict(other.state_dict()))
    assert same(adam.state_dict(), fresh.state_dict())


def test_equal_states_make_equal_files(tmp_path):
    module, adam = trained()
    for name in ("a", "b"):
        save_state(tmp_path / name, {"m": dict(module.state_dict()), "o": adam.state_dict()})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_cannot_be_saved_is_told(tmp_path):
    with pytest.raises(TypeError, match=r"^state\.x\.0 must be made of tensors, .* got set\.$"):
        save_state(tmp_path / "a", {"x": [{1, 2}]})
    with pytest.raises(TypeError, match=r"^state must have texts or whole numbers as keys"):
        save_state(tmp_path / "a", {(1, 2): 0})
    assert list(tmp_path.iterdir()) == []


def test_only_the_last_two_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    for step in (0, 5, 10):
        checkpoints.save(step, {"step": step})
    assert [path.name for path in checkpoints.paths()] == [
        "checkpoint-000000005.safetensors",
        "checkpoint-000000010.safetensors",
    ]
    assert checkpoints.latest() == {"step": 10}


def test_a_full_disk_leaves_the_old_checkpoints(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    for step in (5, 10):
        checkpoints.save(step, {"step": step, "x": torch.zeros(100)})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        checkpoints.save(15, {"step": 15, "x": torch.ones(100)})
    assert error.value.errno == errno.ENOSPC
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert checkpoints.latest()["step"] == 10


@pytest.mark.parametrize("place", [3, 40, -1])
def test_a_flipped_bit_is_noticed_and_the_one_before_is_taken(tmp_path, place):
    checkpoints = Checkpoints(tmp_path)
    for step in (5, 10):
        checkpoints.save(step, {"step": step, "x": torch.zeros(100)})
    old, new = checkpoints.paths()
    for path in (new, old):
        data = bytearray(path.read_bytes())
        data[place] ^= 4
        path.write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(repr(str(path)))) as error:
            load_state(path)
        assert "\n" not in str(error.value)
        if path == new:
            with pytest.warns(UserWarning, match="Taking the checkpoint before it"):
                assert checkpoints.latest()["step"] == 5
    with (
        pytest.warns(UserWarning, match="before it"),
        pytest.raises(ValueError, match=r"damaged|cut"),
    ):
        checkpoints.latest()


def test_nothing_is_unpickled(tmp_path):
    class Harm:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"x": Harm()}, tmp_path / "checkpoint-000000005.safetensors")
    with pytest.raises(ValueError, match="is not a saved checkpoint of gaborium"):
        Checkpoints(tmp_path).latest()
    assert not (tmp_path / "harm").exists()
