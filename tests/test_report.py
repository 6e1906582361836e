"""A report states what the record holds, opens offline, and is safe whatever names it is given."""

import csv
import dataclasses
import functools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gaborium import Gabor2d, GaborConv2d, Outcome, census, convert, fit, gabor
from gaborium.diagnostics import Diagnosis, Finding, Severity, TrainingSetup, diagnose
from gaborium.experiments import planted_setup, recover_planted
from gaborium.plots import best_first
from gaborium.report import describe, write_index, write_report
from gaborium.report.formatting import counted, degrees, listing, number, percent
from gaborium.training import Mean, Recipe, Run, TrainResult

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

HOSTILE = "</script><script>alert('x')</script>\"onload=\"<img src=http://example.com/x.png>"
KINDS = ("fit", "census", "conversion", "recovery", "diagnosis", "train")
FILES = {
    "fit": {"result.csv", "fit.png", "parameters.png"},
    "census": {"result.csv", "census.png", "parameters.png"},
    "conversion": {"result.csv", "conversion.png", "parameters.png"},
    "recovery": {"recovery.png", "landscape.png", "orientation.png"},
    "diagnosis": {"step-limit.png", "health.png", "identifiability.png",
                  "landscape-of-orientation-filter-0.png"},
    "train": {"training.png", "filters.png"},
}  # fmt: skip


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def planted(n: int = 6, size: int = 9) -> torch.Tensor:
    """Gabor functions under more and more noise; the last is zero, the one before not finite."""
    spread = torch.linspace(0, 1, n, dtype=torch.float64)
    params = Gabor2d.of(orientation=3 * spread, wavelength=4 + 2 * spread, sigma=2.0, phase=spread)
    kernels = gabor(params, size) + 0.03 * (1 + spread)[:, None, None] * noise(n, size, size)
    kernels[-2, 0, 0], kernels[-1] = torch.nan, 0.0
    return kernels


def training_run(variant: str, seed: int, accuracy: float | None) -> Run:
    """A run of three epochs; its Gabor filters turn by 0.1 rad in each."""
    turn = 0.1 * torch.arange(4.0)[:, None] + torch.tensor([0.2, 1.0, 2.0])
    params = Gabor2d.of(orientation=turn[..., None], wavelength=6.0, sigma=2.0)
    learned = variant == "gabor"
    fields = ("orientation", "wavelength", "sigma")
    curve = [
        {"epoch": epoch, "test_accuracy": 0.3 * epoch, "loss": 2.0,
         "displacement": dict.fromkeys(fields, 0.1 * epoch) if learned else {}}
        for epoch in range(4)
    ]  # fmt: skip
    fields = params.expand().as_dict().items()
    snapshots = [Gabor2d(**{name: one[i] for name, one in fields}) for i in range(4)]
    kernels = gabor(params.expand(), 7) if learned else torch.rand(4, 3, 1, 7, 7)
    return Run(
        variant=variant, seed=seed, accuracy=accuracy, n_first_parameters=18, n_parameters=1000,
        accuracy_reset=accuracy - 0.1 if learned and accuracy else None, curve=curve,
        epochs=[0, 1, 2, 3], kernels=kernels, params=snapshots if learned else [],
        seconds=2.5, stopped="" if accuracy else f"The loss of {variant} is not finite.",
    )  # fmt: skip


def trained(accuracies: dict[tuple[str, int], float | None]) -> TrainResult:
    runs = tuple(training_run(*key, accuracy) for key, accuracy in accuracies.items())
    recipe = Recipe(
        data=HOSTILE, epochs=3, seeds=tuple(dict.fromkeys(seed for _, seed in accuracies))
    )
    data = {"name": HOSTILE, "n_train": 100, "n_test": 50, "n_classes": 2, "n_channels": 1,
            "image_size": [12, 12], "sha256": "0" * 64}  # fmt: skip
    return TrainResult(recipe, runs, data)


