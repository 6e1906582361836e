"""Parameters of Gabor functions in other libraries' words, to and from ``Gabor2d`` records.

One rule holds for all of them: ``gabor(params, size)`` is the real part of ``scale * kernel``, with
the ``kernel`` that the library makes of ``to_...(params)`` and the number ``..._scale(params)``.
The scale carries what has no name there: amplitude, normalisation and, where a library knows
no phase, the phase. ``from_...`` goes the other way: the real part of the library's kernel is
``gabor`` of the record, so that the record's amplitude holds the library's normalisation.

A kernel's size is no parameter of a Gabor function: ``n_stds``, ``ksize`` and ``M, N`` stay with
the caller. The kernels agree as arrays; what is done with them differs: ``torch.nn.Conv2d`` and
``cv2.filter2D`` correlate, ``skimage.filters.gabor`` and ``scipy.ndimage.convolve`` convolve.
"""

from __future__ import annotations

import cmath
import math
from typing import NamedTuple

import torch
from torch import Tensor

from gaborium.params import Gabor2d, Number

# σ/λ at which the spectrum's peak is infinitely many octaves wide at half height.
_HALF_HEIGHT = math.sqrt(math.log(2) / 2) / math.pi
_KYMATIO_PI = 3.1415  # the value in its normalisation; π would miss its kernels by 3e-5


# -- scikit-image ---------------------------------------------------------------------------


def to_skimage(params: Gabor2d) -> dict[str, float]:
    """Arguments of ``skimage.filters.gabor_kernel`` for one Gabor function.

    Convention:
        - ``theta`` and ``offset`` are our orientation and phase; ``frequency`` is 1/λ
        - both widths are given, so that ``bandwidth`` has no say: ``sigma_x`` lies along the wave
          vector (not along x), ``sigma_y = sigma_x / aspect_ratio`` along the stripes
        - the kernel is complex, of sum of magnitudes near 1 and odd sizes that depend on ``theta``;
          ``skimage_scale(params)`` times its real part is ``gabor(params, kernel.shape)``

    Args:
        params: one Gabor function; ``center`` must be zero.

    Returns:
        ``frequency`` (cycles/px), ``theta`` (rad), ``sigma_x``, ``sigma_y`` (px), ``offset`` (rad).

    Raises:
        TypeError: ``params`` is not a ``Gabor2d``.
        ValueError: ``params`` holds more or less than one Gabor function, or is off-centre.

    Example:
        >>> edge = Gabor2d.of(orientation=0.5, wavelength=8.0, sigma=3.0, aspect_ratio=0.5)
        >>> to_skimage(edge)
        {'frequency': 0.125, 'theta': 0.5, 'sigma_x': 3.0, 'sigma_y': 6.0, 'offset': 0.0}

    Reference:
        https://scikit-image.org/docs/stable/api/skimage.filters.html
    """
    one = _only(params, "scikit-image")
    return {
        "frequency": 1 / one.wavelength,
        "theta": one.orientation,
        "sigma_x": one.sigma,
        "sigma_y": one.sigma / one.aspect_ratio,
        "offset": one.phase,
    }


def skimage_scale(params: Gabor2d) -> float:
    """The factor that turns scikit-image's kernel into ours: ``2π σ²/γ`` times the amplitude.

    Args:
        params: one Gabor function; ``center`` must be zero.

    Returns:
        The kernel's unit; ``gabor(params, kernel.shape)`` is the real part of it times ``kernel``.

    Raises:
        TypeError: ``params`` is not a ``Gabor2d``.
        ValueError: ``params`` holds more or less than one Gabor function, or is off-centre.

    Example:
        >>> edge = Gabor2d.of(wavelength=8.0, sigma=3.0, aspect_ratio=0.5, amplitude=2.0)
        >>> round(skimage_scale(edge), 3)
        226.195
    """
    one = _only(params, "scikit-image")
    return one.amplitude * 2 * math.pi * one.sigma**2 / one.aspect_ratio


