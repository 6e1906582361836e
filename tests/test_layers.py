"""Questions about the layers: drop-in for torch's, always live, always learning, always legal."""

import copy
import inspect
import io
import itertools
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium import Gabor1d, Gabor2d, Gabor3d, GaborConv1d, GaborConv2d, GaborConv3d
from gaborium.functions.kernels import gabor, suggest_kernel_size
from gaborium.functions.params import RECORDS, Gabor
from gaborium.layers import LAYERS, PLAIN_LAYERS, pair_energy
from gaborium.starts import STARTS

DIMENSIONS = (1, 2, 3)
COORDINATES = ("textbook", "wavevector")
OUTPUTS = ("real", "quadrature", "energy")
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
HALF = (torch.float16, torch.bfloat16)

# What torch itself says of "same" with even kernels, and while it loads forward derivatives.
even_same = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


def layer_of(n_dims: int, *args, **kwargs):
    """A layer of 2 channels and 4 filters of 5 px, unless told otherwise; starts differ by seed."""
    args = args or (2, 4, 5)
    kwargs = {"start": "random", "seed": 0} | kwargs
    return LAYERS[n_dims](*args, **kwargs)


def image_for(n_dims: int, *lead: int, size: int = 9, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(*(lead or (2, 2)), *[size] * n_dims, dtype=dtype)


def some_gabors(n_dims: int, *shape: int, **fields: float) -> Gabor:
    """Ordinary Gabor functions that fit into 3 px."""

    def uniform(low: float, high: float, *more: int) -> Tensor:
        return low + (high - low) * torch.rand((*shape, *more), dtype=torch.float64)

    values = {
        "orientation": uniform(0.0, 3.0),
        "elevation": uniform(-1.0, 1.0),
        "wavelength": uniform(3.0, 6.0),
        "phase": uniform(-3.0, 3.0),
        "sigma": uniform(0.7, 0.9),
        "aspect_ratio": uniform(0.9, 1.3),
        "amplitude": uniform(0.5, 2.0),
        "center": uniform(-0.5, 0.5, n_dims),
    }
    values |= {name: torch.full(shape, value).double() for name, value in fields.items()}
    record = RECORDS[n_dims]
    return record(**{name: values[name] for name in record.field_names()})


def raw_tensors(layer) -> dict[str, Tensor]:
    return {name: value for name, value in layer.state_dict().items() if name != "bias"}


def learned(layer) -> list[nn.Parameter]:
    return [p for name, p in layer.named_parameters() if name != "bias"]


# -- the signature ------------------------------------------------------------------------------


@pytest.mark.parametrize("n_dims", DIMENSIONS)
def test_the_signature_is_that_of_torch_and_then_ours(n_dims):
    theirs = inspect.signature(PLAIN_LAYERS[n_dims]).parameters
    ours = inspect.signature(LAYERS[n_dims]).parameters
    shared, own = list(ours)[: len(theirs)], list(ours)[len(theirs) :]
    assert shared == list(theirs)
    for name in shared:
        assert ours[name].default == theirs[name].default
        assert ours[name].kind == theirs[name].kind
    assert {"learn", "coordinates", "start", "seed", "output"} <= set(own)
    assert {ours[name].kind for name in own} == {inspect.Parameter.KEYWORD_ONLY}
    forward = inspect.signature(LAYERS[n_dims].forward).parameters
    assert list(forward) == list(inspect.signature(PLAIN_LAYERS[n_dims].forward).parameters)


# -- images → responses -------------------------------------------------------------------------

ARGUMENTS = [
    {"stride": 2},
    {"padding": 2},
    {"padding": "same"},
    {"padding": "valid", "stride": 3},
    {"dilation": 2, "padding": 3},
    {"dilation": 3, "padding": "same", "kernel_size": 4},
    {"dilation": 3, "padding": "same", "kernel_size": 4, "padding_mode": "replicate"},
    {"groups": 2},
    {"groups": 2, "in_channels": 6, "geometry": "pair"},
    {"bias": False},
    {"in_channels": 1},
    {"in_channels": 5, "out_channels": 1},
    {"kernel_size": 1},
    {"kernel_size": 2},
    {"kernel_size": (1, 6, 3)},
    {"kernel_size": (4, 1, 5), "stride": (1, 2, 3), "padding": (2, 0, 1), "dilation": (1, 3, 1)},
    {"kernel_size": (2, 3, 5), "padding": (1, 2, 3), "padding_mode": "circular"},
    {"padding": 2, "padding_mode": "reflect", "stride": 2},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": "valid", "padding_mode": "circular"},
    {"output": "quadrature", "groups": 2},
    {"dc": "remove", "unit_norm": True},
]


def arguments(case: dict, n_dims: int) -> dict:
    case = {"in_channels": 4, "out_channels": 4, "kernel_size": 5} | case
    return {n: v[-n_dims:] if isinstance(v, tuple) else v for n, v in case.items()}


@even_same
@pytest.mark.parametrize("n_dims", DIMENSIONS)
@pytest.mark.parametrize("case", ARGUMENTS, ids=str)
def test_outputs_are_those_of_torch_with_the_same_kernels(case, n_dims):
    given = arguments(case, n_dims)
    layer = LAYERS[n_dims](**given, start="random", seed=0)
    theirs = inspect.signature(PLAIN_LAYERS[n_dims]).parameters
    plain = PLAIN_LAYERS[n_dims](**{name: value for name, value in given.items() if name in theirs})
    assert layer.weight.shape == plain.weight.shape
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    for image in (
        image_for(n_dims, 2, given["in_channels"], size=11),
        image_for(n_dims, given["in_channels"], size=11),
        image_for(n_dims, 0, given["in_channels"], size=11),
    ):
        response = layer(image)
        assert torch.equal(response, plain(image))
        assert torch.equal(response, layer.to_conv()(image))


@pytest.mark.parametrize("n_dims", DIMENSIONS)
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_outputs_are_convolutions_with_the_sampled_record(coordinates, n_dims):
    for geometry in ("filter", "pair"):
        layer = layer_of(n_dims, dtype=torch.float64, coordinates=coordinates, geometry=geometry)
        layer.params = some_gabors(n_dims, *((4, 2) if geometry == "pair" else (4, 1)))
        image = image_for(n_dims, dtype=torch.float64)
        kernels = gabor(layer.params, layer.kernel_size)
        expected = CONVOLVE[n_dims](image, kernels, layer.bias)
        torch.testing.assert_close(layer(image), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_dims", DIMENSIONS)
@pytest.mark.parametrize("dtype", [torch.float64, *HALF])
def test_every_floating_type_is_served(dtype, n_dims):
    layer, exact = layer_of(n_dims, dtype=dtype), layer_of(n_dims, dtype=torch.float64)
    image = image_for(n_dims, dtype=dtype)
    assert layer(image).dtype == layer.weight.dtype == dtype
    # The raw parameters are rounded: bfloat16 keeps 8 bits of a phase and of a logarithm.
    assert torch.equal(copy.deepcopy(exact).to(dtype).weight, layer.weight)
    error = (layer.weight.double() - exact.weight).norm() / exact.weight.norm()
    assert error < {torch.float64: 1e-12, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]
    # But what is made of them is as exact as the type allows.
    expected = gabor(layer.params.to(torch.float64), layer.kernel_size)
    torch.testing.assert_close(
        layer.weight.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("output", ["real", "energy"])
def test_autocast_keeps_the_sampling_exact(output, dtype):
    layer = layer_of(2, output=output, unit_norm=True, dc="remove")
    image = image_for(2)
    with torch.autocast("cpu", dtype=dtype):
        response, weight = layer(image), layer.weight
        plain = nn.Conv2d(2, 4, 5)(image)
    assert torch.equal(weight, layer.weight)
    if output == "real":
        assert response.dtype == plain.dtype == dtype
    torch.testing.assert_close(response.float(), layer(image), rtol=0.02, atol=0.02)
    response.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in learned(layer))


def test_memory_layouts_change_nothing():
    layer = layer_of(2)
    image = image_for(2)
    expected = layer(image)
    last = image.to(memory_format=torch.channels_last)
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(last), expected)
    torch.testing.assert_close(layer.to(memory_format=torch.channels_last)(last), expected)
    strided = torch.stack([image, image], -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(layer(strided), expected)
    torch.testing.assert_close(layer(image.mT.contiguous().mT), expected)


# -- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_dims", DIMENSIONS)
def test_quadrature_gives_each_filter_two_channels(n_dims):
    layer = layer_of(n_dims, 2, 6, 5, output="quadrature")
    assert layer.params.phase.shape == (3, 2)
    params = layer.params
    partner = params.replace(phase=params.phase - math.pi / 2)
    torch.testing.assert_close(layer.weight[0::2], gabor(params, layer.kernel_size))
    torch.testing.assert_close(layer.weight[1::2], gabor(partner, layer.kernel_size))


@pytest.mark.parametrize("n_dims", DIMENSIONS)
def test_energy_is_the_norm_of_the_pair(n_dims):
    layer = layer_of(n_dims, 4, 6, 5, output="energy", groups=2)
    pair = layer_of(n_dims, 4, 12, 5, output="quadrature", groups=2, bias=False)
    pair.params = layer.params
    image = image_for(n_dims, 2, 4)
    responses = pair(image)
    expected = (responses[:, ::2].square() + responses[:, 1::2].square()).sqrt()
    expected = expected + layer.bias.reshape(-1, *[1] * n_dims)
    torch.testing.assert_close(layer(image), expected)
    torch.testing.assert_close(layer(image[0]), expected[0])


def test_energy_does_not_know_the_phase_and_has_a_gradient_at_zero():
    layer = layer_of(1, 1, 2, 31, output="energy", bias=False, dtype=torch.float64)
    wave = torch.cos(2 * math.pi / 6 * torch.arange(200).double())[None]
    layer.params = Gabor1d.of(wavelength=6.0, sigma=4.0)
    # A wave that drifts past leaves the response as it is.
    assert layer(wave).std(-1).max() < 1e-4 * layer(wave).mean()
    layer(torch.zeros(1, 40).double()).sum().backward()
    assert all((p.grad == 0).all() for p in learned(layer))


@pytest.mark.parametrize("n_dims", DIMENSIONS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_without_dc_a_share_of_the_envelope_is_missing_and_a_constant_image_gives_nothing(
    output, n_dims
):
    options = {"output": output, "bias": False, "dtype": torch.float64}
    kept, removed = layer_of(n_dims, **options), layer_of(n_dims, dc="remove", **options)
    removed.params = kept.params
    constant = torch.ones(1, 2, *[9] * n_dims, dtype=torch.float64)
    assert kept(constant).abs().max() > 1e-2
    assert removed(constant).abs().max() < 1e-12
    params = kept.params.replace(wavelength=math.inf, phase=0.0)
    envelope = gabor(params, 5).repeat_interleave(1 if output == "real" else 2, 0).flatten(2)
    taken = (kept.weight - removed.weight).flatten(2)
    share = (taken * envelope).sum(2, keepdim=True) / envelope.square().sum(2, keepdim=True)
    torch.testing.assert_close(taken, share * envelope)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("dc", ["keep", "remove"])
@pytest.mark.parametrize("n_dims", DIMENSIONS)
def test_unit_norm_makes_the_amplitude_the_norm(n_dims, dc, coordinates):
    layer = layer_of(n_dims, unit_norm=True, dc=dc, coordinates=coordinates, dtype=torch.float64)
    norm = layer.weight.flatten(2).norm(dim=2)
    torch.testing.assert_close(norm, layer.params.amplitude.abs())
    loud = layer.params.replace(amplitude=3 * layer.params.amplitude)
    before = layer.weight
    layer.params = loud
    torch.testing.assert_close(layer.weight, 3 * before)


def test_unit_norm_of_a_pair_is_that_of_both():
    layer = layer_of(2, 2, 6, 5, unit_norm=True, output="quadrature", dtype=torch.float64)
    norm = layer.weight.unflatten(0, (3, 2)).square().sum((1, 3, 4)).div(2).sqrt()
    torch.testing.assert_close(norm, layer.params.amplitude.abs())


def test_automatic_size_holds_the_envelope():
    start = Gabor2d.of(orientation=0.6, wavelength=6.0, sigma=2.0, aspect_ratio=0.5)
    layer = GaborConv2d(1, 1, "auto", start=start)
    assert layer.kernel_size == suggest_kernel_size(start)
    height, width = layer.kernel_size
    assert height > width > 13
    blob = start.replace(wavelength=torch.tensor(math.inf))
    beyond = gabor(blob, (height + 2, width + 2))
    for border in (beyond[0], beyond[-1], beyond[:, 0], beyond[:, -1]):
        assert border.max() <= math.exp(-0.5 * 3.0**2)


def test_suggested_sizes_follow_axes_and_centre():
    tall = Gabor2d.of(wavelength=6.0, sigma=2.0, aspect_ratio=0.5)
    assert suggest_kernel_size(tall) == (25, 13)
    assert suggest_kernel_size(tall, n_stds=2.0) == (17, 9)
    moved = tall.replace(center=torch.tensor([-2.5, 1.0]))
    assert suggest_kernel_size(moved) == (27, 19)
    assert suggest_kernel_size(Gabor1d.of(wavelength=6.0, sigma=[1.0, 3.0])) == (19,)
    upright = Gabor3d.of(elevation=math.pi / 2, wavelength=6.0, sigma=1.0, aspect_ratio=0.5)
    assert suggest_kernel_size(upright) == (7, 13, 13)
    assert suggest_kernel_size(tall.to(torch.float16)) == (25, 13)
    thread = Gabor2d.of(wavelength=6.0, sigma=1.0, aspect_ratio=1e-6, dtype=torch.float64)
    assert suggest_kernel_size(thread) == (6_000_001, 7)


# -- parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n_dims", DIMENSIONS)
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_params_can_be_read_and_assigned(coordinates, n_dims):
    layer = layer_of(n_dims, 3, 4, 9, coordinates=coordinates, dtype=torch.float64)
    for shape in ((), (4,), (4, 1), (1, 1)):
        record = some_gabors(n_dims, *shape)
        layer.params = record
        whole = record.expand()
        whole = whole[:, None] if shape == (4,) else whole
        for name, value in layer.params.as_dict().items():
            tail = (n_dims,) if name == "center" else ()
            columns = 3 if name in ("phase", "amplitude") else 1
            assert value.shape == (4, columns, *tail), name
            torch.testing.assert_close(
                value, getattr(whole, name).expand_as(value), rtol=1e-9, atol=1e-9
            )


def test_colour_opponents_are_one_geometry_with_three_amplitudes():
    layer = GaborConv2d(3, 1, 9)
    layer.params = Gabor2d.of(wavelength=5.0, sigma=1.5, amplitude=[[1.0, -1.0, 0.0]])
    red, green, blue = layer.weight[0]
    assert torch.equal(red, -green)
    assert (blue == 0).all()
    # The sign of an amplitude and half a turn of the phase are one thing in these coordinates.
    assert layer.params.amplitude[0].abs().tolist() == [1.0, 1.0, 0.0]


def test_a_record_may_be_the_start():
    record = some_gabors(2, 4)
    layer = GaborConv2d(2, 4, 9, start=record, dtype=torch.float64)
    expected = gabor(record, 9)[:, None].expand(4, 2, 9, 9)
    torch.testing.assert_close(layer.weight, expected, rtol=0, atol=1e-12)
    layer.params = some_gabors(2, 4)
    layer.reset_parameters()
    torch.testing.assert_close(layer.weight, expected, rtol=0, atol=1e-12)


def test_reading_params_carries_the_graph():
    layer = layer_of(2)
    layer.params.orientation.sum().backward()
    assert (layer.angular_wave_vector.grad != 0).all()
    # Which must not follow them into another layer: tensors with a graph cannot be copied.
    other = layer_of(2, start=layer.params)
    assert torch.equal(copy.deepcopy(other).weight, other.weight)


def test_assigning_does_not_replace_parameters_or_touch_the_record():
    layer = layer_of(2)
    before = {name: value.data_ptr() for name, value in layer.state_dict().items()}
    record = some_gabors(2, 4)
    copied = {name: value.clone() for name, value in record.as_dict().items()}
    layer.params = record
    layer.weight.sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    assert before == {name: value.data_ptr() for name, value in layer.state_dict().items()}
    assert all(torch.equal(value, copied[name]) for name, value in record.as_dict().items())


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"learn": "theta"}, ValueError, r"learn .*'orientation', 'wavelength'.*'theta'"),
        ({"learn": ["sigma", "gamma"]}, ValueError, "learn .*'gamma'"),
        ({"coordinates": "polar"}, ValueError, "coordinates .*'polar'"),
        ({"geometry": "channel"}, ValueError, "geometry .*'filter', 'pair'.*'channel'"),
        ({"dc": "no"}, ValueError, "dc .*'keep', 'remove'.*'no'"),
        ({"output": "complex"}, ValueError, "output .*'quadrature'.*'complex'"),
        ({"start": "zeros"}, ValueError, "start .*'bank', 'random', 'v1'.*'zeros'"),
        ({"start": 3}, ValueError, "start .*'bank', 'random', 'v1'.*3"),
        ({"start": Gabor1d.of(wavelength=4.0, sigma=1.0)}, TypeError, "Gabor2d, got Gabor1d"),
        ({"start": some_gabors(2, 7)}, ValueError, r"batch shape \(4, 2\).*\(7,\)"),
        ({"min_wavelength": -1.0}, ValueError, "min_wavelength .*positive"),
        ({"min_wavelength": 9.0, "start": some_gabors(2, 4)}, ValueError, "wavelength .*at least"),
        ({"out_channels": 5, "output": "quadrature"}, ValueError, "out_channels .*multiple .*5"),
        (
            {"out_channels": 6, "groups": 2, "output": "quadrature"},
            ValueError,
            "out_channels .*multiple .*4.*6",
        ),
        ({"groups": 3}, ValueError, "divisible by groups"),
        ({"kernel_size": 0}, ValueError, "kernel_size .*positive.*0"),
        ({"kernel_size": (5, 5, 5)}, ValueError, "kernel_size .*2 numbers"),
        ({"kernel_size": "large"}, ValueError, "kernel_size .*numbers.*'large'"),
        ({"kernel_size": "auto"}, ValueError, "kernel_size='auto' needs a record"),
        ({"padding": "full"}, ValueError, "padding .*'full'"),
        ({"padding": "same", "stride": 2}, ValueError, "same.*strided"),
        ({"padding_mode": "mirror"}, ValueError, "padding_mode .*'mirror'"),
        ({"dtype": torch.complex64}, TypeError, "dtype .*floating.*complex64"),
        ({"colour": True}, TypeError, "colour"),
    ],
    # The arguments' names: their values may differ from process to process.
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(kwargs, error, words):
    with pytest.raises(error, match=words) as caught:
        GaborConv2d(**{"in_channels": 2, "out_channels": 4, "kernel_size": 5} | kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "error", "words"),
    [
        (3.0, TypeError, "params must be a Gabor2d, got float"),
        (some_gabors(1, 4), TypeError, "Gabor2d, got Gabor1d"),
        (some_gabors(2, 3), ValueError, r"batch shape \(4, 2\).*got \(3,\)"),
        (some_gabors(2, 2, 2), ValueError, r"batch shape \(4, 2\).*got \(2, 2\)"),
        (some_gabors(2, 1, 4, 2), ValueError, r"batch shape \(4, 2\)"),
        (some_gabors(2, 4, sigma=-1.0), ValueError, "sigma must be positive.*-1"),
        (some_gabors(2, 4, aspect_ratio=0.0), ValueError, "aspect_ratio must be positive"),
        (some_gabors(2, 4, phase=math.nan), ValueError, "phase must be finite"),
        (some_gabors(2, 4, wavelength=1.9), ValueError, "at least min_wavelength = 2 px, got 1.9"),
        (some_gabors(2, 4, 2), ValueError, "orientation differs.*geometry='pair'"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_wrong_records_are_refused_and_leave_the_layer_as_it_was(record, error, words):
    layer = layer_of(2, min_wavelength=2.0)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=words) as caught:
        layer.params = record
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_the_weight_cannot_be_set():
    layer = layer_of(2)
    with pytest.raises((AttributeError, KeyError), match="weight"):
        layer.weight = nn.Parameter(torch.zeros(4, 2, 5, 5))
    assert "weight" not in layer.state_dict()


# -- warnings -----------------------------------------------------------------------------------


def warned(action) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return caught


CUT = Gabor2d.of(wavelength=6.0, sigma=[1.0, 4.0], aspect_ratio=0.5, dtype=torch.float16)
ALIASED = Gabor2d.of(wavelength=[1.9, 2.0], sigma=2.0)
TALL = Gabor2d.of(wavelength=[6.0, 6.0], sigma=1.0, aspect_ratio=0.2)


@pytest.mark.parametrize("by", ["start", "assignment"])
@pytest.mark.parametrize(
    ("record", "size", "expected", "absent"),
    [
        (CUT, 9, ["1 of 2 Gabor", "kernel_size=(9, 9)", "kernel_size=(49, 25) or"], "2 px"),
        (ALIASED, 15, ["1 of 2 wavelengths are below 2 px", "min_wavelength=2.0"], "kernel_size"),
        (ALIASED, 5, ["2 of 2 Gabor", "1 of 2 wavelengths"], "\n"),  # both, in one warning
        (TALL, (5, 25), ["2 of 2 Gabor"], "2 px"),
        (TALL, (25, 5), [], ""),  # only the axis that cuts counts
        (TALL, (1, 5), [], ""),
        (CUT, (49, 25), [], ""),
    ],
)
def test_one_warning_says_what_to_do(record, size, expected, absent, by):
    layer = GaborConv2d(1, 2, size)
    if by == "start":
        found = warned(lambda: GaborConv2d(1, 2, size, start=record, device="meta"))
    else:
        found = warned(lambda: setattr(layer, "params", record))
    assert len(found) == bool(expected)
    for warning in found:
        assert all(part in str(warning.message) for part in expected)
        assert absent not in str(warning.message)
        # It points at the line that did it, not at the library.
        assert warning.filename == __file__


@pytest.mark.parametrize("n_dims", DIMENSIONS)
@pytest.mark.parametrize("start", STARTS)
def test_our_own_starts_never_warn(start, n_dims):
    # In 3-D the larger sizes stretch along one axis only: a cube of 31 px takes its time.
    sizes = [(size,) * n_dims for size in range(3, 10 if n_dims == 3 else 32)]
    sizes += [(size, 1, 1) for size in range(10, 32)] * (n_dims == 3)
    for size in sizes:
        assert warned(lambda k=size: LAYERS[n_dims](1, 16, k, start=start, seed=k[0])) == [], size


# -- starts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_dims", DIMENSIONS)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("start", STARTS)
def test_outputs_begin_with_the_variance_of_torch(start, output, n_dims):
    in_channels, kernel_size, *size = {
        1: (3, 15, 1000),
        2: (3, 9, 40, 40),
        3: (3, 5, 12, 12, 12),
    }[n_dims]
    image = torch.randn(4, in_channels, *size)
    plain = PLAIN_LAYERS[n_dims](in_channels, 64, kernel_size, bias=False)
    layer = LAYERS[n_dims](
        in_channels, 64, kernel_size, start=start, output=output, seed=0, bias=False
    )

    def variance(responses: Tensor) -> float:
        return responses.transpose(0, 1).flatten(1).var(1).mean().item()

    # Three standard errors of both; energies assume that the two of a pair are equally strong.
    assert variance(layer(image)) == pytest.approx(variance(plain(image)), rel=0.1)
    assert variance(layer(image)) == pytest.approx(1 / 3, rel=0.1)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dc": "remove"},
        {"unit_norm": True},
        {"groups": 2},
        {"geometry": "pair"},
        {"min_wavelength": 4.0},
    ],
    ids=str,
)
def test_every_filter_begins_equally_loud(options, start):
    layer = layer_of(2, 4, 8, 9, start=start, **options)
    power = layer.weight.square().flatten(1).sum(1)
    torch.testing.assert_close(power, torch.full_like(power, 1 / 3))
    assert layer.bias.abs().max() <= 1 / math.sqrt(4 / layer.groups * 81)


