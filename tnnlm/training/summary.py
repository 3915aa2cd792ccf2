"""Outputs at the end of a run: summary.json, loss.png and a table in the terminal."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tnnlm.checkpoints.locate import BEST, CONVERTED
from tnnlm.data.report import DataReport
from tnnlm.errors import CheckpointError, command
from tnnlm.files import atomic_file, write_text
from tnnlm.reading import read_json
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.loggers.names import BY_COLUMN, Place, metrics_at
from tnnlm.training.tasks import ValidationTask

_LOG = logging.getLogger("tnnlm")


def write_summary(
    run: Path,
    *,
    task: type[ValidationTask],
    params: int,
    frozen: int,
    initial: str | None,
    data: DataReport,
    tokens_seen: int,
    train_seconds: float,
    tested: dict[str, float],
) -> dict[str, Any]:
    """Write summary.json from the last values in metrics.csv and those given by the trainer.

    Args:
        run: Folder of the run.
        task: Task of the run, which determines the metrics.
        params: Number of trainable parameters.
        frozen: Number of parameters that were not trained.
        initial: Weights that the run started from; None for random ones.
        data: Report of the data.
        tokens_seen: Number of training tokens.
        train_seconds: Seconds of training and validation.
        tested: Metrics of the best checkpoint on the test split; empty for tasks without one. If given, the
            summary also has the best validation value of the monitored metric.

    Returns:
        Content of summary.json.
    """
    kept = ["train/loss", *(name for name in task.columns() if name != "val/loss" or not task.converts)]
    rows = read_metrics(run / "metrics.csv")
    summary: dict[str, Any] = {}
    for row in rows:
        summary.update({key: float(row[key]) for key in kept if row.get(key)})
    if tested:
        best = {"min": min, "max": max}[task.mode]
        values = [float(row[task.monitor]) for row in rows if row.get(task.monitor)]
        summary |= {f"{task.monitor}_best": best(values), **tested} if values else tested
    speeds = sorted(float(r["train/tokens_per_second"]) for r in rows if r.get("train/tokens_per_second"))
    summary |= {
        "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
        "params": params,
        "params_frozen": frozen,
        "init_weights": initial,
        "tokens_seen": tokens_seen,
        "train_seconds": round(train_seconds, 1),
        "protocol": data.protocol,
        "data": data.to_dict(),
    }
    write_text(run / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def read_summary(run: Path) -> dict[str, Any]:
    """Return the content of summary.json; empty if it does not exist, or is damaged, which is logged."""
    path = run / "summary.json"
    if not os.path.lexists(path):
        return {}
    try:
        return read_json(path, "")
    except CheckpointError as error:
        _LOG.warning("%s; the end of the run is computed again", error.reason)
        return {}


def plot_loss(run: Path) -> None:
    """Plot training and validation losses against the optimizer step to loss.png."""
    from matplotlib.figure import Figure

    rows = read_metrics(run / "metrics.csv")

    def curve(column: str) -> dict[int, float]:
        return {int(row["step"]): float(row[column]) for row in rows if row.get(column)}

    train, val = curve("train/loss"), curve("val/loss")
    bits, recurrent = curve("val/bpb"), curve("val/ppl_recurrent")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    if train:
        axis.plot(list(train), list(train.values()), color="#9ecae1", linewidth=1, label="training")
    if val:
        label = "validation, parallel" if recurrent else "validation"
        axis.plot(list(val), list(val.values()), "o-", color="#08519c", label=label)
        step, loss = list(val.items())[-1]
        reached = f"{bits[step]:.3f} bits per byte" if bits else f"{loss:.3f}"
        axis.annotate(reached, (step, loss), xytext=(4, -22), textcoords="offset points", ha="right")
    if recurrent:
        losses = [math.log(value) for value in recurrent.values()]
        label = "validation, recurrent"
        axis.plot(list(recurrent), losses, "x", color="#e6550d", markersize=9, label=label)
    unit = "sequence" if curve("val/accuracy") else "token"
    axis.set(xlabel="optimizer step", ylabel=f"nats per {unit}")
    axis.set_title(run.name, parse_math=False)
    axis.grid(alpha=0.3)
    axis.margins(y=0.15)  # The annotation is below the last point, which is the lowest in most runs.
    if train or val:
        axis.legend()
    with atomic_file(run / "loss.png") as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def show_summary(
    run: Path,
    summary: dict[str, Any],
    task: type[ValidationTask],
    prompt: str | None,
    console: Console,
    recipe: Sequence[str] = (),
) -> None:
    """Print the table of metrics, the paths of the outputs and the next command.

    Args:
        run: Folder of the run.
        summary: Content of summary.json.
        task: Task of the run.
        prompt: Prompt of the command that generates text; None for a chat.
        console: Console to print to.
        recipe: Options of the conversion that suit the kernel.
    """
    console.print(_parallel_and_recurrent(run, summary) if task.converts else _values(run, summary, task))
    speed = summary["tokens_per_second"]
    samples = " samples.txt," if task.converts else ""
    parameters = f"{summary['params']:,} parameters"
    if summary["params_frozen"]:
        parameters = f"{parameters} and {summary['params_frozen']:,} frozen ones"
    again = ["--force"] if (run / CONVERTED).exists() else []  # converted before the run was resumed
    asked = ["--chat"] if prompt is None else ["--prompt", prompt]
    lines = [
        f"{parameters}, {summary['tokens_seen']:,} tokens in "
        f"{summary['train_seconds']:.0f} s with validation"
        + (f", {speed:,.0f} tokens/s without it (median)" if speed else ""),
        f"in {run}/: {BEST}, summary.json, metrics.csv,{samples} loss.png",
        f"next: {command('convert', run, *recipe, *again)} && {command('generate', '--model', run, *asked)}"
        if task.converts
        else f"next, in Python: tnnlm.checkpoints.training.load_encoder(Path({str(run / BEST)!r}))",
    ]
    for line in lines:
        console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _title(run: Path) -> Text:
    """Return the title of a table, in which no part of the name is markup."""
    return Text(f"run {run.name}", style="table.title")


def _parallel_and_recurrent(run: Path, summary: dict[str, Any]) -> Table:
    """Return a table of the last validation in parallel and in recurrent form."""
    table = Table(title=_title(run))
    for column in ("validation", "parallel (FFT)", "recurrent", "relative gap"):
        table.add_column(column, justify="left" if column == "validation" else "right")
    gap = summary.get("val/ppl_gap")
    gaps = {"val/ppl": "-" if gap is None else f"{gap:+.1e}", "val/bpb": ""}
    for name, shown in gaps.items():
        values = (_shown(summary.get(column)) for column in (name, f"{name}_recurrent"))
        table.add_row(BY_COLUMN[name].label, *values, shown)
    if summary.get("protocol") == "fairseq":
        name = "val/ppl_word"
        table.add_row(BY_COLUMN[name].label, _shown(summary.get(name)), "", "")
        table.caption = "protocol: fairseq"
    return table


def _values(run: Path, summary: dict[str, Any], task: type[ValidationTask]) -> Table:
    """Return a table of the last validation's metrics and of test metrics."""
    table = Table("validation", "", title=_title(run))
    for name in task.columns():
        table.add_row(BY_COLUMN[name].label, _shown(summary.get(name)))
    for metric in metrics_at(Place.SUMMARY):
        if metric.column in summary:
            table.add_row(metric.label, _shown(summary[metric.column]))
    return table


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
