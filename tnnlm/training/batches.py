"""Batches that do not come from ``TextDataModule``, and what LitModel asks of a trainer that reads them."""

from __future__ import annotations

import math
import warnings
from typing import Any

import lightning
from torch import Tensor

from tnnlm.config.schema import Config
from tnnlm.data.datamodule import TextDataModule
from tnnlm.errors import DataError
from tnnlm.models.batches import LabelledBatch, MaskedBatch


def own_data(trainer: lightning.Trainer) -> TextDataModule | None:
    """The trainer's ``TextDataModule``; None if its batches come from anything else."""
    data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it
    return data if isinstance(data, TextDataModule) else None


def checked_batch(batch: Any, config: Config, first: bool) -> Any:
    """What the model of ``config.task`` reads of a loader's batch.

    Args:
        batch: of task causal, token ids (B, L + 1) of any integer type, or the list of one such tensor that a
            ``TensorDataset`` gives; of the other tasks a ``MaskedBatch`` or a ``LabelledBatch``.
        config: all settings.
        first: look at every token id, which waits for the device.

    Raises:
        DataError: if it is anything else.
    """
    if config.task != "causal":
        kind = {"masked": MaskedBatch, "classify": LabelledBatch}[config.task]
        if not isinstance(batch, kind):
            found, name = type(batch).__name__, f"{kind.__module__}.{kind.__name__}"
            raise DataError(f"a batch is a {found}: task={config.task} takes {name}")
        return batch
    if isinstance(batch, (list, tuple)) and len(batch) == 1:
        batch = batch[0]
    expected = "expected token ids (B, L + 1), inputs and targets in one integer tensor"
    if not isinstance(batch, Tensor):
        raise DataError(f"a batch is a {type(batch).__name__}: {expected}")
    if batch.dim() != 2 or batch.shape[1] < 2 or batch.is_floating_point() or batch.is_complex():
        raise DataError(f"a batch is {str(batch.dtype)[6:]} of shape {tuple(batch.shape)}: {expected}")
    rows, size = batch.long(), config.model.vocab_size
    if first and not bool(((rows >= 0) & (rows < size)).all()):
        low, high = int(rows.min()), int(rows.max())
        raise DataError(f"a batch has token ids from {low} to {high}, and model.vocab_size is {size}")
    return rows


def tokens_in(batch: Any) -> int:
    """Tokens that the model reads of a checked batch: of rows (B, L + 1), B x L."""
    return int(batch[:, 1:].numel() if isinstance(batch, Tensor) else batch.tokens.numel())


def schedule_steps(trainer: lightning.Trainer, config: Config) -> int:
    """Optimizer steps that the learning rate's schedule spans: the trainer's ``max_steps``, or as many as its
    epochs have; where neither is known, ``trainer.max_steps`` of the configuration, with a warning."""
    if own_data(trainer) is not None:
        return config.trainer.max_steps
    steps = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
    if 0 < steps < math.inf:
        return int(steps)
    if config.optim.schedule == "cosine":
        warnings.warn(
            "the trainer does not know how many steps it will take: the cosine schedule ends at step "
            f"{config.trainer.max_steps}, trainer.max_steps of the configuration; give Trainer a max_steps",
            stacklevel=2,
        )
    return config.trainer.max_steps
