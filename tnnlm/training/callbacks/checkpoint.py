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
from torch.distributed.tensor import DTensor

from tnnlm.checkpoints.locate import LAST, PREVIOUS
from tnnlm.checkpoints.training import ENTRY, AttachedSSM, attached_ssm, checkpoint_entry
from tnnlm.config.schema import Config
from tnnlm.conversion import convert_kernels
from tnnlm.errors import CheckpointError, command
from tnnlm.files import atomic_file
from tnnlm.kernels import Kernel
from tnnlm.training.callbacks.ema import AveragedWeights
from tnnlm.training.fsdp import gather_kernels, is_sharded
from tnnlm.training.lit_module import LitModel, tokenizer_of

TIME_LIMIT: int | None = getattr(signal, "SIGUSR1", None)
"""what a cluster sends some time before it ends a job; Windows has no such signal"""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([] if TIME_LIMIT is None else [TIME_LIMIT]))
"""those that end a training at the next step border"""


NOTHING_SAVED = "nothing was saved yet; start again"


class TrainingStopped(Exception):
    """The training was asked to stop; the run was saved at a step border, if there was a step.

    ``time_limit`` is set if a cluster asked for it, whose time for the job is nearly up.
    """

    def __init__(self, step: int, run: Path, time_limit: bool = False, saved: bool = True) -> None:
        go_on = f"saved; go on with: {command('train')} --resume {run}"
        super().__init__(f"stopped after step {step}, {go_on if saved else NOTHING_SAVED}")
        self.step = step
        self.time_limit = time_limit


class TrainingDiverged(CheckpointError):
    """The model is lost, or about to be: the run was stopped, the last good checkpoint kept."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all: a full disk leaves the one before.

    Of ``last.ckpt`` the one before is kept as ``previous.ckpt``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside, flush to the disk, rename.

        Raises:
            OSError: if the disk is full.
        """
        path = Path(path)
        with atomic_file(path) as temporary:
            with temporary.open("wb") as file:
                try:
                    torch.save(checkpoint, file)
                except RuntimeError as error:
                    # torch stumbles once more while it closes the file that could not be written.
                    cause = error.__context__
                    if not isinstance(cause, OSError) or cause.errno is None:
                        raise
                    raise OSError(cause.errno, os.strerror(cause.errno), str(path)) from None
                file.flush()
                os.fsync(file.fileno())
            # Not before the new one is on the disk: until then the older one may be needed.
            if path.name == LAST.name and path.exists():
                second_name(path, path.with_name(PREVIOUS.name))


def second_name(path: Path, name: Path) -> None:
    """Give a file a second name, in place of what had it: at no moment is ``path`` missing.

    Where the file system knows no hard links, ``path`` gets the name and loses its own.
    """
    beside = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)
    try:
        os.link(path, beside)
    except OSError:
        os.replace(path, name)
        return
    os.replace(beside, name)
    # Renaming does nothing where both are names of one file already.
    beside.unlink(missing_ok=True)


