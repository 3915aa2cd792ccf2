"""Checkpointing: atomic files, saved between optimizer steps."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor

from tnnlm.checkpoints.archive import write_archive
from tnnlm.checkpoints.locate import LAST, PREVIOUS
from tnnlm.checkpoints.shards import SHARDS, assemble
from tnnlm.checkpoints.training import delete_unreferenced
from tnnlm.errors import CheckpointError, command
from tnnlm.files import atomic_file
from tnnlm.files.leftovers import temporary_path
from tnnlm.signals import HANGUP, leave_closed_terminal
from tnnlm.training.agreement import HostAgreement
from tnnlm.training.fsdp import is_sharded
from tnnlm.training.lit_module import LitModel
from tnnlm.training.sharded_save import ShardedSaves
from tnnlm.training.sharded_strategy import background_saves

TIME_LIMIT: int | None = getattr(signal, "SIGUSR1", None)
"""Signal that a cluster sends some time before it ends a job; None on Windows, which lacks it."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *(n for n in (HANGUP, TIME_LIMIT) if n is not None))
"""Signals that stop a training at the end of the current optimizer step."""


NOTHING_SAVED = "nothing was saved yet; start again"
"""Advice in errors of a run that has no checkpoint yet."""


class TrainingStopped(Exception):
    """Training was stopped by a signal at the end of a step; the message tells how to resume.

    Args:
        step: Last optimizer step.
        run: Folder of the run.
        time_limit: Whether the signal was a cluster's time limit.
        saved: Whether the run has a checkpoint. A sharded run has none before its first step.
    """

    def __init__(self, step: int, run: Path, time_limit: bool = False, saved: bool = True) -> None:
        advice = f"saved; resume with: {command('train', '--resume', run)}"
        super().__init__(f"stopped after step {step}, {advice if saved else NOTHING_SAVED}")
        self.step = step
        self.time_limit = time_limit


