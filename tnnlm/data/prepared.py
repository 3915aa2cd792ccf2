"""Prepared folders of the cache: complete if and only if they contain ``META``, and verified when opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tnnlm.data.sealed import check_listed, read_sealed, write_sealed
from tnnlm.errors import DataError

META = "meta.json"
"""File that a prepared folder of the cache contains."""
Opened = TypeVar("Opened")


def again(folder: Path) -> str:
    """Return the remedy for a damaged folder."""
    return f"delete {folder} to prepare the data again"


def is_prepared(folder: Path) -> bool:
    """Return whether a folder is complete; one that doesn't exist is not.

    Raises:
        DataError: If it exists and lacks ``META``: folders are renamed when they are complete.
    """
    if (folder / META).is_file():
        return True
    if os.path.lexists(folder) and not (folder / META).is_file():  # not renamed between both looks
        fault = "is not a regular file" if os.path.lexists(folder / META) else "is missing"
        raise DataError(f"{folder / META}: {fault}", again(folder))
    return False


def write_meta(folder: Path, key: str, content: Mapping[str, Any], files: Mapping[str, list[Any]]) -> None:
    """Complete a folder.

    Args:
        folder: Folder, which may still have another name.
        key: Name of the folder when it is complete.
        content: Entries of ``META``.
        files: Size in bytes and checksum of every other file of the folder by name.
    """
    write_sealed(folder / META, {**content, "key": key, "checksums": dict(files)})


def open_prepared(folder: Path, opened: Callable[[dict[str, Any]], Opened]) -> Opened:
    """Verify a folder and return what ``opened`` makes of the entries of its ``META``.

    Raises:
        DataError: If a file of the folder is damaged, or that of another folder.
    """
    meta = read_sealed(folder / META, again(folder))
    try:
        if meta["key"] != folder.name:
            raise DataError(f"{folder / META}: belongs to other data", again(folder))
        check_listed(folder, meta["checksums"], again(folder))
        return opened(meta)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"is damaged, or of another version ({type(error).__name__}: {error})"
        raise DataError(f"{folder / META}: {reason}", again(folder)) from None
