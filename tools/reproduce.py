#!/usr/bin/env python
"""Reproduce an experiment of the papers: measure it, and report which claims hold.

Writes results (NAME.json), report (NAME.md) and plot (NAME.png) to OUT, and the table of all experiments to
OUT/README.md. Each measurement is saved when it is done: run the same command again to resume.

Examples:
  python tools/reproduce.py --list
  python tools/reproduce.py stability                # measure what docs/results lacks
  python tools/reproduce.py stability --again        # measure everything again
  python tools/reproduce.py stability --size paper --out results-paper
  python tools/reproduce.py families --kernel mine=my_kernel.yaml --out families-mine

Needs: `pip install -c constraints.txt -e '.[peers]'`
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
from tnnlm.errors import OneLineParser, UserError, run_script

EXPERIMENTS: dict[str, Experiment] = {
    one.name: one for one in (EXTRAPOLATION, ETSC, families(), SYNTHETIC, BIDIRECTIONAL, STABILITY, SKI)
}


def parse() -> argparse.Namespace:
    """Return the checked arguments of the command line.

    Raises:
        UserError: If the experiment is unknown, or ``--kernel`` does not apply.
    """
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"Experiment: {', '.join(EXPERIMENTS)}.")
    parser.add_argument("--list", action="store_true", help="List the experiments and exit.")
    add = parser.add_argument_group("measurement").add_argument
    add(
        "--size", choices=SIZES, default="small",
        help="Size of models and data: tiny for tests, small for two cores and at most 40 minutes, paper as "
        "published. (default: small)",
    )  # fmt: skip
    add("--again", action="store_true", help="Measure everything again, instead of what is missing in --out.")
    add(
        "--data", nargs="+", default=[], metavar="FILE",
        help="Text files to train on. (default: sources of Python's standard library; paper: WikiText-103)",
    )  # fmt: skip
    add(
        "--kernel", nargs="+", default=[], metavar="NAME=FILE",
        help="Additional kernels for families: YAML files with model.kernel, optim.kernel_lr_scale and "
        "conversion; requires --out.",
    )  # fmt: skip
    add = parser.add_argument_group("output").add_argument
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="Folder of the results. (default: docs/results or results-SIZE)",
    )
    args = parser.parse_args()
    if not args.list and args.name not in EXPERIMENTS:
        raise UserError(f"{args.name or 'no experiment'}: expected one of {', '.join(EXPERIMENTS)}")
    if args.kernel and (args.name != "families" or args.out is None):
        raise UserError("--kernel: requires the experiment families and --out DIR")
    return args


def named_file(word: str) -> tuple[str, Path]:
    """Return the name and the file of ``NAME=FILE``.

    Raises:
        UserError: If the name is invalid or in use, or if the file does not exist.
    """
    name, _, file = word.partition("=")
    if not re.fullmatch(r"\w[\w-]*", name) or name in NAMES or not file:
        raise UserError(f"--kernel {word}: expected NAME=FILE, with a name other than {', '.join(NAMES)}")
    if not Path(file).is_file():
        raise UserError(f"--kernel {word}: no such file")
    return name, Path(file)


def main() -> int:
    """Measure the missing cells of an experiment, print its claims and write its results."""
    args = parse()
    if args.list:
        print("\n".join(f"{name:14} {one.title}" for name, one in EXPERIMENTS.items()))
        return 0
    out = args.out or Path("docs/results" if args.size == "small" else f"results-{args.size}")

    def bar(cells: list[Record]) -> Any:
        if not cells:
            print(f"{out}/{args.name}.json: is complete; add --again to measure it again", file=sys.stderr)
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
