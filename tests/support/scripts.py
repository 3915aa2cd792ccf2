"""The scripts train.py, convert.py, generate.py and push.py, to be called in this process."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tnnlm.cli import convert, generate, push, train

ROOT = Path(__file__).parents[2]
"""Root folder of the repository."""

SCRIPTS = {"train": train, "convert": convert, "generate": generate, "push": push}


class Result(NamedTuple):
    """Exit code and output of a script."""

    code: int
    out: str
    err: str


def assert_refused(result: Result, *named: str) -> None:
    """Assert exit code 2 and one line on stderr that starts with the input."""
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1, result.err
    for word in named:
        assert word in result.err
