"""Questions about how parameters are stored: nothing is lost, and nothing is ever illegal."""

import math

import pytest
import torch

from gaborium import Gabor1d, Gabor2d, Gabor3d
from gaborium.coordinates import Coordinates
from gaborium.functions.kernels import combine, even_odd, gabor
from gaborium.functions.params import RECORDS, Gabor

DIMENSIONS = (1, 2, 3)
NAMES = ("textbook", "wavevector")
# Which fields learn decides which of them are stored jointly.
LEARN = (None, ("phase",), ("amplitude",), ("wavelength",), ("wavelength", "phase"))


def some_gabors(n_dims: int, n_filters: int = 6, n_channels: int = 3) -> Gabor:
    """Ordinary Gabor functions: geometry per filter, phase and amplitude per pair."""
    draw = torch.Generator().manual_seed(n_dims)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        sample = torch.rand(n_filters, *shape, generator=draw, dtype=torch.float64)
        return low + (high - low) * sample

    fields = {
        "orientation": uniform(-1.5, 1.5, 1),
        "elevation": uniform(-1.2, 1.2, 1),
        "wavelength": uniform(3.0, 8.0, 1),
        "phase": uniform(-3.0, 3.0, n_channels),
        "sigma": uniform(1.0, 3.0, 1),
        "aspect_ratio": uniform(0.5, 1.5, 1),
        "amplitude": uniform(0.5, 2.0, n_channels),
        "center": uniform(-1.0, 1.0, 1, n_dims),
    }
    record = RECORDS[n_dims]
    return record(**{name: fields[name] for name in record.field_names()})


def every_coordinates(min_wavelength: float | None = None) -> list[Coordinates]:
    return [
        Coordinates.named(name, n_dims=n, learn=learn, min_wavelength=min_wavelength)
        for n in DIMENSIONS
        for name in NAMES
        for learn in LEARN
    ]


def kernels_of(coordinates: Coordinates, raw: dict[str, torch.Tensor]) -> torch.Tensor:
    wave = coordinates.waveform(raw)
    return combine(*even_odd(wave, (5,) * coordinates.n_dims), wave)


def requiring_grad(raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone().requires_grad_() for name, value in raw.items()}


# -- pins ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_dims", "name", "learn", "expected"),
    [
        (1, "textbook", None, "log_wavelength log_sigma amplitude phase center"),
        (1, "wavevector", None, "log_wavelength log_sigma even odd center"),
        (
            2,
            "textbook",
            None,
            "orientation log_wavelength log_sigma log_aspect_ratio amplitude phase center",
        ),
        (
            2,
            "wavevector",
            None,
            "angular_wave_vector log_sigma log_aspect_ratio even odd center",
        ),
        (
            3,
            "wavevector",
            ("orientation", "phase"),
            "orientation elevation log_wavelength log_sigma log_aspect_ratio amplitude phase "
            "center",
        ),
    ],
)
def test_raw_names_are_those_of_checkpoints(n_dims, name, learn, expected):
    coordinates = Coordinates.named(name, n_dims=n_dims, learn=learn)
    assert list(coordinates.raw_fields()) == expected.split()


def test_raw_values_are_what_their_names_say():
    one = Gabor2d.of(orientation=0.5, wavelength=4.0, sigma=2.0, phase=0.3, amplitude=1.5)
    raw = Coordinates.named("wavevector", n_dims=2).to_raw(one)
    k = 2 * math.pi / 4.0
    torch.testing.assert_close(
        raw["angular_wave_vector"], torch.tensor([k * math.cos(0.5), k * math.sin(0.5)])
    )
    torch.testing.assert_close(raw["log_sigma"], torch.tensor(math.log(2.0)))
    torch.testing.assert_close(raw["even"], torch.tensor(1.5 * math.cos(0.3)))
    torch.testing.assert_close(raw["odd"], torch.tensor(1.5 * math.sin(0.3)))

    raw = Coordinates.named("textbook", n_dims=2).to_raw(one)
    assert (raw["orientation"].item(), raw["phase"].item()) == pytest.approx((0.5, 0.3))
    torch.testing.assert_close(raw["log_wavelength"], torch.tensor(math.log(4.0)))


