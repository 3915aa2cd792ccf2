#!/usr/bin/env python
"""Plot the metrics of a run, finished or not: loss, perplexity, speed, gradient norm, length of the kernels.

Several runs share one figure. The final metrics are printed as a table with a column per run.

Examples:
  python tools/plot_run.py demo                      # runs/demo -> runs/demo/run.png
  python tools/plot_run.py demo --out demo.png
  python tools/plot_run.py runs/demo runs/rtf_demo --out compared.png
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from tnnlm.errors import CheckpointError, OneLineParser, run_script
from tnnlm.files import atomic_file
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.loggers.names import BY_COLUMN, LENGTH, ORDER, Place, columns_at, metrics_at
from tnnlm.training.throughput import ENERGY

_TRAIN, _VAL, _OTHER = "#6baed6", "#08519c", "#e6550d"


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Run: a folder, or a name under --runs-dir.")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.png",
        help="Image to write. (default: RUN/run.png; for several runs: runs.png)",
    )
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="Folder of runs. (default: runs)"
    )
    return parser.parse_args()


def main() -> int:
    """Write the figure and print the table."""
    args = parse()
    folders = [folder_of(name, args.runs_dir) for name in args.runs]
    runs = [read_run(folder) for folder in folders]
    out = args.out or (folders[0] / "run.png" if len(folders) == 1 else Path("runs.png"))
    plot_runs(runs, out)
    table = Table("final value", *(Column(Text(run.name)) for run in runs))
    figures = [final_figures(run) for run in runs]
    for metric in metrics_at(Place.TABLE):
        shown = [of_run[metric.column] for of_run in figures]
        if set(shown) != {"-"}:  # each task logs different metrics
            table.add_row(metric.label, *shown)
    Console(markup=False, emoji=False).print(table)  # names of runs are no markup
    print(f"plot: {out}")
    return 0


def folder_of(name: str, runs_dir: Path) -> Path:
    """Return the folder of a run, given by path or name; it may not have a checkpoint yet.

    Raises:
        CheckpointError: If neither has a metrics.csv.
    """
    for folder in (Path(name), runs_dir / name):
        if (folder / "metrics.csv").is_file():
            return folder
    raise CheckpointError(
        f"{name}: no such run with a metrics.csv, neither as a folder nor under {runs_dir}/"
    )


class Curves(NamedTuple):
    """Metrics of a run."""

    name: str
    values: dict[str, tuple[list[int], list[float]]]
    """Logged steps and values by the name of the metric."""

    def of(self, key: str) -> tuple[list[int], list[float]]:
        """Return steps and values of a metric; empty lists if it was never logged."""
        return self.values.get(key, ([], []))

    def layers(self, prefix: str) -> list[str]:
        """Return the names of the metrics ``prefix/LAYER``, in the order of the layers."""
        found = [key for key in self.values if key.startswith(f"{prefix}/")]
        return sorted(found, key=lambda key: int(key.rpartition("/")[2]))


def read_run(run: Path) -> Curves:
    """Read the finite values of a run's metrics.csv.

    Raises:
        CheckpointError: If there are none.
    """
    path = run / "metrics.csv"
    values: dict[str, tuple[list[int], list[float]]] = {}
    for row in read_metrics(path):
        for key, cell in row.items():
            if key != "step" and cell and math.isfinite(float(cell)):
                steps, numbers = values.setdefault(key, ([], []))
                steps.append(int(row["step"]))
                numbers.append(float(cell))
    if not values:
        raise CheckpointError(f"{path}: has no metrics yet, or is not in the folder of a run")
    return Curves(run.name, values)


def final_figures(run: Curves) -> dict[str, str]:
    """Return the cells of the table: last logged values, median speed, and ranges over layers."""
    figures = {"step": f"{max(steps[-1] for steps, _ in run.values.values()):,}"}
    for key in columns_at(Place.TABLE):
        _, values = run.of(key)
        if key in (LENGTH, ORDER):
            last = [run.of(layer)[1][-1] for layer in run.layers(key)]
            figures[key] = f"{min(last):.0f} to {max(last):.0f}" if last else "-"
        elif key == "train/tokens_per_second" and values:
            figures[key] = f"{sorted(values)[len(values) // 2]:,.0f}"
        elif key != "step":
            figures[key] = f"{values[-1]:.4f}" if values else "-"
    return figures


def plot_runs(runs: Sequence[Curves], path: Path) -> None:
    """Plot one run with all its metrics, or several in shared axes; write the file atomically."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure = _plot_one(runs[0], plt) if len(runs) == 1 else _plot_several(runs, plt)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def _plain(name: str) -> str:
    """Return a name in which dollar signs don't enclose formulas."""
    return name.replace("$", r"\$")


