"""Optimizer settings of a resumed run, taken from its configuration instead of the checkpoint."""

from __future__ import annotations

import lightning
from lightning.pytorch.callbacks import Callback
from torch.optim.lr_scheduler import LambdaLR

from tnnlm.config.schema import Config
from tnnlm.training.lit_module import LitModel
from tnnlm.training.optim import build_optimizer, lr_factor


class RestoreOptimizerSettings(Callback):
    """Callback that applies optimizer settings changed on resume, which loading a checkpoint would revert."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Apply the settings of the configuration after the checkpoint was loaded."""
        assert isinstance(pl_module, LitModel)
        optim = self.config.optim
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(scheduler, LambdaLR)
        factor = lr_factor(scheduler.last_epoch, optim, self.config.trainer.max_steps)
        fresh = build_optimizer(pl_module.model, optim, fused=False).param_groups
        for group, new in zip(trainer.optimizers[0].param_groups, fresh, strict=True):
            for key in ("weight_decay", "betas", "eps"):
                if key in new:  # Muon has no betas
                    group[key] = new[key]
            group["initial_lr"], group["lr"] = new["lr"], new["lr"] * factor
        scheduler.base_lrs = [new["lr"] for new in fresh]
