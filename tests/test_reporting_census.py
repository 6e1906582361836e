"""The report of a census shows every filter with its class, and says why."""

import json
import math
import re

import pytest
import torch

from gaborium import Census, Gabor2d, census, gabor
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
        assert result.why(index).split(":")[0][:20].split("(")[0] in page
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


def test_a_figure_has_the_shares_and_the_envelopes(result, kernels):
    figure = plot_census(result, kernels)
    titles = [place.get_title(loc="left") for place in figure.axes]
    assert titles == ["3 filters by class", "Classes", "Envelopes, in cycles", "Orientations"]
    with pytest.raises(ValueError, match="those of the 3 filters"):
        plot_census(result, kernels[:2])
