"""Hashes of the content of files: whether prepared data is still that of its sources, and undamaged.

Paths and modification times decide nothing: a file may be rewritten within the resolution of the clock, or by
a tool that restores its time, and the same text may lie elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

from tnnlm.checksums import file_hash
from tnnlm.errors import OS_ADVICE, DataError
from tnnlm.reading import unreadable

SETTLED = 10.0
"""Seconds since the last change of a file, after which its hash is remembered by this process."""
_remembered: dict[tuple[object, ...], str] = {}


def content_hash(path: Path) -> str:
    """Return the SHA-256 hash of a file, which is read in chunks.

    A process reads its files several times (to prepare the data, then to open it), so it remembers the hash
    of a file that was last changed some time ago. The change time of an inode, unlike the modification time,
    can't be set by a program; Windows has none, so nothing is remembered there.
    """
    return _hash(path, _sha256)


def checksum(path: Path) -> str:
    """Return the checksum of a file (:mod:`tnnlm.checksums`), remembered as by :func:`content_hash`.

    It is more than ten times faster than SHA-256 and detects damage, not forgery.
    """
    return _hash(path, _xxh3)


def _sha256(file: FileIO) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _xxh3(file: FileIO) -> str:
    return file_hash(file).hexdigest()


def _hash(path: Path, digest: Callable[[FileIO], str]) -> str:
    """Return a hash of a file.

    Raises:
        DataError: If the disk can't read it.
        OSError: If it can't for a reason that the user can change.
    """
    try:
        return _remembered_hash(path, digest)
    except OSError as error:
        if error.errno in OS_ADVICE or isinstance(error, FileNotFoundError):
            error.filename = error.filename or str(path)  # known where opening fails, not where reading does
            raise
        raise unreadable(path, error, "restore the file", DataError) from None


def _remembered_hash(path: Path, digest: Callable[[FileIO], str]) -> str:
    with path.open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        inode = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        settled = os.name == "posix" and time.time() - status.st_ctime > SETTLED
        if settled and (digest, inode) in _remembered:
            return _remembered[digest, inode]
        found = digest(file)
    if settled:
        _remembered[digest, inode] = found
    return found


def content_hashes(paths: Sequence[Path]) -> list[str]:
    """Return the hash of each file; files are read in parallel, which hides the latency of a network disk."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        return list(pool.map(content_hash, paths))


def folder_content(folder: Path) -> list[tuple[str, str]]:
    """Return the relative name and hash of every file below a folder, sorted, without those of .git."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    paths = [path for path in found if ".git" not in path.relative_to(folder).parts]
    names = [path.relative_to(folder).as_posix() for path in paths]
    return list(zip(names, content_hashes(paths), strict=True))
