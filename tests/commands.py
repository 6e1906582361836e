"""Commands as a person runs them: what they exit with, and the line in which they say why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gaborium.cli import main
from gaborium.report import page


def run(command: str, *tokens: object, figures: bool = False) -> int:
    """What ``gaborium`` exits with; most tests leave out the figures, which take longest."""

    def without_figures(report: Any, facts: Any) -> Any:
        sections = [section._replace(figures={}) for section in report.sections]
        return page.render(report._replace(sections=sections), facts)

    with pytest.MonkeyPatch.context() as patch:
        if not figures:
            patch.setattr("gaborium.report.render", without_figures)
        with pytest.raises(SystemExit) as stop:
            main([command, *map(str, tokens)])
    return int(stop.value.code)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What stands on the error stream, which must be a single line."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """What stands on the output, without line ends."""
    return " ".join(capsys.readouterr().out.split())


def written(name: str) -> dict[str, Any]:
    """The record of a run, whose page and index must be there too."""
    folder = Path("runs", name)
    assert f'href="{name}/report.html"' in Path("runs/index.html").read_text(encoding="utf-8")
    assert (folder / "report.html").is_file()
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))
