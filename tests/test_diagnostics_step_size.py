"""Curvature equals the closed form, a cone is no bowl, and predicted cycles occur."""

import functools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium import Gabor2d, GaborConv2d, gabor_jacobian
from gaborium.diagnostics import Severity, StepLimit, TrainingSetup, landscape, step_limit
from trainings import causes, planted, rmse, white

PLANTED = Gabor2d.of(orientation=0.8, wavelength=6.0, sigma=3.0)
IMAGE = white(1, 1, 40, 40, dtype=torch.float32)


def layer_of_orientation() -> GaborConv2d:
    return GaborConv2d(
        1, 1, 15, bias=False, learn="orientation", coordinates="textbook", start=PLANTED
    )


def near(loss=F.mse_loss, *, noise: float = 0.0, away: float = 0.1) -> TrainingSetup:
    """A layer some way from the planted orientation, where its loss has a minimum."""
    layer = layer_of_orientation()
    setup = planted(layer, IMAGE, loss)
    layer.params = PLANTED.replace(orientation=torch.tensor(0.8 + away))
    return replace(setup, targets=setup.targets + noise * torch.randn(setup.targets.shape))


@functools.cache
def limit(loss=F.mse_loss) -> StepLimit:
    return step_limit(near(loss))


def with_sgd(setup: TrainingSetup, rate: float, momentum: float = 0.0) -> TrainingSetup:
    optimizer = torch.optim.SGD(setup.module.parameters(), lr=rate, momentum=momentum)
    return replace(setup, optimizer=optimizer)


def path_of(setup: TrainingSetup, n_steps: int) -> Tensor:
    """The errors of the orientation during training."""
    errors = []
    for _ in range(n_steps):
        setup.train(1)
        errors.append(setup.module.params.orientation.item() - 0.8)
    return torch.tensor(errors)


def response_slope() -> float:
    """c = rms(image * dg/dθ) at the planted kernel."""
    kernel = gabor_jacobian(PLANTED, 15)["orientation"].float()
    return F.conv2d(IMAGE, kernel[None, None]).square().mean().sqrt().item()


# -- curvature ----------------------------------------------------------------------------------


# Above 100 parameters the sharpness is an estimate.
@pytest.mark.parametrize(("n", "tolerance"), [(12, 1e-6), (101, 1e-3)])
def test_the_sharpness_is_the_largest_eigenvalue(n, tolerance):
    values = torch.cat([torch.linspace(0.5, 30.0, n - 1), torch.tensor([50.0])]).double()
    layer = nn.Linear(n, 1, bias=False).double()
    rotation = torch.linalg.qr(white(n, n))[0]
    # The Hessian of mean (Xw - y)² is 2 XᵀX / n.
    setup = planted(layer, (n / 2 * values).sqrt()[:, None] * rotation)
    nn.init.ones_(layer.weight)
    found = step_limit(setup)
    assert found.sharpness == pytest.approx(50.0, rel=tolerance)
    assert found.squared_sharpness == found.sharpness


def test_the_window_of_the_squared_error_is_one_over_the_squared_slope():
    found, c = limit(), response_slope()
    assert found.sharpness == pytest.approx(2 * c**2, rel=1e-3)
    assert found.step_limit == pytest.approx(1 / c**2, rel=1e-3)
    assert found.momentum_limit(0.9) == pytest.approx(1.9 / c**2, rel=1e-3)
    assert found.exponent == pytest.approx(1.0, abs=0.01)
    assert not found.is_cone


@pytest.mark.parametrize("share", [0.9, 1.1])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_descent_settles_below_the_limit_and_not_above(share, momentum):
    setup = with_sgd(near(away=1e-3), share * limit().momentum_limit(momentum), momentum)
    setup.train(150)
    error = abs(setup.module.params.orientation.item() - 0.8)
    assert (error < 1e-4) == (share < 1)


# -- the cone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [rmse, F.l1_loss])
def test_the_slope_of_a_cone_stays(loss):
    found, c = limit(loss), response_slope()
    assert found.is_cone
    assert found.exponent == pytest.approx(0.0, abs=0.01)
    assert (found.step_limit, found.sharpness) == (0.0, math.inf)
    if loss is rmse:
        assert found.slopes[-1] == pytest.approx(c, rel=1e-3)
    else:  # of a mean absolute value of about normal responses
        assert found.slopes[-1] == pytest.approx(c * math.sqrt(2 / math.pi), rel=0.02)
    assert found.squared_sharpness == pytest.approx(2 * c**2, rel=1e-3)
    assert causes(found) == {"cone at the minimum": Severity.WARNING}


def test_a_cone_has_the_basin_of_its_square():
    root, squared = limit(rmse), limit()
    assert root.basin == pytest.approx(squared.basin, rel=0.11)  # the grid of distances
    width = landscape(near(), "orientation").half_width
    assert squared.basin == pytest.approx(width, rel=0.15)


