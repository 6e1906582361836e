"""What a kernel may be instead of a Gabor function: both models, and when they are believed."""

from __future__ import annotations

import math

import pytest
import torch

from fits import F64, drawn, planted, with_noise
from gaborium import Gabor2d, Outcome, fit, gabor
from gaborium.fitting.alternatives import CenterSurround, TwoGabors, crossing, is_better
from gaborium.fitting.model import GaborModel
from gaborium.fitting.solver import Target, kernels_of, linearize, misfit, solve
from gaborium.functions.kernels import offsets

SIZES = (9, 11)


def centre_surround(sigma, ratio, x0, y0, sizes=SIZES, weight=None):
    x, y = offsets(sizes, F64, torch.device("cpu")).unflatten(1, sizes)
    square = (x - x0) ** 2 + (y - y0) ** 2
    weight = ratio**-2 if weight is None else weight
    surround = (-square / (2 * (ratio * sigma) ** 2)).exp()
    return (-square / (2 * sigma**2)).exp() - weight * surround


def plaid(turn, weight, size=11, orientation=0.4):
    one = Gabor2d.of(orientation=orientation, wavelength=4.5, sigma=2.5, aspect_ratio=0.8).to(F64)
    other = one.replace(orientation=one.orientation + turn, phase=torch.tensor(1.0, dtype=F64))
    return gabor(one, size) + weight * gabor(other, size)


MODELS = {
    "centre-surround": CenterSurround(SIZES, 2),
    "centre-surround and offset": CenterSurround(SIZES, 2, offset=True),
    "two": TwoGabors(GaborModel(SIZES, 2)),
    "two, centre free": TwoGabors(GaborModel(SIZES, 2, free_center=True)),
    "two and offset": TwoGabors(GaborModel(SIZES, 2, offset=True)),
}
ROWS = {
    "centre-surround": [0.7, -0.4, math.log(1.2), math.log(2.2)],
    "two": [0.4, 0.2, 0.8, 0.1, 0.3, -0.2, 1.9, 0.15, 0.9, -0.3, 0.1, 0.4],
}


@pytest.mark.parametrize("name", MODELS)
def test_slopes_agree_with_finite_differences(name):
    model = MODELS[name]
    z = torch.tensor([ROWS[name.partition(" ")[0].strip(",")]], dtype=F64)
    target = Target(drawn(1, 2, math.prod(SIZES)))
    left, slopes, _ = linearize(target, model, z)
    # Kaufman's slopes leave out what the basis itself spans; of the misfit they give it all.
    gradient = -2 * (slopes @ left.unsqueeze(-1)).squeeze(-1).sum(1)[0]
    step = 1e-6
    for i, column in enumerate(model.free):
        ends = []
        for sign in (1, -1):
            moved = z.clone()
            moved[:, column] += sign * step
            ends.append(misfit(target, model, moved).item())
        assert gradient[i].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-6)


def test_a_centre_with_its_surround_is_found_exactly():
    model = CenterSurround(SIZES, 2)
    kernels = torch.stack(
        [
            centre_surround(1.1, 1.8, 0.6, -0.3, weight=0.4),
            -2.0 * centre_surround(1.1, 1.8, 0.6, -0.3, weight=0.2),
        ]
    )
    target = Target(kernels.flatten(1).unsqueeze(0))
    starts = model.starts(target, kernels.flatten(1).unsqueeze(0))
    ends = [
        solve(target, model, starts[:, i], max_iterations=100, tolerance=1e-12, damping=1e-3)
        for i in range(starts.shape[1])
    ]
    best = min(ends, key=lambda end: end.cost.item())
    assert best.cost.item() < 1e-20
    assert best.z[0].tolist() == pytest.approx([0.6, -0.3, math.log(1.1), math.log(1.8)], abs=1e-8)
    assert best.coefficients[0].flatten().tolist() == pytest.approx([1.0, -0.4, -2.0, 0.4])


def test_two_waves_are_found_exactly_together():
    model = TwoGabors(GaborModel((11, 11), 1))
    target = Target(plaid(1.1, 0.7).reshape(1, 1, -1))
    z = torch.tensor([[0.3, 0.2, 0.8, 0.0, 0.0, 0.0, 1.6, 0.2, 0.8, 0.0, 0.0, 0.0]], dtype=F64)
    end = solve(target, model, z, max_iterations=200, tolerance=1e-12, damping=1e-3)
    assert end.cost.item() < 1e-20
    assert end.z[0, 0].item() == pytest.approx(0.4)
    assert end.z[0, 6].item() == pytest.approx(1.5)
    assert kernels_of(model, end.z, end.coefficients).shape == (1, 1, 121)
    assert crossing(model, end.z, end.coefficients).item() == pytest.approx(0.49, abs=0.1)


@pytest.mark.parametrize(
    ("turn", "frequency"), [(0.1, 0.2), (0.0, 0.35)], ids=["alike", "one direction"]
)
def test_two_that_do_not_cross_are_not_two(turn, frequency):
    model = TwoGabors(GaborModel((11, 11), 1))
    z = torch.tensor(
        [[0.4, 0.2, 0.8, 0.0, 0.0, 0.0, 0.4 + turn, frequency, 0.8, 0.0, 0.0, 0.0]], dtype=F64
    )
    coefficients = torch.tensor([[[1.0, 0.0, 0.8, 0.0]]], dtype=F64)
    assert crossing(model, z, coefficients).item() == 0.0


def test_evidence_pays_for_parameters():
    one, two = GaborModel(SIZES, 1), TwoGabors(GaborModel(SIZES, 1))
    n = torch.tensor([99.0], dtype=F64)
    dear = (two.n_parameters - one.n_parameters) * math.log(99.0) + 10.0
    cost = torch.ones(1, dtype=F64)
    for share, believed in ((0.99, False), (1.01, True)):
        other = cost * math.exp(share * dear / 99.0)
        assert is_better(two, cost, one, other, n).item() is believed
    # A model with fewer parameters earns no bonus.
    rings = CenterSurround(SIZES, 1)
    free = GaborModel(SIZES, 1, free_center=True)
    assert rings.n_parameters < free.n_parameters
    assert not is_better(rings, cost, free, cost * math.exp(9.0 / 99.0), n)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_a_plaid_is_not_called_a_gabor_function(center, weight):
    kernels = torch.stack([plaid(turn, weight) for turn in (0.8, 1.1, 1.5)])
    assert fit(kernels, center=center).outcome == (Outcome.OFF_MODEL,) * 3


@pytest.mark.parametrize("center", [False, True])
def test_a_centre_with_its_surround_is_not_called_a_gabor_function(center):
    kernels = torch.stack(
        [
            centre_surround(sigma, ratio, x0, y0, (9, 9))
            for sigma, ratio in ((1.0, 1.3), (1.2, 2.0), (1.1, 4.0))
            for x0, y0 in ((0.0, 0.0), (1.3, -0.6))
        ]
    )
    result = fit(kernels, center=center, n_starts=4)
    assert not result.converged.any()
    assert result.outcome.count(Outcome.OFF_MODEL) >= 5


@pytest.mark.parametrize(("size", "center"), [(7, False), (7, True), (11, False)])
def test_noise_makes_neither_two_of_one_nor_a_rival(size, center):
    # On few pixels two waves could explain much of the noise.
    kernels = gabor(planted(2, 20, seed=3, sigma=1.8, aspect_ratio=0.8), size)
    result = fit(with_noise(kernels, 0.3, seed=4), center=center, n_starts=4)
    assert Outcome.OFF_MODEL not in result.outcome
    assert result.converged.sum() >= 18
