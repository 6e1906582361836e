"""Figures show what the records hold, in the right place, and leave the user's settings alone."""

import dataclasses
import io
import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gaborium import FitResult, Gabor2d, GaborConv2d, census, convert, fit, gabor, plots, starts
from gaborium.diagnostics import TrainingSetup, identifiability, landscape, step_limit
from gaborium.experiments import Recovery, recover_planted
from gaborium.plots import (
    plot_census,
    plot_conversion,
    plot_fit,
    plot_identifiability,
    plot_kernels,
    plot_landscape,
    plot_orientation,
    plot_parameters,
    plot_recovery,
    plot_step_limit,
)

matplotlib = pytest.importorskip("matplotlib")

PLANTED = Gabor2d.of(orientation=0.8, wavelength=4.0, sigma=2.5)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def small_recovery(*images: torch.Tensor, phase: float = 0.0) -> Recovery:
    planted = Gabor2d.of(orientation=0.8, wavelength=5.0, sigma=2.0, phase=phase)
    start = planted.replace(orientation=torch.tensor(-0.7))
    return recover_planted(
        images, planted, start=start, kernel_size=11, n_steps=3, learning_rates=(0.1, 1.0)
    )


@pytest.fixture(scope="module")
def grey() -> Recovery:
    return small_recovery(noise(1, 48, 48))


@pytest.fixture(scope="module")
def colour() -> Recovery:
    return small_recovery(noise(3, 40, 48), noise(3, 40, 48, seed=1), phase=1.0)


@pytest.fixture(scope="module")
def kernels() -> torch.Tensor:
    """Gabor functions under more and more noise; the last is zero."""
    spread = torch.linspace(0, 1, 5, dtype=torch.float64)
    params = Gabor2d.of(orientation=3 * spread, wavelength=4 + 2 * spread, sigma=2.0)
    bank = gabor(params, 11) + 0.03 * (1 + spread)[:, None, None] * (noise(5, 11, 11) - 0.5)
    bank[-1] = 0.0
    return bank


@pytest.fixture(scope="module")
def result(kernels) -> FitResult:
    return fit(kernels, n_starts=2)


def title(axes) -> str:
    return axes.get_title(loc="left")


def titled(figure) -> list:
    return [axes for axes in figure.axes if title(axes)]


def lines_of(place, label: str) -> list:
    return [line for line in place.lines if line.get_label() == label]


def draw(figure) -> bytes:
    # Warnings are errors: this also tells of a letter that the font does not have.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return buffer.getvalue()


# -- loading and settings ---------------------------------------------------------------------


def test_the_users_settings_neither_matter_nor_change(grey):
    with matplotlib.rc_context({"font.size": 30.0, "axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        figure = plot_orientation(grey)
        assert dict(matplotlib.rcParams) == before
    assert figure.axes[0].get_facecolor()[:3] == (1.0, 1.0, 1.0)
    assert figure.axes[0].xaxis.label.get_fontsize() < 10


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'Figures need matplotlib: pip install "gaborium\[plot'):
        plot_kernels(torch.zeros(5, 5))


# -- kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "n", "width"),
    [((7, 9), 1, 7.2), ((5, 7, 7), 5, 3.5), ((10, 1, 7, 7), 10, 7.2), ((4, 3, 9, 7), 4, 3.5)],
)
def test_each_kernel_gets_a_panel(shape, n, width):
    names = [str(index) for index in range(n)]
    figure = plot_kernels(noise(*shape) - 0.5, titles=names, width=width)
    assert [title(axes) for axes in titled(figure)] == names
    assert figure.get_figwidth() <= width
    assert draw(figure)


def test_colour_kernels_have_grey_for_zero():
    kernels = torch.zeros(1, 3, 2, 2, requires_grad=True)
    with torch.no_grad():
        kernels[0, 0, 0, 0], kernels[0, 2, 1, 1] = 2.0, -2.0
    (panel,) = plot_kernels(kernels).axes
    pixels = panel.images[0].get_array()
    assert pixels[0, 1].tolist() == [0.5, 0.5, 0.5]
    assert pixels[0, 0].tolist() == [1.0, 0.5, 0.5]
    assert pixels[1, 1].tolist() == [0.5, 0.5, 0.0]


