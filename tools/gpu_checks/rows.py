"""Rows that parts append to a file while they measure, so that nothing is lost when a part is stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""Measurement of plain values; ``kind`` names the table that it belongs to."""
Emit = Callable[[Row], None]
"""Function that stores a row at once."""


def append_row(path: Path, row: Row) -> None:
    """Append a row to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Return the complete rows of a file, which may be missing; the last line may be incomplete."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
