"""Questions about watch: its records are right, and it sees what goes wrong."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from gaborium import Gabor2d, GaborConv1d, GaborConv2d, GaborConv3d
from gaborium.diagnostics import Severity, health, watch

LAYERS = {1: GaborConv1d, 2: GaborConv2d, 3: GaborConv3d}


def textbook(n: int = 2, **fields) -> GaborConv2d:
    values = {
        "orientation": torch.linspace(0.3, 2.0, n),
        "wavelength": torch.full((n,), 5.0),
        "sigma": 2.0,
    } | fields
    return GaborConv2d(1, n, 11, bias=False, coordinates="textbook", start=Gabor2d.of(**values))


def train(layer, n_steps, *, recorder, optimizer=None, loss=None):
    """A loop with a loss that has the layer's kernels alone in it."""
    optimizer = optimizer or torch.optim.SGD(layer.parameters(), lr=0.01)
    target = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1))
    for _ in range(n_steps):
        optimizer.zero_grad()
        value = loss(layer) if loss else (layer.weight - target).square().mean()
        value.backward()
        optimizer.step()
        recorder.record(value)
    return recorder


def causes(recorder) -> list[str]:
    return [finding.cause for finding in recorder.findings]


def bowl(field: str, curvature: float):
    """A loss that is a parabola in one raw parameter, with its minimum at 0."""
    return lambda layer: 0.5 * curvature * getattr(layer, field).square().sum()


class Played:
    """A layer whose parameters are set from outside, as if a training had done it."""

    def __init__(self, layer: GaborConv2d, every: int = 1) -> None:
        self.layer = layer
        self.recorder = watch(layer, every)

    def step(self, loss: float, **fields) -> None:
        for parameter in self.layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        with torch.no_grad():
            for name, value in fields.items():
                getattr(self.layer, name).copy_(torch.as_tensor(value))
        self.recorder.record(loss)


# -- what is written down -------------------------------------------------------------------------


@pytest.mark.parametrize("coordinates", ["textbook", "wavevector"])
@pytest.mark.parametrize("n_dims", LAYERS)
def test_rows_hold_each_step_and_the_parameters_before_it(n_dims, coordinates):
    layer = LAYERS[n_dims](2, 3, 5, start="random", seed=0, coordinates=coordinates)
    recorder = watch(layer, every=3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    before, losses, norms = [], [], []
    for _ in range(8):
        before.append(layer.params.detach())
        optimizer.zero_grad()
        loss = (layer.weight - 0.1).square().mean()
        loss.backward()
        losses.append(loss.item())
        norms.append({n: p.grad.norm().item() for n, p in layer.named_parameters() if n != "bias"})
        optimizer.step()
        recorder.record(loss)
    assert recorder.steps == [0, 3, 6]
    assert recorder.loss == [losses[i] for i in (0, 3, 6)]
    for name, value in recorder.params.as_dict().items():
        for row, step in enumerate((0, 3, 6)):
            assert torch.equal(value[row], before[step].as_dict()[name])
    for name, values in recorder.gradient_norm.items():
        assert values == pytest.approx([norms[i][name] for i in (0, 3, 6)], rel=1e-5)
    moved = before[6].to(torch.float64).difference(before[0].to(torch.float64))
    for name, value in recorder.displacement.items():
        torch.testing.assert_close(value[2], moved[name])


def test_the_layer_is_only_looked_at():
    layer = textbook()
    alone = copy.deepcopy(layer)
    train(layer, 6, recorder=watch(layer, every=1))

    class Nobody:
        def record(self, loss):
            pass

    train(alone, 6, recorder=Nobody())
    for name, value in alone.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)
    assert not layer._forward_hooks
    assert not layer._backward_hooks


# -- what goes wrong ------------------------------------------------------------------------------


def test_a_training_that_goes_well_has_no_findings():
    layer = textbook()
    assert causes(train(layer, 150, recorder=watch(layer))) == []


def test_steps_that_overshoot_are_an_oscillation():
    # A step of 1.9 over the curvature: to and fro, and 10 % nearer each time.
    layer = textbook()
    recorder = watch(layer, every=1)
    optimizer = torch.optim.SGD([layer.orientation], lr=1.98)
    layer.orientation.data.fill_(0.4)
    train(layer, 30, recorder=recorder, optimizer=optimizer, loss=bowl("orientation", 1.0))
    found = recorder.findings[0]
    assert found.cause == "oscillation"
    assert found.location == ("0", "1")
    assert list(found.numbers) == ["amplitude[orientation]"]
    rate = optimizer.param_groups[0]["lr"]
    exec(found.remedy, {"optimizer": optimizer})
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate / 10)
    again = train(
        layer, 30, recorder=watch(layer, every=1), optimizer=optimizer,
        loss=bowl("orientation", 1.0),
    )  # fmt: skip
    assert "oscillation" not in causes(again)


