"""Fields of settings with bounds or choices, which are checked in one place before anything is built."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def number(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    word: str | None = None,
) -> Any:
    """A field with bounds: ``low`` <= value <= ``high`` and value > ``above``; None and ``word`` pass."""
    return field(default=default, metadata={"low": low, "high": high, "above": above, "word": word})


def choice(default: str, *options: str) -> Any:
    """A field that takes one of ``options``."""
    return field(default=default, metadata={"options": options})
