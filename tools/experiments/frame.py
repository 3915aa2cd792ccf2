"""The frame of every experiment: what is measured, saved cell by cell, what it says of the claims, one page.

An experiment is a list of sections. A section declares its grid of cells, how one is measured, and what the
records say: claims, tables and panels, all of them plain data that this module writes down.
"""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from experiments import report
from experiments.report import Column, Panel, Table
from tnnlm import __version__
from tnnlm.errors import UserError
from tnnlm.files import write_text
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.capabilities import describe_cpu
from tnnlm.machine.threads import limit_threads

SIZES = ("tiny", "small", "paper")
"""tiny: for tests; small: two cores, at most 40 minutes; paper: as published, on GPUs"""
CONFIGS = Path(__file__).parents[2] / "configs"
"""experiments run from a clone, as their tool does"""

Record: TypeAlias = dict[str, Any]
"""settings of a cell and what was measured, plain data"""
Files: TypeAlias = tuple[str, ...]
"""texts that take the place of an experiment's own; see --data"""
Bar = Callable[[list[Record]], Iterable[Record]]


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
    claims: Callable[[list[Record]], list[Claim]] = _nothing
    tables: Callable[[list[Record]], list[Table]] = _nothing
    panels: Callable[[list[Record]], list[Panel]] = _nothing


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
    """What NAME.toml beside this module says of an experiment: settings by size, claims, tables and texts.

    Claims and texts hold replacement fields as ``str.format`` has them.
    """

    def __init__(self, name: str) -> None:
        self._data = tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))

    def sizes(self, size: str) -> Record:
        """Settings of one of ``SIZES``, over those of all."""
        settings: dict[str, Record] = self._data["sizes"]
        shared, own = settings.get("all", {}), settings[size]
        both = {key: shared[key] | own[key] for key in shared if isinstance(own.get(key), dict)}
        return shared | own | both

    def claim(self, name: str, holds: bool, **values: Any) -> Claim:
        """A claim with the figures that decide it; a dash where nothing is published."""
        parts = {"published": "-"} | self._data["claims"][name]
        return Claim(**{key: text.format(**values) for key, text in parts.items()}, holds=holds)

    def table(self, name: str, items: Sequence[Record], more: Iterable[str] = (), **values: Any) -> Table:
        """A table with a row per item, whose values its columns show.

        Args:
            name: of the table, and of the text before it, if there is one.
            items: records.
            more: columns in the place of the one called ``*``, titles of values that are text already.
            values: for the texts.
        """
        given = self._data["tables"][name]
        columns: dict[str, Column | str] = {}
        for title, show in given["columns"].items():
            columns |= {key: itemgetter(key) for key in more} if title == "*" else {title: show}
        before, after = (given.get(key, "").strip().format(**values) for key in ("before", "after"))
        return Table(given["heading"], columns, items, before, after)

    def text(self, name: str, **values: Any) -> str:
        """A paragraph or more."""
        text: str = self._data["texts"][name]
        return text.strip().format(**values)


