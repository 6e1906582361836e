"""Parameters of Gabor functions under other libraries' names, to and from ``Gabor2d`` records.

``to_...(params)`` takes one Gabor function with ``center`` 0 and gives the library's arguments and
a scale: ``gabor(params, size)`` is the real part of ``scale * kernel``, where ``kernel`` is what
the library makes of the arguments. The scale holds the amplitude, the normalisation and, where a
library has no phase, the phase. ``from_...`` goes the other way: the record's kernel is the real
part of the library's. It takes numbers and tensors, which broadcast and keep their graph; ``dtype``
is by default that of the first floating tensor, or torch's default.

A kernel's size is no parameter of a Gabor function: ``n_stds`` and ``ksize`` stay with the caller.
The kernels agree as arrays, but their uses differ: ``torch.nn.Conv2d`` and ``cv2.filter2D``
correlate, ``skimage.filters.gabor`` and ``scipy.ndimage.convolve`` convolve.

Reference:
    - https://scikit-image.org/docs/stable/api/skimage.filters.html
    - https://docs.opencv.org/5.x/d4/d86/group__imgproc__filter.html
    - https://www.mathworks.com/help/images/ref/gabor.html
"""

from __future__ import annotations

import cmath
import math
from typing import Any

import torch

from gaborium.functions.kernels import sigma_from_bandwidth
from gaborium.functions.params import Gabor2d, Number, as_tensors

# σ/λ at which the spectrum's peak is infinitely many octaves wide at half height.
_HALF_HEIGHT = math.sqrt(math.log(2) / 2) / math.pi


