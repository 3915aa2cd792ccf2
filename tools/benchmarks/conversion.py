"""Mode convert: seconds of convert.py with its defaults, without its optional stages, and of fitting by Adam.

Every row is a whole call of convert.py in a separate process, so that a stage is the difference of two rows.
The time to import torch, which no call can go below, is measured too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.installed import run_command, train_run
from experiments.report import table
from experiments.timing import interleaved
from tnnlm.checkpoints.locate import find_checkpoint
from tnnlm.config.schema import ModelConfig
from tnnlm.machine.capabilities import describe_cpu

BARE = ("--no-perplexity", "--no-compile")
CALLS = {
    "conversion alone": BARE,
    "with perplexities": ("--no-compile",),
    "by default": (),
    "conversion alone, auto": (*BARE, "--method", "auto"),
}
"""Options of convert.py by the name of the row."""
FITTED = "fitted by Adam"
IMPORT = "import torch"


def measure_conversion(args: argparse.Namespace, shape: ModelConfig) -> dict[str, Any]:
    """Measure whole calls of convert.py on a run, interleaved."""
    rounds = 1 if args.quick else 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target = args.model or str(train_run(shape, folder))
        checkpoint = str(find_checkpoint(target, Path("runs")))
        cases: dict[str, Callable[[], object]] = {
            what: partial(_convert, checkpoint, folder / what, *options) for what, options in CALLS.items()
        }
        cases[IMPORT] = partial(subprocess.run, [sys.executable, "-c", "import torch"], check=True)
        seconds = interleaved(cases, rounds, warm_up=0)
        if not args.quick:  # a slow baseline, once
            fitted = partial(_convert, checkpoint, folder / FITTED, *BARE, "--method", "gradient")
            seconds |= interleaved({FITTED: fitted}, 1, warm_up=0)
        reported = {what: _reported(folder / what) for what in seconds if what != IMPORT}
    rows = [
        {"name": what, "seconds": median(took), "conversion_seconds": reported.get(what)}
        for what, took in seconds.items()
    ]
    return {"mode": "convert", "cpu": describe_cpu(), "model": target, "results": rows}


def _convert(checkpoint: str, out: Path, *options: str) -> None:
    run_command("convert.py", checkpoint, "--out", str(out), "--force", *options)


def _reported(folder: Path) -> float:
    """Return the seconds of the conversion itself, as convert.py reports them."""
    return float(json.loads((folder / "conversion.json").read_text(encoding="utf-8"))["seconds"])


def conversion_table(result: dict[str, Any]) -> str:
    """Return a table of the seconds of every call, and their ratio to a fit by Adam if that was measured."""
    seconds = {row["name"]: row["seconds"] for row in result["results"]}
    lines = []
    for row in result["results"]:
        line = {"convert.py": row["name"], "seconds": f"{row['seconds']:.1f}"}
        if row["conversion_seconds"] is not None:
            line["of these, the conversion itself"] = f"{row['conversion_seconds']:.2f}"
        if FITTED in seconds:
            line[f"relative to {FITTED}"] = f"{row['seconds'] / seconds[FITTED]:.3f}"
        lines.append(line)
    return table(lines)


def show_conversion(result: dict[str, Any]) -> str:
    """Return the run that was converted, and the table."""
    return f"{result['model']}\n\n{conversion_table(result)}"
