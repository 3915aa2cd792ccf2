"""Run an experiment: measure what is missing, saved cell by cell, then write its table, text and picture."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments.experiment import Experiment, Row, Verdict
from tnnlm import __version__
from tnnlm.errors import UserError
from tnnlm.files import write_text
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.capabilities import describe_cpu
from tnnlm.machine.threads import limit_threads

Bar = Callable[[list[Row]], Iterable[Row]]


class Results:
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

    def missing(self, cells: list[Row]) -> list[Row]:
        """Cells that are not measured yet."""
        return [cell for cell in cells if _key(cell) not in self.data["cells"]]

    def add(self, cell: Row, measured: Row, seconds: float) -> None:
        """Save one."""
        self.data["cells"][_key(cell)] = measured
        self.data["seconds"] += seconds
        self.data["made by"] = _machine()
        self.save()

    def save(self) -> None:
        """Write the file; it appears whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.data, indent=1) + "\n")

    def rows(self, cells: list[Row]) -> list[Row]:
        """Settings and figures of every cell, in order."""
        return [cell | self.data["cells"][_key(cell)] for cell in cells]


def reproduce(
    experiment: Experiment, size: str, out: Path, bar: Bar, again: bool = False, data: tuple[str, ...] = ()
) -> list[Verdict]:
    """Measure what is missing, and write NAME.json, NAME.md, NAME.png and the index of all experiments.

    Args:
        experiment: which.
        size: of ``SIZES``.
        out: folder of results; what it holds of the same experiment and size is kept and gone on from.
        bar: wraps the cells that are left, for progress.
        again: measure all of them; the first one takes the place of what ``out`` holds of this experiment.

    Raises:
        UserError: if ``out`` holds something else.
    """
    experiment.data = data or experiment.data
    keep_large_blocks()
    limit_threads()
    results = Results(experiment, size, out, again)
    cells = experiment.cells(size)
    for cell in bar(results.missing(cells)):
        started = time.perf_counter()
        measured = experiment.measure(cell)
        results.add(cell, measured, time.perf_counter() - started)
    rows = results.rows(cells)
    verdicts = experiment.verdicts(rows)
    results.data["verdicts"] = [verdict._asdict() for verdict in verdicts]
    results.save()
    experiment.plot(rows, out / f"{experiment.name}.png")
    write_text(out / f"{experiment.name}.md", _page(experiment, results.data, verdicts, rows))
    write_text(out / "README.md", index(out))
    return verdicts


def verdict_table(verdicts: Iterable[Verdict]) -> str:
    """Claims as Markdown."""
    lines = ["| claim | published | ours | |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {_claim(verdict)} |" for verdict in verdicts])


def _claim(verdict: Verdict) -> str:
    mark = "holds" if verdict.holds else "**does not hold**"
    return f"{verdict.claim} | {verdict.published} | {verdict.ours} | {mark}"


def index(out: Path) -> str:
    """The one table of all experiments whose results lie in a folder."""
    found = []
    for path in sorted(out.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if "verdicts" in data:
            found.append((data, [Verdict(**verdict) for verdict in data["verdicts"]]))
    hold = [verdict.holds for _, verdicts in found for verdict in verdicts]
    lines = [
        "# The papers' claims, measured",
        "",
        f"{sum(hold)} of {len(hold)} hold. A dash: no figure is published, or the claim is our own. Each "
        "experiment has a page with its tables, its picture, and what was tried where a claim does not hold.",
        "",
        "| experiment | claim | published | ours | | command |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| [{data['name']}]({data['name']}.md) | {_claim(verdict)} | `{_command(data)}` |"
        for data, verdicts in found
        for verdict in verdicts
    ]
    return "\n".join(lines) + "\n"


def _page(experiment: Experiment, data: Row, verdicts: list[Verdict], rows: list[Row]) -> str:
    seeds = ", ".join(map(str, sorted({row.get("seed", 0) for row in rows})))
    head = (
        f"# {experiment.title}\n\n```sh long\n{_command(data)}\n```\n\n"
        f"{data['seconds'] / 60:.1f} minutes on {data['made by']}; seeds {seeds}."
    )
    picture = f"![{experiment.title}]({experiment.name}.png)"
    return "\n\n".join([head, verdict_table(verdicts), picture, experiment.tables(rows)]).rstrip() + "\n"


def _command(data: Row) -> str:
    # A clone holds the small results already.
    size = " --again" if data["size"] == "small" else f" --size {data['size']}"
    return f"python tools/reproduce.py {data['name']}{size}"


def _key(cell: Row) -> str:
    return json.dumps(cell, sort_keys=True)


def _machine() -> str:
    return f"{describe_cpu()}, tnnlm {__version__}"