def to_skimage(params: Gabor2d) -> tuple[dict[str, float], float]:
    """Arguments of ``skimage.filters.gabor_kernel`` for one Gabor function, and a scale.

    Convention:
        - ``theta`` and ``offset`` are our orientation and phase; ``frequency`` is 1/λ
        - ``sigma_x`` is the width along the wave vector (not along x), ``sigma_y`` the width along
          the stripes; as both are given, ``bandwidth`` is not used
        - the kernel is complex, its magnitudes sum to about 1, and its odd size depends on
          ``theta``; the scale is ``A 2π σ²/γ``

    Args:
        params: one Gabor function; ``center`` must be zero.

    Returns:
        ``frequency`` (cycles/px), ``theta`` (rad), ``sigma_x``, ``sigma_y`` (px), ``offset`` (rad);
        and the number that turns scikit-image's kernel into ours.

    Raises:
        TypeError, ValueError: ``params`` is not one centred ``Gabor2d``.

    Example:
        >>> edge = Gabor2d.of(orientation=0.5, wavelength=8.0, sigma=3.0, aspect_ratio=0.5)
        >>> arguments, scale = to_skimage(edge)
        >>> arguments, round(scale, 3)
        ({'frequency': 0.125, 'theta': 0.5, 'sigma_x': 3.0, 'sigma_y': 6.0, 'offset': 0.0}, 113.097)
    """
    one = _only(params, "scikit-image")
    arguments = {
        "frequency": 1 / one["wavelength"],
        "theta": one["orientation"],
        "sigma_x": one["sigma"],
        "sigma_y": one["sigma"] / one["aspect_ratio"],
        "offset": one["phase"],
    }
    return arguments, one["amplitude"] * 2 * math.pi * one["sigma"] ** 2 / one["aspect_ratio"]


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
        - a width that is not given, ``sigma_y`` too, is the width along the wave vector for
          ``bandwidth``: by default envelopes are round
        - the amplitude is scikit-image's normalisation, ``1 / (2π sigma_x sigma_y)``

    Args:
        frequency: cycles/px, ≥ 0; 0 is a blob and needs both widths.
        theta: rad.
        bandwidth: octaves at half height, > 0.
        sigma_x: px along the wave vector, > 0.
        sigma_y: px along the stripes, > 0.
        offset: phase, rad.
        dtype: floating type.

    Returns:
        Records of the arguments' common batch shape.

    Raises:
        ValueError: the record that they mean has a field outside its range.

    Example:
        >>> octave = from_skimage(frequency=0.1)
        >>> round(octave.wavelength.item(), 3), round(octave.sigma.item(), 3)
        (10.0, 5.622)
    """
    given = {"frequency": frequency, "theta": theta, "bandwidth": bandwidth, "offset": offset}
    widths = {"sigma_x": sigma_x, "sigma_y": sigma_y}
    t = as_tensors(given | {n: v for n, v in widths.items() if v is not None}, dtype)
    wavelength = 1 / t["frequency"]
    if None in widths.values():
        if wavelength.isinf().any():
            raise ValueError("frequency 0 has no bandwidth: give both sigma_x and sigma_y.")
        width = sigma_from_bandwidth(t["bandwidth"], wavelength)
        t = {"sigma_x": width, "sigma_y": width} | t
    return Gabor2d.of(
        orientation=t["theta"],
        wavelength=wavelength,
        phase=t["offset"],
        sigma=t["sigma_x"],
        aspect_ratio=t["sigma_x"] / t["sigma_y"],
        amplitude=1 / (2 * math.pi * t["sigma_x"] * t["sigma_y"]),
    )


def to_opencv(params: Gabor2d) -> tuple[dict[str, float], float]:
    """Arguments of ``cv2.getGaborKernel`` for one Gabor function, all but the size, and a scale.

    Convention:
        - OpenCV stores the kernel turned by 180 degrees, which changes the phase's sign:
          ``psi = -phase``. The angle is ours
        - its kernels have peak 1, so the scale is the amplitude; ``ktype=cv2.CV_64F`` gives them
          in double precision
        - ``ksize`` is (width, height), and an even size gives a kernel one pixel larger

    Args:
        params: one Gabor function; ``center`` must be zero.

    Returns:
        ``sigma`` (px), ``theta`` (rad), ``lambd`` (px), ``gamma``, ``psi`` (rad); and the number
        that turns OpenCV's kernel into ours.

    Raises:
        TypeError, ValueError: ``params`` is not one centred ``Gabor2d``.

    Example:
        >>> edge = Gabor2d.of(orientation=0.5, wavelength=8.0, sigma=3.0, phase=0.25)
        >>> to_opencv(edge)
        ({'sigma': 3.0, 'theta': 0.5, 'lambd': 8.0, 'gamma': 1.0, 'psi': -0.25}, 1.0)
    """
    one = _only(params, "OpenCV")
    arguments = {
        "sigma": one["sigma"],
        "theta": one["orientation"],
        "lambd": one["wavelength"],
        "gamma": one["aspect_ratio"],
        "psi": -one["phase"],
    }
    return arguments, one["amplitude"]


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
        - the amplitude is 1: OpenCV does not normalise

    Args:
        sigma: px along the wave vector, > 0.
        theta: rad.
        lambd: wavelength, px, > 0; infinite for a blob.
        gamma: aspect ratio, > 0.
        psi: phase of the turned kernel, rad.
        dtype: floating type.

    Returns:
        Records of the arguments' common batch shape.

    Raises:
        ValueError: the record that they mean has a field outside its range.

    Example:
        >>> edge = from_opencv(sigma=3.0, theta=0.0, lambd=8.0, gamma=0.5)
        >>> round(edge.phase.item(), 4), edge.aspect_ratio.item()
        (-1.5708, 0.5)
    """
    given = {"orientation": theta, "wavelength": lambd, "sigma": sigma, "aspect_ratio": gamma}
    fields: dict[str, Any] = as_tensors(given | {"phase": psi}, dtype)
    return Gabor2d.of(**fields | {"phase": -fields["phase"]})


