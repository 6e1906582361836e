"""Questions about the census: are filters called what they are, whatever way they are turned?"""

import json
import math

import pytest
import torch
from torch import Tensor, nn

import gaborium
from gaborium import Census, Gabor1d, Gabor2d, Gabor3d, GaborConv2d, census, gabor
from gaborium.conversion import CLASSES, NUMBERS
from gaborium.conversion.census import STAGES, probabilities

OPPONENT = torch.tensor([1.0, -0.8, -0.2], dtype=torch.float64)


def wave(size: int, **fields: object) -> Tensor:
    """A Gabor function of power 1."""
    kernel = gabor(Gabor2d.of(**fields, dtype=torch.float64), size)
    return kernel / kernel.norm()


def disc(size: int, sigma: float) -> Tensor:
    return gabor(Gabor2d.of(wavelength=math.inf, sigma=sigma, dtype=torch.float64), size)


def planted(size: int, channels: int) -> dict[str, Tensor]:
    """A filter or two of every class that so many channels have, with a little noise."""
    narrow = 0.14 * size
    rings = disc(size, narrow) - disc(size, 1.6 * narrow) / 1.6**2
    grating = {"wavelength": 0.36 * size + 0.8, "sigma": 0.25 * size}
    plaid = {"wavelength": 0.25 * size + 1.1, "sigma": 0.28 * size, "phase": 0.6}
    grey = {
        "gabor": [
            wave(size, orientation=0.4, phase=0.5, **grating),
            wave(size, orientation=math.pi / 2, phase=math.pi / 2, **grating),
        ],
        "edge": [
            wave(size, orientation=0.9, wavelength=3.0 * size, sigma=0.3 * size, phase=math.pi / 2),
            wave(size, wavelength=2.0 * size, sigma=0.25 * size, phase=-math.pi / 2),
        ],
        "blob": [
            disc(size, 0.2 * size),
            wave(size, orientation=1.0, wavelength=math.inf, sigma=0.17 * size, aspect_ratio=0.6),
        ],
        "centre-surround": [rings, -rings],
        "other": [
            wave(size, orientation=angle, **plaid)
            + wave(size, orientation=angle + math.pi / 2, **plaid)
            for angle in (0.0, 0.7 if size > 5 else 0.1)
        ],
    }
    noise = torch.randn(
        2, channels, size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64
    )
    colors = torch.tensor([1.0, 0.9, 1.1], dtype=torch.float64)[:channels, None, None]
    found = {
        label: torch.stack([colors * kernel / kernel.norm() for kernel in kernels])
        for label, kernels in grey.items()
    }
    if channels == 3:
        sides = grey["edge"][0] / grey["edge"][0].norm()
        two = [OPPONENT[:, None, None] * k for k in (sides, rings / rings.norm())]
        found["colour-contrast"] = torch.stack(two)
    found = {
        label: kernels + 0.05 * kernels.abs().amax() * noise for label, kernels in found.items()
    }
    return found | {"noise": noise}


def flat(parts: dict[str, Tensor]) -> tuple[Tensor, list[str]]:
    return torch.cat([*parts.values()]), [label for label in parts for _ in range(2)]


@pytest.fixture(scope="module")
def mixed() -> tuple[Tensor, Census]:
    kernels, labels = flat(planted(7, 3))
    found = census(kernels, n_starts=4)
    assert list(found.labels) == labels
    return kernels, found


# -- outcome ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "channels"), [(5, 3), (11, 1)])  # (7, 3) is the fixture
def test_planted_filters_are_called_what_they_are(size, channels):
    kernels, labels = flat(planted(size, channels))
    assert list(census(kernels, n_starts=4).labels) == labels


def test_an_untrained_layer_is_noise():
    torch.manual_seed(0)
    assert census(nn.Conv2d(1, 10, 7), n_starts=1).counts["noise"] >= 9


def test_a_dead_filter_is_noise_and_said_to_be_dead():
    kernels = torch.stack([wave(9, wavelength=4.0, sigma=2.0)] * 5)
    kernels[3] = 0.0
    kernels[4] *= 1e-9
    found = census(kernels)
    assert found.labels == ("gabor", "gabor", "gabor", "noise", "noise")
    assert found.confidence.tolist()[3:] == [1.0, 1.0]
    assert "weights are zero" in found.explain(3)
    assert all(value.isfinite().all() for value in found.numbers.values())


def test_a_constant_is_a_blob_and_colours_make_no_grating_less_a_gabor():
    constant = torch.ones(1, 7, 7, dtype=torch.float64)
    assert census(constant, n_starts=1).labels == ("blob",)
    grating = wave(11, wavelength=4.0, sigma=2.5, phase=0.3)
    assert census(OPPONENT[None, :, None, None] * grating).labels == ("gabor",)


