"""Conversions pinned by running the other libraries, or by their formula where none can run."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaborium import Gabor1d, Gabor2d, bandwidth_from_sigma, gabor, interop, sigma_from_bandwidth

RANDOM = settings(max_examples=25, deadline=None, derandomize=True)
# Values are below 1 and angles below 40 rad: a dozen roundings of each stay far below this.
EXACT = 1e-12


def number(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, width=64)


def records(**fields: st.SearchStrategy[float]) -> st.SearchStrategy[Gabor2d]:
    """Centred Gabor functions; a bandwidth exists for every one of them."""
    ranges = {
        "orientation": number(-7.0, 7.0),
        "wavelength": number(3.0, 20.0),
        "phase": number(-7.0, 7.0),
        "sigma": number(4.0, 8.0),
        "aspect_ratio": number(0.3, 3.0),
        "amplitude": number(-3.0, 3.0),
    } | fields
    return st.fixed_dictionaries(ranges).map(lambda row: Gabor2d.of(dtype=torch.float64, **row))


def kernel(params: Gabor2d, shape: tuple[int, ...]) -> np.ndarray:
    return gabor(params, shape).numpy()


def matlab_kernel(
    Wavelength: float,
    Orientation: float,
    SpatialFrequencyBandwidth: float = 1.0,
    SpatialAspectRatio: float = 0.5,
) -> np.ndarray:
    """Complex kernel as MATLAB's reference describes it, angles in degrees, rows downwards."""
    octaves = 2.0**SpatialFrequencyBandwidth
    sd = Wavelength / np.pi * np.sqrt(np.log(2) / 2) * (octaves + 1) / (octaves - 1)
    half = int(np.ceil(7 * max(sd, sd / SpatialAspectRatio)))
    row, column = np.mgrid[-half : half + 1, -half : half + 1]
    turn = np.exp(1j * np.deg2rad(Orientation))
    rotated = (column + 1j * row) * turn  # away from the rows' direction, so the sign is opposite
    along, across = rotated.real, rotated.imag
    exponent = -0.5 * (along**2 + (SpatialAspectRatio * across) ** 2) / sd**2
    return np.exp(exponent + 2j * np.pi * along / Wavelength)


# -- scikit-image ---------------------------------------------------------------------------


@RANDOM
@given(records())
def test_skimage_makes_the_same_kernel(params: Gabor2d) -> None:
    skimage = pytest.importorskip("skimage.filters")
    arguments, scale = interop.to_skimage(params)
    theirs = skimage.gabor_kernel(**arguments)
    ours = kernel(params, theirs.shape)
    np.testing.assert_allclose(scale * theirs.real, ours, rtol=0, atol=EXACT)


@RANDOM
@given(
    frequency=number(0.05, 0.4),
    theta=number(-7.0, 7.0),
    bandwidth=number(0.5, 3.0),
    sigma_x=st.none() | number(1.0, 8.0),
    sigma_y=st.none() | number(1.0, 8.0),
    offset=number(-7.0, 7.0),
)
def test_skimage_arguments_give_its_kernel(**arguments: Any) -> None:
    skimage = pytest.importorskip("skimage.filters")
    theirs = skimage.gabor_kernel(**arguments)
    ours = interop.from_skimage(**arguments, dtype=torch.float64)
    np.testing.assert_allclose(kernel(ours, theirs.shape), theirs.real, rtol=0, atol=EXACT)


def test_skimage_defaults_are_its_own() -> None:
    skimage = pytest.importorskip("skimage.filters")
    theirs = skimage.gabor_kernel(0.1)
    ours = interop.from_skimage(frequency=0.1, dtype=torch.float64)
    np.testing.assert_allclose(kernel(ours, theirs.shape), theirs.real, rtol=0, atol=EXACT)
    assert ours.sigma.item() == pytest.approx(5.622, abs=5e-4)  # one octave: σ = 0.5622 λ


