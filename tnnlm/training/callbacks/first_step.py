"""Callback for what may only happen once a run has proved that it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback


class FirstStep(Callback):
    """Callback that calls a function on rank 0 after the first optimizer step of this process.

    The step's metrics, samples and checkpoints are written later.
    """

    def __init__(self, then: Callable[[], None]) -> None:
        self.then: Callable[[], None] | None = then
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep the step of the checkpoint."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Call the function once."""
        if self.then is None or trainer.global_step == self._step:
            return
        then, self.then = self.then, None
        if trainer.is_global_zero:
            then()