@pytest.mark.parametrize("start", STARTS)
def test_a_start_stays_clear_of_the_shortest_wavelength(start):
    # At the bound itself the wavelength has no gradient, and would stay there for ever.
    assert (layer_of(2, start=start, min_wavelength=4.0).params.wavelength > 4.39).all()


def test_a_pixel_without_its_mean_is_zero_and_stays_small():
    layer = GaborConv2d(1, 4, 1, dc="remove")
    assert (layer.weight == 0).all()
    assert (layer.params.amplitude.abs() <= 10).all()


@pytest.mark.parametrize("start", ["random", "v1"])
def test_seeds_repeat_a_layer(start):
    def same(one, other) -> bool:
        pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    assert same(layer_of(2, start=start, seed=1), layer_of(2, start=start, seed=1))
    assert not same(layer_of(2, start=start, seed=1), layer_of(2, start=start, seed=2))
    before = torch.get_rng_state()
    layer = layer_of(2, start=start, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    layer.reset_parameters()
    assert same(layer, layer_of(2, start=start, seed=1))

    free = layer_of(2, start=start, seed=None)
    assert not same(free, layer_of(2, start=start, seed=None))
    torch.manual_seed(3)
    one = layer_of(2, start=start, seed=None)
    torch.manual_seed(3)
    assert same(one, layer_of(2, start=start, seed=None))


# -- learning -----------------------------------------------------------------------------------

# Besides single fields: pairs that take one field of a group that is otherwise stored jointly.
SPLITS = {
    1: [("wavelength", "phase"), ("amplitude", "center")],
    2: [("orientation", "phase"), ("wavelength", "amplitude"), ("sigma", "center")],
    3: [("orientation", "wavelength"), ("elevation", "amplitude"), ("orientation", "elevation")],
}
LEARN = [
    (n_dims, learn)
    for n_dims in DIMENSIONS
    for learn in [
        *[(name,) for name in RECORDS[n_dims].field_names()],
        RECORDS[n_dims].field_names(),
        *SPLITS[n_dims],
        None,
        (),
    ]
]


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize(("n_dims", "learn"), LEARN, ids=str)
def test_what_learns_moves_and_what_is_frozen_does_not(n_dims, learn, coordinates):
    layer = layer_of(n_dims, learn=learn, coordinates=coordinates)
    fields = RECORDS[n_dims].field_names()
    wanted = {*fields} - {"center"} if learn is None else {*learn}
    before = layer.params.detach()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, weight_decay=0.01, momentum=0.9)
    image = image_for(n_dims)
    loss = (layer(image) * torch.randn_like(layer(image))).mean()
    loss.backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).all(), name
    optimizer.step()
    after = layer.params.detach()
    for name in fields:
        moved = getattr(after, name) != getattr(before, name)
        assert moved.all() if name in wanted else not moved.any(), name
    assert {name for name, _ in layer.named_buffers()}.isdisjoint(dict(layer.named_parameters()))


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("n_dims", DIMENSIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"geometry": "pair"},
        {"dc": "remove"},
        {"unit_norm": True},
        {"dc": "remove", "unit_norm": True},
        {"output": "quadrature"},
        {"output": "energy", "unit_norm": True},
        {"min_wavelength": 2.0},
        {"min_wavelength": 4.0, "start": "bank", "kernel_size": 7},
        {"start": "v1"},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_every_option_learns(options, n_dims, coordinates):
    given = {"in_channels": 2, "out_channels": 4, "kernel_size": 5, "coordinates": coordinates}
    given |= {"start": "random", "seed": 1} | options
    layer = LAYERS[n_dims](**given, learn=RECORDS[n_dims].field_names())
    image = image_for(n_dims, dtype=layer.weight.dtype)
    (layer(image) * torch.randn_like(layer(image))).sum().backward()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).all(), name
        # A step that half precision can resolve.
        parameter.data -= 0.1 * parameter.grad.sign()
    assert all((value != before[name]).all() for name, value in layer.state_dict().items())


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_a_layer_learns_what_another_one_does(coordinates):
    target = GaborConv2d(1, 2, 9, start=some_gabors(2, 2, sigma=1.8), bias=False)
    near = target.params.detach()
    near = near.replace(
        orientation=near.orientation + 0.2,
        wavelength=near.wavelength * 1.1,
        sigma=near.sigma * 0.9,
        phase=near.phase + 0.3,
    )
    layer = GaborConv2d(1, 2, 9, start=near, bias=False, coordinates=coordinates)
    image = image_for(2, 8, 1, size=24)
    wanted = target(image).detach()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.mse_loss(layer(image), wanted).backward()
        optimizer.step()
    error = (layer.weight - target.weight).norm() / target.weight.norm()
    # The same 150 steps from 0.5: what is left is the optimiser's own jitter.
    assert error < 0.02


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("n_dims", DIMENSIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dc": "remove", "unit_norm": True, "output": "quadrature"},
        {"unit_norm": True, "geometry": "pair", "min_wavelength": 2.0},
    ],
    ids=str,
)
def test_the_weight_has_the_right_gradient(options, n_dims, coordinates):
    layer = layer_of(
        n_dims,
        2,
        2,
        (4, 3, 3)[-n_dims:],
        coordinates=coordinates,
        learn=RECORDS[n_dims].field_names(),
        dtype=torch.float64,
        bias=False,
        **options,
    )
    # gradcheck moves the parameters in place; the weight is whatever they are at that moment.
    assert torch.autograd.gradcheck(
        lambda *_: layer.weight, tuple(layer.parameters()), fast_mode=n_dims == 3
    )


