"""Layers come back from files, tables and graphs as they were; what is wrong is one line."""

from __future__ import annotations

import copy
import csv
import inspect
import io
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from gaborium import (
    Gabor1d,
    Gabor2d,
    Gabor3d,
    GaborConv1d,
    GaborConv2d,
    GaborConv3d,
    MixedConv,
    support,
)
from gaborium import gabor as sample
from gaborium.layers import GABOR_LAYERS, PairEnergy
from gaborium.storage import from_csv, load_layer, save_layer, to_csv, to_onnx, to_plain

safetensors = pytest.importorskip("safetensors.torch")

F64 = torch.float64
START = Gabor2d.of(orientation=[0.3, 1.1], wavelength=[5.0, 7.0], sigma=2.0, dtype=F64)
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
    "film": lambda: GaborConv3d(1, 4, 5, padding="same", bias=False),
    "quadrature": lambda: GaborConv2d(4, 8, 6, groups=2, output="quadrature", dc="remove"),
    "energy in groups": lambda: GaborConv2d(4, 6, 7, groups=2, output="energy", unit_norm=True),
    **{
        mode: lambda mode=mode: GaborConv2d(1, 2, 5, padding=(2, 1), padding_mode=mode)
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    made = LAYERS[request.param]()
    with torch.no_grad():  # as after training: nothing is where the start had put it
        for value in made.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return made


def images(layer: nn.Module, n: int = 2) -> torch.Tensor:
    inner = getattr(layer, "gabor", layer)
    return torch.rand(n, inner.in_channels, *[24] * inner.n_dims).to(inner.log_sigma.dtype)


# -- files of layers --------------------------------------------------------------------------


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
    support.write_tensors(target, tensors or kept, facts)
    return target


def test_a_layer_comes_back_exactly(layer, tmp_path):
    save_layer(layer, tmp_path / "layer.safetensors")
    state = torch.random.get_rng_state()
    again = load_layer(tmp_path / "layer.safetensors")  # warnings are errors
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(again) is type(layer)
    assert repr(again) == repr(layer)
    one, two = layer.state_dict(), again.state_dict()
    assert list(one) == list(two)
    for name, value in one.items():
        assert value.dtype == two[name].dtype
        assert torch.equal(value, two[name]), name
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in again.named_parameters()]
    inner, other = getattr(layer, "gabor", layer), getattr(again, "gabor", again)
    image = images(layer)
    assert torch.equal(layer(image), again(image))
    # Starting again from a seed or a record is the same, too.
    for one in (inner, other):
        torch.manual_seed(5)
        one.reset_parameters()
    assert torch.equal(inner.weight, other.weight)

    # Equal layers make equal bytes.
    for name in ("a", "b"):
        save_layer(load_layer(tmp_path / "layer.safetensors"), tmp_path / name)
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


def test_dtypes_and_frozen_parameters_come_back(tmp_path):
    layer = GaborConv2d(1, 2, 5)
    layer.bias = nn.Parameter(torch.tensor([1 / 3, 2 / 3], dtype=F64))
    layer.even.requires_grad_(False)
    save_layer(layer, tmp_path / "a")
    again = load_layer(tmp_path / "a")
    assert torch.equal(again.bias, layer.bias)
    assert [n for n, p in again.named_parameters() if not p.requires_grad] == ["even"]


