"""Kernels come out of a file as they went in, and what holds none says so in one line."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gaborium import GaborConv2d, Outcome, fit
from gaborium.readers import read_kernels, run_setup
from gaborium.storage import save_layer, to_onnx

np = pytest.importorskip("numpy")


def bank(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def save(path: Path, **arrays: Any) -> Path:
    """Write arrays, numbers as NumPy and torch know them, in the format that the name says."""
    if path.suffix in (".pt", ".pth"):
        torch.save(arrays, path)
    elif path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(arrays, path)
    else:
        np.savez(path, **{key: np.asarray(value) for key, value in arrays.items()})
    return path


def refused(path: Path, *words: str, error: type[Exception] = ValueError, **options: Any) -> None:
    with pytest.raises(error) as caught:
        read_kernels(path, **options)
    message = str(caught.value)
    assert type(caught.value) is error
    assert "\n" not in message
    assert len(message) < 500
    for word in (path.name, *words):
        assert word in message, message


# -- what is read -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_an_array_comes_back_bit_by_bit(tmp_path, dtype):
    values = bank(4, 7, 5).to(dtype)
    np.save(tmp_path / "bank.npy", values.numpy())
    found = read_kernels(tmp_path / "bank.npy")
    assert torch.equal(found.values, values)
    assert found.values.dtype == dtype
    assert found.key == ""


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.pt", "a.PTH"])
def test_beside_other_arrays_the_kernels_are_found(tmp_path, name):
    weights = bank(8, 3, 5, 5)
    if name == "a.PTH":  # suffixes are read in either case
        path = save(tmp_path / "a.pth", weights=weights, bias=bank(8)).rename(tmp_path / name)
    else:
        path = save(tmp_path / name, weights=weights, bias=bank(8))
    found = read_kernels(path)
    assert found.key == "weights"
    assert torch.equal(found.values, weights)


def test_numbers_in_another_order_of_bytes_and_of_axes_are_the_same_numbers(tmp_path):
    values = bank(4, 7, 5).numpy()
    np.save(tmp_path / "big.npy", np.asfortranarray(values).astype(">f4"))
    assert np.array_equal(read_kernels(tmp_path / "big.npy").values.numpy(), values)


@pytest.mark.parametrize("name", ["net.safetensors", "net.pt"])
def test_of_a_network_the_first_layer_is_read_and_named(tmp_path, name):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 7), torch.nn.Conv2d(8, 4, 5), torch.nn.Linear(4, 10)
    )
    path = save(tmp_path / name, **net.state_dict())
    with pytest.warns(UserWarning, match=r"'0\.weight' of .*, 8 × 3 × 7 × 7, .* \(--key\)") as said:
        found = read_kernels(path)
    assert len(said) == 1
    assert torch.equal(found.values, net[0].weight.detach())
    second = read_kernels(path, key="1.weight")
    assert torch.equal(second.values, net[1].weight.detach())


def test_the_first_of_many_layers_is_read_where_the_file_keeps_their_order(tmp_path):
    # Channel by channel, the second layer has 1 input channel; the first has 4.
    net = torch.nn.Sequential(
        torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 8, 7), torch.nn.Conv2d(8, 8, 3, groups=8)
    )
    with pytest.warns(UserWarning, match=r"'1\.weight' of .*, 8 × 4 × 7 × 7, the first layer of 2"):
        assert read_kernels(save(tmp_path / "net.pt", **net.state_dict())).key == "1.weight"


def test_colours_come_before_single_channels(tmp_path):
    net = {"b.weight": bank(8, 3, 5, 5), "a.weight": bank(8, 1, 5, 5), "c.weight": bank(8, 1, 3, 3)}
    path = save(tmp_path / "net.safetensors", **net)
    with pytest.warns(UserWarning, match=r"'b\.weight' of .* the first layer of 3"):
        assert read_kernels(path).key == "b.weight"


def test_a_first_layer_of_one_pixel_is_not_passed_over(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 5))
    path = save(tmp_path / "net.pt", **net.state_dict())
    told = "has shape 8 × 3 × 1 × 1, expected kernels of 2 dimensions (--n-dims) of 2 to 256 px"
    with pytest.warns(UserWarning, match="the first layer of 2"):
        refused(path, "'0.weight'", told, "another array with key (--key)")
    assert read_kernels(path, key="1").values.shape == (4, 8, 5, 5)
    refused(path, told, key="0")


def test_later_layers_of_one_pixel_do_not_matter(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 5), torch.nn.Conv2d(8, 4, 1))
    for name in ("net.safetensors", "net.pt"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert read_kernels(save(tmp_path / name, **net.state_dict())).key == "0.weight"


def test_arrays_that_are_no_network_have_no_first_layer(tmp_path):
    for name in ("a.npz", "a.safetensors"):
        path = save(tmp_path / name, scale=bank(8, 3, 1, 1), kernels=bank(8, 3, 5, 5))
        assert read_kernels(path).key == "kernels"


def test_the_name_of_a_layer_stands_for_its_weight(tmp_path):
    path = save(tmp_path / "a.pt", **{"conv.weight": bank(2, 5, 5), "conv": bank(3, 3, 3)})
    assert len(read_kernels(path, key="conv").values) == 3
    path = save(tmp_path / "a.pt", **{"conv.weight": bank(2, 5, 5), "other": bank(3, 3, 3)})
    assert len(read_kernels(path, key="conv").values) == 2
    refused(path, "no array 'cov'", key="cov")


def test_nested_entries_have_dotted_names(tmp_path):
    torch.save(
        {"epoch": 3, "state_dict": {"conv": {"weight": bank(4, 1, 5, 5)}}}, tmp_path / "c.pt"
    )
    assert read_kernels(tmp_path / "c.pt").key == "state_dict.conv.weight"


def test_a_bare_tensor_and_a_list_of_tensors(tmp_path):
    torch.save(bank(4, 5, 5).requires_grad_(), tmp_path / "bare.pt")
    found = read_kernels(tmp_path / "bare.pt")
    assert found.key == ""
    assert not found.values.requires_grad
    torch.save([bank(4, 5, 5), bank(2, 3, 3)], tmp_path / "list.pt")
    assert read_kernels(tmp_path / "list.pt", key="1").values.shape == (2, 3, 3)


def test_one_dimension_takes_vectors_for_biases(tmp_path):
    path = save(tmp_path / "net.pt", **torch.nn.Conv1d(1, 4, 9).state_dict())
    assert read_kernels(path, n_dims=1).values.shape == (4, 1, 9)
    refused(
        path, "no array that may be kernels", "'weight' (4 × 1 × 9, float32)", "'bias' (4, float32)"
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_whole_numbers_become_floating(tmp_path, dtype):
    values = np.arange(50).reshape(2, 5, 5).astype(dtype)
    np.save(tmp_path / "whole.npy", values)
    found = read_kernels(tmp_path / "whole.npy")
    assert found.values.dtype == torch.float64
    assert np.array_equal(found.values.numpy(), values)


def test_floating_kernels_come_before_whole_ones(tmp_path):
    path = save(tmp_path / "a.npz", raw=np.zeros((4, 5, 5), "u1"), weights=bank(4, 5, 5))
    assert read_kernels(path).key == "weights"
    assert read_kernels(path, key="raw").values.dtype == torch.float64


def test_what_is_not_a_number_is_left_to_the_fit(tmp_path):
    values = bank(3, 7, 7)
    values[1, 2, 3] = torch.nan
    np.save(tmp_path / "nan.npy", values.numpy())
    outcomes = fit(read_kernels(tmp_path / "nan.npy").values, max_iterations=2).outcome
    assert [outcome is Outcome.BAD_INPUT for outcome in outcomes] == [False, True, False]


# -- images -----------------------------------------------------------------------------------


def draw(folder: Path, **images: Any) -> Path:
    pillow = pytest.importorskip("PIL.Image")
    folder.mkdir()
    for name, pixels in images.items():
        pillow.fromarray(np.asarray(pixels, "u1")).save(folder / f"{name}.png")
    return folder


def test_every_image_of_a_folder_is_a_kernel(tmp_path):
    folder = draw(tmp_path / "bank", a=[[0, 255], [51, 204]], b=[[[255, 0, 51]] * 2] * 2)
    with pytest.warns(UserWarning, match="0 is mid-grey"):
        found = read_kernels(folder)
    assert found.values.shape == (2, 3, 2, 2)
    expected = torch.tensor([[-1.0, 1.0], [-0.6, 0.6]], dtype=torch.float64)
    assert torch.allclose(found.values[0], expected.expand(3, 2, 2))
    assert torch.allclose(found.values[1, :, 0, 0], expected.new_tensor([1.0, -1.0, -0.6]))


def test_a_single_image_is_a_kernel(tmp_path):
    folder = draw(tmp_path / "bank", a=[[0, 255, 0]] * 3)
    with pytest.warns(UserWarning, match="mid-grey"):
        assert read_kernels(folder / "a.png").values.shape == (1, 1, 3, 3)


def test_images_that_are_no_bank(tmp_path):
    refused(
        draw(tmp_path / "mixed", a=[[0] * 4] * 3, b=[[0] * 5] * 5),
        "one size", "got 3 × 4, 5 × 5 px",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="0 is mid-grey"):
        refused(draw(tmp_path / "photos", a=[[0] * 300] * 200), "1 × 1 × 200 × 300", "to 256 px")
    refused(draw(tmp_path / "empty"), "No images", error=FileNotFoundError)
    with pytest.warns(UserWarning, match="0 is mid-grey"):
        refused(draw(tmp_path / "named", a=[[0]]), "no array 'weight'", key="weight")


# -- what is refused --------------------------------------------------------------------------


def test_which_of_several_arrays_is_meant_has_to_be_said(tmp_path):
    path = save(tmp_path / "rf.npz", small=bank(3, 8, 8), large=bank(3, 9, 9), text=np.array("x"))
    refused(path, "'small' (3 × 8 × 8, float32)", "'large' (3 × 9 × 9, float32)", "(--key)")
    assert read_kernels(path, key="large").values.shape == (3, 9, 9)
    refused(path, "no array 'huge'", "only 'small' (3 × 8 × 8, float32)", key="huge")


def test_two_first_layers_are_not_chosen_from(tmp_path):
    path = save(tmp_path / "two.npz", left=bank(4, 3, 5, 5), right=bank(4, 3, 5, 5))
    refused(path, "'left'", "'right'", "choose one with key (--key)")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.ones((2, 3, 3), complex), ["holds no arrays of real numbers"]),
        (np.ones((2, 3, 3), bool), ["holds no arrays of real numbers"]),
        (np.ones((2, 3, 3), "M8[s]"), ["holds no arrays of real numbers"]),
        (np.float64(3), ["shape a single value", "expected kernels of 2 dimensions"]),
        (np.ones((0, 3, 3)), ["shape 0 × 3 × 3"]),
        (np.ones(9), ["shape 9", "expected kernels of 2 dimensions"]),
        (np.ones((8, 3, 1, 1)), ["shape 8 × 3 × 1 × 1", "2 to 256 px"]),
        (np.ones((64, 1000)), ["shape 64 × 1000", "reshape"]),
    ],
)
def test_arrays_that_are_no_kernels(tmp_path, values, words):
    np.save(tmp_path / "it.npy", values)
    refused(tmp_path / "it.npy", *words)


def test_a_key_for_an_array_without_a_name(tmp_path):
    np.save(tmp_path / "it.npy", bank(3, 3).numpy())
    refused(tmp_path / "it.npy", "no array 'weights'", key="weights")


def test_the_only_array_is_meant_whatever_it_is(tmp_path):
    refused(save(tmp_path / "it.npz", bias=bank(9)), "'bias'", "has shape 9,")


class Exploding:
    """Unpickled, it would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", ["it.npy", "it.npz", "it.pt", "raw.npy", "raw.npz", "raw.pt"])
