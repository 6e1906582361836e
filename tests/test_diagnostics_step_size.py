"""Curvature equals the closed form, a cone is no bowl, and predicted cycles occur."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium import Gabor2d, GaborConv2d, gabor_jacobian
from gaborium.diagnostics import OutputLoss, Severity, landscape, step_limit

PLANTED = Gabor2d.of(orientation=0.8, wavelength=6.0, sigma=3.0)


def white(size: int = 60, channels: int = 1) -> Tensor:
    return torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))


def layer_of_orientation(**kwargs) -> GaborConv2d:
    settings = {"learn": "orientation", "coordinates": "textbook", "start": PLANTED} | kwargs
    return GaborConv2d(1, 1, 15, bias=False, **settings)


def near(layer: GaborConv2d, measure="mse", *, noise: float = 0.0, away: float = 0.1):
    """A loss whose minimum is at the planted orientation, and the layer some way from it."""
    inputs = white()
    targets = layer(inputs).detach()
    targets = targets + noise * torch.randn(targets.shape)
    layer.params = layer.params.detach().replace(orientation=torch.tensor([[0.8 + away]]))
    return OutputLoss(inputs, targets, measure)


def response_slope(layer: GaborConv2d) -> float:
    """c = rms(image * dg/dθ) at the planted kernel."""
    kernel = gabor_jacobian(PLANTED, layer.kernel_size)["orientation"].float()
    return F.conv2d(white(), kernel[None, None]).square().mean().sqrt().item()


def causes(found) -> dict[str, Severity]:
    return {finding.cause: finding.severity for finding in found.findings}


# -- curvature ----------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """A loss ``x·A x / 2`` of known eigenvalues, with a minimum at 0."""

    def __init__(self, eigenvalues: Tensor) -> None:
        super().__init__()
        n = len(eigenvalues)
        Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0)))[0]
        self.A = (Q @ torch.diag(eigenvalues.float()) @ Q.T).double()
        self.x = nn.Parameter(torch.ones(n, dtype=torch.float64))

    def loss(self, other) -> Tensor:
        return 0.5 * other.x @ self.A @ other.x


# Above 100 parameters the sharpness is an estimate.
@pytest.mark.parametrize(("n", "tolerance"), [(12, 1e-6), (101, 1e-3)])
def test_the_sharpness_is_the_largest_eigenvalue(n, tolerance):
    layer = Quadratic(torch.cat([torch.linspace(0.5, 30.0, n - 1), torch.tensor([50.0])]))
    found = step_limit(layer.loss, layer)
    assert found.sharpness == pytest.approx(50.0, rel=tolerance)
    assert found.squared_sharpness == found.sharpness


def test_the_window_of_the_squared_error_is_one_over_the_squared_slope():
    layer = layer_of_orientation()
    found = step_limit(near(layer), layer)
    c = response_slope(layer)
    assert found.sharpness == pytest.approx(2 * c**2, rel=1e-3)
    assert found.step_limit == pytest.approx(1 / c**2, rel=1e-3)
    assert found.momentum_limit(0.9) == pytest.approx(1.9 / c**2, rel=1e-3)
    assert found.exponent == pytest.approx(1.0, abs=0.01)
    assert not found.is_cone


@pytest.mark.parametrize("share", [0.9, 1.1])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_descent_settles_below_the_limit_and_not_above(share, momentum):
    layer = layer_of_orientation()
    loss = near(layer, away=1e-3)
    limit = step_limit(loss, layer).momentum_limit(momentum)
    optimizer = torch.optim.SGD(layer.parameters(), lr=share * limit, momentum=momentum)
    for _ in range(150):
        optimizer.zero_grad()
        loss(layer).backward()
        optimizer.step()
    error = abs(layer.params.orientation.item() - 0.8)
    assert (error < 1e-4) == (share < 1)


# -- the cone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["rmse", F.l1_loss], ids=["rmse", "l1"])
def test_the_slope_of_a_cone_stays(measure):
    layer = layer_of_orientation()
    found = step_limit(near(layer, measure), layer)
    assert found.is_cone
    assert found.exponent == pytest.approx(0.0, abs=0.01)
    assert (found.step_limit, found.sharpness) == (0.0, math.inf)
    c = response_slope(layer)
    if measure == "rmse":
        assert found.slopes[-1] == pytest.approx(c, rel=1e-3)
    else:  # of a mean absolute value of about normal responses
        assert found.slopes[-1] == pytest.approx(c * math.sqrt(2 / math.pi), rel=0.02)
    assert found.squared_sharpness == pytest.approx(2 * c**2, rel=1e-3)


def test_a_cone_is_seen_through_any_function_of_the_layer():
    layer = layer_of_orientation()
    loss = near(layer, "rmse")
    known = step_limit(loss, layer)
    found = step_limit(lambda one: loss(one), layer)
    assert found.is_cone
    assert found.slopes[-1] == pytest.approx(known.slopes[-1], rel=0.02)
    assert found.squared_sharpness == pytest.approx(known.squared_sharpness, rel=0.05)
    assert found.basin == pytest.approx(known.basin, rel=0.15)


def test_a_cone_has_the_basin_of_its_square():
    layer = layer_of_orientation()
    loss = near(layer, "rmse")
    root = step_limit(loss, layer)
    squared = step_limit(OutputLoss(loss.inputs, loss.targets), layer)
    assert root.basin == pytest.approx(squared.basin, rel=0.11)  # the grid of distances
    assert squared.basin == pytest.approx(
        landscape(loss, layer, "orientation").half_width, rel=0.15
    )


def test_noise_blunts_the_cone():
    layer = layer_of_orientation()
    found = step_limit(near(layer, "rmse", noise=5.0), layer)
    assert not found.is_cone
    c = response_slope(layer)
    # sqrt(s² + c²δ²) has the curvature c² / s, but for what the noise and g'' have in common.
    assert found.sharpness == pytest.approx(c**2 / 5.0, rel=0.1)


@pytest.mark.parametrize("rate", [1e-3, 5e-3])
def test_descent_at_a_cone_cycles_as_predicted(rate):
    layer = layer_of_orientation()
    loss = near(layer, "rmse", away=0.03)
    predicted = step_limit(loss, layer).cycling(rate)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    path = []
    for _ in range(120):
        optimizer.zero_grad()
        loss(layer).backward()
        optimizer.step()
        path.append(layer.params.orientation.item() - 0.8)
    last = torch.tensor(path[-40:])
    assert last.abs().mean().item() == pytest.approx(predicted, rel=0.05)
    # From one side to the other, but for the steps at which the cycle drifts over its end.
    assert (last[1:] * last[:-1] < 0).double().mean() > 0.9


# -- what it says about an optimiser ------------------------------------------------------------


def test_a_cone_with_a_long_step_is_severe_and_its_remedy_settles():
    layer = module = layer_of_orientation()
    criterion = near(layer, "rmse")
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    found = step_limit(criterion, layer, optimizer=optimizer)
    first = found.findings[0]
    assert (first.cause, first.severity) == ("cone at the minimum", Severity.SEVERE)
    names = {"module": module, "optimizer": optimizer, "loss": None}
    exec(first.remedy, names)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / found.squared_sharpness)
    for _ in range(60):
        optimizer.zero_grad()
        names["loss"](module(criterion.inputs), criterion.targets).backward()
        optimizer.step()
    assert module.params.orientation.item() == pytest.approx(0.8, abs=1e-4)


def test_a_cone_without_an_optimiser_is_a_warning():
    layer = layer_of_orientation()
    assert causes(step_limit(near(layer, "rmse"), layer)) == {
        "cone at the minimum": Severity.WARNING
    }


def test_a_step_above_the_limit_is_severe_and_one_below_is_not():
    layer = layer_of_orientation()
    loss = near(layer)
    limit = step_limit(loss, layer).step_limit
    for share, expected in ((1.5, {"step too large": Severity.SEVERE}), (0.5, {})):
        optimizer = torch.optim.SGD(layer.parameters(), lr=share * limit)
        found = step_limit(loss, layer, optimizer=optimizer)
        assert causes(found) == expected
    exec(
        step_limit(
            loss, layer, optimizer=torch.optim.SGD(layer.parameters(), lr=1.0)
        ).findings[0].remedy,
        {"optimizer": optimizer},
    )  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == pytest.approx(limit / 2)


def test_adam_with_a_huge_step_is_told_and_with_a_usual_one_is_not():
    layer = layer_of_orientation()
    loss = near(layer)
    for rate, expected in ((1.0, {"step too large": Severity.SEVERE}), (0.01, {})):
        optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
        assert causes(step_limit(loss, layer, optimizer=optimizer)) == expected


def test_momentum_that_throws_out_of_the_basin_is_told():
    layer = layer_of_orientation()
    loss = near(layer, "rmse")
    plain = step_limit(loss, layer)
    rate = 0.3 * plain.basin / plain.slopes[-1]
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
    found = step_limit(loss, layer, optimizer=optimizer)
    assert causes(found) == {
        "cone at the minimum": Severity.SEVERE,
        "momentum too large": Severity.SEVERE,
    }
    exec(found.findings[1].remedy, {"optimizer": optimizer})
    assert "momentum too large" not in causes(step_limit(loss, layer, optimizer=optimizer))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_loss_scaled_down_is_told_and_the_remedy_scales_it_up(kind):
    layer = layer_of_orientation()
    known = near(layer)
    factor = 1e-7 if kind is torch.optim.SGD else 1e-11
    loss = OutputLoss(known.inputs, known.targets, lambda a, b: factor * F.mse_loss(a, b))
    rate = 0.5 / step_limit(known, layer).sharpness if kind is torch.optim.SGD else 0.01
    optimizer = kind(layer.parameters(), lr=rate)
    found = step_limit(loss, layer, optimizer=optimizer)
    assert causes(found) == {"loss scale": Severity.SEVERE}
    names = {"optimizer": optimizer, "loss": loss.measure}
    exec(found.findings[0].remedy, names)
    mended = OutputLoss(known.inputs, known.targets, names["loss"])
    assert causes(step_limit(mended, layer, optimizer=optimizer)) == {}


# -- the caller's things, and bad input ---------------------------------------------------------


def test_only_what_the_optimiser_holds_is_looked_at():
    layer = GaborConv2d(1, 1, 15, bias=False, start=PLANTED, coordinates="textbook")
    loss = OutputLoss(white(40), layer(white(40)).detach())
    alone = step_limit(loss, layer, optimizer=torch.optim.SGD([layer.orientation], lr=1e-9))
    slope = gabor_jacobian(PLANTED, 15)["orientation"].float()[None, None]
    c = F.conv2d(white(40), slope).square().mean().sqrt().item()
    assert alone.sharpness == pytest.approx(2 * c**2, rel=1e-3)


def test_a_foreign_module_is_measured_too():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor(0.3))

    found = step_limit(lambda one: 3 * (one.theta - 1) ** 2, Plain())
    assert found.sharpness == pytest.approx(6.0, rel=1e-4)
    assert found.basin == math.inf
    assert step_limit(lambda one: (one.theta - 1).abs(), Plain()).is_cone


def test_bad_input_gets_one_clear_line():
    layer = layer_of_orientation()
    loss = near(layer)
    frozen = layer_of_orientation().requires_grad_(False)
    other = torch.optim.SGD(layer_of_orientation().parameters(), lr=0.1)
    for message, call in {
        "learns no parameter": lambda: step_limit(loss, frozen),
        "has no learned parameter of the layer": lambda: step_limit(loss, layer, optimizer=other),
        "has no gradient": lambda: step_limit(lambda one: loss(one).detach(), layer),
        "must return a scalar": lambda: step_limit(lambda one: one(loss.inputs), layer),
        "The loss is nan": lambda: step_limit(lambda one: loss(one) * math.nan, layer),
        "too coarse": lambda: step_limit(loss, layer_of_orientation().bfloat16()),
        "inputs are torch.float64": lambda: step_limit(
            OutputLoss(loss.inputs.double(), loss.targets), layer
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
