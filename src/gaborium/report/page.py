"""One page for every kind of result: sections as HTML, and the same numbers as JSON and CSV."""

from __future__ import annotations

import base64
import io
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from gaborium import __version__
from gaborium.errors import require
from gaborium.params import plain
from gaborium.plots import INK, MUTED, PAPER, SHADE

_NARROW = 3.5  # inches: how figures are drawn for a phone
_LARGEST = 96  # px, width of a picture within a table
# The colours of figures that follow the page, which may be light or dark.
_VARIABLES = {INK: "ink", MUTED: "muted", SHADE: "line", PAPER: "paper", "#000000": "ink"}


class Card(NamedTuple):
    """A number that stands out, or a verdict with its reason."""

    label: str
    value: str
    note: str = ""
    tone: str = ""


class Table(NamedTuple):
    """A table; cells are texts, or pictures ``(height, width, 4)``; the first columns are words."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Tensor]]
    n_text: int = 1


class Drawing(NamedTuple):
    """A figure with its name and what draws it; all but half-width ones are given a width."""

    name: str
    draw: Callable[..., Any]
    half: bool = False


class Section(NamedTuple):
    """A part of a page; words in backticks are set as code, and ``tone`` is a severity."""

    title: str = ""
    text: Sequence[str] = ()
    cards: Sequence[Card] = ()
    figures: Sequence[Drawing] = ()
    table: Table | None = None
    code: str = ""
    note: str = ""
    tone: str = ""
    link: str = ""


class Report(NamedTuple):
    """What is said about a result, on the terminal, as a page, and as JSON and CSV.

    Args:
        kind: of the result.
        title: of the page, unless it is given another.
        headline: the answer in one sentence.
        sentences: what a reader should know next.
        sections: the page.
        record: the result as plain values.
        rows: a row for each filter, or ``None``.
        facts: how the result was made, as far as the result holds it.
    """

    kind: str
    title: str
    headline: str
    sentences: Sequence[str]
    sections: Callable[[], list[Section]]
    record: Callable[[], dict[str, Any]]
    rows: Callable[[], list[dict[str, Any]]] | None = None
    facts: Mapping[str, str] = {}

    def json(self, facts: Mapping[str, str]) -> str:
        """The result with headline, facts and versions."""
        record = {
            "format": f"gaborium.{self.kind}",
            "version": 1,
            "facts": dict(facts),
            "versions": versions(),
            "headline": self.headline,
            "result": self.record(),
        }
        return json.dumps(plain(record), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def html(self, title: str | None, facts: Mapping[str, str], figures: dict[str, Any]) -> str:
        """The page: one file that refers to nothing else; see ``page`` for ``figures``."""
        first, *rest = self.sections()
        sections = [first._replace(text=[*self.sentences, *first.text]), *rest]
        said = ", ".join(map(" ".join, versions().items()))
        facts = {**facts, **self.facts, "versions": said}
        return page(title or self.title, self.headline, sections, facts, figures)


def page(
    title: str,
    headline: str,
    sections: Sequence[Section],
    facts: Mapping[str, str],
    figures: dict[str, Any],
) -> str:
    """Fill the template; ``figures`` receives the matplotlib figures, by name."""
    jinja2 = require("jinja2", extra="report", purpose="Reports")
    markup = require("markupsafe", extra="report", purpose="Reports").Markup

    def prose(text: str) -> Any:
        text = text.replace(" × 10", "\u00a0×\u00a010").replace(" %", "\u00a0%")
        parts = text.split("`") if text.count("`") % 2 == 0 else [text]
        codes = [markup("<code>{}</code>").format(part) for part in parts[1::2]]
        return markup("").join(sum(zip(parts, [*codes, markup("")], strict=True), ()))

    def drawn(drawing: Drawing) -> Any:
        figure = figures[drawing.name] = drawing.draw()
        alone = [(figure, "half")] if drawing.half else []
        both = alone or [(figure, "wide"), (drawing.draw(width=_NARROW), "narrow")]
        return markup("").join(
            markup('<figure class="{}">{}</figure>').format(
                shape, markup(_svg(one, f"{drawing.name} {shape}"))
            )
            for one, shape in both
        )

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"prose": prose, "drawn": drawn, "picture": _picture}
    template = files("gaborium.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    text: str = environment.from_string(template).render(
        title=title, headline=headline, sections=sections, facts=facts, picture=_picture
    )
    return text


def versions() -> dict[str, str]:
    """The versions that the numbers were computed with."""
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


def _svg(figure: Any, name: str) -> str:
    """A figure for within a page: its text is text, and its colours are the page's."""
    matplotlib = require("matplotlib", extra="report", purpose="Reports")
    buffer = io.StringIO()
    # The names of its parts come from the salt, and must differ between the figures of a page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            buffer, format="svg", transparent=True, dpi=144,
            metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]),
        )  # fmt: skip
    text = buffer.getvalue()
    text = re.sub(r' (?:id="\w+_\d+"|xmlns(?::\w+)?="[^"]*")', "", text[text.index("<svg") :])
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


def _picture(pixels: Tensor) -> Any:
    """A picture ``(height, width, 4)`` with values in [0, 1] as an HTML element."""
    markup = require("markupsafe", extra="report", purpose="Reports").Markup
    image = require("matplotlib.image", extra="report", purpose="Reports")
    size = [max(1, side * _LARGEST // pixels.shape[1]) for side in pixels.shape[:2]]
    if pixels.shape[1] > _LARGEST:
        pixels = F.interpolate(pixels.movedim(-1, 0)[None], size, mode="area")[0].movedim(0, -1)
    buffer = io.BytesIO()
    image.imsave(buffer, (255 * pixels).round().byte().numpy(), format="png",
                 metadata={"Software": None})  # fmt: skip
    code = base64.b64encode(buffer.getvalue()).decode()
    return markup(f'<img src="data:image/png;base64,{code}" alt="kernel, fit and residual">')
