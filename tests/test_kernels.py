"""Kernels: conventions, laws, derivatives and what happens at extreme values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gaborium import Gabor1d, Gabor2d, Gabor3d, gabor, gabor_jacobian, quadrature_pair
from gaborium.params import Gabor

RANDOM = settings(max_examples=15, deadline=None, derandomize=True)
RECORDS = (Gabor1d, Gabor2d, Gabor3d)
F64 = torch.float64
PI = math.pi
SIZES = {1: (9,), 2: (5, 8), 3: (3, 4, 5)}
# Kernels of height 3 at most: some ten roundings of the values and of arguments up to 20 rad.
ROUNDING = 1e-13


def number(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


RANGES = {
    "orientation": number(-7.0, 7.0),
    "elevation": number(-2.0, 2.0),
    "wavelength": number(2.5, 20.0),
    "phase": number(-7.0, 7.0),
    "sigma": number(0.7, 5.0),
    "aspect_ratio": number(0.3, 3.0),
    "amplitude": number(-3.0, 3.0),
}


def records(kind: type[Gabor]) -> st.SearchStrategy[Any]:
    """Random Gabor functions, off-centre too."""
    fields = {name: RANGES[name] for name in kind.field_names() if name != "center"}
    fields["center"] = st.tuples(*[number(-2.0, 2.0)] * kind.n_dims)
    return st.fixed_dictionaries(fields).map(lambda row: kind.of(dtype=F64, **row))


def assert_equal(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=ROUNDING)


# -- the formula, written out ---------------------------------------------------------------


@RANDOM
@given(records(Gabor2d))
def test_two_dimensions_are_the_textbook_formula(params: Gabor2d) -> None:
    theta, lam, psi = (
        getattr(params, name).item() for name in ("orientation", "wavelength", "phase")
    )
    sigma, gamma, height = (
        getattr(params, name).item() for name in ("sigma", "aspect_ratio", "amplitude")
    )
    x0, y0 = params.center.tolist()
    rows, columns = 6, 9
    expected = np.empty((rows, columns))
    for row, column in itertools.product(range(rows), range(columns)):
        x = column - (columns - 1) / 2 - x0
        y = row - (rows - 1) / 2 - y0
        xr = x * math.cos(theta) + y * math.sin(theta)
        yr = -x * math.sin(theta) + y * math.cos(theta)
        envelope = math.exp(-(xr**2 + gamma**2 * yr**2) / (2 * sigma**2))
        expected[row, column] = height * envelope * math.cos(2 * math.pi * xr / lam + psi)
    np.testing.assert_allclose(gabor(params, (rows, columns)), expected, rtol=0, atol=ROUNDING)


@RANDOM
@given(records(Gabor1d))
def test_one_dimension_is_the_textbook_formula(params: Gabor1d) -> None:
    x = np.arange(8) - 3.5 - params.center.item()
    expected = (
        params.amplitude.item()
        * np.exp(-(x**2) / (2 * params.sigma.item() ** 2))
        * np.cos(2 * np.pi * x / params.wavelength.item() + params.phase.item())
    )
    np.testing.assert_allclose(gabor(params, 8), expected, rtol=0, atol=ROUNDING)


@RANDOM
@given(records(Gabor3d))
def test_three_dimensions_are_the_textbook_formula(params: Gabor3d) -> None:
    z, y, x = np.mgrid[-1:2, -2:3, -3:4] - params.center.numpy()[::-1, None, None, None]
    theta, tilt = params.orientation.item(), params.elevation.item()
    shadow = x * np.cos(theta) + y * np.sin(theta)
    along = shadow * np.cos(tilt) + z * np.sin(tilt)
    # What is left of the squared distance lies across the wave, in two directions alike.
    across = x**2 + y**2 + z**2 - along**2
    envelope = np.exp(
        -(along**2 + params.aspect_ratio.item() ** 2 * across) / (2 * params.sigma.item() ** 2)
    )
    carrier = np.cos(2 * np.pi * along / params.wavelength.item() + params.phase.item())
    expected = params.amplitude.item() * envelope * carrier
    np.testing.assert_allclose(gabor(params, (3, 5, 7)), expected, rtol=0, atol=ROUNDING)


# -- conventions, line by line --------------------------------------------------------------


def test_axes_run_z_y_x() -> None:
    wide = {"wavelength": 5.0, "sigma": 1e9, "phase": 0.4, "dtype": F64}
    wave = gabor(Gabor1d.of(**wide), 7)
    assert_equal(gabor(Gabor2d.of(orientation=0.0, **wide), 7), wave.expand(7, 7))
    assert_equal(gabor(Gabor2d.of(orientation=PI / 2, **wide), 7), wave[:, None].expand(7, 7))
    volume = (7, 7, 7)
    along_x = gabor(Gabor3d.of(orientation=0.0, **wide), 7)
    along_y = gabor(Gabor3d.of(orientation=PI / 2, **wide), 7)
    along_z = gabor(Gabor3d.of(elevation=PI / 2, **wide), 7)
    assert_equal(along_x, wave.expand(volume))
    assert_equal(along_y, wave[:, None].expand(volume))
    assert_equal(along_z, wave[:, None, None].expand(volume))


def test_orientation_turns_from_right_to_down() -> None:
    # A rising sine: positive where the wave vector points, which is down and right.
    rising = Gabor2d.of(orientation=PI / 4, wavelength=8.0, sigma=2.0, phase=-PI / 2, dtype=F64)
    kernel = gabor(rising, 5)
    assert kernel[4, 4] > 0
    assert kernel[0, 0] < 0
    assert_equal(kernel.fliplr().diagonal(), torch.zeros(5, dtype=F64))


def test_even_sizes_are_centred_between_pixels() -> None:
    params = Gabor1d.of(wavelength=8.0, sigma=2.0, dtype=F64)
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=F64)
    assert_equal(gabor(params, 4), torch.exp(-(x**2) / 8) * torch.cos(2 * PI * x / 8))


def test_nothing_is_normalised() -> None:
    params = Gabor2d.of(
        wavelength=6.0, sigma=[0.5, 2.0, 9.0], phase=0.3, amplitude=[1.0, 2.5, -4.0], dtype=F64
    )
    assert_equal(gabor(params, 7)[:, 3, 3], params.amplitude * math.cos(0.3))


@pytest.mark.parametrize("kind", RECORDS)
def test_phase_is_that_at_the_envelopes_centre(kind: type[Gabor]) -> None:
    fields = {"wavelength": 5.0, "sigma": 1.5, "phase": 0.7, "dtype": F64}
    shift = [1.0, -2.0, 1.0][: kind.n_dims]
    middle, moved = gabor(kind.of(**fields), 5), gabor(kind.of(center=shift, **fields), 9)
    # Components x, y, z; axes z, y, x.
    window = tuple(slice(2 + int(step), 7 + int(step)) for step in reversed(shift))
    assert_equal(moved[window], middle)


def test_sigma_is_along_the_wave_and_aspect_ratio_shortens_the_stripes() -> None:
    flat = {"wavelength": math.inf, "sigma": 2.0, "aspect_ratio": 0.5, "dtype": F64}
    kernel = gabor(Gabor2d.of(orientation=PI / 2, **flat), 9)
    assert kernel[4 + 2, 4].item() == pytest.approx(math.exp(-0.5))  # one sigma down the wave
    assert kernel[4, 4 + 4].item() == pytest.approx(math.exp(-0.5))  # sigma / aspect_ratio across
    volume = gabor(Gabor3d.of(orientation=PI / 2, **flat), 9)
    assert volume[4, 4 + 2, 4].item() == pytest.approx(math.exp(-0.5))
    assert volume[4 + 4, 4, 4].item() == pytest.approx(math.exp(-0.5))
    assert volume[4, 4, 4 + 4].item() == pytest.approx(math.exp(-0.5))


def test_stripes_of_a_film_move_backwards_at_the_tangent_of_the_elevation() -> None:
    film = Gabor3d.of(
        orientation=0.0, elevation=math.atan(2.0), wavelength=5.0, sigma=1e9, phase=0.3, dtype=F64
    )
    frames = gabor(film, (3, 1, 9))[:, 0]
    # Two px per frame towards -x, that is: a frame later each value stands two px further left.
    assert_equal(frames[1:, :-2], frames[:-1, 2:])


# -- laws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RECORDS)
@RANDOM
@given(data=st.data())
def test_opposite_names_of_one_kernel(kind: type[Gabor], data: st.DataObject) -> None:
    params = data.draw(records(kind))
    kernel = gabor(params, 5)
    negative = params.replace(amplitude=-params.amplitude, phase=params.phase + PI)
    assert_equal(gabor(negative, 5), kernel)
    if kind is not Gabor1d:
        turned = params.replace(orientation=params.orientation + PI, phase=-params.phase)
        if kind is Gabor3d:
            turned = turned.replace(elevation=-params.elevation)
        assert_equal(gabor(turned, 5), kernel)


@RANDOM
@given(records(Gabor2d))
def test_images_turn_with_their_parameters(params: Gabor2d) -> None:
    kernel = gabor(params, (5, 7))
    x, y = params.center.unbind(-1)
    half_turn = params.replace(phase=-params.phase, center=-params.center)
    assert_equal(gabor(half_turn, (5, 7)), kernel.flip(0, 1))
    mirrored = params.replace(
        orientation=PI / 2 - params.orientation, center=torch.stack([y, x], -1)
    )
    assert_equal(gabor(mirrored, (7, 5)), kernel.T)
    quarter_turn = params.replace(
        orientation=params.orientation + PI / 2, center=torch.stack([-y, x], -1)
    )
    assert_equal(gabor(quarter_turn, (7, 5)), kernel.rot90(-1))


@RANDOM
@given(records(Gabor3d))
def test_a_level_volume_is_an_image_with_depth(params: Gabor3d) -> None:
    params = params.replace(elevation=torch.zeros_like(params.elevation))
    fields = params.as_dict()
    del fields["elevation"]
    image = Gabor2d(**fields | {"center": params.center[:2]})
    z = torch.arange(3, dtype=F64) - 1 - params.center[2]
    depth = torch.exp(-0.5 * (params.aspect_ratio * z / params.sigma) ** 2)
    assert_equal(gabor(params, (3, 4, 5)), depth[:, None, None] * gabor(image, (4, 5)))


@pytest.mark.parametrize("kind", RECORDS)
@RANDOM
@given(data=st.data())
def test_quadrature_pair_is_the_complex_gabor_function(
    kind: type[Gabor], data: st.DataObject
) -> None:
    params = data.draw(records(kind))
    even, odd = quadrature_pair(params, SIZES[kind.n_dims])
    assert_equal(even, gabor(params, SIZES[kind.n_dims]))
    behind = params.replace(phase=params.phase - PI / 2)
    assert_equal(odd, gabor(behind, SIZES[kind.n_dims]))
    envelope = gabor(
        params.replace(
            phase=torch.zeros_like(params.phase),
            wavelength=torch.full_like(params.wavelength, math.inf),
        ),
        SIZES[kind.n_dims],
    )
    assert_equal(torch.hypot(even, odd), envelope.abs())


# -- derivatives ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RECORDS)
@RANDOM
@given(data=st.data())
def test_jacobian_is_autograd_and_finite_differences(
    kind: type[Gabor], data: st.DataObject
) -> None:
    params = data.draw(records(kind))
    sizes = SIZES[kind.n_dims]
    closed = gabor_jacobian(params, sizes)
    assert tuple(closed) == kind.field_names()

    def kernel(*fields: Tensor) -> Tensor:
        return gabor(kind(*fields), sizes)

    values = tuple(params.as_dict().values())
    automatic = torch.autograd.functional.jacobian(kernel, values, vectorize=True)
    step = 1e-5  # errors of step² times a third derivative below 1e4, and of 1e-15 / step
    for i, name in enumerate(closed):
        ours, theirs = closed[name], automatic[i]
        if name == "center":
            theirs = theirs.movedim(-1, 0)
        assert ours.shape == theirs.shape, name
        torch.testing.assert_close(
            ours, theirs, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )

        def moved(by: Tensor, i: int = i) -> Tensor:
            return kernel(*values[:i], values[i] + by, *values[i + 1 :])

        steps = step * (
            torch.eye(kind.n_dims, dtype=F64) if name == "center" else torch.ones(1, dtype=F64)
        )
        numeric = torch.stack([(moved(by) - moved(-by)) / (2 * step) for by in steps])
        numeric = numeric if name == "center" else numeric[0]
        torch.testing.assert_close(
            ours, numeric, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_jacobian_of_shared_geometry_has_one_entry_per_kernel() -> None:
    torch.manual_seed(0)
    shared = Gabor2d(
        orientation=torch.rand(4, 1, dtype=F64),
        wavelength=torch.full((4, 1), 6.0, dtype=F64),
        phase=torch.rand(4, 3, dtype=F64),
        sigma=torch.tensor(2.0, dtype=F64),
        aspect_ratio=torch.ones(1, 1, dtype=F64),
        amplitude=torch.rand(4, 3, dtype=F64),
        center=torch.rand(4, 1, 2, dtype=F64),
    )
    closed = gabor_jacobian(shared, (5, 6))
    for name, value in gabor_jacobian(shared[2, 1], (5, 6)).items():
        expected = (4, 3, 2, 5, 6) if name == "center" else (4, 3, 5, 6)
        assert closed[name].shape == expected
        assert_equal(closed[name][2, 1], value)


def test_a_blob_has_derivatives() -> None:
    blob = Gabor2d.of(wavelength=math.inf, sigma=2.0, aspect_ratio=0.5, phase=0.3, dtype=F64)
    closed = gabor_jacobian(blob, 5)
    assert all(value.isfinite().all() for value in closed.values())
    assert (closed["wavelength"] == 0).all()
    assert (closed["sigma"] != 0).any()


# -- extreme values -------------------------------------------------------------------------

EXTREMES: dict[str, list[float]] = {
    "sigma": [1e-6, 1e-3, 1.0, 1e3, 1e6],
    "wavelength": [1e-3, 0.5, 6.0, 1e4, 1e9, math.inf],
    "amplitude": [0.0, -1e3],
    "phase": [0.0, 1e4],
    "aspect_ratio": [1e-3, 1.0, 1e3],
    "orientation": [0.0, PI / 2, -1e4],
    "elevation": [0.0, PI / 2, 0.3],
}


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_extreme_values_stay_finite(kind: type[Gabor], dtype: torch.dtype, size: int) -> None:
    names = [name for name in kind.field_names() if name != "center"]
    columns = torch.cartesian_prod(*[torch.tensor(EXTREMES[name], dtype=dtype) for name in names])
    fields = dict(zip(names, columns.unbind(-1), strict=True))
    fields["center"] = torch.zeros(len(columns), kind.n_dims, dtype=dtype)
    fields["center"][::2] = 0.5
    fields = {name: value.clone().requires_grad_() for name, value in fields.items()}
    kernels = gabor(kind(**fields), size)
    assert kernels.dtype == dtype
    assert kernels.isfinite().all()
    # Weights of both signs, so that no derivative is lost in a sum.
    torch.manual_seed(0)
    (kernels * torch.randn_like(kernels)).sum().backward()
    for name, value in fields.items():
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name
    for name, slopes in gabor_jacobian(kind(**fields).detach(), size).items():
        assert slopes.isfinite().all(), name


def test_tiny_and_huge_envelopes() -> None:
    point = gabor(Gabor2d.of(wavelength=6.0, sigma=1e-6, phase=0.5), 5)
    expected = torch.zeros(5, 5)
    expected[2, 2] = math.cos(0.5)
    torch.testing.assert_close(point, expected)
    wave = gabor(Gabor1d.of(wavelength=4.0, sigma=1e6), 5)
    torch.testing.assert_close(wave, torch.tensor([-1.0, 0.0, 1.0, 0.0, -1.0]), rtol=0, atol=1e-6)


# -- sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, (1, 1), (1, 6), (6, 1), (2, 3)])
def test_kernels_have_the_size_asked_for(size: int | tuple[int, int]) -> None:
    params = Gabor2d.of(orientation=[0.3, 0.4, 0.5], wavelength=6.0, sigma=2.0, dtype=F64)
    shape = (size, size) if isinstance(size, int) else size
    kernels = gabor(params, size)
    assert kernels.shape == (3, *shape)
    # Cut from the middle of a larger kernel whose pixels lie on the same grid.
    rows, columns = shape
    larger = gabor(params, (rows + 4, columns + 6))
    assert_equal(kernels, larger[:, 2 : 2 + rows, 3 : 3 + columns])
    assert gabor_jacobian(params, size)["center"].shape == (3, 2, *shape)
    assert quadrature_pair(params, size)[1].shape == (3, *shape)


@pytest.mark.parametrize("function", [gabor, quadrature_pair, gabor_jacobian])
@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((5,), "must be 2 numbers"),
        ((5, 5, 5), "must be 2 numbers"),
        (0, "must be positive whole numbers"),
        ((5, -1), "must be positive whole numbers"),
        ((5.0, 5.0), "must be positive whole numbers"),
    ],
)
def test_sizes_that_make_no_sense(function: Any, size: Any, message: str) -> None:
    params = Gabor2d.of(wavelength=6.0, sigma=2.0)
    with pytest.raises(ValueError, match=f"^kernel_size {message}.*got") as caught:
        function(params, size)
    assert "\n" not in str(caught.value)