class AttachRecurrences(Callback):
    """Attaches configuration, tokenizer and, where the task has them, converted kernels to every checkpoint.

    Where weights are averaged the kernels of the average are converted: those that the checkpoint
    holds. Runs on every rank, before the file is written: no files. Sharded kernels are gathered on all
    ranks first, as Lightning has gathered the weights just before; the rest is done by the rank that
    writes. If the conversion fails the checkpoint is saved without it, and a warning says why.
    """

    def __init__(self, config: Config, average: AveragedWeights | None = None) -> None:
        self.config = config
        self.average = average

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add our entry."""
        saved = self.average.averaged(pl_module) if self.average else pl_module
        assert isinstance(saved, LitModel)
        ssm = self._recurrence(trainer, saved) if saved.task.converts else None
        if trainer.is_global_zero:
            checkpoint[ENTRY] = checkpoint_entry(self.config, tokenizer_of(trainer), ssm)

    def _recurrence(self, trainer: lightning.Trainer, saved: LitModel) -> AttachedSSM | None:
        recipe = self.config.conversion
        found = [kernel for kernel in gather_kernels(saved.model) if isinstance(kernel, Kernel)]
        if not trainer.is_global_zero:
            return None
        try:
            horizon, layers = convert_kernels(found, self.config.model.max_length, recipe)
            return attached_ssm([layer.params for layer in layers], recipe.method, horizon)
        except Exception as error:  # losing the checkpoint would be worse, whatever the reason
            warnings.warn(f"checkpoint saved without its recurrence: {error}", stacklevel=2)
            return None


class CheckpointLast(Callback):
    """Keeps ``last.ckpt``: at the start, every so many steps, at the end, and when asked to stop.

    It is saved once a step is logged and validated, so that what a killed run wrote up to its
    checkpoint is complete. The first Ctrl-C, SIGTERM, or SIGUSR1 (a cluster's time limit) finishes
    the step, saves and raises :class:`TrainingStopped`; a second Ctrl-C interrupts at once. On
    several ranks all stop at the same step. A model that is not finite is never saved.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self.path = path
        self.every_n_steps = every_n_steps
        self.seconds_before = 0.0
        self.saved_step: int | None = None
        """step of the checkpoint that a killed run would go on from"""
        self._started = time.perf_counter()
        self._received: set[int] = set()
        self._step = 0
        self._at_border = True
        self._handlers: dict[int, Any] = {}

    @property
    def train_seconds(self) -> float:
        """Seconds of training and validation, earlier parts of a resumed run included."""
        return self.seconds_before + time.perf_counter() - self._started

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.path.parents[1]

    @property
    def state_key(self) -> str:
        """Of its state in a checkpoint, as in files of version 0.1.0."""
        return "SaveLast"

    def state_dict(self) -> dict[str, Any]:
        """The time so far."""
        return {"train_seconds": self.train_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seconds_before = state_dict["train_seconds"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take the signals over; save a new run, so that it can be resumed whenever it is killed."""
        self._started = time.perf_counter()
        self._step = trainer.global_step
        self.path = trainer.strategy.broadcast(self.path)
        self._handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in self._handlers:
            signal.signal(number, self._request)
        assert isinstance(pl_module, LitModel)
        if self._step:
            self.saved_step = self._step
        # To gather moments of shards that aren't there yet, torch takes a step of zeros, which counts.
        elif not is_sharded(pl_module.model):
            self._save(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop here, after the last step was logged and validated, and at step borders only:
        between micro-batches the gradient would be lost."""
        if not self._at_border:
            return
        stop = trainer.strategy.reduce_boolean_decision(bool(self._received), all=False)
        new = self._step not in (0, self.saved_step)
        if new and (stop or self._step % self.every_n_steps == 0):
            self._save(trainer, pl_module)
        if stop:
            limit = TIME_LIMIT is not None and TIME_LIMIT in self._received
            limit = trainer.strategy.reduce_boolean_decision(limit, all=False)
            raise TrainingStopped(self._step, self.run, limit, self.saved_step is not None)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Notice whether this batch ended an optimizer step."""
        self._at_border = trainer.global_step != self._step
        self._step = trainer.global_step

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Refuse to validate, and so to save as the best, a model that is not finite."""
        self.check_finite(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the finished run."""
        self._save(trainer, pl_module)
        self._restore()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._restore()

    def check_finite(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop on all ranks if a weight on any of them is NaN or infinite.

        Raises:
            TrainingDiverged: naming the last good checkpoint.
        """
        with torch.no_grad():
            finite = [_local(parameter).isfinite().all() for parameter in pl_module.parameters()]
        if not trainer.strategy.reduce_boolean_decision(bool(torch.stack(finite).all()), all=True):
            raise self.diverged(trainer.global_step, "the weights are no longer finite")

    def diverged(self, step: int, reason: str) -> TrainingDiverged:
        """What to raise when training can't go on, saying how it can."""
        go_on = NOTHING_SAVED
        if self.saved_step is not None:
            go_on = (
                f"the last good checkpoint is {self.path} of step {self.saved_step}; go on from it with "
                f"other settings, for example: {command('train')} --resume {self.run} optim.lr=..."
            )
        return TrainingDiverged(f"stopped after step {step}: {reason}", go_on)

    def _save(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.check_finite(trainer, pl_module)
        trainer.save_checkpoint(self.path)
        self.saved_step = trainer.global_step

    def _request(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self._received:
            raise KeyboardInterrupt
        self._received.add(number)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a parameter that several share."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
