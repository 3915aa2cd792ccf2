"""What an experiment is: cells to be measured, and what they say of the claims it is about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

SIZES = ("tiny", "small", "paper")
"""tiny: for tests; small: two cores, at most 40 minutes; paper: as published, on GPUs"""

Row: TypeAlias = dict[str, Any]
"""settings of a cell and what was measured, plain data"""


class Verdict(NamedTuple):
    """One claim held against what was measured."""

    claim: str
    published: str
    """what the paper says, or where it says nothing, a dash"""
    ours: str
    holds: bool


class Experiment(ABC):
    """A set of measurements that belong together. Every cell is measured and saved on its own."""

    name: ClassVar[str]
    """as tools/reproduce.py takes it"""
    title: ClassVar[str]
    data: tuple[str, ...] = ()
    """files that take the place of an experiment's own text; see --data"""

    @abstractmethod
    def cells(self, size: str) -> list[Row]:
        """Settings of every measurement, in order; no two alike."""

    @abstractmethod
    def measure(self, cell: Row) -> Row:
        """Measure one."""

    @abstractmethod
    def verdicts(self, rows: list[Row]) -> list[Verdict]:
        """The claims, each with the figures that decide it."""

    @abstractmethod
    def tables(self, rows: list[Row]) -> str:
        """Markdown."""

    @abstractmethod
    def plot(self, rows: list[Row], path: Path) -> None:
        """A picture, as PNG."""
