"""The report of a fit shows every kernel beside its fit, and says what the result holds."""

import base64
import csv
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from gaborium import FitResult, Gabor1d, Gabor2d, Gabor3d, Outcome, fit, gabor
from gaborium.plots import best_first, colored, gallery, panels, plot_fit, plot_parameters
from gaborium.reporting import fit_headline, fit_record, fit_summary, report_fit, write_fit
from gaborium.reporting.fits import percent, with_error

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("plotly")

HOSTILE = "</script><script>alert('x')</script>\"onload=\"<img src=http://example.com/x.png>"


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def planted(n: int = 6, size: int = 11) -> torch.Tensor:
    """Gabor functions under more and more noise; the last is nothing, the one before not finite."""
    spread = torch.linspace(0, 1, n, dtype=torch.float64)
    params = Gabor2d.of(orientation=3 * spread, wavelength=4 + 2 * spread, sigma=2.0, phase=spread)
    kernels = gabor(params, size) + 0.03 * (1 + spread)[:, None, None] * noise(n, size, size)
    kernels[-2, 0, 0], kernels[-1] = torch.nan, 0.0
    return kernels


@pytest.fixture(scope="module")
def kernels() -> torch.Tensor:
    return planted()


@pytest.fixture(scope="module")
def result(kernels) -> FitResult:
    return fit(kernels, center=True)


@pytest.fixture(scope="module")
def written(result, kernels, tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    folder = tmp_path_factory.mktemp("run")
    return folder, write_fit(result, kernels, folder, facts={"file": "bank.npy"})


@pytest.fixture(scope="module")
def page(result, kernels) -> str:
    return report_fit(result, kernels, title=HOSTILE, facts={"file": HOSTILE, HOSTILE: "key"})


def without_library(page: str) -> str:
    """The page less the source of plotly.js, which is not ours to judge."""
    scripts = re.findall(r"<script>.*?</script>", page, flags=re.DOTALL)
    return page.replace(max(scripts, key=len), "")


def text_of(page: str) -> str:
    body = without_library(page).partition("<body>")[2]
    body = re.sub(r"<script.*?</script>", " ", body, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


def filters_of(page: str) -> list[int]:
    return [int(number) for number in re.findall(r"<span>filter (\d+)</span>", page)]


def strict_json(text: str) -> Any:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


# -- words ------------------------------------------------------------------------------------


def test_the_summary_is_of_the_filters_that_it_names(result):
    summary = fit_summary(result)
    explained = result.explained_variance[:4].sort().values
    assert summary["n_filters"] == 6
    assert summary["outcomes"] == {"CONVERGED": 4, "BAD_INPUT": 2}
    low, median, high = summary["explained_variance"]
    assert median == pytest.approx((explained[1] + explained[2]).item() / 2)
    assert explained[0] < low < explained[1]
    assert explained[2] < high < explained[3]
    outcome = (Outcome.OFF_MODEL, *result.outcome[1:])
    changed = fit_summary(dataclasses.replace(result, outcome=outcome))
    assert changed["wavelength"] == result.params.wavelength[1:4].median().item()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ([0, 1, 2, 3, 4, 5], "A Gabor function was found for 4 of 6 filters; the median explained"),
        ([0], "A Gabor function was found for the filter; its explained variance is 9"),
        ([4, 5], "No Gabor function was found for any of 2 filters: there was nothing to fit."),
        ([4], "No Gabor function was found for the filter: there was nothing to fit."),
    ],
)
def test_the_headline(result, chosen, expected):
    assert fit_headline(result[chosen]).startswith(expected)


@pytest.mark.parametrize("outcome", [o for o in Outcome if o is not Outcome.CONVERGED])
def test_what_did_not_converge_is_not_called_found(result, outcome):
    changed = dataclasses.replace(result, outcome=(outcome,) * len(result))
    assert fit_headline(changed).startswith("No Gabor function was found")


