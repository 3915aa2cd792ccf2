"""Atomic writes of files and folders (write to a temporary path, flush to disk, rename), and file locks."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tnnlm.errors import OS_PROBLEMS, UserError


def cache_root() -> Path:
    """Return the user's cache folder of this package, $TNNLM_CACHE or ~/.cache/tnnlm, which may not exist."""
    # Path.expanduser fails for an unknown user.
    return Path(os.path.expanduser(os.environ.get("TNNLM_CACHE") or "~/.cache/tnnlm"))


def check_parents(path: Path) -> None:
    """Check that ``path`` can be created: its nearest existing parent is a folder that can be written to.

    Raises:
        UserError: If it can't; the message contains that parent.
    """
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise UserError(f"{path}: {existing} is a file, not a folder", "choose another path")
    try:
        # Permissions don't tell: root may write anywhere, but not to a read-only or a virtual file system.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise _not_created(path, error, existing) from None


def _not_created(path: Path, error: OSError, folder: Path) -> UserError:
    """Return the error for a path that can't be created in ``folder``."""
    known = OS_PROBLEMS.get(error.errno or 0)
    if known is None:
        return UserError(f"{path}: nothing can be created in {folder}", "choose another path")
    return UserError(f"{path}: {known.reason} ({folder})", known.remedy)


def make_parents(path: Path) -> None:
    """Create the folder of ``path`` with its parents, as far as they don't exist.

    Raises:
        UserError: If the file system doesn't have folders that users create, such as ``/proc``.
        OSError: If it can't for another reason, which :data:`OS_PROBLEMS` describes.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in OS_PROBLEMS:
            raise
        raise _not_created(path, error, path.parent) from None


def check_folder(path: Path) -> None:
    """Check that ``path`` is a folder, which may be read-only, or that it can be created.

    Raises:
        UserError: If it is a file or can't be created.
    """
    if not path.exists():
        check_parents(path)
    elif not path.is_dir():
        raise UserError(f"{path}: is a file, not a folder", "choose another path")


def check_file(path: Path) -> None:
    """Check that a file can be written to ``path``, which may be a file that is replaced.

    Raises:
        UserError: If it is a folder or a device, or can't be created.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder", "give the name of a file")
    _check_replaceable(path)
    check_parents(path)


def _check_replaceable(path: Path) -> None:
    """Check that ``path`` is no device or pipe: the superuser would replace ``/dev/null`` by a file."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: is not a regular file", "choose another path")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, and rename it to ``path`` if the block succeeds.

    The temporary file is in the folder of ``path``.

    Raises:
        UserError: If the file system doesn't have files that users create, such as ``/proc``, or ``path`` is
            a device or a pipe.
        OSError: If the disk is full or the folder isn't writable; ``path`` is then unchanged.
    """
    _check_replaceable(path)
    make_parents(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
    except OSError as error:
        if error.errno in OS_PROBLEMS:
            raise
        raise _not_created(path, error, path.parent) from None
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Flush a file to disk (fsync)."""
    with path.open("r+b") as file:  # Windows requires write access for fsync
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder, and rename it to ``path`` if the block succeeds.

    The temporary folder has the same parent as ``path``.

    Args:
        path: Path of the finished folder.
        replace: Replace ``path`` if it exists when the block ends. If false, the existing folder is kept and
            the new one is discarded, which lets several processes build the same folder.

    Raises:
        UserError: If nothing can be created in the folder of ``path``.
    """
    make_parents(path)
    check_parents(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            if file.is_file():
                flush_to_disk(file)
        if path.exists() and replace:
            _exchange(temporary, path)
        elif not path.exists():
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, path: Path) -> None:
    """Replace the folder ``path`` by ``new``; restore the old folder if interrupted in between."""
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
    """Hold an exclusive lock on ``path``. The operating system releases it if the process is killed.

    The lock file is next to ``path``, not inside it, because Windows can't rename a folder that contains an
    open file.

    Args:
        path: File or folder to lock; it need not exist.
        refusal: Error to raise if another process holds the lock.

    Raises:
        UserError: If another process holds the lock, or the folder of ``path`` can't be written to.
    """
    make_parents(path)
    check_parents(path)
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise refusal from None
    try:
        yield
    finally:
        # Unlink while the lock is held: later processes create a new file, and filelock detects the removal
        # in processes that have opened the old one. Windows refuses here and removes it on release.
        with contextlib.suppress(OSError):
            file.unlink()
        lock.release()
