"""The report of a conversion shows every filter beside the Gabor function that replaces it."""

import json
import re

import pytest
import torch
from torch import nn

from gaborium import Gabor2d, convert, gabor
from gaborium.conversion import Conversion
from gaborium.plots import plot_conversion
from gaborium.reporting import (
    conversion_headline,
    conversion_record,
    conversion_sentences,
    report_conversion,
    write_conversion,
)

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

HOSTILE = "</script><script>alert('x')</script><img src=http://example.com/x.png>"


def layer() -> nn.Conv2d:
    """Two Gabor functions, noise, and nothing."""
    conv = nn.Conv2d(1, 4, 9, padding=4)
    planted = Gabor2d.of(orientation=[0.3, 1.0], wavelength=[4.0, 6.0], sigma=1.8)
    with torch.no_grad():
        conv.weight[:2, 0] = gabor(planted, 9)
        conv.weight[3] = 0
    return conv


@pytest.fixture(scope="module")
def kernels() -> torch.Tensor:
    torch.manual_seed(0)
    return layer().weight.detach()


def converted(kernels: torch.Tensor, **options: object) -> Conversion:
    conv = layer()
    with torch.no_grad():
        conv.weight.copy_(kernels)
    return convert(conv, n_starts=2, **options)


@pytest.fixture(scope="module")
def conversion(kernels) -> Conversion:
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(3, 1, 40, 40, generator=draw).cumsum(-1).cumsum(-2) / 20
    return converted(kernels, calibrate=images)


def test_the_page_shows_every_filter_and_refers_to_nothing_outside(conversion, kernels):
    page = report_conversion(conversion, kernels, title=HOSTILE, facts={"file": HOSTILE})
    assert page.count('alt="kernel"') == 4
    n = int(conversion.is_gabor.sum())
    assert page.count(">Gabor function</td>") == n >= 2
    assert page.count(">as before</td>") == 4 - n
    assert page.rindex(">Gabor function</td>") < page.index(">as before</td>")
    assert HOSTILE not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "as the images see it" in page
    assert "as the images see it" not in report_conversion(converted(kernels), kernels, facts={})


def test_headline_sentences_and_record_tell_the_share_and_how_filters_were_chosen(kernels):
    conversion = converted(kernels)
    record = conversion_record(conversion, kernels, facts={})
    assert record["headline"] == conversion_headline(conversion)
    before, after = conversion.n_first_parameters
    assert record["headline"] == (
        f"2 of 4 filters (50 %) are Gabor functions now; {before} numbers of the layer become "
        f"{after}."
    )
    assert "at least 80 % of the variance of its kernel" in conversion_sentences(conversion)[0]
    named = converted(kernels, filters=[2])
    assert conversion_sentences(named)[0] == "The filters were named."
    assert "is a Gabor function now" in conversion_headline(named)
    assert named.threshold is None
    json.dumps(record, allow_nan=False)
    params = Gabor2d.from_json(json.dumps(record["result"]["params"]))
    assert torch.allclose(params.wavelength, conversion.params.wavelength)


def test_a_threshold_of_zero_converts_all_but_the_silent(kernels):
    assert converted(kernels, threshold=0.0).is_gabor.tolist() == [True, True, True, False]


def test_all_files_are_written_or_none(conversion, kernels, tmp_path):
    names = write_conversion(conversion, kernels, tmp_path, facts={})
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    assert {"conversion.pdf", "conversion.svg", "conversion.png"} < set(names)
    with pytest.raises(FileNotFoundError, match="make it first"):
        write_conversion(conversion, kernels, tmp_path / "missing", facts={})


def test_a_figure_has_the_pairs_and_what_is_explained(conversion, kernels):
    above, below = plot_conversion(conversion, kernels).axes
    n = int(conversion.is_gabor.sum())
    assert above.get_title(loc="left").startswith(f"{n} of 4 filters")
    assert [line.get_label() for line in below.lines[:2]] == ["kernels", "responses"]
    assert len(below.lines[0].get_xdata()) == 4
    none = converted(torch.randn(4, 1, 9, 9, generator=torch.Generator().manual_seed(0)))
    assert not none.is_gabor.any()
    assert not plot_conversion(none, none.layer.weight).axes[0].images
    with pytest.raises(ValueError, match="those of the 4 filters"):
        plot_conversion(conversion, kernels[:2])