def from_skimage(
    *,
    frequency: Number,
    theta: Number = 0.0,
    bandwidth: Number = 1.0,
    sigma_x: Number | None = None,
    sigma_y: Number | None = None,
    offset: Number = 0.0,
    dtype: torch.dtype | None = None,
) -> Gabor2d:
    """The Gabor functions whose kernels are the real parts of ``gabor_kernel(...)``.

    Convention:
        - a width that is given overrules ``bandwidth``; one that is absent has the value that
          ``bandwidth`` asks for along the wave vector, ``sigma_y`` too: by default envelopes are
          round
        - the amplitude is scikit-image's normalisation, ``1 / (2π sigma_x sigma_y)``

    Args:
        frequency: cycles/px, ≥ 0; 0 is a blob and needs both widths.
        theta: rad.
        bandwidth: octaves at half height, > 0.
        sigma_x: px along the wave vector, > 0.
        sigma_y: px along the stripes, > 0.
        offset: phase, rad.
        dtype: floating type; by default that of the first floating tensor, or torch's default.

    Returns:
        Records of the arguments' common batch shape. Tensors keep their graph.

    Raises:
        ValueError: an argument lies outside its range.

    Example:
        >>> octave = from_skimage(frequency=0.1)
        >>> round(octave.wavelength.item(), 3), round(octave.sigma.item(), 3)
        (10.0, 5.622)

    Reference:
        https://scikit-image.org/docs/stable/api/skimage.filters.html
    """
    tensors = _tensors(
        dtype,
        frequency=frequency,
        theta=theta,
        bandwidth=bandwidth,
        sigma_x=sigma_x,
        sigma_y=sigma_y,
        offset=offset,
    )
    wavelength = 1 / _positive(tensors, "frequency", "cycles/px", zero=True)
    if sigma_x is None or sigma_y is None:
        if wavelength.isinf().any():
            raise ValueError("frequency 0 has no bandwidth: give both sigma_x and sigma_y.")
        width = _sigma(_positive(tensors, "bandwidth", "octaves"), wavelength)
    along = width if sigma_x is None else _positive(tensors, "sigma_x", "px")
    across = width if sigma_y is None else _positive(tensors, "sigma_y", "px")
    return Gabor2d.of(
        orientation=tensors["theta"],
        wavelength=wavelength,
        phase=tensors["offset"],
        sigma=along,
        aspect_ratio=along / across,
        amplitude=1 / (2 * math.pi * along * across),
    )


# -- OpenCV ---------------------------------------------------------------------------------


def to_opencv(params: Gabor2d) -> dict[str, float]:
    """Arguments of ``cv2.getGaborKernel`` for one Gabor function, all but the size.

    Convention:
        - OpenCV stores the kernel turned by 180 degrees, which changes the phase's sign:
          ``psi = -phase``. The angle is ours
        - its kernels have peak 1: ``gabor(params, (height, width))`` is the amplitude times
          ``getGaborKernel((width, height), **to_opencv(params), ktype=cv2.CV_64F)``
        - ``ksize`` is (width, height), and an even size gives a kernel one pixel larger

    Args:
        params: one Gabor function; ``center`` must be zero.

    Returns:
        ``sigma`` (px), ``theta`` (rad), ``lambd`` (px), ``gamma``, ``psi`` (rad).

    Raises:
        TypeError: ``params`` is not a ``Gabor2d``.
        ValueError: ``params`` holds more or less than one Gabor function, or is off-centre.

    Example:
        >>> edge = Gabor2d.of(orientation=0.5, wavelength=8.0, sigma=3.0, phase=0.25)
        >>> to_opencv(edge)
        {'sigma': 3.0, 'theta': 0.5, 'lambd': 8.0, 'gamma': 1.0, 'psi': -0.25}

    Reference:
        https://docs.opencv.org/5.x/d4/d86/group__imgproc__filter.html
    """
    one = _only(params, "OpenCV")
    return {
        "sigma": one.sigma,
        "theta": one.orientation,
        "lambd": one.wavelength,
        "gamma": one.aspect_ratio,
        "psi": -one.phase,
    }


def opencv_scale(params: Gabor2d) -> float:
    """The factor that turns OpenCV's kernel into ours: the amplitude.

    Args:
        params: one Gabor function; ``center`` must be zero.

    Returns:
        The kernel's unit; ``gabor(params, kernel.shape)`` is it times ``kernel``.

    Raises:
        TypeError: ``params`` is not a ``Gabor2d``.
        ValueError: ``params`` holds more or less than one Gabor function, or is off-centre.

    Example:
        >>> opencv_scale(Gabor2d.of(wavelength=8.0, sigma=3.0, amplitude=-2.0))
        -2.0
    """
    return _only(params, "OpenCV").amplitude


