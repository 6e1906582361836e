"""Figures show what the records hold, in the right place, and leave the user's settings alone."""

import dataclasses
import io
import itertools
import math
import sys

import pytest
import torch

from gaborium import Gabor2d, gabor, plots
from gaborium.experiments import Descent, Recovery, recover_planted
from gaborium.plots import plot_kernels, plot_landscape, plot_orientation, plot_recovery

matplotlib = pytest.importorskip("matplotlib")


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


def with_lost_descent(recovery: Recovery) -> Recovery:
    lost = Descent(
        learning_rate=0.5,
        momentum=0.0,
        orientation=[-0.7, 3e9, math.nan, math.nan],
        loss=[0.5, math.inf, math.nan, math.nan],
        error=[1.5, 0.1, math.nan, math.nan],
        first_arrival=None,
        n_ejections=0,
        final_error=math.nan,
    )
    return dataclasses.replace(recovery, descents=(*recovery.descents, lost))


def titles(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def draw(figure) -> bytes:
    # Warnings are errors: this also tells of a letter that the font does not have.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return buffer.getvalue()


# -- the figures of an experiment -------------------------------------------------------------


@pytest.mark.parametrize(
    ("plot", "kind"),
    [
        (plot_recovery, "grey"),
        (plot_recovery, "colour"),
        (plot_landscape, "lost"),
        (plot_landscape, "no descents"),
        (plot_orientation, "lost"),
        (plot_orientation, "no descents"),
    ],
)
def test_every_figure_draws_without_a_warning(plot, kind, grey, colour):
    recovery = {
        "grey": grey,
        "colour": colour,
        "lost": with_lost_descent(grey),
        "no descents": dataclasses.replace(grey, descents=()),
    }[kind]
    assert draw(plot(recovery)).startswith(b"\x89PNG")


def test_kernels_of_a_recovery_share_one_symmetric_scale(grey):
    figure = plot_recovery(grey)
    panels = {
        axes.get_title(loc="left"): axes.images[0]
        for axes in figure.axes
        if axes.images and axes.get_title(loc="left")
    }
    expected = {
        "Planted": grey.target,
        "Start": grey.start,
        "Found by recover": grey.found.params,
        "Trained layer": grey.training.params,
    }
    limits = set()
    for title, params in expected.items():
        kernel = gabor(params, (11, 11)).reshape(11, 11)
        torch.testing.assert_close(torch.tensor(panels[title].get_array().data), kernel)
        limits.add(panels[title].get_clim())
    ((low, high),) = limits
    assert low == -high


def test_the_residual_is_what_the_found_kernel_leaves(grey):
    kernel = gabor(grey.found.params, (11, 11)).reshape(1, 1, 11, 11)
    rest = grey.responses - torch.nn.functional.conv2d(grey.images, kernel)
    torch.testing.assert_close(plots.residual(grey), rest)
    figure = plot_recovery(grey)
    (panel,) = [axes for axes in figure.axes if axes.get_title(loc="left").startswith("Residual")]
    torch.testing.assert_close(torch.tensor(panel.images[0].get_array().data), rest[0, 0])


def test_of_several_colour_photographs_the_first_is_drawn_and_the_number_told(colour):
    figure = plot_recovery(colour)
    photograph = figure.axes[0]
    assert photograph.get_title(loc="left") == "First of 2 photographs, 40 × 48 px"
    pixels = torch.tensor(photograph.images[0].get_array().data)
    torch.testing.assert_close(pixels, colour.images[0].permute(1, 2, 0))
    labels = {axes.get_ylabel() for axes in figure.axes}
    assert {"red", "green", "blue"} <= labels


def test_channels_without_a_colour_are_averaged_and_the_title_says_so():
    recovery = small_recovery(noise(2, 40, 40))
    figure = plot_recovery(recovery)
    assert titles(figure)[0] == "Photograph, 40 × 40 px, mean of 2 channels"
    assert figure.axes[0].images[0].get_array().shape == (40, 40)
    assert {"channel 0", "channel 1"} <= {axes.get_ylabel() for axes in figure.axes}


def test_the_landscape_shows_both_losses_the_truth_and_the_basin(grey):
    figure = plot_landscape(grey)
    rmse, mse, *panels = figure.axes
    assert (rmse.get_ylabel(), mse.get_ylabel()) == ("RMSE", "MSE")
    assert len(panels) == len(grey.descents)
    curves = [line for line in rmse.lines if len(line.get_xdata()) > 100]
    assert list(curves[0].get_ydata()) == grey.landscape["rmse"]
    upright = [line.get_xdata()[0] for line in rmse.lines if line.get_label() == "truth"]
    assert upright == [pytest.approx(math.degrees(0.8))]
    basin = math.degrees(grey.basin)
    spans = sorted(patch.get_extents().bounds[::2] for patch in _data_patches(rmse))
    # Half a turn away lies the same kernel, as its phase is even.
    assert spans[1] == pytest.approx((math.degrees(0.8) - basin, 2 * basin))
    assert spans[0] == pytest.approx((math.degrees(0.8) - 180 - basin, 2 * basin))


def _data_patches(axes):
    return [patch.get_path().transformed(patch.get_patch_transform()) for patch in axes.patches]


def test_only_an_even_kernel_has_a_second_truth(grey, colour):
    assert plots.truths(grey) == pytest.approx([0.8, 0.8 - math.pi])
    assert plots.truths(colour) == pytest.approx([0.8])


def test_a_basin_across_the_ends_of_the_circle_is_shown_at_both(grey):
    near_the_end = grey.target.replace(orientation=torch.tensor([[math.pi - 0.1]]))
    recovery = dataclasses.replace(grey, target=near_the_end, basin=0.3)
    pieces = sorted(plots.basins(recovery))
    assert pieces[0] == pytest.approx((-math.pi, -math.pi + 0.2))
    assert pieces[-1] == pytest.approx((math.pi - 0.4, math.pi))


def test_each_path_lies_on_the_loss_that_it_followed(grey):
    figure = plot_landscape(grey)
    by_panel = {(descent.momentum, descent.learning_rate): descent for descent in grey.descents}
    for axes, key in zip(figure.axes[2:], sorted(by_panel), strict=True):
        descent = by_panel[key]
        (path,) = [line for line in axes.lines if line.get_marker() == "."]
        x = [value for value in path.get_xdata() if not math.isnan(value)]
        y = [value for value in path.get_ydata() if not math.isnan(value)]
        assert y == descent.loss
        for shown, theta, loss in zip(x, descent.orientation, descent.loss, strict=True):
            assert math.remainder(shown - math.degrees(theta), 360) == pytest.approx(0, abs=1e-9)
            # Descents compute in float32, and the curve is drawn through points a degree apart.
            on_curve = plots.loss_at(grey, math.radians(shown), "rmse")
            assert loss == pytest.approx(on_curve, rel=0.02)


def test_orientations_are_shown_within_half_a_turn_of_the_truth(grey):
    figure = plot_orientation(grey)
    middle = math.degrees(0.8)
    for axes in figure.axes:
        assert axes.get_ylim() == pytest.approx((middle - 90, middle + 90))
        for line in axes.lines:
            values = [value for value in line.get_ydata() if not math.isnan(value)]
            assert all(abs(value - middle) <= 90 + 1e-9 for value in values)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert {"truth", "basin", "trained layer", "descent on θ", "start"} <= set(labels)


def test_every_panel_says_how_its_descent_ended(grey):
    for figure in (plot_orientation(grey), plot_landscape(grey)):
        shown = [title.replace("\n", " ") for title in titles(figure)]
        for descent in grey.descents:
            assert descent.verdict in shown


def test_folded_angles_mean_the_same_and_lie_within_half_a_period():
    angles = [0.0, 1.4, 1.7, -1.7, 30.0, math.nan, -0.2, math.inf]
    steps, path = plots.folded(angles, 0.5, math.pi)
    assert [step for step in steps if step is not None] == list(range(len(angles)))
    for step, angle in zip(steps, path, strict=True):
        if step is None or not math.isfinite(angles[step]):
            assert math.isnan(angle)
        else:
            assert abs(angle - 0.5) <= math.pi / 2 + 1e-12
            assert math.remainder(angle - angles[step], math.pi) == pytest.approx(0, abs=1e-12)
    drawn = [b - a for a, b in itertools.pairwise(path) if not math.isnan(b - a)]
    assert all(abs(change) <= math.pi / 2 for change in drawn)


def test_step_sizes_keep_their_colours_apart():
    colors = plots.rate_colors([1.0, 0.001, 0.1, 0.01, 0.1])
    assert list(colors) == [0.001, 0.01, 0.1, 1.0]
    assert len(set(colors.values())) == 4
    assert len(set(plots.rate_colors([float(i) for i in range(9)]).values())) == 9


def test_the_users_settings_neither_matter_nor_change(grey):
    with matplotlib.rc_context({"font.size": 30.0, "axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        figure = plot_orientation(grey)
        assert dict(matplotlib.rcParams) == before
    assert figure.axes[0].get_facecolor()[:3] == (1.0, 1.0, 1.0)
    assert figure.axes[0].xaxis.label.get_fontsize() < 10


# -- kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "n"), [((7, 9), 1), ((5, 7, 7), 5), ((10, 1, 7, 7), 10), ((4, 3, 9, 7), 4)]
)
def test_each_kernel_gets_a_panel(shape, n):
    kernels = noise(*shape) - 0.5
    names = [str(index) for index in range(n)]
    figure = plot_kernels(kernels, titles=names)
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == names
    assert draw(figure)


def test_a_kernel_with_gradient_can_be_drawn():
    assert draw(plot_kernels(torch.zeros(2, 5, 5, requires_grad=True)))


def test_colour_kernels_have_grey_for_zero():
    kernels = torch.zeros(1, 3, 2, 2)
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


def test_titles_must_match_the_kernels():
    with pytest.raises(ValueError, match="one for each of 2 kernels, got 1"):
        plot_kernels(torch.zeros(2, 5, 5), titles=["alone"])


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'Figures need matplotlib: pip install "gaborium\[plot'):
        plot_kernels(torch.zeros(5, 5))
