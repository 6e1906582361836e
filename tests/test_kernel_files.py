"""Kernels come out of a file as they went in, and what holds none says so in one line."""

import hashlib
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gaborium import Outcome, fit
from gaborium.kernel_files import read_kernels, read_layer

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
    assert message.endswith(".")
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
    assert (found.name, found.key) == ("bank.npy", None)
    assert found.sha256 == hashlib.sha256((tmp_path / "bank.npy").read_bytes()).hexdigest()


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
    with pytest.warns(UserWarning, match=r"'0\.weight', 8 × 3 × 7 × 7, .* key \(--key\)") as said:
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
    with pytest.warns(UserWarning, match=r"'1\.weight', 8 × 4 × 7 × 7, the first of 2"):
        assert read_kernels(save(tmp_path / "net.pt", **net.state_dict())).key == "1.weight"


def test_colours_come_before_single_channels(tmp_path):
    net = {"b.weight": bank(8, 3, 5, 5), "a.weight": bank(8, 1, 5, 5), "c.weight": bank(8, 1, 3, 3)}
    path = save(tmp_path / "net.safetensors", **net)
    with pytest.warns(UserWarning, match=r"'b\.weight', .* only array with 3 input channels"):
        assert read_kernels(path).key == "b.weight"


@pytest.mark.parametrize("name", ["net.safetensors", "net.npz", "net.pt"])
def test_a_first_layer_of_one_pixel_is_not_passed_over(tmp_path, name):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 5))
    path = save(tmp_path / name, **{key: value.detach() for key, value in net.state_dict().items()})
    refused(path, "first convolution", "'0.weight'", "(8 × 3 × 1 × 1)", "one pixel", "key (--key)")
    assert read_kernels(path, key="1").values.shape == (4, 8, 5, 5)
    refused(path, "of one pixel", key="0")


