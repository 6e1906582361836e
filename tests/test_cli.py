"""The command line, as a person meets it: what it writes, what it refuses, how it stops."""

from __future__ import annotations

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
from gaborium.cli import main

FAST = ["--crop", "40", "--kernel-size", "9", "--sigma", "1.5", "--wavelength", "4"]
FAST += ["--steps", "2", "--learning-rate", "0.1", "--momentum", "0"]


def run(*tokens: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["recover", *tokens])
    return int(stop.value.code)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def save(pixels: torch.Tensor, path: Path) -> Path:
    from PIL import Image

    Image.fromarray((pixels * 255).byte().numpy()).save(path)
    return path


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3))


def test_recover_writes_result_report_and_figures(empty_folder, capsys):
    assert run(*FAST) == 0
    folder = empty_folder / "runs" / "recover"
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["target"]["fields"]["wavelength"] == [[4.0]]
    assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")
    assert len(list(folder.glob("*.png"))) >= 3
    shown = capsys.readouterr().out
    assert "std. error" in shown
    assert "orientation" in shown
    assert "report.html" in shown
    assert [p.name for p in (empty_folder / "runs").iterdir()] == ["recover"]


def test_a_colour_photograph_with_one_amplitude_per_channel(empty_folder):
    photo = save(noise(50, 60, 3), empty_folder / "photo.png")
    assert run(*FAST, "--image", str(photo), "--amplitude", "1", "-0.5", "0.25") == 0
    text = (empty_folder / "runs/recover/result.json").read_text(encoding="utf-8")
    rows = {row["parameter"]: row for row in json.loads(text)["table"]}
    assert rows["amplitude[2]"]["found"] == pytest.approx(0.25, abs=1e-6)


def test_a_folder_of_photographs_of_different_sizes(empty_folder, capsys):
    folder = empty_folder / "photos"
    folder.mkdir()
    for i, shape in enumerate([(50, 60), (44, 48), (64, 41, 3)]):
        save(noise(*shape), folder / f"{i}.png")
    assert run(*FAST, "--image", str(folder), "--max-images", "2") == 0
    assert "first 2 of 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["--image", "missing.png"], ["missing.png", "check the path"]),
        (["--sigma", "-3"], ["sigma", "positive", "-3"]),
        (["--wavelength", "0"], ["wavelength", "positive"]),
        (["--kernel-size", "0"], ["--kernel-size", "at least 1"]),
        (["--kernel-size", "99"], ["kernel", "larger", "image"]),
        (["--noise", "nan"], ["--noise", "nan"]),
        (["--learning-rate", "-1"], ["--learning-rate", "negative"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--sgima", "3"], ["--sgima", "--sigma"]),
        (["--phase", "0", "1"], ["phase", "channel"]),
        (["--name", "../elsewhere"], ["--name", "elsewhere"]),
        (["--out", "file/inside"], ["file", "not a folder"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(empty_folder, capsys, tokens, words):
    (empty_folder / "file").write_text("in the way", encoding="utf-8")
    assert run(*tokens) == 2
    line = one_line(capsys)
    assert all(word in line for word in words), line
    assert not (empty_folder / "runs").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.png", b"only words", "not an image"),
        ("empty.png", b"", "empty"),
        ("half.png", None, "damaged"),
    ],
)
def test_files_that_are_no_photographs(empty_folder, capsys, name, content, words):
    path = empty_folder / name
    if content is None:
        whole = save(noise(64, 64), path).read_bytes()
        content = whole[: len(whole) // 2]
    path.write_bytes(content)
    assert run(*FAST, "--image", str(path)) == 2
    assert words in one_line(capsys)


def test_a_constant_photograph_says_that_nothing_can_be_recovered(empty_folder, capsys):
    photo = save(torch.full((50, 50), 0.5), empty_folder / "grey.png")
    assert run(*FAST, "--image", str(photo)) == 2
    assert "nothing can be recovered" in one_line(capsys)
    assert not list(empty_folder.glob("runs/*"))


def test_an_earlier_run_is_kept_unless_told_otherwise(empty_folder, capsys):
    assert run(*FAST) == 0
    before = (empty_folder / "runs/recover/result.json").read_bytes()
    capsys.readouterr()
    assert run(*FAST, "--seed", "5") == 2
    assert "--overwrite" in one_line(capsys)
    assert (empty_folder / "runs/recover/result.json").read_bytes() == before
    assert run(*FAST, "--seed", "5", "--overwrite") == 0
    assert (empty_folder / "runs/recover/result.json").read_bytes() != before


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as on POSIX systems")
@pytest.mark.parametrize("kind", ["SIGINT", "SIGTERM"])
def test_an_interrupted_run_leaves_nothing(empty_folder, kind):
    child = subprocess.Popen(
        [sys.executable, "-m", "gaborium", "recover", "--steps", "100000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
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
    assert run() == 2
    assert 'pip install "gaborium[cli]"' in one_line(capsys)
