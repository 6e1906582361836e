"""A reader finds the old content or the new, whole, however the writing ended."""

import errno
import hashlib
import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gaborium.support import (
    locked_folder,
    new_folder,
    read_tensors,
    write_bytes,
    write_tensors,
    write_text,
)


def refused(kind: type[OSError], call: Callable[[], object], *words: str) -> None:
    """Assert that the call raises exactly ``kind``, in one line that holds the words."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    for word in words:
        assert word in message


def make(path: Path, *, overwrite: bool = False, text: str = "new") -> None:
    with new_folder(path, overwrite=overwrite) as folder:
        write_text(folder / "result.json", text)


def content(folder: Path) -> dict[str, str]:
    """Every file below, hidden ones too, and the folders as empty text."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else ""
        for path in folder.rglob("*")
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a finished run."""
    path = tmp_path / "runs" / "first"
    make(path, text="old")
    return path


def test_text_is_utf_8_with_its_own_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "θ\r\nγ\n")
    assert (tmp_path / "a").read_bytes() == b"\xce\xb8\r\n\xce\xb3\n"


def test_writing_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    for data in (b"old and longer", b"new"):
        write_bytes(tmp_path / "a", data)
    assert content(tmp_path) == {"a": "new"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), None])
def test_a_file_interrupted_in_the_middle_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | None
) -> None:
    write_text(tmp_path / "a", "old")

    def fsync(descriptor: int) -> None:
        raise error or KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    if error is None:
        with pytest.raises(KeyboardInterrupt):
            write_text(tmp_path / "a", "new")
    else:
        with pytest.raises(OSError, match=r"No space left on device: .*/a'") as caught:
            write_text(tmp_path / "a", "new")
        assert caught.value.errno == errno.ENOSPC
    assert content(tmp_path) == {"a": "old"}


def test_the_content_is_on_the_disk_before_it_gets_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda fd: sizes.append(os.fstat(fd).st_size))
    write_bytes(tmp_path / "a", b"four")
    assert sizes == [4]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_new_file_follows_the_umask_and_a_replaced_one_keeps_its_mode(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "new", "")
        (tmp_path / "kept").touch()
        (tmp_path / "kept").chmod(0o604)
        write_text(tmp_path / "kept", "x")
        make(tmp_path / "folder")
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "kept", "folder")]
    assert modes == [0o640, 0o604, 0o750]


@pytest.mark.skipif(sys.platform == "win32", reason="links need privileges there")
def test_a_link_is_followed(tmp_path: Path, run: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    (tmp_path / "latest").symlink_to(run)
    make(tmp_path / "latest", overwrite=True)
    assert (tmp_path / "latest").is_symlink()
    assert content(run) == {"result.json": "new"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_or_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(tmp_path / "pipe", "hello")
        assert os.read(reader, 10) == b"hello"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("write", [lambda path: write_text(path, ""), make])
def test_a_file_in_the_path_is_named(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("old")
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "b" / "a"):
        with pytest.raises(OSError, match=r"(Not a directory|File exists): '.*/file"):
            write(path)
    assert content(tmp_path) == {"file": "old"}


def test_a_file_does_not_make_folders_or_replace_one(tmp_path: Path) -> None:
    refused(FileNotFoundError, lambda: write_text(tmp_path / "no" / "a", ""), "/no/a'")
    (tmp_path / "folder").mkdir()
    refused(IsADirectoryError, lambda: write_text(tmp_path / "folder", ""), "/folder'")
    assert content(tmp_path) == {"folder": ""}


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("write", [lambda path: write_text(path, ""), make])
def test_a_file_system_that_takes_no_files_is_one_line(write: Callable[[Path], None]) -> None:
    with pytest.raises(OSError, match=r"^\[Errno \d+\] .*'/proc/"):
        write(Path("/proc/gaborium-test"))


def test_a_folder_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs" / "first"
    with new_folder(path, overwrite=False) as folder:
        assert folder.parent == path.parent
        assert folder.name.startswith(".")
        assert not path.exists()
        (folder / "part").write_text("1")
        assert not path.exists()
    assert content(path.parent) == {"first": "", "first/part": "1"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, PermissionError])
@pytest.mark.parametrize("exists", [True, False])
def test_an_interrupted_block_changes_nothing(
    run: Path, error: type[BaseException], exists: bool
) -> None:
    before = content(run.parent)
    path = run if exists else run.parent / "second"

    def work() -> None:
        with new_folder(path, overwrite=True) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "result.json").write_text("half")
            raise error("in the middle")

    with pytest.raises(error) as caught:
        work()
    assert caught.value.args == ("in the middle",)  # the block's own error, not reworded
    assert content(run.parent) == before


def test_overwriting_replaces_the_whole_folder_at_the_end(run: Path) -> None:
    (run / "extra").write_text("old")
    with new_folder(run, overwrite=True) as folder:
        assert content(run) == {"result.json": "old", "extra": "old"}
        write_text(folder / "result.json", "new")
    assert content(run.parent) == {"first": "", "first/result.json": "new"}


@pytest.mark.parametrize(
    ("found", "overwrite", "words"),
    [
        ("run", False, ["exists; choose another name", "overwrite=True (--overwrite)"]),
        ("home", False, ["exists without a result.json"]),
        ("home", True, ["exists without a result.json, so it is never replaced"]),
        ("empty", True, ["exists without a result.json"]),
        ("file", True, ["exists without a result.json"]),
    ],
)
def test_an_existing_target_is_refused_before_any_work(
    tmp_path: Path, found: str, overwrite: bool, words: list[str]
) -> None:
    path = tmp_path / "it"
    if found == "file":
        path.write_text("old")
    else:
        path.mkdir()
    if found in ("run", "home"):
        (path / ("result.json" if found == "run" else "thesis.tex")).write_text("old")
    before = content(tmp_path)
    entered = []

    def work() -> None:
        with new_folder(path, overwrite=overwrite):
            entered.append(True)

    refused(FileExistsError, work, repr(str(path)), *words)
    assert not entered
    assert content(tmp_path) == before


@pytest.mark.parametrize("interrupt", [False, True])
def test_if_the_second_rename_fails_the_old_folder_comes_back(
    run: Path, monkeypatch: pytest.MonkeyPatch, interrupt: bool
) -> None:
    rename, calls = Path.rename, []

    def fail_second(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt if interrupt else OSError(errno.EBUSY, "Device busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    if interrupt:
        with pytest.raises(KeyboardInterrupt):
            make(run, overwrite=True)
        assert content(run.parent) == {"first": "", "first/result.json": "old"}
        return
    refused(OSError, lambda: make(run, overwrite=True), "Device busy", "finished work is in")
    (kept,) = (path for path in run.parent.iterdir() if path != run)
    assert content(run) == {"result.json": "old"}
    assert content(kept) == {"result.json": "new"}


def test_finished_work_is_kept_when_another_run_took_the_name(tmp_path: Path) -> None:
    path = tmp_path / "it"

    def work() -> None:
        with new_folder(path, overwrite=False) as folder:
            write_text(folder / "result.json", "mine")
            make(path, text="theirs")

    refused(FileExistsError, work, "exists; choose", "The finished work is in")
    (kept,) = (folder for folder in tmp_path.iterdir() if folder != path)
    assert content(path) == {"result.json": "theirs"}
    assert content(kept) == {"result.json": "mine"}


# -- tensors ----------------------------------------------------------------------------------

METADATA = {"name": "gaborium.fit", "format": 1, "names": ["a", "θ"]}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pytest.importorskip("safetensors")
    x = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "x": x,
        "transposed": x.T,
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    write_tensors(tmp_path / "it", tensors, METADATA)
    return tmp_path / "it"


def bad_tensors(path: Path, *words: str, kind: str = "fit") -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        read_tensors(path, kind=kind)
    message = str(caught.value)
    assert message.startswith(repr(str(path)))
    assert "\n" not in message
    for word in words:
        assert word in message


def test_tensors_and_metadata_come_back(saved: Path) -> None:
    tensors, metadata = read_tensors(saved, kind="fit")
    assert {**METADATA, "sha256": metadata["sha256"]} == metadata
    assert torch.equal(tensors["transposed"], tensors["x"].T)
    assert tensors["none"].shape == (0, 3)
    assert tensors["scalar"].item() == 7
    assert tensors["half"].dtype == torch.bfloat16
    data = saved.read_bytes()
    blank = data.replace(metadata["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(blank).hexdigest() == metadata["sha256"]
    write_tensors(saved, tensors, METADATA)
    assert saved.read_bytes() == data


def test_every_cut_flipped_bit_and_added_byte_is_noticed(saved: Path) -> None:
    data = saved.read_bytes()
    for n in range(0, len(data), 3):
        saved.write_bytes(data[:n])
        bad_tensors(saved)
        saved.write_bytes(data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :])
        bad_tensors(saved)
    saved.write_bytes(data[:-1] + bytes([data[-1] ^ 64]))
    bad_tensors(saved, "is damaged: its checksum is wrong")
    saved.write_bytes(data + b"\0")
    bad_tensors(saved)


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def test_other_files_are_refused_and_nothing_in_them_is_executed(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save

    monkeypatch.chdir(saved.parent)
    torch.save({"x": Bomb()}, "zip")
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 32], "data_offsets": [0, 4 << 32]}})
    contents = [
        b"",
        Path("zip").read_bytes(),
        pickle.dumps(Bomb()),
        b"orientation,wavelength\n" * 10,
        (20_000).to_bytes(8, "little") + b'{"a":' + b"[" * 19_995,
        (8 << 30).to_bytes(8, "little") + b"{",  # claims a header of gigabytes
        len(header).to_bytes(8, "little") + header.encode() + b"\0" * 64,  # or a tensor of 16 GB
        save({"weight": torch.zeros(2)}),
        save({"weight": torch.zeros(2)}, {"gaborium": "[1]"}),
        save({"weight": torch.zeros(2)}, {"gaborium": '{"format": "x", "sha256": 3}'}),
    ]
    for content in contents:
        saved.write_bytes(content)
        bad_tensors(saved, "is not a saved fit of gaborium, or is damaged")
    assert not Path("exploded").exists()


def test_another_kind_and_a_newer_format_are_named(saved: Path) -> None:
    bad_tensors(saved, "is a saved fit, expected a saved layer", kind="layer")
    write_tensors(saved, {}, METADATA | {"format": 2})
    bad_tensors(saved, "has format 2", "reads 1; update it")


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    with pytest.raises(FileNotFoundError, match="/none'"):
        read_tensors(tmp_path / "none", kind="fit")
    bad_tensors(tmp_path, "is not a file")
    os.mkfifo(tmp_path / "pipe")
    bad_tensors(tmp_path / "pipe", "is not a file")


# -- locked folders ---------------------------------------------------------------------------


def test_a_locked_folder_keeps_other_processes_out_until_a_kill(tmp_path: Path) -> None:
    pytest.importorskip("filelock")
    folder = tmp_path / "work"
    code = (
        "import pathlib, sys, time\nfrom gaborium.support import locked_folder\n"
        "with locked_folder(pathlib.Path(sys.argv[1]), 'it') as known:\n"
        "    print(known, flush=True)\n    time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE)
    assert other.stdout is not None
    with other.stdout as out:
        assert out.readline().strip() == b"False"
        with (
            pytest.raises(BlockingIOError, match="Another process is working in"),
            locked_folder(folder, "it"),
        ):
            pass
        other.kill()
    other.wait()
    write_text(folder / "it", "")
    with locked_folder(folder, "it", timeout=5) as known:
        assert known


def test_a_folder_with_other_work_is_not_locked(tmp_path: Path) -> None:
    pytest.importorskip("filelock")
    write_text(tmp_path / "thesis.tex", "")
    with pytest.raises(FileExistsError, match=r"holds 'thesis.tex' and no it"):  # noqa: SIM117
        with locked_folder(tmp_path, "it"):
            pass
    with pytest.raises(FileExistsError):  # noqa: SIM117
        with locked_folder(tmp_path / "thesis.tex", "it"):
            pass
