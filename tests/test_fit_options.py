"""Options of a fit: what each one changes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fits import (
    F64,
    SHARED,
    assert_errors_as_stated,
    assert_refused,
    assert_same,
    assert_same_parameters,
    drawn,
    grid,
    kernel_errors,
    number,
    planted,
    rms,
    with_noise,
)
from gaborium import Gabor2d, Outcome, fit, gabor, recover
from gaborium.functions.params import Gabor

LAW = settings(max_examples=2, deadline=None, derandomize=True)
FIELDS = ("orientation", "wavelength", "sigma", "aspect_ratio", "phase", "amplitude")


def some_metric(n: int) -> Tensor:
    """Symmetric, positive and far from diagonal."""
    A = drawn(n, n, seed=1)
    return A @ A.T / n + 0.1 * torch.eye(n, dtype=F64)


# -- offset -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (0, {}),
        (0, {"weights": 0.1 + drawn(9, 9).abs()}),
        (0, {"metric": some_metric(81)}),
        (3, SHARED),
        (3, {**SHARED, "metric": some_metric(243)}),
        (3, {**SHARED, "dtype": torch.float32}),
        (3, {**SHARED, "loss": "huber"}),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else str(value),
)
def test_kernels_beside_constants_come_back(channels, options):
    params = planted(2, *((10, 1) if channels else (10,)), channels=channels, seed=1)
    kernels = gabor(params, 9)
    constants = 3 * drawn(*kernels.shape[:-2], 1, 1)  # another one for every channel
    result = fit(kernels + constants, offset=True, **options)
    assert result.outcome == (Outcome.CONVERGED,) * 10
    assert kernel_errors(result, kernels).max() < 1e-6
    assert_same_parameters(result.params, params)
    # Without one they are no Gabor functions.
    assert not fit(kernels + constants, n_starts=1, **options).converged.all()


@LAW
@given(constant=number(-1e3, 1e3))
def test_with_an_offset_a_constant_changes_nothing(constant):
    kernels = with_noise(gabor(planted(2, 3, seed=2), 9), 0.2)
    # A constant a thousand times the kernel leaves thirteen of sixteen digits.
    moved, still = (fit(k, offset=True, n_starts=1) for k in (kernels + constant, kernels))
    assert_same(moved, still, atol=1e-5)


@pytest.mark.parametrize("weights", [None, 0.1 + drawn(9, 9, seed=3).abs()], ids=["plain", "own"])
def test_with_an_offset_the_variance_is_explained(weights):
    kernels = with_noise(gabor(planted(2, 8, seed=3), 9), 0.3) + 2.0
    result = fit(kernels, offset=True, weights=weights, n_starts=2)
    share = torch.ones(9, 9, dtype=F64) if weights is None else weights
    share = share / share.sum()

    def variance(values: Tensor) -> Tensor:
        mean = (share * values).sum((1, 2), keepdim=True)
        return (share * (values - mean).square()).sum((1, 2))

    left = variance(kernels - gabor(result.params, 9))
    torch.testing.assert_close(result.explained_variance, 1 - left / variance(kernels))
    assert (result.explained_variance < 0.97).all()


@pytest.mark.parametrize(
    "options",
    [{}, {"weights": 0.1 + drawn(9, 9).abs()}, {"metric": some_metric(81)}, {"loss": "cauchy"}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_constant_beside_an_offset_is_nothing_to_fit(options):
    kernels = gabor(planted(2, 3), 9)
    kernels[1] = 0.1  # not exact in binary
    result = fit(kernels, offset=True, **options)
    assert result.outcome == (Outcome.CONVERGED, Outcome.BAD_INPUT, Outcome.CONVERGED)
    assert result.params.sigma.isnan().tolist() == [False, True, False]


def test_an_offset_makes_errors_larger():
    kernels = gabor(planted(2, 40, seed=4), 11)
    # So little noise that both ends agree, and nothing but the offset is different.
    kernels = with_noise(kernels, 1e-6)
    per_noise = []
    for offset in (False, True):
        result = fit(kernels, offset=offset)
        centred = kernels - offset * kernels.mean((1, 2), keepdim=True)
        left = (1 - result.explained_variance) * centred.square().sum((1, 2))
        noise = (left / (121 - 6 - offset)).sqrt()
        per_noise.append(torch.stack([result.standard_error[name] / noise for name in FIELDS]))
    ratio = per_noise[1] / per_noise[0]
    # What is left is told to some 1e-4 only: it is 1e-12 of the power.
    assert (ratio > 1 - 1e-3).all()
    assert (ratio[FIELDS.index("sigma")] > 1.01).double().mean() > 0.5


def test_errors_beside_an_offset_are_as_stated():
    params = planted(2, 300, seed=15)
    noisy = with_noise(gabor(params, 11), 0.2, seed=15)
    result = fit(noisy + drawn(300, 1, 1), offset=True, n_starts=2)
    assert result.converged.double().mean() > 0.98
    assert_errors_as_stated(result, params)


@pytest.mark.parametrize("channels", [0, 2])
def test_offsets_are_fitted_and_not_returned(channels):
    params = planted(2, *((3, 1) if channels else (3,)), channels=channels)
    kernels = with_noise(gabor(params, 9), 0.1)
    options = SHARED if channels else {}
    plain, beside = (fit(kernels, offset=offset, n_starts=2, **options) for offset in (False, True))
    assert beside.names == plain.names
    assert beside.correlation.shape == (3, len(plain.names), len(plain.names))
    diagonal = beside.correlation.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal, torch.ones_like(diagonal))
    assert beside.standard_error.keys() == plain.standard_error.keys()
    assert (beside.correlation - plain.correlation).abs().max() > 1e-3


# -- weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noisy() -> Tensor:
    """Three filters of two channels, where any difference of misfits moves the end."""
    return with_noise(gabor(planted(2, 3, 1, channels=2, seed=5), 9), 0.2)


@pytest.mark.parametrize(
    ("nothing", "options"),
    [(math.nan, {}), (math.inf, SHARED), (1e6, {"offset": True}), (math.nan, {"loss": "huber"})],
    ids=str,
)
def test_pixels_of_no_weight_may_hold_anything(nothing, options):
    kernels = gabor(planted(2, 8, 1, channels=1, seed=6), 11)
    if "geometry" not in options:
        kernels = kernels[:, 0]
    weights = (drawn(*kernels.shape) > -0.7).double()  # a quarter of the pixels, others everywhere
    result = fit(torch.where(weights > 0, kernels, nothing), weights=weights, **options)
    assert result.outcome == (Outcome.CONVERGED,) * 8
    assert kernel_errors(result, kernels).max() < 1e-6


def test_a_kernel_without_weight_leaves_its_neighbours_alone():
    kernels = gabor(planted(2, 3), 9)
    weights = torch.ones(3, 9, 9)
    weights[1] = 0
    result = fit(kernels, weights=weights)
    assert result.outcome == (Outcome.CONVERGED, Outcome.BAD_INPUT, Outcome.CONVERGED)


@LAW
@given(factor=st.one_of(st.just(7.0), number(1e-9, 1e9)))
def test_only_ratios_of_weights_count(noisy, factor):
    weights = 0.05 + drawn(3, 2, 9, 9, seed=1).abs()
    once, again = (fit(noisy, weights=f * weights, n_starts=1) for f in (1, factor))
    assert_same(again, once)
    plain = fit(noisy, n_starts=1)
    assert_same(fit(noisy, weights=torch.full((9, 9), factor), n_starts=1), plain)
    # And they do count.
    assert (once.params.sigma - plain.params.sigma).abs().max() > 1e-2


@pytest.mark.parametrize("offset", [False, True])
def test_weights_are_a_diagonal_metric(noisy, offset):
    weights = 0.05 + drawn(2, 9, 9, seed=2).abs()
    weights[:, 4, :3] = 0
    ours = fit(noisy, weights=weights, offset=offset, n_starts=2, **SHARED)
    wanted = fit(noisy, metric=weights.flatten().diag(), offset=offset, n_starts=2, **SHARED)
    assert_same(ours, wanted)


def test_weights_by_the_noises_variance_fit_best():
    params = planted(2, 300, seed=8)
    kernels = gabor(params, 11)
    size = 0.05 * 20 ** torch.rand(300, 11, 11, dtype=F64)  # from 0.05 to 1
    known = kernels + rms(kernels) * size * drawn(300, 11, 11)
    plain, weighted = fit(known, n_starts=1), fit(known, weights=size**-2, n_starts=2)
    # The mean of the variances is 11 times the inverse of the inverse variances' mean, √11 = 3.3.
    gain = kernel_errors(plain, kernels).median() / kernel_errors(weighted, kernels).median()
    assert gain > 2.5
    assert weighted.converged.double().mean() > 0.97
    assert_errors_as_stated(weighted, params)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 9), {}),
        ((2, 9, 9), {}),
        ((3, 1, 9, 9), {}),
        ((9, 9), SHARED),
        ((1, 2, 9, 9), SHARED),
        ((3, 1, 1, 9), SHARED),
    ],
    ids=str,
)
def test_weights_broadcast_to_the_kernels(noisy, shape, options):
    weights = 0.05 + drawn(*shape, seed=3).abs()
    wanted = fit(noisy, weights=weights.expand(noisy.shape).clone(), n_starts=1, **options)
    assert_same(fit(noisy, weights=weights, n_starts=1, **options), wanted)


def test_weights_of_one_kernel_need_no_batch_axis():
    kernel = with_noise(gabor(planted(2, 1), 9), 0.2)
    weights = 0.05 + drawn(9, 9).abs()
    assert_same(
        fit(kernel[0], weights=weights, n_starts=2), fit(kernel, weights=weights, n_starts=2)
    )


# -- robust losses ------------------------------------------------------------------------------

ROBUST = ("huber", "cauchy")


@pytest.fixture(scope="module")
def wild() -> tuple[Tensor, Tensor, Tensor]:
    """Kernels, the same with noise and a few wild pixels, and the error that noise alone makes."""
    kernels = gabor(planted(2, 40, seed=9), 11)
    is_wild = torch.rand(kernels.shape, generator=torch.Generator().manual_seed(3)) < 0.04
    spoilt = with_noise(kernels, 0.1, seed=9)
    spoilt = torch.where(is_wild, 20 * rms(kernels) * drawn(*kernels.shape).sign(), spoilt)
    # Six parameters take up √6 of the noise: no unbiased estimate does better.
    return kernels, spoilt, math.sqrt(6) * 0.1 / 11 * torch.ones(40, dtype=F64)


def test_a_few_wild_pixels_spoil_a_squared_loss(wild):
    kernels, spoilt, least = wild
    result = fit(spoilt, n_starts=1)
    assert (kernel_errors(result, kernels) > 5 * least).double().mean() > 0.8
    assert result.converged.double().mean() < 0.1


@pytest.mark.parametrize("loss", ROBUST)
def test_a_few_wild_pixels_do_not_spoil_a_robust_loss(wild, loss):
    kernels, spoilt, least = wild
    result = fit(spoilt, loss=loss, n_starts=3)
    assert (kernel_errors(result, kernels) < 3 * least).double().mean() >= 0.95
    assert result.converged.double().mean() >= 0.95


@pytest.mark.parametrize("loss", ROBUST)
def test_a_robust_loss_goes_with_weights_and_an_offset(wild, loss):
    kernels, spoilt, least = (value[:12] for value in wild)
    unseen = torch.zeros(11, 11, dtype=torch.bool)
    unseen[4, 3:6] = True
    spoilt = (spoilt + 0.5).masked_fill(unseen, math.nan)
    result = fit(spoilt, loss=loss, weights=~unseen, offset=True, n_starts=3)
    # Three of the middle's pixels are missing, and the offset takes its part.
    assert (kernel_errors(result, kernels) < 4 * least).all()


@pytest.fixture(scope="module")
def normal() -> tuple[Gabor, Tensor, Tensor, Tensor]:
    """Parameters, kernels, the same with normal noise, and the errors of a squared loss."""
    params = planted(2, 300, seed=13)
    kernels = gabor(params, 9)
    noisy = with_noise(kernels, 0.15, seed=13)
    return params, kernels, noisy, kernel_errors(fit(noisy, n_starts=1), kernels)


@pytest.mark.parametrize("loss", ROBUST)
def test_where_noise_is_normal_robust_losses_cost_little(normal, loss):
    params, kernels, noisy, squared = normal
    result = fit(noisy, loss=loss, n_starts=1)
    assert result.converged.double().mean() > 0.98
    # Both are tuned to 95 % of efficiency: errors of √(1 / 0.95) = 1.026, and chance.
    ratio = (kernel_errors(result, kernels).square().mean() / squared.square().mean()).sqrt()
    assert 0.95 < ratio < 1.15
    assert_errors_as_stated(result, params)


@pytest.mark.parametrize("share", [0.0, 0.04])
@pytest.mark.parametrize("loss", ROBUST)
def test_robust_losses_find_exact_kernels_exactly(loss, share):
    # Not too small for their array: beside it, other waves would be seen by few pixels.
    kernels = gabor(planted(2, 20, seed=9, sigma=2.0), 9)
    generator = torch.Generator().manual_seed(3)
    is_wild = torch.rand(kernels.shape, generator=generator) < share
    result = fit(torch.where(is_wild, 20 * rms(kernels), kernels), loss=loss, n_starts=3)
    assert (kernel_errors(result, kernels) < 1e-6).double().mean() > 0.95
    assert share or result.outcome == (Outcome.CONVERGED,) * 20


@pytest.mark.parametrize("loss", ROBUST)
def test_robust_losses_believe_small_kernels_in_large_arrays(loss):
    # Most pixels are zero: beside those, all of the kernel looks wild.
    params = Gabor2d.of(
        orientation=[1.96, 2.83],
        wavelength=[3.32, 3.65],
        phase=[-1.9, -2.57],
        sigma=[1.72, 1.35],
        aspect_ratio=[1.16, 1.05],
        dtype=F64,
    )
    kernels = gabor(params, 15)
    assert kernel_errors(fit(kernels, loss=loss), kernels).max() < 1e-6


# -- bounds -------------------------------------------------------------------------------------


@LAW
@given(
    name=st.sampled_from(["wavelength", "sigma", "aspect_ratio", "center"]),
    low=number(0.3, 4.0),
    width=number(0.0, 3.0),
)
def test_results_lie_within_bounds(noisy, name, low, width):
    if name == "wavelength":
        low += 2  # shorter ones are aliases
    bounds = {name: (low, low + width)}
    result = fit(noisy[:, 0], center=name == "center", bounds=bounds, n_starts=2)
    found = result.params.as_dict()[name]
    # Bounds are kept as their logarithm, or inverse, and come back with a rounding error.
    assert (found >= low * (1 - 1e-6)).all()
    assert (found <= (low + width) * (1 + 1e-6)).all()


def test_bounds_are_kept_to_the_last_digits():
    kernels = gabor(planted(2, 8, sigma=2.0, wavelength=5.0), 9)
    for name, low in (("sigma", 2.2), ("wavelength", 6.0), ("aspect_ratio", 1.7)):
        found = fit(kernels, bounds={name: (low, 9.0)}, n_starts=3).params.as_dict()[name]
        assert (found >= low * (1 - 1e-14)).all(), name


@pytest.mark.parametrize(
    ("name", "pair", "bound"),
    [
        ("wavelength", (6.0, 9.0), 6.0),
        ("wavelength", (2.0, 4.5), 4.5),
        ("wavelength", (0.0, 4.5), 4.5),
        ("wavelength", (5.5, math.inf), 5.5),
        ("sigma", (2.2, 3.0), 2.2),
        ("sigma", (0.0, 1.8), 1.8),
        ("aspect_ratio", (1.3, math.inf), 1.3),
        ("aspect_ratio", (0.2, 0.8), 0.8),
    ],
)
def test_bounds_that_exclude_the_truth_stop_at_the_nearest(name, pair, bound):
    truth = planted(2, 4, wavelength=5.0, sigma=2.0, aspect_ratio=1.0)
    kernels = gabor(truth, 11)
    result = fit(kernels, bounds={name: pair}, n_starts=3)
    found = result.params.as_dict()[name]
    torch.testing.assert_close(found, torch.full_like(found, bound), rtol=1e-6, atol=0)
    assert (result.explained_variance < 1 - 1e-3).all()
    # The others make the best of it.
    held = gabor(truth.replace(**{name: torch.full_like(found, bound)}), 11)
    least = (held - kernels).flatten(1).norm(dim=1) / kernels.flatten(1).norm(dim=1)
    assert (kernel_errors(result, kernels) <= least * (1 + 1e-6)).all()


def test_bounds_that_hold_the_truth_change_nothing(noisy):
    bounds = {"wavelength": (2.5, 30.0), "sigma": (0.5, 8.0), "aspect_ratio": (0.2, 5.0)}
    assert_same(fit(noisy, bounds=bounds, n_starts=3, **SHARED), fit(noisy, n_starts=3, **SHARED))


def test_a_center_may_be_kept_near_the_middle():
    params = planted(2, 8, seed=11).replace(center=1.5 * drawn(8, 2).sign())
    kernels = gabor(params, 13)
    near = fit(kernels, center=True, bounds={"center": (-1.0, 0.5)})
    assert (near.params.center >= -1 - 1e-6).all()
    assert (near.params.center <= 0.5 + 1e-6).all()
    assert (near.explained_variance < 0.999).all()
    assert (
        kernel_errors(fit(kernels, center=True, bounds={"center": (-2, 2)}), kernels).max() < 1e-6
    )


def test_without_a_longest_wave_blobs_are_within_bounds():
    x, y = grid(11)
    blob = torch.exp(-(x.square() + y.square()) / (2 * 2.0**2))
    free = fit(blob, bounds={"wavelength": (3.0, math.inf)})
    assert free.params.wavelength.isinf()
    assert kernel_errors(free, blob[None]).item() < 1e-6
    bound = fit(blob, bounds={"wavelength": (3.0, 20.0)})
    assert bound.params.wavelength.item() == pytest.approx(20, rel=1e-6)
    assert 0.99 < bound.explained_variance.item() < 0.9999


BAD_BOUNDS = [
    ({"wavelength": (8, 3)}, "bounds of wavelength must be (lowest, highest) > 0, got (8, 3)."),
    ({"sigma": (-1.0, 3.0)}, "bounds of sigma must be (lowest, highest) > 0, got (-1.0, 3.0)."),
    ({"sigma": (0, 0)}, "bounds of sigma must be (lowest, highest) > 0, got (0, 0)."),
    ({"aspect_ratio": (math.nan, 1)}, "bounds of aspect_ratio must be (lowest, highest) > 0, got"),
    ({"center": (1, -1)}, "bounds of center must be (lowest, highest), got (1, -1)."),
    ({"phase": (0, 1)}, "A name in bounds must be one of 'wavelength', 'sigma', 'aspect_ratio', "),
    # A TypeError is no ValueError, and fails here as well.
    *(({"sigma": pair}, "bounds of sigma must be (l") for pair in (3.0, (1, 2, 3), ("a", "b"))),
    ({"wavelength": (0.5, 1.0)}, "bounds of wavelength must leave part of the range"),
    ({"sigma": (1000.0, 2000.0)}, "bounds of sigma must leave"),  # gives 4 kernel sizes
    ({"center": (1.0, 2.0)}, "bounds of center must leave"),  # moves one that is not searched
    ({"aspect_ratio": (2.0, 3.0)}, "bounds of aspect_ratio must leave"),
]


@pytest.mark.parametrize(("bounds", "message"), BAD_BOUNDS)
def test_bounds_that_make_no_sense_are_refused(bounds, message):
    options = {"bounds": bounds, "isotropic": "aspect_ratio" in bounds}
    assert_refused(fit, torch.rand(2, 9, 9), message=message, **options)
    image = torch.rand(1, 1, 20, 20)
    assert_refused(recover, image, image[..., 8:, 8:], 9, message=message, **options)


# -- precision, starts --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"offset": True}, {"center": True}, SHARED], ids=str)
def test_single_precision_finds_the_same(options):
    kernels = gabor(planted(2, 12, 1, channels=2, seed=12), 13)
    double, single = (fit(kernels, dtype=dtype, **options) for dtype in (F64, torch.float32))
    assert single.outcome == double.outcome
    assert_same_parameters(single.params, double.params)
    values = [*single.params.as_dict().values(), *single.standard_error.values()]
    for value in (*values, single.explained_variance, single.correlation):
        assert value.dtype == F64


def test_single_precision_finds_the_same_in_noise(noisy):
    double, single = (fit(noisy, dtype=dtype) for dtype in (F64, torch.float32))
    # The last steps are taken in double precision: what is left is their tolerance.
    assert_same(single, double, atol=1e-4)


def test_autocast_does_not_reach_the_solver(noisy):
    image = torch.rand(1, 1, 24, 24, dtype=F64)
    responses = F.conv2d(image, gabor(planted(2, 3, 1, channels=1), 9))
    plain = fit(noisy.float(), dtype=torch.float32), recover(image.float(), responses.float(), 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fit(noisy.float(), dtype=torch.float32), recover(image.float(), responses.float(), 9)
        assert torch.is_autocast_enabled("cpu")
    for found, wanted in zip(cast, plain, strict=True):
        assert found.to_json() == wanted.to_json()


def test_exact_fits_do_not_depend_on_the_number_of_starts():
    kernels = gabor(planted(2, 20, seed=13), 11)
    once, *others = (fit(kernels, n_starts=n).to_json() for n in (1, 2, 12, 30))
    assert others == [once] * 3


# -- waves at rest, and other kernels that fit as well ------------------------------------------


@LAW
@given(slope=number(0.3, 2.0), sigma=number(1.0, 2.5), turn=number(0.0, math.pi))
def test_an_edge_without_a_wave_is_found(slope, sigma, turn):
    x, y = grid(11)
    along = x * math.cos(turn) + y * math.sin(turn)
    edge = torch.exp(-(x.square() + y.square()) / (2 * sigma**2)) * (1 + slope * along)
    result = fit(edge)
    assert result.explained_variance.item() > 1 - 1e-6
    assert result.outcome == (Outcome.NOT_IDENTIFIABLE,)
    assert "wavelength" in result.not_identifiable(0)
    assert "sigma" not in result.not_identifiable(0)
    # A number that other code can work with, and that no kernel could tell from infinity.
    assert 1e3 < result.params.wavelength.item() < math.inf
    assert result.params.sigma.item() == pytest.approx(sigma, rel=1e-4)
    missed = result.params.orientation.item() - turn
    assert abs(math.remainder(missed, math.pi)) < 1e-4


def test_a_slight_edge_has_no_wavelength_either():
    x, y = grid(11)
    result = fit(torch.exp(-(x.square() + y.square()) / 2) * (1 + 0.1 * x))
    assert "wavelength" in result.not_identifiable(0)


@LAW
@given(sigma=number(0.8, 3.0))
def test_a_round_blob_has_no_wave(sigma):
    x, y = grid(11)
    blob = torch.exp(-(x.square() + y.square()) / (2 * sigma**2))
    result = fit(blob)
    assert kernel_errors(result, blob[None]).item() < 1e-6
    assert result.params.wavelength.isinf()
    assert {"wavelength", "orientation"} <= set(result.not_identifiable(0))


def test_a_difference_of_gaussians_is_no_gabor_and_has_no_orientation():
    # The best Gabor function has one, and every other direction serves as well.
    x, y = grid(11)
    r2 = x.square() + y.square()
    spots = [torch.exp(-r2 / 2) - torch.exp(-r2 / (2 * q**2)) / q**2 for q in (1.6, 2, 3, 5)]
    result = fit(torch.stack(spots))
    assert result.outcome == (Outcome.OFF_MODEL,) * 4
    assert all("orientation" in result.not_identifiable(i) for i in range(4))