def to_matlab(params: Gabor2d) -> tuple[dict[str, float], complex]:
    """Arguments of MATLAB's ``gabor`` for one Gabor function, and a scale.

    Convention:
        - ``Orientation`` is in degrees and of opposite sign: it turns from +x away from +y, that is
          counter-clockwise on the screen, and is in [0, 360]
        - the width along the wave vector is stated as a bandwidth in octaves at half height
        - ``SpatialKernel`` is complex, of height 1 and phase 0, so the scale is ``A exp(iψ)``

    Args:
        params: one Gabor function; ``center`` must be zero.

    Returns:
        ``Wavelength`` (px), ``Orientation`` (degrees), ``SpatialFrequencyBandwidth`` (octaves),
        ``SpatialAspectRatio``, for ``gabor(Wavelength, Orientation, Name, Value, ...)``; and the
        complex number that turns ``SpatialKernel`` into our kernel and its quadrature partner.

    Raises:
        TypeError, ValueError: ``params`` is not one centred ``Gabor2d``; its wavelength is below
            2 px or infinite, which ``gabor`` refuses; or its sigma is at most 0.187 wavelengths,
            where no bandwidth exists.

    Example:
        >>> edge = Gabor2d.of(orientation=-0.5236, wavelength=10.0, sigma=5.622)
        >>> {name: round(value, 2) for name, value in to_matlab(edge)[0].items()}
        {'Wavelength': 10.0, 'Orientation': 30.0, 'SpatialFrequencyBandwidth': 1.0,
         'SpatialAspectRatio': 1.0}
    """
    one = _only(params, "MATLAB")
    wavelength, sigma = one["wavelength"], one["sigma"]
    if not 2 <= wavelength < math.inf:
        raise ValueError(f"MATLAB takes finite wavelengths of at least 2 px, got {wavelength:g}.")
    ratio = sigma / wavelength / _HALF_HEIGHT
    if ratio <= 1:
        raise ValueError(
            f"A bandwidth needs sigma / wavelength above {_HALF_HEIGHT:.3f}, got "
            f"{sigma / wavelength:.3g}."
        )
    arguments = {
        "Wavelength": wavelength,
        "Orientation": -math.degrees(one["orientation"]) % 360,
        # log2((r + 1) / (r - 1)), written so that a narrow band keeps its digits.
        "SpatialFrequencyBandwidth": math.log1p(2 / (ratio - 1)) / math.log(2),
        "SpatialAspectRatio": one["aspect_ratio"],
    }
    return arguments, cmath.rect(one["amplitude"], one["phase"])


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
        dtype: floating type.

    Returns:
        Records of the arguments' common batch shape.

    Raises:
        ValueError: the record that they mean has a field outside its range.

    Example:
        >>> edge = from_matlab(Wavelength=10.0, Orientation=30.0)
        >>> round(edge.orientation.item(), 4), round(edge.sigma.item(), 3)
        (-0.5236, 5.622)
    """
    given = {"wavelength": Wavelength, "angle": Orientation, "ratio": SpatialAspectRatio}
    t = as_tensors(given | {"octaves": SpatialFrequencyBandwidth}, dtype)
    return Gabor2d.of(
        orientation=-torch.deg2rad(t["angle"]),
        wavelength=t["wavelength"],
        sigma=sigma_from_bandwidth(t["octaves"], t["wavelength"]),
        aspect_ratio=t["ratio"],
    )


def _only(params: Gabor2d, library: str) -> dict[str, float]:
    """The fields of one centred Gabor function as numbers."""
    if not isinstance(params, Gabor2d):
        raise TypeError(f"{library} needs a Gabor2d, got {type(params).__name__}.")
    if params.batch_shape.numel() != 1:
        raise ValueError(
            f"{library} takes one Gabor function at a time, got {tuple(params.batch_shape)}."
        )
    params.check()
    fields = {name: v.detach().double().flatten() for name, v in params.as_dict().items()}
    center = fields.pop("center").tolist()
    if any(center):
        raise ValueError(f"{library} needs a center of 0, got {center} px; replace it by zeros.")
    return {name: value.item() for name, value in fields.items()}
