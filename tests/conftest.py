"""Fixtures for the tests under ``tests``."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def shared() -> Path:
    """Return the folder of data sets beside the checkout, or skip the test."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data (not part of the project)")
    return folder
