"""Questions about the project as a whole: what imports cost, the floors, what is tracked."""

import ast
import hashlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import tokenize
from importlib.metadata import version
from pathlib import Path

import pytest

import gaborium

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "gaborium"
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
    return {name.partition(".")[0] for name in loaded_by(code)}


def rooms_loaded_by(code: str) -> set[str]:
    """Run code in a fresh interpreter and return the rooms of the package that it has imported."""
    names = (name.split(".") for name in loaded_by(code))
    return {name[1] for name in names if name[0] == "gaborium" and len(name) > 1}


def loaded_by(code: str) -> list[str]:
    report = (
        "import atexit, json, sys\n"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", report + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


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


def test_layers_and_plots_load_little_of_the_package():
    core = {"support", "functions", "coordinates", "starts", "patches", "layers"}
    layers = rooms_loaded_by("import gaborium.layers")
    assert layers <= core
    plots = rooms_loaded_by(
        "import torch\nfrom gaborium.plots import plot_kernels\nplot_kernels(torch.rand(2, 5, 5))"
    )
    assert plots <= core | {"plots", "fitting"}


def rooms() -> dict[str, int]:
    """Return the rooms of the floor plan in CONTRIBUTING.md with their budgets in lines."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The house")[2]
    plan = re.findall(r"^    (\w+) +(\d+)   \S", text.partition("\n## ")[0], re.MULTILINE)
    return {name: int(budget) for name, budget in plan}


def sources(room: str = "") -> list[Path]:
    """Return the files of Python and the templates of a room, or of the whole package."""
    files = (path for path in (PACKAGE / room).rglob("*") if path.suffix in {".py", ".j2"})
    return sorted(files) if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]


def n_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def n_code_lines(path: Path) -> int:
    """Count lines without comments, docstrings and empty lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return sum(bool(line.strip()) for line in text.splitlines())
    ignored = {
        tokenize.COMMENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
        tokenize.INDENT,
        tokenize.NEWLINE,
        tokenize.NL,
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and token.line.lstrip().startswith(
            ('"""', 'r"""')
        )
        if token.type not in ignored and not is_docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


@pytest.mark.parametrize(("room", "budget"), rooms().items())
def test_a_room_keeps_its_budget_of_lines(room, budget):
    assert sum(map(n_lines, sources(room))) <= budget


def test_the_house_keeps_its_budget_of_lines():
    assert sum(map(n_lines, sources())) <= 17_600
    assert sum(map(n_code_lines, sources())) <= 11_450
    long = {path.name: n_lines(path) for path in sources() if n_lines(path) > 700}
    assert long.keys() <= {"plots.py"}
    assert all(n <= 875 for n in long.values())


def test_the_floor_plan_names_every_room():
    found = {path.stem for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert found - {"__init__", "__main__", "py"} == rooms().keys()
    assert len(rooms()) <= 20


def test_few_arrows_lead_from_room_to_room():
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("gaborium", exclude_type_checking_imports=True, cache_dir=None)
    arrows = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            ends = tuple((name + ".").split(".")[1] for name in (module, imported))
            if ends[0] != ends[1] and "" not in ends:
                arrows.add(ends)
    assert len(arrows) <= 60, sorted(arrows)


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
