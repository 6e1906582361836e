"""The report of a diagnosis: the answer on top, figures that show it, and text that stays text."""

import json
import math
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gaborium import Gabor2d, GaborConv2d
from gaborium.diagnostics import (
    Diagnosis,
    Finding,
    OutputLoss,
    Severity,
    TrainingSetup,
    diagnose,
    landscape,
)
from gaborium.experiments import planted_setup
from gaborium.reporting import (
    diagnosis_headline,
    diagnosis_record,
    joint_advice,
    report_diagnosis,
    trial_sentence,
    worded_numbers,
    write_diagnosis,
)

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("plotly")

HOSTILE = "</script><script>alert('x')</script>\"onload=\"<img src=http://example.com/x.png>"
LONG = "It is so because " * 9


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def examined(setup: TrainingSetup, n_steps: int = 20) -> Diagnosis:
    data = setup.inputs, setup.targets
    return diagnose(setup.module, setup.loss, data, optimizer=setup.optimizer, n_steps=n_steps)


def cone() -> TrainingSetup:
    """A step over the tip of the RMSE that is as wide as its basin."""
    planted = Gabor2d.of(orientation=0.8, wavelength=5.0, sigma=2.0)
    start = planted.replace(orientation=torch.tensor(0.6))
    return planted_setup([noise(1, 32, 32)], planted, start=start, kernel_size=9)


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return examined(cone())


@pytest.fixture(scope="module")
def written(diagnosis, tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    folder = tmp_path_factory.mktemp("run")
    return folder, write_diagnosis(diagnosis, folder, facts={"script": "mine.py"})


@pytest.fixture(scope="module")
def page(written) -> str:
    return (written[0] / "report.html").read_text(encoding="utf-8")


def without_library(page: str) -> str:
    """The page less the source of plotly.js, which is not ours to judge."""
    scripts = re.findall(r"<script>.*?</script>", page, flags=re.DOTALL)
    return page.replace(max(scripts, key=len), "")


def text_of(page: str) -> str:
    body = without_library(page).partition("<body>")[2]
    body = re.sub(r"<script.*?</script>", " ", body, flags=re.DOTALL)
    text = unescape(re.sub(r"<[^>]*>", " ", body)).replace("\N{NO-BREAK SPACE}", " ")
    return " ".join(text.split())


def charts_of(page: str) -> dict[str, Any]:
    found = re.findall(r'data-chart="([^"]+)">(.*?)</script>', page, flags=re.DOTALL)
    return {name: json.loads(text) for name, text in found}


def strict_json(text: str) -> Any:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


def bare(*findings: Finding, module: nn.Module | None = None, **parts: Any) -> Diagnosis:
    """A diagnosis without a trial."""
    setup = TrainingSetup(
        module or nn.Linear(1, 1), nn.functional.mse_loss, noise(2, 1), noise(2, 1)
    )
    return Diagnosis(list(findings), parts, {}, [], (math.nan, math.nan), setup)


# -- words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "headline"),
    [
        ("One is 0.5 px. Another is not.", "One is 0.5 px."),
        ("It stays 1.01. A step is long.", "It stays 1.01."),
        ("A loss of 1. and no more.", "A loss of 1. and no more."),
        (f"{LONG}of it (line 3: x = (1, 2)): y.", f"{LONG}of it."),
    ],
)  # fmt: skip
def test_the_headline_is_the_first_sentence_of_the_first_finding(sentence, headline):
    severe = Finding("a", Severity.SEVERE, sentence)
    note = Finding("b", Severity.NOTE, "It is blue.")
    assert diagnosis_headline(bare(severe, note)) == headline
    assert diagnosis_headline(bare(note)).endswith("of learning; 1 note.")
    assert diagnosis_headline(bare()).endswith("in the way of learning.")