def test_skimage_blob() -> None:
    skimage = pytest.importorskip("skimage.filters")
    blob = Gabor2d.of(wavelength=math.inf, sigma=2.0, aspect_ratio=0.5, dtype=torch.float64)
    arguments, scale = interop.to_skimage(blob)
    theirs = skimage.gabor_kernel(**arguments)
    ours = kernel(blob, theirs.shape)
    np.testing.assert_allclose(scale * theirs.real, ours, rtol=0, atol=EXACT)
    assert interop.from_skimage(**arguments).wavelength.isinf()


# -- OpenCV ---------------------------------------------------------------------------------


@RANDOM
@given(records(), st.integers(0, 12), st.integers(0, 12))
def test_opencv_makes_the_same_kernel(params: Gabor2d, up: int, right: int) -> None:
    cv2 = pytest.importorskip("cv2")
    height, width = 2 * up + 1, 2 * right + 1
    arguments, scale = interop.to_opencv(params)
    theirs = cv2.getGaborKernel((width, height), **arguments, ktype=cv2.CV_64F)
    ours = kernel(params, (height, width))
    np.testing.assert_allclose(scale * theirs, ours, rtol=0, atol=EXACT)


@RANDOM
@given(
    sigma=number(1.0, 8.0),
    theta=number(-7.0, 7.0),
    lambd=number(2.0, 20.0) | st.just(math.inf),
    gamma=number(0.3, 3.0),
    psi=number(-7.0, 7.0),
)
def test_opencv_arguments_give_its_kernel(**arguments: Any) -> None:
    cv2 = pytest.importorskip("cv2")
    theirs = cv2.getGaborKernel((15, 11), **arguments, ktype=cv2.CV_64F)
    ours = interop.from_opencv(**arguments, dtype=torch.float64)
    np.testing.assert_allclose(kernel(ours, (11, 15)), theirs, rtol=0, atol=EXACT)


def test_opencv_default_phase_is_its_own() -> None:
    cv2 = pytest.importorskip("cv2")
    arguments = {"sigma": 3.0, "theta": 0.4, "lambd": 8.0, "gamma": 0.5}
    theirs = cv2.getGaborKernel((15, 15), **arguments, ktype=cv2.CV_64F)
    ours = interop.from_opencv(**arguments, dtype=torch.float64)
    np.testing.assert_allclose(kernel(ours, (15, 15)), theirs, rtol=0, atol=EXACT)


def test_opencv_even_size_comes_out_one_larger() -> None:
    cv2 = pytest.importorskip("cv2")
    edge = Gabor2d.of(wavelength=8.0, sigma=3.0)
    assert cv2.getGaborKernel((20, 14), **interop.to_opencv(edge)[0]).shape == (15, 21)


# -- MATLAB ---------------------------------------------------------------------------------


@RANDOM
@given(records(sigma=number(4.0, 5.0), aspect_ratio=number(0.5, 2.0)))
def test_matlab_formula_makes_the_same_kernel(params: Gabor2d) -> None:
    arguments, scale = interop.to_matlab(params)
    theirs = matlab_kernel(**arguments)
    scaled = (scale * theirs).real
    # The grid reaches 14 sigma or 70 px: 2π·70/3 rad of argument cost three digits of 16.
    np.testing.assert_allclose(scaled, kernel(params, theirs.shape), rtol=0, atol=EXACT)


@RANDOM
@given(
    Wavelength=number(2.0, 10.0),
    Orientation=number(0.0, 360.0),
    SpatialFrequencyBandwidth=number(0.8, 3.0),
    SpatialAspectRatio=number(0.5, 2.0),
)
def test_matlab_arguments_give_its_kernel(**arguments: float) -> None:
    theirs = matlab_kernel(**arguments)
    ours = interop.from_matlab(**arguments, dtype=torch.float64)
    np.testing.assert_allclose(kernel(ours, theirs.shape), theirs.real, rtol=0, atol=EXACT)