def test_nothing_is_unpickled(tmp_path, name):
    path, trap = tmp_path / name, Exploding(tmp_path / "trace")
    if name.startswith("raw"):
        path.write_bytes(pickle.dumps(trap))
    elif name == "it.pt":
        torch.save({"weight": trap}, path)
    else:
        array = np.array([trap], dtype=object)
        np.save(path, array) if name == "it.npy" else np.savez(path, weight=array)
    refused(path)
    assert not (tmp_path / "trace").exists()


def test_a_pickled_model_is_refused_with_what_to_do(tmp_path):
    torch.save(torch.nn.Conv2d(1, 2, 3), tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "needs unpickling", "state dict")


def test_objects_beside_the_kernels_are_passed_over(tmp_path):
    labels = np.array([{}], dtype=object)
    np.savez(tmp_path / "a.npz", labels=labels, weights=bank(2, 3, 3).numpy())
    assert read_kernels(tmp_path / "a.npz").key == "weights"


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".pt", ".png"])
@pytest.mark.parametrize("damage", ["empty", "words", "half"])
def test_damaged_files(tmp_path, suffix, damage):
    path = tmp_path / f"it{suffix}"
    if suffix == ".npy":
        np.save(path, bank(9, 9, 9).numpy())
    elif suffix == ".png":
        pytest.importorskip("PIL.Image").fromarray(np.zeros((9, 9), "u1")).save(path)
    else:
        save(path, weight=bank(9, 9, 9))
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "words": b"only words", "half": whole[: len(whole) // 2]}[damage]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(path, "cannot be read")


def test_other_files_and_no_files(tmp_path):
    for name in ("bank.mat", "bank"):
        (tmp_path / name).write_bytes(b"content")
        refused(tmp_path / name, ".npy, .npz, .safetensors, .pt, .pth")
    refused(tmp_path / "none.npy", error=FileNotFoundError)
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    refused(tmp_path / "none.pt", "holds no arrays of real numbers")
    torch.save(torch.eye(4).to_sparse(), tmp_path / "sparse.pt")
    refused(tmp_path / "sparse.pt", "holds no arrays of real numbers")


# -- measured data ----------------------------------------------------------------------------


def test_kernels_of_trained_networks_are_read(shared):
    paths = sorted((shared / "kernels").glob("*.npz"))
    assert paths
    for path in paths:
        found = read_kernels(path)
        assert found.key == "weights"
        assert found.values.ndim == 4


def test_measured_receptive_fields_are_read(shared):
    path = shared / "v1" / "macaque_v1_rf.npz"
    refused(path, "several arrays", "'rf32' (5 × 32 × 32, float32)")
    assert read_kernels(path, key="rf24").values.shape == (23, 24, 24)


# -- ONNX -------------------------------------------------------------------------------------


def node(number: int, kernels: str, kind: str = "Conv", **names: Any) -> Any:
    helper = pytest.importorskip("onnx.helper")
    return helper.make_node(kind, [f"x{number}", kernels], [f"x{number + 1}"], **names)


def onnx_file(path: Path, nodes: list[Any], **kernels: Any) -> Path:
    """A chain of nodes from x0 on, with arrays or tensors as kernels."""
    onnx = pytest.importorskip("onnx")
    held = [
        onnx.numpy_helper.from_array(value.numpy(), name) if torch.is_tensor(value) else value
        for name, value in kernels.items()
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in ("x0", f"x{len(nodes)}")
    ]
    graph = onnx.helper.make_graph(nodes, "network", ends[:1], ends[1:], held)
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return path


def outside(place: str, kernels: torch.Tensor, offset: int = 0) -> Any:
    """A tensor whose numbers are said to be in another file."""
    onnx = pytest.importorskip("onnx")
    held = onnx.numpy_helper.from_array(kernels.numpy(), "a")
    held.ClearField("raw_data")
    held.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": place, "offset": offset, "length": kernels.nbytes}.items():
        entry = held.external_data.add()
        entry.key, entry.value = key, str(value)
    return held


def test_the_convolution_that_runs_first_is_read_and_named(tmp_path):
    # The second one is channel by channel: each of its kernels sees one.
    first, second = bank(8, 4, 7, 7), bank(8, 1, 5, 5)
    nodes = [node(0, "b"), node(1, "a", group=8)]
    path = onnx_file(tmp_path / "net.onnx", nodes, a=second, b=first)
    with pytest.warns(UserWarning, match=r"'b' of .*, 8 × 4 × 7 × 7, the first layer of 2"):
        found = read_kernels(path)
    assert found.key == "b"
    assert torch.equal(found.values, first)
    assert torch.equal(read_kernels(path, key="a").values, second)


def test_an_exported_network_has_the_kernels_that_it_had(tmp_path):
    pytest.importorskip("onnxscript")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 5), torch.nn.ReLU())
    to_onnx(network.eval(), tmp_path / "net.onnx", torch.zeros(1, 3, 9, 9))
    assert torch.equal(read_kernels(tmp_path / "net.onnx").values, network[0].weight.detach())


