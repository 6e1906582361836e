"""Records: what they refuse, what they call equal, and how they travel."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from gaborium import Gabor1d, Gabor2d, Gabor3d, gabor
from gaborium.functions.params import UNITS, Gabor, wrap

RECORDS = (Gabor1d, Gabor2d, Gabor3d)
F64 = torch.float64
PI = math.pi
# The floats around the ends of an orientation's and a phase's range, and some between.
EDGES = [0.0, -0.0, PI / 2, -PI / 2, PI, -PI, 2 * PI, -2 * PI, 3 * PI, 7 * PI]
EDGES += [math.nextafter(edge, way) for edge in EDGES for way in (-math.inf, math.inf)]
EDGES += [1e-20, -1e-20, 1e-9, -1e-9, 0.5, -2.0, 4.0, -12.0]


def edge_cases(kind: type[Gabor], dtype: torch.dtype) -> Gabor:
    """Every combination of edges of the angles, signs of the amplitude, stripes and blobs."""
    axes = dict.fromkeys((*kind.angle_names, "phase"), EDGES)
    if kind is Gabor3d:  # phases are turned in one way in all dimensions
        axes["phase"] = [PI, -12.0]
    axes |= {"amplitude": [1.5, -2.0, 0.0], "wavelength": [6.0, math.inf]}
    columns = torch.cartesian_prod(*[torch.tensor(axis, dtype=F64) for axis in axes.values()])
    fields: dict[str, Any] = dict(zip(axes, columns.unbind(-1), strict=True))
    if kind is not Gabor1d:
        fields["aspect_ratio"] = 0.5
    return kind.of(**fields, sigma=2.5, center=[0.3, -1.0, 0.7][: kind.n_dims]).to(dtype)


def bits(value: Tensor) -> Tensor:
    """The tensor's bytes: NaN, -0.0 and the last digit count."""
    return value.contiguous().view(torch.int64 if value.dtype == F64 else torch.int32)


def assert_identical(one: Gabor, other: Gabor) -> None:
    assert type(one) is type(other)
    for name, value in one.as_dict().items():
        there = other.as_dict()[name]
        assert value.dtype == there.dtype, name
        assert torch.equal(bits(value), bits(there)), name


# -- of and check ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RECORDS)
def test_defaults(kind: type[Gabor]) -> None:
    params = kind.of(wavelength=6.0, sigma=2.0)
    assert params.batch_shape == ()
    assert params.dtype == torch.get_default_dtype()
    for name, value in params.as_dict().items():
        expected = {"wavelength": 6.0, "sigma": 2.0, "aspect_ratio": 1.0, "amplitude": 1.0}
        assert (value == expected.get(name, 0.0)).all(), name
    assert params.center.shape == (kind.n_dims,)


def test_dtype_is_that_of_the_first_floating_tensor() -> None:
    whole = torch.tensor([3, 4])
    assert Gabor1d.of(wavelength=whole, sigma=2.0).dtype == torch.get_default_dtype()
    double = torch.tensor(2.0, dtype=F64)
    assert Gabor1d.of(wavelength=whole, sigma=double).dtype == F64
    assert Gabor1d.of(wavelength=6.0, sigma=double, dtype=torch.float32).dtype == torch.float32


def test_numbers_sequences_and_tensors_broadcast() -> None:
    params = Gabor2d.of(
        orientation=[[0.0], [1.0]],
        wavelength=6,
        sigma=torch.tensor([1.0, 2.0, 3.0], dtype=F64),
        center=[1.0, -1.0],
    )
    assert params.batch_shape == (2, 3)
    assert all(value.shape[:2] == (2, 3) for value in params.as_dict().values())
    assert params.center[1, 2].tolist() == [1.0, -1.0]
    assert params.dtype == F64


def test_tensors_keep_their_graph() -> None:
    sigma = torch.tensor(2.0, dtype=F64, requires_grad=True)
    params = Gabor1d.of(wavelength=6.0, sigma=sigma)
    params.sigma.square().backward()
    assert sigma.grad is not None
    assert sigma.grad.item() == 4.0
    assert not params.detach().sigma.requires_grad