def test_an_oscillation_shows_at_the_interval_by_default():
    layer = textbook()
    layer.orientation.data.fill_(0.4)
    optimizer = torch.optim.SGD([layer.orientation], lr=1.999)
    recorder = watch(layer)
    train(layer, 200, recorder=recorder, optimizer=optimizer, loss=bowl("orientation", 1.0))
    assert causes(recorder)[0] == "oscillation"


@pytest.mark.parametrize("size", [0.02, 0.2])
def test_noise_around_a_minimum_is_no_oscillation(size):
    generator = torch.Generator().manual_seed(0)
    played = Played(textbook())
    for _ in range(100):
        played.step(1.0, orientation=1 + size * torch.randn(2, 1, generator=generator))
    assert "oscillation" not in causes(played.recorder)


def test_a_zigzag_that_gets_somewhere_is_no_oscillation():
    played = Played(textbook())
    for i in range(24):
        played.step(1.0, orientation=torch.full((2, 1), 0.04 * i + 0.06 * (-1) ** i))
    assert "oscillation" not in causes(played.recorder)


def test_being_thrown_out_of_a_basin_is_an_ejection():
    played = Played(textbook())
    course = [1.0, 0.6, 0.2, 0.1, 0.9, 0.8, 0.5, 0.1, 0.1, 0.95, 0.3, 0.1, 0.1]
    for i, loss in enumerate(course):
        played.step(loss, orientation=torch.full((2, 1), 0.3 + 0.1 * i))
    found = played.recorder.findings[0]
    assert (found.cause, found.severity) == ("ejection", Severity.SEVERE)
    assert found.numbers["ejections"] == 2
    assert "2 times" in found.sentence
    calm = Played(textbook())
    for i, loss in enumerate(sorted(course, reverse=True)):
        calm.step(loss, orientation=torch.full((2, 1), 0.3 + 0.1 * i))
    assert "ejection" not in causes(calm.recorder)


@pytest.mark.parametrize("last", [30.0, math.nan, math.inf])
def test_a_loss_that_grows_is_a_divergence(last):
    played = Played(textbook())
    for i in range(12):
        loss = 1.0 + i * (last - 1.0) / 11 if math.isfinite(last) else (1.0 if i < 11 else last)
        played.step(loss, orientation=torch.full((2, 1), 0.3 + 0.1 * i))
    found = played.recorder.findings[0]
    assert (found.cause, found.severity) == ("divergence", Severity.SEVERE)


def test_filters_that_stay_are_told():
    layer = textbook()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-9)
    recorder = train(layer, 20, recorder=watch(layer, every=1), optimizer=optimizer)
    assert causes(recorder) == ["filters did not move"]


def test_missing_and_zero_gradients_are_told():
    layer = textbook()
    recorder = watch(layer, every=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(10):
        loss = layer.weight.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recorder.record(loss)
    assert causes(recorder)[0] == "no gradient"
    assert "before record(loss)" in recorder.findings[0].sentence
    silent = textbook(amplitude=0.0)  # where nothing is heard, the geometry has no slope
    train(silent, 10, recorder=(recorder := watch(silent, every=1)))
    assert causes(recorder) == []  # the amplitude moves at once, and then all the others
    flat = textbook()
    loss = bowl("orientation", 1.0)
    train(flat, 10, recorder=(recorder := watch(flat, every=1)),
          loss=lambda layer: loss(layer) + 0 * layer.weight.sum())  # fmt: skip
    found = next(one for one in recorder.findings if one.cause == "frozen")
    assert set(found.location) == {
        "log_wavelength", "log_sigma", "log_aspect_ratio", "phase", "amplitude",
    }  # fmt: skip


def test_filters_that_become_alike_are_told():
    played = Played(textbook())
    for i in range(10):
        angles = torch.tensor([[0.3], [2.0 - 1.7 * i / 9]])
        played.step(1.0 - 0.05 * i, orientation=angles)
    played.step(0.5)  # the row before it holds where the step before has led
    found = next(one for one in played.recorder.findings if one.cause == "duplicate filters")
    assert found.numbers == {"first_pairs": 0.0, "last_pairs": 1.0}
    scope = {"module": played.layer, "optimizer": None}
    exec(found.remedy, scope)
    assert health(played.layer).duplicates == ()


# -- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="watch needs a Gabor layer, got Conv2d"):
        watch(nn.Conv2d(1, 1, 3))
    for every in (0, 1.5):
        with pytest.raises(ValueError, match="positive whole number"):
            watch(textbook(), every)
    recorder = watch(textbook())
    with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \(3,\)"):
        recorder.record(Tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="There is no record yet"):
        _ = recorder.params