def from_opencv(
    *,
    sigma: Number,
    theta: Number,
    lambd: Number,
    gamma: Number,
    psi: Number = math.pi / 2,
    dtype: torch.dtype | None = None,
) -> Gabor2d:
    """The Gabor functions whose kernels ``cv2.getGaborKernel(...)`` gives.

    Convention:
        - ``phase = -psi``; OpenCV's default ``psi = π/2`` is thus a sine that rises along ``theta``
        - the amplitude is 1, as OpenCV normalises nothing

    Args:
        sigma: px along the wave vector, > 0.
        theta: rad.
        lambd: wavelength, px, > 0; infinite for a blob.
        gamma: aspect ratio, > 0.
        psi: phase of the turned kernel, rad.
        dtype: floating type; by default that of the first floating tensor, or torch's default.

    Returns:
        Records of the arguments' common batch shape. Tensors keep their graph.

    Raises:
        ValueError: an argument lies outside its range.

    Example:
        >>> edge = from_opencv(sigma=3.0, theta=0.0, lambd=8.0, gamma=0.5)
        >>> round(edge.phase.item(), 4), edge.aspect_ratio.item()
        (-1.5708, 0.5)

    Reference:
        https://docs.opencv.org/5.x/d4/d86/group__imgproc__filter.html
    """
    tensors = _tensors(dtype, sigma=sigma, theta=theta, lambd=lambd, gamma=gamma, psi=psi)
    return Gabor2d.of(
        orientation=tensors["theta"],
        wavelength=_positive(tensors, "lambd", "px", infinite=True),
        phase=-tensors["psi"],
        sigma=_positive(tensors, "sigma", "px"),
        aspect_ratio=_positive(tensors, "gamma", "1"),
    )


# -- MATLAB ---------------------------------------------------------------------------------


def to_matlab(params: Gabor2d) -> dict[str, float]:
    """Arguments of MATLAB's ``gabor`` for one Gabor function.

    Convention:
        - ``Orientation`` is in degrees and of opposite sign: it turns from +x away from +y, that is
          counter-clockwise on the screen, and comes to lie in [0, 360]
        - the width along the wave vector is stated as a bandwidth in octaves at half height
        - ``SpatialKernel`` is complex, of height 1 and phase 0: ``gabor(params, size)`` is the real
          part of ``matlab_scale(params)`` times it

    Args:
        params: one Gabor function; ``center`` must be zero.

    Returns:
        ``Wavelength`` (px), ``Orientation`` (degrees), ``SpatialFrequencyBandwidth`` (octaves),
        ``SpatialAspectRatio``, for ``gabor(Wavelength, Orientation, Name, Value, ...)``.

    Raises:
        TypeError: ``params`` is not a ``Gabor2d``.
        ValueError: ``params`` holds more or less than one Gabor function, or is off-centre; its
            wavelength is below 2 px or infinite, which ``gabor`` refuses; or its sigma is below
            0.187 wavelengths, where no bandwidth exists.

    Example:
        >>> edge = Gabor2d.of(orientation=-0.5236, wavelength=10.0, sigma=5.622)
        >>> {name: round(value, 2) for name, value in to_matlab(edge).items()}
        {'Wavelength': 10.0, 'Orientation': 30.0, 'SpatialFrequencyBandwidth': 1.0,
         'SpatialAspectRatio': 1.0}

    Reference:
        https://www.mathworks.com/help/images/ref/gabor.html
    """
    one = _only(params, "MATLAB")
    if not 2 <= one.wavelength < math.inf:
        raise ValueError(
            f"MATLAB takes finite wavelengths of at least 2 px, got {one.wavelength:g}."
        )
    ratio = one.sigma / one.wavelength / _HALF_HEIGHT
    if ratio <= 1:
        raise ValueError(
            f"MATLAB states sigma by a bandwidth, which needs sigma / wavelength above "
            f"{_HALF_HEIGHT:.3f}, got {one.sigma / one.wavelength:.3g}."
        )
    return {
        "Wavelength": one.wavelength,
        "Orientation": -math.degrees(one.orientation) % 360,
        # log2((r + 1) / (r - 1)), written so that a narrow band keeps its digits.
        "SpatialFrequencyBandwidth": math.log1p(2 / (ratio - 1)) / math.log(2),
        "SpatialAspectRatio": one.aspect_ratio,
    }


def matlab_scale(params: Gabor2d) -> complex:
    """The factor that turns MATLAB's kernel into ours: amplitude times ``exp(i phase)``.

    Args:
        params: one Gabor function; ``center`` must be zero.

    Returns:
        The kernel's unit; ``gabor(params, size)`` is the real part of it times ``SpatialKernel``.

    Raises:
        TypeError: ``params`` is not a ``Gabor2d``.
        ValueError: ``params`` holds more or less than one Gabor function, or is off-centre.

    Example:
        >>> matlab_scale(Gabor2d.of(wavelength=8.0, sigma=5.0, amplitude=2.0))
        (2+0j)
    """
    one = _only(params, "MATLAB")
    return cmath.rect(one.amplitude, one.phase)


