"""Networks without Gabor functions in them: equal outputs, as modules, graphs and programs."""

from __future__ import annotations

import copy
import errno
import io
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from gaborium import GaborConv1d, GaborConv2d, GaborConv3d, MixedConv, files
from gaborium.export import to_onnx, to_plain
from gaborium.layers import GABOR_LAYERS, PairEnergy
from gaborium.training import build_network, make_first_layer

LAYERS = {
    "real": lambda: GaborConv2d(3, 8, 7, padding=3),
    "sound": lambda: GaborConv1d(2, 4, 9, stride=2, dilation=2, coordinates="textbook"),
    "film": lambda: GaborConv3d(1, 4, 5, padding="same", bias=False),
    "quadrature": lambda: GaborConv2d(4, 8, 6, groups=2, output="quadrature", dc="remove"),
    "energy": lambda: GaborConv2d(4, 6, 7, groups=2, output="energy", unit_norm=True),
    "energy without bias": lambda: GaborConv1d(1, 3, 8, output="energy", bias=False),
    "energy of a film": lambda: GaborConv3d(2, 2, 3, output="energy"),
    "mixed": lambda: MixedConv(GaborConv2d(3, 4, 7), 3, order=[6, 5, 0, 1, 2, 3, 4]),
    **{
        mode: lambda mode=mode: GaborConv2d(1, 2, 5, padding=(2, 1), padding_mode=mode)
        for mode in ("reflect", "replicate", "circular")
    },
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return LAYERS[request.param]()


def images(layer: nn.Module, n: int = 2) -> torch.Tensor:
    like = next(layer.parameters())
    return torch.rand(n, layer.in_channels, *[18] * layer.n_dims).to(like)


def ours(module: nn.Module) -> list[str]:
    kinds = (*GABOR_LAYERS, MixedConv)
    return [name for name, part in module.named_modules() if isinstance(part, kinds)]


# -- plain networks ---------------------------------------------------------------------------


def test_a_layer_becomes_a_convolution_with_equal_outputs(layer):
    plain = to_plain(layer)
    conv = plain.pairs if isinstance(plain, PairEnergy) else plain
    assert type(conv) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    assert isinstance(plain, PairEnergy) == (getattr(layer, "output", "") == "energy")
    image = images(layer)
    assert torch.equal(plain(image), layer(image))
    assert torch.equal(plain(image[0]), layer(image[0]))  # without a batch, too


def test_the_callers_network_is_not_changed():
    first = GaborConv2d(1, 4, 7, output="energy")
    network = nn.Sequential(first, nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)).eval()
    before = copy.deepcopy(network.state_dict())
    plain = to_plain(network)
    assert ours(network) == ["0"]
    assert ours(plain) == []
    assert not any(part.training for part in plain.modules())
    with torch.no_grad():
        for value in plain.parameters():
            value.zero_()
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_layers_at_any_depth_and_in_several_places_are_replaced():
    inner = GaborConv2d(2, 2, 5, padding=2)
    mixed = MixedConv(GaborConv2d(2, 1, 3, padding=1), 1)
    network = nn.ModuleDict({"a": inner, "b": nn.Sequential(nn.ReLU(), inner, mixed)})
    plain = to_plain(network)
    assert ours(plain) == []
    assert plain["a"] is plain["b"][1]
    assert network["a"] is network["b"][1]
    assert set(plain["b"][2].state_dict()) == {"weight", "bias"}  # nothing is left of the old one
    image = torch.rand(1, 2, 8, 8)
    assert torch.equal(plain["b"](image), network["b"](image))


@pytest.mark.parametrize("kind", ["gabor", "mixed", "free"])
@pytest.mark.parametrize("output", ["real", "energy"])
def test_the_trainers_networks_become_plain(kind, output):
    first = make_first_layer(
        kind, n_dims=2, in_channels=1, n_filters=4, kernel_size=7, output=output
    )
    network = build_network("cnn", first=first, n_classes=3, image_size=(24, 24), seed=0).eval()
    plain = to_plain(network)
    image = torch.rand(2, 1, 24, 24)
    assert ours(plain) == []
    assert torch.equal(plain(image), network(image))


def test_a_plain_network_is_copied_as_it_is():
    network = nn.Sequential(nn.Linear(2, 3))
    plain = to_plain(network)
    assert plain is not network
    assert torch.equal(plain[0].weight, network[0].weight)


def test_kernels_of_the_copy_learn_freely():
    plain = to_plain(GaborConv2d(1, 2, 5, output="energy", learn=()))
    plain(torch.rand(1, 1, 9, 9)).sum().backward()
    assert all(value.grad.abs().sum() > 0 for value in plain.parameters())


