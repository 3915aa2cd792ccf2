"""Optional progress bars for conversion, which shows none by default."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Progress = Callable[[Sequence[Any], str], Iterable[Any]]
"""Callable (items, title) -> items that shows progress while they are consumed, such as ``tqdm``."""


def silent(items: Sequence[Any], title: str) -> Iterable[Any]:
    """Return the items without showing progress."""
    return items
