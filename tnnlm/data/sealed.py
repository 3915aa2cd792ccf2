"""JSON files that end in a checksum of themselves, and lists of files with their checksums.

Metadata of the cache is written with :func:`write_sealed` and lists the other files of its folder, so that no
bit of a prepared folder can change without a word.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash
from lightning.pytorch.utilities import rank_zero_only

from tnnlm.data.content import checksum
from tnnlm.data.progress import reported
from tnnlm.errors import DataError
from tnnlm.files import write_text

LARGEST = 1 << 28
"""Largest number of bytes of a sealed file; a larger one is damaged, and would only fill memory."""
_BLOCK = 1 << 20
THREADS = 8
"""Number of files that are verified at the same time."""


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as JSON, atomically; its last entry ``xxh3`` is the checksum of all bytes before it.

    Args:
        path: Path of the file.
        content: Entries of the file, at least one.
    """
    body = json.dumps(content).removesuffix("}")
    write_text(path, body + _seal(body.encode()))


def _seal(body: bytes) -> str:
    """Return the end of a file that begins with ``body``."""
    return f', "xxh3": "{xxhash.xxh3_128_hexdigest(body)}"}}'


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """Return the entries of a file that :func:`write_sealed` wrote.

    Args:
        path: Path of the file.
        remedy: Remedy of the error.

    Raises:
        DataError: If it is missing, unreadable, damaged, or not such a file.
    """
    size = file_size(path, remedy)
    length = len(_seal(b""))
    if not length < size <= LARGEST:
        raise DataError(f"{path}: is damaged ({size:,} bytes)", remedy)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error, remedy) from None
    if data[-length:] != _seal(data[:-length]).encode():
        raise DataError(f"{path}: is damaged, its content doesn't match its checksum", remedy)
    try:
        entries = dict(json.loads(data))
        del entries["xxh3"]
        return entries
    except (ValueError, TypeError, KeyError, RecursionError):  # another program wrote it
        raise DataError(f"{path}: is damaged, it is no list of entries", remedy) from None


def listed(folder: Path, names: Iterable[str]) -> dict[str, list[Any]]:
    """Return size and checksum of files of a folder by name, for :func:`check_listed`."""
    return {name: [(folder / name).stat().st_size, checksum(folder / name)] for name in names}


def check_listed(folder: Path, files: Mapping[str, list[Any]], remedy: str) -> None:
    """Check the size of every file, and on one process per machine its content.

    The files are read once, in parallel. Processes of a training on the same machine rely on the one with
    local rank 0, which stops the training if a file is damaged.

    Args:
        folder: Folder of the files.
        files: Size in bytes and checksum of each file by name.
        remedy: Remedy of the error.

    Raises:
        DataError: If a file is missing, unreadable, or has another size or content.
    """
    for name, (expected, _) in files.items():
        found = file_size(folder / name, remedy)
        if found != expected:
            raise DataError(f"{folder / name}: is damaged, {found:,} bytes instead of {expected:,}", remedy)
    if not first_on_machine():
        return
    with reported(lambda: f"{folder}: verifying checksums"), ThreadPoolExecutor(THREADS) as pool:
        checks = [
            pool.submit(_check_content, folder / name, expected, remedy)
            for name, (_, expected) in files.items()
        ]
        try:
            for check in checks:
                check.result()
        finally:
            pool.shutdown(cancel_futures=True)


def first_on_machine() -> bool:
    """Return whether this is rank 0 of a training, or the first of its ranks on this machine."""
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        return True
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "1"
    return local == "0"


def _check_content(path: Path, expected: str, remedy: str) -> None:
    try:
        found = checksum(path)
    except OSError as error:
        raise _unreadable(path, error, remedy) from None
    if found != expected:
        raise DataError(f"{path}: is damaged, its content doesn't match its checksum", remedy)


def checksum_of_first(path: Path, n_bytes: int, remedy: str) -> xxhash.xxh3_128:
    """Return the checksum of the first bytes of a file, to which more bytes can be added.

    Raises:
        DataError: If the file can't be read.
    """
    found = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while data := file.read(min(n_bytes, _BLOCK)):
                found.update(data)
                n_bytes -= len(data)
    except OSError as error:
        raise _unreadable(path, error, remedy) from None
    return found


def file_size(path: Path, remedy: str) -> int:
    """Return the size of a regular file. A pipe isn't opened: that would wait for its other end.

    Raises:
        DataError: If it is missing or no regular file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error, remedy) from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: is not a regular file", remedy)
    return status.st_size


def _unreadable(path: Path, error: OSError, remedy: str) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: is missing", remedy)
    if isinstance(error, PermissionError):
        return DataError(f"{path}: can't be read, permission denied", f"change its permissions, or {remedy}")
    return DataError(f"{path}: can't be read ({error.strerror})", remedy)