def test_later_layers_of_one_pixel_do_not_matter(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 5), torch.nn.Conv2d(8, 4, 1))
    for name in ("net.safetensors", "net.pt"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert read_kernels(save(tmp_path / name, **net.state_dict())).key == "0.weight"


def test_arrays_that_are_no_network_have_no_first_layer(tmp_path):
    for name in ("a.npz", "a.safetensors", "a.pt"):
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
    assert found.key is None
    assert not found.values.requires_grad
    torch.save([bank(4, 5, 5), bank(2, 3, 3)], tmp_path / "list.pt")
    assert read_kernels(tmp_path / "list.pt", key="1").values.shape == (2, 3, 3)


def test_one_dimension_takes_vectors_for_biases(tmp_path):
    path = save(tmp_path / "net.pt", **torch.nn.Conv1d(1, 4, 9).state_dict())
    assert read_kernels(path, n_dims=1).values.shape == (4, 1, 9)
    refused(path, "no kernels of 2 axes", "'weight' (4 × 1 × 9, float32)", "'bias' (4, float32)")


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_whole_numbers_become_floating_with_one_note(tmp_path, dtype):
    values = np.arange(50).reshape(2, 5, 5).astype(dtype)
    np.save(tmp_path / "whole.npy", values)
    with pytest.warns(UserWarning, match=f"holds {values.dtype}.* subtract it") as said:
        found = read_kernels(tmp_path / "whole.npy")
    assert len(said) == 1
    assert found.values.dtype == torch.float64
    assert np.array_equal(found.values.numpy(), values)


def test_floating_kernels_come_before_whole_ones(tmp_path):
    path = save(tmp_path / "a.npz", raw=np.zeros((4, 5, 5), "u1"), weights=bank(4, 5, 5))
    assert read_kernels(path).key == "weights"
    path = save(tmp_path / "b.npz", raw=np.ones((4, 5, 5), "u1"), bias=bank(4))
    with pytest.warns(UserWarning, match="'raw' of .* holds uint8"):
        assert read_kernels(path).key == "raw"


def test_what_is_not_a_number_is_left_to_the_fit(tmp_path):
    values = bank(3, 7, 7)
    values[1, 2, 3] = torch.nan
    np.save(tmp_path / "nan.npy", values.numpy())
    outcomes = fit(read_kernels(tmp_path / "nan.npy").values, max_iterations=2).outcome
    assert [outcome is Outcome.BAD_INPUT for outcome in outcomes] == [False, True, False]


def test_axes_in_the_order_of_other_libraries_are_pointed_out(tmp_path):
    np.save(tmp_path / "hwio.npy", bank(5, 5, 3, 16).numpy())
    with pytest.warns(UserWarning, match=r"looks like \(height, width, in, out\)"):
        read_kernels(tmp_path / "hwio.npy")


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
    content = (folder / "a.png").read_bytes() + (folder / "b.png").read_bytes()
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert found.name == "bank"


def test_a_single_image_is_a_kernel(tmp_path):
    folder = draw(tmp_path / "bank", a=[[0, 255, 0]] * 3)
    with pytest.warns(UserWarning, match="mid-grey"):
        assert read_kernels(folder / "a.png").values.shape == (1, 1, 3, 3)


def test_images_that_are_no_bank(tmp_path):
    refused(
        draw(tmp_path / "mixed", a=[[0] * 4] * 3, b=[[0] * 5] * 5),
        "3 × 4 px for 'a.png'", "5 × 5 px for 'b.png'",
    )  # fmt: skip
    refused(draw(tmp_path / "photos", a=[[0] * 300] * 200), "200 × 300 px", "at most 256 px")
    refused(draw(tmp_path / "empty"), "No images", error=FileNotFoundError)
    refused(draw(tmp_path / "named", a=[[0]]), "leave out key (--key)", key="weight")
    folder = draw(tmp_path / "arrays", a=[[0]])
    np.save(folder / "b.npy", bank(5, 5).numpy())
    refused(folder, "numpy.stack")


# -- what is refused --------------------------------------------------------------------------


def test_which_of_several_arrays_is_meant_has_to_be_said(tmp_path):
    path = save(tmp_path / "rf.npz", small=bank(3, 8, 8), large=bank(3, 9, 9), text=np.array("x"))
    refused(path, "'small' (3 × 8 × 8, float32)", "'large' (3 × 9 × 9, float32)", "(--key)")
    assert read_kernels(path, key="large").values.shape == (3, 9, 9)
    refused(path, "no array 'huge'", "'text' (a single value, <U1)", key="huge")
    refused(path, "'text'", "expected plain real numbers", key="text")


def test_two_first_layers_are_not_chosen_from(tmp_path):
    path = save(tmp_path / "two.pt", left=bank(4, 3, 5, 5), right=bank(4, 3, 5, 5))
    refused(path, "'left'", "'right'", "choose one with key (--key)")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.ones((2, 3, 3), complex), ["complex128", "convert it"]),
        (np.ones((2, 3, 3), bool), ["bool", "convert it"]),
        (np.ones((2, 3, 3), "M8[s]"), ["datetime64", "convert it"]),
        (np.float64(3), ["(filters, height, width)", "shape ()"]),
        (np.ones((0, 3, 3)), ["not empty", "(0, 3, 3)"]),
        (np.ones(9), ["(filters, height, width)", "(9,)"]),
        (np.ones((8, 3, 1, 1)), ["one pixel"]),
        (np.ones((64, 1000)), ["64 × 1000 px", "reshape"]),
    ],
)
def test_arrays_that_are_no_kernels(tmp_path, values, words):
    np.save(tmp_path / "it.npy", values)
    refused(tmp_path / "it.npy", *words)


def test_a_key_for_an_array_without_a_name(tmp_path):
    np.save(tmp_path / "it.npy", bank(3, 3).numpy())
    refused(tmp_path / "it.npy", "without a name", key="weights")


def test_the_only_array_is_meant_whatever_it_is(tmp_path):
    refused(save(tmp_path / "it.npz", bias=bank(9)), "'bias'", "(filters, height, width)", "(9,)")


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
    refused(tmp_path / "model.pt", "needs unpickling", "state dict", ".safetensors")


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
        refused(path, "0 bytes" if damage == "empty" else "copy")


