"""Bounds are those of the Jacobian of the responses, and an estimator reaches them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium import Gabor2d, GaborConv1d, GaborConv2d, recover
from gaborium.diagnostics import Severity, identifiability
from trainings import PLANTED, camera, causes, layer_at, white

IMAGE = white(1, 1, 48, 48)


def direct_information(layer: GaborConv2d, inputs: Tensor, index: int, names) -> Tensor:
    """JᵀJ of the responses of one filter, by differences of the record's fields."""
    params, columns = layer.params.detach(), []
    for name in names:
        field, _, channel = name.rstrip("]").partition("[")
        at = (index, int(channel)) if channel else (index,)
        field, at = (
            ("center", (index, 0, "xyz".index(field[-1])))
            if field.startswith("center")
            else (field, at)
        )
        both = []
        for step in (1e-5, -1e-5):
            value = getattr(params, field).clone()
            value[at] += step
            layer.params = params.replace(**{field: value})
            both.append(layer(inputs)[:, index].detach().flatten())
        layer.params = params
        columns.append((both[0] - both[1]) / 2e-5)
    J = torch.stack(columns)
    if layer.bias is not None:
        J = J - J.mean(1, keepdim=True)  # the bias is estimated too
    return J @ J.T


# -- the information ----------------------------------------------------------------------------

