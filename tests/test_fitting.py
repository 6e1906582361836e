"""Fitting: planted parameters come back, errors are as stated, hopeless targets are reported."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from fits import (
    F64,
    assert_errors_as_stated,
    assert_refused,
    assert_same,
    assert_same_parameters,
    drawn,
    grid,
    kernel_errors,
    number,
    planted,
    scores,
    with_noise,
)
from gaborium import FitResult, Gabor2d, GaborConv2d, Outcome, fit, gabor, recover
from gaborium.fitting import api, search
from gaborium.fitting.model import GaborModel
from gaborium.fitting.solver import Target, linearize, misfit, solve
from gaborium.fitting.start import StartGrid
from gaborium.functions.params import RECORDS, Gabor
from gaborium.patches import PatchStatistics
from gaborium.readers import sample_image

RANDOM = settings(max_examples=15, deadline=None, derandomize=True)
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


# -- fit: planted kernels -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_dims", "size", "n", "plant", "options"),
    [
        (1, 21, 40, {}, {}),
        (1, 16, 20, {"center": 2.0}, {"center": True}),
        (2, (15, 15), 40, {}, {}),
        (2, (7, 7), 40, {}, {}),
        (2, (12, 10), 20, {}, {}),
        (2, (9, 14), 20, {}, {}),
        (2, (13, 13), 20, {"center": 1.5}, {"center": True}),
        (2, (13, 13), 20, {"aspect_ratio": 1.0}, {"isotropic": True}),
        (2, (11, 13), 20, {"channels": 3}, {"geometry": "filter"}),
        (2, (13, 13), 10, {"channels": 3, "center": 1.0}, {"geometry": "filter", "center": True}),
        (3, (9, 9, 9), 6, {}, {}),
        (3, (5, 9, 8), 6, {}, {}),
        (3, (5, 7, 6), 2, {"center": 0.5, "sigma": 1.2}, {"center": True}),
        (3, (7, 7, 7), 4, {"channels": 2}, {"geometry": "filter"}),
    ],
    ids=str,
)
def test_planted_kernels_come_back(n_dims, size, n, plant, options):
    params = planted(n_dims, *((n, 1) if "channels" in plant else (n,)), **plant)
    kernels = gabor(params, size)
    result = fit(kernels, n_dims=n_dims, **options)
    assert result.outcome == (Outcome.CONVERGED,) * n
    assert kernel_errors(result, kernels, n_dims).max() < 1e-6
    assert_same_parameters(result.params, params, 1e-6)
    assert (result.explained_variance > 1 - 1e-12).all()
    for name, value in result.params.as_dict().items():
        assert value.shape == params.as_dict()[name].shape
        assert value.shape == result.standard_error[name].shape
        assert (result.standard_error[name] < 1e-6).all()


@RANDOM
@given(
    orientation=number(-7.0, 7.0),
    # Below 3 px, waves along an axis are hard to tell from their aliases.
    wavelength=number(3.0, 9.0),
    sigma=number(0.25, 1.0),  # of the wavelength
    aspect_ratio=number(0.5, 2.0),
    phase=number(-7.0, 7.0),
    scale=number(-9.0, 9.0),
)
def test_any_gabor_comes_back(orientation, wavelength, sigma, aspect_ratio, phase, scale):
    params = Gabor2d.of(
        orientation=orientation,
        wavelength=wavelength,
        sigma=min(sigma * wavelength, 3.5 * min(1, aspect_ratio)),
        aspect_ratio=aspect_ratio,
        phase=phase,
        amplitude=-(10.0**scale),
        dtype=F64,
    )
    kernel = gabor(params, 15)[None]
    result = fit(kernel)
    assert kernel_errors(result, kernel, 2).item() < 1e-6
    assert result.outcome == (Outcome.CONVERGED,)


def test_parameters_come_in_canonical_form():
    params = planted(2, 50, seed=1)
    found = fit(gabor(params, 13)).params
    assert ((found.orientation >= 0) & (found.orientation < math.pi)).all()
    assert (found.amplitude > 0).all()
    assert ((found.phase > -math.pi) & (found.phase <= math.pi)).all()


def test_leading_axes_are_all_filters_unless_geometry_is_shared():
    kernels = gabor(planted(2, 4, 3), 11)
    result = fit(kernels)
    assert len(result) == 12
    assert result.params.orientation.shape == (12,)
    single = fit(kernels[1, 2])
    assert single.params.orientation.item() == pytest.approx(result.params.orientation[5].item())
    shared = fit(kernels[0], geometry="filter")
    assert shared.params.orientation.shape == (1, 1)
    assert shared.params.amplitude.shape == (1, 3)


def test_the_input_is_left_alone_and_the_answer_is_double_without_graph():
    kernels = gabor(planted(2, 3), 11).float().requires_grad_()
    before = kernels.detach().clone()
    result = fit(kernels)
    assert torch.equal(kernels, before)
    values = [*result.params.as_dict().values(), *result.standard_error.values()]
    for value in (*values, result.explained_variance, result.correlation):
        assert value.dtype == F64
        assert not value.requires_grad


def test_a_layer_takes_what_fit_returns():
    torch.manual_seed(1)
    layer = GaborConv2d(3, 8, 11, start="random", seed=3)
    other = GaborConv2d(3, 8, 11, start="random", seed=4)
    other.params = fit(layer.weight, geometry="filter").params
    torch.testing.assert_close(other.weight, layer.weight, rtol=0, atol=1e-5)
    single = GaborConv2d(1, 8, 11, start="random", seed=3)
    single.params = fit(layer.weight[:, 0]).params
    torch.testing.assert_close(single.weight[:, 0], layer.weight[:, 0], rtol=0, atol=1e-5)


# -- fit: the solver ----------------------------------------------------------------------------

MODELS = [
    GaborModel((11,), 1),
    GaborModel((10,), 2, free_center=True),
    GaborModel((7, 8), 1),
    GaborModel((7, 6), 3, free_center=True),
    GaborModel((7, 7), 1, isotropic=True),
    GaborModel((4, 5, 6), 2, free_center=True),
]


def some_problem(model: GaborModel, *, metric: bool) -> tuple[Target, Tensor]:
    """A target that no member of the model matches, and geometries to look at it from."""
    n = model.n_channels * math.prod(model.sizes)
    n_dims = model.n_dims
    z = torch.cat(
        [
            torch.rand(3, len(model.angle_names), dtype=F64),
            torch.tensor([[0.2, 0.3, 0.1], [-0.15, 0.5, -0.4], [0.3, 0.6, 0.3]], dtype=F64),
            torch.rand(3, n_dims, dtype=F64) - 0.5,
        ],
        1,
    )
    if metric:
        return Target(drawn(3, 1, n), drawn(n, n, seed=1)), z
    return Target(drawn(3, model.n_channels, n // model.n_channels)), z


def pair_of(model: GaborModel, z: Tensor) -> Tensor:
    """The two kernels that a geometry combines, by way of the record."""
    columns = model.columns
    fields = {
        "wavelength": 1 / z[columns["frequency"]],
        "sigma": z[columns["sigma"]].exp(),
        "aspect_ratio": z[columns["aspect_ratio"]].exp(),
        "center": z[columns["center"] :],
        "amplitude": torch.tensor(1.0, dtype=F64),
    }
    fields |= {name: z[columns[name]] for name in model.angle_names}
    record, rows = RECORDS[model.n_dims], []
    for phase in (0.0, math.pi / 2):
        fields["phase"] = torch.tensor(phase, dtype=F64)
        params = record(**{name: fields[name] for name in record.field_names()})
        rows.append(gabor(params, model.sizes).flatten())
    return torch.stack(rows)


def left_over(target: Target, model: GaborModel, z: Tensor) -> Tensor:
    """What the best coefficients leave of one target, ``(m, groups)``."""
    y, rows = target.y.T, pair_of(model, z)
    if target.root is not None:
        rows = torch.block_diag(*[rows] * model.n_channels) @ target.root.T
    return y - rows.T @ torch.linalg.solve(rows @ rows.T, rows @ y)


@pytest.mark.parametrize("metric", [False, True], ids=["kernels", "covariance"])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_misfit_and_its_slopes_are_those_of_autograd(model, metric):
    target, z = some_problem(model, metric=metric)
    cost = misfit(target, model, z)
    residual, J, coefficients = linearize(target, model, z)
    assert coefficients.shape == (3, model.n_channels, 2)
    for i in range(len(z)):
        one = Target(target.y[i], target.root)
        torch.testing.assert_close(residual[i].T, left_over(one, model, z[i]), rtol=0, atol=1e-10)
        assert residual[i].square().sum().item() == pytest.approx(cost[i].item(), rel=1e-12)
        # Kaufman's approximation leaves the gradient exact.
        row = z[i].clone().requires_grad_()
        (wanted,) = torch.autograd.grad(left_over(one, model, row).square().sum(), row)
        gradient = -2 * (J[i] @ residual[i].unsqueeze(-1)).sum((0, 2))
        torch.testing.assert_close(gradient, wanted[model.free], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_slopes_of_a_kernel_of_the_family_are_those_of_autograd(model):
    # Without a residual, what Kaufman's approximation leaves out is zero.
    _, z = some_problem(model, metric=False)
    coefficients = drawn(model.n_channels, 2)
    for row in z:
        own = Target((coefficients @ pair_of(model, row))[None], None)
        J = linearize(own, model, row[None])[1][0]
        one = Target(own.y[0], None)
        slopes = torch.autograd.functional.jacobian(
            lambda z, one=one: left_over(one, model, z), row
        )
        wanted = -slopes.permute(1, 2, 0)[:, model.free]
        torch.testing.assert_close(J, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "beside"), [(F64, 1e-9), (torch.float32, 2e-5)], ids=str)
def test_a_cosine_and_a_sine_that_are_nearly_one_are_still_two(dtype, beside):
    """On pixels along a diagonal, near one cycle every other pixel, the pair differs in slope."""
    x, y = grid(9)
    on_line, step = x - y == 2, (x + y) / 2
    line = torch.where(on_line, (1 - 2 * (step % 2)) * (1 + step) * (-(step**2) / 2.56).exp(), 0.0)
    target = Target((line / line.norm()).reshape(1, 1, -1).to(dtype))
    tilt = 0.01  # rad, or the sine is zero on every pixel
    frequency = (0.5 + beside) / (math.sqrt(2) * math.cos(tilt))
    z = [math.pi / 4 - tilt, frequency, math.log(1.6), math.log(20.0), 1.0, -1.0]
    model = GaborModel((9, 9), 1, free_center=True)
    assert misfit(target, model, torch.tensor([z], dtype=dtype)).item() < 1e-3


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_a_search_that_comes_near_no_wave_goes_on(dtype):
    """The frequency loses its influence on the way: the other parameters must not wait for it."""
    fields = {"orientation": 0.77, "wavelength": 10.58, "phase": -0.14, "sigma": 1.07}
    kernel = gabor(Gabor2d.of(**fields, aspect_ratio=0.43).to(F64), 11)
    target = Target((kernel / kernel.norm()).reshape(1, 1, -1).to(dtype))
    start = torch.tensor([[0.77, 0.0147, -0.26, -1.2, 0.0, 0.0]], dtype=dtype)
    limits = {"max_iterations": 100, "tolerance": 1e-6, "damping": 1e-3}
    end = solve(target, GaborModel((11, 11), 1), start, **limits)
    assert end.converged.item()
    assert end.cost.item() < 1e-11


def test_starts_come_best_first_and_near_the_truth():
    params = planted(2, 30, seed=5)
    target, model = Target(gabor(params, 13).reshape(30, 1, -1)), GaborModel((13, 13), 1)
    z = StartGrid(model, target.y).starts(target, n_starts=3, thorough=False)
    assert z.shape == (30, 3, 6)
    cost = misfit(target.repeat(3), model, z.flatten(0, 1)).reshape(30, 3)
    assert (cost.diff(dim=1) >= 0).all()
    assert (cost[:, 0] < 0.3 * target.y.square().sum((1, 2))).all()


def test_flat_kernels_are_looked_at_no_closer_along_an_axis_than_its_pixels_allow():
    def n_compared(*sizes: int) -> int:
        return StartGrid(GaborModel(sizes, 1, free_center=True), torch.empty(0, dtype=F64)).size

    assert n_compared(2, 9, 9) < n_compared(9, 9, 9) / 4
    params = planted(3, 8, seed=2)
    found = fit(gabor(params, (2, 9, 9)), n_dims=3)
    assert (found.explained_variance > 1 - 1e-6).all()


def test_more_starts_never_fit_worse():
    few, many = (fit(drawn(20, 7, 7), n_starts=n).explained_variance for n in (1, 6))
    assert (many >= few - 1e-9).all()
    assert (many > few + 1e-3).any()


def test_starts_at_random_are_the_same_for_every_kernel():
    kernels, state = drawn(2, 5, 5), torch.random.get_rng_state()
    whole = fit(kernels, n_starts=24).explained_variance
    assert torch.equal(torch.random.get_rng_state(), state)
    alone = fit(kernels[1:], n_starts=24).explained_variance
    torch.testing.assert_close(whole[1:], alone, rtol=1e-9, atol=1e-12)
    assert (whole > fit(kernels, n_starts=4).explained_variance - 1e-9).all()


def test_a_search_that_is_cut_short_says_so():
    kernels = gabor(planted(2, 4), 11)
    result = fit(with_noise(kernels, 0.2), max_iterations=2)
    assert result.outcome == (Outcome.STALLED,) * 4
    assert (result.n_iterations == 2).all()


# -- fit: errors --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noisy() -> tuple[Gabor, Tensor, FitResult]:
    params = planted(2, 400, seed=7)
    kernels = gabor(params, 11)
    return params, kernels, fit(with_noise(kernels, 0.2, seed=7), n_starts=2)


def test_the_error_is_that_of_the_noise_in_six_directions(noisy):
    _, kernels, result = noisy
    # Six parameters take up √6 of the noise: no unbiased estimate does better.
    ratio = kernel_errors(result, kernels) / (0.2 * math.sqrt(6 / 121))
    assert ratio.median() < 1.05
    assert ratio.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)
    left = 1 - result.explained_variance
    assert left.median().item() == pytest.approx(0.2**2 / (1 + 0.2**2), rel=0.1)


def test_two_thirds_of_the_errors_lie_within_a_standard_error(noisy):
    params, _, result = noisy
    assert_errors_as_stated(result, params)
    # Nor are there too many large ones.
    assert (scores(result, params).abs() > 3).double().mean() < 0.01


def test_correlations_are_those_of_the_errors():
    params = planted(2, 1, seed=3).expand()
    kernel = gabor(params, 11)
    many = kernel.expand(500, 11, 11)
    result = fit(with_noise(many, 0.05, seed=4), n_starts=1)
    assert result.names == tuple(
        f"{name}[0]" if name in ("phase", "amplitude") else name
        for name in params.field_names()
        if name != "center"
    )
    expected = result.correlation.mean(0)
    torch.testing.assert_close(expected.diagonal(), torch.ones(6, dtype=F64))
    # A correlation over 500 has a standard deviation of at most 0.045.
    found = torch.corrcoef(scores(result, params[[0] * 500]))
    assert (found - expected).abs().max() < 0.15


def test_what_is_not_searched_has_no_error():
    kernels = with_noise(gabor(planted(2, 3, aspect_ratio=1.0), 11), 0.1)
    result = fit(kernels, isotropic=True)
    assert (result.params.aspect_ratio == 1).all()
    assert (result.standard_error["aspect_ratio"] == 0).all()
    assert (result.standard_error["center"] == 0).all()
    assert "aspect_ratio" not in result.names
    result = fit(kernels, center=True)
    assert (result.standard_error["center"] > 0).all()
    assert result.names[-2:] == ("center[0]", "center[1]")


# -- fit: targets that are no Gabor functions ---------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((20, 7, 7), {}),
        ((10, 7, 7), {"center": True}),
        ((10, 11, 11), {}),
        ((8, 3, 7, 7), {"geometry": "filter"}),
    ],
    ids=str,
)
def test_white_noise_is_no_gabor(shape, options):
    result = fit(drawn(*shape), n_starts=3, **options)
    assert not result.converged.any()
    # It draws the envelope to be a pixel, or endless, or a line: a search that rests at a bound
    # with some of its parameters must arrive with the others.
    assert result.outcome.count(Outcome.OFF_MODEL) > 0.8 * len(result)


def test_a_free_kernel_of_few_pixels_is_seldom_called_a_gabor():
    # Six parameters explain much of 25 pixels, whatever they hold. A share of the power that did
    # not count them would call one in eight a Gabor function.
    result = fit(drawn(80, 5, 5), n_starts=3)
    assert result.converged.double().mean() < 0.05


@pytest.mark.parametrize("size", [7, 11])
def test_patterns_of_two_waves_are_no_gabors(size):
    x, y = grid(size)
    plaid = torch.cos(math.pi / 2 * x) * torch.cos(math.pi / 2 * y)
    squares = torch.cos(math.pi * x) * torch.cos(math.pi * y)
    large_squares = (
        torch.cos(math.pi / 2 * (x - 0.5)).sign() * (y + 0.5).mul(math.pi / 2).sin().sign()
    )
    result = fit(torch.stack([plaid, squares, large_squares]))
    assert result.outcome == (Outcome.OFF_MODEL,) * 3


def test_a_constant_is_a_blob_wider_than_the_kernel():
    result = fit(torch.full((9, 9), 3.0, dtype=F64))
    assert result.outcome == (Outcome.NOT_IDENTIFIABLE,)
    assert result.params.wavelength.isinf()
    assert (result.params.sigma / result.params.aspect_ratio).item() > 18
    assert result.params.amplitude.item() == pytest.approx(3, rel=0.01)
    assert result.explained_variance.item() > 0.9999


def test_an_oblong_blob_has_one():
    x, y = grid(11)
    blob = torch.exp(-((0.8 * x + 0.6 * y) ** 2) / 2 - (0.6 * x - 0.8 * y) ** 2 / 8)
    result = fit(blob)
    assert kernel_errors(result, blob[None], 2).item() < 1e-6
    assert result.outcome == (Outcome.NOT_IDENTIFIABLE,)  # for the wavelength
    assert result.params.orientation.item() == pytest.approx(math.atan2(0.6, 0.8), abs=1e-6)
    assert result.standard_error["orientation"].item() < 1e-6
    assert result.not_identifiable(0)[0] == "wavelength"


def test_a_single_pixel_fits_anything():
    result = fit(torch.tensor([[[2.0]], [[-1.0]]]))
    assert result.outcome == (Outcome.NOT_IDENTIFIABLE,) * 2
    assert (result.explained_variance == 1).all()
    shared = fit(drawn(2, 3, 1, 1), geometry="filter")
    assert shared.outcome == (Outcome.NOT_IDENTIFIABLE,) * 2


@pytest.mark.parametrize("options", [{}, {"geometry": "filter"}], ids=str)
def test_one_bad_kernel_leaves_its_neighbours_alone(options):
    kernels = gabor(planted(2, 5, 1), 9)
    alone = fit(kernels[[1, 3]], **options)
    kernels[0] = 0
    kernels[2, 0, 4, 4] = math.nan
    kernels[4, 0, 0, 0] = math.inf
    result = fit(kernels, **options)
    bad, good = result[[0, 2, 4]], result[[1, 3]]
    assert bad.outcome == (Outcome.BAD_INPUT,) * 3
    assert all(value.isnan().all() for value in bad.params.as_dict().values())
    assert bad.explained_variance.isnan().all()
    assert bad.not_identifiable(0) == ()
    assert good.outcome == alone.outcome
    for name, value in good.params.as_dict().items():
        torch.testing.assert_close(value, alone.params.as_dict()[name], rtol=1e-9, atol=1e-9)


def test_the_cut_of_the_batch_does_not_matter(monkeypatch):
    kernels = with_noise(gabor(planted(2, 18, seed=8), 7), 0.2, seed=8)
    whole = fit(kernels, n_starts=2)
    parts = FitResult.cat([fit(piece, n_starts=2) for piece in kernels.split([1, 10, 7])])
    monkeypatch.setitem(search.BATCH_BYTES, "cpu", 1)
    monkeypatch.setattr(api, "_PIECE", 17 * 49)
    for other in (parts, fit(kernels, n_starts=2)):
        assert other.outcome == whole.outcome
        torch.testing.assert_close(other.explained_variance, whole.explained_variance)
        # Sums in another order end a rounding error apart, where the misfit is flat.
        assert_same_parameters(other.params, whole.params, 1e-5)


def test_kernels_of_any_scale_are_alike():
    kernels = with_noise(gabor(planted(2, 4), 9), 0.3)
    usual = fit(kernels, n_starts=2)
    for factor in (1e-30, 1e30):
        result = fit(kernels * factor, n_starts=2)
        assert result.outcome == usual.outcome
        for name, value in result.params.as_dict().items():
            wanted = usual.params.as_dict()[name] * (factor if name == "amplitude" else 1)
            torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)


def test_a_metric_that_counts_pixels_alike_is_none():
    kernels = with_noise(gabor(planted(2, 4, 1, channels=2), 7), 0.3)
    plain = fit(kernels, geometry="filter", n_starts=2)
    for metric in (torch.eye(98), 5 * torch.eye(98, dtype=F64)):
        result = fit(kernels, geometry="filter", metric=metric, n_starts=2)
        assert_same(result, plain)


def test_in_the_metric_of_an_image_kernels_are_fitted_as_its_responses_are(photograph):
    # With noise, so that the metrics do not agree.
    kernels = with_noise(gabor(shared_geometry(2, 6), 9), 0.2)
    responses = F.conv2d(photograph, kernels)
    seen = PatchStatistics((9, 9), n_channels=1, n_outputs=6)
    seen.add(photograph, responses)
    wanted = recover(photograph, responses, 9, n_starts=2)
    result = fit(kernels, geometry="filter", metric=seen.covariance, n_starts=2)
    assert_same_parameters(result.params, wanted.params, 1e-5)
    torch.testing.assert_close(result.explained_variance, wanted.explained_variance)
    assert (wanted.params.sigma - fit(kernels, n_starts=1).params.sigma[:, None]).abs().max() > 0.05


def test_a_short_wave_along_an_axis_comes_back():
    kernel = gabor(Gabor2d.of(wavelength=2.5, sigma=1.25, aspect_ratio=2.0, dtype=F64), 15)[None]
    assert kernel_errors(fit(kernel), kernel, 2).item() < 1e-6


KERNELS = torch.ones(2, 9, 9)
POSITIVE = "weights must be finite and not negative, and some of them positive."
FITTING = "weights must have a shape that broadcasts to the kernels' shape (2, 9, 9), got "


@pytest.mark.parametrize(
    ("kernels", "options", "message"),
    [
        (torch.ones(9), {}, "kernels must be (filters, *kernel_size), got shape (9,)."),
        (torch.ones(9, 9), {"n_dims": 3}, "kernels must be (filters, *kernel_size), got"),
        (torch.ones(9, 9), {"geometry": "filter"}, "kernels must be (filters, channels, *kernel"),
        (torch.ones(0, 9, 9), {}, "kernels must be (filters, *kernel_size), got shape (0, 9, 9)."),
        (torch.ones(9, 9).int(), {}, "kernels must be floating, got torch.int32"),
        (torch.ones(9, 9), {"geometry": "layer"}, "geometry must be one of 'pair', 'filter'"),
        (torch.ones(9, 9), {"n_dims": 4}, "n_dims must be 1, 2 or 3, got 4."),
        (torch.ones(9, 9), {"n_starts": 0}, "n_starts must be at least 1, got 0."),
        (torch.ones(3, 3), {"metric": torch.eye(3)}, "metric must be finite and of shape (9, 9)"),
        (torch.ones(1, 2), {"metric": torch.eye(2) / 0}, "metric must be finite and of shape (2"),
        (KERNELS, {"weights": 1 - 2 * torch.eye(9)}, POSITIVE),
        (KERNELS, {"weights": torch.ones(9, 9) * math.nan}, POSITIVE),
        (KERNELS, {"weights": torch.ones(9, 9) * math.inf}, POSITIVE),
        (KERNELS, {"weights": torch.zeros(9, 9)}, POSITIVE),
        (KERNELS, {"weights": torch.ones(8, 9)}, FITTING + "(8, 9)."),
        (KERNELS, {"weights": torch.ones(1, 2, 9, 9)}, FITTING + "(1, 2, 9, 9)."),
        (KERNELS, {"weights": KERNELS, "metric": torch.eye(81)}, "metric goes with neither"),
        (KERNELS, {"loss": "huber", "metric": torch.eye(81)}, "metric goes with neither weights"),
        (KERNELS, {"loss": "l1"}, "loss must be one of 'squared', 'huber', 'cauchy', got 'l1'."),
        (KERNELS, {"dtype": torch.float16}, "dtype must be torch.float32 or torch.float64, got"),
    ],
    ids=str,
)
def test_fit_refuses_what_it_cannot_read(kernels, options, message):
    assert_refused(fit, kernels, message=message, **options)


# -- results ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed() -> FitResult:
    """A fit of a Gabor function, nothing, a blob and noise."""
    x, y = grid(9)
    edge = gabor(Gabor2d.of(orientation=0.5, wavelength=5.0, sigma=1.5, dtype=F64), 9)
    blob = torch.exp(-(x.square() + y.square()) / 4)
    return fit(torch.stack([edge, torch.zeros(9, 9, dtype=F64), blob, drawn(9, 9)]))


def test_outcomes_are_told_filter_by_filter(mixed):
    ends = (Outcome.CONVERGED, Outcome.BAD_INPUT, Outcome.NOT_IDENTIFIABLE, Outcome.OFF_MODEL)
    assert mixed.outcome == ends
    assert mixed.converged.tolist() == [True, False, False, False]
    assert mixed.not_identifiable(0) == ()
    assert len({outcome.value for outcome in Outcome}) == len(Outcome)


def test_results_are_cut_and_joined(mixed):
    assert len(mixed) == 4
    for index, wanted in (
        (slice(1, 3), [1, 2]),
        (slice(None, None, -1), [3, 2, 1, 0]),
        ([3, 0], [3, 0]),
    ):
        part = mixed[index]
        assert len(part) == len(wanted)
        assert part.outcome == tuple(mixed.outcome[i] for i in wanted)
        assert part.names == mixed.names
        for name, value in part.params.as_dict().items():
            assert torch.equal(value.isnan(), mixed.params.as_dict()[name][wanted].isnan())
        assert torch.equal(part.n_iterations, mixed.n_iterations[wanted])
    joined = FitResult.cat([mixed[:2], mixed[2:]])
    assert joined.to_json() == mixed.to_json()


def test_json_holds_everything_and_is_strict(mixed):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads(mixed.to_json(indent=2), parse_constant=refuse)
    assert document["outcome"] == [outcome.name for outcome in mixed.outcome]
    assert document["params"]["units"]["orientation"] == "rad"
    assert document["explained_variance"][1] == "nan"
    assert document["standard_error"]["orientation"][2] == "inf"
    assert document["standard_error"]["sigma"][0] == mixed.standard_error["sigma"][0].item()
    assert document["names"] == list(mixed.names)
    assert len(document["correlation"]) == len(document["n_iterations"]) == 4
    # The parameters of what was found can be read back.
    found = mixed[[0]]
    text = json.dumps(json.loads(found.to_json())["params"])
    assert torch.equal(Gabor2d.from_json(text).orientation, found.params.orientation)


def test_the_table_has_a_row_for_every_number(mixed):
    rows = mixed.to_table()
    assert len(rows) == 4 * 8  # the centre has two components
    assert {row["parameter"] for row in rows} >= {"orientation", "center[0]", "center[1]"}
    first = rows[0]
    assert first["filter"] == 0
    assert first["parameter"] == "orientation"
    assert first["unit"] == "rad"
    assert first["value"] == pytest.approx(0.5)
    assert first["outcome"] == "CONVERGED"
    assert math.isnan(rows[8]["value"])
    assert math.isinf(rows[16]["standard_error"])
    shared = fit(gabor(planted(2, 2, 1, channels=3), 9), geometry="filter")
    names = [row["parameter"] for row in shared.to_table() if row["filter"] == 1]
    assert [name for name in names if name.startswith("phase")] == [f"phase[{i}]" for i in range(3)]


# -- recover: planted filters -------------------------------------------------------------------


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    return sample_image()[None, :, 224:288, 224:288]


def shared_geometry(n_dims: int, n: int, channels: int = 1, **kwargs: Any) -> Gabor:
    return planted(n_dims, n, 1, channels=channels, **kwargs)


def assert_recovered(result: FitResult, params: Gabor, atol: float = 1e-6) -> None:
    assert result.outcome == (Outcome.CONVERGED,) * len(result)
    assert (result.explained_variance > 1 - 1e-9).all()
    for name, value in result.params.as_dict().items():
        assert value.shape == params.as_dict()[name].shape
    assert_same_parameters(result.params, params, atol)


def test_filters_come_back_from_a_photograph(photograph):
    params = shared_geometry(2, 12)
    responses = F.conv2d(photograph, gabor(params, 13))
    assert_recovered(recover(photograph, responses, 13), params)
    # In single precision, too, as far as it goes.
    single = recover(photograph.float(), responses.float(), 13)
    assert_recovered(single, params, atol=1e-3)


@pytest.mark.parametrize(
    ("plant", "options"),
    [({"center": 1.0}, {"center": True}), ({"aspect_ratio": 1.0}, {"isotropic": True})],
    ids=str,
)
def test_what_is_searched_can_be_chosen(photograph, plant, options):
    params = shared_geometry(2, 4, seed=1, **plant)
    responses = F.conv2d(photograph, gabor(params, 13))
    assert_recovered(recover(photograph, responses, 13, **options), params)


@pytest.mark.parametrize(
    ("n_dims", "size", "image"), [(1, (15,), (200,)), (3, (4, 7, 7), (12, 24, 20))]
)
def test_filters_come_back_in_one_and_three_dimensions(n_dims, size, image):
    params = shared_geometry(n_dims, 4, channels=2, seed=2)
    images = torch.rand(2, 2, *image, dtype=F64)
    responses = CONVOLVE[n_dims](images, gabor(params, size))
    assert_recovered(recover(images, responses, size), params)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (9, {"stride": 2}),
        (9, {"stride": (1, 3)}),
        (9, {"padding": 1}),
        (9, {"padding": (0, 4), "stride": 2}),
        (9, {"padding": "valid"}),
        (9, {"padding": "same"}),
        pytest.param(
            (8, 11),
            {"padding": "same"},
            marks=pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
        ),
    ],
    ids=str,
)
def test_the_convolutions_arguments_are_understood(photograph, size, options):
    params = shared_geometry(2, 3, channels=3, seed=3)
    colours = torch.cat([photograph, photograph.flip(-1), photograph.flip(-2)], 1)
    responses = F.conv2d(colours, gabor(params, size), **options)
    assert_recovered(recover(colours, responses, size, **options), params)


def test_several_images_may_differ_in_size_and_come_one_by_one(photograph):
    params = shared_geometry(2, 3, seed=4)
    images = [photograph[..., :40, :], photograph[..., 20:, 10:45], photograph[..., 30:, 30:]]
    images[2] = images[2].expand(2, -1, -1, -1)
    responses = [F.conv2d(image, gabor(params, 11)) for image in images]
    listed = recover(images, responses, 11)
    assert_recovered(listed, params)
    streamed = recover(iter(images), (response for response in responses), 11)
    assert streamed.to_json() == listed.to_json()


def test_a_bias_and_the_images_mean_do_not_matter(photograph):
    params = shared_geometry(2, 3, seed=5)
    kernels = gabor(params, 11)
    assert_recovered(recover(photograph, F.conv2d(photograph, kernels) + 7.0, 11), params)
    bright = photograph + 1e4
    assert_recovered(recover(bright, F.conv2d(bright, kernels) - 3.0, 11), params)


def test_errors_from_noisy_responses_are_as_large_as_stated(photograph):
    params = shared_geometry(2, 150, seed=6)
    clean = F.conv2d(photograph, gabor(params, 11))
    size = 0.3 * clean.std((0, 2, 3), keepdim=True)
    result = recover(photograph, clean + size * drawn(*clean.shape), 11, n_starts=2)
    assert result.converged.all()
    # 6 x 150 errors, six to a filter not independent: a standard deviation of 0.02 or so.
    t = scores(result, params).abs()
    assert (t < 1).double().mean().item() == pytest.approx(0.683, abs=0.05)
    assert (t > 3).double().mean() < 0.015
    # Noise takes its part of the variance, and six parameters a little of the noise.
    assert result.explained_variance.mean().item() == pytest.approx(1 / 1.09, abs=0.005)


def test_responses_of_noise_are_no_gabors(photograph):
    result = recover(photograph, drawn(1, 40, 56, 56), 9, n_starts=4)
    assert not result.converged.any()
    assert result.outcome.count(Outcome.OFF_MODEL) >= 36
    assert (result.explained_variance < 0.03).all()


def test_one_silent_filter_leaves_its_neighbours_alone(photograph):
    params = shared_geometry(2, 3, seed=7)
    responses = F.conv2d(photograph, gabor(params, 11))
    responses[:, 1] = 0.1
    result = recover(photograph, responses, 11)
    assert result[[1]].outcome == (Outcome.BAD_INPUT,)
    assert result[[1]].params.sigma.isnan().all()
    assert_recovered(result[[0, 2]], params[[0, 2]])


def test_a_grating_does_not_tell_everything():
    # All patches of a grating are combinations of two: of six parameters at most two are seen.
    x, y = grid(48)
    image = torch.cos(2 * math.pi * (0.8 * x + 0.6 * y) / 7)[None, None]
    params = shared_geometry(2, 2, seed=8)
    responses = F.conv2d(image, gabor(params, 11))
    result = recover(image, responses, 11)
    assert result.outcome == (Outcome.NOT_IDENTIFIABLE,) * 2
    assert (result.explained_variance > 1 - 1e-9).all()
    assert {"orientation", "sigma", "aspect_ratio"} <= set(result.not_identifiable(0))
    # Nor with three channels, whose twelve parameters are more than the patches tell apart.
    colours = image.expand(1, 3, 48, 48)
    responses = F.conv2d(colours, gabor(shared_geometry(2, 1, channels=3), 11))
    assert recover(colours, responses, 11).outcome == (Outcome.NOT_IDENTIFIABLE,)
    # A little texture is enough to find them, and the errors say how little it is.
    image = image + 0.01 * drawn(*image.shape)
    clean = F.conv2d(image, gabor(params, 11))
    result = recover(image, clean + 0.01 * clean.std() * drawn(*clean.shape, seed=1), 11)
    white = drawn(*image.shape)
    easy = F.conv2d(white, gabor(params, 11))
    easy = recover(white, easy + 0.01 * easy.std() * drawn(*easy.shape, seed=1), 11)
    ratio = result.standard_error["aspect_ratio"] / easy.standard_error["aspect_ratio"]
    assert (ratio > 5).all(), ratio
    for name, error in result.params.difference(params).items():
        assert (error.abs() <= 4 * result.standard_error[name]).all(), name


def test_recover_keeps_to_bounds(photograph):
    params = planted(2, 4, 1, channels=1, wavelength=5.0, sigma=2.0)
    responses = F.conv2d(photograph, gabor(params, 11))
    free = recover(photograph, responses, 11)
    within = recover(photograph, responses, 11, bounds={"wavelength": (4.0, 6.0)})
    assert_same(within, free)
    bound = recover(photograph, responses, 11, bounds={"wavelength": (6.0, math.inf)})
    assert (bound.params.wavelength >= 6 * (1 - 1e-6)).all()
    assert (bound.explained_variance < free.explained_variance - 1e-5).all()


def test_filters_recovered_together_or_one_by_one_are_the_same(photograph):
    params = planted(2, 5, 1, channels=2, seed=14)
    images = torch.cat([photograph, photograph.flip(-1)], 1)
    clean = F.conv2d(images, gabor(params, 9))
    responses = clean + 0.3 * clean.std((0, 2, 3), keepdim=True) * drawn(*clean.shape)
    together = recover(images, responses, 9, n_starts=3)
    parts = [recover(images, responses[:, band], 9, n_starts=3) for band in ([0], [1, 2], [3, 4])]
    assert_same(FitResult.cat(parts), together, atol=1e-5)


IMAGE = torch.linspace(0, 1, 800).reshape(2, 1, 20, 20)
RESPONSE = torch.linspace(0, 1, 864).reshape(2, 3, 12, 12)


@pytest.mark.parametrize(
    ("images", "responses", "options", "message"),
    [
        (IMAGE * math.nan, RESPONSE, {}, "images must be finite, got NaN or infinity."),
        (IMAGE, RESPONSE * math.inf, {}, "responses must be finite, got NaN or infinity."),
        (torch.full_like(IMAGE, 0.3), RESPONSE, {}, "The images are constant: every kernel"),
        (IMAGE[0], RESPONSE, {}, "responses must be (batch, channels, *size) with 1 axes"),
        (IMAGE[0, 0], RESPONSE, {}, "images must be (batch, channels, *size) with 1 to 3 axes"),
        (IMAGE, RESPONSE, {"kernel_size": (9, 9, 9)}, "images must be (batch, channels, *size) wi"),
        (IMAGE, RESPONSE, {"kernel_size": 8}, "responses must have size (13, 13) for this image"),
        (IMAGE, RESPONSE, {"kernel_size": 21}, "Images must not be smaller than the kernel, got"),
        (IMAGE, RESPONSE, {"kernel_size": 0}, "kernel_size must be positive whole numbers, got 0."),
        (IMAGE, RESPONSE, {"stride": 0}, "stride must be positive whole numbers, got 0."),
        (IMAGE, RESPONSE, {"padding": "circular"}, "padding must be one of 'valid', 'same', got"),
        (IMAGE, RESPONSE[:1], {}, "images and responses must come in equal numbers, got 2 and 1."),
        ([IMAGE, IMAGE], [RESPONSE], {}, "images and responses must come in equal numbers."),
        ([IMAGE], [RESPONSE, RESPONSE], {}, "images and responses must come in equal numbers."),
        ([IMAGE] * 2, [RESPONSE, RESPONSE[:, :2]], {}, "Channels must stay the same, 1 of images"),
        ([], [], {}, "recover needs at least one image, got none."),
        (IMAGE[:0], RESPONSE[:0], {}, "recover needs at least one image, got none."),
        (IMAGE, RESPONSE, {"n_starts": 0}, "n_starts must be at least 1, got 0."),
    ],
)
def test_recover_refuses_what_it_cannot_read(images, responses, options, message):
    assert_refused(recover, images, responses, message=message, **{"kernel_size": 9} | options)