def _plot_one(run: Curves, plt: Any) -> Any:
    figure, axes = plt.subplots(4, 2, figsize=(13, 15), layout="constrained")
    figure.suptitle(_plain(run.name), fontsize=14)
    (loss, ppl), (speed, wait), (norm, rate), (length, order) = axes
    _line(loss, run, "train/loss", "training", color=_TRAIN, linewidth=1)
    _line(loss, run, "val/loss", "validation", "o-", color=_VAL, markersize=4)
    classifies = "val/accuracy" in run.values
    _finish(loss, "Loss", "nats per sequence" if classifies else "nats per token")
    _line(ppl, run, "val/ppl", "parallel (FFT)", "o-", color=_VAL, markersize=4)
    _line(ppl, run, "val/ppl_recurrent", "recurrent", "x--", color=_OTHER, markersize=7)
    _line(ppl, run, "val/ppl_masked", "masked tokens", "o-", color=_VAL, markersize=4)
    _line(ppl, run, "val/accuracy", "whole sequences", "o-", color=_VAL, markersize=4)
    of_both = ", parallel and recurrent" if "val/ppl_recurrent" in run.values else ""
    if classifies:
        _finish(ppl, "Validation accuracy", "accuracy")
    else:
        _finish(ppl, f"Validation perplexity{of_both}", "perplexity", log=True)
    _line(speed, run, "train/tokens_per_second", "tokens/s", color=_VAL)
    speed.set_ylim(bottom=0)
    _finish(speed, "Throughput", "tokens per second")
    speed.yaxis.set_major_formatter("{x:,.0f}")
    other = speed.twinx()
    _line(other, run, "train/tflops", "TFLOP/s", color=_OTHER, linewidth=0)
    other.set_ylim(bottom=0)
    other.set_ylabel("model TFLOP/s per device")
    _line(wait, run, "train/step_seconds", "step", color=_VAL)
    _line(wait, run, "train/data_seconds", "of which waiting for data", color=_OTHER)
    _finish(wait, "Time per optimizer step", "seconds", log=True)
    _line(norm, run, "train/grad_norm", "before clipping", color=_VAL, linewidth=1)
    _finish(norm, "Gradient norm", "norm, mean since the previous row", log=True)
    _line(rate, run, "train/lr", "learning rate", color=_VAL)
    _finish(rate, "Learning rate", "learning rate")
    _layers(length, run, LENGTH, plt)
    _finish(length, f"Effective length: lags with {ENERGY:.0%} of a layer's energy", "lags", columns=2)
    _layers(order, run, ORDER, plt)
    _finish(order, "Hankel order: state size per channel", "order", columns=2)
    return figure


def _plot_several(runs: Sequence[Curves], plt: Any) -> Any:
    figure, axes = plt.subplots(3, 2, figsize=(13, 12), layout="constrained")
    accuracy = any("val/accuracy" in run.values for run in runs)
    scored = "val/accuracy" if accuracy else "val/ppl"
    panels = ("train/loss", scored, "train/tokens_per_second", "train/grad_norm", LENGTH, ORDER)
    for axis, key in zip(axes.flat, panels, strict=True):
        for index, run in enumerate(runs):
            colour = plt.get_cmap("tab10")(index % 10)
            if key in (LENGTH, ORDER):
                _range(axis, run, key, colour)
            else:
                marker = "o-" if key == scored else "-"
                logged = "val/ppl_masked" if key == "val/ppl" and key not in run.values else key
                _line(axis, run, logged, _plain(run.name), marker, color=colour, markersize=4, linewidth=1.2)
        title = BY_COLUMN[key].title.capitalize() + (" (mean and range)" if key in (LENGTH, ORDER) else "")
        unit = BY_COLUMN[key].unit or BY_COLUMN[key].title
        if unit == "nats":
            unit += " per sequence" if accuracy else " per token"
        _finish(axis, title, unit, log=key in ("val/ppl", "train/grad_norm"))
        if key == "train/tokens_per_second":
            axis.set_ylim(bottom=0)
            axis.yaxis.set_major_formatter("{x:,.0f}")
        elif key in (LENGTH, ORDER):
            _from_zero(axis)
    return figure


def _line(axis: Any, run: Curves, key: str, label: str, marker: str = "-", **style: Any) -> None:
    steps, values = run.of(key)
    if steps:
        # A single point needs a marker to be visible.
        axis.plot(steps, values, marker if len(steps) > 1 else "o", label=label, **style)


def _layers(axis: Any, run: Curves, prefix: str, plt: Any) -> None:
    names = run.layers(prefix)
    for index, key in enumerate(names):
        colour = plt.get_cmap("viridis")(index / max(1, len(names) - 1) * 0.92)
        label = f"layer {key.rpartition('/')[2]}"
        _line(
            axis,
            run,
            key,
            label if len(names) <= 12 or index % 4 == 0 else "",
            "o-",
            color=colour,
            markersize=3,
        )
    _from_zero(axis)


def _range(axis: Any, run: Curves, prefix: str, colour: Any) -> None:
    found = [run.of(key) for key in run.layers(prefix)]
    if not found:
        return
    steps = found[0][0]
    rows = [values for at, values in found if at == steps]  # a layer with non-finite taps has gaps
    columns = list(zip(*rows, strict=True))
    axis.plot(
        steps, [sum(c) / len(c) for c in columns], "o-", color=colour, markersize=4, label=_plain(run.name)
    )
    axis.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15)


def _finish(axis: Any, title: str, unit: str, log: bool = False, columns: int = 1) -> None:
    axis.set(title=title, xlabel="optimizer step", ylabel=unit)
    axis.grid(alpha=0.3)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    if not axis.lines:
        axis.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axis.transAxes, color="grey")
        return
    if log:
        _plain_logarithmic(axis)
    axis.legend(fontsize="small", ncols=columns)


def _plain_logarithmic(axis: Any) -> None:
    """Make the axis logarithmic, with ticks that are plain numbers also within one decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    steps: tuple[float, ...] = (
        (1.0, 2.0, 5.0) if high / low > 5 else (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)
    )
    if high / low > 1e3:
        steps = (1.0,)
    axis.yaxis.set_major_locator(LogLocator(subs=steps))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _from_zero(axis: Any) -> None:
    """Start the axis at zero with integer ticks, so that a change by one looks small."""
    from matplotlib.ticker import MaxNLocator

    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(0, 1.15 * max(1.0, axis.get_ylim()[1]))


if __name__ == "__main__":
    sys.exit(run_script(main))
