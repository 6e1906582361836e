"""The report of a census shows every filter with its class, and says why."""

import json
import math
import re

import pytest
import torch

from gaborium import Census, Gabor2d, census, gabor, starts
from gaborium.plots import plot_census
from gaborium.reporting import census_headline, census_record, report_census, write_census

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

HOSTILE = "</script><script>alert('x')</script><img src=http://example.com/x.png>"


@pytest.fixture(scope="module")
def kernels() -> torch.Tensor:
    shapes = Gabor2d.of(
        orientation=[0.3, 1.0], wavelength=[4.0, math.inf], sigma=[2.5, 1.8], dtype=torch.float64
    )
    return torch.cat([gabor(shapes, 9), torch.zeros(1, 9, 9)])


@pytest.fixture(scope="module")
def result(kernels) -> Census:
    return census(kernels, n_starts=2)


def test_the_page_shows_every_filter_and_refers_to_nothing_outside(result, kernels):
    page = report_census(result, kernels, title=HOSTILE, facts={"file": HOSTILE})
    assert page.count('alt="kernel"') == len(result) == 3
    for index, label in enumerate(result.labels):
        assert result.explain(index).split(":")[0][:20].split("(")[0] in page
        assert f"</span>{label}\n" in page
    assert HOSTILE not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)


def test_headline_and_record_tell_the_share(result, kernels):
    record = census_record(result, kernels, facts={})
    assert census_headline(result) == record["headline"]
    assert record["headline"].startswith("1 of 3 filters (33 %) is a Gabor function; the rest: ")
    json.dumps(record, allow_nan=False)


def test_all_files_are_written_or_none(result, kernels, tmp_path):
    names = write_census(result, kernels, tmp_path, facts={})
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    assert {"census.pdf", "census.svg", "census.png"} < set(names)
    with pytest.raises(FileNotFoundError, match="make it first"):
        write_census(result, kernels, tmp_path / "missing", facts={})


def test_the_page_compares_with_v1_where_there_is_something_to_compare(result, kernels):
    page = report_census(result, kernels, facts={})
    layer, v1 = result.compare_with_v1()["n_x"]
    assert f"<th>n_x, median</th><td>{layer:.2f}</td><td>{v1:.2f}</td>" in page
    assert page.count("<td>58 %</td>") == 1
    blob = kernels[1:2]
    assert "macaque V1</h2>" not in report_census(census(blob, n_starts=2), blob, facts={})


def test_a_figure_has_the_shares_and_the_gabors_beside_v1(result, kernels):
    figure = plot_census(result, kernels)
    titles = [place.get_title(loc="left") for place in figure.axes]
    assert titles == [
        "3 filters by class", "Classes", "Envelopes, in cycles", "Orientations", "Wavelengths",
        "Bandwidths", "",
    ]  # fmt: skip
    envelopes, orientations, _, bandwidths, key = figure.axes[2:]
    for share, region in zip((0.95, 0.5), envelopes.patches, strict=True):
        far = starts.v1_distance(*torch.from_numpy(region.get_xy()).T)
        assert torch.allclose(far, torch.tensor(starts.v1_radius(share)).double())
    # As many cells as there are Gabor functions: one.
    angle, radius = orientations.lines[0].get_data()
    assert sum(radius[1:9:2]) * 3 == pytest.approx(1)
    assert [math.degrees(one) for one in angle[:2]] == pytest.approx([-22.5, 22.5])
    assert radius[0] == radius[1] == pytest.approx(starts.V1_CARDINAL / 6)
    assert bandwidths.patches[-1].get_data().values.sum() == pytest.approx(1)
    assert len(key.get_legend().get_texts()) == 4
    with pytest.raises(ValueError, match="those of the 3 filters"):
        plot_census(result, kernels[:2])


@pytest.mark.parametrize("n_dims", [1, 3])
def test_beside_sounds_and_volumes_there_are_no_cells(n_dims):
    side = 9 if n_dims == 1 else 5
    bank = torch.cos(1.5 * torch.arange(side)).expand(1, *[side] * n_dims).contiguous()
    figure = plot_census(census(bank, n_dims=n_dims, n_starts=2), bank)
    titles = [place.get_title(loc="left") for place in figure.axes]
    assert ("Orientations" in titles) == (n_dims == 3)
    assert titles[-2:] == ["Wavelengths", "Bandwidths"]
    assert [len(place.patches) for place in figure.axes if "Env" in place.get_title("left")] == [0]


def test_a_layer_without_gabors_has_a_figure_too(kernels):
    blob = kernels[1:2]
    figure = plot_census(census(blob, n_starts=2), blob)
    assert not figure.axes[3].lines
