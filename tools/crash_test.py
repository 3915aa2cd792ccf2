#!/usr/bin/env python
"""Kill and resume a short training many times, and compare the result with an uninterrupted training.

A training that saves a checkpoint every few steps is killed (SIGKILL) at random times: while it starts,
trains, validates or saves. After each kill it is resumed. At the end, weights and optimizer state of both
runs are compared bit by bit, and their logs row by row. Exit code 0 if nothing differs, 1 otherwise.

Examples:
  python tools/crash_test.py                              # 50 kills, eight minutes
  python tools/crash_test.py --kills 3 --json kills.json
  python tools/crash_test.py --seed 1 model.kernel.name=rtf trainer.accumulate=2
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tnnlm.checkpoints.training import read_checkpoint
from tnnlm.config.loader import load_config
from tnnlm.errors import OneLineParser, UserError, run_script
from tnnlm.files import check_file, write_text
from tnnlm.training.loggers.csv import read_metrics

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
KILLED = -getattr(signal, "SIGKILL", -1)
"""Exit code of a killed process; 1 on Windows, which has no SIGKILL."""
_IN_START = 0.2
"""Probability that a kill comes while the process starts, possibly before its first step."""
_COMPARED = ("train/loss", "train/lr", "train/skipped", "val/loss", "val/ppl_recurrent")
_FIRST_STEP = re.compile(r"step (\d+)/")


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
    """Run the test and print its result; return 0 if both trainings are identical."""
    args = parse()
    if args.kills < 1:
        raise UserError(f"--kills {args.kills}: must be at least 1")
    steps = f"trainer.max_steps={STEPS_PER_KILL * (args.kills + 1)}"
    words = [*SETTINGS, steps, *args.overrides]
    load_config(None, words)  # report wrong settings before the first training
    if args.json is not None:
        check_file(args.json)
    if args.out is None:
        with tempfile.TemporaryDirectory() as folder:
            result = kill_and_compare(TRAIN, args.kills, args.seed, Path(folder), words)
    else:
        if args.out.exists() and any(args.out.iterdir()):
            raise UserError(f"--out {args.out}: is not empty; give another folder")
        args.out.mkdir(parents=True, exist_ok=True)
        result = kill_and_compare(TRAIN, args.kills, args.seed, args.out, words)
    if args.json is not None:
        write_text(args.json, json.dumps(result, indent=2) + "\n")
    show(result)
    return 0 if result["identical"] else 1


def show(result: dict[str, Any]) -> None:
    """Print a table of the kills, and the differences between both trainings."""
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
            f"identical: after {len(result['kills'])} kills weights, optimizer state, logs and samples equal "
            "those of the uninterrupted training, bit by bit"
        )


def kill_and_compare(script: Path, kills: int, seed: int, folder: Path, words: list[str]) -> dict[str, Any]:
    """Run both trainings and return the kills and the differences, as plain data.

    Args:
        script: Path of train.py.
        kills: Number of kills.
        seed: Random seed of the times of the kills.
        folder: Folder for the runs and the training text.
        words: Settings of the training.

    Raises:
        UserError: If a training fails by itself; the message is the last line that it printed.
    """
    _write_prose(folder / "text.txt")
    moments = random.Random(seed)
    records: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("uninterrupted training", total=kills + 2)
        whole = Attempt(script, folder, [*words, "name=whole"])
        whole.finish()
        progress.update(task, advance=1, description="killed training")
        run = folder / "runs" / "killed"
        while len(records) < kills and not (run / "summary.json").is_file():
            attempt = Attempt(script, folder, _next_command(run, words))
            in_start = moments.random() < _IN_START
            # All kills together leave a part of the training time, in case the machine becomes faster.
            longest = whole.start_seconds if in_start else whole.step_seconds / (kills + 1)
            attempt.kill_after(in_start, moments.random() * longest)
            if not attempt.killed:
                break
            records.append(attempt.record(run))
            progress.update(task, advance=1)
        progress.update(task, description="training to the end")
        if not (run / "summary.json").is_file():
            Attempt(script, folder, _next_command(run, words)).finish()
        progress.update(task, completed=kills + 2)
    differences = _compare(folder / "runs" / "whole", run)
    if len(records) < kills:
        differences.append(f"the training ended after {len(records)} of {kills} kills")
    return {
        "kills": records,
        "seed": seed,
        "settings": words,
        "identical": not differences,
        "differences": differences,
        "start_seconds": round(whole.start_seconds, 2),
        "training_seconds": round(whole.step_seconds, 2),
    }


class Attempt:
    """Process of train.py, from its start until it ends or is killed."""

    def __init__(self, script: Path, folder: Path, words: list[str]) -> None:
        environment = {
            **os.environ,
            "TNNLM_CACHE": str(folder.resolve() / "cache"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(script.parent), os.environ.get("PYTHONPATH")))),
        }
        self.started = time.perf_counter()
        self.killed = False
        self.lines: list[str] = []
        self.first_step: float | None = None
        self.ended = 0.0
        self._training = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, str(script), *words],
            cwd=folder, env=environment, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def start_seconds(self) -> float:
        """Seconds from the start of the process to its first logged step."""
        return (self.ended if self.first_step is None else self.first_step) - self.started

    @property
    def step_seconds(self) -> float:
        """Seconds from the first logged step to the end of the process."""
        return self.ended - self.started - self.start_seconds

    def finish(self) -> None:
        """Wait for the end of the training; raise an error if it failed."""
        self._wait()
        self._check()

    def kill_after(self, from_start: bool, seconds: float) -> None:
        """Send SIGKILL the given seconds after now (``from_start``) or after the first logged step."""
        if not from_start:
            self._training.wait()
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._wait()
        self.killed = self.process.returncode == KILLED
        if not self.killed:
            self._check()

    def record(self, run: Path) -> dict[str, Any]:
        """Return the time of the kill and the phase it hit, as far as the files of ``run`` show it."""
        rows = read_metrics(run / "metrics.csv")
        step = int(rows[-1]["step"]) if rows else 0
        if any((run / "checkpoints").glob(f".*.{self.process.pid}.tmp")):
            place = "in a save"
        elif self.first_step is None:
            place = "in the start"
        elif rows and rows[-1]["train/loss"] and self._validated_at(run, step):
            place = "in a validation"
        else:
            place = "in training"
        return {"seconds": round(self.ended - self.started, 3), "last_logged_step": step, "place": place}

    @staticmethod
    def _validated_at(run: Path, step: int) -> bool:
        return step % load_config(run / "config.yaml", saved=True).trainer.val_every_n_steps == 0

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if self.first_step is None and _FIRST_STEP.match(line):
                self.first_step = time.perf_counter()
                self._training.set()
        self._training.set()

    def _wait(self) -> None:
        self.process.wait()
        self.ended = time.perf_counter()
        self._reader.join()

    def _check(self) -> None:
        if self.process.returncode != 0:
            last = self.lines[-1] if self.lines else f"exit code {self.process.returncode}"
            raise UserError(f"train.py failed: {last}")


def _next_command(run: Path, words: list[str]) -> list[str]:
    """Return the arguments to resume the run, or to start it if it was killed before its first checkpoint."""
    if (run / "checkpoints" / "last.ckpt").is_file():
        return ["--resume", "killed"]
    if not (run / "job.json").is_file():
        shutil.rmtree(run, ignore_errors=True)  # killed before the folder was assigned to the job
    # --job resumes the run in the same folder; a second start by name would create another folder.
    return ["--job", "kill test", *words, "name=killed"]


def _compare(whole: Path, killed: Path) -> list[str]:
    """Return a line for every difference between two finished runs."""
    left, right = (read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (whole, killed))
    names = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "TextDataModule")
    differences = [f"last.ckpt: {name}" for name in names if not _same(left[name], right[name])]
    best = (read_checkpoint(run / "checkpoints" / "best.ckpt") for run in (whole, killed))
    if not _same(*(checkpoint["state_dict"] for checkpoint in best)):
        differences.append("best.ckpt: state_dict")
    rows = [
        [tuple(row[key] for key in ("step", *_COMPARED)) for row in read_metrics(run / "metrics.csv")]
        for run in (whole, killed)
    ]
    if rows[0] != rows[1]:
        odd = next((pair for pair in zip(*rows, strict=False) if pair[0] != pair[1]), "their number")
        differences.append(f"metrics.csv: {odd}")
    if (whole / "samples.txt").read_bytes() != (killed / "samples.txt").read_bytes():
        differences.append("samples.txt")
    return differences


def _same(a: Any, b: Any) -> bool:
    """Return whether two values are equal bit by bit, including values in dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _write_prose(path: Path) -> None:
    """Write 60,000 characters of Python's documentation as the training text."""
    from pydoc_data.topics import topics

    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:60_000], encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_script(main))
