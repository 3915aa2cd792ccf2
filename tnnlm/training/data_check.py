"""Checks that a resumed run finds the data that it was started with."""

from __future__ import annotations

from pathlib import Path

from tnnlm.config.checks import leaves
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.config.values import one_line, typed
from tnnlm.data.report import DataReport, read_report
from tnnlm.errors import CheckpointError


def check_data(run: Path, config: Config, report: DataReport) -> None:
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
    if change is None:
        return
    old, new = (_settings(found) for found in (load_config(run / "config.yaml", saved=True), config))
    words = [f"{key}={one_line(typed(value))}" for key, value in new.items() if old.get(key) != value]
    omit = f" or omit {' '.join(words)}" if words else ""
    raise CheckpointError(
        f"{run}: its data has changed: {change}", f"restore the original data{omit}, or start a new run"
    )


def _settings(config: Config) -> dict[str, object]:
    """Return the settings that determine the content of the splits, and where it is read from."""
    others = ("data.batch_size", "data.num_workers", "data.cache_dir", "data.max_val_tokens")
    return {key: value for key, value, _ in leaves(config) if key.startswith("data.") and key not in others}


def keep_text_of_old_run(config: Config, run: Path, overrides: list[str]) -> None:
    """Turn ``data.normalize_text`` off for a run of a version without it, which trained on unchanged text."""
    saved = (run / "config.yaml").read_text(encoding="utf-8")
    if not any("normalize_text" in text for text in (saved, *overrides)):
        config.data.normalize_text = False