SETTINGS = [
    {},
    {"bias": True},
    {"stride": 2, "padding": 3},
    {"padding": "same", "padding_mode": "reflect"},
    {"dc": "remove"},
    {"unit_norm": True},
    {"learn": ("orientation", "center", "sigma")},
    {"learn": "phase"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_information_is_that_of_the_responses_jacobian(settings):
    layer = layer_at("random", 2, 3, 9, seed=0, **settings)
    inputs = 0.5 + 0.3 * white(2, 2, 30, 26)
    found = identifiability(layer, inputs, noise=0.2)
    assert len(found.bounds) == 3
    for index in (0, 2):
        expected = direct_information(layer, inputs, index, found.names) / 0.2**2
        scale = expected.diagonal().max()
        torch.testing.assert_close(
            found.information[index] / scale, expected / scale, atol=1e-6, rtol=1e-5
        )
        errors = torch.linalg.inv(expected).diagonal().sqrt()
        torch.testing.assert_close(found.bounds[index], errors, rtol=1e-3, atol=0)


def test_parameters_are_named_with_their_channel():
    layer = layer_at("random", 2, 3, 9, seed=0, learn=("phase", "center"))
    names = identifiability(layer, white(1, 2, 30, 30)).names
    assert set(names) == {"phase[0]", "phase[1]", "center_x", "center_y"}
    assert identifiability(layer_at(), IMAGE).names == (
        "orientation", "wavelength", "phase", "sigma", "aspect_ratio", "amplitude",
    )  # fmt: skip


def test_recover_reaches_the_bounds():
    """The Cramér-Rao bound is attained: 40 recoveries spread as predicted, within 1/√80 each."""
    layer = layer_at(PLANTED, bias=True)
    inputs, noise = white(1, 1, 40, 40), 0.5
    found = identifiability(layer, inputs, noise=noise)
    clean = layer(inputs).detach()
    noisy = clean + noise * white(1, 40, *clean.shape[2:], seed=1)
    difference = recover(inputs, noisy, 11).params.difference(layer.params.detach())
    for name, bound in zip(found.names, found.bounds[0].tolist(), strict=True):
        spread = difference[name].square().mean().sqrt().item()
        assert 0.6 < spread / bound < 1.5, name


def test_noise_is_what_the_targets_leave():
    layer = layer_at()
    inputs = IMAGE
    targets = layer(inputs).detach()
    targets = targets + 0.3 * white(*targets.shape, seed=1)
    found = identifiability(layer, inputs, targets=targets)
    assert found.noise.item() == pytest.approx(0.3, rel=0.05)
    known = identifiability(layer, inputs, noise=found.noise.item())
    torch.testing.assert_close(found.bounds, known.bounds)
    assert identifiability(layer, inputs).noise.item() == 1.0


def test_white_input_is_no_worse_than_white_input():
    found = identifiability(layer_at(), white(4, 1, 64, 64))
    torch.testing.assert_close(found.bounds, found.white_bounds, rtol=0.05, atol=0)
    assert found.condition.item() == pytest.approx(found.white_condition.item(), rel=0.1)
    assert found.findings == []


def test_conditions_do_not_depend_on_units():
    """Twice the kernel, or twice the image, is as well conditioned."""
    one = identifiability(layer_at(), IMAGE)
    loud = identifiability(layer_at(PLANTED.replace(amplitude=torch.tensor(7.0))), IMAGE)
    bright = identifiability(layer_at(), 3 * IMAGE)
    for other in (loud, bright):
        torch.testing.assert_close(other.condition, one.condition, rtol=1e-5, atol=0)
    torch.testing.assert_close(bright.bounds, one.bounds / 3)


def test_sounds_are_judged_too():
    layer = GaborConv1d(1, 2, 31, seed=0, dtype=torch.float64)
    found = identifiability(layer, white(1, 1, 2000), noise=0.1)
    assert found.names == ("wavelength", "phase", "sigma", "amplitude")
    assert found.bounds.isfinite().all()


# -- what it says -------------------------------------------------------------------------------


def test_the_orientation_of_a_round_blob_is_not_identifiable_and_the_remedy_freezes_it():
    blob = Gabor2d.of(wavelength=math.inf, sigma=2.0)
    module = layer_at(blob, learn=("orientation", "sigma"), coordinates="textbook")
    found = identifiability(module, IMAGE)
    assert found.not_identifiable(0) == ("orientation",)
    assert found.bounds[0, 0] == math.inf
    assert found.bounds[0, 1].isfinite()
    assert found.findings[0].cause == "not identifiable"
    assert found.findings[0].severity is Severity.SEVERE
    exec(found.findings[0].remedy, {"module": module})
    learned = [name for name, p in module.named_parameters() if p.requires_grad]
    assert learned == ["log_sigma"]


def test_an_elongated_blob_has_an_orientation():
    blob = Gabor2d.of(wavelength=math.inf, sigma=2.0, aspect_ratio=0.6)
    found = identifiability(layer_at(blob, learn="orientation"), IMAGE)
    assert found.not_identifiable(0) == ()


def test_a_photograph_is_worse_than_white_input():
    slow = PLANTED.replace(wavelength=torch.tensor(12.0), sigma=torch.tensor(3.0))
    found = identifiability(layer_at(slow, 1, 1, 15), camera())
    assert found.condition > 50 * found.white_condition
    assert (found.bounds[0, 1] > 1.5 * found.white_bounds[0, 1]).all()
    assert causes(found)["ill-conditioned input"] is Severity.WARNING
    assert [pair[:2] for pair in found.trade_offs[0]] == [("wavelength", "sigma")]
    assert causes(found)["trade-off"] is Severity.NOTE


def test_zero_padding_of_an_uncentred_photograph_is_told_and_the_remedy_leaves_it_out():
    module = layer_at(PLANTED, 1, 1, 15, padding="same")
    inputs = camera()
    found = identifiability(module, inputs)
    assert causes(found)["zero padding"] is Severity.WARNING
    for sound in (
        identifiability(module, inputs - inputs.mean()),
        identifiability(layer_at(PLANTED, 1, 1, 15), inputs),
        identifiability(layer_at(PLANTED, 1, 1, 15, padding=7, padding_mode="reflect"), inputs),
        identifiability(module, white(1, 1, 96, 96)),
    ):
        assert "zero padding" not in causes(sound)
    padding = next(f for f in found.findings if f.cause == "zero padding")
    assert padding.numbers["border_area"] == pytest.approx(1 - (82 / 96) ** 2)
    names = {"loss": F.mse_loss}
    exec(padding.remedy, names)
    output, target = white(1, 1, 96, 96), white(1, 1, 96, 96, seed=1)
    inner = (..., slice(7, -7), slice(7, -7))
    assert names["loss"](output, target) == F.mse_loss(output[inner], target[inner])


def test_images_up_to_255_are_told_and_scaled():
    module, inputs = layer_at(), 255 * camera()
    targets = module(inputs).detach()
    found = identifiability(module, inputs, targets=targets)
    assert found.findings[0].cause == "image scale"
    names = {"inputs": inputs, "targets": targets}
    exec(found.findings[0].remedy, names)
    assert names["inputs"].std().item() == pytest.approx(1.0)
    torch.testing.assert_close(module(names["inputs"]).detach(), names["targets"])


def test_a_large_mean_is_told_and_taken_off():
    blob = PLANTED.replace(wavelength=torch.tensor(20.0))
    module, inputs = layer_at(blob), 3 + 0.3 * IMAGE
    targets = module(inputs).detach()
    found = identifiability(module, inputs, targets=targets)
    assert causes(found)["image mean"] is Severity.WARNING
    names = {"inputs": inputs, "targets": targets}
    exec(next(f.remedy for f in found.findings if f.cause == "image mean"), names)
    mended = identifiability(module, names["inputs"], targets=names["targets"])
    assert "image mean" not in causes(mended)
    # What is left is the mean of the border, which the responses see less of.
    left = (module(names["inputs"]) - names["targets"]).detach()
    assert left.std() < 1e-10
    assert left.mean().abs() < 0.01 * targets.mean().abs()


def test_ill_conditioning_is_mended_by_recover():
    slow = PLANTED.replace(wavelength=torch.tensor(12.0), sigma=torch.tensor(3.0))
    module, inputs = layer_at(slow, 1, 1, 15), camera()
    targets = module(inputs).detach()
    found = identifiability(module, inputs)
    module.params = PLANTED
    remedy = next(f.remedy for f in found.findings if f.cause == "ill-conditioned input")
    exec(remedy, {"module": module, "inputs": inputs, "targets": targets})
    torch.testing.assert_close(module(inputs), targets, atol=1e-5, rtol=0)


# -- the caller's things, and bad input ---------------------------------------------------------


def test_bad_input_gets_one_clear_line():
    layer, inputs = layer_at(), IMAGE
    for message, call in {
        "needs a Gabor layer, got Conv2d": lambda: identifiability(nn.Conv2d(1, 1, 3), inputs),
        "inputs must be": lambda: identifiability(layer, inputs[0]),
        "needs a layer with output='real'": lambda: identifiability(
            layer_at(output="energy"), inputs
        ),
        "must not be dilated": lambda: identifiability(layer_at(PLANTED, dilation=2), inputs),
        "learns no field": lambda: identifiability(layer_at(learn=()), inputs),
        "noise must be a positive": lambda: identifiability(layer, inputs, noise=-1.0),
        "must have the outputs' shape": lambda: identifiability(layer, inputs, targets=inputs),
        "must be finite": lambda: identifiability(layer, inputs * math.nan),
        "must not be smaller": lambda: identifiability(layer, inputs[..., :9]),
    }.items():
        with pytest.raises((ValueError, TypeError), match=message):
            call()
