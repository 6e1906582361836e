"""What every report needs: a page from its template, versions, and figures as files."""

from __future__ import annotations

import io
import platform
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from gaborium import __version__
from gaborium.errors import require


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


def png(figure: Any) -> bytes:
    """A matplotlib figure as the content of a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _unbroken(sentence: str) -> str:
    """The sentence with numbers and their units on one line."""
    return sentence.replace(" × 10", "\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}10").replace(
        " %", "\N{NO-BREAK SPACE}%"
    )