def test_matlab_defaults() -> None:
    params = interop.from_matlab(Wavelength=10.0, Orientation=0.0, dtype=torch.float64)
    assert params.aspect_ratio.item() == 0.5
    assert bandwidth_from_sigma(params.sigma, params.wavelength).item() == pytest.approx(1.0)
    assert params.phase.item() == 0.0
    assert params.amplitude.item() == 1.0


def test_matlab_angle_is_in_degrees_and_turns_the_other_way() -> None:
    assert interop.from_matlab(
        Wavelength=10.0, Orientation=90.0, dtype=torch.float64
    ).orientation.item() == pytest.approx(-math.pi / 2)
    for angle in (-30.0, -1e-17, 0.0, 200.0, 1000.0):
        params = Gabor2d.of(
            orientation=math.radians(angle), wavelength=10.0, sigma=5.0, dtype=torch.float64
        )
        degrees = interop.to_matlab(params)[0]["Orientation"]
        assert 0 <= degrees <= 360  # all that MATLAB accepts
        assert math.cos(math.radians(degrees + angle)) == pytest.approx(1.0)


@pytest.mark.parametrize("octaves", [1e-6, 0.5, 1.0, 3.0, 10.0])
def test_matlab_bandwidth_is_that_of_the_kernels(octaves: float) -> None:
    wavelength = torch.tensor(10.0, dtype=torch.float64)
    params = interop.from_matlab(
        Wavelength=wavelength, Orientation=0.0, SpatialFrequencyBandwidth=octaves
    )
    expected = sigma_from_bandwidth(torch.tensor(octaves, dtype=torch.float64), wavelength)
    torch.testing.assert_close(params.sigma, expected, rtol=EXACT, atol=0)
    # A wide band hangs on the distance of sigma from its limit: 10 octaves lose three digits.
    back = interop.to_matlab(params)[0]["SpatialFrequencyBandwidth"]
    assert back == pytest.approx(octaves, rel=1e-11)


# -- all of them ----------------------------------------------------------------------------

LIBRARIES = ("skimage", "opencv", "matlab")


def functions(library: str) -> tuple[Any, Any]:
    return getattr(interop, f"to_{library}"), getattr(interop, f"from_{library}")


@pytest.mark.parametrize("library", LIBRARIES)
@RANDOM
@given(params=records())
def test_there_and_back_is_the_same_but_for_the_scale(library: str, params: Gabor2d) -> None:
    to, back = functions(library)
    arguments, scale = to(params)
    again = back(**arguments, dtype=torch.float64)
    factor = complex(scale) * again.amplitude.item()
    again = again.replace(
        amplitude=torch.tensor(abs(factor), dtype=torch.float64),
        phase=again.phase + math.atan2(factor.imag, factor.real),
    )
    # Gabor functions of amplitude 0 have no phase to come back.
    if params.amplitude.abs() > 1e-6:
        assert params.isclose(again, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gabor(again, 15), gabor(params, 15), rtol=0, atol=EXACT)


@pytest.mark.parametrize("library", LIBRARIES)
def test_arguments_are_plain_floats(library: str) -> None:
    params = Gabor2d.of(wavelength=8.0, sigma=[[3.0]], dtype=torch.float32)
    arguments, scale = functions(library)[0](params)
    assert all(type(value) is float for value in arguments.values())
    assert type(scale) in {float, complex}


@pytest.mark.parametrize("library", LIBRARIES)
def test_one_centred_gabor_function_at_a_time(library: str) -> None:
    single, to = Gabor2d.of(wavelength=8.0, sigma=3.0), functions(library)[0]
    with pytest.raises(ValueError, match=r"one Gabor function at a time.*\(2,\)"):
        to(Gabor2d.of(wavelength=8.0, sigma=[3.0, 4.0]))
    with pytest.raises(ValueError, match=r"one Gabor function at a time.*\(0,\)"):
        to(Gabor2d.of(wavelength=8.0, sigma=torch.zeros(0)))
    with pytest.raises(ValueError, match=r"center of 0, got \[0.5, 0.0\]"):
        to(single.replace(center=torch.tensor([0.5, 0.0])))
    with pytest.raises(TypeError, match="needs a Gabor2d, got Gabor1d"):
        to(Gabor1d.of(wavelength=8.0, sigma=3.0))
    with pytest.raises(ValueError, match="sigma must be positive"):
        to(single.replace(sigma=torch.tensor(math.nan)))


