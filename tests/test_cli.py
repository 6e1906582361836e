"""The command line, as a person meets it: what it writes, what it refuses, how it stops."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("cyclopts", reason="the command line needs the cli extra")
from commands import one_line, run

pytestmark = pytest.mark.usefixtures("empty_folder")

FAST = ["--crop", "40", "--kernel-size", "9", "--sigma", "1.5", "--wavelength", "4"]
FAST += ["--steps", "2", "--learning-rate", "0.1", "--momentum", "0"]


def save(pixels: torch.Tensor, path: Path) -> Path:
    from PIL import Image

    Image.fromarray((pixels * 255).byte().numpy()).save(path)
    return path


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3))


def test_recover_writes_result_report_and_figures(empty_folder, capsys):
    assert run("recover", *FAST) == 0
    folder = empty_folder / "runs" / "recover"
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["result"]["target"]["fields"]["wavelength"] == [[4.0]]
    assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")
    assert len(list(folder.glob("*.png"))) >= 3
    shown = capsys.readouterr().out
    assert "learning rate" in shown
    assert "orientation" in shown
    assert "report.html" in shown
    assert sorted(p.name for p in (empty_folder / "runs").iterdir()) == ["index.html", "recover"]
    index = (empty_folder / "runs" / "index.html").read_text(encoding="utf-8")
    assert 'href="recover/report.html"' in index
    assert shown.splitlines()[-2] == f"All runs: {Path('runs', 'index.html')}"


def test_a_colour_photograph_with_one_amplitude_per_channel(empty_folder):
    photo = save(noise(50, 60, 3), empty_folder / "photo.png")
    assert run("recover", *FAST, "--image", str(photo), "--amplitude", "1", "-0.5", "0.25") == 0
    text = (empty_folder / "runs/recover/result.json").read_text(encoding="utf-8")
    rows = {row["parameter"]: row for row in json.loads(text)["result"]["table"]}
    assert rows["amplitude[2]"]["found"] == pytest.approx(0.25, abs=1e-6)


def test_a_folder_of_photographs_of_different_sizes(empty_folder, capsys):
    folder = empty_folder / "photos"
    folder.mkdir()
    for i, shape in enumerate([(50, 60), (44, 48), (64, 41, 3)]):
        save(noise(*shape), folder / f"{i}.png")
    assert run("recover", *FAST, "--image", str(folder), "--max-images", "2") == 0
    assert "first 2 of 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["--image", "missing.png"], ["missing.png", "No such file"]),
        (["--sigma", "-3"], ["sigma", "positive", "-3"]),
        (["--wavelength", "0"], ["wavelength", "positive"]),
        (["--kernel-size", "0"], ["--kernel-size", "at least 1"]),
        (["--kernel-size", "99"], ["kernel", "larger", "image"]),
        (["--noise", "nan"], ["--noise", "nan"]),
        (["--learning-rate", "-1"], ["--learning-rate", "at least 0"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--sgima", "3"], ["--sgima", "--sigma"]),
        (["--phase", "0", "1"], ["phase", "channel"]),
        (["--name", "../elsewhere"], ["--name", "elsewhere"]),
        (["--out", "file/inside"], ["file", "Not a directory"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(empty_folder, capsys, tokens, words):
    (empty_folder / "file").write_text("in the way", encoding="utf-8")
    assert run("recover", *tokens) == 2
    line = one_line(capsys)
    assert all(word in line for word in words), line
    assert not (empty_folder / "runs").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.png", b"only words", "cannot be read"),
        ("empty.png", b"", "empty"),
        ("half.png", None, "cannot be read"),
    ],
)
def test_files_that_are_no_photographs(empty_folder, capsys, name, content, words):
    path = empty_folder / name
    if content is None:
        whole = save(noise(64, 64), path).read_bytes()
        content = whole[: len(whole) // 2]
    path.write_bytes(content)
    assert run("recover", *FAST, "--image", str(path)) == 2
    assert words in one_line(capsys)


def test_a_constant_photograph_says_that_nothing_can_be_recovered(empty_folder, capsys):
    photo = save(torch.full((50, 50), 0.5), empty_folder / "grey.png")
    assert run("recover", *FAST, "--image", str(photo)) == 2
    assert "nothing can be recovered" in one_line(capsys)
    assert not list(empty_folder.glob("runs/*"))


def test_an_earlier_run_is_kept_unless_told_otherwise(empty_folder, capsys):
    assert run("recover", *FAST) == 0
    before = (empty_folder / "runs/recover/result.json").read_bytes()
    capsys.readouterr()
    assert run("recover", *FAST, "--seed", "5") == 2
    assert "--overwrite" in one_line(capsys)
    assert (empty_folder / "runs/recover/result.json").read_bytes() == before
    assert run("recover", *FAST, "--seed", "5", "--overwrite") == 0
    assert (empty_folder / "runs/recover/result.json").read_bytes() != before


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as on POSIX systems")
@pytest.mark.parametrize("kind", ["SIGINT", "SIGTERM"])
def test_an_interrupted_run_leaves_nothing(empty_folder, kind):
    child = subprocess.Popen(
        [sys.executable, "-m", "gaborium", "recover", "--steps", "100000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore SIGINT, and their children.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(empty_folder.glob("runs/.gaborium-*")):
        assert time.monotonic() < deadline
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    child.send_signal(getattr(signal, kind))
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said == "Interrupted; nothing was written.\n"
    assert not list(empty_folder.glob("runs/*"))
    assert not list(empty_folder.glob("runs/.gaborium-*"))


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    assert run("recover") == 2
    assert 'pip install "gaborium[cli]"' in one_line(capsys)


# -- fit --------------------------------------------------------------------------------------


def bank(path: Path, *shape: int, **fields: object) -> Path:
    """Save planted kernels under a little noise."""
    from gaborium import Gabor2d, gabor

    kernels = gabor(Gabor2d.of(**{"wavelength": 4.0, "sigma": 1.6, **fields}), 9)
    kernels = kernels + 0.02 * torch.randn(*shape, 9, 9, generator=torch.Generator().manual_seed(0))
    torch.save({"weight": kernels}, path)
    return path


def result_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_fit_writes_result_table_report_and_figures(empty_folder, capsys):
    path = bank(empty_folder / "bank.pt", 5, orientation=[0.1, 0.7, 1.3, 1.9, 2.5])
    assert run("fit", str(path)) == 0
    folder = empty_folder / "runs" / "fit"
    record = result_of(folder)
    assert record["facts"]["file"] == "bank.pt"
    assert record["facts"]["array"] == "weight"
    assert record["facts"]["SHA-256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["facts"]["shape"] == "5 × 9 × 9"
    fields = record["result"]["params"]["fields"]
    assert fields["orientation"] == pytest.approx([0.1, 0.7, 1.3, 1.9, 2.5], abs=0.05)
    assert any(any(center) for center in fields["center"])  # searched for
    with (folder / "result.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["parameter"] == "wavelength"]
    assert [float(row["value"]) for row in rows] == fields["wavelength"]
    assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")
    assert len(list(folder.glob("*.png"))) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert record["headline"] in shown
    assert "5 of 5 filters" in shown
    assert "report.html" in shown
    assert sorted(p.name for p in (empty_folder / "runs").iterdir()) == ["fit", "index.html"]


def test_channels_share_a_geometry_unless_told_otherwise(empty_folder):
    path = bank(empty_folder / "bank.pt", 2, 3, orientation=[[0.5], [1.0]], phase=[0.0, 1.0, 2.0])
    assert run("fit", str(path)) == 0
    assert run("fit", str(path), "--geometry", "pair", "--name", "pair") == 0
    runs = empty_folder / "runs"
    assert len(result_of(runs / "fit")["result"]["outcome"]) == 2
    assert len(result_of(runs / "pair")["result"]["outcome"]) == 6


def test_switches_reach_the_fit(empty_folder):
    path = bank(empty_folder / "bank.pt", 2, orientation=[0.5, 1.0], aspect_ratio=1.5)
    assert run("fit", str(path), "--fixed-center", "--isotropic", "--key", "weight") == 0
    fields = result_of(empty_folder / "runs" / "fit")["result"]["params"]["fields"]
    assert fields["center"] == [[0.0, 0.0]] * 2
    assert fields["aspect_ratio"] == [1.0] * 2


def test_pieces_of_a_file_give_what_the_whole_gives(empty_folder, monkeypatch):
    path = bank(empty_folder / "bank.pt", 5, orientation=[0.1, 0.7, 1.3, 1.9, 2.5])
    assert run("fit", str(path)) == 0
    monkeypatch.setattr("gaborium.cli._PIECE", 2)
    assert run("fit", str(path), "--name", "pieces") == 0
    whole, pieces = (result_of(empty_folder / "runs" / name) for name in ("fit", "pieces"))
    assert pieces["facts"]["shape"] == whole["facts"]["shape"]
    assert pieces["result"]["outcome"] == whole["result"]["outcome"]
    for name, value in whole["result"]["params"]["fields"].items():
        expected = torch.tensor(value, dtype=torch.float64)
        found = torch.tensor(pieces["result"]["params"]["fields"][name], dtype=torch.float64)
        # The order of sums in a batch of another size changes the last digits.
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6), name


def test_kernels_that_are_no_gabor_functions_are_told_apart(empty_folder, capsys):
    kernels = torch.randn(3, 9, 9, generator=torch.Generator().manual_seed(0))
    kernels[1], kernels[2, 0, 0] = 0.0, torch.nan
    torch.save(kernels, empty_folder / "bank.pt")
    assert run("fit", "bank.pt") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 filters: The target is zero or not finite" in shown
    assert "0 of 3 filters" in shown
    assert "nan" not in shown


@pytest.mark.filterwarnings("default")  # shown, as to a user
def test_a_folder_of_images_and_its_note(empty_folder, capsys):
    (empty_folder / "images").mkdir()
    for i in range(2):
        save(noise(9, 9), empty_folder / "images" / f"{i}.png")
    assert run("fit", "images", "--fixed-center", "--n-starts", "1") == 0
    assert one_line(capsys).startswith("Note: 'images'")
    assert result_of(empty_folder / "runs" / "fit")["facts"]["shape"] == "2 × 1 × 9 × 9"


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], ["FILE"]),
        (["missing.npy"], ["missing.npy", "No such file"]),
        (["notes.txt"], ["notes.txt", ".safetensors"]),
        (["bank.pt", "--key", "wieght"], ["no array 'wieght'", "'weight'"]),
        (["bank.pt", "--geometry", "both"], ["--geometry", "both"]),
        (["bank.pt", "--geometry", "filter"], ["--geometry", "channels", "2 × 9 × 9"]),
        (["bank.pt", "--n-dims", "4"], ["--n-dims", "4"]),
        (["bank.pt", "--n-starts", "0"], ["--n-starts", "at least 1"]),
        (["bank.pt", "--name", "../elsewhere"], ["--name", "elsewhere"]),
        (["bank.pt", "--out", "notes.txt/inside"], ["notes.txt", "Not a directory"]),
        (["model.pt"], ["model.pt", "unpickling", "state dict"]),
        (["bank.pt", "--centre"], ["--centre"]),
    ],
)
def test_fit_refuses_in_one_line_and_writes_nothing(empty_folder, capsys, tokens, words):
    (empty_folder / "notes.txt").write_text("words", encoding="utf-8")
    bank(empty_folder / "bank.pt", 2, orientation=[0.5, 1.0])
    torch.save(torch.nn.Conv2d(1, 2, 3), empty_folder / "model.pt")
    assert run("fit", *tokens) == 2
    line = one_line(capsys)
    assert all(word in line for word in words), line
    assert not (empty_folder / "runs").exists()


def test_an_earlier_fit_is_kept_unless_told_otherwise(empty_folder, capsys):
    bank(empty_folder / "bank.pt", 2, orientation=[0.5, 1.0])
    assert run("fit", "bank.pt") == 0
    before = (empty_folder / "runs/fit/result.json").read_bytes()
    capsys.readouterr()
    assert run("fit", "bank.pt", "--isotropic") == 2
    assert "--overwrite" in one_line(capsys)
    assert (empty_folder / "runs/fit/result.json").read_bytes() == before
    assert run("fit", "bank.pt", "--isotropic", "--overwrite") == 0
    assert (empty_folder / "runs/fit/result.json").read_bytes() != before


def test_an_interrupted_fit_leaves_nothing(empty_folder, capsys, monkeypatch):
    bank(empty_folder / "bank.pt", 2, orientation=[0.5, 1.0])

    def interrupted(*args: object, **kwargs: object) -> None:
        assert list(empty_folder.glob("runs/.gaborium-*"))
        raise KeyboardInterrupt

    monkeypatch.setattr("gaborium.fitting.fit", interrupted)
    assert run("fit", "bank.pt") == 130
    assert one_line(capsys) == "Interrupted; nothing was written.\n"
    assert not (empty_folder / "runs").exists()


# -- census -----------------------------------------------------------------------------------


def test_census_writes_result_table_report_and_figures(empty_folder, capsys):
    path = bank(empty_folder / "bank.pt", 2, orientation=[0.1, 1.3])
    assert run("census", str(path), "--n-starts", "2") == 0
    folder = empty_folder / "runs" / "census"
    record = result_of(folder)
    assert record["format"] == "gaborium.census"
    assert record["facts"]["SHA-256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["result"]["labels"] == ["gabor", "gabor"]
    with (folder / "result.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["gabor", "gabor"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "</html>" in page
    assert (folder / "census.png").read_bytes().startswith(b"\x89PNG")
    shown = " ".join(capsys.readouterr().out.split())
    assert record["headline"] in shown
    assert "2 of 2 filters" in shown
    assert "census/report.html" in (empty_folder / "runs/index.html").read_text(encoding="utf-8")


NETWORK = """
import torch

