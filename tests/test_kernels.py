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

from gaborium import (
    Gabor1d,
    Gabor2d,
    Gabor3d,
    bandwidth_from_sigma,
    dc_response,
    gabor,
    gabor_jacobian,
    gabor_spectrum,
    quadrature_pair,
    sigma_from_bandwidth,
)
from gaborium.functions.params import Gabor

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


@pytest.mark.parametrize("kind", RECORDS)
@RANDOM
@given(data=st.data())
def test_all_dimensions_are_one_formula(kind: type[Gabor], data: st.DataObject) -> None:
    params = data.draw(records(kind))
    p = {name: value.tolist() for name, value in params.as_dict().items()}
    sizes = (3, 5, 7)[-kind.n_dims :]
    zyx = np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in sizes], indexing="ij")
    u = [axis - x0 for axis, x0 in zip(reversed(zyx), p["center"], strict=True)]
    theta, tilt = p.get("orientation", 0.0), p.get("elevation", 0.0)
    n = (math.cos(tilt) * math.cos(theta), math.cos(tilt) * math.sin(theta), math.sin(tilt))
    along = sum(a * b for a, b in zip(n[: kind.n_dims], u, strict=True))
    # The rest of the squared distance is across the wave, in all directions equally.
    across = sum(a**2 for a in u) - along**2
    exponent = (along**2 + p.get("aspect_ratio", 1.0) ** 2 * across) / (2 * p["sigma"] ** 2)
    carrier = np.cos(2 * np.pi * along / p["wavelength"] + p["phase"])
    expected = p["amplitude"] * np.exp(-exponent) * carrier
    np.testing.assert_allclose(gabor(params, sizes), expected, rtol=0, atol=ROUNDING)


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


# -- spectrum -------------------------------------------------------------------------------


def smooth_records(kind: type[Gabor], n: int) -> Gabor:
    """Random Gabor functions whose spectra fade before the band ends.

    Widths lie between 3 and 4 px and frequencies below 0.1: the nearest copy of the peak that
    sampling makes is 0.4 cycles/px beyond the band, where it has fallen to exp(-2π² 3² 0.4²) =
    5e-13.
    """
    torch.manual_seed(0)
    ranges = {
        "orientation": (-4.0, 4.0),
        "elevation": (-1.5, 1.5),
        "wavelength": (10.0, 30.0),
        "phase": (-4.0, 4.0),
        "sigma": (3.0, 3.4),
        "aspect_ratio": (0.85, 1.0),
        "amplitude": (-2.0, 2.0),
        "center": (-1.5, 1.5),
    }
    fields = {}
    for name in kind.field_names():
        low, high = ranges[name]
        shape = (n, kind.n_dims) if name == "center" else (n,)
        fields[name] = low + (high - low) * torch.rand(shape, dtype=F64)
    return kind.of(**fields)


def transform(kernels: Tensor, frequencies: Tensor) -> Tensor:
    """Fourier transform of sampled kernels around their middle, term by term."""
    sizes = kernels.shape[-frequencies.shape[-1] :]
    axes = [torch.arange(n, dtype=F64) - (n - 1) / 2 for n in sizes]
    zyx = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    angle = -2 * PI * frequencies.flip(-1) @ zyx.T
    values = kernels.flatten(-len(sizes)).to(torch.complex128)
    return values @ torch.polar(torch.ones_like(angle), angle).T


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("parity", [0, 1])
def test_spectrum_is_the_transform_of_the_sampled_kernel(kind: type[Gabor], parity: int) -> None:
    params = smooth_records(kind, 4)
    # 1.5 px off-centre, 30 px are 7.1 widths of 4 px: the kernel is cut at exp(-7.1²/2) = 1e-11.
    size = 60 + parity
    padded = {1: 256, 2: 128, 3: 64}[kind.n_dims]
    kernels = gabor(params, size)
    dims = tuple(range(-kind.n_dims, 0))
    axis = torch.fft.fftfreq(padded, dtype=F64)
    grid = torch.stack(torch.meshgrid(*[axis] * kind.n_dims, indexing="ij"), -1).flip(-1)
    # The transform starts at the first pixel; the spectrum is about the kernel's middle.
    shift = 2 * PI * grid.sum(-1) * (size - 1) / 2
    expected = torch.fft.fftn(kernels, s=(padded,) * kind.n_dims, dim=dims) * torch.polar(
        torch.ones_like(shift), shift
    )
    peak = expected.abs().amax(dims, keepdim=True)
    ours = gabor_spectrum(params, grid)
    torch.testing.assert_close(ours / peak, expected / peak, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", RECORDS)
def test_spectra_of_real_kernels_are_conjugate_symmetric(kind: type[Gabor]) -> None:
    params = smooth_records(kind, 5)
    frequencies = 0.3 * torch.randn(20, kind.n_dims, dtype=F64)
    there, back = gabor_spectrum(params, frequencies), gabor_spectrum(params, -frequencies)
    # The peak is (2π)^(d/2) times widths up to 4, some 10³ in 3-D.
    torch.testing.assert_close(back, there.conj(), rtol=0, atol=1e-12)


def test_the_peak_lies_at_the_wave_vector_and_shows_the_phase() -> None:
    params = Gabor2d.of(
        orientation=0.4, wavelength=8.0, sigma=12.0, phase=0.9, amplitude=2.0, dtype=F64
    )
    k = torch.tensor([math.cos(0.4), math.sin(0.4)], dtype=F64) / 8.0  # x, y
    peak = gabor_spectrum(params, k)
    # Half of amplitude and envelope's volume 2πσ²; the other half is 18 standard deviations away.
    assert peak.abs().item() == pytest.approx(0.5 * 2.0 * 2 * PI * 12.0**2)
    assert peak.angle().item() == pytest.approx(0.9)
    around = k + 0.01 * torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=F64)
    assert (gabor_spectrum(params, around).abs() < peak.abs()).all()


