"""Commands as a person runs them: what they exit with, and the line in which they say why."""

from __future__ import annotations

import pytest

from gaborium.cli import main


def run(command: str, *tokens: object) -> int:
    """What ``gaborium`` exits with."""
    with pytest.raises(SystemExit) as stop:
        main([command, *map(str, tokens)])
    return int(stop.value.code)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What stands on the error stream, which must be a single line."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text
