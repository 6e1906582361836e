"""The page of all runs lists what is there, newest first, and touches nothing else."""

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from gaborium.reporting import write_index

pytest.importorskip("jinja2")
pytest.importorskip("plotly")

HOSTILE = "</article><script>alert('x')</script><img src=http://example.com/x.png>"
RECORDS: dict[str, dict[str, Any]] = {
    "recover": {
        "format": "gaborium.recovery",
        "facts": {"command": "gaborium recover"},
        "kernel_errors": {"found": 2.5e-13},
        "outcome": {"headline": "recover found all parameters."},
    },
    "train": {
        "format": "gaborium.train",
        "facts": {"command": "gaborium train mine.toml"},
        "headline": HOSTILE,
        "table": [
            {"variant": "gabor", "accuracy": 0.918, "accuracy_error": 0.002},
            {"variant": "free", "accuracy": 0.857, "accuracy_error": None},
            {"variant": "mixed", "accuracy": None, "accuracy_error": None},
        ],
    },
    "fit": {
        "format": "gaborium.fit",
        "facts": {"file": "kernels.npy"},
        "summary": {
            "n_filters": 4, "outcomes": {"CONVERGED": 3, "STALLED": 1},
            "explained_variance": [0.5, 0.924, 1.0],
        },
    },
    "diagnose": {
        "format": "gaborium.diagnosis",
        "facts": {},
        "findings": [{}],
        "headline": "The step is too large.",
    },
}  # fmt: skip


def lay(folder: Path, name: str, record: object, minute: int = 0) -> Path:
    place = folder / name
    place.mkdir(parents=True)
    (place / "report.html").write_text("a report")
    file = place / ("diagnosis.json" if name.startswith("diagnose") else "result.json")
    file.write_text(record if isinstance(record, str) else json.dumps(record))
    os.utime(file, (60 * minute, 60 * minute))
    return place


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for minute, (name, record) in enumerate(RECORDS.items()):
        lay(tmp_path, name, record, minute)
    return tmp_path


def rows(folder: Path) -> dict[str, list[str]]:
    """The texts of every run on the page, by name."""
    page = write_index(folder).read_text(encoding="utf-8")
    found = {}
    for article in re.findall(r"<article.*?</article>", page, re.DOTALL):
        (link,) = re.findall(r'<a href="(.*?)">(.*?)</a>', article)
        texts = [unescape(t).replace("\xa0", " ") for t in re.findall(r">([^<]+)<", article)]
        assert link[0] == f"{link[1]}/report.html"
        found[link[1]] = [text.strip() for text in texts if text.strip()]
    return found


def test_every_run_has_its_kind_number_sentence_and_link(runs):
    found = rows(runs)
    assert list(found) == ["diagnose", "fit", "train", "recover"]  # the newest first
    told = {name: (texts[0].rstrip(" ·"), texts[3:]) for name, texts in found.items()}
    assert told == {
        "recover": (
            "Recovery of a planted Gabor kernel",
            ["recover found all parameters.", "gaborium recover", "2.5 × 10⁻¹³",
             "error of the kernel, relative"],
        ),
        "train": (
            "Training of networks",
            [HOSTILE, "gaborium train mine.toml", "91.8 ± 0.2 %", "test accuracy, gabor",
             "free: 85.7 %", "mixed: –"],
        ),
        "fit": (
            "Fit of kernels",
            ["3 of 4 filters converged; from kernels.npy.", "92.4 %",
             "explained variance, median"],
        ),
        "diagnose": ("Diagnosis", ["The step is too large.", "1", "finding"]),
    }  # fmt: skip


def test_what_is_no_finished_run_is_not_listed(runs):
    (runs / "notes").mkdir()
    (runs / "half").mkdir()
    (runs / "half/recipe.toml").write_text("epochs = 1\n")
    shutil.copytree(runs / "fit", runs / ".gaborium-123.part")
    (runs / "file").write_text("mine")
    assert set(rows(runs)) == set(RECORDS)


@pytest.mark.parametrize(
    "record", ["{", "[1]", "{}", '{"format": "gaborium.train"}', '{"format": "gaborium.new"}']
)
def test_a_result_that_cannot_be_read_leaves_its_link(tmp_path, record):
    lay(tmp_path, "odd one", record)
    page = write_index(tmp_path).read_text(encoding="utf-8")
    assert '<a href="odd%20one/report.html">odd one</a>' in page


def test_written_again_it_knows_the_new_run(runs):
    assert set(rows(runs)) == set(RECORDS)
    lay(runs, "train-2", RECORDS["train"], 9)
    assert next(iter(rows(runs))) == "train-2"


@pytest.mark.parametrize("content", [b"my home page", b"\xff\xfe", None])
def test_a_page_that_is_not_ours_stays(runs, content):
    page = runs / "index.html"
    page.mkdir() if content is None else page.write_bytes(content)
    assert write_index(runs) is None
    assert page.is_dir() if content is None else page.read_bytes() == content


def test_the_page_refers_to_nothing_outside_and_runs_nothing(runs):
    page = write_index(runs).read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert "<img" not in page
    assert not re.findall(r'(?:href|src)="(?:https?:)?//', page)
    assert "How this page was made" not in page


def test_a_browser_shows_the_page_without_a_complaint(runs, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"needs a browser on PATH: {', '.join(names)}")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr", "--dump-dom", write_index(runs).as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    assert done.stdout.count("<article") == len(RECORDS)