def test_other_files_and_no_files(tmp_path):
    for name in ("bank.mat", "bank"):
        (tmp_path / name).write_bytes(b"content")
        refused(tmp_path / name, ".npy, .npz, .safetensors, .pt, .pth", "numpy.save")
    refused(tmp_path / "none.npy", "check the path", error=FileNotFoundError)
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    refused(tmp_path / "none.pt", "no arrays")
    torch.save(torch.eye(4).to_sparse(), tmp_path / "sparse.pt")
    refused(tmp_path / "sparse.pt", "sparse")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    np.save(tmp_path / "mine.npy", bank(3, 3).numpy())

    # Patched, because the superuser may read everything.
    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(tmp_path / "mine.npy", "permission denied", error=PermissionError)


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
    refused(path, "'rf32' (5 × 32 × 32, float32)", "'rf24' (23 × 24 × 24, float32)")
    assert read_kernels(path, key="rf24").values.shape == (23, 24, 24)


# -- layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_a_layer_has_the_kernels_and_the_bias_that_lies_beside_them(tmp_path, name):
    weights = {
        "stem.conv.weight": bank(4, 3, 5, 5),
        "stem.conv.bias": bank(4),
        "body.weight": bank(6, 4, 3, 3),
    }
    found = read_layer(save(tmp_path / name, **weights), key="stem.conv.weight", stride=2)
    assert (found.key, found.bias_key) == ("stem.conv.weight", "stem.conv.bias")
    assert torch.equal(found.layer.weight, weights["stem.conv.weight"])
    assert torch.equal(found.layer.bias, weights["stem.conv.bias"])
    assert found.layer.stride == (2, 2)
    assert found.layer(torch.rand(1, 3, 20, 20)).shape == (1, 4, 10, 10)
    changed = torch.nn.Conv2d(3, 4, 5)
    after = found.weights_with(changed)
    assert set(after) == set(weights)
    assert torch.equal(after["stem.conv.weight"], changed.weight)
    assert torch.equal(after["stem.conv.bias"], changed.bias)
    assert torch.equal(after["body.weight"], weights["body.weight"])


def test_a_layer_without_a_bias_can_get_one_under_the_name_that_belongs_to_it(tmp_path):
    half = {"conv.weight": bank(4, 1, 5, 5).half()}
    found = read_layer(save(tmp_path / "net.pt", **half))
    assert found.layer.bias is None
    assert found.layer.weight.dtype == torch.float32  # half precision is for storage
    after = found.weights_with(torch.nn.Conv2d(1, 4, 5))
    assert set(after) == {"conv.weight", "conv.bias"}
    assert {value.dtype for value in after.values()} == {torch.float16}
    np.save(tmp_path / "bank.npy", bank(4, 7, 7).numpy())
    found = read_layer(tmp_path / "bank.npy")
    assert found.layer.weight.shape == (4, 1, 7, 7)
    assert (found.key, found.bias_key) == ("weight", "bias")
    named = read_layer(save(tmp_path / "named.npz", kernels=bank(4, 1, 5, 5), note="mine"))
    assert (named.key, named.bias_key, set(named.arrays)) == (
        "kernels",
        "kernels_bias",
        {"kernels"},
    )


def test_what_is_no_layer_is_told_in_a_line(tmp_path):
    np.save(tmp_path / "one.npy", bank(7, 7).numpy())
    from PIL import Image

    Image.new("L", (5, 5)).save(tmp_path / "kernel.png")
    wrong = save(tmp_path / "wrong.pt", **{"a.weight": bank(4, 1, 5, 5), "a.bias": bank(3)})
    for path, words in (
        (tmp_path / "one.npy", "(filters, channels, *size), got shape (7, 7)"),
        (tmp_path / "kernel.png", "holds images"),
        (wrong, "a number for each of 4 filters, got shape (3,)"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)) as caught:
            read_layer(path)
        assert "\n" not in str(caught.value)
