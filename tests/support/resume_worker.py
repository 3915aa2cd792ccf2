"""One process of a resumed run that is killed, or gets a NaN loss, and records its training rows."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from tnnlm.errors import run_script
from tnnlm.training.resume import resumed_config
from tnnlm.training.run import train


class Scenario(Callback):
    """Callback that stops, kills, or makes the loss NaN at given steps."""

    def __init__(self, name: str, steps: dict[str, int]) -> None:
        self.name = name
        self.steps = steps

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record a fingerprint of every row."""
        rows = (batch * torch.arange(1, batch.shape[1] + 1)).sum(1).tolist()
        path = Path(f"order-{self.name}-{trainer.world_size}-{trainer.global_rank}.jsonl")
        with path.open("a") as file:
            file.write(json.dumps([trainer.global_step, trainer.global_rank, rows]) + "\n")

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Any
    ) -> None:
        """Stop or kill the run, or make the loss NaN; the last two on the last rank only."""
        step, last_rank = trainer.global_step, trainer.global_rank == trainer.world_size - 1
        if step == self.steps.get("stop"):
            os.kill(os.getpid(), signal.SIGTERM)
        if step == self.steps.get("kill") and last_rank:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.steps.get("nan") and last_rank:
            pl_module._losses[-1].fill_(torch.nan)


def main() -> int:
    """Resume the run given by ``resume=``."""
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    run = Path(given.pop("resume"))
    steps = {key: int(given.pop(key)) for key in ("kill", "nan") if key in given}
    config = resumed_config(run, [f"{key}={value}" for key, value in given.items()])
    train(config, run, extra_callbacks=[Scenario(config.name, steps)])
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