def test_scales_are_shared_or_each_kernels_own():
    kernels = torch.stack([torch.eye(3), 4 * torch.eye(3)])
    shared = [axes.images[0].get_clim() for axes in plot_kernels(kernels).axes if axes.images]
    assert shared == [(-4, 4), (-4, 4)]
    own = plot_kernels(kernels, shared_scale=False)
    assert [axes.images[0].get_clim() for axes in own.axes] == [(-1, 1), (-4, 4)]


@pytest.mark.parametrize("shape", [(5,), (2, 2, 5, 5), (0, 5, 5), (1, 1, 1, 5, 5)])
def test_what_is_no_set_of_kernels_is_refused(shape):
    with pytest.raises(ValueError, match="kernels must be"):
        plot_kernels(torch.zeros(shape))
    with pytest.raises(ValueError, match="one for each of 2 kernels, got 1"):
        plot_kernels(torch.zeros(2, 5, 5), titles=["alone"])


def test_colours_are_signed_and_what_is_not_a_number_is_grey():
    values = torch.tensor([[-2.0, 0.0, 2.0, torch.nan]]).reshape(1, 1, 1, 4)
    red, green, blue = plots.colored(values)[0, 0].T
    assert blue[0] > red[0]
    assert red[2] > blue[2]
    assert min(red[1], green[1], blue[1]) > 0.95
    assert red[3] == green[3] == blue[3]
    three = plots.colored(torch.tensor([1.0, 0.0, -1.0]).reshape(1, 3, 1, 1))
    assert three.flatten().tolist() == [1.0, 0.5, 0.0]


def test_kernels_of_every_dimension_are_images():
    assert plots.kernel_images(torch.rand(2, 5, 1, 9)).shape == (2, 5, 1, 3, 9)
    volumes = torch.rand(2, 5, 1, 3, 8, 9)
    assert torch.equal(plots.kernel_images(volumes), volumes[:, :, :, 1].double())
    many = torch.rand(2, 5, 4, 8, 9)
    many[1, 3, 2] += 10
    images = plots.kernel_images(many)
    assert images.shape == (2, 5, 1, 8, 9)
    assert torch.equal(images[:, 3, 0], many[:, 3, 2].double())


def test_a_mosaic_has_tiles_in_rows_with_clear_lines_between():
    tiles = torch.rand(5, 2, 3, 3)
    picture = plots.mosaic(tiles, 3)
    assert picture.shape == (5, 11, 4)
    assert torch.equal(picture[3:, 4:7, :3], tiles[4])
    assert picture[:, 3, 3].sum() == picture[2, :, 3].sum() == picture[3:, 8:, 3].sum() == 0


# -- fits, census, conversion -----------------------------------------------------------------


def test_a_fit_is_drawn_best_first_as_kernel_fit_and_residual(result, kernels):
    figure = plot_fit(result, kernels)
    draw(figure)
    draw(plot_fit(result, kernels, width=3.5))
    order = plots.best_first(result)
    explained = result.explained_variance[order].tolist()
    assert explained == sorted(explained, reverse=True)
    assert [int(title(axes).split()[1].rstrip(":")) for axes in titled(figure)] == order
    picture = torch.tensor(figure.axes[0].images[0].get_array())
    fitted = gabor(result[[order[0]]].params, 11)
    three = torch.stack([kernels[order[:1]], fitted, kernels[order[:1]] - fitted])
    assert torch.equal(picture[:, :, :3][:, :11], plots.colored(three)[0])
    assert torch.equal(picture[:, :, :3][:, 24:], plots.colored(three)[2])
    with pytest.raises(ValueError, match="5 filters of the result, got shape"):
        plot_fit(result, kernels[:4])


def test_wave_vectors_turn_as_in_images(result):
    (place,) = (axes for axes in plot_parameters(result).axes if axes.name == "polar")
    assert place.get_theta_direction() == -1
    drawn = [point for some in place.collections for point in some.get_offsets().tolist()]
    theta = result.params.orientation[:4].tolist()
    assert sorted(angle for angle, _ in drawn) == pytest.approx(
        sorted([*theta, *(angle + math.pi for angle in theta)])
    )
    assert {round(1 / radius, 4) for _, radius in drawn} == {
        round(wavelength, 4) for wavelength in result.params.wavelength[:4].tolist()
    }


def test_with_nothing_to_fit_there_are_figures_too(result, kernels):
    assert draw(plot_fit(result[[4]], kernels[4:]))
    assert draw(plot_parameters(result[[4]]))