@pytest.mark.parametrize("output", ["real", "energy"])
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("n_dims", DIMENSIONS)
def test_second_derivatives_are_right(n_dims, coordinates, output):
    layer = layer_of(n_dims, 1, 2, 3, coordinates=coordinates, dtype=torch.float64, output=output)
    image = image_for(n_dims, 1, 1, size=4, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda *_: layer(image).sin(), tuple(layer.parameters()), fast_mode=True
    )


@forward_mode
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("n_dims", DIMENSIONS)
def test_forward_mode_agrees_with_reverse_mode(n_dims, coordinates):
    layer = layer_of(n_dims, coordinates=coordinates, dtype=torch.float64, unit_norm=True)
    image = image_for(n_dims, dtype=torch.float64)
    values = {name: p.detach() for name, p in layer.named_parameters()}
    tangents = {name: torch.randn_like(value) for name, value in values.items()}
    response, push = torch.func.jvp(
        lambda p: torch.func.functional_call(layer, p, (image,)), (values,), (tangents,)
    )
    assert torch.equal(response, layer(image))
    cotangent = torch.randn_like(response)
    pull = torch.autograd.grad(layer(image), list(layer.parameters()), cotangent)
    both = zip(pull, tangents.values(), strict=True)
    torch.testing.assert_close((cotangent * push).sum(), sum((g * t).sum() for g, t in both))