def test_kernels_are_read_from_a_file_in_the_same_folder(tmp_path):
    kernels = bank(2, 3, 5, 5)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/a.data").write_bytes(b"1234" + kernels.numpy().tobytes())
    held = outside("parts/a.data", kernels, offset=4)
    path = onnx_file(tmp_path / "net.onnx", [node(0, "a")], a=held)
    assert torch.equal(read_kernels(path).values, kernels)
    (tmp_path / "parts/a.data").write_bytes(kernels.numpy().tobytes()[:-8])
    refused(path, "cannot be read")


@pytest.mark.parametrize(
    "place", ["{}/secret", "../secret", "in/../../secret", "link", "C:\\a", "", "missing"]
)
def test_no_file_elsewhere_is_opened(tmp_path, place):
    kernels = bank(2, 3, 5, 5)
    (tmp_path / "secret").write_bytes(kernels.numpy().tobytes())
    folder = tmp_path / "folder"
    (folder / "in").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "secret")
    held = outside(place.format(tmp_path), kernels)
    refused(onnx_file(folder / "net.onnx", [node(0, "a")], a=held), "cannot be read")


@pytest.mark.parametrize("kind", ["Relu", "ConvTranspose", "QLinearConv", "ConvInteger", "Mul"])
def test_a_graph_without_kernels_of_its_first_convolution(tmp_path, kind):
    # After another kind of convolution or one with computed kernels, no later one is taken.
    helper = pytest.importorskip("onnx.helper")
    first = [node(0, "a", kind)]
    if kind == "Mul":
        first = [helper.make_node("Mul", ["a", "a"], ["k"]), node(0, "k")]
    rest = [] if kind == "Relu" else [node(1, "b")]
    path = tmp_path / "net.onnx"
    onnx_file(path, [*first, *rest], a=bank(8, 3, 5, 5), b=bank(4, 8, 5, 5))
    refused(path, "holds no arrays of real numbers")


