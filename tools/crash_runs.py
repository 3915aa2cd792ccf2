"""A training that is killed again and again, beside one that is left alone: what tools/kill_test.py runs."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tnnlm.checkpoints.training import read_checkpoint
from tnnlm.config.loader import load_config
from tnnlm.errors import UserError
from tnnlm.training.loggers.csv import read_metrics

KILLED = -getattr(signal, "SIGKILL", -1)
"""exit code of a killed process; Windows, which has no such signal, gives 1"""
_IN_START = 0.2
"""share of kills that come while the process starts, and may find no step done"""
_COMPARED = ("train/loss", "train/lr", "train/skipped", "val/loss", "val/ppl_recurrent")
_FIRST_STEP = re.compile(r"step (\d+)/")


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
        while len(records) < kills:
            attempt = Attempt(script, folder, _next_command(run, words))
            in_start = moments.random() < _IN_START
            longest = whole.start_seconds if in_start else whole.step_seconds / kills
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