# -- always live --------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_weight_is_never_stale(training):
    layer, other = layer_of(2).train(training), layer_of(2, seed=1)
    image = image_for(2)

    def fresh() -> bool:
        # The truth, from parameters alone.
        truth = gabor(layer.params, layer.kernel_size)
        return torch.allclose(layer.weight, truth, atol=1e-6) and torch.equal(
            layer(image), F.conv2d(image, layer.weight, layer.bias)
        )

    seen = []

    def changed() -> bool:
        seen.append(layer(image).detach())
        return fresh() and (len(seen) == 1 or not torch.equal(seen[-1], seen[-2]))

    assert changed()
    layer.load_state_dict(other.state_dict())
    assert changed()
    assert torch.equal(layer(image), other(image))
    layer(image).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert changed()
    with torch.no_grad():
        assert changed() is False
        layer.log_sigma += 0.1
        assert changed()
        layer.log_sigma.data *= 2
        assert changed()
    with torch.inference_mode():
        layer.params = other.params
        assert changed()
    layer.params = some_gabors(2, 4, sigma=0.9)
    assert changed()
    layer.train(not training)
    layer.reset_parameters()
    assert changed()


@pytest.mark.parametrize("min_wavelength", [2.0, 3.3])
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("n_dims", DIMENSIONS)
def test_no_step_passes_the_shortest_wavelength(n_dims, coordinates, min_wavelength):
    for learn in (None, ("wavelength",)):
        layer = layer_of(
            n_dims, 1, 64, 5, coordinates=coordinates, min_wavelength=min_wavelength, learn=learn
        )
        for lr in (1e-2, 1.0, 1e2, 1e6, 1e30):
            layer.zero_grad()
            (layer.weight * torch.randn_like(layer.weight)).sum().backward()
            torch.optim.SGD(layer.parameters(), lr=lr).step()
            assert (layer.params.wavelength >= min_wavelength).all()
            # What was read may be assigned, to this layer and to its like.
            record = layer.params.detach()
            warned(lambda record=record, layer=layer: setattr(layer, "params", record))
            assert (layer.params.wavelength >= min_wavelength).all()


