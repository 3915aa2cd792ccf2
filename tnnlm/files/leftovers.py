"""Temporary files and folders by name, and their removal after the process that wrote them was killed.

The name of a temporary file contains the process that writes it, ``.NAME.HOST-PID-START-N.tmp``, so that
those of living processes are kept, and files of users are never mistaken for one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

from tnnlm.files.processes import Process, this_process
from tnnlm.files.records import read_record

_NAME = re.compile(
    r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>[0-9a-f]{8})-\w+\.(tmp|old)"
)
_ABANDONED = 24 * 3600
"""Age in seconds after which a file of a process on another host is one of a process that was killed."""
_numbers = itertools.count()
_seen: set[Path] = set()
"""Folders whose leftovers were removed."""


def temporary_path(path: Path, kind: str = "tmp") -> Path:
    """Return a path next to ``path`` that no other process or thread uses.

    Args:
        path: Path that is written.
        kind: ``tmp`` for new content, or ``old`` for a folder that is moved aside while it is replaced.
    """
    return path.with_name(f".{path.name}.{this_process().tag}-{next(_numbers)}.{kind}")


def remove_leftovers(folder: Path, *, owned: str | None = None) -> None:
    """Delete what killed processes left in a folder; put a folder back whose replacement was interrupted.

    Lock files are deleted as well, if the process of this host that they record has ended.

    Args:
        folder: Folder to look in; it need not exist.
        owned: Name in ``folder`` that only this process may write, or ``*`` for all files: its leftovers are
            deleted without asking whether a process of another host still runs.
    """
    for path, name, writer in _leftovers(folder):
        if writer == this_process():
            continue
        mine = owned == name or (owned == "*" and not path.is_dir())
        if not _is_abandoned(path, writer) and (writer.is_local or not mine):
            continue
        target = folder / name
        if path.suffix == ".old" and not os.path.lexists(target):
            _restore(path, target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    for name in _names(folder):
        if name.startswith(".") and name.endswith(".lock"):
            _remove_stale_lock(folder / name)


def remove_leftovers_once(folder: Path) -> None:
    """Call :func:`remove_leftovers` the first time that this process writes to a folder."""
    folder = folder.absolute()
    if folder not in _seen:
        _seen.add(folder)
        remove_leftovers(folder)


def restore_replaced(path: Path) -> None:
    """Put a folder back if it is missing because a process was killed while it replaced the folder."""
    if not os.path.lexists(path):
        for old, name, writer in _leftovers(path.parent):
            if name == path.name and old.suffix == ".old" and _is_abandoned(old, writer):
                _restore(old, path)


def _leftovers(folder: Path) -> list[tuple[Path, str, Process]]:
    """Return the temporary files and folders in a folder, with the name that each is for and its writer."""
    found = []
    for match in filter(None, map(_NAME.fullmatch, _names(folder))):
        path = folder / match[0]
        if not path.is_symlink():
            writer = Process(match["host"], int(match["pid"]), match["start"])
            found.append((path, match["name"], writer))
    return found


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _remove_stale_lock(file: Path) -> None:
    record = read_record(file)
    if record is None or record.process.is_alive:
        return
    lock = FileLock(file, fallback_to_soft=False)
    with contextlib.suppress(OSError, Timeout):
        lock.acquire(blocking=False)
        try:
            file.unlink()  # while the lock is held, see only_process
        finally:
            lock.release()


def _is_abandoned(path: Path, writer: Process) -> bool:
    """Return whether the process that wrote a temporary file has ended, as far as this host can tell."""
    if writer.is_local:
        return not writer.is_alive
    try:
        return time.time() - path.stat().st_mtime > _ABANDONED
    except OSError:
        return False


def _restore(old: Path, path: Path) -> None:
    with contextlib.suppress(OSError):
        os.replace(old, path)
        print(f"{path}: restored, because a process was killed while it replaced it", file=sys.stderr)