class TrainingDiverged(CheckpointError):
    """Training diverged and was stopped; the last good checkpoint is kept."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin that writes files atomically, so that a full disk keeps the existing checkpoint.

    Saving ``last.ckpt`` keeps its predecessor as ``previous.ckpt``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write to a temporary file, flush it to the disk and rename it.

        Raises:
            OSError: If the disk is full.
        """
        path = Path(path)
        with atomic_file(path) as temporary:
            write_archive(checkpoint, temporary, path)
            # previous.ckpt may be needed until the new checkpoint is on the disk.
            if path.name == LAST.name and path.exists():
                second_name(path, path.with_name(PREVIOUS.name))
        # The writer of shards does so after its index files.
        if path.name == LAST.name and SHARDS not in checkpoint:
            delete_unreferenced(path.parent)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load a checkpoint of either format, whose tensors are memory-mapped on a machine with a GPU.

        Every rank loads the file, and ranks on one machine then share the page cache instead of holding a
        copy each. Without a GPU the tensors are read, because an optimizer on the CPU keeps the tensors that
        it loads.
        """
        mapped = torch.cuda.is_available()
        data = torch.load(path, map_location=map_location, weights_only=weights_only, mmap=mapped)
        return assemble(Path(path), data)


def second_name(path: Path, name: Path) -> None:
    """Hard-link ``path`` to ``name``, replacing an existing file; ``path`` exists at every moment.

    On file systems without hard links, ``path`` is renamed to ``name`` instead.
    """
    temporary = temporary_path(name)
    try:
        os.link(path, temporary)
    except OSError:
        os.replace(path, name)
        return
    os.replace(temporary, name)
    # Renaming does nothing if both are links to the same file already.
    temporary.unlink(missing_ok=True)


class CheckpointLast(Callback):
    """Callback that saves ``last.ckpt``: at the start, every N steps, at the end, and on a stop signal.

    A step is saved after it was logged and validated, so that the logs of a killed run are complete up to its
    checkpoint. On the first Ctrl-C, SIGTERM, SIGHUP (a closed terminal, unless nohup ignores it) or
    SIGUSR1 (a cluster's time limit) the step is finished and saved, and :class:`TrainingStopped` is raised; a
    second Ctrl-C interrupts immediately. All ranks stop at
    the same step. Weights that are not finite are never saved.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self.path = path
        self.every_n_steps = every_n_steps
        self.seconds_before = 0.0
        self.saved_step: int | None = None
        """Step of the last checkpoint that is valid; None before the first one."""
        self._begun_step: int | None = None
        """Step of the last checkpoint that is valid or is being written."""
        self._background: ShardedSaves | None = None
        self._started = time.perf_counter()
        self._received: set[int] = set()
        self._agreement = HostAgreement()
        self._step = 0
        self._at_border = True
        self._handlers: dict[int, Any] = {}

    @property
    def train_seconds(self) -> float:
        """Seconds of training and validation, including those before the run was resumed."""
        return self.seconds_before + time.perf_counter() - self._started

    @property
    def run(self) -> Path:
        """Folder of the run."""
        return self.path.parents[1]

    @property
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints, unchanged since version 0.1.0."""
        return "SaveLast"

    def state_dict(self) -> dict[str, Any]:
        """Return the training time so far."""
        return {"train_seconds": self.train_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the training time."""
        self.seconds_before = state_dict["train_seconds"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Install the signal handlers, and save a new run so that it can be resumed from the start."""
        self._started = time.perf_counter()
        self._step = trainer.global_step
        self.path = trainer.strategy.broadcast(self.path)
        found = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        # Under nohup, SIGHUP is ignored and stays so.
        self._handlers = {n: one for n, one in found.items() if n != HANGUP or one is not signal.SIG_IGN}
        for number in self._handlers:
            signal.signal(number, self._request)
        assert isinstance(pl_module, LitModel)
        self._background = background_saves(trainer.strategy)
        if self._step:
            self.saved_step = self._begun_step = self._step
        # For a sharded model, torch would initialise the missing optimizer state by a step with zero
        # gradients, which counts as a step.
        elif not is_sharded(pl_module.model):
            self._save(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save if due and stop if requested, after the last step was logged and validated.

        This only happens between optimizer steps: between micro-batches the gradient would be lost.
        """
        if not self._at_border:
            return
        stop = self._agreement.any(trainer.strategy, bool(self._received))
        new = self._step not in (0, self._begun_step)
        if new and (stop or self._step % self.every_n_steps == 0):
            self._save(trainer, pl_module)
        if stop:
            self._finish()
            limit = TIME_LIMIT is not None and TIME_LIMIT in self._received
            limit = trainer.strategy.reduce_boolean_decision(limit, all=False)
            raise TrainingStopped(self._step, self.run, limit, self.saved_step is not None)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Record whether this batch completed an optimizer step."""
        self._at_border = trainer.global_step != self._step
        self._step = trainer.global_step

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop if the weights are not finite, before they could be saved as the best checkpoint."""
        self.check_finite(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the finished run and restore the signal handlers."""
        self._save(trainer, pl_module)
        self._finish()
        self._restore()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Restore the signal handlers, and finish a save, so that the advice on resuming is right."""
        self._restore()
        if isinstance(exception, Exception):
            # The first error is the one to report.
            with suppress(Exception):
                self._finish()

    def check_finite(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Raise an error on all ranks if a weight on any rank is NaN or infinite.

        Raises:
            TrainingDiverged: If a weight is not finite. The message names the last good checkpoint.
        """
        with torch.no_grad():
            finite = [_local(parameter).isfinite().all() for parameter in pl_module.parameters()]
        if not trainer.strategy.reduce_boolean_decision(bool(torch.stack(finite).all()), all=True):
            raise self.diverged(trainer.global_step, "the weights are no longer finite")

    def diverged(self, step: int, reason: str) -> TrainingDiverged:
        """Return the error for diverged training, with advice on how to resume; call it on all ranks."""
        self._finish()
        advice = NOTHING_SAVED
        if self.saved_step is not None:
            advice = (
                f"the last good checkpoint is {self.path} of step {self.saved_step}; resume from it with "
                f"other settings, for example: {command('train', '--resume', self.run)} optim.lr=..."
            )
        return TrainingDiverged(f"stopped after step {step}: {reason}", advice)

    def _save(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.check_finite(trainer, pl_module)
        if self._begun_step != trainer.global_step:
            self._finish()
        trainer.save_checkpoint(self.path)
        self._begun_step = trainer.global_step
        if self._background is None:
            self.saved_step = self._begun_step

    def _finish(self) -> None:
        """Wait until a checkpoint that is written in the background is valid.

        Raises:
            OSError: If it can't be written; ``saved_step`` is then that of the one before.
        """
        if self._background is None:
            return
        try:
            self._background.finish()
        finally:
            step = self._background.saved_step(self.path)
            self.saved_step = self._begun_step = self.saved_step if step is None else step

    def _request(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self._received:
            raise KeyboardInterrupt
        if number == HANGUP:
            leave_closed_terminal()
        self._received.add(number)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a sharded parameter, or the parameter itself."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
