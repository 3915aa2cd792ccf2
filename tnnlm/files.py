"""Files that appear whole or not at all (written beside, flushed to the disk, renamed), and their locks."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tnnlm.errors import UserError


def check_parents(path: Path) -> None:
    """Refuse a path that lies below a file.

    Raises:
        UserError: naming the file.
    """
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise UserError(f"{path}: {existing} is a file, not a folder", "choose another place")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; move it there when the block ends without error.

    Raises:
        OSError: if the disk is full or the folder can't be written. ``path`` is then as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until what was written to a file is on the disk."""
    with path.open("r+b") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """Give a flat folder beside ``path`` to fill; move it there when the block ends without error.

    Args:
        path: where it shall be.
        replace: if ``path`` exists by then, put the new one in its place; otherwise keep the old
            one and drop the new (several processes may build the same thing).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            flush_to_disk(file)
        if path.exists() and replace:
            _exchange(temporary, path)
        elif not path.exists():
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, path: Path) -> None:
    """Put ``new`` in the place of the folder ``path``; whatever interrupts it, one of the two is there."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    old = aside / "replaced"
    try:
        os.replace(path, old)
        os.replace(new, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def only_process(path: Path, refusal: UserError) -> Iterator[None]:
    """Hold the lock of what lies at ``path``. The operating system releases it when the process is killed.

    The lock file lies beside it: Windows can't rename a folder that holds an open file.

    Args:
        path: a file or folder, there or not.
        refusal: raised if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise refusal from None
    try:
        yield
    finally:
        # While it is held: who opens the file from now on finds another, and who waits is told by
        # filelock. Windows, which refuses, removes it on release.
        with contextlib.suppress(OSError):
            file.unlink()
        lock.release()