def test_numbers_have_names_and_units():
    numbers = {"distance_rad": math.pi / 2, "largest_shift_px": 0.5, "share": 0.125, "n_lost": 2.0,
               "sharpness": math.inf, "filters": 3.0, "correlation": -0.912, "exponent": 1e-6,
               "unheard": math.nan, "explained_with_remedy": 1.0}  # fmt: skip
    assert worded_numbers(Finding("x", Severity.NOTE, "", numbers)) == [
        ("distance", "90.0°"),
        ("largest shift", "0.500 px"),
        ("share", "12.5 %"),
        ("parameters lost", "2"),
        ("largest curvature", "∞"),
        ("filters concerned", "3"),
        ("correlation", "−0.912"),
        ("power with which the slope vanishes", "0.00"),
    ]


def test_a_trial_is_told_with_what_was_measured():
    numbers = {"explained_without_remedy": -3.0, "explained_with_remedy": 1.0}
    told = trial_sentence(Finding("x", Severity.SEVERE, "", numbers))
    assert "with the remedy 100 % of the targets' variance" in told
    assert "without it nothing" in told
    numbers = {"loss_without_remedy": math.nan, "loss_with_remedy": 0.25}
    told = trial_sentence(Finding("x", Severity.SEVERE, "", numbers))
    assert "ends at 0.250, without it at not a number" in told
    assert trial_sentence(Finding("x", Severity.SEVERE, "")) == ""


@pytest.mark.parametrize(
    ("shares", "told"), [((0.1, 0.5), True), ((0.1, 0.999), False), ((0.1,), False)]
)
def test_where_no_remedy_is_enough_alone_it_says_so(shares, told):
    findings = [Finding("a", Severity.SEVERE, "A.", {"explained_with_remedy": s}) for s in shares]
    diagnosis = replace(bare(*findings), losses=[1.0, 1.0])
    assert ("No remedy was enough alone" in joint_advice(diagnosis)) is told
    assert ("No remedy was enough alone" in text_of(report_diagnosis(diagnosis, facts={}))) is told


# -- files ------------------------------------------------------------------------------------


def test_json_page_and_figures_are_written(diagnosis, written):
    folder, names = written
    assert set(names) == {path.name for path in folder.iterdir()}
    assert {"diagnosis.json", "report.html", "step-limit.png", "health.png"} <= set(names)
    assert "landscape-of-orientation-filter-0.png" in names
    record = strict_json((folder / "diagnosis.json").read_text(encoding="utf-8"))
    assert record["format"] == "gaborium.diagnosis"
    assert record["facts"] == {"script": "mine.py"}
    assert [one["cause"] for one in record["findings"]] == [f.cause for f in diagnosis.findings]
    assert record["findings"][0]["remedy"] == diagnosis.findings[0].remedy
    assert record["findings"][0]["numbers"]["sharpness"] == "inf"
    assert record["parts"]["gradients"]["table"][0]["name"] == "orientation"
    assert record["losses"] == diagnosis.losses


def test_no_folder_is_told_before_any_work(diagnosis, tmp_path):
    with pytest.raises(FileNotFoundError, match="make it first"):
        write_diagnosis(diagnosis, tmp_path / "missing", facts={})


# -- the page ---------------------------------------------------------------------------------


def test_the_answer_comes_first_and_findings_by_severity(diagnosis, page):
    text = text_of(page)
    first = diagnosis.findings[0]
    assert first.cause == "cone at the minimum"
    places = [text.index(part) for part in (
        diagnosis_headline(diagnosis), "What was found", f"1. {first.cause}", "What was looked at",
        "How this page was made", "mine.py",
    )]  # fmt: skip
    assert places == sorted(places)
    assert trial_sentence(first) in text
    assert "versions gaborium" in text
    codes = [unescape(code) for code in re.findall(r"<pre><code>(.*?)</code>", page, re.DOTALL)]
    assert codes[0] == first.remedy.strip()
    assert page.count("data-copy>") == len(codes)


def test_the_page_opens_without_a_network(page):
    ours = without_library(page)
    assert re.findall(r"https?://", ours) == []
    assert not re.search(r"<(?:script|img|link)[^>]+(?:src|href)=[\"'](?!data:)", ours)
    assert "default-src 'none'" in ours


