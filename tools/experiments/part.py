"""A part of an experiment too varied for one file: cells, measurement and report of one kind of task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from experiments.experiment import Row, Verdict


class Part(ABC):
    """One kind of task: its cells, and what they say."""

    name: ClassVar[str]
    """in the cells, as ``part``"""
    panels: ClassVar[int] = 1
    """of the picture"""

    @abstractmethod
    def cells(self, size: str) -> list[Row]:
        """Settings of every measurement, without ``part``; each has its ``size``."""

    @abstractmethod
    def measure(self, cell: Row, data: tuple[str, ...]) -> Row:
        """Measure one; ``data``: as for :class:`Experiment`."""

    @abstractmethod
    def verdicts(self, rows: list[Row]) -> list[Verdict]:
        """Of the rows of this part."""

    @abstractmethod
    def tables(self, rows: list[Row]) -> str:
        """Markdown, from a second-level heading on."""

    @abstractmethod
    def draw(self, axes: list[Any], rows: list[Row]) -> None:
        """Fill its panels."""
