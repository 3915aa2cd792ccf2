"""A training that is killed and resumed until it ends, compared with an uninterrupted one."""

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

from crashes.leftovers import leftovers
from tnnlm.checkpoints.training import read_checkpoint
from tnnlm.config.loader import load_config
from tnnlm.errors import UserError
from tnnlm.training.loggers.csv import read_metrics

KILLED = -getattr(signal, "SIGKILL", -1)
"""Exit code of a killed process; 1 on Windows, which has no SIGKILL."""
_IN_START = 0.2
"""Probability that a kill comes while the process starts, possibly before its first step."""
_COMPARED = ("train/loss", "train/lr", "train/skipped", "val/loss", "val/ppl_recurrent")
_FIRST_STEP = re.compile(r"step (\d+)/")


class KilledTraining:
    """Training ``runs/killed`` that is killed and resumed, next to the uninterrupted ``runs/whole``."""

    def __init__(self, script: Path, kills: int, folder: Path, words: list[str]) -> None:
        """Train the uninterrupted run.

        Args:
            script: Path of train.py.
            kills: Number of kills that the training must last for.
            folder: Folder for the runs and the training text.
            words: Settings of the training.

        Raises:
            UserError: If the training fails by itself; the message is the last line that it printed.
        """
        self._script, self._kills, self._folder, self._words = script, kills, folder, words
        self.whole, self.run = folder / "runs" / "whole", folder / "runs" / "killed"
        self._processes: list[int] = []
        self.differences: list[str] = []
        self._reference = Attempt(script, folder, [*words, "name=whole"])
        self._reference.finish()

    @property
    def ended(self) -> bool:
        """Whether the training has written its summary."""
        return (self.run / "summary.json").is_file()

    def kill(self, moments: random.Random) -> dict[str, Any] | None:
        """Start or resume the training, and kill it at a random moment.

        Returns:
            Time and place of the kill; None if the training ended before.
        """
        attempt = Attempt(self._script, self._folder, _next_command(self.run, self._words))
        in_start = moments.random() < _IN_START
        # All kills together leave a part of the training time, in case the machine becomes faster.
        reference = self._reference
        longest = reference.start_seconds if in_start else reference.step_seconds / (self._kills + 1)
        attempt.kill_after(in_start, moments.random() * longest)
        if attempt.first_step is not None:
            self._check_leftovers()
        self._processes.append(attempt.process.pid)
        return attempt.record(self.run) if attempt.killed else None

    def finish(self) -> None:
        """Train to the end, and compare the run with the uninterrupted one."""
        if not self.ended:
            Attempt(self._script, self._folder, _next_command(self.run, self._words)).finish()
        left = leftovers(self.run.parent)
        self.differences += [f"left over: {path.relative_to(self._folder)}" for path in left]
        self.differences += _compare(self.whole, self.run)

    def _check_leftovers(self) -> None:
        """Note the files of killed processes that the start after them did not remove."""
        for path in self.run.parent.rglob(".*"):
            if any(f"-{process}-" in path.name for process in self._processes):
                self.differences.append(f"left over: {path.relative_to(self._folder)}")


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
        if any((run / "checkpoints").glob(f".*-{self.process.pid}-*.tmp")):
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


def write_prose(path: Path, characters: int = 60_000) -> None:
    """Write a training text, the documentation of Python."""
    from pydoc_data.topics import topics

    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:characters], encoding="utf-8")