# -- at the edges -------------------------------------------------------------------------------

EDGE_OPTIONS = [
    {},
    {"dc": "remove"},
    {"unit_norm": True},
    {"dc": "remove", "unit_norm": True, "output": "quadrature"},
]


def assert_finite(layer) -> None:
    weight = layer.weight
    assert weight.isfinite().all()
    layer.zero_grad()
    (weight * torch.randn_like(weight)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert name == "bias" or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("n_dims", DIMENSIONS)
def test_extreme_values_are_finite(n_dims, coordinates, dtype):
    axes = {
        "sigma": torch.logspace(-6, 6, 13),
        "wavelength": torch.tensor([1e-3, 0.1, 1.0, 2.0, 7.0, 1e3, 1e9, math.inf]),
        "amplitude": torch.tensor([0.0, 1.0]),
        "aspect_ratio": torch.tensor([1e-3, 1.0, 1e3]),
    }
    n = math.prod(map(len, axes.values()))
    values = dict(zip(axes, torch.cartesian_prod(*axes.values()).T, strict=True))
    record = some_gabors(n_dims, n).to(torch.float32)
    record = record.replace(**{n: v for n, v in values.items() if n in record.field_names()})
    for options, size in itertools.product(EDGE_OPTIONS, (4, 5)):
        n_channels = n * (2 if options.get("output") == "quadrature" else 1)
        layer = layer_of(
            n_dims,
            1,
            n_channels,
            (size, 1, 3)[:n_dims],
            coordinates=coordinates,
            dtype=dtype,
            learn=record.field_names(),
            start="bank",
            **options,
        )
        (warning,) = warned(lambda layer=layer: setattr(layer, "params", record))
        assert "kernel_size" in str(warning.message)
        assert_finite(layer)
        layer.params.check()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("n_dims", DIMENSIONS)
def test_absurd_raw_values_are_finite(n_dims, coordinates, dtype):
    for options, size in itertools.product([*EDGE_OPTIONS, {"min_wavelength": 2.0}], (1e4, 1e30)):
        layer = layer_of(
            n_dims,
            2,
            60,
            4,
            coordinates=coordinates,
            dtype=dtype,
            learn=RECORDS[n_dims].field_names(),
            start="bank",
            **options,
        )
        with torch.no_grad():
            for parameter in learned(layer):
                sign = torch.randint_like(parameter, 3) - 1
                # Half precision makes this an infinity, which is no worse.
                absurd = (sign.double() * size).to(dtype)
                parameter.copy_(torch.where(sign == 0, parameter, absurd))
        assert_finite(layer)
        layer.params.check()


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_a_layer_survives_absurd_steps(coordinates):
    layer = layer_of(2, 2, 32, 5, coordinates=coordinates)
    image = image_for(2)
    for lr in (1e3, 1e30, 1e-3):
        layer.zero_grad()
        (layer(image) * torch.randn_like(layer(image))).mean().backward()
        torch.optim.SGD(learned(layer), lr=lr).step()
        assert_finite(layer)
        assert layer(image).isfinite().all()
        layer.params.check()


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_a_silent_filter_has_no_geometry_but_an_amplitude_to_learn(coordinates, unit_norm):
    layer = layer_of(2, coordinates=coordinates, unit_norm=unit_norm)
    layer.params = layer.params.replace(amplitude=torch.zeros(4, 2))
    assert (layer.weight == 0).all()
    (layer.weight * torch.randn_like(layer.weight)).sum().backward()
    assert (layer.log_sigma.grad == 0).all()
    amplitude = layer.amplitude if coordinates == "textbook" else layer.even
    assert (amplitude.grad.abs() > 1e-3).all()


def test_limits_are_what_the_docstring_says():
    def kernel(size: int, **fields: float) -> Tensor:
        layer = GaborConv2d(1, 1, size)
        warned(lambda: setattr(layer, "params", Gabor2d.of(**fields)))
        return layer.weight[0, 0]

    dot = kernel(5, wavelength=5.0, sigma=1e-4)
    assert dot[2, 2] == 1
    assert dot.sum() == 1
    assert (kernel(4, wavelength=5.0, sigma=1e-4) == 0).all()
    wave = kernel(5, wavelength=5.0, sigma=1e6)
    expected = torch.cos(2 * math.pi / 5 * (torch.arange(5) - 2)).expand(5, 5)
    torch.testing.assert_close(wave, expected)
    assert (kernel(5, wavelength=math.inf, sigma=1e6) == 1).all()


# -- a module among modules ---------------------------------------------------------------------


def test_state_dicts_are_readable_and_stable():
    keys = {
        GaborConv1d(1, 1, 5): "log_wavelength log_sigma even odd center",
        GaborConv2d(1, 1, 5): "angular_wave_vector log_sigma log_aspect_ratio even odd center",
        GaborConv3d(1, 1, 5): "angular_wave_vector log_sigma log_aspect_ratio even odd center",
        GaborConv2d(1, 1, 5, coordinates="textbook"): (
            "orientation log_wavelength log_sigma log_aspect_ratio amplitude phase center"
        ),
        GaborConv2d(1, 1, 5, learn="orientation"): (
            "orientation log_wavelength log_sigma log_aspect_ratio even odd center"
        ),
    }
    for layer, expected in keys.items():
        assert set(layer.state_dict()) == {*expected.split(), "bias"}


@pytest.mark.parametrize("n_dims", DIMENSIONS)
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_copies_are_equal_and_independent(coordinates, n_dims):
    layer = layer_of(n_dims, 2, 4, 9, coordinates=coordinates, start=some_gabors(n_dims, 4))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = layer_of(n_dims, 2, 4, 9, coordinates=coordinates, seed=7)
    assert not torch.equal(loaded.weight, layer.weight)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other.weight, layer.weight)
        assert torch.equal(other.bias, layer.bias)
        assert repr(other) == repr(layer)
        before = layer.weight
        with torch.no_grad():
            for value in other.state_dict().values():
                value += 0.1
        assert torch.equal(layer.weight, before)
        assert not torch.equal(other.weight, before)