def test_the_curves_are_of_trainings_without_and_with_the_remedy(diagnosis, page):
    chart = charts_of(page)["course-0"]
    without, with_remedy = (trace["y"] for trace in chart["data"])
    assert len(without) == len(with_remedy) == len(diagnosis.losses)
    # RMSE is the root of what stays unexplained, times the spread of the targets.
    spread = diagnosis.setup.targets.double().std(correction=0).item()
    rmse = [math.sqrt(value) * spread for value in without]
    assert rmse == pytest.approx(diagnosis.losses, rel=1e-4)
    assert with_remedy[-1] < 1e-3 < without[-1]


def test_the_charts_hold_what_the_parts_hold(diagnosis, page):
    charts = charts_of(page)
    step = diagnosis.parts["step limit"]
    measured = charts["finding-0"]["data"][-1]
    assert measured["x"] == pytest.approx(list(step.distances))
    assert measured["y"] == pytest.approx(list(step.slopes))
    found = diagnosis.parts["landscape of orientation, filter 0"]
    titled = {chart["layout"]["xaxis"]["title"]["text"]: chart for chart in charts.values()}
    curve = titled["orientation"]["data"]
    assert curve[0]["y"] == pytest.approx(found.values.tolist())
    assert curve[0]["x"][90] == pytest.approx(math.degrees(found.grids[0][90].item()))
    assert curve[1]["x"] == [math.degrees(one.position[0]) for one in found.minima[: found.n_best]]
    assert curve[-1]["x"] == pytest.approx([math.degrees(0.6)])


def test_of_positive_fields_the_shaded_basin_stands_on_a_logarithmic_axis():
    planted = Gabor2d.of(orientation=0.8, wavelength=5.0, sigma=2.0)
    layer = GaborConv2d(1, 1, 9, start=planted, bias=False)
    image = noise(1, 1, 32, 32)
    loss = OutputLoss(image, layer(image).detach())
    part = landscape(loss, layer, "wavelength", n_points=60)
    diagnosis = bare(module=layer, **{"landscape of wavelength": part})
    chart = charts_of(report_diagnosis(diagnosis, facts={}))["part-0"]
    assert chart["layout"]["xaxis"]["type"] == "log"
    inside = part.grids[0][part.basins < part.n_best].log10()
    shapes = chart["layout"]["shapes"]
    assert min(shape["x0"] for shape in shapes) == pytest.approx(inside.min().item())
    assert max(shape["x1"] for shape in shapes) == pytest.approx(inside.max().item())


def test_filters_that_a_finding_is_about_are_shown_with_it():
    params = Gabor2d.of(orientation=[0.3, 1.2, 2.2], wavelength=5.0, sigma=2.0)
    amplitude = torch.tensor([1.0, 1.0, 0.0])
    layer = GaborConv2d(3, 3, 13, start=params.replace(amplitude=amplitude))
    net = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    labels = torch.tensor([0, 1, 2, 0])
    data = noise(4, 3, 20, 20), labels
    diagnosis = diagnose(net, nn.functional.cross_entropy, data, n_steps=3)
    index = [found.cause for found in diagnosis.findings].index("dead filters")
    page = report_diagnosis(diagnosis, facts={})
    article = page.split("<article")[index + 1].partition("</article>")[0]
    assert re.findall(r'alt="([^"]*)"', article) == ["2: dead"]
    assert re.findall(r'alt="([^"]*)"', page)[-3:] == ["0", "1", "2: dead"]
    # Classes have no explained share: what is drawn is the loss.
    chart = charts_of(page).get(f"course-{index}")
    assert chart is None or chart["layout"]["yaxis"]["title"]["text"] == "loss"


def test_parameters_of_a_finding_stand_out_in_the_table():
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor(0.5))
            self.gain = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.gain * self.theta.detach().cos()

    x = noise(8, 1)
    diagnosis = examined(TrainingSetup(Detached(), nn.functional.mse_loss, x, 0.3 * x), n_steps=3)
    assert diagnosis.findings[0].cause == "no gradient"
    page = report_diagnosis(diagnosis, facts={})
    rows = re.findall(r'<tr class="concerned"><th>(.*?)</th>', page)
    assert rows == ["theta"]
    assert diagnosis.explained[0] < 0 or "was explained before" in text_of(page)


