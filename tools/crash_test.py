#!/usr/bin/env python
"""Kill commands of tnnlm at random moments (SIGKILL), run them again, and compare the results bit by bit.

The kills hit a training, a conversion that replaces a model, and a preparation of data, alternately:

  train         starts, trains, validates or saves, and is resumed after each kill; in the end weights,
                optimizer state, logs and samples must equal those of an uninterrupted training
  convert       replaces a converted model (--force); after the kill, the old or the new model is whole
  prepare-data  begins with an empty cache; the next start completes the same files

No temporary file, lock or replaced folder may be left after the next start. Exit code 0 if all this holds, 1
otherwise.

Examples:
  python tools/crash_test.py --kills 100
  python tools/crash_test.py --kills 3 --json kills.json
  python tools/crash_test.py --seed 1 model.kernel.name=rtf trainer.accumulate=2
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from crashes.commands import KilledCommands, conversions, preparation
from crashes.training import KilledTraining, write_prose
from tnnlm.config.loader import load_config
from tnnlm.errors import OneLineParser, UserError, run_script
from tnnlm.files import check_file, only_process, write_text

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
PREPARED = ("data.source=files", "data.files=prepared.txt", "model.vocab_size=2000")
"""Settings of the data that prepare-data prepares."""
STEPS_PER_KILL = 40
KINDS = 3
"""Number of commands that are killed alternately."""


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="Settings of the training, as for train.py.")
    add("--kills", type=int, default=50, metavar="N", help="Number of kills. (default: 50)")
    add(
        "--seed", type=int, default=0, metavar="N", help="Random seed of the times of the kills. (default: 0)"
    )
    add("--out", type=Path, metavar="DIR", help="Folder for the runs. (default: a temporary one)")
    add("--json", type=Path, metavar="FILE", help="Write all kills and the result as JSON.")
    return parser.parse_intermixed_args()


def main() -> int:
    """Run the test and print its result; return 0 if nothing differs."""
    args = parse()
    if args.kills < 1:
        raise UserError(f"--kills {args.kills}: must be at least 1")
    steps = f"trainer.max_steps={STEPS_PER_KILL * (training_kills(args.kills) + 1)}"
    words = [*SETTINGS, steps, *args.overrides]
    load_config(None, words)  # report wrong settings before the first training
    if args.json is not None:
        check_file(args.json)
    if args.out is None:
        with tempfile.TemporaryDirectory() as folder:
            result = kill_and_compare(TRAIN, args.kills, args.seed, Path(folder), words)
    else:
        refusal = UserError(f"--out {args.out}: another process writes to it", "give another folder")
        with only_process(args.out, refusal):
            if args.out.exists() and any(args.out.iterdir()):
                raise UserError(f"--out {args.out}: is not empty; give another folder")
            args.out.mkdir(parents=True, exist_ok=True)
            result = kill_and_compare(TRAIN, args.kills, args.seed, args.out, words)
    if args.json is not None:
        write_text(args.json, json.dumps(result, indent=2) + "\n")
    show(result)
    return 0 if result["identical"] else 1


def show(result: dict[str, Any]) -> None:
    """Print a table of the kills, and what differs."""
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
            f"identical: after {len(result['kills'])} kills weights, optimizer state, logs, samples, "
            "converted models and prepared data equal those of uninterrupted commands, bit by bit; "
            "nothing is left over"
        )


def kill_and_compare(script: Path, kills: int, seed: int, folder: Path, words: list[str]) -> dict[str, Any]:
    """Kill all commands alternately and return the kills and the differences, as plain data.

    Args:
        script: Path of train.py.
        kills: Number of kills.
        seed: Random seed of the times of the kills.
        folder: Folder for the runs and the training text.
        words: Settings of the training.

    Raises:
        UserError: If a command fails by itself; the message is the last line that it printed.
    """
    folder = folder.resolve()
    write_prose(folder / "text.txt")
    write_prose(folder / "prepared.txt", 600_000)
    moments = random.Random(seed)
    records: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("uninterrupted training", total=kills + 2)
        training = KilledTraining(script, training_kills(kills), folder, words)
        progress.update(task, advance=1, description="killed commands")
        commands = KilledCommands(folder)
        converting, preparing = conversions(training.whole), preparation(folder, list(PREPARED))
        for number in range(kills):
            turn, kind = divmod(number, KINDS)
            if kind == 0:
                found = None if training.ended else training.kill(moments)
            else:
                command = preparing if kind == 2 else converting[turn % len(converting)]
                found = commands.kill(command, moments)
            if found is not None:
                records.append(found)
            progress.update(task, advance=1)
        progress.update(task, description="training to the end")
        training.finish()
        progress.update(task, completed=kills + 2)
    differences = training.differences + commands.differences
    if len(records) < kills:
        differences.append(f"the training ended after {len(records)} of {kills} kills")
    return {
        "kills": records,
        "seed": seed,
        "settings": words,
        "identical": not differences,
        "differences": differences,
    }


def training_kills(kills: int) -> int:
    """Return how many of all kills hit the training."""
    return -(-kills // KINDS)


if __name__ == "__main__":
    sys.exit(run_script(main))
