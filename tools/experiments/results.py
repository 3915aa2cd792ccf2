"""Results of an experiment, saved after every cell, and its page of claims, tables and a figure."""

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
from tnnlm.files import only_process, write_text
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.capabilities import describe_cpu
from tnnlm.machine.threads import limit_threads

Bar = Callable[[list[Record]], Iterable[Record]]


class ResultStore:
    """Finished cells of an experiment in OUT/NAME.json, from which an interrupted run resumes."""

    def __init__(self, experiment: Experiment, size: str, out: Path, again: bool = False) -> None:
        """Open the results, or start from scratch if ``again`` is set or there are none.

        Raises:
            UserError: If the file is corrupt or holds results of another size.
        """
        self.path = out / f"{experiment.name}.json"
        self.data: dict[str, Any] = {"name": experiment.name, "size": size, "seconds": 0.0, "cells": {}}
        self.data["made by"] = _machine()
        if self.path.exists() and not again:
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
                before = (found["name"], found["size"], found["seconds"], found["cells"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path}: corrupt; remove it or change --out") from None
            if before[:2] != (experiment.name, size):
                raise UserError(f"{self.path}: holds size {before[1]}; remove it or change --out")
            self.data = found

    def missing(self, cells: list[Record]) -> list[Record]:
        """Return the cells that are not measured yet."""
        return [cell for cell in cells if _key(cell) not in self.data["cells"]]

    def add(self, cell: Record, measured: Record, seconds: float) -> None:
        """Add the result of one cell, which took ``seconds``, and save the file."""
        self.data["cells"][_key(cell)] = measured
        self.data["seconds"] += seconds
        self.data["made by"] = _machine()
        self.save()

    def save(self) -> None:
        """Write the file atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.data, indent=1) + "\n")

    def records(self, cells: list[Record]) -> list[Record]:
        """Return the settings and results of every cell, in order."""
        return [cell | self.data["cells"][_key(cell)] for cell in cells]


def reproduce(
    experiment: Experiment, size: str, out: Path, bar: Bar, again: bool = False, data: Files = ()
) -> list[Claim]:
    """Measure the missing cells, and write NAME.json, NAME.md, NAME.png and the index of all experiments.

    Args:
        experiment: Experiment to run.
        size: One of ``SIZES``.
        out: Folder of results; a run resumes from results of the same experiment and size in it.
        bar: Wraps the cells that remain to be measured, to show progress.
        again: Measure all cells; the first one overwrites the results of this experiment in ``out``.
        data: Text files that replace the data set of the experiment.

    Raises:
        UserError: If ``out`` holds other results, or another process measures the same experiment.
    """
    keep_large_blocks()
    limit_threads()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: not a folder; change --out")
    path = out / f"{experiment.name}.json"
    refusal = UserError(f"{path}: another process measures this experiment", "wait, or choose another --out")
    with only_process(path, refusal):
        return _measure(experiment, size, out, bar, again, data)


def _measure(experiment: Experiment, size: str, out: Path, bar: Bar, again: bool, data: Files) -> list[Claim]:
    """Measure the missing cells, and write all files of the experiment."""
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
    """Write OUT/NAME.md, and NAME.png if a section has a panel."""
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
    verdict = "holds" if claim.holds else "**does not hold**"
    return {"claim": claim.claim, "published": claim.published, "measured": claim.ours, "": verdict}


def index(out: Path) -> str:
    """Return the page with the claims of all experiments whose results are in a folder."""
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
    held = sum(claim.holds for _, claim in found)
    intro = report.declared("report")["index"].format(held=held, total=len(found))
    return f"{intro}\n\n{report.table(rows)}\n"


def _command(data: Record) -> str:
    # A clone contains the results of size small, so that only --again measures them.
    size = " --again" if data["size"] == "small" else f" --size {data['size']}"
    return f"python tools/reproduce.py {data['name']}{size}"


def _key(cell: Record) -> str:
    return json.dumps(cell, sort_keys=True)


def _machine() -> str:
    return f"{describe_cpu()}, tnnlm {__version__}"
