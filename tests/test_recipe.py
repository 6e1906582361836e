"""Recipes: what is legal, what is said about the rest, and that a file holds all of one."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from gaborium.training import Recipe

FULL = Recipe(
    data='a "quoted" path\\with\x7fé',
    samples_per_class=10,
    first_layer="mixed",
    compare_with=("free", "gabor-fixed"),
    n_filters=12,
    kernel_size=7,
    stride=2,
    start="v1",
    learn=("orientation", "phase"),
    optimizer="natural",
    learning_rate=1e-5,
    gabor_learning_rate=0.5,
    schedule="cosine",
    weight_decay=1e-4,
    label_smoothing=0.1,
    epochs=3,
    batch_size=16,
    seeds=(4, 7),
    n_evaluations=2,
    accelerator="cpu",
    devices=2,
    precision="bf16-mixed",
)


def test_a_file_holds_all_of_a_recipe(tmp_path):
    default = Recipe()
    names = {field.name for field in dataclasses.fields(Recipe)}
    assert [n for n in names if getattr(FULL, n) == getattr(default, n)] == []
    for recipe in (FULL, default):
        path = tmp_path / "recipe.toml"
        text = recipe.to_toml(path)
        assert Recipe.from_toml(path) == recipe
        assert path.read_text(encoding="utf-8") == text


def test_the_recipe_of_the_examples_compares_with_an_ordinary_layer():
    recipe = Recipe.from_toml(Path(__file__).parent.parent / "examples/textures.toml")
    assert (recipe.data, recipe.variants) == ("textures", ("gabor", "free", "gabor-fixed"))


def test_what_is_left_out_has_its_default(tmp_path):
    (tmp_path / "r.toml").write_text("# mine\nepochs = 3\nlearning_rate = 1\nseeds = [2]\n")
    assert Recipe.from_toml(tmp_path / "r.toml") == Recipe(epochs=3, learning_rate=1, seeds=[2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "A field must be one of 'data', "),
        ("epochs = '3'", "epochs must be a whole number, got '3'."),
        ("epochs = 3.0", "epochs must be a whole number, got 3.0."),
        ("devices = true", "devices must be a whole number, got True."),
        ("learning_rate = '1e-3'", "learning_rate must be a number, got '1e-3'."),
        ("data = 3", "data must be a text, got 3."),
        ("compare_with = 'free'", "compare_with must be a list, got 'free'."),
        ("seeds = [0, 'a']", "seeds must be a whole number, got 'a'."),
        ("seeds = 3", "seeds must be a list, got 3."),
        ("epochs = 0", "epochs must be at least 1, got 0."),
        ("samples_per_class = 0", "samples_per_class must be at least 1, got 0."),
        ("learning_rate = nan", "learning_rate must be at least 0, got nan."),
        ("learning_rate = inf", "learning_rate must be at least 0, got inf."),
        ("label_smoothing = 1.5", "label_smoothing must be at most 1, got 1.5."),
        ("seeds = [0, -1]", "seeds must be at least 0, got -1."),
        ("seeds = []", "seeds must hold at least one number."),
        ("seeds = [1, 1]", "seeds must differ from one another, got [1, 1]."),
        ("start = 'best'", "start must be one of 'bank', 'random', 'v1', got 'best'."),
        ("compare_with = ['gabour']", "compare_with must be one of 'free', 'gabor', "),
        ("epochs = ", "Invalid value"),
        ("[epochs]\nn = 3", "epochs must be a whole number, got {'n': 3}."),
    ],
)
def test_an_illegal_recipe_is_one_clear_line(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as error:
        Recipe.from_toml(path)
    assert str(error.value).startswith(repr(str(path)))
    assert "\n" not in str(error.value)


def test_replace_checks_as_a_new_recipe_does():
    assert Recipe().replace(epochs=3) == Recipe(epochs=3)
    with pytest.raises(TypeError, match="'epoch'"):
        Recipe().replace(epoch=3)
    with pytest.raises(ValueError, match=r"^epochs must be at least 1"):
        Recipe().replace(epochs=0)


def test_variants_are_named_once():
    recipe = Recipe(first_layer="free", compare_with=("free", "gabor"))
    assert recipe.variants == ("free", "gabor")
    assert Recipe(compare_with=()).variants == ("gabor",)


def test_every_field_is_explained():
    text = inspect.getdoc(Recipe)
    assert [f.name for f in dataclasses.fields(Recipe) if f"    {f.name}: " not in text] == []
