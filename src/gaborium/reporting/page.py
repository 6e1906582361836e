"""What every report needs: a page from its template, versions, and a folder of files."""

from __future__ import annotations

import io
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from gaborium import __version__
from gaborium.errors import require
from gaborium.files import write_bytes, write_text


def render(template: str, filters: Mapping[str, Any], **context: Any) -> str:
    """A page from a template of this package; whatever the context holds is shown as text.

    Args:
        template: file name.
        filters: what the template calls, beside ``unbroken``.
        **context: what it shows, beside ``versions``; a name that is missing is an error.

    Raises:
        ImportError: Jinja2 is not installed.
    """
    jinja2 = require("jinja2", extra="report", purpose="Reports")
    templates = files("gaborium.reporting")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda name: templates.joinpath(name).read_text(encoding="utf-8")
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"unbroken": _unbroken, **filters}
    page: str = environment.get_template(template).render(versions=versions(), **context)
    return page


def versions() -> dict[str, str]:
    """Of what the numbers were computed with."""
    return {
        "gaborium": __version__,
        "torch": version("torch"),
        "python": platform.python_version(),
    }


def write_files(
    folder: str | os.PathLike[str], contents: Iterable[tuple[str, Any]]
) -> tuple[str, ...]:
    """Write files into a folder, once the last of them is made.

    Args:
        folder: where to; it exists, and files of the same names are replaced.
        contents: the files by name, texts or matplotlib figures, which are drawn as the name's
            ending says: ``png``, ``pdf`` or ``svg``; not asked for without a folder.

    Returns:
        The names of the files.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: a file cannot be written, with the reason.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"There is no folder {os.fspath(folder)!r}; make it first.")
    made = {
        name: item if isinstance(item, str) else drawn(item, name.rpartition(".")[2])
        for name, item in contents
    }
    for name, content in made.items():
        path = Path(folder, name)
        if isinstance(content, str):
            write_text(path, content)
        else:
            write_bytes(path, content)
    return tuple(made)


def png(figure: Any) -> bytes:
    """A matplotlib figure as the content of a file."""
    return drawn(figure, "png")


def drawn(figure: Any, kind: str) -> bytes:
    """A matplotlib figure as the content of a ``png``, ``pdf`` or ``svg`` file, without a date."""
    dated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=dated.get(kind))
    return buffer.getvalue()


def _unbroken(sentence: str) -> str:
    """The sentence with numbers and their units on one line."""
    return sentence.replace(" × 10", "\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}10").replace(
        " %", "\N{NO-BREAK SPACE}%"
    )
