"""What only the experiments on learning use: data, corruptions and a classifier of textures."""

import sys
from pathlib import Path

import pytest
import torch

from gaborium import GaborConv2d
from gaborium.training import Recipe, load_trained, train

pytest.importorskip("PIL")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "learning"))
from augmentations import make_flip
from corruptions import KINDS, N_STRENGTHS, STRENGTHS, corrupt
from energies import (
    EnergyClassifier,
    EnergyNetwork,
    make_energy_layer,
    make_equal_start,
)
from texture import TextureClassifier

import data as learning_data

sys.path.pop(0)
ALL = range(1, N_STRENGTHS + 1)


# -- data and augmentation ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "n_test"),
    [
        ("kth-tips", (450, 1, 128, 128), 360),
        ("brodatz", (8112, 1, 24, 24), 8112),
        ("spoken-digits", (1000, 1, 8000), 250),
    ],
)
def test_the_real_collections_load(shared, name, shape, n_test):
    found = learning_data.load(name, shared)
    assert (tuple(found.images.shape), len(found.test_images)) == (shape, n_test)
    every = set(range(found.n_classes))
    assert set(found.labels.tolist()) == set(found.test_labels.tolist()) == every


def test_every_other_image_is_mirrored_the_same_in_any_batch():
    images = torch.rand(40, 1, 3, 5)
    rows, flip = torch.randperm(40), make_flip(40)
    whole = flip(images, torch.arange(40), 3)
    assert torch.equal(flip(images[rows], rows, 3), whole[rows])
    mirrored = (whole == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(torch.where(mirrored[:, None, None, None], images.flip(-1), images), whole)
    assert 10 < mirrored.sum() < 30
    assert not torch.equal(flip(images, torch.arange(40), 4), whole)


# -- corruptions --------------------------------------------------------------------------------


@pytest.fixture
def images() -> torch.Tensor:
    """Smooth images, with white noise of a twentieth upon them."""
    wave = torch.linspace(0, 6, 28).sin()
    smooth = 0.5 + 0.4 * wave[:, None] * wave * torch.rand(3, 2, 1, 1)
    return (smooth + 0.05 * (torch.rand(3, 2, 28, 28) - 0.5)).clamp(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_each_strength_is_worse_than_the_last_and_stays_in_range(kind, images):
    worse = [corrupt(images, kind, strength, seed=0) for strength in ALL]
    changes = [(one - images).square().mean().item() for one in worse]
    assert changes == sorted(changes)
    assert changes[0] > 4e-6
    assert worse[-1].min() >= 0
    assert worse[-1].max() <= 1
    assert torch.equal(corrupt(images, kind, 0, seed=0), images)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_comes_out_the_same_in_any_batch(kind, images):
    before, state = images.clone(), torch.get_rng_state()
    whole = corrupt(images, kind, 3, seed=7)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    for index in range(len(images)):
        alone = corrupt(images[index : index + 1], kind, 3, seed=7, first=index)
        # Vectorised arithmetic may round the end of a batch differently.
        torch.testing.assert_close(alone[0], whole[index], rtol=0, atol=1e-6)
    if kind in ("noise", "fog"):
        assert not torch.equal(corrupt(images, kind, 3, seed=8), whole)


def test_corruptions_are_what_the_table_says(images):
    grey = torch.full((50, 1, 32, 32), 0.5, dtype=torch.float64)
    point = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    point[..., 20, 20] = 1
    for strength, std in zip(ALL, STRENGTHS["blur"], strict=True):
        spread = corrupt(point, "blur", strength, seed=0)[0, 0]
        assert abs(spread.sum().item() - 1) < 1e-12
        offsets = torch.arange(41.0, dtype=torch.float64) - 20
        found = (spread.sum(0) * offsets.square()).sum().sqrt().item()
        # Sampled, and cut at three deviations, which makes the narrowest a fourteenth narrower.
        assert abs(found - std) < 0.04
    for strength, std in zip(ALL[:3], STRENGTHS["noise"], strict=False):
        assert abs((corrupt(grey, "noise", strength, seed=0) - grey).std().item() / std - 1) < 0.02
    weak = corrupt(images, "contrast", 4, seed=0)
    assert torch.allclose(weak.mean((1, 2, 3)), images.mean((1, 2, 3)))
    ratio = weak.std((1, 2, 3)) / images.std((1, 2, 3))
    assert torch.allclose(ratio, torch.full_like(ratio, STRENGTHS["contrast"][3]), atol=1e-5)
    fog = corrupt(torch.zeros(1, 3, 32, 32), "fog", 5, seed=0)[0]
    assert torch.equal(fog[0], fog[2])
    assert fog.min() >= 0.75 * 0.6 - 1e-6
    image = torch.rand(1, 1, 30, 27)
    for strength, side in zip(ALL, STRENGTHS["pixelate"], strict=True):
        coarse = corrupt(image, "pixelate", strength, seed=0)
        assert coarse.unique().numel() == -(-30 // side) * -(-27 // side)
        torch.testing.assert_close(coarse[0, 0, 0, 0], image[0, 0, :side, :side].mean())


# -- energies and textures ----------------------------------------------------------------------


def energy_layer(variant, n_filters=8, channels=3, start="random"):
    recipe = Recipe(n_filters=n_filters, kernel_size=7)
    options = {"n_dims": 2, "in_channels": channels, "recipe": recipe, "seed": 0}
    return make_energy_layer(variant, start=start, **options)


@pytest.mark.parametrize("variant", ["free", "gabor"])
def test_energies_begin_at_one_scale(variant):
    layer = energy_layer(variant, n_filters=64)
    with torch.no_grad():
        energies = layer(torch.randn(4, 3, 48, 48))[..., 4:-4, 4:-4]
    # The norm of a pair whose members have unequal powers varies more than of an equal pair.
    assert abs(energies.var((0, 2, 3)).mean().item() * 3 - 1) < 0.35


@pytest.mark.parametrize("output", ["real", "energy"])
def test_an_equal_start_is_equal_to_the_last_bit(stripes, output):
    start = make_equal_start(Recipe(n_filters=37, kernel_size=7), stripes, 5, output)
    layer = GaborConv2d(1, 37, 7, bias=False, start=start, output=output)
    for value in layer.state_dict().values():
        assert torch.equal(value, value[:1].expand_as(value))
    other = make_equal_start(Recipe(n_filters=37, kernel_size=7), stripes, 6, output)
    assert other.orientation[0, 0] != start.orientation[0, 0]


@pytest.mark.parametrize("kind", [EnergyClassifier, TextureClassifier])
def test_classifiers_of_energies_train_and_can_be_loaded(stripes, tmp_path, kind):
    pytest.importorskip("lightning_fabric")
    recipe = Recipe(
        n_filters=4, kernel_size=5, epochs=1, batch_size=7, seeds=(0,), accelerator="cpu"
    )
    network = EnergyNetwork(kind, recipe, stripes, "bank")
    result = train(recipe, stripes, network=network, folder=tmp_path)
    assert min(result.runs[0].displacement.values()) > 1e-6, "every field moves"
    trained = load_trained(tmp_path, network=network)
    hits = trained(stripes.test_images).argmax(1) == stripes.test_labels
    assert hits.double().mean().item() == pytest.approx(result.runs[0].accuracy)


def texture_of(channels=3, side=12):
    return TextureClassifier(energy_layer("gabor", channels, 1), 4, image_size=(side, side))


def test_texture_statistics_are_strength_spread_and_flatness_of_each_cell():
    energy = 100 * torch.rand(2, 3, 12, 12, dtype=torch.float64) + 20  # far above what is faint
    found = texture_of().statistics(energy)
    strength, spread, flatness = found[:, :81].view(2, 3, 3, 3, 3).unbind(1)
    cell = energy[:, :, 8:, :4].flatten(2)
    mean = cell.mean(2)
    near = {"atol": 0.002, "rtol": 0.0}
    torch.testing.assert_close(spread[:, :, 2, 0], (cell.std(2, correction=0) / mean).log(), **near)
    torch.testing.assert_close(
        flatness[:, :, 2, 0], (cell.log().mean(2).exp() / mean).log(), **near
    )
    # Compared with one another, cells and channels differ by the logarithms of their means.
    difference = strength[:, 2, 2, 0] - strength[:, 0, 0, 1]
    wanted = (mean[:, 2] / energy[:, 0, :4, 4:8].mean((1, 2))).log()
    torch.testing.assert_close(difference, wanted, **near)
    torch.testing.assert_close(strength.mean((1, 2, 3)), torch.zeros(2).double())


def test_texture_statistics_end_with_the_correlations_of_logarithms():
    energy = 100 * torch.rand(2, 4, 12, 12, dtype=torch.float64) + 20
    energy[1, 2] = 3 * energy[1, 0] ** 2
    found = texture_of(4).statistics(energy)[:, 4 * 39 :]
    assert found.shape == (2, 6)
    one, other = torch.triu_indices(4, 4, 1)
    for image, numbers in zip(energy, found, strict=True):
        wanted = torch.corrcoef(image.flatten(1).log())[one, other]
        torch.testing.assert_close(numbers, wanted, atol=0.01, rtol=0)
    assert found[1, 1] > 0.99
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = texture_of(4).statistics(energy.float())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half[:, 4 * 39 :], found.float(), atol=1e-4, rtol=0)


def test_texture_statistics_correlate_each_channel_with_itself():
    energy = 100 * torch.rand(2, 3, 12, 12, dtype=torch.float64) + 20
    found = texture_of().statistics(energy)[:, 81:117].view(2, 3, 3, 4)  # distances, directions
    logs = energy.log()
    values = logs - logs.mean((2, 3), keepdim=True)
    variance = values.square().mean((2, 3))
    for i, k in enumerate((1, 2, 4)):
        pairs = (
            (values[..., k:], values[..., :-k]),
            (values[..., k:, :-k], values[..., :-k, k:]),
            (values[..., k:, :], values[..., :-k, :]),
            (values[..., k:, k:], values[..., :-k, :-k]),
        )
        for j, (one, other) in enumerate(pairs):
            wanted = (one * other).mean((2, 3)) / variance
            torch.testing.assert_close(found[:, :, i, j], wanted, atol=0.01, rtol=0)
    # Stripes come again after every fourth column, and are opposite half way.
    stripes = (torch.arange(12) % 4 < 2).double().mul(9).add(1).expand(1, 3, 12, 12)
    along = texture_of().statistics(stripes)[:, 81:117].view(1, 3, 3, 4)
    torch.testing.assert_close(
        along[0, 0, 1:, 0], torch.tensor([-1.0, 1.0]).double(), atol=0.01, rtol=0
    )
    torch.testing.assert_close(along[0, 0, :, 2], torch.ones(3).double(), atol=0.01, rtol=0)


def test_texture_statistics_do_not_see_contrast_and_flatness_sees_gaps():
    energy = torch.rand(2, 3, 12, 12) + 0.5
    statistics = texture_of().statistics
    torch.testing.assert_close(statistics(4 * energy), statistics(energy), atol=0.05, rtol=0)
    # An even energy is flat; one that is in every other pixel alone is far from it.
    assert statistics(torch.ones(1, 3, 12, 12))[:, 54:81].abs().max() < 1e-6
    gaps = torch.ones(1, 3, 12, 12)
    gaps[..., ::2] = 0.0
    assert (statistics(gaps)[:, 54:81] < -1).all()


def test_texture_statistics_have_a_gradient_where_nothing_varies():
    energy = torch.full((1, 8, 9, 9), 0.5, requires_grad=True)
    numbers = texture_of(8, 9).statistics(energy)
    (numbers[0, 0] + numbers[0, 216:].sum()).backward()
    assert energy.grad.isfinite().all()
    assert energy.grad[0, 0, 0, 0] > 0
    assert texture_of(8, 9).statistics(energy.detach().bfloat16()).dtype == torch.float32
