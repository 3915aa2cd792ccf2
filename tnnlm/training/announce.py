"""Lines before a run: its sizes, memory and data, and warnings about settings that don't fit together."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tnnlm.config.consistency import LARGE_RECURRENCES
from tnnlm.config.schema import Config
from tnnlm.conversion.companion import OWN_METHODS
from tnnlm.conversion.horizon import auto_horizon
from tnnlm.data.report import DataReport
from tnnlm.models.surgery import all_decay, kernels
from tnnlm.training.attached import Attached, attached_recurrences
from tnnlm.training.estimate import estimate_run
from tnnlm.training.loggers.console import show_line
from tnnlm.training.memory import RunMemory
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
    frozen = f" and {plan.frozen:,} frozen ones" if plan.frozen else ""
    line = (
        f"{folder}: {plan.params:,} parameters{frozen}, {config.trainer.max_steps:,} steps of "
        f"{plan.tokens_per_update:,} tokens, {plan.precision}{resumed}"
    )
    repeated = repeated_steps(folder, source, step or 0)
    for shown in (line, *repeated, *report.lines()):
        show_line(shown)
    if (large := _large_recurrences(config)) is not None:
        show_line(large)
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


def _large_recurrences(config: Config) -> str | None:
    """Return the line on the recurrences of a run if they are large, else None."""
    if config.task != "causal":
        return None
    try:
        attached = attached_recurrences(config)
    except Exception:  # a kernel that can't be converted trains all the same, and saving warns of it
        return None
    large = attached.nbytes(config.model.n_layers) >= LARGE_RECURRENCES
    return attached_line(config, attached) if large else None


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


def memory_lines(config: Config, memory: RunMemory) -> list[str]:
    """Return the parts of the estimated memory of a run, a line each."""
    buckets = f", {in_units(memory.buckets)} of it buckets of DDP" if memory.buckets else ""
    lines = [
        f"  weights, gradients and moments: {in_units(memory.state)}{buckets}",
        f"  at most in an optimizer step: {in_units(memory.step)}",
        f"  at most in a validation: {in_units(memory.validation)}",
    ]
    return lines if memory.attached is None else [*lines, attached_line(config, memory.attached)]


def attached_line(config: Config, attached: Attached) -> str:
    """Return the line on the recurrences that a run attaches, with a smaller choice if there may be one."""
    recipe = config.conversion
    size = in_units(attached.nbytes(config.model.n_layers))
    line = (
        f"each checkpoint and validation holds recurrences of {size} (conversion.method={recipe.method}, "
        f"horizon {attached.horizon:,})"
    )
    if recipe.method in ("etsc", "window"):
        return f"{line}; conversion.method=auto selects the smallest within conversion.tolerance"
    return line


def in_units(size: int) -> str:
    """Return a number of bytes in MiB, or in GiB from 1 GiB on."""
    return f"{size / 2**20:,.0f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"