@pytest.mark.parametrize(("n_dims", "shortest"), [(1, 2.0), (2, None), (2, 2.0), (3, None)])
def test_checkpoints_in_other_coordinates_load(n_dims, shortest):
    ways = list(itertools.product(COORDINATES, (None, ("wavelength",), ("phase", "center"))))
    swapped = zip(ways, ways[3:] + ways[:3], strict=True)
    for one, other in itertools.chain(swapped, itertools.pairwise(ways)):
        source, target = (
            nn.Sequential(
                nn.Identity(),
                layer_of(n_dims, coordinates=c, learn=learn, min_wavelength=shortest, seed=seed),
            )
            for seed, (c, learn) in enumerate((one, other))
        )
        stored = source.state_dict()
        copied = {name: value.clone() for name, value in stored.items()}
        assert target.load_state_dict(stored).missing_keys == []
        torch.testing.assert_close(target[1].weight, source[1].weight, rtol=0, atol=2e-6)
        # The checkpoint itself is left as it was.
        assert list(stored) == list(copied)
        assert all(torch.equal(value, copied[name]) for name, value in stored.items())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_checkpoints_load_in_other_coordinates(dtype, assign):
    source = layer_of(2, dtype=dtype)
    target = layer_of(2, dtype=dtype, coordinates="textbook", seed=1)
    target.load_state_dict(source.state_dict(), assign=assign)
    assert {value.dtype for value in target.state_dict().values()} == {dtype}
    assert all(parameter.requires_grad for parameter in target.parameters())
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(target.weight, source.weight, rtol=0, atol=tolerance)


