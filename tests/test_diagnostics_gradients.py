"""Questions about check_gradients: every planted fault found, sound modules left in peace."""

import copy
import functools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium import GaborConv1d, GaborConv2d, GaborConv3d
from gaborium.diagnostics import Severity, TrainingSetup, check_gradients, replace_by_gabor
from trainings import finding, mended

LAYERS = {1: GaborConv1d, 2: GaborConv2d, 3: GaborConv3d}


def energy(output: Tensor) -> Tensor:
    return output.square().mean()


def image(*shape: int) -> Tensor:
    return torch.rand(*(shape or (2, 1, 12, 12)), generator=torch.Generator().manual_seed(3))


def check(module: nn.Module, inputs=None, loss=energy, optimizer=None):
    """The check of a module, with a loss of the output alone."""
    inputs = image() if inputs is None else inputs
    return check_gradients(TrainingSetup(module, lambda out, _: loss(out), inputs, None, optimizer))


def causes(checked, severity: Severity | None = None) -> list[str]:
    return [f.cause for f in checked.findings if severity in (None, f.severity)]


def states(checked) -> dict[str, str]:
    return {parameter.name: parameter.state for parameter in checked.parameters}


def synthesise(theta: Tensor, wavelength: Tensor, sigma: float = 2.0, size: int = 7) -> Tensor:
    """Gabor kernels (filters, 1, size, size), as anybody would write them."""
    half = (size - 1) / 2
    axis = torch.arange(size, dtype=theta.dtype) - half
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    theta, wavelength = theta[:, None, None], wavelength[:, None, None]
    along = x * theta.cos() + y * theta.sin()
    envelope = (-(x.square() + y.square()) / (2 * sigma**2)).exp()
    return (envelope * (2 * math.pi * along / wavelength + 0.3).cos()).unsqueeze(1)


