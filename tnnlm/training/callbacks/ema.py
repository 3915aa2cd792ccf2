"""Exponential moving average (EMA) of the weights: Lightning's callback, extended for exact resuming.

The averaged weights are validated in parallel and recurrent form, saved as the model's weights in
checkpoints, and converted by convert.py. Checkpoints also store the current weights, which training continues
with.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging

from tnnlm.config.schema import Config


class AveragedWeights(WeightAveraging):
    """Callback that averages the weights after every optimizer step.

    It must precede the callbacks that save: a checkpoint's average must include its step, or a resumed run
    would miss that step.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        # Buffers (decays, norms) are constants that must stay exact.
        super().__init__(use_buffers=False)
        self._swapped = False

    def averaged(self, module: lightning.LightningModule) -> lightning.LightningModule:
        """Return the module that holds the averaged weights; during validation this is ``module`` itself."""
        if self._average_model is None or self._swapped:
            return module
        found = self._average_model.module
        assert isinstance(found, lightning.LightningModule)
        return found

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Create the average on the training device; the model itself is still on the CPU here."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            # The host reads the count after every step, and would wait for a GPU that holds it.
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Update the average after an optimizer step, without waiting for the device."""
        if trainer.global_step > self._latest_update_step:
            self._update(pl_module)
            self._latest_update_step = trainer.global_step

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the averaged weights as ``state_dict``, also during validation, when weights are swapped."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:
            averaged, current = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = averaged, current

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep the current weights instead of copying the average, because a finished run may be resumed."""

    def _swap_models(self, pl_module: lightning.LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped

    @torch.no_grad()
    def _update(self, pl_module: lightning.LightningModule) -> None:
        """Update average += (1 - d) (weights - average), where d = min(``decay``, (1 + n) / (10 + n)).

        With the full decay from the start, the random initialisation would dominate the average for the first
        1 / (1 - decay) steps. The first update, n = 0, copies the weights. ``AveragedModel`` is not asked to
        update itself, because it moves n to the device of the weights and back.
        """
        average = self._average_model
        assert average is not None
        n = int(average.n_averaged)
        averaged, current = tuple(average.module.parameters()), tuple(pl_module.parameters())
        if n == 0:
            torch._foreach_copy_(averaged, current)
        else:
            torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + n) / (10 + n)))
        for kept, buffer in zip(average.module.buffers(), pl_module.buffers(), strict=True):
            kept.copy_(buffer)
        average.n_averaged += 1


def averaging(config: Config) -> list[AveragedWeights]:
    """Return a list with the EMA callback, or an empty list if ``trainer.ema_decay`` is null."""
    decay = config.trainer.ema_decay
    return [] if decay is None else [AveragedWeights(decay)]
