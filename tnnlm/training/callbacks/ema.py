"""Averaged weights (EMA) by Lightning's callback, with what it leaves to us for exact resuming.

The average is what is validated, in both forms, what checkpoints hold as the model's weights, and so
what convert.py converts. The weights that training goes on with lie beside it in the checkpoint.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from tnnlm.config.schema import Config
from tnnlm.errors import ConfigError
from tnnlm.training.estimate import resolve_precision


class AveragedWeights(WeightAveraging):
    """Exponential moving average of the weights after every optimizer step.

    Its place among the callbacks is before those that save: a save of this step must hold an
    average with this step in it, or a resumed run would never take it in.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        # Frozen numbers (decays, norms) must stay what they are to the last bit.
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self._swapped = False

    def averaged(self, module: lightning.LightningModule) -> lightning.LightningModule:
        """The module that holds the average: during a validation ``module`` itself does."""
        if self._average_model is None or self._swapped:
            return module
        found = self._average_model.module
        assert isinstance(found, lightning.LightningModule)
        return found

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Keep the average where the model will be: at this point the model still is on the CPU."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The average as ``state_dict``, in the middle of a validation too."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:
            averaged, current = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = averaged, current

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave the weights: a finished run that is trained on must go on from them, not from the average."""

    def _swap_models(self, pl_module: lightning.LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped

    def _average(self, averaged: list[Tensor], current: list[Tensor], n_averaged: Tensor | int) -> None:
        """average += (1 - d) (weights - average); d grows as (1 + n) / (10 + n) to ``decay``.

        With the full decay from the start the average would be that of the random initialisation
        for the first 1 / (1 - decay) steps.
        """
        n = int(n_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + n) / (10 + n)))


def averaging(config: Config) -> list[AveragedWeights]:
    """The callback, if ``trainer.ema_decay`` asks for it.

    Raises:
        ConfigError: for weights that are not float32 or lie in shards.
    """
    settings = config.trainer
    if settings.ema_decay is None:
        return []
    where = f"trainer.ema_decay={settings.ema_decay:g}"
    if resolve_precision(config) in ("bf16-true", "64-true"):
        raise ConfigError(
            f"{where}: averages float32 weights", "take trainer.precision=bf16-mixed or 32-true with it"
        )
    if any(name in settings.strategy for name in ("fsdp", "model_parallel", "deepspeed")):
        raise ConfigError(f"{where}: can't average weights in shards", "take trainer.strategy=ddp with it")
    return [AveragedWeights(settings.ema_decay)]
