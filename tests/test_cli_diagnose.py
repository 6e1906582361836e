"""``gaborium diagnose`` as a person meets it: the experiment, scripts, saved layers, bad input."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("cyclopts", reason="the command line needs the cli extra")
from commands import one_line, run, shown, written
from gaborium import Gabor2d, GaborConv2d, gabor
from gaborium.cli import _console, _print_report
from gaborium.diagnostics import Finding, Severity, diagnose_filters
from gaborium.report import describe
from gaborium.storage import save_layer

pytestmark = pytest.mark.usefixtures("empty_folder")

FAST = ["--crop", "40", "--kernel-size", "9", "--sigma", "1.5", "--wavelength", "4"]
FAST += ["--steps", "20"]

SCRIPT = """
import torch
from torch import nn
from gaborium import GaborConv2d

def setup():
    torch.manual_seed(0)
    layer, image = GaborConv2d(1, 2, 7, seed=0), torch.randn(1, 1, 20, 20)
    targets = GaborConv2d(1, 2, 7, seed=1, start="random")(image).detach()
    return {}
"""
GOOD = "layer, nn.functional.mse_loss, (image, targets)"


def script(text: str, name: str = "mine.py") -> Path:
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


# -- the experiment ---------------------------------------------------------------------------


def test_the_experiment_is_diagnosed(empty_folder, capsys):
    assert run("diagnose", *FAST, "--learning-rate", 30, figures=True) == 0
    folder, record = empty_folder / "runs" / "diagnose", written("diagnose")
    found = record["result"]
    first = found["findings"][0]
    assert (first["severity"], first["cause"]) == ("SEVERE", "cone at the minimum")
    assert first["numbers"]["explained_with_remedy"] > 0.99
    assert len(found["losses"]) == 21
    assert record["facts"]["photograph"] == "camera (scikit-image)"
    assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")
    assert any("step" in path.stem for path in folder.glob("*.png"))
    out = capsys.readouterr().out
    text = " ".join(out.split())
    assert (
        "The loss is a cone at its minimum: its slope does not shrink near the minimum, it stays "
        "0.137. The loss went from 0.154 to 0.144 in 20 steps. 1. cone at the minimum The loss is "
        "a cone at its minimum: its slope does not shrink near the minimum, it stays 0.137. A step "
        "of 30 passes it by 4.11, out of the basin of half-width 0.718."
    ) in text
    assert "2. frozen wavelength, phase, sigma, aspect_ratio, amplitude does not learn" in text
    # A log holds the remedy as it is, to be copied.
    code = [line.removeprefix(" " * 5) for line in out.splitlines()]
    for one in found["findings"]:
        assert one["remedy"].rstrip() in "\n".join(code)
    assert "Report: runs/diagnose/report.html" in out.replace("\\", "/")
    assert {path.name for path in (empty_folder / "runs").iterdir()} == {"diagnose", "index.html"}


def test_options_reach_the_experiment():
    assert run("diagnose", *FAST, "--loss", "mse", "--momentum", 0.5, "--name", "mse") == 0
    findings = written("mse")["result"]["findings"]
    assert "cone at the minimum" not in [one["cause"] for one in findings]


# -- scripts ----------------------------------------------------------------------------------


def test_a_script_is_diagnosed_with_its_own_modules_and_optimizer(empty_folder):
    # The script imports a neighbour, makes a dataclass, and defines its own module.
    script("RATE = 1e6\n", "neighbour.py")
    text = SCRIPT.replace("import torch\n", "from neighbour import RATE\nimport torch\n", 1)
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n" + text
    text += "\n@dataclass\nclass Options:\n    rate: float = RATE\n"
    returned = f"{GOOD}, torch.optim.SGD(layer.parameters(), lr=Options().rate)"
    path = list(sys.path)
    assert run("diagnose", script(text.format(returned)), "--steps", 10) == 0
    assert sys.path == path
    record = written("diagnose")
    first = record["result"]["findings"][0]
    assert (first["severity"], first["cause"]) == ("SEVERE", "step too large")
    assert record["facts"]["script"] == "mine.py"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def setup(:\n", ["line 1", "SyntaxError"]),
        ("def setup():\n    return 1, 2\n", ["must return a network, or (mod", "got int, int"]),
        (SCRIPT.format("layer"), ["data must be a tuple of inputs and targets."]),
        # What fails while it is examined.
        (SCRIPT.format("layer, lambda o, t: (o - t)[:, 7], (image, targets)"), ["line 10"]),
        (SCRIPT.format("layer, lambda o, t: o - t, (image, targets)"), ["loss", "scalar"]),
        (SCRIPT.format("layer, lambda o, t: torch.rand(()) + o.mean().item() * torch.rand(()), "
                       "(image, image * float('nan'))"), []),
    ],
)  # fmt: skip
def test_a_script_that_fails_is_one_line(empty_folder, capsys, text, words):
    code = run("diagnose", script(text), "--steps", 2)
    if not words:  # whatever it is, it is no traceback
        assert code in (0, 2)
        assert "Traceback" not in capsys.readouterr().err
        return
    assert code == 2
    line = one_line(capsys)
    assert all(word in line for word in words), line
    assert not (empty_folder / "runs").exists()


def test_ctrl_c_in_a_script_is_no_failure_of_it(capsys):
    assert run("diagnose", script("raise KeyboardInterrupt\n")) == 130
    assert one_line(capsys) == "Interrupted; nothing was written.\n"


# -- files of kernels -------------------------------------------------------------------------


def sick_layer(**options: object) -> GaborConv2d:
    """Filter 1 is dead, filter 2 the double of filter 0."""
    params = Gabor2d.of(
        orientation=[0.3, 1.2, 0.3], wavelength=5.0, sigma=2.0, amplitude=[1.0, 0.0, 2.0]
    )
    return GaborConv2d(1, 3, 13, start=params, **options)


def test_a_saved_layer_is_looked_at(capsys):
    save_layer(sick_layer(), "layer.safetensors")
    assert run("diagnose", "layer.safetensors") == 0
    found = written("diagnose")["result"]
    causes = {one["cause"]: one for one in found["findings"]}
    assert causes["dead filters"]["location"] == ["1"]
    assert causes["duplicate filters"]["location"] == ["0", "2"]
    assert found["losses"] == []
    text = shown(capsys)
    for number, one in enumerate(found["findings"], 1):
        assert f"{number}. {one['cause']} {one['sentence']}" in text
    assert set(found["skipped"]) == {"gradients", "landscapes", "step limit", "trials"}


def test_other_kernels_are_looked_at_too():
    kernels = gabor(Gabor2d.of(orientation=[0.1, 1.0, 2.0], wavelength=4.0, sigma=1.5), 9)
    kernels[1] = 0.0
    torch.save({"conv1.weight": kernels.half()}, "net.pt")
    assert run("diagnose", "net.pt") == 0
    record = written("diagnose")
    causes = {one["cause"]: one["location"] for one in record["result"]["findings"]}
    assert causes["dead filters"] == ["1"]
    assert record["facts"]["array"] == "conv1.weight"


def test_nothing_wrong_is_said_so(capsys):
    params = Gabor2d.of(orientation=[0.1, 1.0], wavelength=4.0, sigma=2.5)
    save_layer(GaborConv2d(1, 2, 17, start=params), "layer.safetensors")
    assert run("diagnose", "layer.safetensors") == 0
    assert "No fault was found in the filters. The training was not examined." in shown(capsys)


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (["missing.py"], "No such file or directory: "),
        (["missing.safetensors"], "No such file or directory: 'missing.safetensors'"),
        (["notes.txt"], "'notes.txt' must be .npy, .npz, .safetensors, .pt, .pth, .onnx, an image"),
        (
            ["mine.py", "--wavelength", "5"],
            "of the built-in experiment have no effect on 'mine.py'.",
        ),
        (["mine.py", "--key", "a"], "--key and --n-dims are options of a file of kernels."),
        (["--key", "a"], "--key and --n-dims are options of a file of kernels."),
        (["bank.pt", "--steps", "7"], "--steps is the length of trials, and 'bank.pt' has none."),
        (["bank.pt", "--loss", "mse"], "of the built-in experiment have no effect on 'bank.pt'."),
        (["--steps", "0"], "--steps must be at least 1, got 0."),
        (["--learning-rate", "nan"], "--learning-rate must be at least 0, got nan."),
        (["--loss", "l1"], 'Invalid value "l1" for --loss. Choose from: "rmse", "mse".'),
        (["--name", "a/b"], "--name must be a plain folder name, got 'a/b'."),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(empty_folder, capsys, tokens, told):
    script(SCRIPT.format(GOOD))
    script("words", "notes.txt")
    torch.save({"weight": torch.randn(2, 1, 5, 5)}, "bank.pt")
    assert run("diagnose", *tokens) == 2
    assert told in one_line(capsys)
    assert not (empty_folder / "runs").exists()


def test_square_brackets_are_no_markup(capsys):
    name = "[red]conv[/red][/]"
    finding = Finding(name, Severity.SEVERE, f"of {name}", {name: 1.0}, f"x = '{name}'", (name,))
    diagnosis = replace(diagnose_filters(sick_layer()), findings=[finding])
    _print_report(_console(width=200), describe(diagnosis))
    assert capsys.readouterr().out.count(name) == 6
