"""Questions about the Gabor functions with which a layer begins."""

import json
import math
import re

import pytest
import torch

from gaborium.functions.kernels import bandwidth_from_sigma, gabor
from gaborium.functions.params import RECORDS, Gabor
from gaborium.starts import (
    STARTS,
    V1_CARDINAL,
    V1_FREQUENCY_STD,
    draw_start,
    mel_bank,
    v1_distance,
    v1_radius,
    v1_widths,
)

DIMENSIONS = (1, 2, 3)


def drawn(name: str, n_dims: int = 2, size: int = 15, seed: int = 0, **kwargs: int) -> Gabor:
    return draw_start(
        name,
        n_filters=kwargs.get("n_filters", 32),
        n_channels=kwargs.get("n_channels", 3),
        # Axes of one pixel do not count, and a cube of 31 px would take its time.
        kernel_size=(size,) + (1,) * (n_dims - 1) if n_dims == 3 else (size,) * n_dims,
        generator=torch.Generator().manual_seed(seed),
    )


def same(one: Gabor, other: Gabor) -> bool:
    return all(torch.equal(v, other.as_dict()[n]) for n, v in one.as_dict().items())


# -- every start --------------------------------------------------------------------------------


@pytest.mark.parametrize("n_dims", DIMENSIONS)
@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_a_legal_record_of_the_promised_shape(name, n_dims):
    params = drawn(name, n_dims)
    assert isinstance(params, RECORDS[n_dims])
    params.check()
    for field, value in params.as_dict().items():
        columns = 3 if field in ("phase", "amplitude") else 1
        tail = (n_dims,) if field == "center" else ()
        assert value.shape == (32, columns, *tail)
        assert value.dtype == torch.float64
    assert (params.center == 0).all()


@pytest.mark.parametrize("name", STARTS)
def test_a_start_does_not_depend_on_the_default_device(name):
    expected = drawn(name)
    with torch.device("meta"):
        params = draw_start(
            name,
            n_filters=32,
            n_channels=3,
            kernel_size=(15, 15),
            generator=torch.Generator("cpu").manual_seed(0),
        )
    assert params.device.type == "cpu"
    assert same(params, expected)


@pytest.mark.parametrize("name", ["random", "v1"])
def test_a_seed_repeats_a_draw(name):
    assert same(drawn(name, seed=3), drawn(name, seed=3))
    assert not same(drawn(name, seed=3), drawn(name, seed=4))


@pytest.mark.parametrize("name", ["random", "v1"])
def test_without_a_generator_torch_is_asked(name):
    def draw() -> Gabor:
        return draw_start(name, n_filters=4, n_channels=1, kernel_size=(9, 9))

    torch.manual_seed(5)
    one, two = draw(), draw()
    torch.manual_seed(5)
    assert same(draw(), one)
    assert not same(one, two)


@pytest.mark.parametrize("n_dims", DIMENSIONS)
@pytest.mark.parametrize("name", STARTS)
def test_kernels_hold_their_envelopes_and_waves(name, n_dims):
    for size in range(3, 32):
        for seed in range(3):
            params = drawn(name, n_dims, size, seed, n_filters=64)
            widest = params.sigma
            if n_dims > 1:
                widest = widest / params.aspect_ratio.clamp_max(1.0)
            assert (1.5 * widest <= size / 2 + 1e-9).all(), size
            assert (params.wavelength >= 2.5).all(), size
            assert (params.wavelength <= max(size, 3)).all(), size


@pytest.mark.parametrize("kernel_size", [(1,), (2,), (1, 1), (2, 2), (1, 7), (7, 1), (1, 1, 5)])
@pytest.mark.parametrize("name", STARTS)
def test_no_kernel_is_silent(name, kernel_size):
    # A sine on a single pixel is zero; so is one that varies only where the kernel has no width.
    for seed in range(3):
        params = draw_start(
            name,
            n_filters=33,
            n_channels=2,
            kernel_size=kernel_size,
            generator=torch.Generator().manual_seed(seed),
        )
        kernels = gabor(params.replace(amplitude=params.amplitude.sign()), kernel_size)
        assert (kernels.flatten(2).norm(dim=2) > 1e-3).all()


def test_unknown_starts_are_refused():
    with pytest.raises(ValueError, match=r"'bank', 'random', 'v1', got 'zeros'"):
        draw_start("zeros", n_filters=1, n_channels=1, kernel_size=(5, 5))


# -- bank ---------------------------------------------------------------------------------------


