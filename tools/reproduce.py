#!/usr/bin/env python
"""Measure a claim of the papers behind this project: a table, a plot, and what holds.

Writes OUT/NAME.json, NAME.md, NAME.png and OUT/README.md, the table of all claims. Every cell is saved as
it is measured: the same command goes on where it was stopped.

Examples:
  python tools/reproduce.py --list
  python tools/reproduce.py stability                # what docs/results holds, and what is missing there
  python tools/reproduce.py stability --again        # all of it: two cores, at most 40 minutes
  python tools/reproduce.py stability --size paper --out results-paper
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from experiments.bidirectional import Bidirectional
from experiments.etsc import ETSC
from experiments.experiment import SIZES, Experiment, Row
from experiments.extrapolation import Extrapolation
from experiments.families import Families
from experiments.run import reproduce
from experiments.ski import Ski
from experiments.stability import Stability
from experiments.synthetic import Synthetic
from tnnlm.errors import UserError, run_script

EXPERIMENTS: dict[str, type[Experiment]] = {
    one.name: one for one in (Extrapolation, ETSC, Families, Synthetic, Bidirectional, Stability, Ski)
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--list", action="store_true", help="name the experiments")
    parser.add_argument("--size", choices=SIZES, default="small", help="default: small")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: docs/results; results-SIZE if not small"
    )
    parser.add_argument("--again", action="store_true", help="measure what is measured already, too")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="FILE",
        help="text to train on, in the place of the standard library's sources (paper: WikiText-103, hub)",
    )  # fmt: skip
    args = parser.parse_args()
    if not args.list and args.name not in EXPERIMENTS:
        raise UserError(f"{args.name or 'no name'}: expected one of {', '.join(EXPERIMENTS)}")
    return args


def main() -> int:
    args = parse()
    if args.list:
        print("\n".join(f"{name:14} {one.title}" for name, one in EXPERIMENTS.items()))
        return 0
    out = args.out or Path("docs/results" if args.size == "small" else f"results-{args.size}")

    def bar(cells: Iterable[Row]) -> Iterable[Row]:
        left = list(cells)
        if not left:
            print(
                f"{out}/{args.name}.json: all is measured already; --again measures it anew", file=sys.stderr
            )
        return tqdm(left, desc=args.name, unit="cell", disable=None)

    experiment = EXPERIMENTS[args.name]()
    experiment.data = tuple(args.data)
    verdicts = reproduce(experiment, args.size, out, bar, args.again)
    for verdict in verdicts:
        print(f"{'holds         ' if verdict.holds else 'DOES NOT HOLD '} {verdict.claim}: {verdict.ours}")
    print(f"wrote {out}/{args.name}.md, .json, .png and {out}/README.md")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