def test_after_a_convolution_other_kinds_do_not_matter(tmp_path):
    later = [node(0, "b"), node(1, "a", "ConvTranspose")]
    onnx_file(tmp_path / "net.onnx", later, a=bank(8, 4, 5, 5), b=bank(4, 3, 5, 5))
    assert read_kernels(tmp_path / "net.onnx").key == "b"


def test_dimensions_are_those_of_the_graph(tmp_path):
    path = onnx_file(tmp_path / "net.onnx", [node(0, "a")], a=bank(8, 1, 9))
    refused(path, "shape 8 × 1 × 9", "of 2 dimensions (--n-dims)")
    assert read_kernels(path, n_dims=1).values.shape == (8, 1, 9)


def test_without_onnx_it_says_how_to_get_it(tmp_path, monkeypatch):
    path = onnx_file(tmp_path / "net.onnx", [node(0, "a")], a=bank(8, 3, 5, 5))
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ImportError, match=r"need onnx: pip install \"gaborium\[onnx\]\""):
        read_kernels(path)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.5, 0.9, 0.999])
def test_cut_off_graphs(tmp_path, share):
    path = onnx_file(tmp_path / "net.onnx", [node(0, "a")], a=bank(8, 3, 5, 5))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path, "cannot be read")


# -- layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_a_layer_has_the_kernels_and_the_bias_that_belongs_to_them(tmp_path, name):
    weights = {
        "stem.conv.weight": bank(4, 3, 5, 5),
        "stem.conv.bias": bank(4),
        "body.weight": bank(6, 4, 3, 3),
    }
    kernels = read_kernels(save(tmp_path / name, **weights), key="stem.conv.weight")
    assert (kernels.key, kernels.bias_key) == ("stem.conv.weight", "stem.conv.bias")
    layer = kernels.layer(stride=2)
    assert torch.equal(layer.weight, weights["stem.conv.weight"])
    assert torch.equal(layer.bias, weights["stem.conv.bias"])
    assert layer.stride == (2, 2)
    assert layer(torch.rand(1, 3, 20, 20)).shape == (1, 4, 10, 10)
    changed = torch.nn.Conv2d(3, 4, 5)
    after = kernels.weights_with(changed)
    assert set(after) == set(weights)
    assert torch.equal(after["stem.conv.weight"], changed.weight)
    assert torch.equal(after["stem.conv.bias"], changed.bias)
    assert torch.equal(after["body.weight"], weights["body.weight"])


