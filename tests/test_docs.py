"""Questions about the documentation: does its code run, does it build, does it name everything?"""

import contextlib
import importlib.util
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gaborium
from gaborium import diagnostics
from gaborium.cli import main
from gaborium.diagnostics.causes import CAUSES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
# Packages that a page may use and a user may lack; the development environment has them.
OPTIONAL = {"cv2", "huggingface_hub", "matplotlib", "numpy", "onnxruntime", "skimage"}

PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# A block of Python and, where a block of text follows at once, what it prints.
BLOCK = re.compile(
    r"^```python\n(.*?)^```\n(?:\s*^```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL
)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")

CONVERSIONS = [name for name in vars(gaborium.interop) if name.startswith(("to_", "from_"))]


def blocks(text: str) -> list[tuple[int, str, str | None]]:
    """Return line number, code and expected output of every block of Python."""
    return [
        (text[: match.start(1)].count("\n"), match[1], match[2]) for match in BLOCK.finditer(text)
    ]


def same_output(found: str, wanted: str) -> bool:
    """Compare text; decimal numbers may differ by 5 %, or by 1.5 of the last digit shown.

    A page shows what one machine printed, and the last digits of a training differ between two.
    """
    if NUMBER.sub("0", found).split() != NUMBER.sub("0", wanted).split():
        return False
    return all(map(_close, NUMBER.findall(found), NUMBER.findall(wanted)))


def _close(found: str, wanted: str) -> bool:
    _, point, decimals = wanted.partition(".")
    if not point:
        return found == wanted
    last_digit = 0 if "e" in decimals else 10.0 ** -len(decimals)
    return math.isclose(float(found), float(wanted), rel_tol=0.05, abs_tol=1.5 * last_digit)


def test_outputs_are_compared_with_tolerance_for_decimals_only():
    assert same_output("θ = 29.7 px\n", "θ =  30.1 px")
    assert same_output("(1, 0.013)", "(1, 0.014)")
    assert not same_output("(16, 1)", "(17, 1)")
    assert not same_output("θ = 29.7 px", "θ = 36.0 px")
    assert not same_output("θ = 29.7 px", "θ = -29.7 px")
    assert not same_output("Converged.", "Stalled.")
    assert not same_output("1 2", "1 2 3")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_on_a_page_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace: dict = {"__name__": "page"}
    for line, code, wanted in blocks(page.read_text(encoding="utf-8")):
        # The empty lines make tracebacks name the page's own lines.
        program = compile("\n" * line + code, str(page), "exec")
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(program, namespace)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] not in OPTIONAL:
                raise
            pytest.skip(f"needs {error.name}")
        if wanted is not None:
            found = printed.getvalue()
            assert same_output(found, wanted), f"{page.name}, line {line}, printed:\n{found}"


def test_every_page_of_the_guide_has_code_that_runs():
    without = {page.stem for page in PAGES if not blocks(page.read_text(encoding="utf-8"))}
    assert without == {"architecture", "changelog", "reference"}


def test_the_pages_build_without_a_warning(tmp_path):
    """One test, because parallel workers would build the pages once for each."""
    for package in ("sphinx", "furo", "myst_parser"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'needs {package}: pip install "gaborium[docs]"')
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", DOCS, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    html = {page.stem: page.read_text(encoding="utf-8") for page in tmp_path.glob("*.html")}
    assert html.keys() >= {page.stem for page in DOCS.glob("*.md")}

    elsewhere = re.compile(r"""<(?:script|link|img)[^>]*(?:src|href)=["'](?:https?:)?//""")
    assert [name for name, text in html.items() if elsewhere.search(text)] == []

    names = {f"gaborium.{name}" for name in gaborium.__all__ if not name.startswith("_")}
    names |= {f"gaborium.interop.{name}" for name in CONVERSIONS}
    names |= {f"gaborium.diagnostics.{name}" for name in diagnostics.__all__}
    anchors = set(re.findall(r'id="([\w.-]+)"', html["reference"]))
    # Modules, whose functions are there.
    assert names - anchors == {
        f"gaborium.{name}" for name in ("diagnostics", "interop", "optim", "storage", "training")
    }


@pytest.mark.parametrize(
    ("page", "command"),
    [
        ("experiment", "recover"),
        ("diagnostics", "diagnose"),
        ("training", "train"),
        ("census", "census"),
    ],
)
def test_options_on_a_page_exist(page, command, capsys):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    named = set(re.findall(r"--[a-z][a-z-]+", text))
    assert named
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert named - {"--help", "--nproc-per-node"} <= options


def test_every_cause_is_in_the_table_of_causes():
    table = (DOCS / "diagnostics.md").read_text(encoding="utf-8").partition("## Causes")[2]
    assert [cause for cause in CAUSES if f"`{cause}`" not in table] == []


def test_figures_on_the_pages_exist_and_are_used():
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    used = set(re.findall(r"_static/([\w-]+\.svg)", text))
    assert used == {path.name for path in (DOCS / "_static").glob("*.svg")}


# why_theta_gets_stuck.py has tests of its own.
@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("first_*.py")), ids=lambda path: path.stem)
def test_an_example_runs(example, tmp_path):
    pytest.importorskip("skimage")
    environment = os.environ | {"PYTHONWARNINGS": "error::UserWarning"}
    done = subprocess.run(
        [sys.executable, example, "--quick"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout


def test_every_example_is_listed():
    listing = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if f"`{path.name}`" not in listing] == []


def test_the_tables_of_what_learning_brings_hold_what_was_measured():
    pytest.importorskip("numpy")
    results = ROOT / "benchmarks" / "results"
    pieces = [path.stem for path in (results / "learning").glob("*.jsonl")]
    experiments = [name for name in pieces if (results / f"learning_{name}.json").exists()]
    printed: set[str] = set()
    for chosen in ([], experiments):  # without any, an overview of all
        program = [sys.executable, str(ROOT / "benchmarks" / "learning" / "tables.py"), *chosen]
        done = subprocess.run(program, capture_output=True, text=True, check=True)
        printed |= set(done.stdout.splitlines())
    page = (ROOT / "docs" / "learning.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) > 50
    assert [row for row in rows if row not in printed] == []
