"""Report of the data of a run, in data.json: what a resumed run must find again."""

from __future__ import annotations

import json
from pathlib import Path

from tnnlm.config.schema import Config
from tnnlm.data.report import DataReport
from tnnlm.errors import CheckpointError
from tnnlm.files import write_text

REPORT = "data.json"
"""Name of the report in the folder of a run."""


def write_report(run: Path, report: DataReport) -> None:
    """Write the report of the data to the folder of a run."""
    write_text(run / REPORT, json.dumps(report.to_dict(), indent=2) + "\n")


def check_data(run: Path, report: DataReport) -> None:
    """Check that the splits are those that the run was started with.

    They are compared by content, so the text may have been moved. A run of a version without this report is
    not checked.

    Raises:
        CheckpointError: If the text, its order or its split differs. Training text could otherwise become
            validation text, and rows would be trained twice or never.
    """
    path = run / REPORT
    if not path.is_file():
        return
    try:
        before = DataReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: is damaged", "restore it, or remove it to skip this check") from None
    change = before.change(report)
    if change is not None:
        raise CheckpointError(
            f"{run}: its data has changed: {change}", "restore the original data, or start a new run"
        )


def keep_text_of_old_run(config: Config, run: Path, overrides: list[str]) -> None:
    """Turn ``data.normalize_text`` off for a run of a version without it, which trained on text as it was."""
    saved = (run / "config.yaml").read_text(encoding="utf-8")
    if not any("normalize_text" in text for text in (saved, *overrides)):
        config.data.normalize_text = False
