"""Kernels come out of ONNX files in the order in which they run, and only from where they may."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gaborium.kernel_files import read_kernels
from gaborium.onnx_files import read_convolutions

np = pytest.importorskip("numpy")
onnx = pytest.importorskip("onnx")
helper = pytest.importorskip("onnx.helper")


def bank(*shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).numpy()


def tensor(name: str, values: Any) -> Any:
    return onnx.numpy_helper.from_array(np.asarray(values), name)


def conv(number: int, kernels: str, kind: str = "Conv", **names: Any) -> Any:
    return helper.make_node(kind, [f"x{number}", kernels], [f"x{number + 1}"], **names)


def save(path: Path, nodes: list[Any], **kernels: Any) -> Path:
    """A chain of nodes from x0 on, with arrays or tensors as kernels."""
    held = [
        tensor(name, values) if isinstance(values, np.ndarray) else values
        for name, values in kernels.items()
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in ("x0", f"x{len(nodes)}")
    ]
    graph = helper.make_graph(nodes, "network", ends[:1], ends[1:], held)
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def refused(path: Path, *words: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=path.name) as caught:
        read_kernels(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for word in words:
        assert word in message, message


# -- what is read -----------------------------------------------------------------------------


def test_the_convolution_that_runs_first_is_read_and_named(tmp_path):
    first, second = bank(8, 3, 7, 7), bank(4, 8, 5, 5)
    path = save(tmp_path / "net.onnx", [conv(0, "b"), conv(1, "a")], a=second, b=first)
    assert list(read_convolutions(path)) == ["b", "a"]
    with pytest.warns(UserWarning, match=r"'b', 8 × 3 × 7 × 7, the first of 2 .*\(--key\)"):
        found = read_kernels(path)
    assert found.key == "b"
    assert np.array_equal(found.values.numpy(), first)
    assert read_kernels(path, key="a").values.shape == second.shape


def test_a_first_layer_of_many_channels_is_still_the_first(tmp_path):
    # In a channel-by-channel convolution each kernel sees one.
    path = save(
        tmp_path / "net.onnx", [conv(0, "a"), conv(1, "b", group=8)],
        a=bank(8, 4, 5, 5), b=bank(8, 1, 5, 5),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="'a'"):
        assert read_kernels(path).key == "a"


def test_kernels_behind_constants_and_identities_are_found(tmp_path):
    kernels = bank(2, 1, 3, 3)
    nodes = [
        helper.make_node("Constant", [], ["k"], value=tensor("", kernels)),
        helper.make_node("Identity", ["k"], ["same"]),
        conv(0, "same"),
    ]
    assert np.array_equal(read_convolutions(save(tmp_path / "c.onnx", nodes))["same"], kernels)


def test_an_exported_network_tells_the_kernels_that_it_had(tmp_path):
    pytest.importorskip("onnxscript")
    from gaborium.storage import to_onnx

    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 5), torch.nn.ReLU())
    to_onnx(network.eval(), tmp_path / "net.onnx", torch.zeros(1, 3, 9, 9))
    assert torch.equal(read_kernels(tmp_path / "net.onnx").values, network[0].weight.detach())


def test_kernels_in_a_file_beside_are_read(tmp_path):
    kernels = bank(2, 3, 5, 5)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/a.data").write_bytes(b"1234" + kernels.tobytes())
    held = outside("parts/a.data", kernels, offset=4)
    path = save(tmp_path / "net.onnx", [conv(0, "a")], a=held)
    assert np.array_equal(read_kernels(path).values.numpy(), kernels)


# -- what is refused --------------------------------------------------------------------------


def outside(place: str, kernels: Any, offset: int = 0) -> Any:
    """A tensor whose numbers are said to be in another file."""
    held = tensor("a", kernels)
    held.ClearField("raw_data")
    held.data_location = onnx.TensorProto.EXTERNAL
    facts = {"location": place, "offset": offset, "length": kernels.nbytes}
    for key, value in facts.items():
        entry = held.external_data.add()
        entry.key, entry.value = key, str(value)
    return held


@pytest.mark.parametrize(
    "place", ["{}/secret", "../secret", "in/../../secret", "link", "C:\\a", ""]
)
def test_no_file_elsewhere_is_opened(tmp_path, place):
    kernels = bank(2, 3, 5, 5)
    (tmp_path / "secret").write_bytes(kernels.tobytes())
    folder = tmp_path / "folder"
    (folder / "in").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "secret")
    held = outside(place.format(tmp_path), kernels)
    path = save(folder / "net.onnx", [conv(0, "a")], a=held)
    refused(path, "'a'", "not in its folder", "single file")


def test_a_file_that_is_not_there_or_too_short(tmp_path):
    kernels = bank(2, 3, 5, 5)
    path = save(tmp_path / "net.onnx", [conv(0, "a")], a=outside("a.data", kernels))
    refused(path, "'a.data', which is not there; copy it, too")
    (tmp_path / "a.data").write_bytes(kernels.tobytes()[:-8])
    refused(path, "copy or save it again")


def test_a_graph_without_a_convolution(tmp_path):
    path = save(tmp_path / "net.onnx", [helper.make_node("Relu", ["x0"], ["x1"])])
    refused(path, "no Conv node among the 1 of its graph")


@pytest.mark.parametrize("kind", ["ConvTranspose", "QLinearConv", "ConvInteger"])
def test_a_first_convolution_of_another_kind_is_not_passed_over(tmp_path, kind):
    nodes = [conv(0, "a", kind, name="up"), conv(1, "b")]
    path = save(tmp_path / "net.onnx", nodes, a=bank(8, 3, 5, 5), b=bank(4, 8, 5, 5))
    refused(path, f"the {kind} 'up'", "of another kind")
    nodes = [conv(0, "b"), conv(1, "a", kind)]
    path = save(tmp_path / "net.onnx", nodes, a=bank(8, 4, 5, 5), b=bank(4, 3, 5, 5))
    assert list(read_convolutions(path)) == ["b"]


@pytest.mark.parametrize(
    "source",
    [
        [helper.make_node("Mul", ["a", "a"], ["k"])],
        [helper.make_node("Identity", ["k"], ["k"])],
        [],
    ],
)
def test_computed_kernels_are_told(tmp_path, source):
    path = save(tmp_path / "net.onnx", [*source, conv(0, "k")], a=bank(8, 3, 5, 5))
    refused(path, "the Conv 'x1'", "computed in the graph", "numpy.save")


def test_a_first_layer_of_one_pixel_is_not_passed_over(tmp_path):
    nodes = [conv(0, "a"), conv(1, "b")]
    path = save(tmp_path / "net.onnx", nodes, a=bank(8, 3, 1, 1), b=bank(4, 8, 5, 5))
    refused(path, "first convolution, 'a' (8 × 3 × 1 × 1)", "one pixel", "key (--key)")
    assert read_kernels(path, key="b").values.shape == (4, 8, 5, 5)
    refused(save(tmp_path / "net.onnx", nodes[:1], a=bank(8, 3, 1, 1)), "one pixel")


def test_dimensions_are_those_of_the_graph(tmp_path):
    path = save(tmp_path / "net.onnx", [conv(0, "a")], a=bank(8, 1, 9))
    refused(path, "(8 × 1 × 9) convolves in 1 dimensions, not 2", "(--n-dims)")
    assert read_kernels(path, n_dims=1).values.shape == (8, 1, 9)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.5, 0.9, 0.999])
def test_cut_off_files(tmp_path, share):
    path = save(tmp_path / "net.onnx", [conv(0, "a")], a=bank(8, 3, 5, 5))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path)


def test_other_files_by_this_name(tmp_path):
    (tmp_path / "it.onnx").write_bytes(b"only words")
    refused(tmp_path / "it.onnx", "damaged or not what its name says", "copy or save it again")


def test_without_onnx_it_says_how_to_get_it(tmp_path, monkeypatch):
    path = save(tmp_path / "net.onnx", [conv(0, "a")], a=bank(8, 3, 5, 5))
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ImportError, match=r"need onnx: pip install \"gaborium\[onnx\]\""):
        read_kernels(path)
