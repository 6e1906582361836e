"""The folder of a training: claimed by one process, with a journal that survives any kill."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gaborium.errors import require
from gaborium.files import locked_folder
from gaborium.params import plain
from gaborium.training.recipe import Recipe

RECIPE_FILE, METRICS_FILE = "recipe.toml", "metrics.jsonl"
Progress = Callable[[Mapping[str, Any]], None]
_PATIENCE = 5.0  # seconds that a process may take to notice that its starter was killed
_HARDWARE = ("accelerator", "devices")  # may change when a run is taken up again


@contextlib.contextmanager
def claimed(folder: Path, recipe: Recipe, *, resume: bool) -> Iterator[None]:
    """Make the folder that of this recipe, or see that it is, and keep others out of it."""
    with locked_folder(folder, RECIPE_FILE, timeout=_PATIENCE) as known:
        if known and resume:
            _check_same(Recipe.from_toml(folder / RECIPE_FILE), recipe, repr(str(folder)))
        elif known:
            for path in folder.iterdir():
                if path.name not in (".lock", RECIPE_FILE):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        for part in folder.rglob(".gaborium-*.part"):  # of a process that was killed
            part.unlink(missing_ok=True)
        recipe.to_toml(folder / RECIPE_FILE)
        yield


def _check_same(there: Recipe, here: Recipe, shown: str) -> None:
    different = [
        f"{name} ({getattr(there, name)!r:.40} there, {getattr(here, name)!r:.40} here)"
        for name in vars(there)
        if name not in _HARDWARE and getattr(there, name) != getattr(here, name)
    ]
    if different:
        raise ValueError(
            f"{shown} holds another recipe: {', '.join(different)}; choose another folder, give "
            "the recipe that is there, or replace it with resume=False (--overwrite)."
        )


@dataclass
class Journal:
    """``metrics.jsonl``: a line for all that is measured, none missing or twice after a kill."""

    file: BinaryIO | None
    writer: Any
    progress: Progress | None

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, folder: Path | None, *, tensorboard: bool, progress: Progress | None
    ) -> Iterator[Journal]:
        """The journal in a folder; without one it only passes lines on to ``progress``."""
        with contextlib.ExitStack() as stack:
            journal = cls(None, None, progress)
            if folder is not None:
                journal.file = stack.enter_context((folder / METRICS_FILE).open("ab"))
                if tensorboard:
                    journal.writer = _tensorboard(folder, stack)
            yield journal

    def write(self, line: dict[str, Any], n_steps: int) -> None:
        """Append a line, and show it."""
        if self.file is not None:
            self.file.write((json.dumps(plain(line), allow_nan=False) + "\n").encode())
            self.file.flush()
        if self.writer is not None:
            for name, value in line.items():
                if isinstance(value, float):
                    tag = f"{line['variant']}, seed {line['seed']}/{line['kind']} {name}"
                    self.writer.add_scalar(tag, value, line["step"])
        if self.progress is not None:
            self.progress({**line, "n_steps": n_steps})

    def mark(self) -> int:
        """Where the next line comes, once all lines before it are on the disk."""
        if self.file is None:
            return 0
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.seek(0, os.SEEK_END)

    def cut(self, mark: int) -> None:
        """Remove the lines that were written after a mark."""
        if self.file is None:
            return
        there = self.file.seek(0, os.SEEK_END)
        if there < mark:
            raise ValueError(
                f"{self.file.name!r} has {there} bytes, and had {mark} when the last checkpoint "
                "was written; put it back, or begin again with resume=False (--overwrite)."
            )
        self.file.truncate(mark)


def _tensorboard(folder: Path, stack: contextlib.ExitStack) -> Any:
    try:
        require("tensorboard", extra="dev", purpose="Event files")
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn(
            "TensorBoard is not installed, so nothing is written for it; metrics.jsonl has all "
            "lines.",
            stacklevel=2,
        )
        return None
    writer = SummaryWriter(str(folder / "tensorboard"))
    stack.callback(writer.close)
    return writer
