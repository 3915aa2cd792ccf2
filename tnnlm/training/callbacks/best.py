"""Checkpoint of the best validation, which is compared with the existing best.ckpt of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tnnlm.checkpoints.locate import BEST
from tnnlm.checkpoints.training import ENTRY, read_intact
from tnnlm.errors import CheckpointError
from tnnlm.training.batches import own_data
from tnnlm.training.loggers.console import show_line
from tnnlm.training.tasks import ValidationTask

_MEASURED_ON = "measured_on"
"""Entry of this callback's state that identifies the validation rows of a score."""


class BestCheckpoint(ModelCheckpoint):
    """Callback that saves best.ckpt when a validation is better than the one of the existing best.ckpt.

    Lightning's callback takes the best score from the checkpoint that a run resumes from. That score belongs
    to another best.ckpt if the folder was moved or if the run resumes from an earlier checkpoint, and it was
    measured on other rows if ``data.max_val_tokens`` has changed.
    """

    def __init__(self, run: Path, task: type[ValidationTask]) -> None:
        super().__init__(
            dirpath=run / BEST.parent,
            filename=BEST.stem,
            monitor=task.monitor,
            mode=task.mode,
            enable_version_counter=False,
            # A run is one epoch, and its end is too late to save the best model.
            save_on_train_epoch_end=False,
        )
        self._path = run / BEST
        self._measured_on: list[Any] = []

    @property
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints, which is that of Lightning's callback."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the best score, and the validation rows that it was measured on."""
        return {**super().state_dict(), _MEASURED_ON: self._measured_on}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Skip the state of the checkpoint to resume from; the score is that of best.ckpt."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Read the score of best.ckpt, on rank 0 for all ranks."""
        super().on_train_start(trainer, pl_module)
        self._measured_on = _validation_rows(trainer)
        score = trainer.strategy.broadcast(self._score(trainer) if trainer.is_global_zero else None)
        if score is None:
            return
        path = Path(self.dirpath or "") / BEST.name  # absolute, as Lightning compares it
        best = torch.tensor(score, dtype=torch.float64, device=pl_module.device)
        self.best_k_models = {str(path): best}
        self.best_model_path = self.kth_best_model_path = str(path)
        self.best_model_score = self.kth_value = best

    def _score(self, trainer: lightning.Trainer) -> float | None:
        """Return the score of best.ckpt; None if later scores can't be compared with it."""
        path = self._path
        if not path.is_file():
            return None
        try:
            checkpoint = read_intact(path)
            state = checkpoint["callbacks"][self.state_key]
            score = float(state["best_model_score"])
            data = checkpoint[ENTRY]["config"]["data"]
            step = int(checkpoint["global_step"])
        except (CheckpointError, KeyError, TypeError, ValueError):
            show_line(f"warning: {path}: is corrupt; the next validation replaces it")
            return None
        # Steps after the one to resume from are repeated, and their rows in metrics.csv are deleted.
        if step > trainer.global_step:
            return None
        own = own_data(trainer)
        assert own is not None
        # Versions without this entry can only be compared by the setting.
        same = data.get("max_val_tokens") == own.config.data.max_val_tokens
        if _MEASURED_ON in state:
            same = state[_MEASURED_ON] == self._measured_on
        if not same:
            show_line(f"warning: {path}: was validated on other rows; the next validation replaces it")
        return score if same else None


def _validation_rows(trainer: lightning.Trainer) -> list[Any]:
    """Return what identifies the validation rows: the hash of their split and their number."""
    data = own_data(trainer)
    assert data is not None
    split = data.opened.report.splits.get("val")
    return ["" if split is None else split.sha256, len(data.opened.val)]
