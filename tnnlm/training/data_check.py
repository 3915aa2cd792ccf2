"""Checks that a resumed run finds the data that it was started with."""

from __future__ import annotations

from pathlib import Path

from tnnlm.config.schema import Config
from tnnlm.data.report import DataReport, read_report
from tnnlm.errors import CheckpointError


def check_data(run: Path, report: DataReport) -> None:
    """Check that the splits are those that the run was started with.

    They are compared by content, so the text may have been moved. A run of a version without this report is
    not checked.

    Raises:
        DataError: If the report is damaged.
        CheckpointError: If the text, its order or its split differs. Training text could otherwise become
            validation text, and rows would be trained twice or never.
    """
    before = read_report(run)
    change = None if before is None else before.change(report)
    if change is not None:
        raise CheckpointError(
            f"{run}: its data has changed: {change}", "restore the original data, or start a new run"
        )


def keep_text_of_old_run(config: Config, run: Path, overrides: list[str]) -> None:
    """Turn ``data.normalize_text`` off for a run of a version without it, which trained on unchanged text."""
    saved = (run / "config.yaml").read_text(encoding="utf-8")
    if not any("normalize_text" in text for text in (saved, *overrides)):
        config.data.normalize_text = False