@pytest.mark.parametrize(("n_dims", "width"), [(1, 3.5), (2, 7.2), (3, 3.5)])
def test_a_census_has_every_filter_and_v1_next_to_images(n_dims, width):
    side = {1: 9, 2: 7, 3: 5}[n_dims]
    wave = torch.cos(1.5 * torch.arange(side)).expand(1, *[side] * n_dims)
    bank = torch.cat([wave, torch.zeros_like(wave)])
    found = census(bank, n_dims=n_dims, n_starts=1)
    figure = plot_census(found, bank, width=width)
    draw(figure)
    mosaic, envelopes = figure.axes
    assert title(mosaic) == "2 filters by class"
    assert {text.get_text() for text in mosaic.texts} == set(found.labels)
    assert len(envelopes.patches) == (2 if n_dims == 2 else 0)
    for share, region in zip((0.95, 0.5), envelopes.patches, strict=False):
        far = starts.v1_distance(*torch.from_numpy(region.get_xy()).T)
        assert torch.allclose(far, torch.tensor(starts.v1_radius(share)).double())
    with pytest.raises(ValueError, match="belong to the 2 filters"):
        plot_census(found, torch.cat([bank, wave]))


def test_a_conversion_has_the_pairs_and_the_explained_variance(kernels):
    layer = nn.Conv2d(1, 4, 11, dtype=torch.float64)
    layer.weight.data[:2, 0] = kernels[:2]
    before = layer.weight.detach().clone()
    conversion = convert(layer, calibrate=noise(2, 1, 30, 30).double(), n_starts=1)
    figure = plot_conversion(conversion, before)
    draw(figure)
    above, below = figure.axes
    n = int(conversion.is_gabor.sum())
    assert title(above) == f"{n} of 4 filters above their Gabor functions"
    assert [line.get_label() for line in below.lines] == ["kernels", "responses", "threshold"]
    assert len(below.lines[0].get_xdata()) == 4
    with pytest.raises(ValueError, match="belong to the 4 filters"):
        plot_conversion(conversion, before[:3])
    untouched = nn.Conv2d(1, 2, 9)
    assert draw(plot_conversion(convert(untouched, n_starts=1), untouched.weight, width=3.5))


# -- the experiment ---------------------------------------------------------------------------


@pytest.mark.parametrize("plot", [plot_recovery, plot_landscape, plot_orientation])
@pytest.mark.parametrize(
    ("kind", "width"), [("grey", 7.2), ("colour", 3.5), ("lost", 7.2), ("no descents", 3.5)]
)
def test_every_figure_of_an_experiment_draws_without_a_warning(plot, kind, width, grey, colour):
    lost = dataclasses.replace(
        grey.descents[0], orientation=[-0.7, 3e9, math.nan], loss=[0.5, math.inf, math.nan],
        final_error=math.nan,
    )  # fmt: skip
    recovery = {
        "grey": grey,
        "colour": colour,
        "lost": dataclasses.replace(grey, descents=(*grey.descents, lost)),
        "no descents": dataclasses.replace(grey, descents=()),
    }[kind]
    assert draw(plot(recovery, width=width)).startswith(b"\x89PNG")


def test_kernels_of_a_recovery_share_one_symmetric_scale(grey):
    panels = {title(axes): axes.images[0] for axes in titled(plot_recovery(grey))}
    expected = {
        "Planted": grey.target,
        "Start": grey.start,
        "Found": grey.found.params,
        "Trained": grey.trained,
    }
    limits = set()
    for name, params in expected.items():
        kernel = gabor(params, (11, 11)).reshape(11, 11).double()
        torch.testing.assert_close(torch.tensor(panels[name].get_array().data), kernel)
        limits.add(panels[name].get_clim())
    ((low, high),) = limits
    assert low == -high


def test_the_residual_is_what_the_found_kernel_leaves(grey):
    kernel = gabor(grey.found.params, (11, 11)).reshape(1, 1, 11, 11)
    rest = grey.responses - nn.functional.conv2d(grey.images, kernel)
    (panel,) = [axes for axes in plot_recovery(grey).axes if title(axes) == "Residual"]
    torch.testing.assert_close(torch.tensor(panel.images[0].get_array().data), rest[0, 0])