def test_aspect_ratio_widens_the_spectrum_along_the_stripes() -> None:
    params = Gabor2d.of(orientation=0.0, wavelength=6.0, sigma=4.0, aspect_ratio=0.5, dtype=F64)
    step = 1 / (2 * PI * 4.0)  # a standard deviation of the spectrum along the wave
    k = torch.tensor([1 / 6.0, 0.0], dtype=F64)
    offsets = torch.tensor([[0, 0], [step, 0], [0, step / 2]], dtype=F64)
    values = gabor_spectrum(params, k + offsets).abs()
    expected = torch.tensor([1.0, math.exp(-0.5), math.exp(-0.5)], dtype=F64)
    torch.testing.assert_close(values / values[0], expected, rtol=1e-9, atol=0)


def test_blobs_have_their_peak_at_zero() -> None:
    blob = Gabor2d.of(wavelength=math.inf, sigma=2.0, phase=0.5, dtype=F64)
    value = gabor_spectrum(blob, torch.zeros(2, dtype=F64))
    assert value.real.item() == pytest.approx(math.cos(0.5) * 2 * PI * 4.0)
    assert value.imag.item() == pytest.approx(0.0)


def test_shapes_of_batches_and_points() -> None:
    single = Gabor2d.of(wavelength=8.0, sigma=2.0)
    batch = Gabor2d.of(wavelength=[[8.0], [9.0], [10.0]], sigma=[2.0, 3.0])
    for params, shape in ((single, ()), (batch, (3, 2))):
        for points in ((), (5,), (4, 6), (0,)):
            assert gabor_spectrum(params, torch.zeros(*points, 2)).shape == shape + points
    assert gabor_spectrum(single, torch.zeros(2)).dtype == torch.complex64
    assert gabor_spectrum(single, torch.zeros(2, dtype=F64)).dtype == torch.complex64


@pytest.mark.parametrize("shape", [(), (3,), (2, 1)])
def test_frequencies_need_one_component_per_dimension(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"frequencies must end in an axis of 2 .*got shape \("):
        gabor_spectrum(Gabor2d.of(wavelength=8.0, sigma=2.0), torch.zeros(shape))


# -- bandwidth ------------------------------------------------------------------------------


def test_bandwidth_and_sigma_are_inverse() -> None:
    octaves = torch.logspace(-3, 1, 50, dtype=F64)
    sigma = sigma_from_bandwidth(octaves, 7.0)
    # At 10 octaves sigma is within 0.2 % of its limit, at 0.001 the ratio of frequencies is near
    # 1: both lose three digits.
    torch.testing.assert_close(bandwidth_from_sigma(sigma, 7.0), octaves, rtol=1e-12, atol=0)


def test_one_octave_is_a_sigma_of_0_5622_wavelengths() -> None:
    one = torch.tensor(1.0, dtype=F64)
    assert sigma_from_bandwidth(one, one).item() == pytest.approx(0.5622, abs=5e-5)
    textbook = math.sqrt(math.log(2) / 2) / PI * (2**1 + 1) / (2**1 - 1)
    assert sigma_from_bandwidth(one, one).item() == pytest.approx(textbook, rel=1e-14)


