"""A training run that is killed at a given point, in a separate process."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

import tnnlm.training.callbacks.checkpoint as checkpointing
import tnnlm.training.run as run
from tnnlm.config.loader import load_config

LATE = 14
"""Step from which on the run may be killed, after two checkpoints and a validation."""


def kill() -> None:
    """End this process as a power failure would."""
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt(Callback):
    """Callback that kills the process at the start, in a step, or in a validation."""

    def __init__(self, place: str) -> None:
        self.place = place

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Kill before the first checkpoint."""
        if self.place == "start":
            kill()

    def on_before_backward(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Kill between forward and backward."""
        if self.place == "step" and trainer.global_step >= LATE:
            kill()

    def on_validation_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Kill in the middle of a validation."""
        if self.place == "validation" and trainer.global_step >= LATE:
            kill()


def train_until_killed(folder: Path, words: list[str], place: str) -> None:
    """Train in ``folder`` and kill the process at ``place``."""
    os.chdir(folder)
    os.environ["TNNLM_CACHE"] = str(folder / "cache")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open until the process ends
    save, second_name, saves = torch.save, checkpointing.second_name, []

    def half(checkpoint: Any, file: Any) -> None:
        saves.append(checkpoint["global_step"])
        if checkpoint["global_step"] >= LATE:
            file.write(b"PK half a checkpoint")
            file.flush()
            kill()
        save(checkpoint, file)

    def named(path: Path, name: Path) -> None:
        second_name(path, name)
        if len(saves) > 2:
            kill()

    if place == "save":
        torch.save = half
    if place == "rename":
        torch.save = lambda checkpoint, file: (saves.append(1), save(checkpoint, file))
        checkpointing.second_name = named
    if place == "end":
        run.write_summary = lambda *args, **named: kill()
    run.train(load_config(None, words), extra_callbacks=[KillAt(place)])