def test_a_layer_without_a_bias_can_get_one_under_the_name_that_belongs_to_it(tmp_path):
    kernels = read_kernels(save(tmp_path / "net.pt", **{"conv.weight": bank(4, 1, 5, 5).half()}))
    assert kernels.layer().bias is None
    assert kernels.layer().weight.dtype == torch.float32  # half precision is for storage
    after = kernels.weights_with(torch.nn.Conv2d(1, 4, 5))
    assert set(after) == {"conv.weight", "conv.bias"}
    assert {value.dtype for value in after.values()} == {torch.float16}
    np.save(tmp_path / "bank.npy", bank(4, 7, 7).numpy())
    kernels = read_kernels(tmp_path / "bank.npy")
    assert kernels.layer().weight.shape == (4, 1, 7, 7)
    assert set(kernels.weights_with(torch.nn.Conv2d(1, 4, 7))) == {"weight", "bias"}
    named = read_kernels(save(tmp_path / "named.npz", kernels=bank(4, 1, 5, 5), note="mine"))
    assert set(named.weights_with(torch.nn.Conv2d(1, 4, 5))) == {"kernels", "kernels_bias"}
    other = save(tmp_path / "other.pt", **{"a.weight": bank(4, 1, 5, 5), "a.bias": bank(3)})
    assert read_kernels(other).layer().bias is None  # it belongs to something else