GOOD: dict[str, Any] = {"wavelength": 6.0, "sigma": 2.0}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"sigma": 2.0}, TypeError, "Gabor2d.* missing .*'wavelength'"),
        ({"wavelength": 2.0}, TypeError, "Gabor2d.* missing .*'sigma'"),
        (GOOD | {"elevation": 0.0}, TypeError, "Gabor2d.* unexpected .*'elevation'"),
        (GOOD | {"sigma": 0.0}, ValueError, r"sigma must be positive.* \(px\), got 0\."),
        (GOOD | {"sigma": [1.0, -2.5]}, ValueError, r"sigma must be positive.* got -2\.5\."),
        (GOOD | {"sigma": math.inf}, ValueError, r"sigma must be .*finite \(px\), got inf\."),
        (GOOD | {"sigma": math.nan}, ValueError, r"sigma must be .*\(px\), got nan\."),
        (GOOD | {"wavelength": math.nan}, ValueError, r"wavelength must be .* got nan\."),
        (GOOD | {"wavelength": -math.inf}, ValueError, r"wavelength must be .* got -inf\."),
        (GOOD | {"aspect_ratio": -1.0}, ValueError, r"aspect_ratio must be positive.*\(1\)"),
        (GOOD | {"phase": math.inf}, ValueError, r"phase must be finite \(rad\), got inf\."),
        (GOOD | {"orientation": math.nan}, ValueError, "orientation must be finite"),
        (GOOD | {"amplitude": -math.inf}, ValueError, "amplitude must be finite"),
        (GOOD | {"center": [0.0, math.nan]}, ValueError, "center must be finite"),
        (GOOD | {"center": 0.0}, ValueError, r"center must end in an axis of 2 .*shape \(\)"),
        (GOOD | {"center": [0.0] * 3}, ValueError, r"axis of 2 .*shape \(3,\)"),
        (GOOD | {"sigma": [1.0, 2.0], "phase": [0.0] * 3}, ValueError, "must broadcast, got {'o"),
    ],
)
def test_of_says_what_is_wrong(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        Gabor2d.of(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, "wide", [[1.0], [1.0, 2.0]], object()])
def test_of_names_the_field_that_is_no_number(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="sigma must be numbers") as caught:
        Gabor2d.of(wavelength=6.0, sigma=value)
    assert "\n" not in str(caught.value)


def test_building_a_record_needs_tensors() -> None:
    with pytest.raises(TypeError, match=r"holds tensors, got float for wavelength; use Gabor1d.of"):
        Gabor1d(6.0, *[torch.zeros(1)] * 4)  # type: ignore[arg-type]


def test_a_blob_is_legal() -> None:
    assert Gabor1d.of(wavelength=math.inf, sigma=2.0).frequency == 0


def test_records_are_frozen() -> None:
    params = Gabor1d.of(wavelength=6.0, sigma=2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.sigma = torch.tensor(3.0)  # type: ignore[misc]


# -- batches --------------------------------------------------------------------------------


def test_geometry_is_shared_by_channels() -> None:
    torch.manual_seed(0)
    shared = Gabor2d(
        orientation=torch.rand(4, 1, dtype=F64),
        wavelength=torch.full((4, 1), 6.0, dtype=F64),
        phase=torch.rand(4, 3, dtype=F64),
        sigma=torch.tensor(2.0, dtype=F64),
        aspect_ratio=torch.ones(1, 1, dtype=F64),
        amplitude=torch.rand(4, 3, dtype=F64),
        center=torch.zeros(4, 1, 2, dtype=F64),
    )
    assert shared.batch_shape == (4, 3)
    assert len(shared) == 4
    whole = shared.expand()
    assert all(value.shape[:2] == (4, 3) for value in whole.as_dict().values())
    kernels = gabor(shared, (5, 7))
    assert kernels.shape == (4, 3, 5, 7)
    torch.testing.assert_close(kernels, gabor(whole, (5, 7)), rtol=0, atol=1e-15)
    torch.testing.assert_close(kernels[2, 1], gabor(shared[2, 1], (5, 7)), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        slice(1, 3),
        (0, 1),
        (slice(None), 1),
        (..., 0),
        (0, ...),
        None,
        torch.tensor([2, 0, 0]),
        torch.tensor([True, False, True]),
        (torch.tensor([0, 1]), torch.tensor([1, 0])),
    ],
)
def test_indexing_is_that_of_the_kernels(index: Any) -> None:
    torch.manual_seed(0)
    # Two channels in two dimensions: here an index that reached into center would go unnoticed.
    params = Gabor2d.of(
        orientation=torch.rand(3, 1, dtype=F64),
        wavelength=6.0,
        sigma=2.0,
        amplitude=torch.rand(3, 2),
        center=torch.randn(3, 1, 2),
    )
    kernels = gabor(params, 5).flatten(-2)
    expected = torch.stack([pixel[index] for pixel in kernels.unbind(-1)], -1)
    torch.testing.assert_close(gabor(params[index], 5).flatten(-2), expected, rtol=0, atol=1e-15)


