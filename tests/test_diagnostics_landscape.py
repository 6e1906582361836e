"""Landscapes equal the loss evaluated point by point, find every minimum, and change nothing."""

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium import Gabor1d, Gabor2d, GaborConv1d, GaborConv2d, gabor
from gaborium.diagnostics import Severity, TrainingSetup, identifiability, landscape, step_limit
from gaborium.diagnostics.landscape import _watershed
from trainings import PLANTED, camera, causes, layer_at, planted, rmse


def image_of(*shape: int, seed: int = 0) -> Tensor:
    """Noise with a mean and with neighbours that resemble each other, as in a photograph."""
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return 0.5 + 0.3 * F.avg_pool2d(noise, 3, 1)


class Kernels(nn.Module):
    """Returns kernels: their squared error is what responses to ever more white input give."""

    def __init__(self, layer: GaborConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.weight


def on_white_input(layer: GaborConv2d) -> TrainingSetup:
    return TrainingSetup(Kernels(layer), F.mse_loss, (), layer.weight.detach())


def directly(setup: TrainingSetup, field: str, grid: Tensor, index: int = 0) -> Tensor:
    """The same landscape by setting the layer's parameters one by one."""
    values, layer = [], setup.module
    before = layer.params.detach()
    warnings.simplefilter("ignore", UserWarning)  # of kernels that cut their envelopes
    for value in grid.tolist():
        changed = getattr(before, field).clone()
        changed[index] = value
        layer.params = before.replace(**{field: changed})
        values.append(setup.run(layer).loss.detach())
    layer.params = before
    return torch.stack(values)


# -- the short way is the long way --------------------------------------------------------------

SETTINGS = [
    {},
    {"padding": 4},
    {"padding": "same"},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": 3, "padding_mode": "circular", "stride": 2},
    {"stride": 3},
    {"bias": True},
    {"dc": "remove"},
    {"unit_norm": True},
    {"coordinates": "textbook"},
    {"min_wavelength": 2.5},
    {"geometry": "pair"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_quadratic_equals_direct_evaluation(settings):
    layer = layer_at("random", 2, 3, (9, 7), seed=1, **settings)
    teacher = layer_at("random", 2, 3, (9, 7), seed=2, **settings)
    if settings.get("geometry") == "pair":
        # The direct evaluation below sets all channels to one value.
        layer.params = layer.params.detach().replace(
            orientation=layer.params.orientation.detach()[:, :1].expand(3, 2)
        )
    given = planted(teacher, image_of(2, 2, 40, 34), rmse if settings.get("bias") else F.mse_loss)
    setup = TrainingSetup(layer, given.loss, given.inputs, given.targets)
    found = landscape(setup, "orientation", filter=1, n_points=24)
    assert found.exact
    expected = directly(setup, "orientation", found.grids[0], 1)
    torch.testing.assert_close(found.values, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("field", ["wavelength", "sigma", "aspect_ratio", "phase", "amplitude"])
def test_every_field_is_varied_in_its_own_unit(field):
    layer = layer_at()
    setup = planted(layer, image_of(1, 1, 40, 40))
    layer.params = PLANTED.replace(phase=torch.tensor(0.4))
    found = landscape(setup, field, n_points=17)
    expected = directly(setup, field, found.grids[0])
    torch.testing.assert_close(found.values, expected, rtol=1e-10, atol=1e-13)
    if field in ("wavelength", "sigma", "aspect_ratio"):
        steps = found.grids[0].log().diff()
        torch.testing.assert_close(steps, steps[:1].expand_as(steps))


def test_the_centre_moves_along_its_own_axis():
    moved = PLANTED.replace(center=torch.tensor([1.5, -0.5]))
    layer = layer_at(moved)
    setup = planted(layer, image_of(1, 1, 60, 60))
    layer.params = moved.replace(center=torch.tensor([0.0, -0.5]))
    assert landscape(setup, "center_x").best.position[0] == pytest.approx(1.5, abs=1e-3)
    layer.params = moved.replace(center=torch.tensor([1.5, 1.0]))
    assert landscape(setup, "center_y").best.position[0] == pytest.approx(-0.5, abs=1e-3)


def test_the_long_way_gives_the_same_landscape():
    short = planted(layer_at("random", 2, 2, 7, seed=2), image_of(1, 2, 20, 20))
    layer = layer_at("random", 2, 2, 7, seed=1)

    def twice(output: Tensor, target: Tensor) -> Tensor:  # is no squared error
        return 2 * F.mse_loss(output, target)

    found, other = (
        landscape(
            TrainingSetup(layer, loss, short.inputs, short.targets),
            ("orientation", "wavelength"),
            n_points=12,
            filter=1,
        )
        for loss in (F.mse_loss, twice)
    )
    assert (found.exact, other.exact) == (True, False)
    torch.testing.assert_close(2 * found.values, other.values, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found.basins, other.basins)
    assert found.values.shape == (12, 12)


def test_channels_keep_their_differences_when_a_field_moves_all_of_them():
    layer = layer_at("random", 3, 1, 7, seed=0)
    target = layer.params.detach()
    setup = planted(layer, image_of(1, 3, 30, 30))
    layer.params = target.replace(phase=target.phase - 0.7)
    found = landscape(setup, "phase")
    assert math.remainder(
        found.best.position[0] - target.phase[0, 0].item(), 2 * math.pi
    ) == pytest.approx(0, abs=1e-4)
    assert found.best.value == pytest.approx(0, abs=1e-8)
    layer.params = target.replace(amplitude=1.7 * target.amplitude)
    found = landscape(setup, "amplitude")
    assert found.best.position[0] == pytest.approx(target.amplitude[0, 0].item(), abs=1e-4)


def test_sounds_have_landscapes_too():
    layer = GaborConv1d(
        1, 1, 21, bias=False, dtype=torch.float64, start=Gabor1d.of(wavelength=6.0, sigma=3.0)
    )
    setup = planted(layer, torch.randn(1, 1, 4000, dtype=torch.float64))
    found = landscape(setup, "wavelength", n_points=50)
    assert found.exact
    expected = directly(setup, "wavelength", found.grids[0])
    torch.testing.assert_close(found.values, expected, rtol=1e-10, atol=1e-12)


# -- minima, basins, widths ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wavelength", "sigma", "aspect_ratio", "size"),
    [(5.0, 2.0, 1.0, 15), (3.565, 2.0, 1.0, 15), (3.565, 2.0, 0.5, 25), (5.0, 4.0, 0.5, 49)],
)
def test_the_convex_half_width_follows_the_closed_form(wavelength, sigma, aspect_ratio, size):
    params = Gabor2d.of(
        orientation=0.8, wavelength=wavelength, sigma=sigma, aspect_ratio=aspect_ratio
    )
    setup = on_white_input(layer_at(params, 1, 1, size))
    found = landscape(setup, "orientation")
    predicted = wavelength / (math.sqrt(2) * math.pi * sigma / aspect_ratio)
    assert found.predicted_half_width == pytest.approx(predicted)
    # The closed form is of first order in the angle; where γ < 1 the envelope turns as well.
    assert found.half_width == pytest.approx(predicted, rel=0.1)
    # It lies between the grid's points: a coarser grid says the same.
    coarse = landscape(setup, "orientation", n_points=180)
    assert coarse.half_width == pytest.approx(found.half_width, rel=0.01)


def test_the_half_width_of_a_root_is_that_of_its_square():
    inputs = image_of(1, 1, 60, 60)
    setups = [planted(layer_at(), inputs, loss) for loss in (F.mse_loss, rmse)]
    one, other = (landscape(setup, "orientation").half_width for setup in setups)
    assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize(("phase", "n_best"), [(0.0, 2), (1.0, 1), (math.pi / 2, 1)])
def test_an_even_kernel_has_two_equal_minima(phase, n_best):
    params = PLANTED.replace(phase=torch.tensor(phase))
    found = landscape(planted(layer_at(params), image_of(1, 1, 64, 64)), "orientation")
    assert found.n_best == n_best
    best = sorted(one.position[0] for one in found.minima[:n_best])
    assert best[-1] == pytest.approx(0.8, abs=1e-4)
    assert len(best) == 1 or best[0] == pytest.approx(0.8 - math.pi, abs=1e-4)
    assert found.best.position[0] == pytest.approx(0.8, abs=1e-4)  # the present one


def test_basins_on_a_known_curve():
    """cos(3x) + x/10 has three minima on the circle; their basins end at its maxima."""

    class Angle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

        def forward(self) -> Tensor:
            return self.theta

    def loss(theta: Tensor, _: None) -> Tensor:
        return (3 * theta).cos() + theta / 10

    span = {"theta": (-math.pi, math.pi)}
    found = landscape(TrainingSetup(Angle(), loss, (), None), "theta", span=span, n_points=601)
    third = 2 * math.pi / 3
    expected = [-third / 2, third / 2]  # and the ends of the span, where it falls from a maximum
    interior = sorted(one.position[0] for one in found.minima if abs(one.position[0]) < 3.1)
    tilt = math.asin(0.1 / 3) / 3  # 3 sin 3x = 1/10 at the minima
    assert interior == pytest.approx([place - tilt for place in expected], abs=1e-4) or (
        interior == pytest.approx([place + tilt for place in expected], abs=1e-4)
    )
    assert sum(one.share for one in found.minima) == pytest.approx(1.0)
    assert found.present == (0.3,)
    assert found.present_slope[0] == pytest.approx(-3 * math.sin(0.9) + 0.1, rel=1e-2)
    for one, number in zip(found.minima, range(len(found.minima)), strict=True):
        mine = found.grids[0][found.basins == number]
        assert mine.min() - 0.02 <= one.position[0] <= mine.max() + 0.02


def test_a_basin_reaches_over_the_end_of_the_circle():
    params = PLANTED.replace(orientation=torch.tensor(3.1), phase=torch.tensor(1.2))
    found = landscape(on_white_input(layer_at(params)), "orientation")
    assert found.basins[0] == found.basins[-1] == 0
    assert found.n_spurious == len(found.minima) - 1
    assert found.grids[0].min() >= -math.pi - 1e-9
    assert found.grids[0].max() < math.pi
    # The present value is one of the points.
    assert (found.grids[0] - found.present[0]).abs().min() < 1e-12


def test_rounding_makes_no_minima():
    """The plateau of a narrow kernel is flat to the last digit, which is not hollow."""
    params = Gabor2d.of(orientation=0.8, wavelength=3.0, sigma=8.0, phase=1.0)
    found = landscape(on_white_input(layer_at(params, 1, 1, 31)), "orientation", n_points=120)
    heights = found.values.max() - torch.tensor([one.value for one in found.minima])
    assert (heights > 1e-9 * found.values.max()).all()


def test_a_hollow_shallower_than_rounding_is_none():
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    values = (x**2)[:, None] + (x**2)[None, :]
    rough = values + 0.2 * torch.rand(values.shape, dtype=torch.float64)
    bottoms, basins = _watershed(rough, (False, False), 0.2)
    assert len(bottoms) == 1
    assert (basins == 0).all()
    assert len(_watershed(rough, (False, False), 0.0)[0]) > 1


@pytest.mark.parametrize("field", ["sigma", "orientation"])
def test_the_slope_is_per_unit_of_the_field(field):
    layer = layer_at()
    setup = planted(layer, image_of(1, 1, 40, 40))
    layer.params = PLANTED.replace(sigma=torch.tensor(3.0))
    found = landscape(setup, field, n_points=200)
    value, step = found.present[0], 1e-5
    low, high = directly(setup, field, torch.tensor([value - step, value + step]).double())
    slope = (high - low).item() / (2 * step)
    assert found.present_slope[0] == pytest.approx(slope, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize(
    ("padding", "aspect_ratio", "share"),
    [("valid", 1.0, 1.0), ("same", 1.0, 0.533), ("valid", 0.5, 0.239)],
)
def test_shares_of_starts_on_a_photograph(padding, aspect_ratio, share):
    truth = Gabor2d.of(
        orientation=math.pi / 4, wavelength=6.0, sigma=3.0, aspect_ratio=aspect_ratio
    )
    layer = layer_at(truth, 1, 1, 15, padding=padding)
    found = landscape(planted(layer, camera(), rmse), "orientation")
    assert found.share_to_best == pytest.approx(share, abs=0.01)
    if padding == "same":  # the border is an edge, with a minimum of its own
        worse = [math.degrees(one.position[0]) for one in found.minima[2:]]
        assert min(abs(place + 55) for place in worse) < 1


# -- what it says -------------------------------------------------------------------------------


NARROW = Gabor2d.of(orientation=0.8, wavelength=4.0, sigma=5.0)
ROUND = Gabor2d.of(orientation=0.8, wavelength=6.0, sigma=2.0)
BLOB = Gabor2d.of(wavelength=math.inf, sigma=2.0)
WRONG_BASIN = {"outside the basin": Severity.SEVERE, "spurious minima": Severity.WARNING}


@pytest.mark.parametrize(
    ("truth", "moved", "expected"),
    [
        (NARROW, {"orientation": -0.4}, {"flat plateau": Severity.SEVERE}),
        (ROUND, {"orientation": 0.8}, {}),
        (ROUND, {"orientation": 1.0}, {}),
        (BLOB, {"amplitude": 0.5}, {"flat plateau": Severity.SEVERE}),  # no value matters
    ],
    ids=["plateau", "at the minimum", "near it", "blob"],
)
def test_findings_on_white_input(truth, moved, expected):
    layer = layer_at(truth, 1, 1, 25)
    setup = on_white_input(layer)
    layer.params = truth.replace(**{name: torch.tensor(value) for name, value in moved.items()})
    found = landscape(setup, "orientation", n_points=90)
    assert expected.items() <= causes(found).items()
    assert bool(expected) == bool(found.findings)


@pytest.mark.parametrize(
    ("degrees", "loss", "expected"),
    [
        (math.degrees(0.8) - 90, rmse, {"antipodal start": Severity.SEVERE}),
        (-70, F.mse_loss, WRONG_BASIN),
    ],
)
def test_findings_on_a_padded_photograph(degrees, loss, expected):
    layer = layer_at(PLANTED, 1, 1, 15, padding="same")
    setup = planted(layer, camera(), loss)
    layer.params = PLANTED.replace(orientation=torch.tensor(math.radians(degrees)))
    found = landscape(setup, "orientation")
    assert expected.items() <= causes(found).items()
    assert found.findings[0].cause == next(iter(expected))
    if expected is WRONG_BASIN:
        assert found.present_minimum.value > found.best.value
    else:
        numbers = found.findings[0].numbers
        assert numbers["distance_rad"] == pytest.approx(math.pi / 2, abs=0.01)


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss])
def test_the_remedies_do_what_they_say(loss):
    """For the squared error by recover, for another loss by a position."""
    module = layer_at(PLANTED, 1, 1, 15, padding="same")
    setup = planted(module, camera(), loss)
    module.params = PLANTED.replace(orientation=torch.tensor(0.8 - math.pi / 2))
    found = landscape(setup, "orientation", n_points=90)
    exec(found.findings[0].remedy, dict(vars(setup)))
    error = module.params.orientation.item() - 0.8
    assert math.remainder(error, math.pi) == pytest.approx(0, abs=1e-3)
    assert ("recover" in found.findings[0].remedy) == (loss is F.mse_loss)


def test_the_remedy_reaches_a_layer_within_a_network():
    module = nn.Sequential(nn.Identity(), GaborConv2d(1, 2, 9, seed=0), nn.Tanh()).double()
    setup = planted(module, image_of(1, 1, 30, 30))
    params = module[1].params.detach()
    orientation = params.orientation.clone()
    orientation[1] += math.pi / 2
    module[1].params = params.replace(orientation=orientation)
    found = landscape(setup, "orientation", filter=1, n_points=60)
    assert not found.exact
    exec(found.findings[0].remedy, {"module": module})
    assert setup.run().loss < 1e-3 * found.present_value


# -- the caller's things ------------------------------------------------------------------------


EXAMINATIONS = {
    "landscape": lambda setup: landscape(setup, "orientation", n_points=12),
    "step limit": step_limit,
    "identifiability": lambda setup: identifiability(setup.module[0], setup.inputs),
}


@pytest.mark.parametrize("examine", EXAMINATIONS.values(), ids=EXAMINATIONS.keys())
def test_nothing_of_the_callers_changes(examine):
    layer = GaborConv2d(1, 2, 7, seed=0, learn="orientation", bias=False)
    module = nn.Sequential(layer, nn.BatchNorm2d(2), nn.Dropout(0.3))
    inputs, targets = image_of(2, 1, 20, 20).float(), torch.randn(2, 2, 12, 12)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)
    module(inputs).square().mean().backward()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    learned = [p for p in module.parameters() if p.requires_grad]
    gradients = [p.grad.clone() for p in learned]
    random = torch.get_rng_state()
    examine(TrainingSetup(module, F.mse_loss, inputs, targets, optimizer))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(part.training for part in module.modules())
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name])
    for p, gradient in zip(learned, gradients, strict=True):
        assert torch.equal(p.grad, gradient)


