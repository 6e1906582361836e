"""Questions about conversion: what becomes a Gabor function, what stays, and what it costs."""

import copy
import math

import pytest
import torch
from torch import nn

import gaborium
from fits import kernel_errors, planted
from gaborium import (
    Conversion,
    Gabor2d,
    GaborConv1d,
    GaborConv2d,
    GaborConv3d,
    MixedConv,
    gabor,
)
from gaborium.conversion import find_first_conv
from gaborium.optim import NaturalGradient
from transformer_networks import resnet, videomae, wav2vec2


def waves(n: int, size: int, channels: int = 1, seed: int = 0) -> torch.Tensor:
    """Planted kernels ``(n, channels, size, size)``, not in their middle."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=draw)

    params = Gabor2d.of(
        orientation=uniform(0, math.pi, n, 1),
        wavelength=uniform(3.0, 5.0, n, 1),
        sigma=uniform(1.4, 1.8, n, 1),
        aspect_ratio=uniform(0.7, 1.2, n, 1),
        phase=uniform(-3, 3, n, channels),
        amplitude=uniform(0.2, 1.0, n, channels),
        center=uniform(-0.5, 0.5, n, 1, 2),
    )
    return gabor(params, size)


def convert(model: nn.Module, **options: object) -> Conversion:
    """One start for each kernel, which finds planted waves; more are the fit's business."""
    return gaborium.convert(model, **{"n_starts": 1} | options)