def from_matlab(
    *,
    Wavelength: Number,
    Orientation: Number,
    SpatialFrequencyBandwidth: Number = 1.0,
    SpatialAspectRatio: Number = 0.5,
    dtype: torch.dtype | None = None,
) -> Gabor2d:
    """The Gabor functions whose kernels are the real parts of ``gabor(...).SpatialKernel``.

    Convention:
        - ``orientation`` is minus ``Orientation``, in rad
        - phase 0, amplitude 1
        - tensors broadcast, where MATLAB combines all wavelengths with all orientations: give the
          one as ``(n, 1)`` and the other as ``(m,)`` for that

    Args:
        Wavelength: px, > 0.
        Orientation: degrees.
        SpatialFrequencyBandwidth: octaves at half height, > 0.
        SpatialAspectRatio: > 0.
        dtype: floating type; by default that of the first floating tensor, or torch's default.

    Returns:
        Records of the arguments' common batch shape. Tensors keep their graph.

    Raises:
        ValueError: an argument lies outside its range.

    Example:
        >>> edge = from_matlab(Wavelength=10.0, Orientation=30.0)
        >>> round(edge.orientation.item(), 4), round(edge.sigma.item(), 3)
        (-0.5236, 5.622)

    Reference:
        https://www.mathworks.com/help/images/ref/gabor.html
    """
    tensors = _tensors(
        dtype,
        Wavelength=Wavelength,
        Orientation=Orientation,
        SpatialFrequencyBandwidth=SpatialFrequencyBandwidth,
        SpatialAspectRatio=SpatialAspectRatio,
    )
    wavelength = _positive(tensors, "Wavelength", "px")
    bandwidth = _positive(tensors, "SpatialFrequencyBandwidth", "octaves")
    return Gabor2d.of(
        orientation=-torch.deg2rad(tensors["Orientation"]),
        wavelength=wavelength,
        sigma=_sigma(bandwidth, wavelength),
        aspect_ratio=_positive(tensors, "SpatialAspectRatio", "1"),
    )


# -- kymatio --------------------------------------------------------------------------------


def to_kymatio(params: Gabor2d) -> dict[str, float]:
    """Arguments of kymatio's ``gabor_2d`` for one Gabor function, all but ``M`` and ``N``.

    Convention:
        - ``theta = π/2 - orientation``: kymatio's first axis is the rows'
        - ``xi = 2π / wavelength`` is in rad/px; ``slant`` is our aspect ratio
        - the kernel is complex, periodic, with its middle at pixel (0, 0) and phase 0: for odd M
          and N that hold it, ``gabor(params, (M, N))`` is the real part of
          ``kymatio_scale(params)`` times ``numpy.fft.fftshift`` of it, to the single precision
          that kymatio computes in

    Args:
        params: one Gabor function; ``center`` must be zero.

    Returns:
        ``sigma`` (px), ``theta`` (rad), ``xi`` (rad/px), ``slant``.

    Raises:
        TypeError: ``params`` is not a ``Gabor2d``.
        ValueError: ``params`` holds more or less than one Gabor function, or is off-centre.

    Example:
        >>> edge = Gabor2d.of(orientation=0.0, wavelength=8.0, sigma=3.0, aspect_ratio=0.5)
        >>> {name: round(value, 4) for name, value in to_kymatio(edge).items()}
        {'sigma': 3.0, 'theta': 1.5708, 'xi': 0.7854, 'slant': 0.5}

    Reference:
        https://www.kymat.io, ``kymatio.scattering2d.filter_bank`` of release 0.3.0
    """
    one = _only(params, "kymatio")
    return {
        "sigma": one.sigma,
        "theta": math.pi / 2 - one.orientation,
        "xi": 2 * math.pi / one.wavelength,
        "slant": one.aspect_ratio,
    }


def kymatio_scale(params: Gabor2d) -> complex:
    """The factor that turns kymatio's kernel into ours: ``A exp(iψ) 2π σ²/γ``.

    Args:
        params: one Gabor function; ``center`` must be zero.

    Returns:
        The kernel's unit; ``gabor(params, (M, N))`` is the real part of it times the shifted
        kernel. The π in it is kymatio's, 3.1415.

    Raises:
        TypeError: ``params`` is not a ``Gabor2d``.
        ValueError: ``params`` holds more or less than one Gabor function, or is off-centre.

    Example:
        >>> kymatio_scale(Gabor2d.of(wavelength=8.0, sigma=1.0))
        (6.283+0j)
    """
    one = _only(params, "kymatio")
    return cmath.rect(one.amplitude, one.phase) * (
        2 * _KYMATIO_PI * one.sigma**2 / one.aspect_ratio
    )


