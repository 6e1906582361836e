"""One page for every kind of result: the answer, then sections in one HTML template."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from torch import Tensor

from gaborium.plots import INK, MUTED, PAPER, SHADE
from gaborium.report.formatting import label, written
from gaborium.support import require

Drawing = Callable[..., Any]  # draws a matplotlib figure of a width in inches, if it has one

_NARROW = 3.5  # inches: the width of figures on a phone
_MOST_PIXELS = 72  # in a row of a picture within a table
# Colours of figures that follow the page, which may be light or dark.
_VARIABLES = {INK: "ink", MUTED: "muted", SHADE: "line", PAPER: "paper", "#000000": "ink"}


class Table(NamedTuple):
    """A table of texts and of pictures ``(height, width, 4)``; the first columns are words."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Tensor]]
    n_words: int = 1

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], names: Sequence[str], n_words: int = 1) -> Table:
        """Those of the named columns that the rows have."""
        names = [name for name in names if name in rows[0]]
        cells = [[written(name, row[name]) for name in names] for row in rows]
        head = [label(name) + ", px" * (name in ("wavelength", "sigma")) for name in names]
        return cls(head, cells, n_words)


class Section(NamedTuple):
    """A part of a page; what is in backticks is set as code, and ``tone`` is a severity."""

    title: str = ""
    text: Sequence[str] = ()
    figures: Mapping[str, Drawing] = {}
    table: Table | None = None
    code: str = ""
    tone: str = ""
    link: str = ""


class Report(NamedTuple):
    """What is said about a result: the answer, what a reader should know next, and the page."""

    kind: str
    title: str
    headline: str
    sentences: Sequence[str]
    sections: Sequence[Section]
    rows: Sequence[Mapping[str, object]] = ()  # one for each filter


def render(report: Report, facts: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """The page as HTML, and its matplotlib figures by name."""
    jinja2 = require("jinja2", extra="report", purpose="Reports")
    markup = require("markupsafe", extra="report", purpose="Reports")
    figures: dict[str, Any] = {}

    def prose(text: str) -> Any:
        text = str(markup.escape(text)).replace(" %", "\u00a0%")
        text = re.sub(" ([×±]) ", "\u00a0\\1\u00a0", text)
        return markup.Markup(re.sub("`([^`]+)`", r"<code>\1</code>", text))

    def drawn(name: str, drawing: Drawing) -> Iterator[tuple[str, int, str]]:
        """A figure's kind, its largest width in rem, and its SVG; a wide one also for a phone."""
        figures[name] = figure = drawing()
        shapes = {"": figure}
        if figure.get_figwidth() > 1.5 * _NARROW:
            shapes = {"wide": figure, "narrow": drawing(width=_NARROW)}
        for shape, one in shapes.items():
            yield shape, round(8.5 * one.get_figwidth()), _svg(one, name + shape)

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"prose": prose, "png": _png}
    template = files("gaborium.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    values = report._asdict() | {"facts": facts, "drawn": drawn}
    return environment.from_string(template).render(values), figures


def saved(figure: Any, **options: Any) -> bytes:
    """A matplotlib figure as the content of a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, **options)
    figure.set_layout_engine("none")  # it is laid out now
    return buffer.getvalue()


def _svg(figure: Any, name: str) -> str:
    """A figure for within a page: its text is text, and its colours are the page's."""
    matplotlib = require("matplotlib", extra="report", purpose="Reports")
    options = {"format": "svg", "transparent": True, "dpi": 144}
    metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])
    # The salt makes the names of clip paths and markers differ between the figures of a page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        text = saved(figure, metadata=metadata, **options).decode()
    text = re.sub(r' (?:id="\w+_\d+"|xmlns(?::\w+)?="[^"]*")', "", text[text.index("<svg") :])
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


def _png(pixels: Tensor) -> str:
    """A picture ``(height, width, 4)`` with values in [0, 1], for within a page."""
    image = require("PIL.Image", extra="report", purpose="Reports")
    picture = image.fromarray((255 * pixels).round().byte().numpy())
    picture.thumbnail((_MOST_PIXELS, picture.height))
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()