def test_foreign_parameters_go_by_their_names():
    class Textbook(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([0.2, -0.4]))
            self.lambd = nn.Parameter(torch.tensor(5.0))

        def forward(self, image: Tensor) -> Tensor:
            params = Gabor2d.of(
                orientation=self.theta, wavelength=self.lambd, sigma=2.0, dtype=torch.float32
            )
            return F.conv2d(image, gabor(params, 11).unsqueeze(1))

    module = Textbook()
    setup = planted(module, image_of(1, 1, 30, 30).float())
    with torch.no_grad():
        module.theta[1] = 0.9
    span = {"theta[1]": (-1.5, 1.5), "lambd": (3.0, 8.0)}
    found = landscape(setup, ("theta[1]", "lambd"), span=span, n_points=15)
    assert found.best.position == pytest.approx((-0.4, 5.0), abs=2e-2)
    assert found.present == pytest.approx((0.9, 5.0))
    assert found.predicted_half_width is None
    for field, message in {
        "theta": "'theta' is no field of a Gabor layer and no single number",
        "theta[2]": "no single number of the module's parameters",
        "sigma": "their shapes are {'theta': .2,., 'lambd': ..}",
        "lambd": "unknown range; give span=.'lambd': .low, high",
    }.items():
        with pytest.raises(ValueError, match=message):
            landscape(setup, field)
    with torch.no_grad():
        module.theta[1] = 2.0  # descends to the end of the span
    found = landscape(setup, "theta[1]", span={"theta[1]": (-1.5, 2.3)}, n_points=90)
    assert found.findings[0].cause == "outside the basin"
    exec(found.findings[0].remedy, {"module": module})
    assert module.theta[1].item() == pytest.approx(-0.4, abs=1e-3)