def test_a_bank_is_not_drawn():
    before = torch.get_rng_state()
    assert same(drawn("bank", seed=1), drawn("bank", seed=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bank_covers_directions_wavelengths_and_phases():
    params = drawn("bank", n_filters=64, size=27)
    angles = params.orientation.unique()
    torch.testing.assert_close(angles, torch.arange(8).double() * math.pi / 8)
    wavelengths = params.wavelength.unique()
    # Even in octaves, from 3 px to the kernel's size.
    torch.testing.assert_close(wavelengths, 3.0 * 9.0 ** (torch.arange(4).double() / 3))
    assert (params.phase[::2] == 0).all()
    torch.testing.assert_close(params.phase[1::2], torch.full_like(params.phase[1::2], math.pi / 2))
    assert (params.amplitude == 1).all()
    assert (params.aspect_ratio == 1).all()
    # Even and odd filters come as pairs of one geometry, and no pair comes twice.
    geometry = torch.cat([params.orientation, params.wavelength], 1)
    assert torch.equal(geometry[::2], geometry[1::2])
    assert len(geometry[::2].unique(dim=0)) == 32


def test_a_bank_has_one_octave_of_bandwidth_where_there_is_room():
    params = drawn("bank", n_filters=64, size=27)
    # Wavelengths 3, 6.2 and 13 px have room for one octave; 27 px would need a kernel of 46 px.
    octaves = bandwidth_from_sigma(params.sigma, params.wavelength)[params.wavelength < 20]
    assert len(octaves) == 48
    torch.testing.assert_close(octaves, torch.ones_like(octaves))
    assert (params.sigma[params.wavelength > 20] == 9.0).all()


def test_a_bank_covers_the_half_sphere_evenly():
    params = drawn("bank", n_dims=3, n_filters=400, size=3)
    n = params.direction[::2, 0]
    assert (n[:, 2] >= 0).all()
    # A wave has no sign: an even cover has the second moments of the sphere, 1/3 per axis.
    moments = n.mT @ n / len(n)
    torch.testing.assert_close(moments, torch.eye(3).double() / 3, atol=0.03, rtol=0)


# -- random -------------------------------------------------------------------------------------


def test_random_draws_are_uniform_within_their_ranges():
    params = drawn("random", n_dims=3, n_filters=4000, size=21)
    # The standard error of a mean of 4000 uniform draws over [0, 1] is 0.0046.
    scaled = {
        "orientation": params.orientation / math.pi,
        "elevation": (params.elevation.sin() + 1) / 2,
        "wavelength": (params.wavelength / 2.5).log() / math.log(21 / 2.5),
        "phase": (params.phase + math.pi) / (2 * math.pi),
    }
    for name, value in scaled.items():
        assert ((value >= 0) & (value <= 1)).all(), name
        assert value.mean().item() == pytest.approx(0.5, abs=0.02), name
        assert value.std().item() == pytest.approx(12**-0.5, abs=0.01), name
    assert ((params.aspect_ratio >= 0.5) & (params.aspect_ratio <= 1)).all()
    # Channels differ in phase and amplitude, or no filter could answer to colour.
    for name in ("phase", "amplitude"):
        first, second = getattr(params, name)[:, 0], getattr(params, name)[:, 1]
        assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.06


# -- V1 -----------------------------------------------------------------------------------------


def moments(log_widths: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Means, standard deviations and correlation of two rows of numbers."""
    weights = weights / weights.sum()
    mean = (log_widths * weights).sum(1)
    centred = log_widths - mean[:, None]
    covariance = (centred * weights) @ centred.mT
    std = covariance.diagonal().sqrt()
    return mean, std, covariance[0, 1] / std.prod()


def drawn_widths(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    normal = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return v1_widths(*normal, limit=2.0)


def test_v1_widths_have_the_moments_of_measured_cells(shared):
    text = (shared / "v1" / "v1_population_statistics.json").read_text(encoding="utf-8")
    table = json.loads(text)["nx_ny_joint_counts"]
    edges = torch.tensor(table["bin_edges_log10"], dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    grid = torch.stack(torch.meshgrid(middle, middle, indexing="ij")).flatten(1)
    counts = torch.tensor(table["counts"], dtype=torch.float64).flatten()
    assert counts.sum() == 79
    measured = moments(grid, counts)

    sample = torch.stack([width.log10() for width in drawn_widths(20_000)])
    drawn_moments = moments(sample, torch.ones(20_000, dtype=torch.float64))
    # 79 cells tell a mean to 0.02-0.03 and a spread to 10 %; clipping at 2 std takes 4 % of it.
    torch.testing.assert_close(drawn_moments[0], measured[0], atol=0.01, rtol=0)
    torch.testing.assert_close(drawn_moments[1], measured[1], atol=0, rtol=0.08)
    torch.testing.assert_close(drawn_moments[2], measured[2], atol=0.03, rtol=0)


def test_v1_keeps_the_drawn_shape_where_the_kernel_has_room():
    across, along = drawn_widths(500)
    params = drawn("v1", n_filters=500, size=31)
    ratio = (params.sigma / params.wavelength).log10()
    # The widths are drawn after other fields: the same distribution, not the same numbers.
    assert ratio.mean().item() == pytest.approx(across.log10().mean().item(), abs=0.03)
    assert ratio.std().item() == pytest.approx(across.log10().std().item(), abs=0.02)
    assert params.aspect_ratio.log10().mean().item() == pytest.approx(
        (across / along).log10().mean().item(), abs=0.03
    )
    # One phase and one amplitude per filter: cortex has no channels.
    assert torch.equal(params.phase[:, :1].expand(-1, 3), params.phase)
    assert (params.amplitude == 1).all()


def test_v1_keeps_the_aspect_ratio_in_small_kernels():
    small, large = (drawn("v1", n_filters=500, size=size) for size in (5, 31))
    assert torch.equal(small.aspect_ratio, large.aspect_ratio)


def test_half_and_most_of_the_population_lie_within_their_reach():
    sample = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    far = v1_distance(*v1_widths(*sample))
    for share in (0.5, 0.95):
        # Three standard errors of a share of so many.
        error = 3 * math.sqrt(share * (1 - share) / len(far))
        assert (far < v1_radius(share)).double().mean().item() == pytest.approx(share, abs=error)


def test_a_width_of_none_is_infinitely_far():
    assert v1_distance(torch.tensor(0.0), torch.tensor(1.0)).item() == math.inf


def test_the_numbers_are_those_of_the_published_histograms(shared):
    text = (shared / "v1" / "v1_population_statistics.json").read_text(encoding="utf-8")
    published = json.loads(text)
    counts = published["orientation_counts"]["counts"]
    assert (counts[0] + counts[2]) / sum(counts) == V1_CARDINAL
    frequencies = published["peak_sf_counts"]
    edges = torch.tensor(frequencies["bin_edges_cpd"]).log2()
    weights = torch.tensor(frequencies["counts"]) / sum(frequencies["counts"])
    middle = (edges[1:] + edges[:-1]) / 2
    variance = (weights * middle**2).sum() - (weights * middle).sum() ** 2
    assert variance.sqrt().item() == pytest.approx(V1_FREQUENCY_STD, abs=0.005)


def test_most_measured_cells_lie_in_the_region_of_most(shared):
    text = (shared / "v1" / "v1_population_statistics.json").read_text(encoding="utf-8")
    joint = json.loads(text)["nx_ny_joint_counts"]
    edges = torch.tensor(joint["bin_edges_log10"])
    middle = 10 ** ((edges[1:] + edges[:-1]) / 2)
    counts = torch.tensor(joint["counts"])
    inside = v1_distance(middle[:, None], middle[None, :]) < v1_radius(0.95)
    assert 0.85 < (counts * inside).sum() / counts.sum() <= 1.0


# -- the mel scale ------------------------------------------------------------------------------


def test_mel_filters_are_evenly_spaced_where_pitch_is_heard():
    bank = mel_bank(40, 401, sample_rate=16000, lowest=100.0, highest=7000.0)
    hertz = 16000 / bank.wavelength[:, 0]
    # Another way of writing the scale; both ends lie one step outside.
    mel = 1127 * (1 + torch.cat([torch.tensor([100.0]), hertz, torch.tensor([7000.0])]) / 700).log()
    torch.testing.assert_close(mel.diff(), mel.diff().mean().expand(41), rtol=1e-6, atol=0)


def test_spectra_of_mel_neighbours_meet_at_half_height_and_responses_have_one_variance():
    bank = mel_bank(12, 2001, sample_rate=8000)
    kernels = gabor(bank, (2001,))[:, 0]
    spectra = torch.fft.rfft(kernels, 2**16).abs()
    spectra = spectra / spectra.amax(1, keepdim=True)
    meet = torch.minimum(spectra[:-1], spectra[1:]).amax(1)
    # A step on the mel scale is longer on the one side than on the other.
    torch.testing.assert_close(meet, torch.full_like(meet, 0.5), atol=0.02, rtol=0)
    power = kernels.square().sum(1)
    torch.testing.assert_close(power, torch.full_like(power, 1 / 3), atol=1e-3, rtol=0)


def test_mel_filters_fit_a_short_kernel():
    bank = mel_bank(32, 61, sample_rate=8000)
    assert bank.sigma.max().item() == pytest.approx(61 / 6)
    assert mel_bank(32, 201, sample_rate=8000).wavelength.equal(bank.wavelength)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_filters": 0}, "n_filters and kernel_size must be at least 1, got 0 and 101."),
        ({"sample_rate": math.nan}, "Frequencies must be"),
        ({"highest": 4001.0}, "got 60 and 4001 Hz at 8000 samples a second."),
        ({"lowest": 500.0, "highest": 400.0}, "got 500 and 400 Hz"),
    ],
)
def test_mel_banks_that_cannot_be_are_refused_in_a_sentence(change, told):
    given = {"n_filters": 8, "kernel_size": 101, "sample_rate": 8000.0, **change}
    with pytest.raises(ValueError, match=re.escape(told)):
        mel_bank(**given)
