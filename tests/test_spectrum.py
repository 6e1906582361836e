"""Spectra against the transform of sampled kernels, bandwidth, and the response to a constant."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gaborium import (
    Gabor1d,
    Gabor2d,
    Gabor3d,
    bandwidth_from_sigma,
    dc_response,
    gabor,
    gabor_spectrum,
    quadrature_pair,
    sigma_from_bandwidth,
)
from gaborium.params import Gabor

RECORDS = (Gabor1d, Gabor2d, Gabor3d)
F64 = torch.float64
PI = math.pi


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


# -- spectrum -------------------------------------------------------------------------------


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