def test_length_and_iteration() -> None:
    params = Gabor1d.of(wavelength=[4.0, 6.0, 8.0], sigma=2.0)
    assert len(params) == 3
    assert [one.wavelength.item() for one in params] == [4.0, 6.0, 8.0]
    with pytest.raises(TypeError, match="a single Gabor function"):
        len(params[0])
    with pytest.raises(IndexError):
        params[3]


def test_to_casts_every_field() -> None:
    params = Gabor3d.of(wavelength=6.0, sigma=2.0).to(F64)
    assert all(value.dtype == F64 for value in params.as_dict().values())
    assert params.device == torch.device("cpu")


def test_replace_takes_fields() -> None:
    params = Gabor1d.of(wavelength=6.0, sigma=2.0)
    assert params.replace(sigma=torch.tensor([3.0, 4.0])).batch_shape == (2,)
    with pytest.raises(TypeError):
        params.replace(width=torch.tensor(3.0))


# -- one kernel, many records ---------------------------------------------------------------


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_canonical_keeps_the_kernel(kind: type[Gabor], dtype: torch.dtype) -> None:
    params = edge_cases(kind, dtype)
    # Angles reach 7π, whose rounding is 16 eps; a turned wave moves by that much times 2π 5/6 px
    # of argument, times an amplitude of 2.
    tolerance = 300 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        gabor(params.canonical(), 5), gabor(params, 5), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_canonical_lies_in_its_ranges(kind: type[Gabor], dtype: torch.dtype) -> None:
    canonical = edge_cases(kind, dtype).canonical()
    pi = torch.tensor(PI, dtype=dtype)
    assert (canonical.amplitude >= 0).all()
    assert ((canonical.phase > -pi) & (canonical.phase <= pi)).all()
    if isinstance(canonical, Gabor2d):
        assert ((canonical.orientation >= 0) & (canonical.orientation < pi)).all()
    if isinstance(canonical, Gabor3d):
        assert ((canonical.elevation >= 0) & (canonical.elevation <= pi / 2)).all()
        assert (canonical.orientation.abs() <= pi).all()
        flat = canonical.elevation == 0
        assert flat.any()
        assert (canonical.orientation[flat] >= 0).all()
    blobs = canonical.phase[canonical.wavelength.isinf()]
    assert ((blobs == 0) | (blobs == pi)).all()


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_canonical_twice_is_canonical_once(kind: type[Gabor], dtype: torch.dtype) -> None:
    once = edge_cases(kind, dtype).canonical()
    twice = once.canonical()
    for name, value in once.as_dict().items():
        if kind is not Gabor3d or name not in kind.angle_names:
            assert torch.equal(twice.as_dict()[name], value), name
    # Through sines and back costs a rounding or two, and a pole has any orientation.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(twice.direction, once.direction, rtol=0, atol=tolerance)


def test_every_name_of_a_kernel_is_close() -> None:
    params = edge_cases(Gabor2d, F64)
    # Without stripes or without amplitude a Gabor function has no phase to compare.
    params = params[(params.amplitude != 0) & params.wavelength.isfinite()]
    turned = params.replace(orientation=params.orientation + PI, phase=-params.phase)
    negative = params.replace(amplitude=-params.amplitude, phase=params.phase - PI)
    around = params.replace(orientation=params.orientation - 2 * PI, phase=params.phase + 4 * PI)
    canonical = params.canonical()
    for other in (turned, negative, around, turned.canonical(), negative.canonical()):
        assert params.isclose(other, rtol=0, atol=1e-12).all()
        assert canonical.isclose(other, rtol=0, atol=1e-12).all()
        assert all((error.abs() < 1e-12).all() for error in params.difference(other).values())


