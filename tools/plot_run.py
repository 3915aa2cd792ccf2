#!/usr/bin/env python
"""Draw a run while it trains or after: losses, perplexities, speed, gradient norm, memory of its kernels.

Several runs are drawn over each other, and their final figures printed side by side.

Examples:
  python tools/plot_run.py demo                                  # runs/demo/ -> runs/demo/run.png
  python tools/plot_run.py runs/demo runs/rtf_demo --out compared.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from run_plots import final_figures, plot_runs, read_run
from tnnlm.errors import CheckpointError, run_script
from tnnlm.training.loggers.names import Place, metrics_at


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run by folder, or by name under --runs-dir")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.png", help="default: RUN/run.png; of several: runs.png"
    )
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    return parser.parse_args()


def main() -> int:
    args = parse()
    folders = [folder_of(name, args.runs_dir) for name in args.runs]
    runs = [read_run(folder) for folder in folders]
    out = args.out or (folders[0] / "run.png" if len(folders) == 1 else Path("runs.png"))
    plot_runs(runs, out)
    table = Table("at the end", *(run.name for run in runs))
    figures = [final_figures(run) for run in runs]
    for metric in metrics_at(Place.TABLE):
        shown = [of_run[metric.column] for of_run in figures]
        if set(shown) != {"-"}:  # tasks log figures of their own
            table.add_row(metric.label, *shown)
    Console().print(table)
    print(f"drawn in {out}")
    return 0


def folder_of(name: str, runs_dir: Path) -> Path:
    """A run that may not have a checkpoint yet."""
    for folder in (Path(name), runs_dir / name):
        if (folder / "metrics.csv").is_file():
            return folder
    raise CheckpointError(
        f"{name}: no such run with a metrics.csv, neither as a folder nor under {runs_dir}/"
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
