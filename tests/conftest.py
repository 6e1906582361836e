"""Fixtures for the tests under ``tests``."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gaborium.training import Dataset

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def shared() -> Path:
    """Return the folder of data sets beside the checkout, or skip the test."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data (not part of the project)")
    return folder


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an empty folder, and forget what a command makes of signals."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def stripes() -> Dataset:
    """Upright and lying stripes of any phase, under noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    phase = 6.28 * torch.rand(60, 1, 1, 1, generator=generator)
    x = torch.arange(12.0).expand(60, 1, 12, 12)
    waves = torch.sin(x * 1.3 + phase)
    waves = torch.where(labels[:, None, None, None] == 0, waves, waves.mT)
    noise = torch.randn(60, 1, 12, 12, generator=generator)
    images = (127 + 50 * waves + 20 * noise).clamp(0, 255).to(torch.uint8)
    return Dataset("stripes", images[:25], labels[:25], images[25:], labels[25:], ("up", "flat"))