def test_filters_in_one_and_three_dimensions():
    tone = Gabor1d.of(wavelength=[5.0, 100.0], sigma=[4.0, 3.0], phase=[0.0, math.pi / 2])
    assert census(gabor(tone, 21).double(), n_dims=1).labels == ("gabor", "edge")
    film = Gabor3d.of(wavelength=3.0, sigma=1.5, elevation=0.3)
    assert census(gabor(film, 5).double()[None], n_dims=3, n_starts=1).labels == ("gabor",)


def test_pairs_are_found_whatever_their_place():
    base = {"orientation": 0.6, "wavelength": 5.0, "sigma": 2.6}
    kernels = torch.stack(
        [
            wave(13, **base),
            -2 * wave(13, **base),
            wave(13, **base, phase=math.pi / 2, center=[1.0, 0.5]),
            wave(13, **base, center=[0.0, 1.0]),
            wave(13, orientation=2.2, wavelength=5.0, sigma=2.6),
            disc(13, 2.0),
            torch.roll(disc(13, 2.0), 1, 1),
        ]
    )
    found = census(kernels, n_starts=3)
    kinds = {(pair.first, pair.second): pair.kind for pair in found.pairs}
    assert kinds == {
        (0, 1): "negative",
        (0, 2): "quadrature",
        (0, 3): "duplicate",
        (1, 2): "quadrature",
        (1, 3): "negative",
        (2, 3): "quadrature",
        (5, 6): "duplicate",
    }
    assert all(0.9 < pair.similarity <= 1 for pair in found.pairs)


def test_the_distribution_is_that_of_the_planted_gabors():
    fields = {"wavelength": [4.0, 5.0], "sigma": [2.0, 3.0], "aspect_ratio": [0.8, 1.0]}
    bank = Gabor2d.of(orientation=[0.3, 1.2], **fields, dtype=torch.float64)
    found = census(torch.cat([gabor(bank, 15), disc(15, 2.5)[None]]))
    numbers = found.distribution()
    assert numbers["filter"].tolist() == [0, 1]
    assert numbers["orientation"].tolist() == pytest.approx([0.3, 1.2], abs=1e-6)
    assert numbers["n_x"].tolist() == pytest.approx([0.5, 0.6], abs=1e-6)
    assert numbers["n_y"].tolist() == pytest.approx([0.625, 0.6], abs=1e-6)
    octaves = gaborium.bandwidth_from_sigma(bank.sigma, bank.wavelength).tolist()
    assert numbers["bandwidth"].tolist() == pytest.approx(octaves, abs=1e-6)


def test_a_layer_drawn_like_v1_is_where_v1_is():
    wavelength = torch.tensor([4.0, 8.0, 8.0], dtype=torch.float64)
    bank = Gabor2d.of(
        orientation=[0.05, 1.5, math.pi / 4],
        wavelength=wavelength,
        sigma=wavelength * 10**-0.45,
        aspect_ratio=10**-0.07,
        dtype=torch.float64,
    )
    found = census(gabor(bank, 21), n_starts=1)
    assert found.labels == ("gabor",) * 3
    beside = found.compare_with_v1()
    for name in ("n_x", "n_y", "bandwidth"):
        layer, v1 = beside[name]
        assert layer == pytest.approx(v1, rel=1e-5)
    assert beside["within"][0] == 1.0
    assert beside["cardinal"][0] == 2 / 3
    assert beside["octaves"][0] == pytest.approx(math.sqrt(2 / 9))
    assert json.loads(found.to_json())["v1"]["cardinal"] == [2 / 3, 143 / 246]


def test_a_wave_of_many_bars_is_outside_v1():
    bars = Gabor2d.of(wavelength=3.0, sigma=4.0, aspect_ratio=2.0, dtype=torch.float64)
    assert census(gabor(bars, 19)[None], n_starts=1).compare_with_v1()["within"][0] == 0.0


def test_without_a_gabor_or_a_plane_there_is_no_comparison():
    flat = census(torch.ones(1, 5, 5), n_starts=1).compare_with_v1()
    assert all(math.isnan(layer) and v1 > 0 for layer, v1 in flat.values())
    wave = torch.cos(torch.arange(9.0))[None, None]
    assert census(wave, n_dims=1).compare_with_v1() == {}


# -- law --------------------------------------------------------------------------------------


def test_neither_sign_scale_channels_nor_flips_change_a_class(mixed):
    kernels, before = mixed
    # Transposed and upside down, that is turned by a quarter.
    after = census(-1e-5 * kernels[::2, [2, 0, 1]].mT.flip(-1), n_starts=4)
    assert after.labels == before.labels[::2]
    torch.testing.assert_close(after.probability, before.probability[::2], atol=0.02, rtol=0)