def test_the_metadata_says_what_the_file_holds(tmp_path):
    layer = GaborConv2d(3, 8, 9, stride=2)
    save_layer(layer, tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    _, facts, _ = header_of(data)
    assert facts["name"] == "gaborium.layer"
    assert (facts["format"], facts["class"], facts["frozen"]) == (1, "GaborConv2d", [])
    assert facts["arguments"]["stride"] == [2, 2]
    assert facts["units"]["sigma"] == "px"
    # Anybody's reader of safetensors finds the state dict.
    assert set(safetensors.load(data)) == set(layer.state_dict())
    # A new argument comes into the file by itself; then the format must be raised.
    assert {*facts["arguments"], "device"} == set(inspect.signature(GaborConv2d).parameters)
    assert len(facts["arguments"]) == 19, "raise _FORMAT, keep a reader for the old one"


def test_the_oldest_format_loads():
    layer = load_layer(OLD)
    assert repr(layer.gabor) == repr(GaborConv2d(2, 2, 5, padding=1, dtype=F64))
    expected = sample(layer.gabor.params, 5)
    torch.testing.assert_close(layer.weight[[1, 0]], expected, rtol=0, atol=1e-12)
    assert layer.order.tolist() == [1, 0, 2]
    torch.testing.assert_close(
        layer.gabor.params.orientation[:, 0],
        torch.tensor([0.3, 1.1], dtype=F64),
        rtol=0,
        atol=1e-12,  # kept as a wave vector
    )
    assert layer.free.flatten()[:3].tolist() == [0.0, 0.125, 0.25]


class Derived(GaborConv2d):
    pass


@pytest.mark.parametrize("module", [nn.Conv2d(1, 1, 3), Derived(1, 1, 3), "no layer"], ids=repr)
def test_other_modules_are_refused(module, tmp_path):
    with pytest.raises(TypeError, match=r"^layer must be a GaborConv1d, .* got \w+; save the"):
        save_layer(module, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def good(tmp_path: Path) -> Path:
    save_layer(GaborConv2d(3, 4, 5, seed=0), tmp_path / "good")
    return tmp_path / "good"


@pytest.mark.parametrize(
    "change",
    [
        {"arguments": {"out_channels": -4}},
        {"arguments": {"kernel_size": None}},
        {"arguments": {"padding_mode": "none"}},
        {"arguments": {"dtype": "load"}},
        {"arguments": {"start": "nowhere"}},
        {"arguments": {"start": {"type": "Gabor3d"}}},
        {"arguments": {"learn": ["everything"]}},
        {"arguments": {"unknown": 1}},
        {"arguments": {"bias": False}},
        {"arguments": {"min_wavelength": -1.0}},
        {"arguments": {"start": ...}},  # is missing
        {"arguments": None},
        {"class": ...},
        {"class": "Linear"},
        {"class": "MixedConv"},
        {"class": ["GaborConv2d"]},
        {"frozen": ["nothing"]},
        {"frozen": 3},
    ],
    ids=str,
)
def test_facts_that_make_no_layer_are_one_line(change, good, tmp_path):
    def carry_out(facts: dict, change: dict) -> None:
        for name, value in change.items():
            if value is ...:
                del facts[name]
            elif isinstance(value, dict) and name in facts and name != "start":
                carry_out(facts[name], value)
            else:
                facts[name] = value

    bad = with_facts(good, tmp_path / "bad", lambda facts: carry_out(facts, change))
    assert "does not hold a whole layer" in refusal(bad)


def test_tensors_that_do_not_fit_are_one_line(good, tmp_path):
    tensors = safetensors.load(good.read_bytes())
    for name in tensors:
        fewer = {key: value for key, value in tensors.items() if key != name}
        bad = with_facts(good, tmp_path / "bad", lambda _: None, tensors=fewer)
        assert "does not hold a whole layer" in refusal(bad)
        other = tensors | {name: torch.zeros(5, 5, 5)}
        bad = with_facts(good, tmp_path / "bad", lambda _: None, tensors=other)
        assert "does not hold a whole layer" in refusal(bad)


# -- plain networks ---------------------------------------------------------------------------


def ours(module: nn.Module) -> list[str]:
    kinds = (*GABOR_LAYERS, MixedConv)
    return [name for name, part in module.named_modules() if isinstance(part, kinds)]


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


def test_kernels_of_the_copy_learn_freely():
    plain = to_plain(GaborConv2d(1, 2, 5, output="energy", learn=()))
    plain(torch.rand(1, 1, 9, 9)).sum().backward()
    assert all(value.grad.abs().sum() > 0 for value in plain.parameters())


class Doubled(GaborConv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_derived_layers_stay_as_they_are():
    network, image = (
        nn.Sequential(Doubled(1, 2, 5), MixedConv(Doubled(2, 2, 5), 1)),
        torch.rand(1, 9, 9),
    )
    plain = to_plain(network)
    assert [type(layer) for layer in plain] == [Doubled, nn.Conv2d]
    assert torch.equal(plain(image), network(image))
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got int"):
        to_plain(3)


@pytest.mark.parametrize("layer", ["every argument", "energy in groups", "mixed"], indirect=True)
@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning"
)  # of torch.export
def test_programs_have_equal_outputs_also_after_loading(layer):
    network = nn.Sequential(layer, nn.ReLU()).eval()
    axes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, (images(layer),), dynamic_shapes=axes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    image = images(layer, 5)
    assert torch.equal(torch.export.load(file).module()(image), network(image))


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


# ONNX Runtime convolves in single precision only.
@pytest.mark.parametrize("layer", ["mixed", "film", "energy in groups"], indirect=True)
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


def test_graphs_are_for_inference(onnx, tmp_path):
    first = GaborConv2d(1, 4, 5, output="energy", bias=False)
    network = nn.Sequential(first, nn.BatchNorm2d(4), nn.Dropout(0.5))
    network(torch.rand(8, 1, 9, 9))
    to_onnx(network, tmp_path / "a.onnx", torch.rand(1, 1, 9, 9))
    image = torch.rand(3, 1, 9, 9)
    image[0] = 0  # the energy of nothing is nothing
    torch.testing.assert_close(
        answer(tmp_path / "a.onnx", image), network.eval()(image).detach(), rtol=1e-5, atol=1e-6
    )


class TwoEyes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = GaborConv2d(1, 2, 5), GaborConv2d(1, 2, 5, start="random")

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.left(left) - self.right(right)


def test_networks_with_several_inputs(onnx, tmp_path):
    network = TwoEyes()
    to_onnx(network, tmp_path / "a.onnx", (torch.rand(1, 1, 9, 9), torch.rand(1, 1, 9, 9)))
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


@pytest.mark.parametrize(
    ("last", "example", "message"),
    [
        (Fixed(), torch.rand(2, 1, 9, 9), "cannot be written as ONNX for batches of any size"),
        (Unknown(), torch.rand(2, 1, 9, 9), "bessel_j0"),
        (nn.ReLU(), torch.rand(2, 3, 9, 9), "RuntimeError"),
        (nn.ReLU(), (), "TypeError"),
    ],
)
def test_what_is_no_graph_is_one_line(last, example, message, onnx, tmp_path, capfd):
    with pytest.raises(ValueError, match=r"\w") as error:
        to_onnx(nn.Sequential(GaborConv2d(1, 2, 5), last), tmp_path / "a.onnx", example)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


# -- tables -----------------------------------------------------------------------------------


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


def test_the_columns_are_the_fields_with_their_units():
    record = Gabor2d.of(orientation=0.5, wavelength=6.0, sigma=2.0, center=[0.25, -1.0])
    assert to_csv(record) == (
        "filter,orientation (rad),wavelength (px),phase (rad),sigma (px),aspect_ratio,"
        "amplitude (kernel's unit),center[0] (px),center[1] (px)\n"
        "0,0.5,6.0,0.0,2.0,1.0,1.0,0.25,-1.0\n"
    )


def test_there_is_a_row_for_each_filter_and_channel():
    layer = GaborConv2d(3, 4, 9)
    rows = rows_of(to_csv(layer.params))
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
    assert same(from_csv(to_csv(record)).to(dtype), record)


def test_a_layer_comes_back_and_can_be_set():
    layer, other = GaborConv2d(3, 4, 9, dtype=F64), GaborConv2d(3, 4, 9, dtype=F64, start="random")
    other.params = from_csv(to_csv(layer.params))
    torch.testing.assert_close(other.weight, layer.weight, rtol=0, atol=1e-14)


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


@pytest.mark.parametrize("convention", ["skimage", "opencv"])
@pytest.mark.parametrize("shape", [(4,), (3, 2)], ids=str)
def test_other_conventions_come_back(convention, shape):
    record = random_record(Gabor2d, *shape)
    again = from_csv(to_csv(record, convention))
    assert again.batch_shape == shape
    for name, value in record.as_dict().items():
        # A reciprocal of a reciprocal, and a product and its quotient, lose the last digits.
        torch.testing.assert_close(again.as_dict()[name], value, rtol=1e-14, atol=0)


@pytest.mark.parametrize("convention", ["skimage", "opencv"])
def test_a_row_makes_the_layers_kernel_in_the_other_library(convention):
    library = pytest.importorskip({"skimage": "skimage.filters", "opencv": "cv2"}[convention])
    layer = GaborConv2d(2, 3, 25, dtype=F64, start="random", seed=1)
    for row in rows_of(to_csv(layer.params, convention)):
        given = {name: float(value) for name, value in row.items()}
        i, j, scale = int(given.pop("filter")), int(given.pop("channel")), given.pop("scale")
        if convention == "skimage":
            kernel = library.gabor_kernel(n_stds=5, **given).real
        else:
            kernel = library.getGaborKernel((25, 25), **given, ktype=library.CV_64F)
        expected = sample(layer.params[i, j], kernel.shape)
        torch.testing.assert_close(torch.from_numpy(scale * kernel), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("source", "convention", "kind", "message"),
    [
        (GaborConv2d(1, 1, 3), "gaborium", TypeError, "a record such as layer.params, got Gabor"),
        (Gabor2d.of(wavelength=[], sigma=[]), "gaborium", ValueError, "not empty, got (0,)"),
        (random_record(Gabor1d, 2, 2, 2), "gaborium", ValueError, "got (2, 2, 2)"),
        (random_record(Gabor1d, 2), "matlab", ValueError, "convention must be one of"),
        (random_record(Gabor1d, 2), "opencv", TypeError, "needs a Gabor2d, got Gabor1d"),
        (
            Gabor2d.of(wavelength=4.0, sigma=1.0, center=[1.0, 0.0]),
            *("opencv", ValueError, "needs a center of 0"),
        ),
        (
            random_record(Gabor1d, 2).replace(sigma=torch.tensor([1.0, math.nan], dtype=F64)),
            *("gaborium", ValueError, "sigma must be positive and finite"),
        ),
    ],
)
def test_what_no_table_can_hold_is_one_line(source, convention, kind, message):
    with pytest.raises(kind) as error:
        to_csv(source, convention)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


GOOD = to_csv(Gabor1d.of(wavelength=[[4.0, 5.0], [6.0, 7.0]], sigma=1.0)).splitlines()


def changed(line: int, text: str | None) -> str:
    lines = list(GOOD)
    lines[line : line + 1] = [] if text is None else [text]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs the columns of to_csv"),
        ("\0\1", "needs the columns of to_csv"),
        ("a" * 200_000, "needs the columns of to_csv"),
        (GOOD[0], "with one row or more"),
        (GOOD[0].replace(",", ";"), "needs the columns of to_csv"),
        (changed(0, GOOD[0].replace("sigma (px)", "sigma")), "needs the columns"),
        (changed(0, GOOD[0] + ",note"), "needs the columns"),
        (changed(0, GOOD[0].replace("phase (rad)", "sigma (px)")), "needs the columns"),
        (changed(2, "0,1,5.0,0.0"), "Row 3 must have 7 numbers, got 0,1,5.0,0.0."),
        (changed(2, GOOD[2] + ",1"), "Row 3 must have 7 numbers"),
        (changed(2, "0,1,5.0,0.0,wide,1.0,0.0"), "Row 3 must have 7 numbers"),
        (changed(2, "0,1.0,5.0,0.0,1.0,1.0,0.0"), "Row 3 must have 7 numbers"),
        (changed(2, "-1,1,5.0,0.0,1.0,1.0,0.0"), "expected one for each of 2 x 2 filters"),
        (changed(2, "999999999,1,5.0,0.0,1.0,1.0,0.0"), "has 4 rows, expected one for each of"),
        (changed(2, GOOD[1]), "expected one for each of 2 x 2 filters and channels."),
        (changed(2, None), "has 3 rows, expected one for each of 2 x 2 filters and channels."),
        (changed(2, "0,1,5.0,0.0,-1.0,1.0,0.0"), "sigma must be positive and finite (px), got -1"),
        (changed(2, "0,1,5.0,nan,1.0,1.0,0.0"), "phase must be finite"),
    ],
)
def test_a_wrong_table_is_is_one_line(text, message):
    with pytest.raises(ValueError, match=r"\w") as error:
        from_csv(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
