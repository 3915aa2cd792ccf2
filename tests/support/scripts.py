"""The scripts train.py, convert.py and generate.py, to be called in this process."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tnnlm.cli import convert, generate, train

ROOT = Path(__file__).parents[2]
"""Root folder of the repository."""

SCRIPTS = {"train": train, "convert": convert, "generate": generate}


class Result(NamedTuple):
    """Exit code and output of a script."""

    code: int
    out: str
    err: str
