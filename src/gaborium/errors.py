"""Checks shared by every floor, and the one way an optional package is imported."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any


def require(package: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say how to get it.

    Args:
        package: import name, e.g. ``"matplotlib.pyplot"``.
        extra: the extra of this project that installs it, e.g. ``"plot"``.
        purpose: what needs it, as the subject of a sentence in the plural, e.g. ``"Plots"``.

    Returns:
        The imported module.

    Raises:
        ImportError: the package is not installed; the message names the command that installs it.

    Example:
        >>> require("json", extra="plot", purpose="Plots").__name__
        'json'
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        top = package.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # the package is there; something it needs is not
        raise ImportError(
            f'{purpose} need {top}: pip install "gaborium[{extra}]".', name=top
        ) from None


def one_of(what: str, value: str, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``; otherwise raise one clear line.

    Example:
        >>> one_of("output", "energy", ("real", "energy"))
        'energy'
    """
    choices = tuple(choices)
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{what} must be one of {listed}, got {value!r}.")
    return value


def as_sizes(what: str, value: int | Iterable[Any], n_dims: int) -> tuple[int, ...]:
    """Return ``value`` as ``n_dims`` positive whole numbers; one number serves every axis.

    Example:
        >>> as_sizes("kernel_size", 7, 2)
        (7, 7)
    """
    sizes = (value,) * n_dims if isinstance(value, int) else tuple(value)
    if len(sizes) != n_dims:
        raise ValueError(f"{what} must be {n_dims} numbers (one per axis), got {value!r}.")
    if any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"{what} must be positive whole numbers, got {value!r}.")
    return sizes
