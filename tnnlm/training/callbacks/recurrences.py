"""Conversion of the kernels whenever a checkpoint is saved, so that every checkpoint can generate text."""

from __future__ import annotations

import warnings
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from tnnlm.checkpoints.training import ENTRY, AttachedSSM, attached_ssm, checkpoint_entry
from tnnlm.config.schema import Config
from tnnlm.kernels import Kernel
from tnnlm.training.callbacks.ema import AveragedWeights
from tnnlm.training.fsdp import gather_kernels
from tnnlm.training.lit_module import LitModel, tokenizer_of
from tnnlm.training.tasks import CausalTask


class AttachRecurrences(Callback):
    """Callback that adds configuration, tokenizer and converted kernels to every checkpoint.

    Kernels are only added for tasks whose models have a recurrent form. With weight averaging the averaged
    kernels are converted, because the checkpoint's weights are the averaged ones. The callback runs on every
    rank before the file is written, so it must not write files. All ranks gather sharded kernels, then rank 0
    converts them, unless the validation of the same step has done so. If the conversion fails, the checkpoint
    is saved without it, with a warning.
    """

    def __init__(self, config: Config, average: AveragedWeights | None = None) -> None:
        self.config = config
        self.average = average

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the entry to the checkpoint."""
        saved = self.average.averaged(pl_module) if self.average else pl_module
        assert isinstance(saved, LitModel)
        assert isinstance(pl_module, LitModel)
        task = pl_module.task  # the averaged module's own task takes no part in validations
        ssm = self._recurrence(trainer, saved, task) if isinstance(task, CausalTask) else None
        if trainer.is_global_zero:
            checkpoint[ENTRY] = checkpoint_entry(self.config, tokenizer_of(trainer), ssm)

    def _recurrence(
        self, trainer: lightning.Trainer, saved: LitModel, task: CausalTask
    ) -> AttachedSSM | None:
        found = [kernel for kernel in gather_kernels(saved.model) if isinstance(kernel, Kernel)]
        if not trainer.is_global_zero:
            return None
        try:
            converted = task.conversion.of(found)
            return attached_ssm(converted.layers, self.config.conversion.method, converted.horizon)
        except Exception as error:  # no failure here may cost the checkpoint
            warnings.warn(f"checkpoint saved without its recurrence: {error}", stacklevel=2)
            return None
