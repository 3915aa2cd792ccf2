"""Reading of files that may come from anyone: regular files only, up to a size, whose faults are one line.

A pipe is never opened, because that would wait for its other end. Every function raises the error class that
the caller gives, with the path, the fault and the remedy.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from tnnlm.errors import OS_PROBLEMS, CheckpointError, UserError

ANOTHER = "use another one"
"""Remedy for a file that only its author can correct."""
LARGEST = 1 << 28
"""Default of the largest number of bytes of a file that is read as a whole."""


def check_regular(
    path: Path, remedy: str, error: type[UserError] = CheckpointError, missing: str = "is missing"
) -> int:
    """Return the size in bytes of a regular file, without opening it.

    Args:
        path: Path of the file.
        remedy: Remedy of the error.
        error: Class of the error.
        missing: Fault of a file that doesn't exist.

    Raises:
        UserError: An error of class ``error``, if the file is missing or is not a regular file.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        broken = path.is_symlink()
        raise error(f"{path}: {'is a broken symbolic link' if broken else missing}", remedy) from None
    except (OSError, ValueError) as problem:  # ValueError: the path contains a zero
        raise unreadable(path, problem, remedy, error) from None
    if stat.S_ISDIR(status.st_mode):
        raise error(f"{path}: is a folder, not a file", remedy)
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path}: is not a regular file", remedy)
    return status.st_size


def read_bytes(
    path: Path,
    remedy: str,
    error: type[UserError] = CheckpointError,
    *,
    largest: int = LARGEST,
    missing: str = "is missing",
) -> bytes:
    """Return the content of a regular file.

    Args:
        path: Path of the file.
        remedy: Remedy of the error.
        error: Class of the error.
        largest: Largest number of bytes; a larger file is refused before it is read.
        missing: Fault of a file that doesn't exist.

    Raises:
        UserError: An error of class ``error``, if the file is missing, not regular, too large or unreadable.
    """
    size = check_regular(path, remedy, error, missing)
    if size <= largest:
        try:
            with path.open("rb") as file:
                data = file.read(largest + 1)  # a special file may hold more than its size
        except OSError as problem:
            raise unreadable(path, problem, remedy, error) from None
        if len(data) <= largest:
            return data
    raise error(f"{path}: is larger than {largest >> 20} MiB", remedy)


def read_text(
    path: Path, remedy: str, error: type[UserError] = CheckpointError, *, largest: int = LARGEST
) -> str:
    """Return the text of a UTF-8 file; arguments and errors are those of :func:`read_bytes`.

    Raises:
        UserError: An error of class ``error``, also if the file is not UTF-8 text.
    """
    try:
        return read_bytes(path, remedy, error, largest=largest).decode()
    except UnicodeDecodeError as problem:
        raise error(f"{path}: is damaged (not UTF-8 text, byte {problem.start})", remedy) from None


def read_json(
    path: Path, remedy: str, error: type[UserError] = CheckpointError, *, largest: int = LARGEST
) -> dict[str, Any]:
    """Return the object in a JSON file; arguments and errors are those of :func:`read_bytes`.

    Raises:
        UserError: An error of class ``error``, also if the file is not JSON, or is no object.
    """
    return parse_json(path, read_text(path, remedy, error, largest=largest), remedy, error)


def parse_json(
    path: Path, text: str, remedy: str, error: type[UserError] = CheckpointError
) -> dict[str, Any]:
    """Return the object in the text of a JSON file.

    Raises:
        UserError: If the text is not a JSON object.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as problem:
        raise error(f"{path}: is damaged (not JSON, line {problem.lineno})", remedy) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or deep nesting
        raise error(f"{path}: is damaged (not JSON that can be read)", remedy) from None
    if not isinstance(found, dict):
        raise error(f"{path}: is damaged (not an object of JSON)", remedy)
    return found


def unreadable(path: Path, problem: Exception, remedy: str, error: type[UserError]) -> UserError:
    """Return the error for a file whose reading failed; the remedy of a known problem comes first."""
    number = problem.errno if isinstance(problem, OSError) else None
    known = OS_PROBLEMS.get(number or 0)
    if known is not None:
        return error(f"{path}: {known.reason}", ", or ".join(filter(None, (known.remedy, remedy))))
    reason = os.strerror(number) if number else "an invalid path"
    return error(f"{path}: can't be read ({reason})", remedy)
