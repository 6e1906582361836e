"""The data sets of the experiments, from files in formats of their own."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gaborium.training import Dataset, load_dataset

_BRODATZ_PATCH = 24  # px
_RATE = 8000  # samples per second, and of each spoken digit
_FILES = {
    "fashion-mnist": "images/fashion_mnist.npz",
    "mnist": "images/mnist.npz",
    "cifar10": "images/cifar10_jpeg.npz",
    "kth-tips": "textures/kth_tips_grey.npz",
    "brodatz": "textures/brodatz24.npz",
    "spoken-digits": "audio/fsdd.npz",
}


def load(name: str, folder: Path) -> Dataset:
    """Load a data set of the package, or one of ``_FILES`` in a folder."""
    if name not in _FILES:
        return load_dataset(name)
    path = folder / _FILES[name]
    if name in _READ:
        with np.load(path, allow_pickle=False) as arrays:
            return Dataset(name, *_READ[name](arrays))
    return replace(load_dataset(path), name=name)


def _jpegs(arrays: Any) -> tuple[Any, ...]:
    parts = []
    for part in ("train", "test"):
        blob, offsets = arrays[f"jpeg_{part}"], arrays[f"offset_{part}"]
        images = [
            np.asarray(Image.open(io.BytesIO(blob[start:end].tobytes())).convert("RGB"))
            for start, end in pairwise(offsets.astype(int))
        ]
        parts += [
            torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
            torch.as_tensor(arrays[f"y_{part}"]).long(),
        ]
    return *parts, tuple(map(str, range(10)))


def _materials(arrays: Any) -> tuple[Any, ...]:
    """Images 1 to 5 of each material to learn from, 6 to 9 to test with."""
    images, labels = torch.as_tensor(arrays["x"])[:, None], torch.as_tensor(arrays["y"]).long()
    train = torch.as_tensor(arrays["image"] <= 5)
    classes = tuple(map(str, arrays["classes"]))
    return images[train], labels[train], images[~train], labels[~train], classes


def _albums(arrays: Any) -> tuple[Any, ...]:
    """Patches of the upper halves to learn from, of the lower halves to test with."""
    pages = torch.as_tensor(arrays["x"])
    middle, size, parts = pages.shape[1] // 2, _BRODATZ_PATCH, []
    for half in (pages[:, :middle], pages[:, middle:]):
        patches = half.unfold(1, size, size).unfold(2, size, size).flatten(1, 2)
        labels = torch.arange(len(pages)).repeat_interleave(patches.shape[1])
        parts += [patches.reshape(-1, 1, size, size), labels]
    return *parts, tuple(map(str, arrays["name"]))


def _sounds(arrays: Any) -> tuple[Any, ...]:
    """One second of each clip; takes 0 to 4 of each speaker and digit to test with."""
    offsets, samples = arrays["offset"].astype(int), arrays["samples"]
    sounds = torch.zeros(len(offsets) - 1, 1, _RATE)
    for index, (start, end) in enumerate(pairwise(offsets)):
        clip = samples[start : min(end, start + _RATE)]
        sounds[index, 0, : len(clip)] = torch.as_tensor(clip) / 2**15
    labels, test = torch.as_tensor(arrays["digit"]).long(), torch.as_tensor(arrays["take"] < 5)
    classes = tuple(map(str, range(10)))
    return sounds[~test], labels[~test], sounds[test], labels[test], classes


_READ: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "cifar10": _jpegs,
    "kth-tips": _materials,
    "brodatz": _albums,
    "spoken-digits": _sounds,
}
