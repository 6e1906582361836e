"""Figures of the diagnoses show what the records hold, where it is."""

import io
import math

import pytest
import torch
from torch import nn

from gaborium import Gabor2d, GaborConv2d
from gaborium.diagnostics import OutputLoss, identifiability, landscape, step_limit
from gaborium.plots import plot_identifiability, plot_landscape, plot_step_limit

matplotlib = pytest.importorskip("matplotlib")

PLANTED = Gabor2d.of(orientation=0.8, wavelength=4.0, sigma=2.5)


def layer_at(params=PLANTED, **kwargs) -> GaborConv2d:
    return GaborConv2d(1, 1, 13, bias=False, start=params, dtype=torch.float64, **kwargs)


def loss_of(layer: GaborConv2d, measure: str = "mse") -> OutputLoss:
    noise = torch.randn(1, 1, 48, 48, dtype=torch.float64)
    return OutputLoss(noise, layer(noise).detach(), measure)


def turned(layer: GaborConv2d, by: float) -> None:
    layer.params = PLANTED.replace(orientation=torch.tensor(0.8 + by))


def draw(figure) -> None:
    # Warnings are errors: this also tells of a letter that the font does not have.
    figure.savefig(io.BytesIO(), format="png", dpi=50)


def lines_of(place, label: str) -> list:
    return [line for line in place.lines if line.get_label() == label]


def test_a_curve_shows_the_values_in_degrees_and_the_minima_where_they_are():
    layer = layer_at()
    loss = loss_of(layer)
    turned(layer, 0.3)
    found = landscape(loss, layer, "orientation", n_points=90)
    figure = plot_landscape(found)
    draw(figure)
    (place,) = figure.axes
    curve = place.lines[0]
    assert list(curve.get_xdata()) == pytest.approx(found.grids[0].rad2deg().tolist())
    assert list(curve.get_ydata()) == pytest.approx(found.values.tolist())
    (best,) = lines_of(place, "best minimum")
    assert sorted(best.get_xdata()) == pytest.approx(
        sorted(math.degrees(one.position[0]) for one in found.minima[:2])
    )
    (start,) = lines_of(place, "start")
    assert start.get_xdata()[0] == pytest.approx(math.degrees(1.1))
    assert start.get_ydata()[0] == pytest.approx(found.present_value)
    (bar,) = lines_of(place, f"convex, ±{math.degrees(found.half_width):.3g}°")
    assert bar.get_xdata()[1] - bar.get_xdata()[0] == pytest.approx(
        2 * math.degrees(found.half_width)
    )
    assert lines_of(place, f"predicted, ±{math.degrees(found.predicted_half_width):.3g}°")
    assert place.get_xlim() == (-180, 180)


def test_worse_minima_are_told_from_the_best():
    layer = layer_at(PLANTED.replace(phase=torch.tensor(1.0)))
    found = landscape(loss_of(layer), layer, "orientation")
    assert found.n_spurious
    figure = plot_landscape(found)
    draw(figure)
    (worse,) = lines_of(figure.axes[0], "worse minimum")
    assert len(worse.get_xdata()) == found.n_spurious


@pytest.mark.parametrize("field", ["wavelength", "phase", "amplitude", "center_x"])
def test_every_field_can_be_drawn(field):
    layer = layer_at()
    found = landscape(loss_of(layer), layer, field, n_points=30)
    figure = plot_landscape(found)
    draw(figure)
    (place,) = figure.axes
    assert place.get_xscale() == ("log" if field == "wavelength" else "linear")
    assert place.get_xlabel().startswith(field.replace("_", " "))


def test_a_surface_has_the_first_field_upwards():
    layer = layer_at()
    loss = loss_of(layer)
    turned(layer, 0.4)
    found = landscape(loss, layer, ("orientation", "wavelength"), n_points=20)
    figure = plot_landscape(found)
    draw(figure)
    place = figure.axes[0]
    assert (place.get_xlabel(), place.get_ylabel()) == ("wavelength, px", "orientation, degrees")
    mesh = place.collections[0].get_array().reshape(20, 20)
    assert torch.as_tensor(mesh).allclose(found.values)
    (start,) = lines_of(place, "start")
    assert start.get_xdata()[0] == pytest.approx(4.0)
    assert start.get_ydata()[0] == pytest.approx(math.degrees(1.2), rel=1e-6)
    assert place.get_title(loc="left").startswith(f"{100 * found.share_to_best:.0f} %")


def test_foreign_parameters_are_drawn_without_a_unit():
    layer = nn.Linear(1, 1, bias=False)
    found = landscape(
        lambda one: (one.weight - 1).square().sum(),
        layer,
        "weight",
        span={"weight": (-2, 2)},
        n_points=20,
    )
    figure = plot_landscape(found)
    draw(figure)
    assert figure.axes[0].get_xlabel() == "weight"


@pytest.mark.parametrize("measure", ["mse", "rmse"])
def test_slopes_are_drawn_against_distances(measure):
    layer = layer_at(learn="orientation", coordinates="textbook")
    loss = loss_of(layer, measure)
    turned(layer, 0.1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    found = step_limit(loss, layer, optimizer=optimizer)
    figure = plot_step_limit(found)
    draw(figure)
    (place,) = figure.axes
    (measured,) = lines_of(place, "measured")
    assert tuple(measured.get_xdata()) == found.distances
    assert tuple(measured.get_ydata()) == found.slopes
    (step,) = lines_of(place, "one step")
    assert step.get_xdata()[0] == pytest.approx(1e-3 * found.slopes[-1])
    title = place.get_title(loc="left")
    assert title.startswith("A cone" if measure == "rmse" else "A bowl: steps below")


def test_bounds_are_drawn_against_those_of_white_input():
    found = identifiability(layer_at(), torch.rand(1, 1, 40, 40, dtype=torch.float64))
    figure = plot_identifiability(found)
    draw(figure)
    left, right = figure.axes[:2]
    lengths = [bar.get_width() for bar in left.patches]
    assert lengths == pytest.approx((found.bounds / found.white_bounds)[0].tolist())
    assert [tick.get_text() for tick in left.get_yticklabels()] == [
        name.replace("_", " ") for name in found.names
    ]
    assert torch.as_tensor(right.images[0].get_array()).allclose(found.correlation[0])


def test_what_is_not_identifiable_is_hatched():
    blob = Gabor2d.of(wavelength=math.inf, sigma=2.0)
    found = identifiability(layer_at(blob), torch.rand(1, 1, 40, 40, dtype=torch.float64))
    figure = plot_identifiability(found)
    draw(figure)
    hatched = [bool(bar.get_hatch()) for bar in figure.axes[0].patches]
    assert hatched == [name in found.not_identifiable(0) for name in found.names]
    assert "condition infinite" in figure.axes[0].get_title(loc="left")
    with pytest.raises(ValueError, match="filter must be from 0 to 0, got 1"):
        plot_identifiability(found, filter=1)
