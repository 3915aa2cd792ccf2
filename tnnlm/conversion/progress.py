"""Progress bars, for those who want them: conversion itself draws none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Progress = Callable[[Sequence[Any], str], Iterable[Any]]
"""(items, title) -> the items, shown as they are used; ``tqdm`` with its title makes one"""


def silent(items: Sequence[Any], title: str) -> Iterable[Any]:
    """Show nothing."""
    return items
