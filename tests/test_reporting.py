"""The report says what happened, opens offline, and is safe whatever names it is given."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from gaborium import Gabor2d, Outcome
from gaborium.experiments import Descent, Recovery, recover_planted
from gaborium.plots import loss_at
from gaborium.reporting import (
    headline,
    outcome_sentences,
    recovery_record,
    report_recovery,
    write_recovery,
)
from gaborium.reporting.wording import explain, number, share, verdicts

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("plotly")

HOSTILE = "</script><script>alert('x')</script>\"onload=\"<img src=http://example.com/x.png>"


def small_recovery(*images: torch.Tensor, **fields: Any) -> Recovery:
    planted = Gabor2d.of(**{"orientation": 0.8, "wavelength": 5.0, "sigma": 2.0, **fields})
    start = planted.replace(orientation=torch.tensor(-0.7))
    return recover_planted(
        images, planted, start=start, kernel_size=11, n_steps=3, learning_rates=(0.1, 1.0)
    )


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def grey() -> Recovery:
    return small_recovery(noise(1, 48, 48))


@pytest.fixture(scope="module")
def written(grey, tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    folder = tmp_path_factory.mktemp("run")
    return folder, write_recovery(grey, folder, title="Run", facts={"seed": "0"})


@pytest.fixture(scope="module")
def page(grey) -> str:
    return report_recovery(grey, title=HOSTILE, facts={"photograph": HOSTILE, HOSTILE: "seed"})


def descent(**changes: Any) -> Descent:
    never = Descent(
        learning_rate=0.1,
        momentum=0.0,
        orientation=[-0.7, -0.6],
        loss=[0.5, 0.5],
        error=[1.5, 1.4],
        first_arrival=None,
        n_ejections=0,
        final_error=1.5,
    )
    return dataclasses.replace(never, **changes)


NEVER = descent()
SETTLED = descent(first_arrival=5, final_error=0.001)
CYCLES = descent(first_arrival=5, final_error=0.04)
THROWN = descent(first_arrival=5, n_ejections=2)
LOST = descent(orientation=[-0.7, math.nan], loss=[0.5, math.nan], error=[1.5, math.nan],
               final_error=math.nan)  # fmt: skip


def without_library(page: str) -> str:
    """The page less the source of plotly.js, which is not ours to judge."""
    scripts = re.findall(r"<script>.*?</script>", page, flags=re.DOTALL)
    return page.replace(max(scripts, key=len), "")


def text_of(page: str) -> str:
    body = without_library(page).partition("<body>")[2]
    body = re.sub(r"<script.*?</script>", " ", body, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


# -- words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("descents", "expected"),
    [
        ([NEVER, CYCLES], "None of 2 descents settled"),
        ([NEVER, SETTLED], "1 of 2 descents settled"),
        ([SETTLED, SETTLED], "All 2 descents settled"),
        ([SETTLED], "The descent settled"),
        ([LOST], "The descent did not settle"),
        ([], "Recover found all parameters"),
    ],
)
def test_the_headline_starts_with_what_the_descents_did(grey, descents, expected):
    assert headline(dataclasses.replace(grey, descents=tuple(descents))).startswith(expected)


def test_every_way_to_end_is_counted(grey):
    ended = (NEVER, NEVER, CYCLES, THROWN, LOST)
    recovery = dataclasses.replace(grey, descents=ended)
    assert outcome_sentences(recovery)["descents"] == (
        "None of 5 descents settled: 1 cycles around the minimum, 1 is thrown "
        "out of the basin again, 2 never arrive and 1 becomes NaN."
    )
    recovery = dataclasses.replace(grey, descents=(*ended, SETTLED))
    assert (
        "1 of 6 descents settled; of the others 1 cycles"
        in (outcome_sentences(recovery)["descents"])
    )


@pytest.mark.parametrize("outcome", [o for o in Outcome if o is not Outcome.CONVERGED])
def test_a_recover_that_fails_is_not_called_a_success(grey, outcome):
    found = dataclasses.replace(grey.found, outcome=(outcome,))
    recovery = dataclasses.replace(grey, found=found)
    assert "found all parameters" not in headline(recovery)
    assert outcome.value in outcome_sentences(recovery)["recover"]
    assert verdicts(recovery)["recover"] is False


@pytest.mark.parametrize(
    ("change", "words"), [(1.0, "found all"), (1.05, "came close"), (1.5, "missed the planted")]
)
def test_convergence_elsewhere_is_told_from_recovery(grey, change, words):
    params = grey.found.params.replace(amplitude=change * grey.found.params.amplitude)
    found = dataclasses.replace(grey.found, params=params)
    assert f"recover {words}" in headline(dataclasses.replace(grey, found=found))


@pytest.mark.parametrize(
    ("error", "words"), [(1e-6, "arrived"), (0.05, "came close"), (0.5, "did not arrive")]
)
def test_a_training_that_fails_is_not_called_a_success(grey, error, words):
    training = dataclasses.replace(grey.training, kernel_error=error)
    assert headline(dataclasses.replace(grey, training=training)).endswith(
        f"the trained layer {words}."
    )


def test_numbers_are_written_as_one_writes_them():
    values = [0.99996, 9.99996, 123456.0, -0.00012345, 1e-300, -2.0]
    assert [number(value) for value in values] == [
        "1.000", "10.00", "1.235 × 10⁵", "−1.234 × 10⁻⁴", "1.000 × 10⁻³⁰⁰", "−2.000",
    ]  # fmt: skip
    assert share(0.5) == "50 %"


# -- why --------------------------------------------------------------------------------------


def test_the_slope_of_the_cone_is_that_of_the_rmse_beside_the_truth(grey):
    why = explain(grey)
    beside = 0.8 + math.radians(1)
    assert loss_at(grey, beside, "rmse") / math.radians(1) == pytest.approx(
        why.cone_slope, rel=0.03
    )
    assert why.distance == pytest.approx(1.5)
    assert why.longest_update(descent(momentum=0.9)) == pytest.approx(why.cone_slope)
    assert why.tip == 0.0


def test_the_basin_on_noise_is_about_as_wide_as_theory_says(grey):
    # Theory is for white input without end; this is a random image of 48 px with a mean.
    for side in explain(grey).convex:
        assert side == pytest.approx(grey.basin, rel=0.3)


def test_the_other_minima_are_those_of_the_curve(grey):
    around = grey.landscape["orientation"]
    # A dip of its own at 10 degrees, far from the truth.
    mse = [
        value - (0.5 if abs(theta - math.radians(10)) < 1e-6 else 0.0)
        for theta, value in zip(around, grey.landscape["mse"], strict=True)
    ]
    before = explain(grey).other_minima
    recovery = dataclasses.replace(grey, landscape={**grey.landscape, "mse": mse})
    (added,) = set(explain(recovery).other_minima) - set(before)
    assert added == pytest.approx(math.radians(10))


# -- JSON -------------------------------------------------------------------------------------


def strict_json(text: str) -> Any:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_result_is_json_and_comes_back(grey, written):
    record = strict_json((written[0] / "result.json").read_text(encoding="utf-8"))
    assert record == recovery_record(grey, facts={"seed": "0"})
    assert (record["format"], record["version"]) == ("gaborium.recovery", 1)
    target = Gabor2d.from_json(json.dumps(record["target"]))
    assert torch.equal(target.orientation, grey.target.orientation)
    found = Gabor2d.from_json(json.dumps(record["found"]["params"]))
    assert torch.equal(found.sigma, grey.found.params.sigma)
    assert [d["orientation"] for d in record["descents"]] == [d.orientation for d in grey.descents]
    assert record["landscape"]["rmse"] == grey.landscape["rmse"]
    assert record["setup"]["kernel_size"] == [11, 11]
    assert record["outcome"]["headline"] == headline(grey)


def test_what_json_has_no_number_for_is_a_text(grey):
    record = recovery_record(dataclasses.replace(grey, descents=(LOST,)), facts={})
    (lost,) = strict_json(json.dumps(record, allow_nan=False))["descents"]
    assert lost["final_error"] == "nan"
    assert lost["loss"] == [0.5, "nan"]
    assert lost["verdict"] == "lost: not a number"


# -- the page ---------------------------------------------------------------------------------


def test_the_page_refers_to_nothing_outside_itself(page):
    ours = without_library(page)
    # The hostile names hold an address, as text.
    assert re.findall(r"https?:[^\s\"'<]*", unescape(ours).replace(HOSTILE, "")) == []
    references = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']{0,20})", ours)
    assert all(reference.startswith("data:image/png") for reference in references)
    assert "@import" not in ours
    assert "url(" not in ours
    assert "default-src 'none'" in ours


def test_hostile_names_are_text(page):
    ours = without_library(page)
    assert "alert('x')" not in ours
    assert "<img src=http" not in ours
    assert f"<title>{HOSTILE}</title>" not in ours
    assert unescape(ours).count(HOSTILE) == 4  # title, heading, a fact's value, a fact's name


def test_the_charts_are_json_that_ends_no_script(page):
    charts = re.findall(
        r'<script type="application/json" data-chart="([^"]*)">(.*?)</script>', page, re.DOTALL
    )
    names = [name for name, _ in charts]
    assert len(names) == len(set(names)) == 8  # response, residual, four kernels, two of lines
    for name, text in charts:
        figure = strict_json(text)
        assert figure["data"], name
        assert f'id="{name}"' in page
    maps = [strict_json(text) for name, text in charts if name.startswith("kernel")]
    for figure in maps:
        assert figure["layout"]["yaxis"]["autorange"] == "reversed"
        assert figure["layout"]["yaxis"]["scaleanchor"] == "x"
    assert len({figure["data"][0]["zmax"] for figure in maps}) == 1


def test_the_page_says_what_the_record_holds(grey, page):
    text = text_of(page)
    assert headline(grey).replace(" ", "") in text.replace(" ", "").replace("\xa0", "")
    for run in grey.descents:
        assert run.verdict in text
    for row in grey.table():
        assert row["parameter"].replace("_", " ") in text
    assert "0.8000" in text
    assert "45.84°" in text
    assert f"±{math.degrees(grey.basin):.1f}°" in text


def test_a_lost_descent_is_shown_and_breaks_nothing(grey):
    text = text_of(report_recovery(dataclasses.replace(grey, descents=(LOST, NEVER)), facts={}))
    assert "1 becomes NaN" in text
    assert "not a number lost: not a number" in text


def test_a_page_without_descents_speaks_of_none(grey):
    text = text_of(report_recovery(dataclasses.replace(grey, descents=()), facts={}))
    assert "The descents" not in text
    assert "✗ Gradient descent" not in text


def test_a_kernel_that_looks_the_same_from_all_sides_is_reported():
    blob = small_recovery(noise(1, 24, 24), wavelength=math.inf)
    text = text_of(report_recovery(blob, facts={}))
    assert "the same in every orientation" in text
    assert "∞" in text


def test_colour_photographs_get_kernels_for_each_channel():
    recovery = small_recovery(noise(3, 40, 40), noise(3, 40, 40) ** 2, phase=1.0)
    page = report_recovery(recovery, facts={})
    assert page.count('data-chart="kernel-') == 12
    text = text_of(page)
    assert "First of 2 photographs" in text
    assert all(name in text for name in ("red", "green", "blue"))
    assert "The index of a parameter is that of its channel." in text


def test_all_files_are_written(written):
    folder, names = written
    assert sorted(names) == sorted(path.name for path in folder.iterdir())
    assert {"result.json", "report.html"} < set(names)
    for name in names:
        content = (folder / name).read_bytes()
        assert content.startswith(b"\x89PNG") == name.endswith(".png")


def test_a_missing_folder_is_told_before_anything_is_drawn(grey, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        write_recovery(grey, tmp_path / "missing", facts={})


@pytest.mark.parametrize("package", ["jinja2", "plotly"])
def test_a_missing_package_is_named_with_what_installs_it(grey, monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'Reports need {package}: pip install "gaborium\[rep'):
        report_recovery(grey, facts={})


# -- in a browser -----------------------------------------------------------------------------


def test_a_browser_draws_the_page_without_a_complaint(page, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"needs a browser on PATH: {', '.join(names)}")
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=10000", "--window-size=1200,4000",
            "--enable-logging=stderr", f"--screenshot={picture}", "--dump-dom",
            Path(tmp_path / "report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Errors of scripts and of the page's own policy are written to the console.
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    drawn = without_library(done.stdout)
    for chart in ("response", "residual", "kernel-planted-0", "landscape", "orientation"):
        (start,) = [m.start() for m in re.finditer(f'<div class="[^"]*" id="{chart}"', drawn)]
        assert 'class="main-svg"' in drawn[start : start + 3000], chart
    # The library's own bar of buttons has one that sends the chart to a server.
    assert "Share chart" not in drawn
    assert picture.read_bytes().startswith(b"\x89PNG")
