"""Checks, before any work is done, that a path can be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tnnlm.errors import OS_PROBLEMS, UserError
from tnnlm.files.processes import this_process


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
        # The name is that of a temporary file, because some file systems have no files without a name.
        tempfile.TemporaryFile(dir=existing, prefix=f".check.{this_process().tag}-", suffix=".tmp").close()
    except OSError as error:
        raise not_created(path, error, existing) from None


def not_created(path: Path, error: OSError, folder: Path) -> UserError:
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
        raise not_created(path, error, path.parent) from None


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
    check_replaceable(path)
    check_parents(path)


def check_no_link(path: Path, remedy: str) -> None:
    """Check that ``path`` is no symbolic link, which in the folder of a stranger may lead anywhere.

    Args:
        path: File or folder; it need not exist.
        remedy: Remedy of the error.

    Raises:
        UserError: If it is a link; the message says where it leads to.
    """
    if path.is_symlink():
        raise UserError(f"{path}: is a symbolic link to {os.readlink(path)}", remedy)


def check_replaceable(path: Path) -> None:
    """Check that ``path`` is no device or pipe: the superuser would replace ``/dev/null`` by a file.

    Raises:
        UserError: If it is.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: is not a regular file", "choose another path")
