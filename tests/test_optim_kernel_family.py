"""Questions about the family of kernels of a layer: its derivatives in closed form, its bounds."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from gaborium import GaborConv2d
from gaborium.functions.params import RECORDS
from gaborium.layers import LAYERS
from gaborium.optim.kernel_family import KernelFamily, kernel_jacobian

SIZES = {1: (5,), 2: (4, 3), 3: (3, 2, 3)}


def family_of(n_dims: int, **kwargs) -> KernelFamily:
    """Two filters over two channels."""
    kwargs = {"start": "random", "seed": 1, "dtype": torch.float64} | kwargs
    return KernelFamily(LAYERS[n_dims](2, 4, SIZES[n_dims], **kwargs))


def traced(family: KernelFamily, z: Tensor) -> Tensor:
    """The derivatives ``(filters, members, p, n)`` as autograd finds them."""
    # A filter's kernels depend on its own row alone: the sum over filters has all derivatives.
    whole = torch.autograd.functional.jacobian(
        lambda z: family.kernels(z).sum(0), z, vectorize=True
    )
    return whole.permute(2, 0, 3, 1)


def assert_derivatives_agree(family: KernelFamily, z: Tensor) -> None:
    slopes, expected = family.jacobian(z), traced(family, z)
    assert slopes.shape == expected.shape
    assert slopes.dtype == torch.float64
    # Both are exact but for rounding, which is of the size of 1e-16 of the largest number added.
    size = expected.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-9)
    torch.testing.assert_close(slopes / size, expected / size, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("unit_norm", [False, True], ids=["height", "norm"])
@pytest.mark.parametrize("dc", ["keep", "remove"])
@pytest.mark.parametrize("geometry", ["filter", "pair"])
@pytest.mark.parametrize("coordinates", ["textbook", "wavevector"])
@pytest.mark.parametrize("n_dims", [1, 2, 3])
def test_closed_form_is_what_autograd_finds(n_dims, coordinates, geometry, dc, unit_norm):
    fields = RECORDS[n_dims].field_names()
    for output, shortest, learn in (
        ("real", None, fields),
        ("quadrature", 2.0, fields),
        ("real", 2.0, ("wavelength", "sigma", "center")),
        ("quadrature", None, ("phase",)),
        ("real", 2.0, fields[:-1][::2]),
    ):
        family = family_of(
            n_dims,
            coordinates=coordinates,
            geometry=geometry,
            dc=dc,
            unit_norm=unit_norm,
            output=output,
            min_wavelength=shortest,
            learn=learn,
        )
        z = family.read()
        assert_derivatives_agree(family, z + 0.1 * torch.randn_like(z))


@pytest.mark.parametrize("unit_norm", [False, True], ids=["height", "norm"])
@pytest.mark.parametrize("dc", ["keep", "remove"])
@pytest.mark.parametrize("coordinates", ["textbook", "wavevector"])
@pytest.mark.parametrize("n_dims", [1, 2, 3])
def test_still_and_silent_filters_have_derivatives(n_dims, coordinates, dc, unit_norm):
    family = family_of(n_dims, coordinates=coordinates, dc=dc, unit_norm=unit_norm)
    if n_dims > 1:
        family.layer.log_aspect_ratio.data.sub_(0.4)  # else no direction matters
    # The first stands still, the second is silent, the third both.
    for name, filters in (
        ("angular_wave_vector", [0, 2]),
        ("log_wavelength", [0, 2]),
        ("even", [1, 2]),
        ("odd", [1, 2]),
        ("amplitude", [1, 2]),
    ):
        if name in family.names:
            getattr(family.layer, name).data[filters] = 23.0 if name == "log_wavelength" else 0.0
    z = family.read()
    slopes = family.jacobian(z)
    assert slopes.isfinite().all()
    expected = traced(family, z)
    # A blob less its envelope is nothing but rounding, and 1e6 times that at most if normalised.
    size = expected.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-3)
    noise = 1e-6 if unit_norm and dc == "remove" else 1e-9
    torch.testing.assert_close(slopes / size, expected / size, rtol=1e-8, atol=noise)


def test_values_out_of_bounds_have_no_derivative():
    family = family_of(2, learn=RECORDS[2].field_names())
    z = family.read()
    z[0] = 1e30
    slopes = family.jacobian(z)
    assert (slopes[0] == 0).all()
    assert (slopes[1].abs().sum((0, -1)) > 0).all()


def test_extreme_shapes_have_finite_derivatives():
    layer = GaborConv2d(2, 4, 5, learn=RECORDS[2].field_names(), unit_norm=True, dc="remove")
    family = KernelFamily(layer)
    for name, value in itertools.product(("log_sigma", "log_aspect_ratio"), (-30.0, -8.0, 8.0, 30)):
        with torch.no_grad():
            layer.reset_parameters()
            getattr(layer, name).fill_(value)
        assert family.jacobian(family.read()).isfinite().all(), (name, value)


def test_an_envelope_lost_between_pixels_is_not_blown_up():
    layer = GaborConv2d(2, 4, (4, 3), start="random", seed=1, unit_norm=True, dtype=torch.float64)
    layer.log_sigma.data.fill_(math.log(0.09))
    family = KernelFamily(layer)
    assert 0 < family.kernels(family.read()).norm(dim=-1).max() < 0.5
    assert_derivatives_agree(family, family.read())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"coordinates": "textbook"},
        {"geometry": "pair"},
        {"output": "energy", "dc": "remove"},
        {"unit_norm": True, "min_wavelength": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("n_dims", [1, 2, 3])
def test_derivatives_by_fields_are_differences_of_kernels(n_dims, kwargs):
    fields = RECORDS[n_dims].field_names()
    layer = family_of(n_dims, learn=fields, **kwargs).layer
    names, slopes = kernel_jacobian(layer)
    assert slopes.shape[2] == len(names) == len(set(names))
    params = layer.params.detach()

    def kernels_after(field: str, index: tuple, step: float) -> Tensor:
        value = getattr(params, field).clone()
        value[index] += step
        raw = layer.raw_coordinates.to_raw(params.replace(**{field: value}))
        return layer.kernels_at(raw).reshape(slopes.shape[0], slopes.shape[1], -1)

    for column, name in enumerate(names):
        field, _, channel = name.rstrip("]").partition("[")
        index = (slice(None), int(channel or 0))
        if field.startswith("center"):
            index, field = (*index, "xyz".index(field[-1])), "center"
        step = 1e-5
        change = kernels_after(field, index, step) - kernels_after(field, index, -step)
        # Central differences are wrong by the square of the step, and by rounding over it.
        torch.testing.assert_close(slopes[:, :, column], change / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("learn", [None, ("orientation", "phase"), ("center",)])
@pytest.mark.parametrize("coordinates", ["textbook", "wavevector"])
@pytest.mark.parametrize("n_dims", [1, 2, 3])
def test_rows_written_are_read(n_dims, coordinates, learn):
    if learn and "orientation" in learn and n_dims == 1:
        learn = ("wavelength",)
    family = family_of(n_dims, coordinates=coordinates, learn=learn)
    frozen = {name: value.clone() for name, value in family.layer.named_buffers()}
    z = family.read() + 0.25
    family.write(z)
    torch.testing.assert_close(family.read(), z, rtol=0, atol=0)
    kernels = family.kernels(family.read()).flatten()
    torch.testing.assert_close(kernels, family.layer.weight.flatten())
    again = family.rows(family.record(family.read()))
    moved = family.kernels(again) - family.kernels(family.read())
    assert moved.abs().max() < 1e-9
    for name, value in frozen.items():
        assert torch.equal(getattr(family.layer, name), value)


def test_parameters_that_require_no_gradient_have_no_column():
    family = family_of(2)
    n_before = family.read().shape[1]
    family.layer.log_sigma.requires_grad_(False)
    assert "log_sigma" not in family.names
    assert family.read().shape[1] == n_before - 1
    assert family.jacobian(family.read()).shape[2] == n_before - 1
    assert len(family.parameters()) == len(family.names) + 1


@pytest.mark.parametrize(
    ("field", "value", "legal"),
    [
        ("sigma", 2.0, True),
        ("sigma", 0.1, False),
        ("sigma", 12.0, False),
        ("wavelength", 2.01, True),
        ("wavelength", 1.9, False),
        ("wavelength", math.inf, True),
        ("aspect_ratio", 0.06, True),
        ("aspect_ratio", 0.04, False),
        ("aspect_ratio", 25.0, False),
        ("center", [3.0, -3.0], True),
        ("center", [0.0, 9.0], False),
    ],
)
def test_legal_filters_are_those_that_pixels_can_show(field, value, legal):
    layer = GaborConv2d(1, 3, 11, learn=RECORDS[2].field_names(), seed=0)
    family = KernelFamily(layer)
    params = layer.params.detach().expand()
    changed = getattr(params, field).clone()
    changed[1] = torch.tensor(value)
    z = family.rows(params.replace(**{field: changed}).to(torch.float64))
    assert (family.excess(z) == 0).tolist() == [True, legal, True]
    z[2, 0] = math.nan
    assert (family.excess(z) == 0).tolist() == [True, legal, False]


def test_some_of_some_filters_are_those_of_the_layer():
    layer = GaborConv2d(1, 4, 7, start="random", seed=0, learn=("orientation",), bias=False)
    family = KernelFamily(layer)
    some = family.select(torch.tensor([1, 2, 3])).select(torch.tensor([0, 2]))
    z = family.read()[[1, 3]]
    torch.testing.assert_close(some.kernels(z), family.kernels(family.read())[[1, 3]])
