"""The experiment: names of its runs, errors, and that training arrives."""

from __future__ import annotations

import math

import pytest
import torch

from gaborium import Gabor2d
from gaborium.experiments import Descent, _descent, planted_setup, recover_planted
from gaborium.readers import sample_image

SMALL = {"kernel_size": 9, "n_steps": 3, "learning_rates": (0.1,), "momenta": (0.0,)}


def planted(orientation: float = 0.8, **fields: object) -> Gabor2d:
    given = {"wavelength": 4.0, "sigma": 1.5} | fields
    return Gabor2d.of(orientation=orientation, **given, dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def descent(**fields: object) -> Descent:
    usual = {"learning_rate": 0.1, "momentum": 0.0, "orientation": [], "loss": []}
    usual |= {"first_arrival": None, "n_ejections": 0, "final_error": 0.5}
    return Descent(**(usual | fields))


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({}, "never arrives"),
        ({"first_arrival": 3, "final_error": 0.1}, "cycles, ±5.7°"),
        ({"first_arrival": 3, "final_error": 0.009}, "settles"),
        ({"n_ejections": 1}, "thrown out once"),
        ({"n_ejections": 7, "first_arrival": 2}, "thrown out 7 times"),
        ({"n_ejections": 7, "final_error": 0.001}, "settles"),
        ({"final_error": math.nan}, "lost: not a number"),
    ],
)
def test_verdicts(fields, verdict):
    assert descent(**fields).verdict == verdict


def test_a_large_step_size_throws_theta_out_of_the_basin():
    small, large = recover_planted(
        [sample_image()],
        planted(0.8),
        start=planted(0.7),
        crop=48,
        **(SMALL | {"n_steps": 40, "learning_rates": (1e-3, 30.0)}),
    ).descents
    assert small.n_ejections == 0
    assert large.n_ejections > 0
    assert not large.settled


def test_everything_is_found_and_reported():
    calls: list[tuple[str, int, int]] = []
    result = recover_planted(
        [noise(1, 40, 44)],
        planted(),
        start=planted(-0.8),
        on_progress=lambda *call: calls.append(call),
        **SMALL,
    )
    rows = {row["parameter"]: row for row in result.table()}
    assert list(rows) == [
        *("orientation", "wavelength", "phase", "sigma", "aspect_ratio", "amplitude"),
    ]
    for row in rows.values():
        assert row["found"] == pytest.approx(row["truth"], abs=1e-9)
        assert row["error"] == pytest.approx(row["found"] - row["truth"], abs=1e-9)
    assert rows["orientation"]["start"] == pytest.approx(-0.8)
    assert result.kernel_errors()["found"] < 1e-9
    # The loss is zero where every parameter is right, and only by symmetry elsewhere.
    best = min(range(361), key=result.landscape["mse"].__getitem__)
    assert abs(math.remainder(result.landscape["orientation"][best] - 0.8, math.pi)) < 0.02
    for stage in {call[0] for call in calls}:
        done = [call[1] for call in calls if call[0] == stage]
        assert done == sorted(done)
        assert done[-1] == next(call[2] for call in calls if call[0] == stage)


def test_colours_have_an_amplitude_and_a_phase_each():
    target = planted(amplitude=[1.0, -0.5, 0.25], phase=[0.0, 1.0, 2.0])
    result = recover_planted([noise(3, 40, 40)], target, start=target, **SMALL)
    rows = {row["parameter"]: row for row in result.table()}
    assert rows["amplitude[2]"]["found"] == pytest.approx(0.25, abs=1e-9)
    # A negative amplitude is a phase of π more.
    assert rows["amplitude[1]"]["found"] == pytest.approx(0.5, abs=1e-9)
    assert abs(math.remainder(rows["phase[1]"]["found"] - 1.0 - math.pi, 2 * math.pi)) < 1e-9


def test_the_middle_of_photographs_of_any_size_is_used():
    image = torch.arange(221.0).reshape(1, 13, 17)
    bright = torch.stack([image[0, :, 1:] + shift for shift in range(3)])
    options = {"target": planted(), "start": planted(0.7), "kernel_size": 9}
    _, _, (inputs, _), _ = planted_setup([image, bright], crop=12, **options)
    # The extra row goes from the bottom; grey photographs get equal channels.
    assert torch.equal(inputs[0], image[:, :12, 2:14].expand(3, 12, 12))
    assert torch.equal(inputs[1], bright[:, :12, 2:14])


def test_the_seed_decides_the_noise_and_nothing_else_is_drawn():
    before = torch.random.get_rng_state()
    run = [
        recover_planted(
            [noise(1, 40, 40)], planted(), start=planted(-0.8), noise=0.3, seed=seed, **SMALL
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(run[0].responses, run[1].responses)
    assert run[0].table() == run[1].table()
    assert not torch.equal(run[0].responses, run[2].responses)


@pytest.mark.parametrize(
    ("images", "target", "words"),
    [
        ([torch.full((1, 40, 40), 0.5)], planted(), "constant"),
        ([torch.full((1, 40, 40), math.nan)], planted(), "finite"),
        ([noise(1, 8, 40)], planted(), "larger than the image"),
        ([noise(40, 40)], planted(), "channels, height, width"),
        ([noise(3, 40, 40)], planted(phase=[0.0, 1.0]), "one per channel"),
    ],
)
def test_bad_input_is_refused_in_one_line(images, target, words):
    with pytest.raises(ValueError, match=words) as error:
        recover_planted(images, target, start=planted(-0.8), **SMALL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("aspect_ratio", [1.0, 0.5])
def test_training_arrives_from_the_worst_start(aspect_ratio):
    target = planted(math.pi / 4, aspect_ratio=aspect_ratio, wavelength=5.0)
    start = planted(-math.pi / 4, aspect_ratio=aspect_ratio, wavelength=5.0)
    result = recover_planted(
        [sample_image()],
        target,
        start=start,
        kernel_size=13,
        crop=64,
        n_steps=60,
        learning_rates=(),
    )
    assert result.kernel_errors()["trained"] < 1e-4
    assert [len(values) for values in result.training.values()] == [61, 61]


def test_training_does_not_depend_on_brightness():
    # A patch's mean differs from place to place, so the images' mean cannot just be subtracted: a
    # faint picture on a bright ground shows what is left of it.
    faint = 0.7 + 0.02 * sample_image()
    result = recover_planted(
        [faint],
        planted(0.8),
        start=planted(0.7),
        kernel_size=9,
        n_steps=60,
        learning_rates=(),
        crop=48,
    )
    assert result.kernel_errors()["trained"] < 1e-4
    assert result.training["loss"][-1] < 1e-8


@pytest.mark.parametrize(
    ("degrees", "arrival", "ejections", "settled"),
    [
        ([80, 60, 40, 1, 0.1] + [0.01] * 15, 3, 0, True),
        ([80, 1] + [5, -5] * 9, 1, 0, False),
        ([80, 1, 85, 60, 1, 85] + [1, 85] * 7, 1, 9, False),
        ([80, 4, 2, 1] + [5, -5] * 7 + [5, 0.0], 2, 0, False),
        ([80] * 20, None, 0, False),
        ([80, 1] + [math.nan] * 18, 1, 1, False),
    ],
)
def test_what_a_path_means(degrees, arrival, ejections, settled):
    path = [(0.8 + math.radians(angle), 0.0) for angle in degrees]
    run = _descent(0.1, 0.0, path, planted(0.8))
    assert run.first_arrival == arrival
    assert run.n_ejections == ejections
    assert run.settled == settled
    assert len(run.orientation) == len(run.loss) == len(degrees)
