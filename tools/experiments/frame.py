"""The frame of every experiment: a list of sections, and what their declarations in NAME.toml say.

A section declares its grid of cells, how one is measured, and what the records say: claims, tables and
panels, all of them plain data. :mod:`experiments.results` measures an experiment and writes its page.
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
"""tiny: for tests; small: two cores, at most 40 minutes; paper: as published, on GPUs"""
CONFIGS = Path(__file__).parents[2] / "configs"
"""experiments run from a clone, as their tool does"""

Record: TypeAlias = dict[str, Any]
"""settings of a cell and what was measured, plain data"""
Files: TypeAlias = tuple[str, ...]
"""texts that take the place of an experiment's own; see --data"""


class Claim(NamedTuple):
    """One claim held against what was measured."""

    claim: str
    published: str
    """what the paper says, or where it says nothing, a dash"""
    ours: str
    holds: bool


def _nothing(_: Any) -> list[Any]:
    return []


def _not_measured(cell: Record, data: Files) -> Record:
    raise TypeError("a section with a grid needs a measurement")


@dataclass(frozen=True, kw_only=True)
class Section:
    """One kind of measurement and what it shows. What reads records gets those of the whole experiment."""

    grid: Callable[[str], list[Record]] = _nothing
    """size -> settings of every cell, in order; no two of an experiment alike"""
    measure: Callable[[Record, Files], Record] = _not_measured
    claims: Callable[[list[Record]], Iterable[Claim]] = _nothing
    tables: Callable[[list[Record]], Iterable[Table]] = _nothing
    panels: Callable[[list[Record]], Iterable[Panel]] = _nothing


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A set of measurements that belong together."""

    name: str
    """as tools/reproduce.py takes it"""
    title: str
    sections: tuple[Section, ...]
    columns: int = 0
    """panels in a row of the picture; 0: all"""
    panel_size: tuple[float, float] = (5, 4)
    """inches"""

    def grid(self, size: str) -> list[Record]:
        """Settings of every measurement, in order."""
        return [cell for section in self.sections for cell in section.grid(size)]

    def measure(self, cell: Record, size: str, data: Files = ()) -> Record:
        """Measure one, as the section that it belongs to does."""
        section = next(one for one in self.sections if cell in one.grid(size))
        return section.measure(cell, data)

    def claims(self, records: list[Record]) -> list[Claim]:
        """The claims of all sections, each with the figures that decide it."""
        return [claim for section in self.sections for claim in section.claims(records)]


class Declarations:
    """What NAME.toml beside this module says: settings by size, claims, tables, panels, texts.

    Their strings hold replacement fields as ``str.format`` has them.
    """

    def __init__(self, name: str) -> None:
        self._data = report.declared(name)

    def sizes(self, size: str) -> Record:
        """Settings of one of ``SIZES``, over those of all."""
        settings: dict[str, Record] = self._data["sizes"]
        shared, own = settings.get("all", {}), settings[size]
        both = {key: shared[key] | own[key] for key in shared if isinstance(own.get(key), dict)}
        return shared | own | both

    def config(self, size: str, words: Iterable[str] = ()) -> Config:
        """Load what a size declares: its file of configs/, or the defaults; its settings; then ``words``."""
        sizes = self.sizes(size)
        file = CONFIGS / f"{sizes['config']}.yaml" if "config" in sizes else None
        settings = (word.format(stdlib=sysconfig.get_path("stdlib")) for word in sizes["settings"])
        return load_config(file, [*settings, *words])

    def named(self, name: str) -> Record:
        """A table of the file's own: names and what they stand for."""
        found: Record = self._data[name]
        return found

    def claim(self, name: str, holds: bool = True, /, **values: Any) -> Claim:
        """A claim with the figures that decide it; a dash where nothing is published.

        Args:
            name: of the claim.
            holds: whether it does if its values keep the declared limits, ``at_most`` and ``at_least``.
            values: for its texts.
        """
        parts = {"published": "-"} | self._data["claims"][name]
        most, least = parts.pop("at_most", {}), parts.pop("at_least", {})
        holds = holds and all(values[key] <= limit for key, limit in most.items())
        holds = holds and all(values[key] >= limit for key, limit in least.items())
        return Claim(**{key: text.format(**values) for key, text in parts.items()}, holds=holds)

    def table(self, name: str, items: Sequence[Record] = (), **values: Any) -> Table:
        """A table with a row per item.

        Args:
            name: of the table.
            items: records, whose values its columns show, and under ``*`` texts by title that stand in the
                place of the column of that name; texts by title themselves if no columns are declared.
            values: for its heading and the texts around it; at ``size`` small what was tried follows.
        """
        given = self._data["tables"][name]
        columns: dict[str, str] = given.get("columns", {})
        rows = [_row(columns, item) for item in items] if columns else items
        heading, before = (given.get(key, "").strip().format(**values) for key in ("heading", "before"))
        below = ("after", "tried") if values.get("size") == "small" else ("after",)
        after = "\n\n".join(given[key].strip().format(**values) for key in below if key in given)
        return Table(heading, rows, before, after)

    def panel(self, name: str, lines: Sequence[Line], values: Record | None = None, **more: Any) -> Panel:
        """A panel of the declared title and axes, its texts showing ``values``; ``more`` goes to it."""
        given = self._data["panels"][name]
        axes: Record = {
            key: text.format(**values or {}) if isinstance(text, str) else text for key, text in given.items()
        }
        return Panel(axes.pop("title"), lines, base=axes.pop("base", 10), axes=axes, **more)

    def text(self, name: str, **values: Any) -> str:
        """A paragraph or more."""
        text: str = self._data["texts"][name]
        return text.strip().format(**values)


def _row(columns: dict[str, str], item: Record) -> dict[str, str]:
    row: dict[str, str] = {}
    for title, show in columns.items():
        row |= item["*"] if title == "*" else {title: show.format_map(item)}
    return row


def select(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """Records that have these settings."""
    return [
        record
        for record in records
        if all(key in record and record[key] == value for key, value in wanted.items())
    ]


def grouped(records: Iterable[Record], key: str) -> dict[Any, list[Record]]:
    """Records by the value of a setting, None where it is missing, in the order in which they come."""
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault(record.get(key), []).append(record)
    return found


def mean_of(records: Iterable[Record], key: str) -> float:
    """The mean of a figure."""
    return fmean(record[key] for record in records)
