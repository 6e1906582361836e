"""Does the article on θ say what its script finds, and does the script find it?"""

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "explanation" / "why-theta-gets-stuck.md"
FIGURES = ROOT / "docs" / "_static" / "why"
NUMBERS = ROOT / "benchmarks" / "results" / "why_theta_gets_stuck.json"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Run the script on two small photographs; return its sections and its folder."""
    for package in ("skimage", "matplotlib", "joblib"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("why")
    script = ROOT / "examples" / "why_theta_gets_stuck.py"
    done = subprocess.run(
        [sys.executable, script, "--quick", "--output", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = (folder / NUMBERS.name).read_text(encoding="utf-8")
    return json.loads(text)["sections"], folder


def pick(rows, **wanted):
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert found
    return found


def test_the_start_is_flat_on_white_input_only(quick):
    (white, *photographs) = quick[0]["antipode"]
    assert abs(white["slope"]) < 1e-6
    assert all(abs(row["slope"]) > 1e-3 for row in photographs)


def test_the_basin_is_as_wide_as_the_closed_form(quick):
    for row in quick[0]["basin"]:
        if row["sigma"] / row["wavelength"] >= 0.5:
            assert row["measured"] == pytest.approx(row["predicted"], rel=0.07)


def test_the_squared_error_settles_within_its_window_and_not_outside(quick):
    for row in pick(quick[0]["window"], loss="MSE"):
        if 0.1 <= row["rate"] <= 0.9:
            assert row["settled"] == 1
        if row["rate"] > 1:
            assert row["settled"] == 0


def test_a_cone_cycles_at_half_a_step_for_ever(quick):
    for loss in ("RMSE", "L1"):
        for row in pick(quick[0]["window"], loss=loss, starts="near"):
            if row["rate"] <= 0.3:
                assert row["amplitude"] == pytest.approx(row["predicted"], rel=0.1)
            if row["rate"] == 3:
                assert row["thrown_out"] == 1
    # No optimiser with a fixed step comes to rest.
    for row in pick(quick[0]["cone_RMSE"], decay=False):
        assert row["amplitude"] is None or row["amplitude"] > 1e-4


def test_step_limit_finds_the_cone_and_the_window(quick):
    mse, rmse = quick[0]["stability"]
    assert mse["step_limit"] == pytest.approx(mse["predicted_limit"], rel=1e-3)
    assert rmse["slope"] == pytest.approx(rmse["c"], rel=1e-3)
    assert rmse["is_cone"]
    assert not mse["is_cone"]


def test_remedies_help_and_recover_always_finds_the_kernel(quick):
    rows = quick[0]["remedies_scikit-image"]
    share = {row["remedy"]: row["succeeds"] for row in rows}
    assert share["none"] < 0.2 < share["squared error, right step"]
    assert share["right step + no border, no mean + best of four"] > 0.9
    for row in quick[0]["recovering"]:
        assert row["recovered_kernel_error"] < 0.01
        assert abs(row["recovered_turn"]) < 0.01


def test_the_script_draws_the_figures_that_the_page_shows(quick):
    shown = set(re.findall(r"_static/why/(\w+\.svg)", PAGE.read_text(encoding="utf-8")))
    assert shown == {path.name for path in quick[1].glob("*.svg")}
    assert shown == {path.name for path in FIGURES.glob("*.svg")}
    for path in FIGURES.glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert len(text) < 150_000
        assert "<image" not in text  # no photograph


def test_the_tables_on_the_page_are_those_of_the_numbers():
    spec = importlib.util.spec_from_file_location("tables", PAGE.parent / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = PAGE.read_text(encoding="utf-8")
    results = json.loads(NUMBERS.read_text(encoding="utf-8"))
    made = module.tables(results)
    assert [name for name, table in made.items() if table not in text] == []
    words = " ".join(text.split())  # a phrase may run over the end of a line
    assert [phrase for phrase in module.phrases(results) if phrase not in words] == []


def test_the_numbers_are_of_a_whole_run():
    results = json.loads(NUMBERS.read_text(encoding="utf-8"))
    assert re.fullmatch(r"[0-9a-f]{12}", results["commit"])
    sections = results["sections"]
    assert {row["collection"] for row in sections["minima"]} == {"scikit-image", "Kodak"}
    assert all(math.isfinite(row["measured"]) for row in sections["basin"])
