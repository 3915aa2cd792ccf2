"""Exchange of the names of two folders in one step, where the operating system and the file system can."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_RENAME_EXCHANGE = 2
"""Flag of Linux's renameat2 and of macOS's renamex_np."""
_AT_FDCWD = -100
"""Paths are relative to the current folder, on Linux."""


def exchange(a: Path, b: Path) -> bool:
    """Exchange the names of two existing folders atomically; return false, without a change, if that fails.

    Some file systems can't, such as NFS.
    """
    first, second = os.fsencode(a), os.fsencode(b)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return bool(library.renamex_np(first, second, _RENAME_EXCHANGE) == 0)
        return bool(library.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE) == 0)
    except (AttributeError, TypeError, OSError):  # Windows, or a C library without the function
        return False
