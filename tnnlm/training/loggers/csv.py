"""Writing metrics.csv during training, and reading it afterwards."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only

from tnnlm.config.schema import Config
from tnnlm.files import write_text
from tnnlm.training.loggers import LocalLogger
from tnnlm.training.loggers.names import csv_columns
from tnnlm.training.tasks import VALIDATION_TASKS


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv; values that were not logged are empty strings."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def whole_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv without a truncated last row."""
    rows = read_metrics(path)
    cut = bool(rows) and not path.read_bytes().endswith(b"\n")
    return rows[:-1] if cut else rows


class MetricsCSV(LocalLogger):
    """Logger that appends rows to metrics.csv immediately.

    It replaces Lightning's CSVLogger, which deletes the file on resume.
    """

    def __init__(self, path: Path, config: Config, resume_step: int | None = None) -> None:
        super().__init__()
        self.path = path
        self.columns = csv_columns(VALIDATION_TASKS[config.task].place, config.model.n_layers)
        self.resume_step = resume_step

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row for a step."""
        if not self.path.exists() or self.resume_step is not None:
            self._start()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, extrasaction="ignore").writerow({"step": step, **metrics})

    def _start(self) -> None:
        # Rows of steps after the checkpoint will be logged again. A row that a full disk truncated is one of
        # them, because rows are written before their checkpoint.
        border = self.resume_step
        rows = [] if border is None else [r for r in whole_rows(self.path) if int(r["step"]) <= border]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())
        self.resume_step = None