def test_noise_blunts_the_cone():
    found, c = step_limit(near(rmse, noise=5.0)), response_slope()
    assert not found.is_cone
    # sqrt(s² + c²δ²) has the curvature c² / s, but for what the noise and g'' have in common.
    assert found.sharpness == pytest.approx(c**2 / 5.0, rel=0.1)


@pytest.mark.parametrize("rate", [1e-3, 5e-3])
def test_descent_at_a_cone_cycles_as_predicted(rate):
    predicted = limit(rmse).cycling(rate)
    last = path_of(with_sgd(near(rmse, away=0.03), rate), 120)[-40:]
    assert last.abs().mean().item() == pytest.approx(predicted, rel=0.05)
    # From one side to the other, but for the steps at which the cycle drifts over its end.
    assert (last[1:] * last[:-1] < 0).double().mean() > 0.9


# -- what it says about an optimiser ------------------------------------------------------------


def test_a_cone_with_a_long_step_is_severe_and_its_remedy_settles():
    setup = with_sgd(near(rmse), 1.0)
    found = step_limit(setup)
    first = found.findings[0]
    assert (first.cause, first.severity) == ("cone at the minimum", Severity.SEVERE)
    mended = setup.with_remedy(first.remedy)
    assert mended.optimizer.param_groups[0]["lr"] == pytest.approx(1 / found.squared_sharpness)
    mended.train(60)
    assert mended.module.params.orientation.item() == pytest.approx(0.8, abs=1e-4)


def test_a_step_above_the_limit_is_severe_and_one_below_is_not():
    setup, largest = near(), limit().step_limit
    for share, expected in ((0.5, {}), (1.5, {"step too large": Severity.SEVERE})):
        found = step_limit(with_sgd(setup, share * largest))
        assert causes(found) == expected
    mended = with_sgd(setup, 1.0).with_remedy(found.findings[0].remedy)
    assert mended.optimizer.param_groups[0]["lr"] == pytest.approx(largest / 2)


def test_adam_with_a_huge_step_is_told_and_with_a_usual_one_is_not():
    setup = near()
    for rate, expected in ((1.0, {"step too large": Severity.SEVERE}), (0.01, {})):
        optimizer = torch.optim.Adam(setup.module.parameters(), lr=rate)
        assert causes(step_limit(replace(setup, optimizer=optimizer))) == expected


def test_momentum_that_throws_out_of_the_basin_is_told():
    plain = limit(rmse)
    setup = with_sgd(near(rmse), 0.3 * plain.basin / plain.slopes[-1], momentum=0.9)
    found = step_limit(setup)
    assert causes(found) == {
        "cone at the minimum": Severity.SEVERE,
        "momentum too large": Severity.SEVERE,
    }
    mended = setup.with_remedy(found.findings[1].remedy)
    assert "momentum too large" not in causes(step_limit(mended))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_loss_scaled_down_is_told_and_the_remedy_scales_it_up(kind):
    factor = 1e-7 if kind is torch.optim.SGD else 1e-11
    setup = near(lambda output, target: factor * F.mse_loss(output, target))
    rate = 0.25 / response_slope() ** 2 if kind is torch.optim.SGD else 0.01
    setup = replace(setup, optimizer=kind(setup.module.parameters(), lr=rate))
    found = step_limit(setup)
    assert causes(found) == {"loss scale": Severity.SEVERE}
    assert causes(step_limit(setup.with_remedy(found.findings[0].remedy))) == {}


# -- the caller's things, and bad input ---------------------------------------------------------


def test_only_what_the_optimiser_holds_is_looked_at():
    layer = GaborConv2d(1, 1, 15, bias=False, start=PLANTED, coordinates="textbook")
    setup = planted(layer, IMAGE, optimizer=torch.optim.SGD([layer.orientation], lr=1e-9))
    assert step_limit(setup).sharpness == pytest.approx(2 * response_slope() ** 2, rel=1e-3)


def test_a_foreign_module_is_measured_too():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor(0.3))

        def forward(self) -> Tensor:
            return self.theta

    def setup(loss) -> TrainingSetup:
        return TrainingSetup(Plain(), loss, (), torch.tensor(1.0))

    found = step_limit(setup(lambda output, target: 3 * (output - target) ** 2))
    assert found.sharpness == pytest.approx(6.0, rel=1e-4)
    assert found.basin == math.inf
    assert step_limit(setup(F.l1_loss)).is_cone


def test_bad_input_gets_one_clear_line():
    setup = near()
    stranger = torch.optim.SGD(layer_of_orientation().parameters(), lr=0.1)
    for message, changes in {
        "No parameter is learned": {"module": layer_of_orientation().requires_grad_(False)},
        "this very module": {"optimizer": stranger},
        "does not require grad": {"loss": lambda a, b: F.mse_loss(a, b).detach()},
        "must return a scalar": {"loss": lambda a, _: a},
        "The loss is nan": {"loss": lambda a, b: F.mse_loss(a, b) * math.nan},
        "where targets are responses": {"targets": None, "loss": lambda a, _: a.square().mean()},
    }.items():
        with pytest.raises((ValueError, RuntimeError), match=message):
            step_limit(replace(setup, **changes))