def network(size: int = 7, channels: int = 3, bias: bool = False) -> nn.Sequential:
    """Four Gabor filters and two free ones, in turns, and something behind them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(channels, 6, size, stride=2, padding=size // 2, bias=bias),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    with torch.no_grad():
        model[0].weight[[0, 2, 3, 5]] = waves(4, size, channels)
        model(photographs(channels))  # so that batch norm knows something
    return model


def photographs(channels: int = 3, n: int = 4) -> torch.Tensor:
    """Not like a photograph, but smooth and brighter in places."""
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(n, channels, 40, 40, generator=draw)
    return (noise.cumsum(-1) + noise.cumsum(-2)) / 10 + 0.5


def test_waves_are_converted_and_noise_stays():
    model = network()
    conversion = convert(model)
    assert conversion.is_gabor.tolist() == [True, False, True, True, False, True]
    first = conversion.model[0]
    assert isinstance(first, MixedConv)
    assert torch.equal(first.is_gabor, conversion.is_gabor)
    assert torch.equal(first.weight[[1, 4]], model[0].weight[[1, 4]])
    assert torch.allclose(first.weight, model[0].weight, atol=1e-5)
    image = photographs()
    assert torch.allclose(conversion.model.eval()(image), model.eval()(image), atol=1e-4)
    assert conversion.n_first_parameters == (6 * 147, 4 * (6 + 6) + 2 * 147)
    assert [row["is_gabor"] for row in conversion.to_table()] == conversion.is_gabor.tolist()
    assert conversion.params.orientation.shape == (4, 1)


def test_norms_follow_what_the_conversion_changes_and_nothing_else():
    model = network().eval()
    with torch.no_grad():
        model(photographs())
    # An exact conversion leaves them where they are, whatever the images' own statistics.
    exact = convert(model, calibrate=photographs(n=8) * 3 + 1, filters=[0, 2, 3, 5])
    assert torch.allclose(exact.model[1].running_mean, model[1].running_mean, atol=1e-3)
    assert torch.allclose(exact.model[1].running_var, model[1].running_var, rtol=1e-3)
    # Noise as a Gabor function varies less; then the norm's output has the variance that it had.
    images = photographs(n=8)
    rough = convert(model, calibrate=images, filters=range(6))
    left = convert(model, calibrate=images, filters=range(6), adapt_norms=False)
    assert torch.equal(left.model[1].running_var, model[1].running_var)

    def spread(network: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return network[:2].eval()(images).std((0, 2, 3))

    before, adapted, not_adapted = map(spread, (model, rough.model, left.model))
    assert (not_adapted[[1, 4]] < 0.9 * before[[1, 4]]).all()
    assert torch.allclose(adapted, before, rtol=1e-3)
    assert torch.allclose(rough.model[0].weight, left.model[0].weight)


def test_batches_that_tell_no_statistics_leave_the_norms_alone():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 7), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten()
    )
    images = photographs(1, n=2).split(1)
    with pytest.warns(UserWarning, match="calibrate with larger batches"):
        conversion = convert(model, calibrate=images, threshold=0.0)
    assert conversion.model[2].running_var.tolist() == [1.0] * 4
    assert conversion.is_gabor.all()


def test_the_callers_model_is_left_alone():
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    conversion = convert(model, calibrate=photographs())
    assert type(model[0]) is nn.Conv2d
    assert type(model[1]) is nn.BatchNorm2d
    assert model.training
    assert conversion.model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    held = {value.data_ptr() for value in model.parameters()}
    assert not held & {value.data_ptr() for value in conversion.model.parameters()}


def test_a_frozen_network_is_counted_as_one_that_learns():
    conversion = convert(network().requires_grad_(False), filters=[0])
    assert conversion.n_first_parameters == (6 * 147, (6 + 6) + 5 * 147)


def test_the_list_decides_whatever_is_explained():
    conversion = convert(network(), filters=[1, 3])
    assert conversion.is_gabor.nonzero().flatten().tolist() == [1, 3]
    everything = convert(network(), filters=range(6)).model[0]
    assert isinstance(everything, GaborConv2d)
    nothing = convert(network(), filters=[])
    assert type(nothing.model[0]) is nn.Conv2d
    assert nothing.n_first_parameters[0] == nothing.n_first_parameters[1]


def test_calibration_makes_responses_more_alike_than_the_fit_of_kernels():
    model, images = network(), photographs()
    plain = convert(model, filters=range(6)).model
    calibrated = convert(model, filters=range(6), calibrate=images)
    fresh = photographs(n=8)[4:]

    def left(converted: nn.Module) -> float:
        was, now = model[0](fresh), converted[0](fresh)
        return ((now - was).square().mean() / was.var()).item()

    assert left(calibrated.model) < 0.5 * left(plain)
    error = calibrated.response_error
    assert error is not None
    assert (error[[0, 2, 3, 5]] < 1e-2).all()
    assert (error[[1, 4]] > 0.05).all()


@pytest.mark.parametrize("bias", [False, True])
def test_calibration_keeps_the_mean_of_every_response(bias):
    model, images = network(bias=bias), photographs()
    converted = convert(model, filters=range(6), calibrate=[images[:2], images[2:]]).model
    middle = (slice(None), slice(None), slice(3, -3), slice(3, -3))  # away from the border
    was, now = (one[0](images)[middle].mean((0, 2, 3)) for one in (model, converted))
    spread = model[0](images)[middle].std((0, 2, 3))
    assert ((was - now).abs() < 0.1 * spread).all()


def test_response_error_is_what_the_layer_shows():
    model, images = network(), photographs()
    model[0].padding = (0, 0)
    conversion = convert(model, filters=[1], calibrate=images)
    was, now = model[0](images)[:, 1], conversion.model[0](images)[:, 1]
    shown = ((now - was - (now - was).mean()).std() / was.std()).item()
    assert conversion.response_error[1].item() == pytest.approx(shown, rel=0.1)
    assert conversion.response_error[0] == 0


def test_what_was_converted_is_trained_by_the_natural_gradient():
    model = convert(network(), filters=[0, 2, 3, 5]).model.train()
    first, target = model[0], network().train()(photographs()).detach().flip(0)
    before = {name: value.detach().clone() for name, value in first.named_parameters()}
    optimizers = [
        NaturalGradient(first.gabor),
        torch.optim.Adam([first.free, *model[1:].parameters()], 0.003),
    ]
    losses = []
    for _ in range(20):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = (model(photographs()) - target).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(v, before[name]) for name, v in first.named_parameters())


def test_gabor_filters_learn_and_go_back_to_a_plain_layer():
    model = convert(network()).model
    first = model[0]
    before = {name: value.detach().clone() for name, value in first.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(photographs()).square().mean().backward()
    optimizer.step()
    for name, value in first.named_parameters():
        assert not torch.equal(value, before[name]), name
    assert "center" in "".join(before)
    plain = first.to_conv()
    assert torch.equal(plain(photographs()), first(photographs()))
    fixed = convert(network(), learn=("phase", "amplitude")).model[0]
    assert {n for n, _ in fixed.gabor.named_parameters()} == {"even", "odd"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    model = nn.Sequential(nn.Conv2d(1, 2, 9).to(dtype))
    with torch.no_grad():
        model[0].weight.copy_(waves(2, 9))
    first = convert(model).model[0]
    assert {value.dtype for value in first.parameters()} == {dtype}


def test_padding_modes_strides_and_dilations_are_kept():
    conv = nn.Conv2d(1, 2, 9, (2, 3), 4, (1, 2), padding_mode="reflect")
    with torch.no_grad():
        conv.weight[0] = waves(1, 9)[0]
    image = photographs(1)
    conversion = convert(conv, filters=[0], calibrate=image)
    assert torch.allclose(conversion.model(image), conv(image), atol=1e-4)


@pytest.mark.parametrize(
    ("plain", "layer"),
    [(nn.Conv1d(1, 3, 33), GaborConv1d), (nn.Conv3d(1, 3, (3, 7, 7)), GaborConv3d)],
)
def test_sounds_and_videos_are_converted(plain, layer):
    planted = layer(1, 3, plain.kernel_size, start="random", seed=0)
    with torch.no_grad():
        plain.weight.copy_(planted.weight)
        plain.bias.copy_(planted.bias)
    conversion = convert(plain)
    assert conversion.is_gabor.all()
    assert torch.allclose(conversion.model.weight, plain.weight, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "n_dims", "calibrated"),
    [(resnet, 2, True), (wav2vec2, 1, True), (videomae, 3, False)],
)
def test_networks_from_transformers_are_converted(make, n_dims, calibrated):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, batch, name = make()
    model.eval()
    conv = find_first_conv(model)[1]
    params = planted(n_dims, 2, 1, channels=conv.in_channels, wavelength=5.0, sigma=1.4)
    with torch.no_grad():
        conv.weight[[1, 2]] = 0.2 * gabor(params, conv.kernel_size).float()
    for images in (None, batch) if calibrated else (None,):
        conversion = convert(model, calibrate=images, n_starts=3)
        assert conversion.name == name
        assert conversion.is_gabor.nonzero().flatten().tolist() == [1, 2]
        assert isinstance(conversion.model.get_submodule(name), MixedConv)
        assert kernel_errors(conversion.fit[[1, 2]], conv.weight[[1, 2]], n_dims).max() < 1e-3
        outputs = (one(batch).logits for one in (model, conversion.model))
        assert torch.allclose(*outputs, atol=1e-2)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), {}, "no convolution"),
        (lambda: nn.Conv2d(3, 4, 1), {}, "1 x 1 px"),
        (lambda: nn.Conv2d(4, 4, 5, groups=2), {}, "groups=2"),
        (lambda: GaborConv2d(1, 2, 5), {}, "a Gabor layer already"),
        (lambda: nn.Conv2d(1, 2, 5, dtype=torch.complex64), {}, "real"),
        (network, {"threshold": 1.5}, r"threshold must be in \[0, 1\]"),
        (network, {"filters": [6]}, "filters must be numbers from 0 to 5"),
        (network, {"filters": [0.5]}, "filters must be numbers"),
        (network, {"calibrate": []}, "at least one batch"),
        (network, {"calibrate": torch.ones(2, 3, 40, 40) * math.nan}, "finite"),
        (network, {"calibrate": torch.zeros(2, 3, 40, 40)}, "structure"),
    ],
)
def test_bad_input_is_one_clear_line(model, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        convert(model(), **options)
    assert "\n" not in str(caught.value)


def test_silent_and_infinite_kernels_are_told():
    model = network()
    with torch.no_grad():
        model[0].weight[1] = 0
    assert not convert(model).is_gabor[1]
    with pytest.raises(ValueError, match=r"not zero, got \[1\]"):
        convert(model, filters=[1])
    with torch.no_grad():
        model[0].weight[2, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 6"):
        convert(model)


def test_edges_become_waves_that_can_be_trained():
    rows = torch.arange(9.0) - 4
    edge = (rows[:, None] * torch.exp(-(rows[:, None] ** 2 + rows**2) / 4)).expand(1, 1, 9, 9)
    conv = nn.Conv2d(1, 1, 9, bias=False)
    conv.weight = nn.Parameter(edge.clone())
    conversion = convert(conv)
    assert conversion.is_gabor.all()
    params = conversion.params
    assert (params.wavelength <= 36.0 + 1e-6).all()
    assert (params.amplitude.abs() < 10 * edge.abs().max()).all()
    # Steps of Adam that are small for any layer are small for this one.
    model, image = conversion.model, photographs(1)
    before = model(image).detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(image).square().mean().backward()
    optimizer.step()
    assert (model(image) - before).std() < 0.1 * before.std()
