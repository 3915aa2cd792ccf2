"""Base classes of all experiments: ``Experiment``, its sections, and the declarations in NAME.toml.

A section defines a grid of cells, measures one cell, and turns the records into claims, tables and panels,
all of them plain data. :mod:`experiments.results` measures an experiment and writes its page.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeAlias

from experiments import report
from experiments.report import Line, Panel, Table
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config

SIZES = ("tiny", "small", "paper")
"""Sizes of an experiment: tiny for tests, small for 40 minutes on two cores, paper as published, for GPUs."""
CONFIGS = Path(__file__).parents[2] / "configs"
"""Folder of configurations in the clone that the experiments run from."""

Record: TypeAlias = dict[str, Any]
"""Settings of a cell and the values measured for it, as plain data."""
Files: TypeAlias = tuple[str, ...]
"""Text files that replace the data set of an experiment; see --data."""


class Claim(NamedTuple):
    """A claim, the published result and the measured one."""

    claim: str
    published: str
    """Result of the paper; a dash if it has none."""
    ours: str
    holds: bool


def _nothing(_: Any) -> list[Any]:
    return []


def _not_measured(cell: Record, data: Files) -> Record:
    raise TypeError("a section with a grid needs a measurement")


@dataclass(frozen=True, kw_only=True)
class Section:
    """One kind of measurement, with the claims, tables and panels made of the experiment's records."""

    grid: Callable[[str], list[Record]] = _nothing
    """Return the settings of every cell of a size, in order. All cells of an experiment differ."""
    measure: Callable[[Record, Files], Record] = _not_measured
    claims: Callable[[list[Record]], Iterable[Claim]] = _nothing
    tables: Callable[[list[Record]], Iterable[Table]] = _nothing
    panels: Callable[[list[Record]], Iterable[Panel]] = _nothing


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A set of related measurements that share a page."""

    name: str
    """Name on the command line of tools/reproduce.py."""
    title: str
    sections: tuple[Section, ...]
    columns: int = 0
    """Panels per row of the figure; 0: all in one row."""
    panel_size: tuple[float, float] = (5, 4)
    """Width and height of a panel, in inches."""

    def grid(self, size: str) -> list[Record]:
        """Return the settings of every cell, in order."""
        return [cell for section in self.sections for cell in section.grid(size)]

    def measure(self, cell: Record, size: str, data: Files = ()) -> Record:
        """Measure one cell with the section that defines it."""
        section = next(one for one in self.sections if cell in one.grid(size))
        return section.measure(cell, data)

    def claims(self, records: list[Record]) -> list[Claim]:
        """Return the claims of all sections, each with the figures that support or refute it."""
        return [claim for section in self.sections for claim in section.claims(records)]


class Declarations:
    """Contents of NAME.toml in this folder: settings by size, claims, tables, panels and paragraphs.

    Strings are templates for ``str.format``.
    """

    def __init__(self, name: str) -> None:
        self._data = report.declared(name)

    def sizes(self, size: str) -> Record:
        """Return the settings of one of ``SIZES``, which override those shared by all sizes."""
        settings: dict[str, Record] = self._data["sizes"]
        shared, own = settings.get("all", {}), settings[size]
        both = {key: shared[key] | own[key] for key in shared if isinstance(own.get(key), dict)}
        return shared | own | both

    def config(self, size: str, words: Iterable[str] = ()) -> Config:
        """Load the declared file of a size, if any, overridden by the declared settings and by ``words``."""
        sizes = self.sizes(size)
        file = CONFIGS / f"{sizes['config']}.yaml" if "config" in sizes else None
        settings = (word.format(stdlib=sysconfig.get_path("stdlib")) for word in sizes["settings"])
        return load_config(file, [*settings, *words])

    def named(self, name: str) -> Record:
        """Return a top-level table of the file, for example the labels of the models."""
        found: Record = self._data[name]
        return found

    def claim(self, name: str, holds: bool = True, /, **values: Any) -> Claim:
        """Return a claim with the figures that support or refute it; a dash if no result is published.

        Args:
            name: Name of the claim.
            holds: False if the claim fails for reasons other than the limits ``at_most`` and ``at_least``.
            values: Values of its templates, and those that the declared limits apply to.
        """
        parts = {"published": "-"} | self._data["claims"][name]
        most, least = parts.pop("at_most", {}), parts.pop("at_least", {})
        holds = holds and all(values[key] <= limit for key, limit in most.items())
        holds = holds and all(values[key] >= limit for key, limit in least.items())
        return Claim(**{key: text.format(**values) for key, text in parts.items()}, holds=holds)

    def table(self, name: str, items: Sequence[Record] = (), **values: Any) -> Table:
        """Return a table with one row per item.

        Args:
            name: Name of the table.
            items: Records that fill the templates of the declared columns; the cells under ``*`` replace the
                column of that name. Without declared columns, the cells of each row by column title.
            values: Values of the heading and the paragraphs. If ``size`` is small, the paragraph ``tried``
                is added.
        """
        given = self._data["tables"][name]
        columns: dict[str, str] = given.get("columns", {})
        rows = [_row(columns, item) for item in items] if columns else items
        heading, before = (given.get(key, "").strip().format(**values) for key in ("heading", "before"))
        below = ("after", "tried") if values.get("size") == "small" else ("after",)
        after = "\n\n".join(given[key].strip().format(**values) for key in below if key in given)
        return Table(heading, rows, before, after)

    def panel(self, name: str, lines: Sequence[Line], values: Record | None = None, **more: Any) -> Panel:
        """Return a panel, its declared title and axes filled with ``values``; ``more`` goes to ``Panel``."""
        given = self._data["panels"][name]
        axes: Record = {
            key: text.format(**values or {}) if isinstance(text, str) else text for key, text in given.items()
        }
        return Panel(axes.pop("title"), lines, base=axes.pop("base", 10), axes=axes, **more)

    def text(self, name: str, **values: Any) -> str:
        """Return one or more paragraphs, filled with ``values``."""
        text: str = self._data["texts"][name]
        return text.strip().format(**values)


def _row(columns: dict[str, str], item: Record) -> dict[str, str]:
    row: dict[str, str] = {}
    for title, show in columns.items():
        row |= item["*"] if title == "*" else {title: show.format_map(item)}
    return row


def select(records: Iterable[Record], **settings: Any) -> list[Record]:
    """Return the records that have these settings."""
    return [
        record
        for record in records
        if all(key in record and record[key] == value for key, value in settings.items())
    ]


def grouped(records: Iterable[Record], key: str) -> dict[Any, list[Record]]:
    """Group records by the value of a setting, None if it is missing, in order of first occurrence."""
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault(record.get(key), []).append(record)
    return found


def mean_of(records: Iterable[Record], key: str) -> float:
    """Return the mean of one value over the records."""
    return fmean(record[key] for record in records)