def setup():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 2, {}), torch.nn.Conv2d(2, 3, 5))
"""


def test_census_takes_the_network_of_a_script_and_a_layer_of_it(empty_folder, capsys):
    (empty_folder / "mine.py").write_text(NETWORK.format(7))
    assert run("census", "mine.py", "--n-starts", "1") == 0
    record = result_of(empty_folder / "runs" / "census")
    assert {"file": "mine.py", "array": "0.weight", "shape": "2 × 3 × 7 × 7"}.items() <= record[
        "facts"
    ].items()
    assert "0 of 2 filters" in " ".join(capsys.readouterr().out.split())
    assert run("census", "mine.py", "--key", "1", "--name", "second") == 0
    assert result_of(empty_folder / "runs" / "second")["facts"]["array"] == "1.weight"


@pytest.mark.filterwarnings("default")
def test_census_takes_a_layer_of_a_file_by_its_name(empty_folder, capsys):
    bank(empty_folder / "bank.pt", 2, orientation=[0.1, 1.3])
    kernels = torch.load(empty_folder / "bank.pt")["weight"].unsqueeze(1)
    torch.save({"a.weight": kernels[:1], "b.weight": kernels}, empty_folder / "net.pt")
    assert run("census", "net.pt", "--key", "b", "--n-starts", "1") == 0
    assert result_of(empty_folder / "runs" / "census")["facts"]["array"] == "b.weight"
    assert run("census", "net.pt", "--name", "first", "--n-starts", "1") == 0
    note = one_line(capsys)
    assert "Reading 'a.weight' of 'net.pt', 1 × 1 × 9 × 9, the first layer of 2; key" in note
    assert result_of(empty_folder / "runs" / "first")["facts"]["array"] == "a.weight"


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["empty.pt"], ["empty.pt", "cannot be read"]),
        (["small.pt"], ["kernels of 1 × 1 px"]),
        (["complex.pt"], ["complex64", "real"]),
        (["nan.pt"], ["NaN or infinity in 1 of 2"]),
        (["bank.pt", "--key", "wieght"], ["no array 'wieght'", "'weight'"]),
        (["two.pt"], ["several arrays", "choose one with key (--key)"]),
        (["bank.pt", "--n-starts", "0"], ["--n-starts", "at least 1"]),
        (["net.pt"], ["net.pt", "kernels of 1 × 1 px", "another array with key (--key)"]),
        (["mine.py", "--key", "2"], ["no layer '2'", "0", "1"]),
        (["mine.py"], ["1 x 1 px", "name another layer"]),
        (["resnet.pt"], ["No such file", "'resnet.pt'"]),
    ],
)
def test_census_refuses_in_one_line_and_writes_nothing(empty_folder, capsys, tokens, words):
    (empty_folder / "mine.py").write_text(NETWORK.format(1))
    (empty_folder / "empty.pt").touch()
    bank(empty_folder / "bank.pt", 2, orientation=[0.5, 1.0])
    broken = torch.ones(2, 1, 3, 3)
    broken[1, 0, 0, 0] = torch.nan
    kinds = {
        "small": {"weight": torch.ones(4, 3, 1, 1)},
        "complex": {"weight": torch.ones(2, 1, 3, 3, dtype=torch.complex64)},
        "nan": {"weight": broken},
        "net": torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 8, 5)).state_dict(),
        "two": {"a": torch.ones(2, 4, 3, 3), "b": torch.ones(2, 4, 3, 3)},
    }
    for name, content in kinds.items():
        torch.save(content, empty_folder / f"{name}.pt")
    assert run("census", *tokens) == 2
    line = one_line(capsys)
    assert all(word in line for word in words), line
    assert not (empty_folder / "runs").exists()
