"""One process at a time: a lock beside the file or folder that is written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tnnlm.errors import UserError


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
