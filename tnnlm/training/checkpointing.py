"""When and how a run is saved: whole files only, at step borders, the recurrence attached."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from tnnlm.atomic import atomic_file
from tnnlm.checkpoint import ENTRY, attached_ssm, checkpoint_entry
from tnnlm.config import Config
from tnnlm.conversion import convert_layers
from tnnlm.training.averaging import AveragedWeights
from tnnlm.training.lit_module import LitCausalLM, corpus_of


class TrainingStopped(Exception):
    """The user stopped the training; the run was saved at a step border."""

    def __init__(self, step: int, run: Path) -> None:
        super().__init__(f"stopped after step {step}, saved; go on with: python train.py --resume {run}")
        self.step = step


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all: a full disk leaves the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside, flush to the disk, rename.

        Raises:
            OSError: if the disk is full.
        """
        with atomic_file(Path(path)) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch stumbles once more while it closes the file that could not be written.
                cause = error.__context__
                if not isinstance(cause, OSError) or cause.errno is None:
                    raise
                raise OSError(cause.errno, os.strerror(cause.errno), str(path)) from None


class ConversionCallback(Callback):
    """Attaches configuration, tokenizer and the converted kernels to every checkpoint.

    Where weights are averaged the kernels of the average are converted: those that the checkpoint
    holds. Runs on every rank and inside signal handlers: pure, no files, no collectives. If the
    conversion fails the checkpoint is saved without it, and a warning says why.
    """

    def __init__(self, config: Config, average: AveragedWeights | None = None) -> None:
        self.config = config
        self.average = average

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add our entry."""
        saved = self.average.averaged(pl_module) if self.average else pl_module
        assert isinstance(saved, LitCausalLM)
        recipe = self.config.conversion
        ssm = None
        try:
            horizon, layers = convert_layers(saved.model, recipe)
            ssm = attached_ssm(layers, recipe.method, horizon)
        except Exception as error:  # losing the checkpoint would be worse, whatever the reason
            warnings.warn(f"checkpoint saved without its recurrence: {error}", stacklevel=2)
        checkpoint[ENTRY] = checkpoint_entry(self.config, corpus_of(trainer).tokenizer, ssm)


class SaveLast(Callback):
    """Keeps ``last.ckpt``: every so many steps, at the end, and when the user presses Ctrl-C.

    The first Ctrl-C (or SIGTERM) finishes the step, saves and raises :class:`TrainingStopped`; a
    second one interrupts at once. On several ranks all stop at the same step.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self.path = path
        self.every_n_steps = every_n_steps
        self.seconds_before = 0.0
        self._started = time.perf_counter()
        self._requested = False
        self._step = 0
        self._at_border = True
        self._handlers: dict[int, Any] = {}

    @property
    def train_seconds(self) -> float:
        """Seconds of training and validation, earlier parts of a resumed run included."""
        return self.seconds_before + time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        """The time so far."""
        return {"train_seconds": self.train_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seconds_before = state_dict["train_seconds"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take over Ctrl-C."""
        self._started = time.perf_counter()
        self._step = trainer.global_step
        self.path = trainer.strategy.broadcast(self.path)
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._handlers:
            signal.signal(number, self._request)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop here, after the last step was logged and validated, and at step borders only."""
        if self._at_border and trainer.strategy.reduce_boolean_decision(self._requested, all=False):
            trainer.save_checkpoint(self.path)
            raise TrainingStopped(trainer.global_step, self.path.parents[1])

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save at step borders only: between micro-batches the gradient would be lost."""
        self._at_border = trainer.global_step != self._step
        self._step = trainer.global_step
        if self._at_border and self._step % self.every_n_steps == 0:
            trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the finished run."""
        trainer.save_checkpoint(self.path)
        self._restore()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Give Ctrl-C back."""
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
