"""Commit that a record states."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments import commits


def test_commit_is_that_of_the_checkout_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"[0-9a-f]{7,}|unknown", commits.current_commit())
    monkeypatch.setattr(commits, "ROOT", tmp_path)
    assert commits.current_commit() == "unknown"