def test_nothing_found_and_nothing_trained_make_a_page_too():
    page = report_diagnosis(bare(), facts={})
    text = text_of(page)
    assert "Nothing was found that stands in the way of learning." in text
    assert "What was found" not in text
    assert charts_of(page) == {}


def test_a_training_that_breaks_down_is_drawn_as_far_as_it_goes():
    setup = TrainingSetup(nn.Linear(1, 1), nn.functional.mse_loss, noise(4, 1), noise(4, 1))
    setup = replace(setup, optimizer=torch.optim.SGD(setup.module.parameters(), lr=1e30))
    remedy = "for group in optimizer.param_groups:\n    group['lr'] = 0.1\n"
    numbers = {"explained_without_remedy": math.nan, "explained_with_remedy": 0.5}
    finding = Finding("step too large", Severity.SEVERE, "It is.", numbers, remedy)
    losses = setup.copy().train(20)
    assert not math.isfinite(losses[-1])
    diagnosis = Diagnosis([finding], {}, {}, losses, (0.0, math.nan), setup)
    page = report_diagnosis(diagnosis, facts={})
    without, with_remedy = (trace["y"] for trace in charts_of(page)["course-0"]["data"])
    assert without[-1] is None
    assert None not in with_remedy
    strict_json(json.dumps(diagnosis_record(diagnosis, facts={}), allow_nan=False))


def test_the_report_changes_nothing_of_what_is_examined():
    module = nn.Sequential(nn.Linear(1, 4), nn.Dropout(), nn.Linear(4, 1), nn.BatchNorm1d(1))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    setup = TrainingSetup(module, nn.functional.mse_loss, noise(4, 1), noise(4, 1), optimizer)
    numbers = {"explained_without_remedy": 0.0, "explained_with_remedy": 0.5}
    remedy = "for group in optimizer.param_groups:\n    group['lr'] = 0.01\n"
    finding = Finding("step too large", Severity.SEVERE, "It is.", numbers, remedy)
    diagnosis = Diagnosis([finding], {}, {}, [1.0, 1.0, 1.0], (0.0, 0.0), setup)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.random.get_rng_state()
    assert "course-0" in charts_of(report_diagnosis(diagnosis, facts={}))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[name]) for name, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert module.training
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_whatever_a_diagnosis_holds_is_shown_as_text(diagnosis):
    finding = Finding(
        HOSTILE, Severity.SEVERE, f"`{HOSTILE}` {HOSTILE}", {HOSTILE: 1.0, "loss": math.nan},
        f"# {HOSTILE}", (HOSTILE,),
    )  # fmt: skip
    parts = {HOSTILE: diagnosis.parts["gradients"], "step limit": diagnosis.parts["step limit"]}
    one = replace(diagnosis.parts["gradients"].parameters[0], name=HOSTILE, state=HOSTILE)
    parts[HOSTILE] = replace(parts[HOSTILE], parameters=(one,), not_in_double=HOSTILE)
    hostile = replace(diagnosis, findings=[finding], parts=parts, skipped={HOSTILE: HOSTILE})
    page = report_diagnosis(hostile, title=HOSTILE, facts={HOSTILE: HOSTILE})
    # The template has two scripts of its own, and one of data for each chart.
    assert len(re.findall(r"<script>", page)) == 2
    assert "<img src=http" not in without_library(page)
    assert text_of(page).count("alert('x')") >= 12
    assert f"<code>{HOSTILE[:2]}" not in page


def test_a_backtick_alone_is_a_backtick():
    severe = Finding("a", Severity.SEVERE, "It is `.data` here. And a ` there.")
    page = report_diagnosis(bare(severe), facts={})
    assert "<h1>It is <code>.data</code> here.</h1>" in page
    assert "<p>It is `.data` here. And a ` there.</p>" in page