def test_digits_follow_the_error():
    assert with_error(12.3456, 0.234) == "12.35 ± 0.23"
    assert with_error(-12.3456, 23.0) == "−12 ± 23"
    assert with_error(math.pi, 0.1, angle=True) == "180.0° ± 5.7°"
    assert with_error(math.nan, math.nan) == "not a number"
    assert with_error(3e6, 4e9) == "3.000 × 10⁶ ± 4.0 × 10⁹"
    assert percent(0.99949) == "99.95 %"


# -- JSON and the table -----------------------------------------------------------------------


def test_the_result_is_json_and_comes_back(result, kernels, written):
    record = strict_json((written[0] / "result.json").read_text(encoding="utf-8"))
    assert record == fit_record(result, kernels, facts={"file": "bank.npy"})
    assert (record["format"], record["version"]) == ("gaborium.fit", 1)
    assert record["shape"] == [6, 11, 11]
    assert record["facts"] == {"file": "bank.npy"}
    assert record["result"] == json.loads(result.to_json())
    assert record["result"]["explained_variance"][4:] == ["nan", "nan"]
    record = fit_record(result[:4], kernels[:4], facts={})
    params = Gabor2d.from_json(json.dumps(record["result"]["params"]))
    assert torch.equal(params.wavelength, result.params.wavelength[:4])


