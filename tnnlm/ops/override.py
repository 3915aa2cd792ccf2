"""Choices that are made per device and can be replaced, to compare implementations or estimate on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

_Choice = TypeVar("_Choice")


class Override(Generic[_Choice]):
    """Choice that replaces the usual one within ``with`` blocks, in all threads.

    Blocks can be nested. A context variable would not do, because the backward pass runs in other threads.
    """

    def __init__(self) -> None:
        self._choices: list[_Choice] = []

    @property
    def choice(self) -> _Choice | None:
        """Choice of the innermost block; None outside of all."""
        return self._choices[-1] if self._choices else None

    @contextmanager
    def use(self, choice: _Choice) -> Iterator[None]:
        """Replace the usual choice within a ``with`` block."""
        self._choices.append(choice)
        try:
            yield
        finally:
            self._choices.pop()
