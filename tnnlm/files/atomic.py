"""Atomic writes of files and folders: write to a temporary path, flush to disk, rename."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tnnlm.errors import OS_PROBLEMS
from tnnlm.files.checks import check_parents, check_replaceable, make_parents, not_created
from tnnlm.files.exchange import exchange
from tnnlm.files.leftovers import remove_leftovers_once, temporary_path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, and rename it to ``path`` if the block succeeds.

    The temporary file is in the folder of ``path``. The permissions are those of a file that is replaced, and
    follow the umask otherwise.

    Raises:
        UserError: If the file system doesn't have files that users create, such as ``/proc``, or ``path`` is
            a device or a pipe.
        OSError: If the disk is full or the folder isn't writable; ``path`` is then unchanged.
    """
    check_replaceable(path)
    make_parents(path)
    remove_leftovers_once(path.parent)
    temporary = _new_file(path)
    try:
        yield temporary
        flush_to_disk(temporary)
        _keep_mode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _new_file(path: Path) -> Path:
    """Create a temporary file for ``path`` and return its path.

    What has its name already is left alone: in a folder that others can write to, it may be a link.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    while True:
        temporary = temporary_path(path)
        try:
            os.close(os.open(temporary, flags, 0o666))
            return temporary
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno in OS_PROBLEMS:
                raise
            raise not_created(path, error, path.parent) from None


def flush_to_disk(path: Path) -> None:
    """Flush a file to disk (fsync)."""
    with path.open("r+b") as file:  # Windows requires write access for fsync
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically, with the same line ends on every system."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(text.encode())


def append_text(path: Path, text: str) -> None:
    """Append to a UTF-8 file, with the same line ends on every system.

    A link is replaced by a file, as by every atomic write: a link in the folder of a stranger's run
    may lead to any file of the user.

    Raises:
        UserError: If ``path`` is a device or a pipe.
        OSError: If the disk is full or the file isn't writable.
    """
    if path.is_symlink():
        path.unlink()
    check_replaceable(path)
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def atomic_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder, and rename it to ``path`` if the block succeeds.

    The temporary folder has the same parent as ``path``; of a link, as the folder that it leads to. The
    permissions are those of a folder that is replaced, and follow the umask otherwise.

    Args:
        path: Path of the finished folder.
        replace: Replace ``path`` if it exists when the block ends. If false, the existing folder is kept and
            the new one is discarded, which lets several processes build the same folder.

    Raises:
        UserError: If nothing can be created in the folder of ``path``.
    """
    make_parents(path)
    check_parents(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    remove_leftovers_once(path.parent)
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                flush_to_disk(file)
        if path.exists() and replace:
            _keep_mode(path, temporary)
            _replace_folder(path, temporary)
        elif not path.exists():
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(path: Path, new: Path) -> None:
    """Replace the folder ``path`` by ``new``, whose name the old content may have afterwards.

    Where folders can't be exchanged in one step, there is a moment without a folder at ``path``. If the
    process is killed then, :func:`~tnnlm.files.leftovers.remove_leftovers` puts the old one back.
    """
    if exchange(new, path):
        return
    old = temporary_path(path, "old")
    try:
        os.replace(path, old)
        os.replace(new, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)


def _keep_mode(path: Path, new: Path) -> None:
    """Give ``new`` the permissions of what it replaces at ``path``, if anything."""
    if path.exists():
        new.chmod(stat.S_IMODE(path.stat().st_mode) & 0o777)