def test_a_saved_gabor_layer_comes_back_as_one(tmp_path):
    saved = GaborConv2d(3, 8, 9, seed=0)
    save_layer(saved, tmp_path / "first.safetensors")
    kernels = read_kernels(tmp_path / "first.safetensors")
    assert type(kernels.layer()) is GaborConv2d
    assert torch.equal(kernels.values, saved.weight)
    save_layer(saved, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-3])
    with pytest.raises(ValueError, match="is damaged"):
        read_kernels(tmp_path / "cut.safetensors")


# -- scripts ----------------------------------------------------------------------------------

SCRIPT = """
import torch
from torch import nn
from gaborium import GaborConv2d

def setup():
    torch.manual_seed(0)
    layer, image = GaborConv2d(1, 2, 7, seed=0), torch.randn(1, 1, 20, 20)
    targets = GaborConv2d(1, 2, 7, seed=1, start="random")(image).detach()
    return {}
"""
GOOD = "layer, nn.functional.mse_loss, (image, targets)"


def script(folder: Path, text: str, name: str = "mine.py") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_three_are_enough_and_a_list_is_a_pair(tmp_path):
    returned = "layer, nn.functional.mse_loss, [image, targets]"
    _, _, (inputs, _), optimizer = run_setup(script(tmp_path, SCRIPT.format(returned)))
    assert optimizer is None
    assert inputs.shape == (1, 1, 20, 20)


@pytest.mark.parametrize("returned", ["{}", "{}, nn.functional.mse_loss, (image, targets)"])
def test_the_network_of_a_script_is_read(tmp_path, returned):
    network = returned.format("nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 5))")
    kernels = read_kernels(script(tmp_path, SCRIPT.format(network)))
    layer = kernels.layer()
    assert (kernels.key, kernels.bias_key) == ("1.weight", "1.bias")
    assert torch.equal(layer.weight, kernels.values)
    assert set(kernels.weights_with(layer)) == {"1.weight", "1.bias"}
    with pytest.raises(match=r"must return a network, or .*, got int"):
        read_kernels(script(tmp_path, SCRIPT.format("3")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", ["no function setup()"]),
        ("setup = 3\n", ["no function setup()"]),
        ("def setup(:\n", ["line 1", "SyntaxError"]),
        ("import torch\nimport no_such_module_of_mine\n", ["line 2", "no_such_module_of_mine"]),
        ("def setup():\n    a = 1\n    return undefined\n", ["line 3", "NameError", "undefined"]),
        ("def setup():\n    raise SystemExit(3)\n", ["line 2", "SystemExit: 3"]),
        ("def setup():\n    raise RuntimeError('a\\nb')\n", ["RuntimeError: a b"]),
        (
            "def setup():\n    return None\n",
            ["must return a network, or (module, loss,", "got NoneType"],
        ),
        ("def setup():\n    return 1, 2\n", ["got int, int"]),
        (SCRIPT.format("1, nn.functional.mse_loss, (image, targets)"), ["int, function, tuple"]),
        (SCRIPT.format("layer, 'mse', (image, targets)"), ["got GaborConv2d, str, tuple"]),
        (SCRIPT.format("layer, nn.functional.mse_loss, image"), ["function, Tensor"]),
        (SCRIPT.format(f"{GOOD}, 0.1"), ["tuple, float"]),
    ],
)
def test_a_script_that_fails_is_one_line(tmp_path, text, words):
    with pytest.raises(ValueError, match=r"mine\.py") as caught:
        run_setup(script(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_what_a_script_raises_keeps_its_cause(tmp_path):
    with pytest.raises(ValueError, match="line 1: ZeroDivisionError") as caught:
        run_setup(script(tmp_path, "1 / 0\n"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(KeyboardInterrupt):
        run_setup(script(tmp_path, "raise KeyboardInterrupt\n"))
    with pytest.raises(FileNotFoundError):
        run_setup(tmp_path / "missing.py")