# -- bad input ----------------------------------------------------------------------------------


COUNT = itertools.count(1)
BAD_LOSSES = {
    "must return a scalar, got shape": lambda output, _: output,
    "not a finite number": lambda output, _: output.mean() > 0,
    "must return a scalar tensor, got float": lambda output, _: output.mean().item(),
    "The loss is nan": lambda output, _: output.mean() * math.nan,
    "must be the same": lambda output, _: output.mean() * 0 + next(COUNT),
}


@pytest.mark.parametrize("message", BAD_LOSSES)
def test_bad_losses_get_one_clear_line(message):
    setup = TrainingSetup(layer_at(), BAD_LOSSES[message], image_of(1, 1, 20, 20), None)
    with pytest.raises((ValueError, TypeError), match=message):
        landscape(setup, "orientation")


class Unsteady(nn.Module):
    """Draws random numbers and counts its calls, and the output depends on both."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return F.dropout(input * self.weight) + self.calls


def test_random_numbers_and_buffers_are_the_same_at_every_evaluation():
    module = Unsteady()
    setup = TrainingSetup(module, F.mse_loss, torch.ones(50), torch.ones(50))
    setup.check()
    assert setup.run_with({}).loss == setup.run().loss
    assert module.calls == 0
    doubled = setup.run_with({"weight": torch.tensor(2.0)}).output - setup.run().output
    assert doubled.unique().tolist() == [0.0, 2.0]


def test_bad_arguments_get_one_clear_line():
    layer, inputs = layer_at(), image_of(1, 1, 30, 30)
    setup = planted(layer, inputs)

    def changed(module, inputs=inputs) -> TrainingSetup:
        return TrainingSetup(module, F.mse_loss, inputs, setup.targets)

    for message, call in {
        "one or two different names": lambda: landscape(setup, ()),
        "out of bounds": lambda: landscape(setup, "phase", filter=1),
        "two rising numbers": lambda: landscape(setup, "phase", span={"phase": (1, 1)}),
        "two rising positive": lambda: landscape(setup, "sigma", span={"sigma": (-1, 1)}),
        "at least 8": lambda: landscape(setup, "phase", n_points=2),
        "must be an nn.Module": lambda: changed("layer"),
        "should be the same": lambda: landscape(changed(layer, inputs.float()), "phase"),
        "must be finite": lambda: landscape(changed(layer, inputs * math.nan), "phase"),
    }.items():
        with pytest.raises((ValueError, TypeError, RuntimeError, IndexError), match=message):
            call()