@pytest.mark.parametrize("elevation", [0.0, 0.7, -0.7, PI / 2 - 1e-4])
@pytest.mark.parametrize("orientation", [0.5, -2.0, 3.0])
def test_opposite_waves_in_three_dimensions(orientation: float, elevation: float) -> None:
    fields = {"wavelength": 6.0, "sigma": 2.0, "aspect_ratio": 0.5, "dtype": F64}
    one = Gabor3d.of(orientation=orientation, elevation=elevation, phase=1.0, **fields)
    two = Gabor3d.of(orientation=orientation + PI, elevation=-elevation, phase=-1.0, **fields)
    torch.testing.assert_close(gabor(one, 7), gabor(two, 7), rtol=0, atol=1e-14)
    assert one.isclose(two, rtol=0, atol=1e-12)
    assert all((error.abs() < 1e-12).all() for error in one.difference(two).values())
    for name, value in one.canonical().as_dict().items():
        torch.testing.assert_close(two.canonical().as_dict()[name], value, rtol=0, atol=1e-11)


def test_canonical_keeps_a_steep_direction() -> None:
    steep = Gabor3d.of(orientation=0.3, elevation=PI / 2 - 1e-3, wavelength=6.0, sigma=2.0)
    # asin(sin ε) would lose half of the digits here.
    assert steep.canonical().elevation.item() == pytest.approx(PI / 2 - 1e-3, abs=5e-7)


def test_difference_is_signed_and_on_the_circle() -> None:
    one = Gabor2d.of(orientation=0.01, wavelength=6.0, sigma=2.0, phase=3.0, dtype=F64)
    two = Gabor2d.of(orientation=PI - 0.01, wavelength=5.0, sigma=2.5, phase=3.2, dtype=F64)
    error = one.difference(two)
    assert tuple(error) == Gabor2d.field_names()
    assert error["orientation"].item() == pytest.approx(0.02)
    assert error["wavelength"].item() == 1.0
    assert error["sigma"].item() == -0.5
    assert error["phase"].item() == pytest.approx(6.2 - 2 * PI)  # 3.0 against -3.2
    back = two.difference(one)
    for name in ("orientation", "wavelength", "sigma"):
        assert back[name].item() == pytest.approx(-error[name].item())


@pytest.mark.parametrize("name", Gabor3d.field_names())
def test_isclose_sees_every_field(name: str) -> None:
    params = Gabor3d.of(
        orientation=0.5, elevation=0.3, wavelength=6.0, sigma=2.0, phase=0.5, dtype=F64
    )
    value = params.as_dict()[name]
    assert params.isclose(params.replace(**{name: value + 1e-9}))
    assert not params.isclose(params.replace(**{name: value + 1e-3}))
    if name == "center":
        assert not params.isclose(params.replace(center=value + torch.tensor([0.0, 0.0, 1e-3])))


def test_isclose_answers_filter_by_filter() -> None:
    params = Gabor2d.of(orientation=[0.0, 1.0], wavelength=6.0, sigma=2.0)
    assert params.isclose(params[1]).tolist() == [False, True]


def test_blobs_are_close_when_their_kernels_are() -> None:
    blob = Gabor2d.of(wavelength=math.inf, sigma=2.0, amplitude=1.0, dtype=F64)
    same = Gabor2d.of(wavelength=math.inf, sigma=2.0, amplitude=-2.0, phase=2 * PI / 3, dtype=F64)
    torch.testing.assert_close(gabor(blob, 5), gabor(same, 5), rtol=0, atol=1e-15)
    assert blob.isclose(same)
    assert blob.difference(blob)["wavelength"].item() == 0.0
    stripes = blob.replace(wavelength=torch.tensor(1e9, dtype=F64))
    assert not blob.isclose(stripes)
    assert not stripes.isclose(blob)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_wrap_is_the_same_angle_in_half_open_range(dtype: torch.dtype) -> None:
    angles = torch.tensor([*EDGES, *torch.linspace(-30, 30, 101).tolist()], dtype=dtype)
    wrapped = wrap(angles)
    pi = torch.tensor(PI, dtype=dtype)
    assert ((wrapped >= -pi) & (wrapped < pi)).all()
    # An ulp of 30 rad is what the angle itself leaves open.
    torch.testing.assert_close(
        torch.polar(torch.ones_like(angles), wrapped),
        torch.polar(torch.ones_like(angles), angles),
        rtol=0,
        atol=64 * torch.finfo(dtype).eps,
    )
    inside = (angles >= -pi) & (angles < pi)
    assert torch.equal(wrapped[inside], angles[inside])


