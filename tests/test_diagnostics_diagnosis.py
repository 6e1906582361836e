"""From a set-up to what is wrong with it: order, remedies, trials, and nothing of the caller's."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium import Gabor2d, GaborConv2d
from gaborium.diagnostics import Finding, Severity, TrainingSetup, diagnose
from trainings import camera, rmse

PLANTED = Gabor2d.of(orientation=math.pi / 4, wavelength=6.0, sigma=2.5, aspect_ratio=0.6)


def image(seed=0, size=48):
    return torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(seed))


def student(off=-0.2, *, loss=F.mse_loss, rate=0.002, learn="orientation", **start):
    with torch.no_grad():
        targets = GaborConv2d(1, 1, 13, bias=False, start=PLANTED)(image())
    first = {"orientation": PLANTED.orientation.item() + off} | start
    layer = GaborConv2d(
        1,
        1,
        13,
        bias=False,
        learn=learn,
        coordinates="textbook",
        start=PLANTED.replace(**{name: torch.tensor(v) for name, v in first.items()}),
    )
    return TrainingSetup(
        layer, loss, image(), targets, torch.optim.SGD(layer.parameters(), lr=rate)
    )


def diagnosis(setup, **options):
    data = (setup.inputs, setup.targets)
    return diagnose(setup.module, setup.loss, data, optimizer=setup.optimizer, **options)


# -- set-ups ------------------------------------------------------------------------------------


def test_a_copy_learns_by_itself():
    setup = student()
    before = copy.deepcopy(setup.module.state_dict())
    own = setup.copy()
    losses = own.train(40)
    assert len(losses) == 41
    assert losses[-1] < 1e-2 * losses[0]
    assert own.explained() > 0.99
    assert own.optimizer is not setup.optimizer
    for name, value in setup.module.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in setup.module.parameters())


def test_a_remedy_is_run_on_a_copy():
    setup = student()
    mended = setup.with_remedy(
        "inputs = 2 * inputs\nfor group in optimizer.param_groups:\n    group['lr'] = 7.0\n"
    )
    assert torch.equal(mended.inputs, 2 * setup.inputs)
    assert mended.optimizer.param_groups[0]["lr"] == 7.0
    assert setup.optimizer.param_groups[0]["lr"] == 0.002
    assert mended.module is not setup.module


def test_training_stops_at_what_is_no_number_and_takes_every_optimiser():
    setup = student()
    broken = TrainingSetup(
        setup.module, lambda o, t: (o - t).mean() * math.nan, setup.inputs, setup.targets
    )
    assert len(broken.copy().train(50)) == 1
    layer = copy.deepcopy(setup.module)
    bold = torch.optim.LBFGS(layer.parameters(), lr=0.5)
    losses = TrainingSetup(layer, F.mse_loss, setup.inputs, setup.targets, bold).train(10)
    assert losses[-1] < 1e-4 * losses[0]
    without = TrainingSetup(copy.deepcopy(setup.module), F.mse_loss, setup.inputs, setup.targets)
    before = without.module.params.orientation.item()
    slope = torch.autograd.grad(
        without.run(without.module).loss, [without.module.get_parameter("orientation")]
    )
    without.train(1)
    step = without.module.params.orientation.item() - before
    assert step == pytest.approx(-0.01 * slope[0].item())


def test_explained_is_blind_to_scale_and_needs_responses():
    setup = student()
    louder = TrainingSetup(setup.module, setup.loss, 5 * setup.inputs, 5 * setup.targets)
    assert louder.explained() == pytest.approx(setup.explained(), abs=1e-6)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    labels = torch.tensor([0, 2])
    assert math.isnan(TrainingSetup(network, F.cross_entropy, torch.rand(2, 4), labels).explained())


# -- what is found ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def antipodal():
    return diagnosis(student(off=math.pi / 2))


def test_a_sound_setup_has_no_severe_finding():
    stages = []
    result = diagnosis(student(), on_progress=stages.append)
    assert stages[0] == "gradients"
    assert "trials" in stages
    assert not result.severe
    assert result.explained[1] > 0.99
    assert {"gradients", "identifiability", "step limit", "recover"} <= set(result.parts)


def test_the_cause_stands_before_its_consequences():
    result = diagnosis(student(off=math.pi / 2, loss=rmse, rate=0.5), n_steps=20)
    assert result.findings[0].severity is Severity.SEVERE
    ranks = [found.severity.rank for found in result.findings]
    assert ranks == sorted(ranks)
    assert {"cone at the minimum", "antipodal start"} & {f.cause for f in result.severe}


class Textbook(nn.Module):
    """The formula as a user writes it, with one parameter and zero padding."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self, image: Tensor) -> Tensor:
        y, x = torch.meshgrid(torch.arange(-5.0, 6), torch.arange(-5.0, 6), indexing="ij")
        along = x * self.theta.cos() + y * self.theta.sin()
        across = y * self.theta.cos() - x * self.theta.sin()
        kernel = (-(along**2 + across**2) / 12).exp() * (along * math.tau / 5).cos()
        return F.conv2d(image, kernel[None, None], padding="same")


