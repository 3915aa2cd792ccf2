"""Writing metrics.csv during training, and reading it afterwards."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only

from tnnlm.config.schema import Config
from tnnlm.files import write_text
from tnnlm.training.loggers import LocalLogger
from tnnlm.training.loggers.console import show_line
from tnnlm.training.loggers.names import csv_columns
from tnnlm.training.tasks import VALIDATION_TASKS


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the intact rows of a metrics.csv; values that were not logged are empty strings.

    Rows that are truncated or contain anything but numbers are skipped.
    """
    return [row for row in _rows(path) if row is not None]


def whole_rows(path: Path) -> tuple[list[dict[str, str]], int]:
    """Return the intact rows of a metrics.csv without a cut last one, and the number of damaged rows."""
    rows = _rows(path)
    if rows and not path.read_bytes().endswith(b"\n"):
        rows.pop()
    intact = [row for row in rows if row is not None]
    return intact, len(rows) - len(intact)


def _rows(path: Path) -> list[dict[str, str] | None]:
    """Return the rows of a metrics.csv, or None for a damaged one; no value contains a comma or a quote."""
    if not path.is_file():
        return []
    header, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    return [_row(header.split(","), line.split(",")) for line in lines]


def _row(names: list[str], values: list[str]) -> dict[str, str] | None:
    row = dict(zip(names, values, strict=False))
    try:
        int(row["step"])
        for value in row.values():
            float(value or 0)
    except (KeyError, ValueError):
        return None
    return row if len(names) == len(values) else None


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
        rows, damaged = ([], 0) if border is None else whole_rows(self.path)
        if damaged:
            copy = self.path.with_name("metrics.damaged.csv")
            shutil.copyfile(self.path, copy)
            show_line(f"warning: {self.path}: {damaged} damaged rows were removed; {copy} contains them")
        rows = [row for row in rows if int(row["step"]) <= (border or 0)]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())
        self.resume_step = None