def from_kymatio(
    *,
    sigma: Number,
    theta: Number,
    xi: Number,
    slant: Number = 1.0,
    dtype: torch.dtype | None = None,
) -> Gabor2d:
    """The Gabor functions whose kernels are the real parts of ``gabor_2d(M, N, ...)``.

    Convention:
        - ``orientation = π/2 - theta``, phase 0
        - the amplitude is kymatio's normalisation, ``slant / (2π sigma²)`` with its π of 3.1415
        - its ``morlet_2d`` subtracts a multiple of the envelope and is no Gabor function

    Args:
        sigma: px along the wave vector, > 0.
        theta: rad, from the rows' axis towards the columns'.
        xi: rad/px, ≥ 0; 0 is a blob.
        slant: aspect ratio, > 0.
        dtype: floating type; by default that of the first floating tensor, or torch's default.

    Returns:
        Records of the arguments' common batch shape. Tensors keep their graph.

    Raises:
        ValueError: an argument lies outside its range.

    Example:
        >>> edge = from_kymatio(sigma=3.0, theta=0.0, xi=0.7854)
        >>> round(edge.orientation.item(), 4), round(edge.wavelength.item(), 3)
        (1.5708, 8.0)

    Reference:
        https://www.kymat.io, ``kymatio.scattering2d.filter_bank`` of release 0.3.0
    """
    tensors = _tensors(dtype, sigma=sigma, theta=theta, xi=xi, slant=slant)
    width = _positive(tensors, "sigma", "px")
    slanted = _positive(tensors, "slant", "1")
    return Gabor2d.of(
        orientation=math.pi / 2 - tensors["theta"],
        wavelength=2 * math.pi / _positive(tensors, "xi", "rad/px", zero=True),
        sigma=width,
        aspect_ratio=slanted,
        amplitude=slanted / (2 * _KYMATIO_PI * width**2),
    )


# -- shared ---------------------------------------------------------------------------------


class _One(NamedTuple):
    """The fields of one centred Gabor function as numbers."""

    orientation: float
    wavelength: float
    phase: float
    sigma: float
    aspect_ratio: float
    amplitude: float


def _only(params: Gabor2d, library: str) -> _One:
    """The one Gabor function a record holds, if ``library`` can express where it lies."""
    if not isinstance(params, Gabor2d):
        raise TypeError(
            f"{library} has two-dimensional Gabor functions: expected a Gabor2d, "
            f"got {type(params).__name__}."
        )
    if params.batch_shape.numel() != 1:
        raise ValueError(
            f"{library} takes one Gabor function at a time, got a batch of shape "
            f"{tuple(params.batch_shape)}; index the record first."
        )
    params.check()
    x, y = params.center.detach().double().flatten().tolist()
    if x or y:
        raise ValueError(
            f"{library} has no off-centre Gabor functions, got center ({x:g}, {y:g}) px; replace "
            f"it by zeros to convert the rest."
        )
    fields = params.as_dict()
    return _One(*(fields[name].detach().double().item() for name in _One._fields))


def _tensors(dtype: torch.dtype | None, **values: Number | None) -> dict[str, Tensor]:
    """The values that are there, in one dtype on one device."""
    given = [value for value in values.values() if isinstance(value, Tensor)]
    floating = [value for value in given if value.is_floating_point()]
    dtype = dtype or (floating[0].dtype if floating else torch.get_default_dtype())
    device = given[0].device if given else None
    return {
        name: torch.as_tensor(value, dtype=dtype, device=device)
        for name, value in values.items()
        if value is not None
    }


def _positive(
    tensors: dict[str, Tensor],
    name: str,
    unit: str,
    *,
    zero: bool = False,
    infinite: bool = False,
) -> Tensor:
    """One of the values, if it is positive; the error speaks the caller's words."""
    value = tensors[name]
    good = (value >= 0 if zero else value > 0) & (infinite | value.isfinite())
    if not good.all():
        wanted = ("not negative" if zero else "positive") + ("" if infinite else " and finite")
        raise ValueError(f"{name} must be {wanted} ({unit}), got {value[~good][0].item():g}.")
    return value


def _sigma(bandwidth: Tensor, wavelength: Tensor) -> Tensor:
    """Standard deviation along the wave vector for a bandwidth in octaves at half height."""
    return _HALF_HEIGHT * wavelength / torch.tanh(bandwidth * (math.log(2) / 2))