def test_the_table_has_a_row_for_each_filter_and_field(result, written):
    with (written[0] / "result.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = result.to_table()
    assert list(rows[0]) == list(expected[0])
    assert len(rows) == len(expected) == 6 * 8
    for row, other in zip(rows, expected, strict=True):
        for name, value in other.items():
            if isinstance(value, float):  # every digit, and nan
                assert float(row[name]) == value or math.isnan(value)
            else:
                assert row[name] == str(value)


# -- the gallery ------------------------------------------------------------------------------


def test_the_gallery_is_sorted_and_leaves_out_what_is_nothing(result, page):
    explained = result.explained_variance
    order = sorted(range(4), key=lambda number: -explained[number].item())
    assert filters_of(page) == best_first(result) == order
    shown = re.findall(r"<b>([\d.]+ %)</b></header>", page)
    assert shown == [percent(explained[number].item()) for number in order]


def test_of_many_filters_the_best_the_middle_and_the_worst_are_shown(result, kernels):
    many, chosen = kernels[:4].repeat(5, 1, 1), [*range(4)] * 5
    page = report_fit(result[chosen], many, limit=6, facts={})
    order = best_first(result[chosen])
    assert filters_of(page) == [*order[:2], *order[9:11], *order[-2:]]
    text = text_of(page)
    assert "the best, those in the middle and the worst of 20" in text
    for title in ("The 2 best", "The 2 in the middle", "The 2 worst"):
        assert title in text


def test_a_gallery_too_small_for_that_is_refused(result, kernels):
    with pytest.raises(ValueError, match=r"limit must be at least 3: .* got 2"):
        report_fit(result, kernels, limit=2, facts={})


def test_kernel_fit_and_residual_add_up_and_share_a_scale(result, kernels):
    images = panels(result, kernels, [2, 0])
    assert images.shape == (2, 3, 1, 11, 11)
    assert torch.equal(images[:, 0, 0], kernels[[2, 0]])
    assert torch.allclose(images[1, 1, 0], gabor(result.params, 11)[0])
    assert torch.allclose(images[:, 0], images[:, 1] + images[:, 2])
    left = images[:, 2].square().sum((1, 2, 3)) / images[:, 0].square().sum((1, 2, 3))
    assert torch.allclose(1 - left, result.explained_variance[[2, 0]])


def test_colours_are_signed():
    values = torch.tensor([[-2.0, 0.0, 2.0, torch.nan]]).reshape(1, 1, 1, 4)
    red, green, blue = colored(values)[0, 0].T
    assert blue[0] > red[0]
    assert red[2] > blue[2]
    assert min(red[1], green[1], blue[1]) > 0.95
    assert red[3] == green[3] == blue[3]
    assert colored(torch.tensor([1.0, 0.0, -1.0]).reshape(1, 3, 1, 1)).flatten().tolist() == [
        1.0, 0.5, 0.0,
    ]  # fmt: skip


def test_the_pictures_of_the_page_are_those_of_the_panels(result, kernels, page):
    image = pytest.importorskip("PIL.Image")
    pictures = re.findall(r'src="data:image/png;base64,([^"]*)" alt="(\w+)"', page)
    assert [alt for _, alt in pictures] == ["kernel", "fit", "residual"] * 4
    for number, start in zip(best_first(result), range(0, 12, 3), strict=True):
        expected = colored(panels(result, kernels, [number])[0])
        for (code, _), colors in zip(pictures[start : start + 3], expected, strict=True):
            pixels = image.open(io.BytesIO(base64.b64decode(code))).convert("RGB")
            shown = torch.tensor(list(pixels.tobytes())).reshape(11, 11, 3)
            assert torch.equal(shown, (255 * colors).round().long())


@pytest.mark.parametrize(
    ("channels", "words"),
    [
        (1, "Blue is negative, red is positive"),
        (3, "red, green and blue, with mid-grey for 0"),
        (5, "Of 5 channels the one of most power is drawn."),
    ],
)
def test_channels_share_a_geometry_and_are_drawn(channels, words):
    kernels = planted()[:2].unsqueeze(1) * torch.linspace(0.5, 1, channels).reshape(-1, 1, 1)
    result = fit(kernels, geometry="filter", n_starts=1)
    page = report_fit(result, kernels, facts={})
    assert words in text_of(page)
    images = panels(result, kernels, [1, 0])
    assert images.shape == (2, 3, 3 if channels == 3 else 1, 11, 11)
    assert torch.equal(images[0, 0, -1], kernels[1, -1])
    assert "centre" not in text_of(page).partition("Kernel, fit")[2]  # it was not searched for


@pytest.mark.parametrize("n_dims", [1, 3])
def test_other_dimensions_have_a_report_too(n_dims, tmp_path):
    record = {1: Gabor1d, 3: Gabor3d}[n_dims]
    kernels = gabor(record.of(wavelength=[4.0, math.inf], sigma=1.3), 7).double()
    kernels = kernels + 0.01 * noise(2, *(7,) * n_dims)
    result = fit(kernels, n_dims=n_dims, n_starts=1)
    write_fit(result, kernels, tmp_path, facts={})
    text = text_of((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert ("Wavelength and sigma" in text) == (n_dims == 1)
    assert ("middle slice" in text) == (n_dims == 3)


def test_kernels_of_another_result_are_refused(result, kernels):
    for draw in (lambda k: report_fit(result, k, facts={}), lambda k: plot_fit(result, k)):
        with pytest.raises(ValueError, match="6 filters of the result, got shape"):
            draw(kernels[:4])


# -- the page ---------------------------------------------------------------------------------


def test_the_page_says_what_the_result_holds(result, page):
    text = text_of(page)
    assert fit_headline(result) in text.replace("\xa0", " ")
    assert f"bad input 2 {Outcome.BAD_INPUT.value}" in text
    low, _, high = fit_summary(result)["explained_variance"]
    assert f"quartiles {percent(low)} and {percent(high)}" in text.replace("\xa0", " ")
    for number in best_first(result):
        for name, symbol in (("wavelength", "λ"), ("sigma", "σ")):
            value = getattr(result.params, name)[number].item()
            error = result.standard_error[name][number].item()
            assert f"{symbol} {with_error(value, error)} px" in text
        angle, error = result.params.orientation[number], result.standard_error["orientation"]
        shown = with_error(angle.item(), error[number].item(), angle=True)
        assert f"θ {shown}" in text
        assert float(shown.partition("°")[0]) == pytest.approx(math.degrees(angle.item()), abs=0.1)


def chart_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" data-chart="parameters">(.*?)<', page)
    return strict_json(text)


def test_the_chart_has_every_filter_on_both_sides(result, page):
    figure = chart_of(page)
    here, there = figure["data"]
    order = best_first(result)[::-1]
    assert here["type"] == "scatterpolar"
    for trace, turn in ((here, 0.0), (there, 180.0)):
        assert trace["r"] == pytest.approx((1 / result.params.wavelength[order]).tolist())
        angles = result.params.orientation[order].rad2deg() + turn
        assert trace["theta"] == pytest.approx(angles.tolist())
        assert trace["marker"]["color"] == result.explained_variance[order].tolist()
    polar = figure["layout"]["polar"]
    # As in a picture: x to the right, y downwards.
    assert (polar["angularaxis"]["direction"], polar["angularaxis"]["rotation"]) == ("clockwise", 0)
    assert here["text"][0].startswith(f"<b>filter {order[0]}</b>, converged")
    value = result.params.wavelength[order[0]].item()
    error = result.standard_error["wavelength"][order[0]].item()
    assert f"λ = {with_error(value, error)} px" in here["text"][0]


def test_of_thousands_the_chart_draws_some_and_the_page_stays_small(result, kernels):
    chosen = [0, 1, 2, 3] * 1000
    page = report_fit(result[chosen], kernels[chosen], facts={})
    (n_drawn,) = {len(trace["r"]) for trace in chart_of(page)["data"]}
    assert n_drawn == 2000
    assert "Of 4000 filters 2000 are drawn, evenly" in text_of(page)
    assert len(page.encode()) < 10e6


def test_without_anything_to_fit_the_page_says_so(result, kernels, tmp_path):
    names = write_fit(result[[4, 5]], kernels[4:], tmp_path, facts={})
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    text = text_of((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "there was nothing to fit" in text
    assert "not a number" not in text
    assert "Kernel, fit and residual" not in text


def test_the_page_refers_to_nothing_outside_itself(page):
    ours = without_library(page)
    # The hostile names hold an address, as text.
    assert re.findall(r"https?:[^\s\"'<]*", unescape(ours).replace(HOSTILE, "")) == []
    references = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']{0,20})", ours)
    assert all(reference.startswith("data:image/png") for reference in references)
    assert "url(" not in ours
    assert "default-src 'none'" in ours


def test_hostile_names_are_text(page):
    ours = without_library(page)
    assert "alert('x')" not in ours
    assert "<img src=http" not in ours
    assert unescape(ours).count(HOSTILE) == 4  # title, heading, a fact's value, a fact's name


# -- files and figures ------------------------------------------------------------------------


def test_all_files_are_written(written):
    folder, names = written
    assert sorted(names) == sorted(path.name for path in folder.iterdir())
    assert {"result.json", "result.csv", "report.html"} < set(names)
    for name in names:
        content = (folder / name).read_bytes()
        assert content.startswith(b"\x89PNG") == name.endswith(".png")


def test_a_missing_folder_is_told_before_anything_is_drawn(result, kernels, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no folder '.*missing'"):
        write_fit(result, kernels, tmp_path / "missing", facts={})


def test_the_figure_draws_the_best_first(result, kernels):
    axes = [place for place in plot_fit(result, kernels).axes if place.images]
    titles = [place.get_title(loc="left") for place in axes[::3]]
    assert [int(title.partition(":")[0]) for title in titles] == best_first(result)


def test_the_figure_of_parameters_turns_as_pictures_do(result):
    (place,) = (axes for axes in plot_parameters(result).axes if axes.name == "polar")
    assert place.get_theta_direction() == -1
    drawn = sorted(math.degrees(theta) for theta, _ in place.collections[0].get_offsets())
    assert drawn == pytest.approx(result.params.orientation[:4].rad2deg().sort().values.tolist())


def test_an_odd_number_in_the_middle():
    assert gallery(list(range(9)), 5) == [("best", [0]), ("middle", [4]), ("worst", [8])]


# -- in a browser -----------------------------------------------------------------------------


def test_a_browser_draws_the_page_without_a_complaint(page, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"needs a browser on PATH: {', '.join(names)}")
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=10000", "--window-size=1200,2000",
            "--enable-logging=stderr", "--dump-dom", Path(tmp_path / "report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Errors of scripts and of the page's own policy are written to the console.
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    drawn = without_library(done.stdout)
    assert drawn.count('class="main-svg"') >= 1
    assert "Share chart" not in drawn
