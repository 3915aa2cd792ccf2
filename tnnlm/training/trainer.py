"""Construction of Lightning's Trainer from a configuration: callbacks, loggers, devices and precision."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import Strategy
from rich.console import Console

from tnnlm.config.schema import Config
from tnnlm.data.report import DataReport
from tnnlm.errors import ConfigError
from tnnlm.training.callbacks.best import BestCheckpoint
from tnnlm.training.callbacks.checkpoint import AtomicCheckpointIO
from tnnlm.training.callbacks.ema import averaging
from tnnlm.training.callbacks.progress import TrainingBar
from tnnlm.training.callbacks.recurrences import AttachRecurrences
from tnnlm.training.callbacks.samples import SampleWriter
from tnnlm.training.callbacks.validation import ValidationSchedule
from tnnlm.training.components import named_callbacks, named_loggers, named_profiler
from tnnlm.training.estimate import SHARDING, resolve_accelerator, resolve_devices, resolve_precision
from tnnlm.training.loggers.console import PlainLines
from tnnlm.training.loggers.csv import MetricsCSV
from tnnlm.training.loggers.wandb import wandb_logger
from tnnlm.training.slurm import cluster_plugins
from tnnlm.training.tasks import VALIDATION_TASKS


def build_trainer(
    config: Config,
    strategy: str | Strategy,
    folder: Path,
    resume_step: int | None,
    callbacks: list[Callback],
    report: DataReport,
) -> lightning.Trainer:
    """Build the trainer of a run.

    Args:
        config: The full configuration.
        strategy: Strategy for Lightning's Trainer.
        folder: Folder of the run.
        resume_step: Step to resume from; None for a new run.
        callbacks: Callbacks to add before the one that saves the best checkpoint.
        report: Report of the data, whose first prompt is that of the samples if ``trainer.sample_prompt`` is
            null.

    Raises:
        ConfigError: If the accelerator or the strategy is not available on this machine.
    """
    settings = config.trainer
    at_terminal = sys.stdout.isatty()
    options = dict[str, Any](
        **step_options(config),
        num_nodes=settings.num_nodes,
        strategy=strategy,
        # FSDP2 can't train on tensors that were gathered in inference mode during validation.
        inference_mode=settings.strategy not in SHARDING,
        log_every_n_steps=1,  # LitModel applies trainer.log_every_n_steps
        enable_progress_bar=at_terminal,
        default_root_dir=folder,
        plugins=[AtomicCheckpointIO(), *cluster_plugins()],
        profiler=named_profiler(config, folder),
        logger=_loggers(config, folder, resume_step, at_terminal),
        callbacks=_callbacks(config, folder, callbacks, at_terminal, report.prompts),
    )
    try:
        trainer = lightning.Trainer(**options)
    except (ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
        chosen = f"trainer.accelerator={settings.accelerator} trainer.strategy={settings.strategy}"
        raise ConfigError(f"{chosen}: {str(error).splitlines()[0]}") from None
    # At every batch Lightning broadcasts whether rank 0 received SIGTERM, and waits for the GPU to answer.
    # CheckpointLast handles this signal, and agrees on a stop among the host processes.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _do_nothing  # type: ignore[method-assign]
    return trainer


def _do_nothing() -> None:
    pass


def step_options(config: Config) -> dict[str, Any]:
    """Return the Trainer options that determine the optimizer steps and the devices."""
    return {
        "accelerator": resolve_accelerator(config),
        "devices": resolve_devices(config),
        "precision": resolve_precision(config),
        "max_steps": config.trainer.max_steps,
        "accumulate_grad_batches": config.trainer.accumulate,
        "gradient_clip_val": config.optim.grad_clip or None,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
    }


def _loggers(config: Config, folder: Path, resume_step: int | None, at_terminal: bool) -> list[Logger]:
    # Steps after the checkpoint will be logged again.
    redone = None if resume_step is None else resume_step + 1
    loggers: list[Logger] = [
        MetricsCSV(folder / "metrics.csv", config, resume_step),
        TensorBoardLogger(folder, name="", version="tensorboard", purge_step=redone),
    ]
    if not at_terminal:
        loggers.append(PlainLines(config.trainer.max_steps))
    if config.trainer.wandb is not None:
        loggers.append(wandb_logger(config, folder))
    loggers += named_loggers(config, folder)
    return loggers


def _callbacks(
    config: Config, folder: Path, given: list[Callback], at_terminal: bool, prompts: Sequence[str]
) -> list[Callback]:
    settings = config.trainer
    task, average = VALIDATION_TASKS[config.task], averaging(config)
    prompt = settings.sample_prompt
    samples = SampleWriter(
        folder / "samples.txt",
        next(iter(prompts), "") if prompt is None else prompt,
        settings.sample_tokens,
        chat=config.data.format != "text",
    )
    return [
        *([TrainingBar(Console())] if at_terminal else []),
        ValidationSchedule(settings.val_every_n_steps),
        *average,  # before the callbacks that save
        AttachRecurrences(config, *average),
        *([samples] if task.converts else []),
        *given,
        *named_callbacks(config),
        BestCheckpoint(folder, task),
    ]
