"""Prepared folders of the cache: complete if and only if they contain ``META``, and verified when opened.

``META`` and the records of progress have a checksum of themselves and list the other files of their folder,
so that no bit of it can change without a word.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_only

from tnnlm.checksums import check_files, read_signed, write_signed
from tnnlm.data.content import checksum
from tnnlm.data.progress import reported
from tnnlm.errors import DataError
from tnnlm.reading import check_regular

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
    if not os.path.lexists(folder):
        return False
    check_regular(folder / META, again(folder), DataError)
    return True


def write_meta(folder: Path, key: str, content: Mapping[str, Any], files: Mapping[str, list[Any]]) -> None:
    """Complete a folder.

    Args:
        folder: Folder, which may still have another name.
        key: Name of the folder when it is complete.
        content: Entries of ``META``.
        files: Size in bytes and checksum of every other file of the folder by name.
    """
    write_signed(folder / META, {**content, "key": key, "checksums": dict(files)})


def open_prepared(folder: Path, opened: Callable[[dict[str, Any]], Opened]) -> Opened:
    """Verify a folder and return what ``opened`` makes of the entries of its ``META``.

    Raises:
        DataError: If a file of the folder is damaged, or that of another folder.
    """
    meta = read_entries(folder / META)
    try:
        if meta["key"] != folder.name:
            raise DataError(f"{folder / META}: belongs to other data", again(folder))
        verify_files(folder, meta["checksums"])
        return opened(meta)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"is damaged, or of another version ({type(error).__name__}: {error})"
        raise DataError(f"{folder / META}: {reason}", again(folder)) from None


def read_entries(path: Path) -> dict[str, Any]:
    """Return the entries of ``META`` or of a record of progress.

    Raises:
        DataError: If it is missing, unreadable or damaged.
    """
    return read_signed(path, again(path.parent), DataError)


def verify_files(folder: Path, files: Mapping[str, list[Any]]) -> None:
    """Check the size of files of the cache, and on one process per machine their content.

    Processes of a training on the same machine rely on the one with local rank 0, which stops the training if
    a file is damaged.

    Args:
        folder: Folder of the files.
        files: Size in bytes and checksum of each file by name.

    Raises:
        DataError: If a file is missing, unreadable, or has another size or content.
    """
    with reported(lambda: f"{folder}: verifying checksums"):
        check_files(
            folder, files, again(folder), DataError, contents=_first_on_machine(), checksum_of=checksum
        )


def _first_on_machine() -> bool:
    """Return whether this is rank 0 of a training, or the first of its ranks on this machine."""
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        return True
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "1"
    return local == "0"
