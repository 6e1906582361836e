"""The command line, as a person meets it: what it writes, what it refuses, how it stops."""

from __future__ import annotations

import csv
import functools
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("cyclopts", reason="the command line needs the cli extra")
from commands import one_line, run, shown, written

pytestmark = pytest.mark.usefixtures("empty_folder")

FAST = ["--crop", "40", "--kernel-size", "9", "--sigma", "1.5", "--wavelength", "4"]
FAST += ["--steps", "2", "--learning-rate", "0.1", "--momentum", "0"]


def save(pixels: torch.Tensor, path: Path) -> Path:
    from PIL import Image

    Image.fromarray((pixels * 255).byte().numpy()).save(path)
    return path


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3))


def table(name: str) -> list[dict[str, str]]:
    with Path("runs", name, "result.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_recover_writes_result_report_and_figures(empty_folder, capsys):
    assert run("recover", *FAST, figures=True) == 0
    folder, record = empty_folder / "runs" / "recover", written("recover")
    assert record["result"]["target"]["fields"]["wavelength"] == [[4.0]]
    assert record["facts"]["photograph"] == "camera (scikit-image)"
    assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")
    assert {path.stem for path in folder.glob("*.png")} == {"recovery", "landscape", "orientation"}
    lines = capsys.readouterr().out.splitlines()
    text = " ".join(" ".join(lines).split())
    assert record["headline"].startswith("None of 1 descent settled; recover: converged, kernel")
    for sentence in (
        record["headline"],
        "A standard error is what noise as strong as the residual gives a parameter.",
        "orientation rad 0.785 0.785",
        "An arrival is a step within 0.05 rad (2.9°) of the truth, an ejection a step out of the "
        "basin. A descent that stays within 0.01 rad (0.57°) has settled.",
        "learning rate momentum verdict first arrival ejections",
        "0.1 0 never arrives – 0",
    ):
        assert sentence in text, sentence
    report, index = Path("runs/recover/report.html"), Path("runs/index.html")
    assert lines[-3:-1] == [f"Report: {report}", f"All runs: {index}"]
    assert sorted(p.name for p in (empty_folder / "runs").iterdir()) == ["index.html", "recover"]


def test_a_colour_photograph_with_one_amplitude_per_channel(empty_folder):
    photo = save(noise(50, 60, 3), empty_folder / "photo.png")
    assert run("recover", *FAST, "--image", photo, "--amplitude", "1", "-0.5", "0.25") == 0
    rows = {row["parameter"]: row for row in written("recover")["result"]["table"]}
    assert rows["amplitude[2]"]["found"] == pytest.approx(0.25, abs=1e-6)


@pytest.mark.filterwarnings("default")  # shown, as to a user
def test_a_folder_of_photographs_of_different_sizes(empty_folder, capsys):
    folder = empty_folder / "photos"
    folder.mkdir()
    for i, shape in enumerate([(50, 60), (44, 48), (64, 41, 3)]):
        save(noise(*shape), folder / f"{i}.png")
    (folder / "notes.txt").touch()
    assert run("recover", *FAST, "--image", "photos") == 0
    assert one_line(capsys) == "Note: Skipped in 'photos': 'notes.txt'.\n"
    assert written("recover")["facts"]["photograph"] == "0.png, 1.png, 2.png"


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (["--image", "missing.png"], "No such file or directory: 'missing.png'"),
        (["--sigma", "-3"], "sigma must be positive"),
        (["--wavelength", "0"], "wavelength must be positive"),
        (["--kernel-size", "0"], "--kernel-size must be at least 1, got 0."),
        (["--kernel-size", "99"], "kernel_size (99, 99) must not be larger than the image"),
        (["--noise", "nan"], "--noise must be at least 0, got nan."),
        (["--learning-rate", "-1"], "--learning-rate must be at least 0, got -1."),
        (["--steps", "many"], 'Invalid value for --steps: unable to convert "many" into int.'),
        (["--sgima", "3"], "Unknown option: --sgima. Did you mean --sigma? See gaborium --help."),
        (["--phase", "0", "1"], "phase and amplitude must be 1 number or one per channel (1), got"),
        (["--name", "../elsewhere"], "--name must be a plain folder name, got '../elsewhere'."),
        (["--out", "file/inside"], "Not a directory"),
        (["--image", "notes.png"], "'notes.png' cannot be read: cannot identify image file"),
        (["--image", "half.png"], "'half.png' cannot be read: image file is truncated"),
        (["--image", "grey.png"], "so nothing can be recovered; use an image with structure."),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(empty_folder, capsys, tokens, told):
    (empty_folder / "file").write_text("in the way", encoding="utf-8")
    (empty_folder / "notes.png").write_bytes(b"only words")
    save(torch.full((50, 50), 0.5), empty_folder / "grey.png")
    whole = save(noise(64, 64), empty_folder / "half.png").read_bytes()
    (empty_folder / "half.png").write_bytes(whole[: len(whole) // 2])
    assert run("recover", *tokens) == 2
    assert told in one_line(capsys)
    assert not (empty_folder / "runs").exists()


def test_an_earlier_run_is_kept_unless_told_otherwise(empty_folder, capsys):
    assert run("recover", *FAST) == 0
    before = written("recover")
    capsys.readouterr()
    assert run("recover", *FAST, "--noise", "0.1") == 2
    told = "exists; choose another name, or replace it with overwrite=True (--overwrite)."
    assert told in one_line(capsys)
    assert written("recover") == before
    assert run("recover", *FAST, "--noise", "0.1", "--overwrite") == 0
    assert written("recover")["result"] != before["result"]


# Python gives an exit code of its own to a KeyboardInterrupt that passes through a string of code,
# and importing makes such strings: every dataclass is one.
INTERRUPTED = """
import sys
import gaborium.experiments
from gaborium.cli import main

wait = "import time; print('ready', flush=True); time.sleep(60)"
gaborium.experiments.recover_planted = lambda **_: exec(wait)
main(["recover"])
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as on POSIX systems")
def test_an_interrupted_run_leaves_nothing(empty_folder):
    children = {}
    for kind in ("SIGINT", "SIGTERM"):
        (empty_folder / kind).mkdir()
        children[kind] = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED],
            cwd=empty_folder / kind,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell that runs the tests in the background has them ignore SIGINT, and their
            # children.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
    for kind, child in children.items():
        assert any("ready" in line for line in child.stdout), child.stderr.read()
        assert list(empty_folder.glob(f"{kind}/runs/.gaborium-*"))
        child.send_signal(getattr(signal, kind))
    for kind, child in children.items():
        _, said = child.communicate(timeout=60)
        assert (child.returncode, said) == (130, "Interrupted; nothing was written.\n")
        assert not list((empty_folder / kind).iterdir())


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    assert run("recover") == 2
    assert one_line(capsys) == 'gaborium: Commands need cyclopts: pip install "gaborium[cli]".\n'


# -- fit --------------------------------------------------------------------------------------


def bank(path: str, *shape: int, **fields: object) -> Path:
    """Save planted kernels under a little noise."""
    from gaborium import Gabor2d, gabor

    kernels = gabor(Gabor2d.of(**{"wavelength": 4.0, "sigma": 1.6, **fields}), 9)
    kernels = kernels + 0.02 * torch.randn(*shape, 9, 9, generator=torch.Generator().manual_seed(0))
    torch.save({"weight": kernels}, path)
    return Path(path)


def test_fit_writes_result_table_report_and_figures(empty_folder, capsys):
    path = bank("bank.pt", 5, orientation=[0.1, 0.7, 1.3, 1.9, 2.5])
    assert run("fit", path, figures=True) == 0
    folder, record = empty_folder / "runs" / "fit", written("fit")
    assert {name: fact for name, fact in record["facts"].items() if name != "command"} == {
        "file": "bank.pt",
        "array": "weight",
        "shape": "5 × 9 × 9",
        "SHA-256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    fields = record["result"]["params"]["fields"]
    assert fields["orientation"] == pytest.approx([0.1, 0.7, 1.3, 1.9, 2.5], abs=0.05)
    assert any(any(center) for center in fields["center"])  # searched for
    rows = [row for row in table("fit") if row["parameter"] == "wavelength"]
    assert [float(row["value"]) for row in rows] == fields["wavelength"]
    assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")
    assert {path.stem for path in folder.glob("*.png")} == {"fit", "parameters"}
    text = shown(capsys)
    assert (
        "5 of 5 filters converged to a Gabor function; the median explained variance is 99.3 %. "
        "5 filters: Converged. Quartiles of the explained variance: 99.2 % and 99.4 %. "
        "Report: "
    ) in text
    assert sorted(p.name for p in (empty_folder / "runs").iterdir()) == ["fit", "index.html"]


def test_channels_share_a_geometry_unless_told_otherwise():
    path = bank("bank.pt", 2, 3, orientation=[[0.5], [1.0]], phase=[0.0, 1.0, 2.0])
    assert run("fit", path, "--n-starts", "1") == 0
    assert run("fit", path, "--n-starts", "1", "--geometry", "pair", "--name", "pair") == 0
    assert len(written("fit")["result"]["outcome"]) == 2
    assert len(written("pair")["result"]["outcome"]) == 6


def test_switches_reach_the_fit():
    path = bank("bank.pt", 2, orientation=[0.5, 1.0], aspect_ratio=1.5)
    assert run("fit", path, "--fixed-center", "--isotropic", "--key", "weight") == 0
    fields = written("fit")["result"]["params"]["fields"]
    assert fields["center"] == [[0.0, 0.0]] * 2
    assert fields["aspect_ratio"] == [1.0] * 2


def test_pieces_of_a_file_give_what_the_whole_gives(monkeypatch):
    path = bank("bank.pt", 3, orientation=[0.1, 0.7, 1.3])
    assert run("fit", path, "--n-starts", "1") == 0
    monkeypatch.setattr("gaborium.cli._PIECE", 2)
    assert run("fit", path, "--n-starts", "1", "--name", "pieces") == 0
    whole, pieces = written("fit"), written("pieces")
    assert pieces["facts"]["shape"] == whole["facts"]["shape"]
    assert pieces["result"]["outcome"] == whole["result"]["outcome"]
    for name, value in whole["result"]["params"]["fields"].items():
        expected = torch.tensor(value, dtype=torch.float64)
        found = torch.tensor(pieces["result"]["params"]["fields"][name], dtype=torch.float64)
        # The order of sums in a batch of another size changes the last digits.
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6), name


def test_kernels_that_are_no_gabor_functions_are_told_apart(capsys):
    kernels = torch.randn(3, 9, 9, generator=torch.Generator().manual_seed(0))
    kernels[1], kernels[2, 0, 0] = 0.0, torch.nan
    torch.save(kernels, "bank.pt")
    assert run("fit", "bank.pt", "--n-starts", "1") == 0
    text = shown(capsys)
    assert "0 of 3 filters converged to a Gabor function; the median explained variance is" in text
    assert "2 filters: The target is zero or not finite; there is nothing to fit." in text
    assert "nan" not in text


@pytest.mark.filterwarnings("default")  # shown, as to a user
def test_a_folder_of_images_and_its_note(empty_folder, capsys):
    (empty_folder / "images").mkdir()
    for i in range(2):
        save(noise(9, 9), empty_folder / "images" / f"{i}.png")
    assert run("fit", "images", "--fixed-center", "--n-starts", "1") == 0
    assert one_line(capsys) == "Note: 'images' is read as kernels whose 0 is mid-grey.\n"
    assert written("fit")["facts"]["shape"] == "2 × 1 × 9 × 9"


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        ([], "FILE"),
        (["missing.npy"], "No such file or directory: 'missing.npy'"),
        (["notes.txt"], "'notes.txt' must be .npy, .npz, .safetensors, .pt, .pth, .onnx, an image"),
        (["bank.pt", "--key", "wieght"], "no array 'wieght', only 'weight' (2 × 9 × 9, float32)."),
        (
            ["bank.pt", "--geometry", "both"],
            'Invalid value "both" for --geometry. Choose from: "pair"',
        ),
        (["bank.pt", "--n-dims", "4"], 'Invalid value "4" for --n-dims. Choose from: 1, 2, 3.'),
        (["bank.pt", "--n-starts", "0"], "n_starts must be at least 1, got 0."),
        (["bank.pt", "--name", "../elsewhere"], "--name must be a plain folder name"),
        (["bank.pt", "--out", "notes.txt/inside"], "Not a directory"),
        (["model.pt"], "'model.pt' cannot be read: it needs unpickling, which can run code; save"),
        (["bank.pt", "--centre"], "Unknown option: --centre. Did you mean --fixed-center?"),
    ],
)
def test_fit_refuses_in_one_line_and_writes_nothing(empty_folder, capsys, tokens, told):
    (empty_folder / "notes.txt").write_text("words", encoding="utf-8")
    bank("bank.pt", 2, orientation=[0.5, 1.0])
    torch.save(torch.nn.Conv2d(1, 2, 3), empty_folder / "model.pt")
    assert run("fit", *tokens) == 2
    assert told in one_line(capsys)
    assert not (empty_folder / "runs").exists()


def test_an_interrupted_fit_leaves_nothing(empty_folder, capsys, monkeypatch):
    bank("bank.pt", 2, orientation=[0.5, 1.0])

    def interrupted(*args: object, **kwargs: object) -> None:
        assert list(empty_folder.glob("runs/.gaborium-*"))
        raise KeyboardInterrupt

    monkeypatch.setattr("gaborium.fit", interrupted)
    assert run("fit", "bank.pt") == 130
    assert one_line(capsys) == "Interrupted; nothing was written.\n"
    assert not (empty_folder / "runs").exists()


# -- census -----------------------------------------------------------------------------------


def test_census_writes_result_table_report_and_figures(empty_folder, capsys):
    path = bank("bank.pt", 2, orientation=[0.1, 1.3])
    assert run("census", path, "--n-starts", "2", figures=True) == 0
    folder, record = empty_folder / "runs" / "census", written("census")
    assert record["format"] == "gaborium.census"
    assert record["facts"]["SHA-256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["result"]["labels"] == ["gabor", "gabor"]
    assert [row["class"] for row in table("census")] == ["gabor", "gabor"]
    assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")
    assert (folder / "census.png").read_bytes().startswith(b"\x89PNG")
    text = shown(capsys)
    assert "A Gabor function describes 2 of 2 filters (100 %)" in text
    assert "Gabor functions and V1 n_x and n_y are cycles in a standard deviation of the" in text


NETWORK = """
import torch

def setup():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 2, {}), torch.nn.Conv2d(2, 3, 5))
"""


def test_census_takes_the_network_of_a_script_and_a_layer_of_it(empty_folder, capsys):
    (empty_folder / "mine.py").write_text(NETWORK.format(7))
    assert run("census", "mine.py", "--n-starts", "1") == 0
    expected = {"file": "mine.py", "array": "0.weight", "shape": "2 × 3 × 7 × 7"}
    assert expected.items() <= written("census")["facts"].items()
    assert "A Gabor function describes 0 of 2 filters (0 %); the rest: 2 noise." in shown(capsys)
    assert run("census", "mine.py", "--key", "1", "--name", "second", "--n-starts", "1") == 0
    assert written("second")["facts"]["array"] == "1.weight"


@pytest.mark.filterwarnings("default")
def test_census_takes_a_layer_of_a_file_by_its_name(capsys):
    bank("bank.pt", 2, orientation=[0.1, 1.3])
    kernels = torch.load("bank.pt")["weight"].unsqueeze(1)
    torch.save({"a.weight": kernels[:1], "b.weight": kernels[:1]}, "net.pt")
    assert run("census", "net.pt", "--key", "b", "--n-starts", "1") == 0
    assert written("census")["facts"]["array"] == "b.weight"
    assert run("census", "net.pt", "--name", "first", "--n-starts", "1") == 0
    assert one_line(capsys) == (
        "Note: Reading 'a.weight' of 'net.pt', 1 × 1 × 9 × 9, the first layer of 2; key (--key) "
        "takes another.\n"
    )
    assert written("first")["facts"]["array"] == "a.weight"


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (["empty.pt"], "'empty.pt' cannot be read: torch.save has not written it."),
        (["small.pt"], "has shape 4 × 3 × 1 × 1, expected kernels of 2 dimensions (--n-dims) of 2"),
        (["complex.pt"], "'complex.pt' cannot be read: it holds no arrays of real numbers."),
        (["nan.pt"], "NaN or infinity in 1 of 2"),
        (["bank.pt", "--key", "wieght"], "no array 'wieght', only 'weight' (2 × 9 × 9, float32)."),
        (["two.npz"], "'two.npz' holds several arrays that may be kernels: 'a' (2 × 4 × 3 × 3, "),
        (["bank.pt", "--n-starts", "0"], "n_starts must be at least 1, got 0."),
        (["mine.py", "--key", "2"], "Sequential has no layer '2'; its first convolutions are ['0'"),
        (["mine.py"], "has kernels of 1 x 1 px, in which there is no wave; or name another layer"),
        (["resnet.pt"], "No such file or directory: 'resnet.pt'"),
    ],
)
def test_census_refuses_in_one_line_and_writes_nothing(empty_folder, capsys, tokens, told):
    (empty_folder / "mine.py").write_text(NETWORK.format(1))
    (empty_folder / "empty.pt").touch()
    bank("bank.pt", 2, orientation=[0.5, 1.0])
    broken = torch.ones(2, 1, 3, 3)
    broken[1, 0, 0, 0] = torch.nan
    kinds = {
        "small": torch.ones(4, 3, 1, 1),
        "complex": torch.ones(2, 1, 3, 3, dtype=torch.complex64),
        "nan": broken,
    }
    for name, kernels in kinds.items():
        torch.save({"weight": kernels}, empty_folder / f"{name}.pt")
    several = torch.ones(2, 4, 3, 3).numpy()
    pytest.importorskip("numpy").savez(empty_folder / "two.npz", a=several, b=several)
    assert run("census", *tokens) == 2
    assert told in one_line(capsys)
    assert not (empty_folder / "runs").exists()
