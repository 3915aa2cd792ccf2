"""Progress bar for training in a terminal: steps, loss, throughput, remaining time and validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.progress import TimeRemainingColumn as Remaining

from tnnlm.training.lit_module import LitModel
from tnnlm.training.loggers.names import METRICS


def fitting(metrics: Mapping[str, float], room: int) -> str:
    """Return the metrics of the progress bar that fit into ``room`` characters, losses first."""
    named = [metric for metric in METRICS if metric.short and metric.column in metrics]
    named.sort(key=lambda metric: metric.unit == "tokens/s" or metric.short == "norm")
    kept: list[str] = []
    for metric in named:
        value = float(metrics[metric.column])
        text = f"{metric.short} {f'{value:,.0f}' if 1e4 <= value < 1e9 else f'{value:.4g}'}"
        if len("  ".join([*kept, text])) <= room:
            kept.append(text)
    return "  ".join(kept)


class TrainingBar(ProgressBar):
    """Progress bar that counts optimizer steps; Lightning's counts batches of an epoch."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._bar = 40 if console.width > 110 else 8
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(self._bar),
            MofNCompleteColumn(),
            Elapsed(),
            TextColumn("left"),
            Remaining(),
            TextColumn("{task.fields[shown]}"),
            console=console,
        )
        self._training = self.bar.add_task("training", shown="")
        self._validation = self.bar.add_task("validating", shown="", visible=False)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the bar."""
        self.bar.reset(self._training, total=trainer.max_steps, completed=trainer.global_step)
        self.bar.start()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Advance to the current optimizer step and show the latest metrics."""
        columns = f"validating  {trainer.max_steps}/{trainer.max_steps} 0:00:00 left 0:00:00 "
        room = self.bar.console.width - self._bar - len(columns)
        shown = fitting(trainer.progress_bar_metrics, room)
        self.bar.update(self._training, completed=trainer.global_step, shown=shown)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show a second bar during validation."""
        total = int(sum(trainer.num_val_batches))
        both = isinstance(pl_module, LitModel) and pl_module.task.converts
        self.bar.reset(
            self._validation, total=total, visible=True, shown="parallel and recurrent" if both else ""
        )

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Advance the validation bar."""
        self.bar.advance(self._validation)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Hide the validation bar."""
        self.bar.update(self._validation, visible=False)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop the bar and leave it on the screen."""
        self.bar.stop()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Stop the bar to restore the terminal."""
        self.bar.stop()