def select(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """Records that have these settings."""
    return [
        record
        for record in records
        if all(key in record and record[key] == value for key, value in wanted.items())
    ]


def grouped(records: Iterable[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records by the values of some settings, None where one is missing, in the order in which they come."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    return found


class ResultStore:
    """OUT/NAME.json: finished cells, to go on from."""

    def __init__(self, experiment: Experiment, size: str, out: Path, again: bool = False) -> None:
        """Open them, or start anew: ``again``, or if there are none.

        Raises:
            UserError: if what is there is damaged, or of another size.
        """
        if out.exists() and not out.is_dir():
            raise UserError(f"{out}: is not a folder; give another --out")
        self.path = out / f"{experiment.name}.json"
        self.data: dict[str, Any] = {"name": experiment.name, "size": size, "seconds": 0.0, "cells": {}}
        self.data["made by"] = _machine()
        if self.path.exists() and not again:
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
                before = (found["name"], found["size"], found["seconds"], found["cells"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path}: damaged; remove it or give another --out") from None
            if before[:2] != (experiment.name, size):
                raise UserError(f"{self.path}: holds size {before[1]}; remove it or give another --out")
            self.data = found

    def missing(self, cells: list[Record]) -> list[Record]:
        """Cells that are not measured yet."""
        return [cell for cell in cells if _key(cell) not in self.data["cells"]]

    def add(self, cell: Record, measured: Record, seconds: float) -> None:
        """Save one."""
        self.data["cells"][_key(cell)] = measured
        self.data["seconds"] += seconds
        self.data["made by"] = _machine()
        self.save()

    def save(self) -> None:
        """Write the file; it appears whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.data, indent=1) + "\n")

    def records(self, cells: list[Record]) -> list[Record]:
        """Settings and figures of every cell, in order."""
        return [cell | self.data["cells"][_key(cell)] for cell in cells]


def reproduce(
    experiment: Experiment, size: str, out: Path, bar: Bar, again: bool = False, data: Files = ()
) -> list[Claim]:
    """Measure what is missing, and write NAME.json, NAME.md, NAME.png and the index of all experiments.

    Args:
        experiment: which.
        size: of ``SIZES``.
        out: folder of results; what it holds of the same experiment and size is kept and gone on from.
        bar: wraps the cells that are left, for progress.
        again: measure all of them; the first one takes the place of what ``out`` holds of this experiment.
        data: texts in the place of the experiment's own.

    Raises:
        UserError: if ``out`` holds something else.
    """
    keep_large_blocks()
    limit_threads()
    store = ResultStore(experiment, size, out, again)
    cells = experiment.grid(size)
    for cell in bar(store.missing(cells)):
        started = time.perf_counter()
        measured = experiment.measure(cell, size, data)
        store.add(cell, measured, time.perf_counter() - started)
    records = store.records(cells)
    claims = experiment.claims(records)
    store.data["verdicts"] = [claim._asdict() for claim in claims]
    store.save()
    write_page(experiment, store.data, claims, records, out)
    write_text(out / "README.md", index(out))
    return claims


def write_page(
    experiment: Experiment, data: Record, claims: list[Claim], records: list[Record], out: Path
) -> None:
    """OUT/NAME.md, and NAME.png if a section draws a panel."""
    seeds = ", ".join(map(str, sorted({record.get("seed", 0) for record in records})))
    parts = [
        f"# {experiment.title}",
        f"```sh long\n{_command(data)}\n```",
        f"{data['seconds'] / 60:.1f} minutes on {data['made by']}; seeds {seeds}.",
        report.table(["claim", "published", "ours", ""], map(_shown, claims)),
    ]
    panels = [panel for section in experiment.sections for panel in section.panels(records)]
    if panels:
        report.figure(panels, out / f"{experiment.name}.png", experiment.columns, experiment.panel_size)
        parts.append(f"![{experiment.title}]({experiment.name}.png)")
    parts += [table.markdown() for section in experiment.sections for table in section.tables(records)]
    write_text(out / f"{experiment.name}.md", "\n\n".join(parts).rstrip() + "\n")


def _shown(claim: Claim) -> list[str]:
    return [claim.claim, claim.published, claim.ours, "holds" if claim.holds else "**does not hold**"]


def index(out: Path) -> str:
    """The one table of all experiments whose results lie in a folder."""
    found = []
    for path in sorted(out.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        found += [(data, Claim(**claim)) for claim in data.get("verdicts", ())]
    rows = [
        [f"[{data['name']}]({data['name']}.md)", *_shown(claim), f"`{_command(data)}`"]
        for data, claim in found
    ]
    return (
        f"# The papers' claims, measured\n\n{sum(claim.holds for _, claim in found)} of {len(found)} hold. "
        "A dash: no figure is published, or the claim is our own. Each experiment has a page with its "
        "tables, its picture, and what was tried where a claim does not hold.\n\n"
        + report.table(["experiment", "claim", "published", "ours", "", "command"], rows)
        + "\n"
    )


def _command(data: Record) -> str:
    # A clone holds the small results already.
    size = " --again" if data["size"] == "small" else f" --size {data['size']}"
    return f"python tools/reproduce.py {data['name']}{size}"


def _key(cell: Record) -> str:
    return json.dumps(cell, sort_keys=True)


def _machine() -> str:
    return f"{describe_cpu()}, tnnlm {__version__}"
