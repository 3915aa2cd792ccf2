"""Support for training on other data than ``TextDataModule``: checks of batches, length of the schedule."""

from __future__ import annotations

import math
import warnings
from typing import Any

import lightning
import torch
from torch import Tensor

from tnnlm.config.schema import Config
from tnnlm.data.datamodule import TextDataModule
from tnnlm.errors import DataError
from tnnlm.models.batches import AnswerBatch, LabelledBatch, MaskedBatch


def own_data(trainer: lightning.Trainer) -> TextDataModule | None:
    """Return the trainer's ``TextDataModule``, or None if its batches come from another source."""
    data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it
    return data if isinstance(data, TextDataModule) else None


def restart_epoch(trainer: lightning.Trainer) -> None:
    """Make a resumed ``trainer`` count its batches from zero, at the optimizer step of the checkpoint.

    The loader of ``TextDataModule`` contains only the rows that are left. Lightning would continue with the
    number of batches of the stopped process, which ends optimizer steps at other batches if
    ``trainer.accumulate`` has changed, and repeats rows if the loader is shorter than that number.
    """
    loop = trainer.fit_loop.epoch_loop
    loop.restarting = False
    loop._batches_that_stepped = trainer.global_step  # the step of values that callbacks log by self.log


def checked_batch(batch: Any, config: Config, first: bool) -> Any:
    """Validate a batch and convert it to the input that the model of ``config.task`` expects.

    Args:
        batch: Token ids (B, L + 1) of any integer dtype for the task causal, a list of one such tensor
            (the output of ``TensorDataset``), or an ``AnswerBatch``; a ``MaskedBatch`` for masked; a
            ``LabelledBatch`` for classify.
        config: The full configuration.
        first: Whether to check the range of the token ids too, which synchronises with the device.

    Returns:
        Token ids (B, L + 1) as int64 for the task causal, in an ``AnswerBatch`` with its mask if it was
        given one; the unchanged batch for other tasks.

    Raises:
        DataError: If the batch has another type, shape or dtype, or if a token id is out of range.
    """
    if config.task != "causal":
        kind = {"masked": MaskedBatch, "classify": LabelledBatch}[config.task]
        if not isinstance(batch, kind):
            found, name = type(batch).__name__, f"{kind.__module__}.{kind.__name__}"
            raise DataError(f"batch: has type {found}; task={config.task} expects {name}")
        return batch
    if isinstance(batch, AnswerBatch):
        rows = checked_batch(batch.rows, config, first)
        if batch.mask.dtype != torch.bool or batch.mask.shape != rows[:, 1:].shape:
            found = f"dtype {str(batch.mask.dtype)[6:]} and shape {tuple(batch.mask.shape)}"
            raise DataError(f"batch.mask: has {found}; expected bool of shape {tuple(rows[:, 1:].shape)}")
        return batch._replace(rows=rows)
    if isinstance(batch, (list, tuple)) and len(batch) == 1:
        batch = batch[0]
    expected = "expected token ids of shape (B, L + 1), inputs and targets in one integer tensor"
    if not isinstance(batch, Tensor):
        raise DataError(f"batch: has type {type(batch).__name__}; {expected}")
    if batch.dim() != 2 or batch.shape[1] < 2 or batch.is_floating_point() or batch.is_complex():
        raise DataError(f"batch: has dtype {str(batch.dtype)[6:]} and shape {tuple(batch.shape)}; {expected}")
    rows, size = batch.long(), config.model.vocab_size
    if first and not bool(((rows >= 0) & (rows < size)).all()):
        low, high = int(rows.min()), int(rows.max())
        raise DataError(f"batch: has token ids from {low} to {high}, but model.vocab_size is {size}")
    return rows


def tokens_in(batch: Any) -> int:
    """Return the number of input tokens in a validated batch: B * L for token ids of shape (B, L + 1)."""
    if isinstance(batch, AnswerBatch):
        batch = batch.rows
    return int(batch[:, 1:].numel() if isinstance(batch, Tensor) else batch.tokens.numel())


def schedule_steps(trainer: lightning.Trainer, config: Config) -> int:
    """Return the length of the learning-rate schedule in optimizer steps.

    This is ``max_steps`` of the trainer, or the number of steps in its epochs. If both are unknown it is
    ``trainer.max_steps`` of the configuration, and a schedule with an end causes a warning.
    """
    if own_data(trainer) is not None:
        return config.trainer.max_steps
    steps = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
    if 0 < steps < math.inf:
        return int(steps)
    if config.optim.schedule in ("cosine", "wsd"):
        warnings.warn(
            f"Trainer: does not know how many steps it will run, so the {config.optim.schedule} schedule "
            f"ends at step {config.trainer.max_steps} (trainer.max_steps of the configuration); "
            "pass max_steps to Trainer",
            stacklevel=2,
        )
    return config.trainer.max_steps
