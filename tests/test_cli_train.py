"""``gaborium train``: what it writes, how it goes on, and what it refuses."""

import dataclasses
from pathlib import Path

import pytest

from commands import one_line, run, shown, written
from gaborium.training import Recipe
from gaborium.training.trainer import _Trainer

for package in ("cyclopts", "lightning_fabric", "safetensors", "matplotlib"):
    pytest.importorskip(package)
np = pytest.importorskip("numpy")

FAST = ["--epochs", "2", "--seeds", "0", "--n-filters", "4", "--kernel-size", "5"]
FAST += ["--batch-size", "16", "--accelerator", "cpu"]


@pytest.fixture(autouse=True)
def folder(empty_folder: Path) -> Path:
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = generator.integers(0, 255, (60, 12, 12)) // 2 + 100 * labels[:, None, None]
    parts = {
        "x_train": images[:40].astype("uint8"), "y_train": labels[:40],
        "x_test": images[40:].astype("uint8"), "y_test": labels[40:],
    }  # fmt: skip
    np.savez(empty_folder / "data.npz", **parts)
    return empty_folder


def test_it_writes_recipe_metrics_checkpoints_result_and_report(folder, capsys):
    assert run("train", "--data", "data.npz", *FAST, figures=True) == 0
    place, record = folder / "runs/train", written("train")
    recipe = Recipe.from_toml(place / "recipe.toml")
    assert (recipe.epochs, recipe.seeds) == (2, (0,))
    result = record["result"]
    assert result["recipe"]["n_filters"] == 4
    assert [row["variant"] for row in result["table"]] == ["gabor", "free"]
    assert record["facts"]["command"].startswith("gaborium")
    assert "</html>" in (place / "report.html").read_text(encoding="utf-8")
    assert (place / "training.png").is_file()
    assert (place / "gabor-0/checkpoint.pt").is_file()
    assert (place / "free-0/metrics.jsonl").is_file()
    text = shown(capsys)
    assert "gabor, seed 0" in text
    means = [f"{100 * row['accuracy']:.1f} %" for row in result["table"]]
    assert f"With the first layer gabor, test accuracy is {means[0]}: " in text
    assert record["headline"] in text
    assert "gabor, median distance from the start: orientation " in text
    assert (
        "Accuracy Means over the seeds with standard errors. Reset is the trained network " in text
    )
    assert "Report: runs/train/report.html All runs: runs/index.html Took" in text


def test_flags_stand_above_the_file(folder):
    Recipe(data="data.npz", epochs=7, n_filters=6, compare_with=("gabor-fixed",)).to_toml("my.toml")
    assert run("train", "my.toml", *FAST, "--no-compare-with", "--name", "mine") == 0
    recipe = Recipe.from_toml(folder / "runs/mine/recipe.toml")
    assert (recipe.data, recipe.epochs, recipe.n_filters, recipe.compare_with) == (
        "data.npz",
        2,
        4,
        (),
    )


def test_interrupted_it_says_how_to_go_on_and_does(folder, capsys, monkeypatch):
    steps, step = [], _Trainer._do_step

    def interrupted(self: _Trainer, *args: object) -> None:
        steps.append(args)
        if len(steps) == 5:
            raise KeyboardInterrupt
        step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "_do_step", interrupted)
        assert run("train", "--data", "data.npz", *FAST) == 130
    assert one_line(capsys) == (
        "Interrupted; the same command continues from the last checkpoint in runs/train.\n"
    )
    assert not list(folder.glob("runs/train/free-0"))
    steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            _Trainer, "_do_step", lambda self, *args: steps.append(0) or step(self, *args)
        )
        assert run("train", "--data", "data.npz", *FAST) == 0
    assert len(steps) == 3 + 6  # from the third of six steps, then the free variant
    assert run("train", "--data", "data.npz", *FAST) == 0  # nothing is left to do


def test_another_recipe_in_the_same_folder_needs_overwrite(folder, capsys):
    assert run("train", "--data", "data.npz", *FAST, "--no-compare-with") == 0
    capsys.readouterr()
    other = ["--data", "data.npz", *FAST, "--no-compare-with", "--stride", "2"]
    assert run("train", *other) == 2
    assert "holds another recipe: stride (1 there, 2 here)" in one_line(capsys)
    assert run("train", *other, "--overwrite") == 0
    assert Recipe.from_toml(folder / "runs/train/recipe.toml").stride == 2


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (["--epochs", "0"], "epochs must be at least 1, got 0."),
        (["--epochs", "x"], "epochs"),
        (["--first-layer", "gabour"], 'Choose from: "free", "gabor"'),
        (["--data", "nowhere/data"], "nowhere/data"),
        (["--data", "data.npz", "--samples-per-class", "999"], "1 to 20"),
        (["--optimizer", "newton"], 'Choose from: "adam", "natural"'),
        (["none.toml"], "There is no recipe 'none.toml'."),
        (["bad.toml"], "'bad.toml': A field must be one of 'data'"),
        (["--name", "../x"], "--name must be a plain folder name"),
        (["--data", "data.npz", "--kernel-size", "5", "--devices", "99"], "99"),
    ],
)
def test_what_it_cannot_do_is_told_in_a_line(folder, capsys, tokens, told):
    (folder / "bad.toml").write_text("epoch = 3\n")
    extra = ["--accelerator", "cuda"] if "99" in tokens else []
    assert run("train", *tokens, *extra) == 2
    assert told in one_line(capsys)
    assert not (folder / "runs").exists()


def test_a_folder_with_other_work_is_left_alone(folder, capsys):
    (folder / "runs/train").mkdir(parents=True)
    (folder / "runs/train/thesis.tex").write_text("work")
    for more in ([], ["--overwrite"]):
        assert run("train", "--data", "data.npz", *FAST, *more) == 2
        assert "holds 'thesis.tex' and no recipe.toml" in one_line(capsys)
    assert (folder / "runs/train/thesis.tex").read_text() == "work"


def test_every_field_of_a_recipe_is_an_option_with_its_default_and_its_words(capsys):
    assert run("train", "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(Recipe):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert "passes over the training images" in shown
    assert f"[default: {Recipe().n_filters}]" in shown