class Sound(nn.Module):
    """A Gabor layer as it should be; the faulty ones change one thing each."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.2, 1.1, 2.3]))
        self.wavelength = nn.Parameter(torch.tensor([4.0, 5.0, 6.0]))
        self.prepare()

    def prepare(self) -> None:
        pass

    def kernel(self) -> Tensor:
        return synthesise(self.theta, self.wavelength)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel())


class ThroughData(Sound):
    def prepare(self) -> None:
        self.conv = nn.Conv2d(1, 3, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.conv.weight.data = self.kernel()
        return self.conv(x)


class CopiedIntoData(ThroughData):
    def forward(self, x: Tensor) -> Tensor:
        self.conv.weight.data.copy_(self.kernel())
        return self.conv(x)


class Rewrapped(ThroughData):
    def forward(self, x: Tensor) -> Tensor:
        self.conv.weight = nn.Parameter(self.kernel())
        return self.conv(x)


class WithoutGrad(Sound):
    def kernel(self) -> Tensor:
        with torch.no_grad():
            return super().kernel()


class Detached(Sound):
    def kernel(self) -> Tensor:
        return super().kernel().detach()


class ThroughNumbers(Sound):
    def kernel(self) -> Tensor:
        return synthesise(torch.tensor(self.theta.tolist()), torch.tensor(self.wavelength.tolist()))


class BuiltOnce(Sound):
    def prepare(self) -> None:
        self.register_buffer("bank", super().kernel().detach())

    def kernel(self) -> Tensor:
        return self.bank


class BuiltOnceWithGraph(Sound):
    """The kernel keeps its graph, so that the module cannot even be deep-copied."""

    def prepare(self) -> None:
        self.bank = super().kernel()

    def kernel(self) -> Tensor:
        return self.bank


class KeptInEval(Sound):
    kept: Tensor | None = None

    def kernel(self) -> Tensor:
        if self.training:
            self.kept = None
            return super().kernel()
        if self.kept is None:
            self.kept = super().kernel().detach()
        return self.kept


class KeptFromFirstCall(Sound):
    kept: Tensor | None = None

    def kernel(self) -> Tensor:
        if self.kept is None:
            self.kept = super().kernel()
        return self.kept


class _WrongSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, angle):
        ctx.save_for_backward(angle)
        return angle.cos()

    @staticmethod
    def backward(ctx, gradient):
        (angle,) = ctx.saved_tensors
        return gradient * angle.sin()  # the sign is lost


class WrongSlope(Sound):
    def kernel(self) -> Tensor:
        weight = super().kernel()
        return weight * _WrongSlope.apply(self.theta)[:, None, None, None]


class StraightThrough(Sound):
    def kernel(self) -> Tensor:
        step = math.pi / 8
        rounded = (self.theta / step).round() * step
        return synthesise(self.theta + (rounded - self.theta).detach(), self.wavelength)


class Rounded(Sound):
    """A slope that the code gives as zero, though the loss has one."""

    def kernel(self) -> Tensor:
        class Zero(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                return torch.zeros_like(gradient)

        return synthesise(Zero.apply(self.theta), self.wavelength)


class WrittenBack(Sound):
    """Every forward pass undoes the last step."""

    def prepare(self) -> None:
        self.kept = self.theta.detach().clone()

    def kernel(self) -> Tensor:
        self.theta.data.copy_(self.kept)
        return super().kernel()


class InDegrees(Sound):
    def prepare(self) -> None:
        self.theta.data = torch.tensor([45.0, 90.0, 135.0])


class TakesDegrees(Sound):
    def kernel(self) -> Tensor:
        return synthesise(self.theta.deg2rad(), self.wavelength)


# -- no gradient ----------------------------------------------------------------------------------

NO_GRADIENT = {
    ThroughData: "written through `.data`",
    CopiedIntoData: "written through `.data`",
    Rewrapped: "wrapped into a new nn.Parameter",
    WithoutGrad: "`torch.no_grad()`",
    Detached: "`.detach()`",
    ThroughNumbers: "`.tolist()`",
    BuiltOnce: "the kernel is computed once",
    BuiltOnceWithGraph: "the kernel is computed once",
    Rounded: "a derivative of zero",
}


@functools.cache
def lost(faulty):
    """A module that loses a gradient, and its check."""
    module = nn.Sequential(faulty(), nn.ReLU())
    return module, check(module)


@pytest.mark.parametrize("faulty", NO_GRADIENT, ids=lambda kind: kind.__name__)
def test_a_lost_gradient_is_found_and_its_cause_named(faulty):
    _, checked = lost(faulty)
    worst = checked.findings[0]
    assert (worst.cause, worst.severity) == ("no gradient", Severity.SEVERE)
    assert "0.theta" in worst.location
    assert NO_GRADIENT[faulty] in worst.sentence
    assert states(checked)["0.theta"] == "no gradient"
    assert causes(checked, Severity.SEVERE) == ["no gradient"]


def test_the_line_where_the_gradient_is_lost_is_shown():
    sentence = finding(lost(CopiedIntoData)[1], "no gradient").sentence
    assert "self.conv.weight.data.copy_(self.kernel())" in sentence
    assert "test_diagnostics_gradients.py, line" in sentence
    assert "conv.weight gets the gradient instead" in sentence


def test_the_published_package_that_does_not_learn():
    with pytest.MonkeyPatch.context() as patch:
        # Its pixel grid is made in a way that newer releases of torch warn about.
        meshgrid = torch.meshgrid
        patch.setattr(torch, "meshgrid", lambda axes: meshgrid(*axes, indexing="ij"))
        package = pytest.importorskip(
            "GaborNet", reason="needs GaborNet==0.2.0, which tools/bootstrap.py installs"
        )
        theirs = nn.Sequential(package.GaborConv2d(1, 3, 7), nn.ReLU())
    checked = check(theirs)
    worst = checked.findings[0]
    assert worst.cause == "no gradient"
    assert {"0.freq", "0.theta", "0.sigma", "0.psi"} <= set(worst.location)
    assert "self.conv_layer.weight.data[i, j] = g" in worst.sentence
    assert "0.conv_layer.weight" in worst.sentence
    assert "0.theta" in finding(checked, "stale cache").location
    assert "0.weight" in finding(checked, "unused parameter").location


def test_a_loss_that_is_cut_off_is_not_blamed_on_the_module():
    for cut in (
        lambda out: energy(out.detach()),
        lambda out: (out.detach() > 0).float().mean(),
        lambda out: torch.tensor(out.square().mean().item()),
    ):
        worst = check(Sound(), loss=cut).findings[0]
        assert worst.cause == "no gradient"
        assert "cut off from the output" in worst.sentence
        assert set(worst.location) == {"theta", "wavelength"}
    assert ".detach()" in check(Sound(), loss=lambda out: energy(out.detach())).findings[0].sentence


@pytest.mark.parametrize(
    "faulty", [k for k in NO_GRADIENT if k is not ThroughNumbers], ids=lambda kind: kind.__name__
)
def test_the_remedy_gives_a_layer_that_does_the_same_and_learns(faulty):
    (module, checked), inputs = lost(faulty), image()
    before = module(inputs)
    new = mended(module, checked.findings[0].remedy, inputs)
    assert isinstance(new[0], GaborConv2d)
    # A fit of noiseless kernels is exact to the rounding of float32.
    torch.testing.assert_close(new(inputs), before, atol=1e-3, rtol=1e-3)
    assert causes(check(new, inputs), Severity.SEVERE) == []


# -- caches ---------------------------------------------------------------------------------------


def test_a_kernel_kept_in_evaluation_is_found():
    checked = check(KeptInEval())
    assert causes(checked) == ["stale cache"]
    assert set(checked.findings[0].location) == {"theta", "wavelength"}
    assert "eval()" in checked.findings[0].sentence


def test_a_kernel_kept_from_the_first_call_is_found():
    checked = check(KeptFromFirstCall())
    assert causes(checked, Severity.SEVERE) == ["stale cache"]
    assert not any(parameter.output_follows for parameter in checked.parameters)


# -- wrong and missing numbers --------------------------------------------------------------------


@pytest.mark.parametrize("faulty", [WrongSlope, StraightThrough], ids=lambda kind: kind.__name__)
def test_a_wrong_derivative_is_found(faulty):
    checked = check(faulty())
    assert causes(checked, Severity.SEVERE) == ["wrong gradient"]
    assert checked.findings[0].location == ("theta",)
    assert checked.findings[0].numbers["disagreement[theta]"] > 0.05
    by_name = {parameter.name: parameter for parameter in checked.parameters}
    assert by_name["wavelength"].disagreement < 1e-6


def test_a_root_of_zero_is_found():
    layer = Sound()
    target = layer(image()).detach()
    checked = check(layer, loss=lambda out: (out - target).square().mean().sqrt())
    assert causes(checked, Severity.SEVERE) == ["nan gradient"]
    assert "the fit is exact" in checked.findings[0].sentence
    scope = {"loss": None}
    exec(checked.findings[0].remedy, scope)
    mse = scope["loss"]
    assert causes(check(layer, loss=lambda out: mse(out, target)), Severity.SEVERE) == []


def test_a_root_of_zero_inside_the_module_is_found():
    class Energy(Sound):
        def forward(self, x):
            return super().forward(x).square().sum(1).sqrt()

    checked = check(Energy(), torch.zeros(1, 1, 9, 9), lambda out: out.mean())
    assert finding(checked, "nan gradient").location == ("theta", "wavelength")
    assert "sum(1).sqrt()" in checked.findings[0].sentence


def test_overflow_in_half_precision_is_found():
    layer = nn.Conv2d(1, 2, 3).half()
    inputs = image().half()
    checked = check(layer, inputs, lambda out: (1e4 * out).square().mean())
    assert causes(checked, Severity.SEVERE) == ["nan gradient"]
    assert "half precision overflows" in checked.findings[0].sentence
    scope = {"module": layer, "inputs": inputs, "targets": inputs, "optimizer": None}
    exec(checked.findings[0].remedy, scope)
    mended_layer = scope["module"]
    assert causes(check(mended_layer, scope["inputs"]), Severity.SEVERE) == []


def test_a_gradient_that_underflows_is_no_broken_graph():
    layer = nn.Conv2d(1, 2, 3, bias=False).half()
    checked = check(layer, image().half(), lambda out: out.float().mean() * 1e-9)
    assert causes(checked, Severity.SEVERE) == ["vanishing step"]


def test_a_module_that_holds_nan_is_told():
    layer = Sound()
    layer.theta.data[1] = math.nan
    worst = check(layer).findings[0]
    assert worst.cause == "nan gradient"
    assert "theta holds NaN" in worst.sentence


# -- steps ----------------------------------------------------------------------------------------


def test_a_step_below_the_rounding_is_found():
    layer = nn.Conv2d(1, 2, 3).half()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-6)
    checked = check(layer, image().half(), optimizer=optimizer)
    assert causes(checked, Severity.SEVERE) == ["does not move"]
    assert not any(parameter.moved for parameter in checked.parameters)


def test_a_step_that_is_written_back_is_found():
    checked = check(WrittenBack())
    assert causes(checked, Severity.SEVERE) == ["does not move"]
    assert checked.findings[0].location == ("theta",)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_loss_scaled_down_is_slow_under_sgd_and_not_under_adam(kind):
    layer = GaborConv2d(1, 3, 7, seed=0)
    optimizer = kind(layer.parameters(), lr=1e-2)
    checked = check(layer, loss=lambda out: 1e-6 * energy(out), optimizer=optimizer)
    wanted = ["vanishing step"] if kind is torch.optim.SGD else []
    assert causes(checked, Severity.SEVERE) == wanted
    if wanted:
        exec(checked.findings[0].remedy, {"optimizer": optimizer})
        again = check(layer, loss=lambda out: 1e-6 * energy(out), optimizer=optimizer)
        assert causes(again) == []


def test_an_optimizer_that_asks_for_the_loss_takes_its_step_too():
    layer = Sound()
    checked = check(layer, optimizer=torch.optim.LBFGS(layer.parameters()))
    assert checked.findings == []
    assert all(parameter.moved for parameter in checked.parameters)


def test_a_loss_that_cannot_fall_further_is_not_called_slow():
    layer = GaborConv2d(1, 3, 7, seed=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
    checked = check(layer, loss=lambda out: 1 + 1e-6 * energy(out), optimizer=optimizer)
    assert causes(checked) == []


def test_the_optimizer_of_another_copy_is_found():
    layer = Sound()
    optimizer = torch.optim.SGD(copy.deepcopy(layer).parameters(), lr=0.1)
    checked = check(layer, optimizer=optimizer)
    assert causes(checked, Severity.SEVERE) == ["frozen"]
    mended(layer, checked.findings[0].remedy)
    one = torch.optim.SGD([layer.theta], lr=0.1)
    left_out = finding(check(layer, optimizer=one), "frozen")
    assert (left_out.location, left_out.severity) == (("wavelength",), Severity.WARNING)
    exec(left_out.remedy, {"module": layer, "optimizer": one})
    assert causes(check(layer, optimizer=one)) == []


def test_frozen_parameters_are_noted_and_severe_when_nothing_learns():
    layer = Sound()
    layer.theta.requires_grad_(False)
    checked = check(layer)
    assert [(f.cause, f.severity, f.location) for f in checked.findings] == [
        ("frozen", Severity.NOTE, ("theta",))
    ]
    layer.wavelength.requires_grad_(False)
    checked = check(layer)
    assert causes(checked, Severity.SEVERE) == ["frozen"]
    new = mended(layer, checked.findings[0].remedy)
    assert causes(check(new)) == []


def test_fields_left_out_of_learn_are_noted_and_can_be_thawed():
    layer = GaborConv2d(1, 4, 7, seed=0, learn=("amplitude", "phase"), padding=3, stride=2)
    layer.bias.data += 1
    found = finding(check(nn.Sequential(layer)), "frozen")
    assert found.location == ("orientation", "wavelength", "sigma", "aspect_ratio")
    assert found.severity is Severity.NOTE
    module = mended(nn.Sequential(layer), found.remedy)
    torch.testing.assert_close(module(image()), layer(image()))
    assert check(module).findings == []


# -- units ----------------------------------------------------------------------------------------


def test_degrees_given_for_radians_are_found_and_mended():
    layer = InDegrees()
    worst = check(layer).findings[0]
    assert (worst.cause, worst.severity, worst.location) == (
        "wrong unit",
        Severity.SEVERE,
        ("theta",),
    )
    assert worst.confidence < 1
    exec(worst.remedy, {"module": layer})
    torch.testing.assert_close(layer.theta, torch.tensor([1.0, 2.0, 3.0]) * math.pi / 4)
    assert causes(check(layer)) == []


def test_degrees_used_as_degrees_are_right_and_radians_are_not():
    layer = TakesDegrees()
    layer.theta.data = torch.tensor([15.0, 90.0, 120.0])
    assert causes(check(layer)) == []
    layer.theta.data = torch.tensor([0.3, 1.5, 2.0])
    assert "layer uses degrees" in finding(check(layer), "wrong unit").sentence


def test_a_frequency_given_for_a_wavelength_is_a_guess():
    layer = Sound()
    layer.wavelength.data = torch.tensor([0.25, 0.2, 0.3])
    found = finding(check(layer), "wrong unit")
    assert found.severity is Severity.WARNING
    assert found.confidence < 1


# -- sound modules --------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["real", "quadrature", "energy"])
@pytest.mark.parametrize("coordinates", ["textbook", "wavevector"])
@pytest.mark.parametrize("n_dims", LAYERS)
def test_our_layers_are_sound(n_dims, coordinates, output):
    layer = LAYERS[n_dims](2, 4, 5, coordinates=coordinates, output=output, start="random", seed=0)
    checked = check(layer, image(2, 2, *[8] * n_dims))
    assert checked.findings == []
    assert set(states(checked).values()) == {"learns"}
    assert all(parameter.moved and parameter.output_follows for parameter in checked.parameters)
    # Central differences in float64 at a step of 1e-6 are good to about 1e-8.
    assert max(parameter.disagreement for parameter in checked.parameters) < 1e-5


@pytest.mark.parametrize("options", [{"dc": "remove"}, {"unit_norm": True}, {"min_wavelength": 2}])
def test_their_options_are_sound_too(options):
    assert check(GaborConv2d(1, 4, 7, start="random", seed=0, **options)).findings == []


def test_ordinary_networks_are_sound():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 3),
    )  # fmt: skip
    labels = torch.tensor([0, 2])
    checked = check(network, loss=lambda out: F.cross_entropy(out, labels))
    assert checked.findings == []
    # Batch norm takes the bias before it away: what gradient it has is rounding.
    assert states(checked)["0.bias"] == "flat"
    assert check(nn.Conv2d(1, 3, 5)).findings == []
    assert check(Sound()).findings == []


def test_a_kink_is_no_fault():
    layer = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    nn.init.zeros_(layer[0].bias)
    inputs = image()
    inputs[..., :6] = 0  # here the ReLU stands exactly at its kink
    assert check(layer, inputs).findings == []
    assert check(layer, inputs, lambda out: (out - 0.5).abs().mean()).findings == []


def test_old_style_weight_norm_can_be_checked():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 3, 3))
    layer(image())
    assert check(layer).findings == []


def test_constants_in_single_precision_do_not_disturb():
    class Narrow(Sound):
        def kernel(self):
            return synthesise(self.theta.float(), self.wavelength).to(torch.float32)

    target = torch.zeros(2, 3, 6, 6)
    checked = check(Narrow(), loss=lambda out: F.mse_loss(out, target))
    assert checked.findings == []
    assert max(parameter.disagreement for parameter in checked.parameters) < 1e-5


def test_outputs_and_inputs_of_any_structure():
    class Several(Sound):
        def forward(self, images, factor, *, scale=1.0):
            response = super().forward(images["image"])
            return {"response": factor * response, "more": [response.sum(), None, "text"]}

    checked = check(
        Several(), ({"image": image()}, 2), lambda out: energy(out["response"]) + out["more"][0]
    )
    assert checked.findings == []
    lookup = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    assert check(lookup, torch.tensor([[0, 1, 4]])).findings == []
    recurrent = nn.LSTM(3, 4, num_layers=2, dropout=0.5)
    assert check(recurrent, torch.rand(5, 2, 3), lambda out: energy(out[0])).findings == []


# -- what is the caller's stays -------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_callers_is_changed(training):
    module = nn.Sequential(GaborConv2d(1, 3, 5, seed=0), nn.BatchNorm2d(3), nn.Dropout(0.3))
    inputs = image()
    energy(module(inputs)).backward()
    optimizer = torch.optim.Adam(module.parameters())
    optimizer.step()
    module.train(training)
    before = copy.deepcopy(module.state_dict())
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    numbers, steps = torch.get_rng_state(), copy.deepcopy(optimizer.state_dict())
    kept = inputs.clone()
    checked = check(module, inputs, optimizer=optimizer)
    assert causes(checked, Severity.SEVERE) == []
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, gradients[name])
    assert module.training == module[1].training == training
    assert torch.equal(torch.get_rng_state(), numbers)
    assert torch.equal(inputs, kept)
    for index, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["exp_avg"], steps["state"][index]["exp_avg"])
        assert state["step"] == steps["state"][index]["step"]


def test_a_record_per_parameter():
    layer = Sound()
    theta, wavelength = check(layer).parameters
    assert (theta.name, wavelength.name) == ("theta", "wavelength")
    (slope,) = torch.autograd.grad(energy(layer(image())), layer.theta)
    assert theta.gradient_norm == pytest.approx(slope.norm().item(), rel=1e-5)


def test_work_in_place_does_not_reach_the_callers_inputs():
    inputs = image() - 0.5
    kept = inputs.clone()
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(1, 2, 3))
    assert check(module, inputs).findings == []
    assert torch.equal(inputs, kept)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "kind", "line"),
    [
        (lambda out: out, ValueError, r"loss must return a scalar, got shape \(2, 3, 6, 6\)"),
        (lambda out: out.mean().item(), TypeError, "scalar tensor, got float"),
        (lambda out: energy(out) * random.random(), ValueError, "must be the same"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss, kind, line):
    with pytest.raises(kind, match=line):
        check(Sound(), loss=loss)


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="inputs must be finite"):
        check(Sound(), torch.full((1, 1, 9, 9), math.nan))
    with pytest.raises(RuntimeError, match="should be the same"):
        check(Sound().half(), image())
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got function"):
        check(energy)
    for other in (nn.Conv2d(1, 1, 3), nn.ReLU()):
        with pytest.raises(ValueError, match="must be one convolution of its input"):
            replace_by_gabor(nn.Sequential(nn.Conv2d(1, 1, 3), other), "", image())
    with pytest.raises(ValueError, match="must be one convolution of its input"):
        replace_by_gabor(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), "", image())


def test_a_network_that_makes_its_kernels_itself_is_not_replaced_whole():
    class Whole(Detached):
        def forward(self, x):
            return super().forward(x).relu().mean((2, 3))

    found = finding(check(Whole()), "no gradient")
    assert found.remedy == ""
