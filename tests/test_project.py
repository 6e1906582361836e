"""Questions about the project as a whole: what imports cost, the floors, what is tracked."""

import ast
import hashlib
import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import gaborium

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = {
    "PIL",
    "cv2",
    "cyclopts",
    "distributed",
    "filelock",
    "huggingface_hub",
    "jinja2",
    "joblib",
    "lightning_fabric",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "plotly",
    "rich",
    "safetensors",
    "scipy",
    "skimage",
    "sklearn",
    "transformers",
}
LARGEST_TRACKED_FILE = 1_000_000  # bytes


def modules_after(code: str) -> set[str]:
    """Run code in a fresh interpreter and return the top-level packages that it has imported.

    The list is printed when the interpreter ends, so that the code may print and exit itself.
    """
    report = (
        "import atexit, json, sys\n"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", report + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


def tracked_files() -> list[Path]:
    """Return the files under version control, or skip where there is no version control."""
    git = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if git.returncode != 0:
        pytest.skip("needs a git checkout")
    return [ROOT / name for name in git.stdout.split("\0") if name]


def test_the_public_names_cost_no_optional_package():
    # Names are imported when first used: importing the package alone would show nothing.
    modules = modules_after("from gaborium import *")
    assert "torch" in modules
    assert modules & OPTIONAL == set()


def test_type_checkers_see_the_public_names_that_python_finds():
    source = ast.parse(Path(gaborium.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in source.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in blocks[0].body for alias in node.names}
    found = {name: f"gaborium.{home}" for name, home in gaborium._HOMES.items()}
    found |= dict.fromkeys(gaborium._MODULES, "gaborium")
    assert seen.keys() == found.keys()
    # A function must not be imported from a package that has a module of its name.
    assert all(f"{seen[name]}.".startswith(f"{home}.") for name, home in found.items())


@pytest.mark.skipif(
    importlib.util.find_spec("gaborium.cli") is None, reason="gaborium.cli is not written yet"
)
def test_help_answers_without_torch():
    modules = modules_after(
        "sys.argv = ['gaborium', '--help']\nfrom gaborium.cli import main\nmain()\n"
    )
    assert "gaborium" in modules
    assert "torch" not in modules


def test_modules_import_only_from_floors_below():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [lint, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_large_file_is_tracked():
    files = [path for path in tracked_files() if path.is_file()]
    assert [path for path in files if path.stat().st_size > LARGEST_TRACKED_FILE] == []


def test_no_tracked_file_leads_out_of_the_checkout():
    links = [path for path in tracked_files() if path.is_symlink()]
    assert [path for path in links if ROOT not in path.resolve().parents] == []


def test_no_shared_data_is_tracked(shared):
    sums = (shared / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    foreign = {line.split()[0] for line in sums}
    files = [path for path in tracked_files() if path.is_file()]
    sums_of_ours = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in files}
    assert [sums_of_ours[one] for one in sums_of_ours.keys() & foreign] == []


def test_one_version_everywhere():
    ours = version("gaborium")
    assert gaborium.__version__ == ours
    assert f"\nversion: {ours}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{ours}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
