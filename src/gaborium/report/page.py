"""One page for every kind of result: its sections as HTML, and the same numbers as JSON."""

from __future__ import annotations

import base64
import io
import json
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from gaborium.functions.params import UNITS, plain
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
        head = [label(name) + ", px" * (UNITS.get(name) == "px") for name in names]
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
    """What is said about a result.

    Args:
        kind: of the result.
        title: of the page, unless it is given another.
        headline: the answer in one sentence.
        sentences: what a reader should know next.
        sections: the page.
        record: the result as plain values.
        rows: a row for each filter, or ``None``.
    """

    kind: str
    title: str
    headline: str
    sentences: Sequence[str]
    sections: Callable[[], Iterable[Section]]
    record: Callable[[], Mapping[str, Any]]
    rows: Callable[[], Sequence[Mapping[str, object]]] | None = None

    def json(self, facts: Mapping[str, str]) -> str:
        """The result with headline, facts and versions."""
        record = {"format": f"gaborium.{self.kind}", "version": 1, "facts": dict(facts)}
        record |= {"versions": _versions(), "headline": self.headline, "result": self.record()}
        return json.dumps(plain(record), allow_nan=False, ensure_ascii=False) + "\n"

    def html(self, title: str | None, facts: Mapping[str, str], figures: dict[str, Any]) -> str:
        """The page; ``figures`` receives its matplotlib figures by name."""
        first, *rest = self.sections()
        sections = [first._replace(text=[*self.sentences, *first.text]), *rest]
        facts = {**facts, "versions": ", ".join(map(" ".join, _versions().items()))}
        return fill(title or self.title, self.headline, sections, facts, figures)


def fill(
    title: str,
    headline: str,
    sections: Sequence[Section],
    facts: Mapping[str, str],
    figures: dict[str, Any],
) -> str:
    """Fill the template."""
    jinja2 = require("jinja2", extra="report", purpose="Reports")
    markupsafe = require("markupsafe", extra="report", purpose="Reports")

    def prose(text: str) -> Any:
        text = str(markupsafe.escape(text)).replace(" %", "\u00a0%")
        text = re.sub(" ([×±]) ", "\u00a0\\1\u00a0", text)
        return markupsafe.Markup(re.sub("`([^`]+)`", r"<code>\1</code>", text))

    def draw(name: str, drawing: Drawing) -> Any:
        figures[name] = wide = drawing()
        shapes = {"": wide}
        if wide.get_figwidth() > 1.5 * _NARROW:
            shapes = {"wide": wide, "narrow": drawing(width=_NARROW)}
        return markupsafe.Markup("").join(
            markupsafe.Markup('<figure class="{}" style="max-width: {}rem">{}</figure>').format(
                shape, round(8.5 * one.get_figwidth()), markupsafe.Markup(_svg(one, name + shape))
            )
            for shape, one in shapes.items()
        )

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["prose"] = prose
    template = files("gaborium.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    text: str = environment.from_string(template).render(
        title=title, headline=headline, sections=sections, facts=facts, draw=draw, png=_png
    )
    return text


def _versions() -> dict[str, str]:
    names = ("gaborium", "torch", "matplotlib")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


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
    image = require("matplotlib.image", extra="report", purpose="Reports")
    if pixels.shape[1] > _MOST_PIXELS:
        size = [max(1, side * _MOST_PIXELS // pixels.shape[1]) for side in pixels.shape[:2]]
        pixels = F.interpolate(pixels.movedim(-1, 0)[None], size, mode="area")[0].movedim(0, -1)
    buffer = io.BytesIO()
    values = (255 * pixels).round().byte().numpy()
    image.imsave(buffer, values, format="png", metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()