@pytest.mark.parametrize(("rate", "momentum"), [(0.1, 0.9), (0.01, 0.0)])
def test_the_start_of_a_module_of_ones_own_is_named_and_mended_for_good(rate, momentum):
    image = camera()[..., 30:78, 20:68].float()
    module = Textbook(-math.pi / 4)
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=momentum)
    data = (image, Textbook(math.pi / 4)(image).detach())
    result = diagnose(module, rmse, data, optimizer=optimizer, n_steps=200)
    assert result.headline.startswith("It does not learn here: after 200 steps the output")
    assert result.findings[0].cause in ("antipodal start", "cone at the minimum")
    mended = result.with_remedy()
    for _ in range(4):  # it also holds later than the trial
        mended.train(100)
        assert mended.explained() > 0.99
    assert abs(math.remainder(mended.module.theta.item() - math.pi / 4, math.pi)) < 0.02


def test_a_run_that_fails_has_no_reassuring_headline():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9))
    data = (torch.randn(20, 1, 3, 3), torch.randn(20, 9))  # nothing to be learned in so few steps
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    result = diagnose(network, F.mse_loss, data, optimizer=optimizer, n_steps=16)
    assert not result.learns
    assert result.headline.startswith("It does not learn here")
    assert str(result).startswith(result.headline)


def test_trials_of_the_remedy_are_told(antipodal):
    first = antipodal.findings[0]
    assert first.cause == "antipodal start"
    assert first.numbers["explained_with_remedy"] > 0.99 > first.numbers["explained_without_remedy"]
    mended = antipodal.with_remedy()
    assert mended.explained() > 0.99
    assert antipodal.with_remedy(first).explained() == pytest.approx(mended.explained())
    with pytest.raises(ValueError, match="no finding with a remedy"):
        antipodal.with_remedy(Finding("frozen", Severity.NOTE, "It is."))


def test_faults_that_hide_each_other_are_mended_together():
    setup = student(off=math.pi / 2, loss=rmse, rate=1.0)
    setup.optimizer.param_groups[0]["momentum"] = 0.9
    result = diagnosis(setup)
    alone = [f.numbers["explained_with_remedy"] for f in result.severe if f.remedy]
    assert max(alone) < 0.99
    assert len(result.combined_remedies) >= 2
    assert all(found in result.findings for found in result.combined_remedies)
    mended = result.with_remedy()
    mended.train(100)
    assert mended.explained() > 0.99
    assert json.loads(result.to_json())["combined_remedies"] == [
        found.cause for found in result.combined_remedies
    ]


def test_a_loss_is_known_by_its_values():
    for loss, power in ((lambda o, t: ((o - t) ** 2).mean(), 2), (rmse, 1), (F.l1_loss, 0)):
        assert student(loss=loss).power() == power


@pytest.mark.parametrize("sign", [1, -1])
def test_kernels_beside_the_middle_are_seen(sign):
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor(0.6))

        def forward(self, x):
            u = torch.arange(13) - 6 + 0.5 * sign
            across, down = torch.meshgrid(u, u, indexing="xy")
            along = across * self.theta.cos() + down * self.theta.sin()
            wave = torch.exp(-(across**2 + down**2) / 9) * torch.cos(along)
            return F.conv2d(x, wave[None, None])

    setup = student()
    layer = Beside()
    result = diagnose(layer, F.mse_loss, (setup.inputs, setup.targets))
    found = next(found for found in result.findings if found.cause == "off-centre grid")
    assert found.numbers["largest_shift_px"] == pytest.approx(0.5, abs=0.01)
    assert f"({-0.5 * sign:+.2f}, {-0.5 * sign:+.2f}) px" in found.sentence
    assert result.with_remedy(found).module.params.center.abs().max() == 0


def test_a_loss_without_gradient_is_found():
    setup = student()
    cut = TrainingSetup(
        setup.module, lambda o, t: F.mse_loss(o.detach(), t), setup.inputs, setup.targets,
        setup.optimizer,
    )  # fmt: skip
    assert diagnosis(cut).findings[0].cause == "no gradient"


def test_networks_and_what_cannot_be_asked_of_them():
    torch.manual_seed(0)
    network = nn.Sequential(
        GaborConv2d(1, 4, 7, seed=0), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 2)
    )
    with torch.no_grad():
        first = network[0]
        params = first.params
        first.params = params.replace(amplitude=1e3 * params.amplitude)
    labels = torch.randint(2, (6,))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    result = diagnose(
        network,
        F.cross_entropy,
        (torch.randn(6, 1, 16, 16), labels),
        optimizer=optimizer,
        n_steps=5,
    )
    assert "health of 0" in result.parts
    assert "amplitude absorbed" in {found.cause for found in result.findings}
    assert math.isnan(result.explained[0])


