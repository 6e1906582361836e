"""The report of a training says what the result holds, and shows every filter."""

import base64
import dataclasses
import io
import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from gaborium import Gabor2d, gabor
from gaborium.plots import kernel_images, plot_trained_filters, plot_training
from gaborium.reporting import (
    in_percent,
    report_training,
    training_headline,
    training_record,
    training_sentences,
    write_training,
)
from gaborium.training import Mean, Recipe, Run, TrainResult

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("plotly")
pillow = pytest.importorskip("PIL.Image")

HOSTILE = "</script><script>alert('x')</script>\"onload=\"<img src=http://example.com/x.png>"
FIELDS = ("orientation", "wavelength", "phase", "sigma", "aspect_ratio", "amplitude")


def run(variant: str, seed: int, accuracy: float | None = 0.9, channels: int = 1) -> Run:
    """As a run of three epochs ends; the Gabor filters turn by 0.1 rad in each."""
    turn = 0.1 * torch.arange(4.0)[:, None] + torch.tensor([0.2, 1.0, 2.0])
    params = Gabor2d.of(
        orientation=turn[..., None], wavelength=6.0, sigma=2.0, amplitude=torch.ones(4, 3, channels)
    )
    free = torch.randn(4, 3, channels, 7, 7, generator=torch.Generator().manual_seed(seed))
    is_gabor = variant != "free"
    moves = [0.1 * epoch * (variant == "gabor") for epoch in range(4)]
    curve = [
        {
            "epoch": epoch, "step": 10 * epoch, "test_loss": 1.0,
            "test_accuracy": 0.1 + 0.2 * epoch,
            "displacement": dict.fromkeys(FIELDS, moves[epoch]) if is_gabor else {},
            **({"loss": 2.0 / epoch, "accuracy": 0.5} if epoch else {}),
        }
        for epoch in range(4)
    ]  # fmt: skip
    return Run(
        variant=variant,
        seed=seed,
        accuracy=accuracy,
        accuracy_reset=None if variant != "gabor" or accuracy is None else accuracy - 0.1,
        n_first_parameters={"gabor": 18, "free": 147}.get(variant, 0),
        n_parameters=1000,
        curve=curve,
        epochs=[0, 1, 2, 3],
        kernels=gabor(params, 7) if is_gabor else free,
        params=[Gabor2d(**{k: v[i] for k, v in params.as_dict().items()}) for i in range(4)]
        if is_gabor
        else [],
        seconds=2.5,
        stopped="" if accuracy is not None else f"The loss of {variant} is not finite.",
    )


def trained(runs: list[Run], **options: Any) -> TrainResult:
    seeds = tuple(dict.fromkeys(one.seed for one in runs))
    recipe = Recipe(data=HOSTILE, epochs=3, seeds=seeds, **options)
    data = {
        "name": HOSTILE, "n_train": 100, "n_test": 50, "n_classes": 2, "image_size": [12, 12],
        "n_channels": runs[0].kernels.shape[2], "sha256": "0" * 64,
    }  # fmt: skip
    return TrainResult(recipe, tuple(runs), data)


@pytest.fixture(scope="module")
def result() -> TrainResult:
    accuracies = {("gabor", 0): 0.90, ("gabor", 1): 0.94, ("free", 0): 0.85, ("free", 1): 0.91}
    return trained([run(*key, accuracy) for key, accuracy in accuracies.items()])


@pytest.fixture(scope="module")
def page(result) -> str:
    return report_training(result, title=HOSTILE, facts={HOSTILE: HOSTILE})


def without_library(page: str) -> str:
    scripts = re.findall(r"<script>.*?</script>", page, flags=re.DOTALL)
    return page.replace(max(scripts, key=len), "")


