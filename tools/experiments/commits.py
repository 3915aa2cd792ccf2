"""Commit of this checkout, which records of measurements state."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def current_commit() -> str:
    """Return the abbreviated commit of this checkout, ``unknown`` outside one."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(
            words, cwd=ROOT, capture_output=True, encoding="utf-8", check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