class Doubled(GaborConv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Renamed(GaborConv2d):
    pass


def test_derived_layers_are_taken_only_where_they_compute_the_same():
    assert type(to_plain(nn.Sequential(Renamed(1, 2, 5)))[0]) is nn.Conv2d
    with pytest.raises(ValueError, match=r"^'0' is a Doubled, whose forward is not that of Gabor"):
        to_plain(nn.Sequential(Doubled(1, 2, 5)))
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got int"):
        to_plain(3)


# -- torch.export -----------------------------------------------------------------------------


@pytest.fixture
def quiet():
    """torch.export warns of its own future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.mark.parametrize("make", [lambda m: m, to_plain], ids=["live", "plain"])
def test_programs_have_equal_outputs_also_after_loading(layer, make, quiet):
    network = nn.Sequential(make(layer), nn.ReLU()).eval()
    axes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, (images(layer),), dynamic_shapes=axes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    image = images(layer, 5)
    for one in (program, loaded):
        assert torch.equal(one.module()(image), network(image))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_programs_keep_the_dtype(dtype, quiet):
    layer = GaborConv2d(1, 2, 5, dtype=dtype)
    image = images(layer)
    program = torch.export.export(layer, (image,))
    assert torch.equal(program.module()(image), layer(image))


# -- ONNX -------------------------------------------------------------------------------------


@pytest.fixture
def onnx():
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    return pytest.importorskip("onnx")


def answer(path: Path, *inputs: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, given)[0])


def test_graphs_have_one_convolution_and_equal_outputs(layer, onnx, tmp_path):
    network = nn.Sequential(layer, nn.ReLU())
    state = copy.deepcopy(network.state_dict())
    path = tmp_path / "network.onnx"
    to_onnx(network, path, images(layer, 1))
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Conv") == 1
    assert not {"Cos", "Sin", "Exp"} & set(kinds)  # no Gabor function is computed
    # Of any batch size, whatever that of the example was.
    for n in (1, 2, 7):
        image = images(layer, n)
        expected = network(image).detach()
        found = answer(path, image)
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max().clamp_min(1)
    assert network.training
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert list(tmp_path.iterdir()) == [path]


def test_an_energy_of_nothing_is_nothing(onnx, tmp_path):
    layer = GaborConv2d(1, 2, 5, output="energy", bias=False)
    to_onnx(layer, tmp_path / "a.onnx", torch.rand(2, 1, 9, 9))
    assert torch.equal(
        answer(tmp_path / "a.onnx", torch.zeros(3, 1, 9, 9)), torch.zeros(3, 2, 5, 5)
    )


def test_graphs_are_for_inference(onnx, tmp_path):
    network = nn.Sequential(GaborConv2d(1, 4, 5), nn.BatchNorm2d(4), nn.Dropout(0.5))
    network(torch.rand(8, 1, 9, 9))
    to_onnx(network, tmp_path / "a.onnx", torch.rand(1, 1, 9, 9))
    image = torch.rand(3, 1, 9, 9)
    torch.testing.assert_close(
        answer(tmp_path / "a.onnx", image), network.eval()(image).detach(), rtol=1e-5, atol=1e-6
    )


class TwoEyes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = GaborConv2d(1, 2, 5), GaborConv2d(1, 2, 5, start="random")

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.left(left) - self.right(right)


@pytest.mark.parametrize("as_dict", [True, False])
def test_networks_with_several_inputs(as_dict, onnx, tmp_path):
    network = TwoEyes()
    pair = (torch.rand(1, 1, 9, 9), torch.rand(1, 1, 9, 9))
    example = dict(zip(("left", "right"), pair, strict=True)) if as_dict else pair
    to_onnx(network, tmp_path / "a.onnx", example)
    kinds = [node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node]
    assert kinds.count("Conv") == 2
    pair = (torch.rand(4, 1, 9, 9), torch.rand(4, 1, 9, 9))
    found = answer(tmp_path / "a.onnx", *pair)
    assert (found - network(*pair)).abs().max() <= 1e-6


class Fixed(nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input.reshape(2, 50)


class Unknown(nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(input)


class Asking(nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input if input.sum() > 0 else -input


@pytest.mark.parametrize(
    ("last", "example", "kind", "message"),
    [
        (
            Fixed(),
            torch.rand(2, 1, 9, 9),
            ValueError,
            "cannot be written as ONNX with a free batch",
        ),
        (Unknown(), torch.rand(2, 1, 9, 9), ValueError, "bessel_j0"),
        (Asking(), torch.rand(2, 1, 9, 9), ValueError, "cannot be written as ONNX"),
        (nn.ReLU(), torch.rand(2, 3, 9, 9), ValueError, "does not run on the example: Runtime"),
        (nn.ReLU(), (), ValueError, "tensors of one batch size, the first axis; got sizes []"),
        (nn.ReLU(), torch.rand(0, 1, 9, 9), ValueError, "got sizes [0]"),
        (nn.ReLU(), (torch.rand(1, 9), torch.rand(2, 9)), ValueError, "got sizes [1, 2]"),
        (nn.ReLU(), {"inputs": torch.rand(2, 1, 9, 9)}, ValueError, "does not run"),
        (nn.ReLU(), [1], TypeError, "example must be a batch, or a tuple or a dict"),
    ],
)
def test_what_is_no_graph_is_told_in_one_line(last, example, kind, message, onnx, tmp_path, capfd):
    with pytest.raises(kind) as error:
        to_onnx(nn.Sequential(GaborConv2d(1, 2, 5), last), tmp_path / "a.onnx", example)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_leaves_the_old_graph(onnx, tmp_path, monkeypatch):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        to_onnx(GaborConv2d(1, 2, 5), path, torch.rand(2, 1, 9, 9))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"