def test_a_group_is_joint_only_when_its_fields_learn_together():
    def groups(*learn: str) -> tuple[bool, bool]:
        one = Coordinates.named("wavevector", n_dims=2, learn=learn)
        return one.joint_wave, one.joint_phase

    assert groups("orientation", "wavelength", "amplitude", "phase") == (True, True)
    assert groups("sigma") == (True, True)
    assert groups("orientation", "phase") == (False, False)
    assert groups("wavelength", "amplitude", "phase") == (False, True)
    assert groups("orientation", "wavelength", "amplitude") == (True, False)


# -- laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_wavelength", [None, 2.0])
def test_what_is_stored_comes_back(min_wavelength):
    for coordinates in every_coordinates(min_wavelength):
        params = some_gabors(coordinates.n_dims)
        back = coordinates.from_raw(coordinates.to_raw(params))
        for name, value in params.as_dict().items():
            assert getattr(back, name).shape == value.shape, (coordinates, name)
            torch.testing.assert_close(getattr(back, name), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("min_wavelength", [None, 2.0])
def test_the_waveform_is_that_of_the_record(min_wavelength):
    for coordinates in every_coordinates(min_wavelength):
        params = some_gabors(coordinates.n_dims)
        sampled = kernels_of(coordinates, coordinates.to_raw(params))
        expected = gabor(params, (5,) * coordinates.n_dims)
        torch.testing.assert_close(sampled, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("record", [Gabor1d, Gabor2d, Gabor3d])
@pytest.mark.parametrize("name", NAMES)
def test_a_blob_is_stored_and_keeps_its_axis(record, name):
    angles = {"orientation": 0.7, "elevation": -0.4}
    blob = record.of(
        wavelength=math.inf,
        sigma=2.0,
        dtype=torch.float64,
        **{angle: angles[angle] for angle in record.angle_names},
        **({"aspect_ratio": 0.5} if record.n_dims > 1 else {}),
    )
    coordinates = Coordinates.named(name, n_dims=record.n_dims)
    raw = coordinates.to_raw(blob)
    back = coordinates.from_raw(raw)
    # A wave of 1e10 px: no kernel is large enough to see it.
    assert back.wavelength.item() >= 0.99e10
    for angle in record.angle_names:
        assert getattr(back, angle).item() == pytest.approx(angles[angle])
    expected = gabor(blob, (5,) * record.n_dims)
    torch.testing.assert_close(kernels_of(coordinates, raw), expected, rtol=0, atol=1e-8)


def test_a_wave_vector_of_zero_is_a_blob_along_x():
    coordinates = Coordinates.named("wavevector", n_dims=2)
    raw = coordinates.to_raw(Gabor2d.of(wavelength=5.0, sigma=1.0, aspect_ratio=0.5))
    raw["angular_wave_vector"] = torch.zeros(2)
    params = coordinates.from_raw(raw)
    assert params.wavelength.item() == math.inf
    assert params.orientation.item() == 0.0
    torch.testing.assert_close(kernels_of(coordinates, raw), gabor(params, (5, 5)))


# -- the bound on wavelengths -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("min_wavelength", [2.0, 2.3, 3.7])
def test_no_raw_value_means_a_wavelength_below_the_bound(dtype, min_wavelength):
    for coordinates in every_coordinates(min_wavelength):
        raw = coordinates.to_raw(some_gabors(coordinates.n_dims, n_filters=500).to(dtype))
        name = "angular_wave_vector" if coordinates.joint_wave else "log_wavelength"
        size = torch.logspace(-6, 6, 500, dtype=dtype)[:, None]
        raw[name] = raw[name] * (size[..., None] if coordinates.joint_wave else size)
        params = coordinates.from_raw(raw)
        assert (params.wavelength >= min_wavelength).all()
        k = coordinates.waveform(raw).wave_vector
        assert (torch.linalg.vector_norm(k, dim=-1) <= 1 / min_wavelength).all()


def test_the_bound_itself_can_be_stored():
    for coordinates in every_coordinates(2.0):
        params = some_gabors(coordinates.n_dims)
        params = params.replace(wavelength=torch.full_like(params.wavelength, 2.0))
        back = coordinates.from_raw(coordinates.to_raw(params))
        torch.testing.assert_close(back.wavelength, params.wavelength, rtol=1e-5, atol=0)


# -- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("min_wavelength", [None, 2.0])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_dims", DIMENSIONS)
def test_kernels_have_the_right_gradient(n_dims, name, min_wavelength):
    coordinates = Coordinates.named(name, n_dims=n_dims, min_wavelength=min_wavelength)
    raw = requiring_grad(coordinates.to_raw(some_gabors(n_dims, 2, 2)))

    def sample(*values: torch.Tensor) -> torch.Tensor:
        wave = coordinates.waveform(dict(zip(raw, values, strict=True)))
        return combine(*even_odd(wave, (3,) * n_dims), wave)

    assert torch.autograd.gradcheck(sample, tuple(raw.values()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_dims", DIMENSIONS)
def test_the_record_has_the_right_gradient(n_dims, name):
    coordinates = Coordinates.named(name, n_dims=n_dims)
    raw = requiring_grad(coordinates.to_raw(some_gabors(n_dims, 2, 2)))

    def fields(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        record = coordinates.from_raw(dict(zip(raw, values, strict=True)))
        return tuple(record.as_dict().values())

    assert torch.autograd.gradcheck(fields, tuple(raw.values()))


def test_gradients_at_the_singular_points_are_finite():
    for coordinates in every_coordinates():
        params = some_gabors(coordinates.n_dims)
        params = params.replace(
            amplitude=torch.zeros_like(params.amplitude),
            wavelength=torch.full_like(params.wavelength, math.inf),
        )
        raw = coordinates.to_raw(params)
        if coordinates.joint_wave:
            raw["angular_wave_vector"].zero_()
        raw = requiring_grad(raw)
        kernels_of(coordinates, raw).sum().backward()
        for name, value in raw.items():
            assert value.grad.isfinite().all(), (coordinates, name)
        # A silent filter can be heard again.
        assert (raw["even" if coordinates.joint_phase else "amplitude"].grad != 0).all()

        record = coordinates.from_raw(raw)
        readable = [v.sum() for v in record.as_dict().values() if v.isfinite().all()]
        readable.append(record.frequency.sum())
        for gradient in torch.autograd.grad(sum(readable), list(raw.values()), allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


# -- runaway values -----------------------------------------------------------------------------


@pytest.mark.parametrize("min_wavelength", [None, 2.0])
@pytest.mark.parametrize("size", [1e4, 1e30, math.inf])
def test_any_raw_value_means_a_legal_record_and_a_finite_kernel(size, min_wavelength):
    for coordinates in every_coordinates(min_wavelength):
        raw = coordinates.to_raw(some_gabors(coordinates.n_dims, 200).to(torch.float32))
        signs = {name: torch.randint_like(value, 3) - 1 for name, value in raw.items()}
        raw = {name: torch.where(sign == 0, raw[name], sign * size) for name, sign in signs.items()}
        raw = requiring_grad(raw)
        params = coordinates.from_raw(raw)
        params.check()
        kernels = kernels_of(coordinates, raw)
        assert kernels.isfinite().all()
        (kernels * torch.randn_like(kernels)).sum().backward()
        for name, value in raw.items():
            assert value.grad.isfinite().all(), (coordinates, name)


# -- errors -------------------------------------------------------------------------------------


def test_unknown_coordinates_are_refused():
    with pytest.raises(ValueError, match=r"coordinates .*'textbook' or 'wavevector'.*'polar'"):
        Coordinates.named("polar", n_dims=2)


@pytest.mark.parametrize("bad", [0.0, -2.0, math.nan])
def test_a_bound_must_be_positive(bad):
    with pytest.raises(ValueError, match="min_wavelength must be positive"):
        Coordinates.named("textbook", n_dims=2, min_wavelength=bad)
