"""Writing metrics.csv during training, and reading it afterwards."""

from __future__ import annotations

import csv
import io
import logging
import os
import shutil
import zlib
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only

from tnnlm.config.schema import Config
from tnnlm.files import append_text, atomic_file, write_text
from tnnlm.reading import read_bytes
from tnnlm.training.loggers import LocalLogger
from tnnlm.training.loggers.console import show_line
from tnnlm.training.loggers.names import csv_columns
from tnnlm.training.tasks import VALIDATION_TASKS

CHECK = "crc32"
"""Last column: the CRC-32 of the header and of the row's other columns."""
_LOG = logging.getLogger("tnnlm")


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the intact rows of a metrics.csv; values that were not logged are empty strings.

    Rows that are truncated, contain anything but numbers, or differ from their checksum are skipped, and
    their number is logged.
    """
    intact, damaged = whole_rows(path)
    if damaged:
        _LOG.warning("%s: %d damaged rows were skipped", path, damaged)
    return intact


def whole_rows(path: Path) -> tuple[list[dict[str, str]], int]:
    """Return the intact rows of a metrics.csv without a cut last one, and the number of damaged rows."""
    if not os.path.lexists(path):
        return [], 0
    data = read_bytes(path, "move it to another place")
    header, *lines = data.decode(errors="replace").splitlines() or [""]
    if lines and not data.endswith(b"\n"):
        lines.pop()  # a process that was killed wrote a part of it
    rows = [_row(header, line) for line in lines]
    intact = [row for row in rows if row is not None]
    return intact, len(rows) - len(intact)


def _row(header: str, line: str) -> dict[str, str] | None:
    """Return a row without its checksum, or None if it is damaged; no value contains a comma or a quote."""
    names, values = header.split(","), line.split(",")
    row = dict(zip(names, values, strict=False))
    found = row.pop(CHECK, None)
    try:
        int(row["step"])
        for value in row.values():
            float(value or 0)
    except (KeyError, ValueError):
        return None
    if found is not None and found != _check(header, line.rpartition(",")[0]):
        return None
    return row if len(names) == len(values) else None


def _check(header: str, values: str) -> str:
    """Return the checksum of a row; that of the header is part of it, so that names can't change."""
    return f"{zlib.crc32(values.encode(), zlib.crc32(header.encode())):08x}"


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
        if not self.path.exists() or self.path.is_symlink() or self.resume_step is not None:
            self._start()
        append_text(self.path, self._line({"step": step, **metrics}))

    def _line(self, row: Mapping[str, object]) -> str:
        """Return a row with its checksum, with the line end of CSV."""
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns, extrasaction="ignore", lineterminator="").writerow(row)
        return f"{text.getvalue()},{_check(self._header, text.getvalue())}\r\n"

    @property
    def _header(self) -> str:
        return ",".join([*self.columns, CHECK])

    def _free_name(self) -> Path:
        """Return the path of a new copy, so that those of earlier damage are kept."""
        names = (f"metrics.damaged{suffix}.csv" for suffix in chain([""], map("-{}".format, count(2))))
        return next(path for path in map(self.path.with_name, names) if not os.path.lexists(path))

    def _start(self) -> None:
        # Rows of steps after the checkpoint will be logged again. A row that a full disk truncated is one of
        # them, because rows are written before their checkpoint.
        border = self.resume_step
        rows, damaged = ([], 0) if border is None else whole_rows(self.path)
        if damaged:
            copy = self._free_name()
            with atomic_file(copy) as temporary:
                shutil.copyfile(self.path, temporary)
            show_line(f"warning: {self.path}: {damaged} damaged rows were removed; {copy} contains them")
        kept = [self._line(row) for row in rows if int(row["step"]) <= (border or 0)]
        write_text(self.path, "".join([f"{self._header}\r\n", *kept]))
        self.resume_step = None