def text_of(page: str) -> str:
    body = without_library(page).partition("<body>")[2]
    body = re.sub(r"<script.*?</script>", " ", body, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


def charts_of(page: str) -> dict[str, Any]:
    found = re.findall(r'data-chart="([\w-]+)">(.*?)</script>', page, flags=re.DOTALL)
    return {name: json.loads(text) for name, text in found}


# -- numbers ------------------------------------------------------------------------------------


def test_means_are_over_seeds_with_their_standard_errors(result):
    mean, error, n = result.accuracy("gabor")
    assert (mean, n) == (pytest.approx(0.92), 2)
    assert error == pytest.approx(0.02)  # 0.04 / sqrt(2) / sqrt(2)
    lead = result.difference("gabor", "free")
    assert lead.mean == pytest.approx(0.04)
    assert lead.standard_error == pytest.approx(0.01)  # of 0.05 and 0.03
    assert result.learning_gain("gabor").mean == pytest.approx(0.1)
    assert result.displacement("gabor")["orientation"].mean == pytest.approx(0.3)
    assert math.isnan(Mean.of([0.5]).standard_error)
    assert Mean.of([]).n == 0


def test_the_result_is_json_with_records_that_can_be_read(result):
    record = training_record(result, facts={"command": "x"})
    text = json.dumps(record, allow_nan=False)
    assert (record["format"], record["version"]) == ("gaborium.train", 1)
    assert Recipe(**record["recipe"]) == result.recipe
    end = Gabor2d.from_json(json.dumps(json.loads(text)["runs"][0]["end"]))
    assert torch.equal(end.orientation, result.runs[0].params[-1].orientation)
    assert record["difference"]["free"]["mean"] == pytest.approx(0.04)
    assert record["table"][0]["accuracy_error"] == pytest.approx(0.02)
    one = trained([run("gabor", 0)])
    assert training_record(one, facts={})["table"][0]["accuracy_error"] is None
    json.dumps(training_record(one, facts={}), allow_nan=False)


# -- words --------------------------------------------------------------------------------------


def test_the_headline_compares(result):
    assert training_headline(result) == (
        "With a learned Gabor first layer the network tells 92.0 ± 2.0 % of the test images "
        "right: 4.0 ± 1.0 points more than with a free one."
    )
    worse = [dataclasses.replace(one, accuracy=1.8 - one.accuracy) for one in result.runs]
    assert "4.0 ± 1.0 points fewer than with a free one" in training_headline(trained(worse))
    alone = training_headline(trained([run("gabor", 0)]))
    assert alone.endswith("tells 90.0 % of the test images right.")
    assert "±" not in alone
    gone = trained([run("gabor", 0, None), run("free", 0)])
    assert training_headline(gone).startswith("Every run with a learned Gabor first layer was")


def test_whether_moving_helped_is_said(result):
    assert training_sentences(result) == {
        "gabor": "The median filter moved the orientation by 17°, the wavelength by 0.30 px and "
        "the sigma by 0.30 px. Put back to their start in the trained network, the filters leave "
        "it 82.0 ± 2.0 %: it loses 10.0 ± 0.0 points."
    }
    harm = dataclasses.replace(run("gabor", 0), accuracy_reset=0.95)
    assert training_sentences(trained([harm]))["gabor"].endswith("95.0 %: it gains 5.0 points.")
    assert training_sentences(trained([run("gabor-fixed", 0), run("free", 0)])) == {}


# -- the page -----------------------------------------------------------------------------------


def test_the_page_says_what_the_result_holds(result, page):
    text = text_of(page).replace("\N{NO-BREAK SPACE}", " ")
    for told in (
        training_headline(result), *training_sentences(result).values(), "−4.0 ± 1.0",
        "18 numbers learned in the first layer", "147", "2 seeds",
    ):  # fmt: skip
        assert told in text


def test_the_charts_show_the_curves(result, page):
    charts = charts_of(page)
    assert set(charts) == {
        "learning-test-accuracy", "learning-loss", "displacement", "distribution"
    }  # fmt: skip
    curves = charts["learning-test-accuracy"]["data"]
    assert [len(curve["x"]) for curve in curves] == [4] * 4
    assert curves[0]["y"] == pytest.approx([0.1, 0.3, 0.5, 0.7])
    assert [curve["x"] for curve in charts["learning-loss"]["data"]] == [[1, 2, 3]] * 4
    moved = charts["displacement"]["data"]
    assert len(moved) == 2 * len(FIELDS)
    assert moved[0]["y"] == pytest.approx([0.0, *(math.degrees(0.1 * e) for e in (1, 2, 3))])
    before, after = charts["distribution"]["data"][:2]
    assert (sum(before["y"]), sum(after["y"])) == (6, 6)
    assert before["y"] != after["y"]


def test_the_animation_has_a_frame_for_every_snapshot(result, page):
    films = json.loads(re.search(r"const films = (.*);", page)[1])
    moments = json.loads(re.search(r"const labels = (.*);", page)[1])
    assert moments == ["epoch 0", "epoch 1", "epoch 2", "epoch 3"]
    assert [len(frames) for frames in films] == [4, 4]
    assert len(set(films[0])) == 4
    pictures = [
        pillow.open(io.BytesIO(base64.b64decode(frame.partition(",")[2]))) for frame in films[0]
    ]
    assert {picture.size for picture in pictures} == {(3 * 8 - 1, 7)}
    assert pictures[0].getpixel((7, 3))[3] == 0  # between two filters
    for kernels, picture in zip(result.runs[0].kernels, pictures, strict=True):
        for row, column in ((3, 3), (1, 2), (4, 0), (2, 5), (6, 1)):
            value = kernels[1, 0, row, column].item()
            red, _, blue, _ = picture.getpixel((8 + column, row))  # of the second filter
            assert (red > blue) == (value > 0) or abs(value) < 0.1
    assert films[0][0] in page
    assert films[0][-1] in page


def test_the_page_is_whole_and_safe(page):
    assert "http" not in re.sub(r"http://example\.com|http://www\.w3\.org", "", text_of(page))
    plain = without_library(page)
    assert "<script>alert" not in plain
    assert not re.search(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"'](?!data:)", plain)


@pytest.mark.parametrize(
    "runs",
    [
        [run("gabor", 0)],
        [run("gabor-fixed", 0), run("free", 0)],
        [run("gabor", 0, None), run("free", 0)],
        [run("gabor", 0, channels=3), run("free", 0, channels=3)],
        [run("gabor", 0, channels=5)],
    ],
    ids=["alone", "fixed", "stopped", "colour", "channels"],
)
def test_every_kind_of_result_has_a_page_and_figures(runs):
    result = trained(runs)
    text = text_of(report_training(result, facts={}))
    assert ("is not finite" in text) == any(one.stopped for one in runs)
    for plot in (plot_training, plot_trained_filters):
        plot(result).savefig(io.BytesIO(), format="svg")


def test_one_dimension_and_three():
    kernels = torch.rand(2, 5, 1, 9)
    assert kernel_images(kernels).shape == (2, 5, 1, 1, 9)
    kernels = torch.rand(2, 5, 1, 3, 8, 9)
    assert torch.equal(kernel_images(kernels), kernels[:, :, :, 1].double())
    many = torch.rand(2, 5, 4, 8, 9)
    many[1, 3, 2] += 10
    images = kernel_images(many)
    assert images.shape == (2, 5, 1, 8, 9)
    assert torch.equal(images[:, 3, 0], many[:, 3, 2].double())


def test_files_are_written(result, tmp_path):
    names = write_training(result, tmp_path, facts={})
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    assert (tmp_path / "filters.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        write_training(result, Path(tmp_path, "none"), facts={})


def test_percent():
    assert in_percent(Mean(0.5, 0.01, 3)) == "50.0 ± 1.0 %"