def test_photographs_and_channels_have_names(colour):
    figure = plot_recovery(colour)
    photograph = figure.axes[0]
    assert (title(photograph), photograph.get_xlabel()) == ("First of 2 photographs", "40 × 48 px")
    pixels = torch.tensor(photograph.images[0].get_array().data)
    torch.testing.assert_close(pixels, colour.images[0].permute(1, 2, 0))
    assert {"channel 1", "channel 2"} <= {axes.get_ylabel() for axes in figure.axes}
    figure = plot_recovery(small_recovery(noise(2, 40, 40)))
    assert figure.axes[0].get_xlabel() == "40 × 40 px, mean of 2 channels"
    assert figure.axes[0].images[0].get_array().shape == (40, 40, 3)
    assert "channel 1" in {axes.get_ylabel() for axes in figure.axes}


def test_the_landscape_shows_both_losses_the_truth_and_the_basin(grey):
    rmse, mse = plot_landscape(grey).axes
    assert [title(axes)[:4] for axes in (rmse, mse)] == ["RMSE", "MSE:"]
    for place, name in ((rmse, "rmse"), (mse, "mse")):
        (curve,) = [line for line in place.lines if len(line.get_xdata()) > 100]
        assert list(curve.get_ydata()) == grey.landscape[name]
        assert lines_of(place, "truth")[0].get_xdata()[0] == pytest.approx(math.degrees(0.8))
    basin = math.degrees(grey.basin)
    patches = [one.get_path().transformed(one.get_patch_transform()) for one in rmse.patches]
    spans = [patch.get_extents().bounds[::2] for patch in patches]
    for truth in (math.degrees(0.8), math.degrees(0.8) - 180):  # its phase is even
        for turn in (-360, 0, 360):  # across the ends of the circle
            assert pytest.approx((truth + turn - basin, 2 * basin)) in spans


def test_only_an_even_kernel_has_a_second_truth(grey, colour):
    assert plots.truths(grey) == pytest.approx([0.8, 0.8 - math.pi])
    assert plots.truths(colour) == pytest.approx([0.8])


def test_orientations_are_shown_within_half_a_turn_of_the_truth(grey):
    figure = plot_orientation(grey)
    middle = math.degrees(0.8)
    for axes, run in zip(figure.axes, grey.descents, strict=True):
        assert axes.get_ylim() == pytest.approx((middle - 90, middle + 90))
        for line in axes.lines:
            values = [value for value in line.get_ydata() if not math.isnan(value)]
            assert all(abs(value - middle) <= 90 + 1e-9 for value in values)
        (path,) = lines_of(axes, "descent on θ")
        shown = [value for value in path.get_ydata() if not math.isnan(value)]
        for value, theta in zip(shown, run.orientation, strict=True):
            assert math.remainder(value - math.degrees(theta), 180) == pytest.approx(0, abs=1e-6)
        assert title(axes).endswith(run.verdict)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert {"truth", "basin", "trained layer", "descent on θ", "start"} == set(labels)


def test_folded_angles_mean_the_same_and_lie_within_half_a_period():
    angles = [0.0, 1.4, 1.7, -1.7, 30.0, math.nan, -0.2, math.inf]
    steps, path = plots.folded(angles, 0.5, math.pi)
    assert [step for step in steps if not math.isnan(step)] == list(range(len(angles)))
    for step, angle in zip(steps, path, strict=True):
        if math.isnan(step) or not math.isfinite(angles[int(step)]):
            assert math.isnan(angle)
        else:
            assert abs(angle - math.degrees(0.5)) <= 90 + 1e-9
            turned = math.remainder(angle - math.degrees(angles[int(step)]), 180)
            assert turned == pytest.approx(0, abs=1e-9)
    drawn = [b - a for a, b in itertools.pairwise(path) if not math.isnan(b - a)]
    assert all(abs(change) <= 90 for change in drawn)


# -- diagnostics ------------------------------------------------------------------------------


def layer_at(params=PLANTED, **kwargs) -> GaborConv2d:
    return GaborConv2d(1, 1, 13, bias=False, start=params, dtype=torch.float64, **kwargs)


def setup_of(layer: GaborConv2d, loss=F.mse_loss) -> TrainingSetup:
    inputs = torch.randn(1, 1, 48, 48, dtype=torch.float64)
    return TrainingSetup(layer, loss, inputs, layer(inputs).detach())


def turned(layer: GaborConv2d, by: float) -> None:
    layer.params = PLANTED.replace(orientation=torch.tensor(0.8 + by))


