"""Validation schedule by optimizer steps, which is the same after resuming."""

from __future__ import annotations

import math
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback


class ValidationSchedule(Callback):
    """Callback that validates after every ``every_n_steps`` optimizer steps and after the last one.

    Lightning's ``val_check_interval`` counts batches since the process started, so that a resumed run would
    validate at other steps than an uninterrupted one.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Request validation after this batch if it is due.

        Lightning validates if the number of batches is a multiple of ``val_check_batch``.
        """
        step = trainer.global_step + 1
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        due = ends_step and (step % self.every_n_steps == 0 or step == trainer.max_steps)
        trainer.val_check_batch = 1 if due else math.inf
