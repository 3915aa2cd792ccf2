#!/usr/bin/env python
"""Kill a short training again and again, and compare what comes out with one that was left alone.

A training with a save every few steps gets SIGKILL at random moments: while it starts, trains,
validates, saves. After each kill it is resumed. At the end the last checkpoints of both
runs are compared to the last bit, weights and the optimizer's moments, and the logs row by row.
Exit code 0 if nothing differs, 1 otherwise.

Examples:
  python tools/kill_test.py                              # 50 kills: eight minutes
  python tools/kill_test.py --kills 3 --json kills.json
  python tools/kill_test.py --seed 1 model.kernel.name=rtf trainer.accumulate=2
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from crash_runs import kill_and_compare
from tnnlm.config.loader import load_config
from tnnlm.errors import UserError, run_script
from tnnlm.files import write_text

TRAIN = Path(__file__).parents[1] / "train.py"
SETTINGS = (
    "data.source=files",
    "data.files=text.txt",
    "data.batch_size=2",
    "data.val_fraction=0.05",
    "model.d_model=16",
    "model.n_layers=2",
    "model.vocab_size=300",
    "model.max_length=32",
    "model.dropout=0.1",
    "trainer.val_every_n_steps=40",
    "trainer.log_every_n_steps=8",
    "trainer.sample_prompt=The ",
    "trainer.sample_tokens=4",
    "trainer.accelerator=cpu",
    "checkpoint.every_n_steps=5",
)
STEPS_PER_KILL = 40


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the runs here (default: not kept)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every kill and the outcome")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the training")
    return parser.parse_intermixed_args()


def main() -> int:
    args = parse()
    if args.kills < 1:
        raise UserError(f"--kills {args.kills}: must be at least 1")
    steps = f"trainer.max_steps={STEPS_PER_KILL * (args.kills + 1)}"
    words = [*SETTINGS, steps, *args.overrides]
    load_config(None, words)  # refuse a wrong setting at once
    if args.out is None:
        with tempfile.TemporaryDirectory() as folder:
            result = kill_and_compare(TRAIN, args.kills, args.seed, Path(folder), words)
    else:
        if args.out.exists() and any(args.out.iterdir()):
            raise UserError(f"{args.out}: is not empty; give another --out")
        args.out.mkdir(parents=True, exist_ok=True)
        result = kill_and_compare(TRAIN, args.kills, args.seed, args.out, words)
    if args.json is not None:
        write_text(args.json, json.dumps(result, indent=2) + "\n")
    show(result)
    return 0 if result["identical"] else 1


def show(result: dict[str, Any]) -> None:
    """Print what was hit, and whether it left a trace."""
    table = Table(title=f"{len(result['kills'])} kills, seed {result['seed']}")
    for name in ("kill", "after", "place", "last logged step"):
        table.add_column(name, justify="left" if name == "place" else "right")
    for number, kill in enumerate(result["kills"], 1):
        table.add_row(str(number), f"{kill['seconds']:.2f} s", kill["place"], str(kill["last_logged_step"]))
    Console().print(table)
    for difference in result["differences"]:
        print(f"differs: {difference}")
    if result["identical"]:
        print(
            f"identical: after {len(result['kills'])} kills weights, moments, logs and samples equal those "
            "of the training left alone, to the last bit"
        )


if __name__ == "__main__":
    sys.exit(run_script(main))
