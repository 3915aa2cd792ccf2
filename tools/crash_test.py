#!/usr/bin/env python
"""Kill a short training again and again, and compare what comes out with one that was left alone.

A training with a save every few steps gets SIGKILL at random moments: while it starts, trains,
validates, saves. After each kill it is resumed. At the end the last checkpoints of both
runs are compared to the last bit, weights and the optimizer's moments, and the logs row by row.
Exit code 0 if nothing differs, 1 otherwise.

Examples:
  python tools/crash_test.py                              # 50 kills: eight minutes
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
from tnnlm.errors import UserError, run_script
from tnnlm.files import write_text
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
"""exit code of a killed process; Windows, which has no such signal, gives 1"""
_IN_START = 0.2
"""share of kills that come while the process starts, and may find no step done"""
_COMPARED = ("train/loss", "train/lr", "train/skipped", "val/loss", "val/ppl_recurrent")
_FIRST_STEP = re.compile(r"step (\d+)/")


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


def kill_and_compare(script: Path, kills: int, seed: int, folder: Path, words: list[str]) -> dict[str, Any]:
    """Both runs and their comparison, as plain data.

    Args:
        script: train.py.
        kills: how many.
        seed: of the moments.
        folder: of the runs, and of the text.
        words: settings of the training.

    Raises:
        UserError: if a training fails by itself, with its last line.
    """
    _write_prose(folder / "text.txt")
    moments = random.Random(seed)
    records: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("training left alone", total=kills + 2)
        whole = Attempt(script, folder, [*words, "name=whole"])
        whole.finish()
        progress.update(task, advance=1, description="training killed")
        run = folder / "runs" / "killed"
        while len(records) < kills and not (run / "summary.json").is_file():
            attempt = Attempt(script, folder, _next_command(run, words))
            in_start = moments.random() < _IN_START
            # Some of the run is left over: the machine may be faster by then.
            longest = whole.start_seconds if in_start else whole.step_seconds / (kills + 1)
            attempt.kill_after(in_start, moments.random() * longest)
            if not attempt.killed:
                break
            records.append(attempt.record(run))
            progress.update(task, advance=1)
        progress.update(task, description="training to its end")
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
    """One process of train.py, from its start to its end or its kill."""

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
        """Until the first step was logged."""
        return (self.ended if self.first_step is None else self.first_step) - self.started

    @property
    def step_seconds(self) -> float:
        """From there to the end."""
        return self.ended - self.started - self.start_seconds

    def finish(self) -> None:
        """Wait for the end of the training."""
        self._wait()
        self._check()

    def kill_after(self, from_start: bool, seconds: float) -> None:
        """SIGKILL so many seconds after the process started, or after its first logged step."""
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
        """When and where the kill came, as far as what it left shows."""
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
        return step % load_config(run / "config.yaml").trainer.val_every_n_steps == 0

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
    """Resume, or begin if the last kill came before there was a run."""
    if (run / "checkpoints" / "last.ckpt").is_file():
        return ["--resume", "killed"]
    if not (run / "job.json").is_file():
        shutil.rmtree(run, ignore_errors=True)  # killed before it was said whose folder this is
    # The same job finds its folder again, where a second start by name would take another.
    return ["--job", "kill test", *words, "name=killed"]


def _compare(whole: Path, killed: Path) -> list[str]:
    """What differs between two finished runs, in words."""
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
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _write_prose(path: Path) -> None:
    """60 kB of the documentation of Python itself."""
    from pydoc_data.topics import topics

    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:60_000], encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_script(main))