def test_matlab_refuses_what_it_cannot_say() -> None:
    with pytest.raises(ValueError, match=r"at least 2 px, got 1\.5"):
        interop.to_matlab(Gabor2d.of(wavelength=1.5, sigma=3.0))
    with pytest.raises(ValueError, match="at least 2 px, got inf"):
        interop.to_matlab(Gabor2d.of(wavelength=math.inf, sigma=3.0))
    with pytest.raises(ValueError, match=r"above 0\.187, got 0\.15"):
        interop.to_matlab(Gabor2d.of(wavelength=10.0, sigma=1.5))


SKIMAGE = {"frequency": 0.1, "sigma_x": 2.0, "sigma_y": 3.0}
OPENCV = {"sigma": 3.0, "theta": 0.0, "lambd": 8.0, "gamma": 0.5}
MATLAB = {"Wavelength": 8.0, "Orientation": 30.0}


@pytest.mark.parametrize(
    ("library", "arguments", "message"),
    [
        ("skimage", SKIMAGE | {"frequency": -0.1}, r"wavelength must be positive .* got -10"),
        ("skimage", SKIMAGE | {"sigma_x": 0.0}, r"sigma must be positive and finite \(px\)"),
        ("skimage", SKIMAGE | {"sigma_y": math.inf}, "aspect_ratio must be positive"),
        ("skimage", {"frequency": 0.1, "bandwidth": 0.0}, r"bandwidth .*octaves.* got 0"),
        ("skimage", {"frequency": 0.0, "sigma_x": 1.0}, "give both sigma_x and sigma_y"),
        ("opencv", OPENCV | {"lambd": 0.0}, r"wavelength must be positive \(px\), got 0"),
        ("opencv", OPENCV | {"gamma": -1.0}, "aspect_ratio must be positive"),
        ("opencv", OPENCV | {"sigma": math.nan}, "sigma must be positive .* got nan"),
        ("opencv", OPENCV | {"theta": math.nan}, "orientation must be finite"),
        ("matlab", MATLAB | {"Wavelength": math.inf}, "sigma must be positive and finite"),
        ("matlab", MATLAB | {"SpatialFrequencyBandwidth": -1.0}, "bandwidth must be positive"),
        ("matlab", MATLAB | {"SpatialAspectRatio": 0.0}, "aspect_ratio must be positive"),
    ],
)
def test_arguments_out_of_range_are_named(
    library: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        functions(library)[1](**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("library", "arguments"), [("skimage", SKIMAGE), ("opencv", OPENCV), ("matlab", MATLAB)]
)
def test_batches_keep_dtype_and_graph(library: str, arguments: dict[str, float]) -> None:
    back = functions(library)[1]
    rows = {
        name: torch.full((2, 1), value, dtype=torch.float64, requires_grad=True)
        for name, value in arguments.items()
    }
    rows["theta" if "theta" in inspect.signature(back).parameters else "Orientation"] = (
        torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    )
    params = back(**rows)
    assert params.batch_shape == (2, 3)
    assert params.dtype == torch.float64
    gabor(params, 5).sum().backward()
    assert all(row.grad is not None for row in rows.values() if row.requires_grad)
    one = back(**{name: row[(0,) * row.ndim].item() for name, row in rows.items()})
    assert one.dtype == torch.get_default_dtype()
    assert params[0, 0].to(one.dtype).isclose(one, atol=1e-6)
