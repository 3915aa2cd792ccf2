"""Lines at the start of a run: its sizes, its data, and warnings about settings that don't fit together."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tnnlm.config.schema import Config
from tnnlm.conversion.companion import OWN_METHODS
from tnnlm.conversion.horizon import auto_horizon
from tnnlm.data.report import DataReport
from tnnlm.models.surgery import all_decay, kernels
from tnnlm.training.estimate import estimate_run
from tnnlm.training.loggers.console import show_line
from tnnlm.training.resume import repeated_steps


def announce(
    config: Config,
    model: nn.Module,
    folder: Path,
    report: DataReport,
    source: Path | None,
    step: int | None,
) -> None:
    """Print the sizes of a run and its data.

    Args:
        config: Configuration of the run.
        model: Model of the run, in its parallel form.
        folder: Folder of the run.
        report: Report of its data.
        source: Checkpoint that it resumes from; None for a new run.
        step: Step of that checkpoint; None for a new run.
    """
    plan = estimate_run(config)
    resumed = "" if step is None else f", continuing at step {step}"
    line = (
        f"{folder}: {plan.params:,} parameters, {config.trainer.max_steps:,} steps of "
        f"{plan.tokens_per_update:,} tokens, {plan.precision}{resumed}"
    )
    repeated = repeated_steps(folder, source, step or 0)
    for shown in (line, *repeated, *report.lines()):
        show_line(shown)
    warmup, steps = config.optim.warmup_steps, config.trainer.max_steps
    if warmup > steps:
        show_line(
            f"warning: optim.warmup_steps={warmup:,} is above trainer.max_steps={steps:,}; the learning rate "
            f"only reaches {steps / warmup:.0%} of optim.lr"
        )
    if (short := _short_horizon(config, model)) is not None:
        show_line(short)
    if config.task == "causal" and config.conversion.method == "etsc" and not all_decay(model):
        show_line(
            "warning: the recurrence in checkpoints (conversion.method=etsc) is exact below its horizon "
            f"only, because the kernel {config.model.kernel.name} has no decay; conversion.method=auto keeps "
            "its tolerance on longer texts"
        )


def _short_horizon(config: Config, model: nn.Module) -> str | None:
    """Return a warning if ``conversion.horizon`` omits lags of the initial kernels, else None."""
    horizon, length = config.conversion.horizon, config.model.max_length
    # A recurrence that the kernel defines is exact at every lag.
    if config.task != "causal" or horizon == "auto" or config.conversion.method in OWN_METHODS:
        return None
    needed = max(auto_horizon(kernel, length) or length for kernel in kernels(model))
    if int(horizon) >= needed:
        return None
    return (
        f"warning: conversion.horizon={horizon} is below the {needed:,} lags that auto selects for the "
        f"initial kernels: the recurrence in checkpoints differs from position {horizon} on; "
        "set conversion.horizon=auto"
    )