# -- JSON -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_json_keeps_every_bit(kind: type[Gabor], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    n = 200
    fields = {name: 10 * torch.randn(n, dtype=dtype) for name in (*kind.angle_names, "phase")}
    for name in {"wavelength", "sigma", "aspect_ratio", "amplitude"} & set(kind.field_names()):
        fields[name] = torch.exp(20 * torch.randn(n, dtype=dtype))  # of every magnitude
    fields["wavelength"][::7] = math.inf
    params = kind.of(**fields, center=torch.randn(n, kind.n_dims, dtype=dtype))
    assert_identical(params, kind.from_json(params.to_json()))
    edges = edge_cases(kind, dtype)[:500]
    assert_identical(edges, kind.from_json(edges.to_json()))


def test_json_keeps_shapes_and_extremes() -> None:
    tiny, huge = torch.finfo(F64).tiny, torch.finfo(F64).max
    params = Gabor2d.of(
        orientation=torch.tensor([[-0.0], [1e-320]], dtype=F64),
        wavelength=torch.tensor([[math.inf, tiny, huge]], dtype=F64),
        sigma=huge,
        amplitude=1 / 3,
    )
    assert_identical(params, Gabor2d.from_json(params.to_json(indent=1)))
    shared = params.replace(sigma=torch.tensor(2.0, dtype=F64))
    assert Gabor2d.from_json(shared.to_json()).sigma.shape == ()
    empty = Gabor2d.of(wavelength=torch.zeros(0), sigma=2.0)
    assert Gabor2d.from_json(empty.to_json()).batch_shape == (0,)
    half = Gabor1d.of(wavelength=6.0, sigma=1 / 3, dtype=torch.bfloat16)
    again = Gabor1d.from_json(half.to_json())
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.sigma, half.sigma)


def test_json_is_plain_and_says_its_units() -> None:
    document = json.loads(Gabor2d.of(wavelength=math.inf, sigma=2.0).to_json())
    assert document["type"] == "Gabor2d"
    assert document["version"] == 1
    assert document["dtype"] == "float32"
    assert document["units"] == {name: UNITS[name] for name in Gabor2d.field_names()}
    assert document["fields"]["wavelength"] == "inf"


def altered(**changes: Any) -> str:
    document = json.loads(Gabor1d.of(wavelength=6.0, sigma=2.0).to_json())
    fields = changes.pop("fields", {})
    return json.dumps(document | changes | {"fields": document["fields"] | fields})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ""),
        ("{", ""),
        ("[1, 2]", ""),
        ("null", ""),
        ("[" * 100_000, ""),
        (altered(type="Gabor2d"), "it is a 'Gabor2d' of version 1"),
        (altered(type=["Gabor1d"]), "it is a"),
        (altered(version=2), "version 2"),
        (altered(version=None), "version None"),
        (altered(dtype="int64"), "dtype is torch.int64"),
        (altered(dtype="load"), ""),
        (altered(dtype="complex64"), "dtype is torch.complex64"),
        (altered(dtype=None), ""),
        (altered().replace('"sigma": 2.0', '"width": 2.0'), "width"),
        (altered(fields={"extra": 1.0}), "extra"),
        (altered(fields={"sigma": "two"}), "could not convert string to float: 'two'"),
        (altered(fields={"sigma": None}), "not 'NoneType'"),
        (altered(fields={"sigma": {"a": 1}}), "not 'dict'"),
        (altered(fields={"sigma": [[1.0], 2.0]}), ""),
        (altered(fields={"sigma": [1.0, [2.0]]}), ""),
        (altered(fields={"sigma": 10**400}), ""),
        (altered().replace("2.0", "9" * 5000), ""),
        (altered(fields={"sigma": math.nan}), "sigma must be positive"),
        (altered(fields={"sigma": "nan"}), "sigma must be positive"),
        (altered(fields={"phase": math.inf}), "phase must be finite"),
        (altered(fields={"sigma": -1.0}), "sigma must be positive"),
        (altered(fields={"center": 0.0}), "center must end in an axis of 1"),
        (altered(fields={"sigma": [1, 2], "phase": [0, 0, 0]}), "must broadcast"),
        (altered(dtype="float32", fields={"sigma": 1e-60}), "sigma must be positive"),
    ],
)
def test_hostile_json_gets_one_line(text: str, message: str) -> None:
    expected = r"Expected the JSON of a Gabor1d \(version 1\): .*"
    with pytest.raises(ValueError, match=expected + re.escape(message)) as caught:
        Gabor1d.from_json(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
