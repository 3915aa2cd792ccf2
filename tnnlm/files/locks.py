"""Locks: a run, an output folder and a part of a cache have one owner at a time, and a refusal names it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout, lock_descriptor

from tnnlm.errors import UserError
from tnnlm.files.checks import check_parents, make_parents
from tnnlm.files.leftovers import remove_leftovers
from tnnlm.files.network import network_file_system, say_once
from tnnlm.files.records import holder_of, write_record

_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""Errors of file systems that have no locks."""
_MOMENT = 0.5
"""Seconds to wait for a lock whose holder is unknown: a process that removes leftovers holds it briefly."""
_descriptors: set[int] = set()
"""Open folders that this process has locked."""


@contextmanager
def only_process(path: Path, refusal: UserError) -> Iterator[None]:
    """Hold an exclusive lock on ``path``. The operating system releases it if the process is killed.

    The lock file ``.NAME.lock`` is next to ``path``, not inside it, because Windows can't rename a folder
    that contains an open file. It records the process that holds the lock. A folder that exists is locked
    itself as well, since a bind mount shows it under another path. Children don't inherit the lock, so that
    a loader process that outlives the training doesn't keep it. What killed processes left next to ``path``
    is removed.

    Args:
        path: File or folder to lock; it need not exist. Links to it are followed.
        refusal: Error to raise if another process holds the lock; its reason is completed by the number and
            the host of that process and the time of the lock.

    Raises:
        UserError: If another process holds the lock, or the folder of ``path`` can't be written to.
    """
    make_parents(path)
    check_parents(path)
    path = Path(os.path.realpath(path))
    kind = network_file_system(path.parent)
    if kind is not None:
        say_once(
            f"warning: {path.parent}: is on {kind}, a network file system, where a lock may not hold between "
            "machines; do not use it for the same run or folder on two of them"
        )
    with ExitStack() as held:
        held.enter_context(_lock_file(path, refusal))
        held.enter_context(_locked_folder(path, refusal))
        remove_leftovers(path.parent, owned=None if kind else path.name)
        yield


@contextmanager
def _lock_file(path: Path, refusal: UserError) -> Iterator[None]:
    """Hold the lock file of ``path``, and delete it at the end."""
    lock, file = _acquired(path, refusal)
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:  # not in a child, which leaves this block as well
            # Unlink while the lock is held: later processes create a new file, and filelock detects the
            # removal in processes that have opened the old one. Windows refuses here and removes it on
            # release.
            with contextlib.suppress(OSError):
                file.unlink()
            lock.release()


def _acquired(path: Path, refusal: UserError) -> tuple[BaseFileLock, Path]:
    """Return a held lock for ``path`` and its file, which stands for the lock where the system has none."""
    file = path.with_name(f".{path.name}.lock")
    if not issubclass(FileLock, SoftFileLock):  # on systems without locks they are equal
        try:
            return _system_lock(file, refusal), file
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        with contextlib.suppress(OSError):
            file.unlink()
    file = path.with_name(f".{path.name}.soft.lock")
    return _soft_lock(file, refusal), file


def _system_lock(file: Path, refusal: UserError) -> BaseFileLock:
    lock = FileLock(file, fallback_to_soft=False, on_acquired=write_record)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        holder = holder_of(file)
        if holder is not None:
            raise _named(refusal, str(holder)) from None
        try:
            lock.acquire(timeout=_MOMENT)
        except Timeout:
            raise _named(refusal, str(holder_of(file) or "")) from None
    return lock


def _soft_lock(file: Path, refusal: UserError) -> BaseFileLock:
    """Return a held lock whose file stands for it, for file systems without locks.

    That of a process of this host which was killed is taken over.
    """
    say_once(
        f"warning: {file.parent}: its file system has no locks; {file.name} stands for one, and must be "
        "deleted by hand if a process on another machine was killed"
    )
    lock = SoftFileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise _named(refusal, f"see {file}") from None
    return lock


@contextmanager
def _locked_folder(path: Path, refusal: UserError) -> Iterator[None]:
    """Lock a folder itself, if it exists and its file system can."""
    if os.name != "posix" or not path.is_dir():
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    _descriptors.add(descriptor)
    try:
        with contextlib.suppress(OSError):  # NFS, for example, locks only what is open for writing
            if not lock_descriptor(descriptor, blocking=False):
                raise _named(refusal, "which has locked the folder itself, perhaps under another path")
        yield
    finally:
        if descriptor in _descriptors:
            _descriptors.remove(descriptor)
            os.close(descriptor)


def _close_inherited() -> None:
    """Close the locked folders in a child, which would keep the locks if it outlived its parent."""
    while _descriptors:
        with contextlib.suppress(OSError):
            os.close(_descriptors.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def _named(refusal: UserError, holder: str) -> UserError:
    """Add the holder of a lock to the reason of a refusal, and return the refusal."""
    if holder:
        refusal.reason = f"{refusal.reason} ({holder})"
    return refusal