def make(kind: str) -> tuple[Any, torch.Tensor | None]:
    """A small real result of a kind, and the kernels that it is about."""
    if kind == "fit":
        return fit(planted(), center=True, n_starts=4), planted()
    if kind == "census":
        kernels = torch.cat([planted(3)[:1], noise(1, 9, 9), torch.zeros(1, 9, 9)])
        return census(kernels, n_starts=2), kernels
    if kind == "conversion":
        layer = nn.Conv2d(1, 4, 9, dtype=torch.float64)
        with torch.no_grad():
            layer.weight[:2, 0] = planted(6)[:2]
            layer.weight[3] = 0
        return convert(layer, calibrate=noise(3, 1, 30, 30).cumsum(-1), n_starts=2), layer.weight
    if kind == "train":
        shares = {("gabor", 0): 0.90, ("gabor", 1): 0.94, ("free", 0): 0.85, ("free", 1): 0.91}
        return trained(shares), None
    stripes = Gabor2d.of(orientation=0.8, wavelength=5.0, sigma=2.0)
    image = [noise(1, 40, 40).float()]
    start = stripes.replace(orientation=torch.tensor(-0.7 if kind == "recovery" else 0.6))
    if kind == "recovery":
        rates = {"n_steps": 3, "learning_rates": (0.1, 1.0)}
        return recover_planted(image, stripes, start=start, kernel_size=11, **rates), None
    *setup, optimizer = planted_setup(image, stripes, start=start, kernel_size=9)
    return diagnose(*setup, optimizer=optimizer, n_steps=20), None


@pytest.fixture(scope="module")
def made() -> Callable[[str], tuple[Any, torch.Tensor | None]]:
    return functools.cache(make)


