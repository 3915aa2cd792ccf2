"""Lines at the start of a run: its sizes, its data, and warnings about settings that don't fit together."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tnnlm.config.schema import Config
from tnnlm.data.report import DataReport
from tnnlm.models.surgery import all_decay
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
    if config.task == "causal" and config.conversion.method == "etsc" and not all_decay(model):
        show_line(
            "warning: the recurrence in checkpoints (conversion.method=etsc) is exact below its horizon "
            f"only, because the kernel {config.model.kernel.name} has no decay; conversion.method=auto keeps "
            "its tolerance on longer texts"
        )