def test_probabilities_sum_to_one_and_the_label_has_the_highest(mixed):
    _, found = mixed
    assert tuple(CLASSES[i] for i in found.probability.argmax(1).tolist()) == found.labels
    torch.testing.assert_close(found.probability.sum(1), torch.ones(len(found)).double())
    torch.testing.assert_close(found.confidence, found.probability.amax(1))


def test_questions_use_numbers_that_there_are(mixed):
    _, found = mixed
    assert set(found.numbers) == set(NUMBERS)
    for _, weights in STAGES.values():
        for name in weights:
            assert set(name.split(" - ")) <= set(NUMBERS)
    torch.testing.assert_close(probabilities(found.numbers), found.probability)


def test_shares_leave_noise_out(mixed):
    _, found = mixed
    assert found.counts["noise"] == 2
    assert found.share() == 2 / 12
    assert found.share("noise") == 2 / 14
    with pytest.raises(ValueError, match="label must be one of gabor, edge"):
        found.filters("grating")


# -- models -----------------------------------------------------------------------------------


def test_a_model_is_not_changed_and_its_first_layer_is_found():
    torch.manual_seed(0)
    bank = Gabor2d.of(orientation=[0.2, 1.0], wavelength=4.0, sigma=2.0)
    model = nn.Sequential(GaborConv2d(1, 2, 9, start=bank), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = census(model)
    assert (found.name, found.labels) == ("0", ("gabor", "gabor"))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
    assert len(census(model, layer="2", n_starts=1)) == 3


@pytest.mark.parametrize(
    ("kernels", "error", "words"),
    [
        (nn.Linear(3, 4), ValueError, "holds no convolution"),
        (nn.Conv2d(3, 4, 1), ValueError, "1 x 1 px, in which there is no wave"),
        (
            torch.zeros(2, 1, 3, 3, dtype=torch.complex64),
            TypeError,
            "got torch.complex64",
        ),
        (
            torch.zeros(2, 1, 3, 3, dtype=torch.int8),
            TypeError,
            "real, floating tensor, got torch.int8",
        ),
        (torch.full((2, 1, 3, 3), math.nan), ValueError, "NaN or infinity in 2 of 2"),
        (torch.zeros(0, 1, 3, 3), ValueError, "not empty"),
        (torch.zeros(3), ValueError, "must be"),
        (torch.zeros(4, 3, 1, 1), ValueError, "one pixel"),
        ([[1.0]], TypeError, "floating tensor, got list"),
    ],
)
def test_bad_input_is_told_in_one_line(kernels, error, words):
    with pytest.raises(error, match=words) as caught:
        census(kernels)
    assert "\n" not in str(caught.value)


def test_options_of_networks_are_refused_for_kernels():
    with pytest.raises(ValueError, match="leave them out"):
        census(torch.ones(1, 3, 3), layer="conv1")


# -- records ----------------------------------------------------------------------------------


def test_a_saved_census_comes_back(mixed, tmp_path):
    _, found = mixed
    found.save(tmp_path / "census.safetensors")
    back = Census.load(tmp_path / "census.safetensors")
    assert back.labels == found.labels
    assert back.pairs == found.pairs
    assert back.to_json() == found.to_json()
    with pytest.raises(ValueError, match="census"):
        Census.load(__file__)


def test_json_and_table_tell_the_same(mixed):
    _, found = mixed
    document = json.loads(found.to_json())
    rows = found.to_table()
    assert document["labels"] == [row["class"] for row in rows] == list(found.labels)
    assert document["filters"] == rows
    assert rows[3]["explanation"] == found.explain(3)
    assert document["counts"]["gabor"] == 2
    assert rows[0]["wavelength"] == found.fit.params.wavelength[0].item()


def test_every_class_says_why_in_words_of_its_own(mixed):
    _, found = mixed
    sentences = {label: found.explain(found.filters(label)[0]) for label in CLASSES}
    assert len({sentence.split()[0:3].__str__() for sentence in sentences.values()}) == len(CLASSES)
    assert "bars of alternating sign" in sentences["gabor"]
    assert "a Gaussian explains" in sentences["blob"]
    assert found.explain(-1) == found.explain(len(found) - 1)
    with pytest.raises(IndexError):
        found.explain(len(found))


def test_progress_ends_at_the_number_of_filters():
    told = []
    census(torch.eye(5)[None], on_progress=lambda *what: told.append(what))
    assert told == [("Looking at filters", 0, 1), ("Looking at filters", 1, 1)]
