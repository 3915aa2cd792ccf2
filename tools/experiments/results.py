"""Results of an experiment, saved cell by cell, and its page: claims, tables and a picture."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments import report
from experiments.frame import Claim, Experiment, Files, Record
from tnnlm import __version__
from tnnlm.errors import UserError
from tnnlm.files import write_text
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.capabilities import describe_cpu
from tnnlm.machine.threads import limit_threads

Bar = Callable[[list[Record]], Iterable[Record]]


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
        report.table([_shown(claim) for claim in claims]),
    ]
    panels = [panel for section in experiment.sections for panel in section.panels(records)]
    if panels:
        report.figure(panels, out / f"{experiment.name}.png", experiment.columns, experiment.panel_size)
        parts.append(f"![{experiment.title}]({experiment.name}.png)")
    parts += [table.markdown() for section in experiment.sections for table in section.tables(records)]
    write_text(out / f"{experiment.name}.md", "\n\n".join(parts).rstrip() + "\n")


def _shown(claim: Claim) -> dict[str, str]:
    said = {"claim": claim.claim, "published": claim.published, "ours": claim.ours}
    return said | {"": "holds" if claim.holds else "**does not hold**"}


def index(out: Path) -> str:
    """The one table of all experiments whose results lie in a folder."""
    found = []
    for path in sorted(out.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        found += [(data, Claim(**claim)) for claim in data.get("verdicts", ())]
    rows = [
        {
            "experiment": f"[{data['name']}]({data['name']}.md)",
            **_shown(claim),
            "command": f"`{_command(data)}`",
        }
        for data, claim in found
    ]
    return (
        f"# The papers' claims, measured\n\n{sum(claim.holds for _, claim in found)} of {len(found)} hold. "
        "A dash: no figure is published, or the claim is our own. Each experiment has a page with its "
        "tables, its picture, and what was tried where a claim does not hold.\n\n" + report.table(rows) + "\n"
    )


def _command(data: Record) -> str:
    # A clone holds the small results already.
    size = " --again" if data["size"] == "small" else f" --size {data['size']}"
    return f"python tools/reproduce.py {data['name']}{size}"


def _key(cell: Record) -> str:
    return json.dumps(cell, sort_keys=True)


def _machine() -> str:
    return f"{describe_cpu()}, tnnlm {__version__}"