def test_a_curve_shows_the_values_in_degrees_and_the_minima_where_they_are():
    layer = layer_at()
    setup = setup_of(layer)
    turned(layer, 0.3)
    found = landscape(setup, "orientation", n_points=90)
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
    convex, predicted = map(math.degrees, (found.half_width, found.predicted_half_width))
    assert title(place) == f"convex within ±{convex:.3g}, predicted within ±{predicted:.3g}"
    assert place.get_xlim() == (-180, 180)


def test_worse_minima_are_told_from_the_best():
    layer = layer_at(PLANTED.replace(phase=torch.tensor(1.0)))
    found = landscape(setup_of(layer), "orientation")
    assert found.n_spurious
    figure = plot_landscape(found)
    draw(figure)
    (worse,) = lines_of(figure.axes[0], "worse minimum")
    assert len(worse.get_xdata()) == found.n_spurious


@pytest.mark.parametrize("field", ["wavelength", "phase", "amplitude", "center_x"])
def test_every_field_can_be_drawn(field):
    layer = layer_at()
    figure = plot_landscape(landscape(setup_of(layer), field, n_points=30), width=3.5)
    draw(figure)
    (place,) = figure.axes
    assert place.get_xscale() == ("log" if field == "wavelength" else "linear")
    assert place.get_xlabel().startswith(field.replace("_", " "))


def test_a_surface_has_the_first_field_upwards():
    layer = layer_at()
    setup = setup_of(layer)
    turned(layer, 0.4)
    found = landscape(setup, ("orientation", "wavelength"), n_points=20)
    figure = plot_landscape(found)
    draw(figure)
    place = figure.axes[0]
    assert (place.get_xlabel(), place.get_ylabel()) == ("wavelength, px", "orientation, degrees")
    mesh = place.collections[0].get_array().reshape(20, 20)
    assert torch.as_tensor(mesh).allclose(found.values)
    (start,) = lines_of(place, "start")
    assert start.get_xdata()[0] == pytest.approx(4.0)
    assert start.get_ydata()[0] == pytest.approx(math.degrees(1.2), rel=1e-6)
    assert title(place).startswith(f"{100 * found.share_to_best:.0f} %")


def test_foreign_parameters_are_drawn_without_a_unit():
    setup = TrainingSetup(nn.Linear(1, 1, bias=False), F.mse_loss, *torch.ones(2, 1, 1))
    found = landscape(setup, "weight", span={"weight": (-2, 2)})
    figure = plot_landscape(found)
    draw(figure)
    assert figure.axes[0].get_xlabel() == "weight"


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss])
def test_slopes_are_drawn_against_distances(loss):
    layer = layer_at(learn="orientation", coordinates="textbook")
    setup = setup_of(layer, loss)
    turned(layer, 0.1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    found = step_limit(dataclasses.replace(setup, optimizer=optimizer))
    figure = plot_step_limit(found)
    draw(figure)
    (place,) = figure.axes
    (measured,) = lines_of(place, "measured")
    assert tuple(measured.get_xdata()) == found.distances
    assert tuple(measured.get_ydata()) == found.slopes
    (step,) = lines_of(place, "one step")
    assert step.get_xdata()[0] == pytest.approx(1e-3 * found.slopes[-1])
    assert title(place).startswith("A cone" if loss is F.l1_loss else "A bowl: steps below")


def test_bounds_are_drawn_against_those_of_white_input():
    found = identifiability(layer_at(), torch.rand(1, 1, 40, 40, dtype=torch.float64))
    figure = plot_identifiability(found)
    draw(figure)
    (place,) = figure.axes
    lengths = [bar.get_width() for bar in place.patches]
    assert lengths == pytest.approx((found.bounds / found.white_bounds)[0].tolist())
    assert [tick.get_text() for tick in place.get_yticklabels()] == [
        name.replace("_", " ") for name in found.names
    ]


def test_what_is_not_identifiable_is_red():
    blob = Gabor2d.of(wavelength=math.inf, sigma=2.0)
    found = identifiability(layer_at(blob), torch.rand(1, 1, 40, 40, dtype=torch.float64))
    figure = plot_identifiability(found)
    draw(figure)
    red = [bar.get_facecolor()[0] > 0.5 for bar in figure.axes[0].patches]
    assert red == [name in found.not_identifiable(0) for name in found.names]
    assert "condition inf" in title(figure.axes[0])
    with pytest.raises(ValueError, match="filter must be from 0 to 0, got 1"):
        plot_identifiability(found, filter=1)