def test_dropout_draws_none_of_the_callers_random_numbers():
    torch.manual_seed(0)
    network = nn.Sequential(GaborConv2d(1, 2, 5, padding=2, seed=0), nn.Dropout(0.5))
    inputs = torch.randn(2, 1, 12, 12)
    targets = torch.randn(2, 2, 12, 12)
    setup = TrainingSetup(network, F.mse_loss, inputs, targets)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    result = diagnose(network, F.mse_loss, (inputs, targets), n_steps=3)
    assert setup.explained() == setup.explained()
    assert torch.equal(torch.rand(3), expected)
    # The amplitude counts, though no two draws of dropout are alike.
    assert "amplitude absorbed" not in {found.cause for found in result.findings}


def test_nothing_of_the_callers_changes():
    setup = student(off=1.0)
    setup.optimizer.zero_grad()
    setup.run(setup.module).loss.backward()
    gradient = {n: p.grad.clone() for n, p in setup.module.named_parameters()}
    state = copy.deepcopy(setup.module.state_dict())
    options = copy.deepcopy(setup.optimizer.state_dict())
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    diagnosis(setup, n_steps=5)
    assert torch.equal(torch.rand(3), expected)
    assert setup.module.training
    assert setup.optimizer.state_dict() == options
    for name, parameter in setup.module.named_parameters():
        assert torch.equal(parameter.grad, gradient[name])
    for name, value in setup.module.state_dict().items():
        assert torch.equal(value, state[name])


def test_it_can_be_read_and_written(antipodal):
    document = json.loads(antipodal.to_json())
    assert document["findings"][0]["severity"] == "SEVERE"
    assert str(antipodal).startswith(f"{antipodal.headline}\n1. SEVERE antipodal start: ")
    assert "recover(" in str(antipodal)


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"module": "layer"}, TypeError, "module must be an nn.Module, got str"),
        ({"data": [1, 2]}, TypeError, "data must be a tuple of inputs and targets"),
        ({"n_steps": 0}, ValueError, "n_steps must be at least 1, got 0"),
        ({"loss": lambda o, t: (o - t).square()}, ValueError, "must return a scalar"),
        ({"loss": lambda o, t: 0.5}, TypeError, "must return a scalar tensor, got float"),
    ],
)
def test_bad_input_gets_one_line(change, error, says):
    setup = student()
    options = {
        "module": setup.module,
        "loss": setup.loss,
        "data": (setup.inputs, setup.targets),
    } | change
    with pytest.raises(error, match=says) as caught:
        diagnose(options.pop("module"), options.pop("loss"), options.pop("data"), **options)
    assert "\n" not in str(caught.value)


def test_a_loss_that_differs_from_call_to_call_is_refused():
    setup = student()
    state = iter(range(10_000))
    with pytest.raises(ValueError, match="must be the same for the same parameters"):
        diagnose(
            setup.module,
            lambda o, t: F.mse_loss(o, t) + next(state),
            (setup.inputs, setup.targets),
        )


def test_a_loss_that_is_no_number_is_found():
    setup = student()
    setup = TrainingSetup(
        setup.module, lambda o, t: (o - t).mean() / 0.0, setup.inputs, setup.targets,
        setup.optimizer,
    )  # fmt: skip
    assert diagnosis(setup, n_steps=3).findings[0].cause == "nan gradient"


# -- the fault bench ----------------------------------------------------------------------------

BENCH = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    pytest.importorskip("skimage", reason="the fault bench needs the photographs of scikit-image")
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("faults", BENCH / "faults.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["faults"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("faults", None)


# One of each kind; benchmarks/faults.py has all of them, on three photographs.
FAULTS = (
    "kernel written through .data",
    "degrees for radians",
    "stale cache",
    "off-centre grid",
    "gradient written by hand, wrong",
    "wavelength below Nyquist",
    "root of the squared error, fixed step",
    "step too large",
    "too much momentum",
    "antipodal start",
    "zero padding of a bright image",
    "images from 0 to 255",
    "a field left out of learn",
    "wrong sign of the phase",
    "loss scaled by 1e-6",
    "float16 overflow",
    "amplitude behind batch norm",
)
SOUND = (
    "momentum",
    "root of the error, Adam with a small step",
    "a hand-written layer",
    "noise on the targets",
    "three dimensions",
    "quadrature output",
)


def learns(bench, setup):
    """Whether training arrives within 400 steps, and has not left again 25 steps later."""
    for _ in range(8):
        setup.train(50)
        if bench.arrived(setup):
            setup.train(25)
            return bench.arrived(setup)
    return False


@pytest.fixture
def base(bench):
    """The first photograph of the bench at half of its size, with a smaller kernel."""
    return replace(bench.BASES[0], size=48, kernel_size=13, wavelength=5.0, sigma=2.5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_first_and_mended(bench, base, name):
    case = bench.faulty(base)[name]()
    result = diagnosis(case.setup, n_steps=50)
    assert result.findings[0].cause in case.causes, [found.cause for found in result.findings]
    assert learns(bench, result.with_remedy(result.findings[0]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_setup_of_the_bench_has_no_severe_finding(bench, base, name):
    setup = bench.sound(base)[name]().setup
    assert [found.cause for found in diagnosis(setup, n_steps=50).severe] == []
    assert learns(bench, setup)