def test_below_a_sigma_of_0_187_wavelengths_the_bandwidth_is_infinite() -> None:
    limit = math.sqrt(math.log(2) / 2) / PI
    assert limit == pytest.approx(0.187, abs=5e-4)
    sigma = torch.tensor([0.05, limit * (1 - 1e-9), limit * (1 + 1e-9), 0.2], dtype=F64)
    assert bandwidth_from_sigma(sigma, 1.0).isinf().tolist() == [True, True, False, False]
    wide = sigma_from_bandwidth(torch.tensor([1e4, math.inf], dtype=F64), 1.0)
    torch.testing.assert_close(wide, torch.full((2,), limit, dtype=F64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("octaves", [0.5, 1.0, 1.7])
def test_bandwidth_is_that_at_half_height_of_the_spectrum(octaves: float) -> None:
    wavelength = 12.0
    sigma = sigma_from_bandwidth(torch.tensor(octaves, dtype=F64), wavelength)
    tone = Gabor1d.of(wavelength=wavelength, sigma=sigma, dtype=F64)
    # The pair as one complex kernel has the peak at 1/λ alone, not its mirror image at -1/λ.
    kernel = torch.complex(*quadrature_pair(tone, 401))

    def height(frequency: float) -> float:
        return transform(kernel, torch.tensor([[frequency]], dtype=F64)).abs().item()

    half = height(1 / wavelength) / 2

    def crossing(inside: float, outside: float) -> float:
        for _ in range(50):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if height(middle) > half else (inside, middle)
        return inside

    low, high = crossing(1 / wavelength, 0.0), crossing(1 / wavelength, 0.5)
    assert math.log2(high / low) == pytest.approx(octaves, abs=1e-6)


@pytest.mark.parametrize("function", [bandwidth_from_sigma, sigma_from_bandwidth])
def test_numbers_take_the_precision_of_tensors(function: Any) -> None:
    value, wavelength = 1.9, torch.tensor([7.3], dtype=F64)
    exact = function(torch.tensor(value, dtype=F64), wavelength)
    assert function(value, wavelength).dtype == F64
    assert torch.equal(function(value, wavelength), exact)
    other = function(torch.tensor([value], dtype=F64), 7.3)
    assert other.dtype == F64
    assert torch.equal(other, exact)
    assert function(value, 7.3).dtype == torch.get_default_dtype()
    assert function(2, 8).item() == pytest.approx(function(2.0, 8.0).item())


def test_gradients_of_bandwidth_are_finite() -> None:
    sigma = torch.tensor([0.1, 0.5], dtype=F64, requires_grad=True)
    octaves = bandwidth_from_sigma(sigma, 1.0)
    octaves[1].backward()
    assert sigma.grad is not None
    assert sigma.grad[0] == 0  # infinite for every sigma near this one
    assert sigma.grad[1] < 0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_bandwidth_must_be_positive(bad: float) -> None:
    with pytest.raises(ValueError, match=r"bandwidth must be positive \(octaves\), got") as caught:
        sigma_from_bandwidth(torch.tensor([1.0, bad], dtype=F64), 6.0)
    assert "\n" not in str(caught.value)


# -- response to a constant -----------------------------------------------------------------


@pytest.mark.parametrize("orientation", [0.0, 0.3, 2.0])
def test_dc_of_cosines_and_sines(orientation: float) -> None:
    fields = {"orientation": orientation, "sigma": 3.0, "dtype": F64}
    broad = Gabor2d.of(wavelength=10.0, **fields)
    narrow = Gabor2d.of(wavelength=6.0, **fields)
    # Where pixels fall on the stripes moves the sum of magnitudes by some percent.
    assert dc_response(broad, 31).item() == pytest.approx(0.27, abs=1e-2)
    assert dc_response(narrow, 31).item() == pytest.approx(0.011, abs=5e-4)
    sine = Gabor2d.of(wavelength=10.0, phase=PI / 2, **fields)
    assert dc_response(sine, 31).item() == pytest.approx(0.0, abs=1e-15)


def test_dc_has_the_sign_of_the_sum_and_is_one_for_blobs() -> None:
    blobs = Gabor2d.of(wavelength=math.inf, sigma=2.0, amplitude=[3.0, -0.1, 0.0], dtype=F64)
    expected = torch.tensor([1.0, -1.0, 0.0], dtype=F64)
    torch.testing.assert_close(dc_response(blobs, (9, 8)), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", RECORDS)
def test_dc_is_the_spectrum_at_zero(kind: type[Gabor]) -> None:
    params = smooth_records(kind, 4)
    size = gabor(params, 61).abs().flatten(1).sum(-1)
    total = gabor_spectrum(params, torch.zeros(kind.n_dims, dtype=F64)).real
    torch.testing.assert_close(dc_response(params, 61), total / size, rtol=0, atol=1e-10)
