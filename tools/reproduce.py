#!/usr/bin/env python
"""Measure a claim of the papers behind this project: a table, a plot, and what holds.

Writes OUT/NAME.json, NAME.md, NAME.png and OUT/README.md, the table of all claims. Every cell is saved as
it is measured: the same command goes on where it was stopped.

Examples:
  python tools/reproduce.py --list
  python tools/reproduce.py stability                # what docs/results holds, and what is missing there
  python tools/reproduce.py stability --again        # all of it: two cores, at most 40 minutes
  python tools/reproduce.py stability --size paper --out results-paper
  python tools/reproduce.py families --kernel mine=my_kernel.yaml --out families-mine
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.etsc import ETSC
from experiments.extrapolation import EXTRAPOLATION
from experiments.families import NAMES, families
from experiments.frame import SIZES, Experiment, Record
from experiments.masked import BIDIRECTIONAL
from experiments.results import reproduce
from experiments.ski import SKI
from experiments.stability import STABILITY
from experiments.synthetic import SYNTHETIC
from tnnlm.errors import UserError, run_script

EXPERIMENTS: dict[str, Experiment] = {
    one.name: one for one in (EXTRAPOLATION, ETSC, families(), SYNTHETIC, BIDIRECTIONAL, STABILITY, SKI)
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
    parser.add_argument(
        "--kernel", nargs="+", default=[], metavar="NAME=FILE",
        help="of families: kernels beside its own, with optim.kernel_lr_scale and conversion; give --out too",
    )  # fmt: skip
    args = parser.parse_args()
    if not args.list and args.name not in EXPERIMENTS:
        raise UserError(f"{args.name or 'no name'}: expected one of {', '.join(EXPERIMENTS)}")
    if args.kernel and (args.name != "families" or args.out is None):
        raise UserError("--kernel: goes with families and a folder of its own, --out DIR")
    return args


def named_file(word: str) -> tuple[str, Path]:
    """A family's name and where its kernel is read."""
    name, _, file = word.partition("=")
    if not re.fullmatch(r"\w[\w-]*", name) or name in NAMES or not file:
        raise UserError(f"--kernel {word}: expected NAME=FILE, and a name that is not in {', '.join(NAMES)}")
    if not Path(file).is_file():
        raise UserError(f"--kernel {word}: no such file")
    return name, Path(file)


def main() -> int:
    args = parse()
    if args.list:
        print("\n".join(f"{name:14} {one.title}" for name, one in EXPERIMENTS.items()))
        return 0
    out = args.out or Path("docs/results" if args.size == "small" else f"results-{args.size}")

    def bar(cells: list[Record]) -> Any:
        if not cells:
            print(
                f"{out}/{args.name}.json: all is measured already; --again measures it anew", file=sys.stderr
            )
        return tqdm(cells, desc=args.name, unit="cell", disable=None)

    experiment = EXPERIMENTS[args.name]
    if args.kernel:
        experiment = families(dict(map(named_file, args.kernel)))
    claims = reproduce(experiment, args.size, out, bar, args.again, tuple(args.data))
    for claim in claims:
        print(f"{'holds         ' if claim.holds else 'DOES NOT HOLD '} {claim.claim}: {claim.ours}")
    print(f"wrote {out}/{args.name}.md, .json, .png and {out}/README.md")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