def test_a_checkpoint_that_does_not_fit_is_refused():
    stored = layer_of(2).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer_of(2, 2, 6, 5).load_state_dict(stored)
    with pytest.raises(RuntimeError, match=r"Missing key.*log_sigma"):
        layer_of(2).load_state_dict({n: v for n, v in stored.items() if n != "log_sigma"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight"):
        layer_of(2).load_state_dict({**stored, "weight": torch.zeros(1)})


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("n_dims", DIMENSIONS)
def test_meta_layers_come_to_life(n_dims, coordinates):
    expected = layer_of(n_dims, coordinates=coordinates)
    given = layer_of(n_dims, coordinates=coordinates, device="meta")
    with torch.device("meta"):
        inside = layer_of(n_dims, coordinates=coordinates)
    skipped = nn.utils.skip_init(
        LAYERS[n_dims], 2, 4, 5, coordinates=coordinates, start="random", seed=0
    )
    for layer in (given, inside):
        assert layer.weight.is_meta
        assert layer(torch.empty(1, 2, *[9] * n_dims, device="meta")).is_meta
    for layer in (given.to_empty(device="cpu"), inside.to_empty(device="cpu"), skipped):
        layer.reset_parameters()
        for name, value in expected.state_dict().items():
            assert torch.equal(layer.state_dict()[name], value), name
        assert torch.equal(layer.weight, expected.weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n_dims", DIMENSIONS)
def test_a_seed_gives_the_same_layer_on_every_device(n_dims):
    here, there = layer_of(n_dims), layer_of(n_dims, device="cuda")
    with torch.device("cuda"):
        inside = layer_of(n_dims)
    for layer in (there, inside):
        for name, value in here.state_dict().items():
            assert torch.equal(layer.state_dict()[name].cpu(), value), name
        layer.params = here.params
        here.params = layer.params
        torch.testing.assert_close(layer.weight.cpu(), here.weight)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("n_dims", DIMENSIONS)
def test_ensembles_and_samples_can_be_mapped(n_dims, coordinates):
    members = [layer_of(n_dims, coordinates=coordinates, seed=seed) for seed in range(3)]
    image = image_for(n_dims)
    values, buffers = torch.func.stack_module_state(members)

    def call(p, b, x):
        return torch.func.functional_call(members[0], (p, b), (x,))

    responses = torch.func.vmap(call, (0, 0, None))(values, buffers, image)
    expected = torch.stack([member(image) for member in members])
    torch.testing.assert_close(responses, expected, rtol=1e-4, atol=1e-5)

    own = dict(members[0].named_parameters()), dict(members[0].named_buffers())
    gradients = torch.func.vmap(
        torch.func.grad(lambda p, b, x: call(p, b, x[None]).square().sum()), (None, None, 0)
    )(*own, image)
    members[0](image).square().sum().backward()
    for name, parameter in members[0].named_parameters():
        torch.testing.assert_close(gradients[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("n_dims", "options"),
    [
        (2, {"output": "energy", "dc": "remove", "unit_norm": True, "min_wavelength": 2.0}),
        (3, {"coordinates": "textbook", "padding_mode": "circular", "padding": 1}),
        (1, {"dtype": torch.bfloat16}),
    ],
    ids=str,
)
def test_layers_compile_without_a_break(n_dims, options):
    torch.compiler.reset()
    layer = layer_of(n_dims, **options)
    image = image_for(n_dims, dtype=layer.weight.dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), layer(image))
    gradients = torch.autograd.grad(compiled(image).sum(), list(layer.parameters()))
    expected = torch.autograd.grad(layer(image).sum(), list(layer.parameters()))
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("output", ["real", "energy"])
def test_layers_export_for_any_batch(output):
    layer = layer_of(2, output=output).eval()
    shapes = {"input": {0: torch.export.Dim("batch")}}
    program = torch.export.export(layer, (image_for(2),), dynamic_shapes=shapes)
    image = image_for(2, 5, 2)
    torch.testing.assert_close(program.module()(image), layer(image))


@pytest.mark.parametrize("n_dims", DIMENSIONS)
def test_the_frozen_layer_is_a_plain_one_of_its_own(n_dims):
    layer = layer_of(n_dims, padding=2, padding_mode="circular", dtype=torch.float64).eval()
    conv = layer.to_conv()
    assert type(conv) is PLAIN_LAYERS[n_dims]
    assert not conv.training
    assert conv.weight.requires_grad
    assert conv.weight.is_leaf
    image = image_for(n_dims, dtype=torch.float64)
    expected = layer(image)
    assert torch.equal(conv(image), expected)
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.zero_()
    assert torch.equal(layer(image), expected)
    energy = layer_of(n_dims, output="energy", dtype=torch.float64)
    assert torch.equal(energy.to_conv()(image), energy(image))


def test_repr_shows_what_is_not_default():
    assert repr(GaborConv2d(3, 4, 5, learn="sigma")) == (
        "GaborConv2d(3, 4, kernel_size=(5, 5), stride=(1, 1), learn=['sigma'])"
    )
    text = repr(GaborConv1d(2, 4, 5, 2, 1, bias=False, output="energy"))
    assert "padding=(1,), bias=False, output='energy'" in text

    class Named(GaborConv2d):
        def __init__(self, n_filters: int) -> None:
            super().__init__(1, n_filters, 5, dc="remove")

    assert repr(Named(3)).startswith("Named(1, 3, kernel_size=(5, 5), stride=(1, 1), dc='remove'")


@pytest.mark.parametrize("output", ["quadrature", "energy"])
def test_a_bank_that_makes_its_own_partners_holds_no_filter_twice(output):
    layer = GaborConv2d(1, 16, 15, output=output)
    assert torch.equal(layer.params.phase, torch.zeros(layer.n_filters, 1))
    geometry = torch.cat([layer.params.orientation, layer.params.wavelength], 1)
    assert len(geometry.round(decimals=4).unique(dim=0)) == layer.n_filters


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_norms_of_pairs_are_vector_norms_and_their_slopes(dtype):
    responses = 100 * torch.randn(4, 8, 3, dtype=torch.float64).to(dtype)
    responses[0, :2] = 0
    ours, theirs = (responses.clone().requires_grad_() for _ in range(2))
    found = pair_energy(ours, 1, None)
    wanted = torch.linalg.vector_norm(theirs.unflatten(1, (4, 2)), dim=2)
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(pair_energy(responses, 1, torch.ones(4)), found + torch.ones(4, 1))
