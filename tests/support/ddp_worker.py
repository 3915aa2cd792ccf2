"""One process of a distributed run, which trains and saves the weights of its rank."""

from __future__ import annotations

import sys
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from tnnlm.config.loader import load_config
from tnnlm.errors import run_script
from tnnlm.training.run import train


class SaveRank(Callback):
    """Callback that saves the weights and metrics of this rank at the end."""

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write rank<N>.pt into the working folder; under FSDP, rank 0 has all weights."""
        metrics: dict[str, Any] = {key: float(value) for key, value in trainer.callback_metrics.items()}
        held = {
            "weights": trainer.strategy.lightning_module_state_dict(),
            "metrics": metrics,
            "world_size": trainer.world_size,
        }
        torch.save(held, f"rank{trainer.global_rank}.pt")


def main() -> int:
    """Train with the settings of the command line."""
    train(load_config(None, sys.argv[1:]), extra_callbacks=[SaveRank()])
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