@pytest.fixture(scope="module")
def folders(made, tmp_path_factory) -> Callable[[str], Path]:
    """The report of each kind, with hostile names."""

    @functools.cache
    def folder_of(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        result, kernels = made(kind)
        facts = {"file": HOSTILE, HOSTILE: "seed", "command": f"gaborium {kind}"}
        files = write_report(result, folder, facts=facts, kernels=kernels)
        assert sorted(files) == sorted(folder.iterdir())
        return folder

    return folder_of


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    text = unescape(re.sub(r"<[^>]*>", " ", page.partition("<body>")[2])).replace("\u00a0", " ")
    return " ".join(text.split())


def strict_json(folder: Path) -> Any:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads((folder / "result.json").read_text(encoding="utf-8"), parse_constant=refuse)


def written(result: Any, folder: Path, kernels: torch.Tensor | None = None) -> str:
    write_report(result, folder, kernels=kernels)
    return text_of(page_of(folder))


# -- numbers ----------------------------------------------------------------------------------


def test_numbers_are_written_as_one_writes_them():
    values = [0.99996, 9.99996, 123456.0, -0.00012345, 1e-300, -2.0, math.inf]
    assert [number(value) for value in values] == [
        "1.00", "10.0", "1.23 × 10⁵", "−1.23 × 10⁻⁴", "1.00 × 10⁻³⁰⁰", "−2.00", "∞",
    ]  # fmt: skip
    assert [percent(value) for value in (0.5, 0.99949, math.nan)] == [
        "50.0 %", "99.95 %", "not a number"
    ]  # fmt: skip
    assert (degrees(math.pi / 4), degrees(math.inf)) == ("45.0°", "∞")
    assert (counted(1, "filter"), counted(3, "filter")) == ("1 filter", "3 filters")
    assert (listing([]), listing(["a"]), listing(["a", "b", "c"])) == ("", "a", "a, b and c")


# -- every page -------------------------------------------------------------------------------


def test_a_report_is_a_page_with_figures_and_a_record(folders, kind):
    names = {path.name for path in folders(kind).iterdir()}
    assert names == FILES[kind] | {"report.html", "result.json"}
    for name in names:
        content = (folders(kind) / name).read_bytes()
        assert content.startswith(b"\x89PNG") == name.endswith(".png")


def test_a_page_refers_to_nothing_outside_itself_runs_nothing_and_is_small(folders, kind):
    page = page_of(folders(kind))
    assert "://" not in page.replace("http://example.com/x.png", "")  # in hostile names, as text
    references = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']{0,20})", page)
    assert all(re.match("#|data:image/png", reference) for reference in references)
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert len(page.encode()) < 500_000


def test_hostile_names_are_text(folders, kind):
    page = page_of(folders(kind))
    assert "<img src=http" not in page
    assert unescape(page).count(HOSTILE) >= 2  # a fact's value, a fact's name


def test_the_answer_comes_first_and_the_record_holds_it(made, folders, kind):
    text, record = text_of(page_of(folders(kind))), strict_json(folders(kind))
    result = made(kind)[0]
    first = text.partition("How this page was made")[0]
    report = describe(result)  # a terminal needs no kernels
    places = [first.index(part) for part in (report.headline, *report.sentences)]
    assert places == sorted(places)
    assert record["headline"] == report.headline
    assert record["format"] == f"gaborium.{kind}"
    assert record["facts"]["command"] == f"gaborium {kind}"
    assert f"torch {record['versions']['torch']}" in text


def test_figures_follow_the_page_and_their_parts_have_names_of_their_own(folders, kind):
    page = page_of(folders(kind))
    figures = re.findall(r'<figure class="(\w*)".*?</figure>', page, re.DOTALL)
    assert figures.count("wide") == figures.count("narrow")
    assert figures
    assert "#222222" not in page
    names = [re.findall(r'<clipPath id="(\w+)"', svg) for svg in page.split("<figure")[1:]]
    flat = [name for some in names for name in set(some)]
    assert len(flat) == len(set(flat))


def test_a_missing_folder_is_reported_before_any_work(made, tmp_path):
    for kind in KINDS:
        result, kernels = made(kind)
        with pytest.raises(FileNotFoundError, match=r"There is no folder '.*missing'"):
            write_report(result, tmp_path / "missing", kernels=kernels)


def test_either_all_files_are_written_or_none(made, tmp_path, monkeypatch):
    monkeypatch.setattr("gaborium.report.saved", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(*made("fit")[:1], tmp_path, kernels=made("fit")[1])
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_report_is_refused(made, tmp_path):
    with pytest.raises(TypeError, match=r"There are reports for .*Census.*, not for dict"):
        write_report({}, tmp_path)
    with pytest.raises(TypeError, match="The report of a FitResult needs kernels="):
        write_report(made("fit")[0], tmp_path)
    for kind in ("fit", "census", "conversion"):
        with pytest.raises(ValueError, match=r"kernels must belong to the . filters"):
            write_report(made(kind)[0], tmp_path, kernels=planted(7))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_what_installs_it(made, tmp_path, monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'need {package}: pip install "gaborium\[(rep|plot)'):
        write_report(made("recovery")[0], tmp_path)


def test_a_browser_shows_the_pages_without_a_complaint(folders, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"needs a browser on PATH: {', '.join(names)}")
    pages = [(folders(kind) / "report.html").as_uri() for kind in KINDS]
    frames = tmp_path / "frames.html"
    frames.write_text("".join(f"<iframe src='{page}'></iframe>" for page in pages))
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr", "--dump-dom", frames.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Violations of a page's own policy are written to the console.
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []


# -- filters ----------------------------------------------------------------------------------


def test_a_fit_is_summarized_over_the_filters_that_it_names(made):
    result, _ = made("fit")
    explained = result.explained_variance[:4]
    assert describe(result).headline == (
        "4 of 6 filters converged to a Gabor function; the median explained variance is "
        f"{percent(explained.quantile(0.5).item())}."
    )
    assert describe(result).sentences[1] == f"2 filters: {Outcome.BAD_INPUT.value}"


@pytest.mark.parametrize("outcome", [o for o in Outcome if o is not Outcome.CONVERGED])
def test_what_did_not_converge_is_not_called_converged(made, outcome):
    result = dataclasses.replace(made("fit")[0], outcome=(outcome,) * 6)
    assert describe(result).headline.startswith("0 of 6 filters converged")
    recovery, _ = made("recovery")
    found = dataclasses.replace(recovery.found, outcome=(outcome,))
    assert "converged" not in describe(dataclasses.replace(recovery, found=found)).headline


def test_the_record_of_a_fit_comes_back(made, folders):
    result, _ = made("fit")
    record = strict_json(folders("fit"))["result"]
    assert record == json.loads(result.to_json())
    assert record["explained_variance"][4:] == ["nan", "nan"]
    with (folders("fit") / "result.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, other in zip(rows, result.to_table(), strict=True):
        assert list(row) == list(other)
        for name, value in other.items():
            if isinstance(value, float):  # every digit, and nan
                assert float(row[name]) == value or math.isnan(value)
            else:
                assert row[name] == str(value)


def test_every_filter_has_a_row_with_a_picture_and_its_values(made, folders):
    result, _ = made("fit")
    rows = re.findall(r"<tr>(.*?)</tr>", page_of(folders("fit")), re.DOTALL)
    rows = [row for row in rows if "<img" in row]
    for row, index in zip(rows, best_first(result), strict=True):
        text = text_of(f"<body>{row}")
        assert text.startswith(
            f"{index} CONVERGED {percent(result.explained_variance[index].item())}"
        )
        value, error = (one["wavelength"][index].item()
                        for one in (result.params.as_dict(), result.standard_error))  # fmt: skip
        assert f"{number(value, 3)} ± {number(error, 2)}" in text
        angle, error = (one["orientation"][index].item()
                        for one in (result.params.as_dict(), result.standard_error))  # fmt: skip
        assert f"{degrees(angle, 3)} ± {degrees(error, 2)}" in text


def test_of_many_filters_some_are_shown_from_best_to_worst(made):
    result, kernels = made("fit")
    chosen = [0, 1, 2, 3] * 40
    last = describe(result[chosen], kernels[chosen]).sections[-1]
    assert "64 of 160 filters, evenly from the first to the last" in last.text[1]
    order = best_first(result[chosen])
    shown = [int(row[0]) for row in last.table.rows]
    assert len(shown) == 64
    assert (shown[0], shown[-1]) == (order[0], order[-1])
    assert shown == sorted(shown, key=order.index)


def test_with_nothing_to_report_there_are_pages_too(made, tmp_path):
    result, kernels = made("fit")
    text = written(result[[4, 5]], tmp_path, kernels[4:])
    assert "0 of 2 filters converged to a Gabor function." in text
    assert "Every filter" not in text
    assert "No fault was found in the filters." in written(bare(), tmp_path)


@pytest.mark.parametrize("n_dims", [1, 3])
def test_other_dimensions_have_reports_too(n_dims):
    size = (9,) if n_dims == 1 else (5, 5, 5)
    wave = torch.cos(1.5 * torch.arange(size[0])).expand(2, *size) + 0.01 * noise(2, *size)
    for one in (fit(wave, n_dims=n_dims, n_starts=1), census(wave, n_dims=n_dims, n_starts=1)):
        sections = describe(one, wave).sections
        assert len(sections[-1].table.rows) == 2
        assert not any("V1" in section.title for section in sections)


def test_a_census_gives_classes_reasons_and_the_comparison_with_v1(made, folders):
    result, kernels = made("census")
    text = text_of(page_of(folders("census")))
    assert "A Gabor function describes 1 of 3 filters (33 %); the rest: " in text
    for index, label in enumerate(result.labels):
        assert f"{label} {result.explain(index)}" in text
    layer, v1 = result.compare_with_v1()["n_x"]
    assert f"n_x {number(layer)} {number(v1)}" in text
    assert strict_json(folders("census"))["result"] == json.loads(result.to_json())
    blob = describe(census(kernels[2:], n_starts=2))
    assert [section.title for section in blob.sections] == [""]


def test_a_conversion_says_how_filters_were_chosen_and_how_well_they_are_replaced(made, folders):
    result, kernels = made("conversion")
    text, (before, after) = text_of(page_of(folders("conversion"))), result.n_first_parameters
    n, report = int(result.is_gabor.sum()), describe(result)
    assert report.headline == (
        f"Gabor functions replace {n} of 4 filters ({25 * n} %); the layer had {before} "
        f"parameters, now {after}."
    )
    assert report.sentences[0].endswith("80 % of the variance of its responses to the images.")
    worst = percent(result.fit.explained_variance[result.is_gabor].min().item())
    assert f"worst {worst}" in report.sentences[1]
    assert text.count(" Gabor ") >= n
    assert text.rindex(" Gabor CONVERGED") < text.index(" as before ")
    layer = nn.Conv2d(1, 4, 9, dtype=torch.float64)
    layer.weight.data.copy_(kernels)
    for options, words in (({"filters": [2]}, "were named."), ({}, "variance of its kernel.")):
        plain = describe(convert(layer, n_starts=1, **options))
        assert plain.sentences[0].endswith(words)


# -- learning ---------------------------------------------------------------------------------


def test_a_recovery_states_its_errors_and_every_descent(made, folders):
    result, _ = made("recovery")
    text, record = text_of(page_of(folders("recovery"))), strict_json(folders("recovery"))["result"]
    for name, error in result.kernel_errors().items():
        assert number(error, 2) in describe(result).headline
        assert record["kernel_errors"][name] == error
    for run in result.descents:
        assert run.verdict in text
    for row in result.table():
        assert row["parameter"] in text
    assert number(result.target.orientation.item()) in text
    assert f"{degrees(result.basin)} of the truth" in text
    target = Gabor2d.from_json(json.dumps(record["target"]))
    assert torch.equal(target.orientation, result.target.orientation)
    found = Gabor2d.from_json(json.dumps(record["found"]["params"]))
    assert torch.equal(found.sigma, result.found.params.sigma)
    assert [one["orientation"] for one in record["descents"]] == [
        one.orientation for one in result.descents
    ]


def test_the_slope_of_the_cone_is_that_of_the_rmse_next_to_the_truth(made):
    result, _ = made("recovery")
    text = " ".join(describe(result).sections[2].text)
    slope = float(re.search(r"c = ([\d.]+) per rad", text)[1])
    around, losses = (result.landscape[name] for name in ("orientation", "rmse"))
    for theta, loss in zip(around, losses, strict=True):
        if 0.01 < abs(theta - 0.8) < 0.04:
            assert loss / abs(theta - 0.8) == pytest.approx(slope, rel=0.03)
    rates = {run.learning_rate for run in result.descents}
    assert all(f"{degrees(rate * slope, 2)} for step size {rate:g}" in text for rate in rates)


def test_a_lost_descent_and_none_at_all_have_pages(made):
    result, _ = made("recovery")
    lost = dataclasses.replace(
        result.descents[0], orientation=[-0.7, math.nan], loss=[0.5, math.nan],
        final_error=math.nan,
    )  # fmt: skip
    result = dataclasses.replace(result, descents=(lost,))
    assert describe(result).sections[-1].table.rows[0][2] == "lost: not a number"
    assert json.loads(result.to_json())["descents"][0]["loss"] == [0.5, "nan"]
    none = describe(dataclasses.replace(result, descents=()))
    assert none.headline.startswith("None of 0 descents")
    assert none.sections[-1].table is None


def bare(*findings: Finding) -> Diagnosis:
    """A diagnosis without a trial."""
    stripes = Gabor2d.of(wavelength=5.0, sigma=2.0)
    layer, loss, data, optimizer = planted_setup(
        [noise(1, 20, 20)], stripes, start=stripes, kernel_size=9
    )
    setup = TrainingSetup(layer, loss, *data, optimizer)
    return Diagnosis(list(findings), {}, {}, [], (math.nan, math.nan), setup)


def test_findings_come_by_severity_with_remedies_and_figures(made, folders):
    result, _ = made("diagnosis")
    page = page_of(folders("diagnosis"))
    text = text_of(page)
    first = result.findings[0]
    assert first.cause == "cone at the minimum"
    order = [f"{i}. {found.cause}" for i, found in enumerate(result.findings, 1)]
    places = [text.index(part) for part in (describe(result).headline, *order, "The examination")]
    assert places == sorted(places)
    codes = [unescape(code) for code in re.findall(r"<pre><code>(.*?)</code>", page, re.DOTALL)]
    assert codes == [found.remedy.strip() for found in result.findings if found.remedy]
    article = page.split("<section")[2]
    assert 'class="tone"' in article
    assert "step-limit" in article
    explained = first.numbers["explained_with_remedy"]
    assert f"explained with remedy {percent(explained)}" in text
    record = strict_json(folders("diagnosis"))["result"]
    assert [one["cause"] for one in record["findings"]] == [f.cause for f in result.findings]
    assert record["findings"][0]["numbers"]["sharpness"] == "inf"


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("One is 0.5 px. Another is not.", "One is 0.5 px."),
        ("It stays 1.01. A step is long.", "It stays 1.01."),
        ("A loss of 1. and no more.", "A loss of 1. and no more."),
    ],
)
def test_the_headline_is_the_first_sentence_of_the_first_finding(sentence, expected):
    severe, note = Finding("a", Severity.SEVERE, sentence), Finding("b", Severity.NOTE, "Blue.")
    assert describe(bare(severe, note)).headline == expected
    nothing = "No fault was found in the filters. The training was not examined."
    assert describe(bare(note)).headline == describe(bare()).headline == nothing


@pytest.mark.parametrize(
    ("losses", "explained", "expected"),
    [
        ([2.0, 0.1], 0.995, "One is 0.5 px."),
        ([2.0, 0.1], -0.2, "It does not learn here: after 1 step the output is worse than a "),
        ([2.0, 0.1], 0.25, "after 1 step the output explains 25.0% of the targets' variance. One"),
        ([2.0, 1.5], math.nan, "after 1 step the loss went from 2 to 1.5. One is 0.5 px."),
    ],
)
def test_the_headline_says_first_whether_it_learned(losses, explained, expected):
    found = bare(Finding("a", Severity.SEVERE, "One is 0.5 px. Another is not."))
    tried = dataclasses.replace(found, losses=losses, explained=(0.0, explained))
    assert expected in describe(tried).headline
    unknown = dataclasses.replace(tried, findings=[])
    assert ("cause is unknown" in unknown.headline) == (not tried.learns)


def test_filters_are_drawn_with_the_finding_about_them(tmp_path):
    params = Gabor2d.of(orientation=[0.3, 1.2, 2.2], wavelength=5.0, sigma=2.0)
    amplitude = torch.tensor([1.0, 1.0, 0.0])
    layer = GaborConv2d(3, 3, 13, start=params.replace(amplitude=amplitude))
    net = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = noise(4, 3, 20, 20).float(), torch.tensor([0, 1, 2, 0])
    result = diagnose(net, nn.functional.cross_entropy, data, n_steps=3)
    text = written(result, tmp_path)
    assert "dead filters" in text
    assert (tmp_path / "health-of-0.png").is_file()
    assert "Where: 2" in text


def test_whatever_a_diagnosis_holds_is_text(made, tmp_path):
    result, _ = made("diagnosis")
    finding = Finding(HOSTILE, Severity.SEVERE, f"`{HOSTILE}` {HOSTILE}", {HOSTILE: math.nan},
                      f"# {HOSTILE}", (HOSTILE,))  # fmt: skip
    parts = {HOSTILE: result.parts["gradients"], "step limit": result.parts["step limit"]}
    hostile = dataclasses.replace(
        result, findings=[finding], parts=parts, skipped={HOSTILE: HOSTILE}
    )
    text = written(hostile, tmp_path)
    page = page_of(tmp_path)
    assert "<script" not in page
    assert "<img src=http" not in page
    assert text.count("alert('x')") >= 8


def test_the_headline_of_a_training_compares(made):
    assert describe(made("train")[0]).headline == (
        "With the first layer gabor, test accuracy is 92.0 ± 2.0 %: +4.0 ± 1.0 points compared "
        "with free."
    )
    alone = describe(trained({("gabor", 0): 0.9})).headline
    assert alone == "With the first layer gabor, test accuracy is 90.0 %."
    stopped = trained({("gabor", 0): None, ("free", 0): 0.9})
    assert "gabor, test accuracy is – %" in describe(stopped).headline
    assert "The loss of gabor is not finite." in describe(stopped).sentences


def test_a_training_states_what_learning_gains(made, folders):
    result, _ = made("train")
    moved, gain = describe(result).sentences
    assert moved == (
        "gabor, median distance from the start: orientation 17°, wavelength 0.30 and sigma 0.30."
    )
    assert gain == "gabor, accuracy minus that of reset filters: +10.0 ± 0.0 points."
    text = text_of(page_of(folders("train")))
    assert "free 2 88.0 % 3.0 % – – 18 1000" in text
    record = strict_json(folders("train"))["result"]
    end = Gabor2d.from_json(json.dumps(record["runs"][0]["end"]))
    assert torch.equal(end.orientation, result.runs[0].end.orientation)
    assert Mean.of([0.9, 0.94]).mean == pytest.approx(record["table"][0]["accuracy"])


# -- the list of runs -------------------------------------------------------------------------


def test_the_index_lists_finished_runs_newest_first(folders, tmp_path):
    for kind in KINDS:
        shutil.copytree(folders(kind), tmp_path / f"my {kind}")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "my fit" / "result.json").write_text("{")
    page = write_index(tmp_path).read_text(encoding="utf-8")
    links = re.findall(r'<a href="([^"]*)">([^<]*)</a>', page)
    assert sorted(links) == sorted((f"my%20{kind}/report.html", f"my {kind}") for kind in KINDS)
    assert strict_json(tmp_path / "my train")["headline"] in text_of(page)
    assert "<code>gaborium train</code>" in page
    assert write_index(tmp_path) is not None  # its own page is replaced


@pytest.mark.parametrize("content", [b"my home page", b"\xff\xfe"])
def test_an_index_that_is_not_ours_stays(tmp_path, content):
    (tmp_path / "index.html").write_bytes(content)
    assert write_index(tmp_path) is None
    assert (tmp_path / "index.html").read_bytes() == content
