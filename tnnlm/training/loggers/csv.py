"""What a run writes while it trains: metrics.csv, plain lines where there is no terminal, samples."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console

from tnnlm.config.schema import Config
from tnnlm.files import write_text
from tnnlm.inference.generator import Sampling, TextGenerator
from tnnlm.models.causal_lm import CausalLM
from tnnlm.training.lit_module import LitModel, tokenizer_of
from tnnlm.training.tasks import TASKS, CausalTask
from tnnlm.training.throughput import LENGTH, memory_columns

COLUMNS = (
    "step",
    "train/loss",
    "train/lr",
    "train/tokens_per_second",
    "train/skipped",
    "train/step_seconds",
    "train/data_seconds",
    "train/grad_norm",
    "train/tflops",
    "train/memory_gib",
)
"""of metrics.csv; behind them come those of the task's validations, and of every layer"""
_SHOWN = (
    "train/loss",
    "train/lr",
    "train/tokens_per_second",
    "train/data_seconds",
    "train/grad_norm",
    "val/ppl",
    "val/bpb",
    "val/ppl_recurrent",
    "val/ppl_gap",
    "val/ppl_masked",
    "val/accuracy",
)
"""on the lines of a batch log"""


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv; cells that were not logged are empty."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def whole_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv but for a last one that was cut short."""
    rows = read_metrics(path)
    cut = bool(rows) and not path.read_bytes().endswith(b"\n")
    return rows[:-1] if cut else rows


class MetricsCSV(Logger):
    """metrics.csv, a row per log, on the disk at once. Lightning's own deletes the file on resume."""

    def __init__(self, path: Path, config: Config, resume_step: int | None = None) -> None:
        super().__init__()
        self.path = path
        self.columns = (*COLUMNS, *TASKS[config.task].columns, *memory_columns(config.model.n_layers))
        self.resume_step = resume_step

    @property
    def name(self) -> str:
        """For Lightning."""
        return "csv"

    @property
    def version(self) -> str:
        """For Lightning."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row."""
        if not self.path.exists() or self.resume_step is not None:
            self._start()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, extrasaction="ignore").writerow({"step": step, **metrics})

    def _start(self) -> None:
        # A resumed run goes on from its checkpoint: rows that came after it will be logged again.
        border = self.resume_step
        # A row that a full disk cut short is one of these: a checkpoint is saved after its rows.
        rows = [] if border is None else [r for r in whole_rows(self.path) if int(r["step"]) <= border]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())
        self.resume_step = None


class PlainLines(Logger):
    """A line per log, for output that is no terminal."""

    def __init__(self, max_steps: int) -> None:
        super().__init__()
        self.max_steps = max_steps
        self.console = Console()

    @property
    def name(self) -> str:
        """For Lightning."""
        return "lines"

    @property
    def version(self) -> str:
        """For Lightning."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: they were shown before training."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write the line."""
        shown = [
            f"{key.removeprefix('train/')} {value:.5g}" for key, value in metrics.items() if key in _SHOWN
        ]
        lags = [int(value) for key, value in metrics.items() if key.startswith(LENGTH)]
        if lags:
            shown.append(f"lags {min(lags)} to {max(lags)}")
        line = f"step {step}/{self.max_steps}  " + "  ".join(shown)
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class SampleWriter(Callback):
    """Appends a text of the converted model to samples.txt at each validation, and logs it as text."""

    def __init__(self, path: Path, prompt: str, n_tokens: int) -> None:
        self.path = path
        self.prompt = prompt
        self.n_tokens = n_tokens

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write one sample, from a random stream of its own."""
        assert isinstance(pl_module, LitModel)
        task, model = pl_module.task, pl_module.model
        assert isinstance(task, CausalTask)
        assert isinstance(model, CausalLM)
        if not task.recurrences or not self.n_tokens:
            return
        with task.recurrent_form(model):
            if trainer.is_global_zero:
                self._write(trainer, TextGenerator(model, tokenizer_of(trainer)))

    def _write(self, trainer: lightning.Trainer, writer: TextGenerator) -> None:
        tokenizer = writer.tokenizer
        generator = torch.Generator(writer.device).manual_seed(trainer.global_step)
        context = writer.read(self.prompt) if self.prompt else writer.read_tokens([[tokenizer.eos_id]])
        record, pieces = writer.write(context, self.n_tokens, Sampling(), generator)
        for _ in pieces:
            pass
        text, step = f"{self.prompt}{record.text}", trainer.global_step
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{text}\n\n")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # As code: Markdown would swallow line breaks and indentation.
                logger.experiment.add_text("sample", f"```\n{text}\n```", step)
            elif isinstance(logger, WandbLogger):
                logger.log_text("sample", columns=["step", "text"], data=[[str(step), text]], step=step)
