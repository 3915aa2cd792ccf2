"""Files that no command may leave behind after it has ended."""

from __future__ import annotations

import re
from pathlib import Path

_LEFT = re.compile(r"\..*\.(tmp|old|lock)|.*\.(part|progress)")


def leftovers(*folders: Path) -> list[Path]:
    """Return temporary files, folders that were moved aside, locks and partial results, at any depth."""
    found = (path for folder in folders for path in folder.rglob("*"))
    return sorted(path for path in found if _LEFT.fullmatch(path.name))
