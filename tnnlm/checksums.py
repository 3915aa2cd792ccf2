"""Checksums (xxh3-128) of files, lists of files with their checksums, and files that end in a checksum.

Whatever is read back from a disk is verified with these: converted models, shards of checkpoints, records of
runs and the token cache. A checksum detects damage and mistaken files, not forgery: whoever changes a file
can change its checksum. Functions that raise take the error class of the caller.

Line ends of YAML and JSON don't count, because a checkout on Windows, and programs there, write others.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import xxhash

from tnnlm.errors import CheckpointError, UserError
from tnnlm.files import write_text
from tnnlm.reading import check_regular, parse_json, read_bytes, read_text, unreadable

ALGORITHM = "xxh3_128"
"""Name of the checksum in files."""
_BLOCK = 1 << 20
"""Bytes that are read at a time."""
_THREADS = 8
"""Files that are read at the same time, which hides the latency of a network disk."""
_LOG = logging.getLogger("tnnlm")
_LAST_LINE = f"# {ALGORITHM} of the lines above: {{}}\n"
_LAST_ENTRY = f', "{ALGORITHM}": "{{}}"}}}}\n'


def checksum(data: bytes | memoryview) -> str:
    """Return the checksum of bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def file_hash(file: FileIO, n_bytes: int = sys.maxsize) -> xxhash.xxh3_128:
    """Return the hash of at most the next ``n_bytes`` of an open, unbuffered file; more can be added to it.

    Raises:
        OSError: If the file can't be read.
    """
    found, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    while size := file.readinto(block[:n_bytes]):
        found.update(block[:size])
        n_bytes -= size
    return found


def file_checksum(path: Path) -> str:
    """Return the checksum of a file, which is read in blocks.

    Raises:
        OSError: If it can't be read.
    """
    with path.open("rb", buffering=0) as file:
        return file_hash(file).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, for what an attacker must not be able to replace.

    Raises:
        OSError: If it can't be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path, names: Iterable[str]) -> dict[str, list[Any]]:
    """Return size in bytes and checksum of files of a folder, by name, for :func:`check_files`."""
    return {name: _size_and_checksum(folder / name) for name in names}


def _size_and_checksum(path: Path) -> list[Any]:
    if _is_json(path):
        content = _json_content(path, "")
        return [len(content), checksum(content)]
    return [path.stat().st_size, file_checksum(path)]


def _is_json(path: Path) -> bool:
    return path.suffix == ".json"


def _json_content(path: Path, remedy: str, error: type[UserError] = CheckpointError) -> bytes:
    """Return the content of a JSON file with the line ends of Unix.

    Raises:
        UserError: If it is missing, no regular file, too large or unreadable.
    """
    return read_bytes(path, remedy, error).replace(b"\r\n", b"\n")


def check_files(
    folder: Path,
    listed: Mapping[str, Any],
    remedy: str,
    error: type[UserError] = CheckpointError,
    *,
    contents: bool = True,
    checksum_of: Callable[[Path], str] = file_checksum,
) -> None:
    """Check that files of a folder are those that :func:`list_files` listed.

    The sizes are compared first. Then the files are read, several at the same time.

    Args:
        folder: Folder of the files.
        listed: Size in bytes and checksum of each file by name.
        remedy: Remedy of the error.
        error: Class of the error.
        contents: Whether to read the files.
        checksum_of: Function that returns the checksum of a file that is not JSON.

    Raises:
        UserError: If a file is missing, unreadable, or has another size or content.
    """
    for name, entry in listed.items():
        check_size(folder / name, entry, remedy, error)
    if not contents:
        return

    def check(name: str) -> None:
        path = folder / name
        try:
            found = checksum(_json_content(path, remedy, error)) if _is_json(path) else checksum_of(path)
        except OSError as problem:
            raise unreadable(path, problem, remedy, error) from None
        if found != listed[name][1]:
            raise differs(path, remedy, error)

    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(check, listed):
            pass


def check_size(
    path: Path, entry: Any, remedy: str, error: type[UserError] = CheckpointError, *, longer: bool = False
) -> None:
    """Check that a file is a regular file of the size in its entry of a list.

    Args:
        path: Path of the file.
        entry: Size in bytes and checksum; anything else is an entry of a damaged list.
        remedy: Remedy of the error.
        error: Class of the error.
        longer: Whether the file may have more bytes.

    Raises:
        UserError: If it is missing, no regular file, or has another size.
    """
    size = check_regular(path, remedy, error)
    match entry:
        case [int(expected), str()]:
            if size > expected and _is_json(path):
                size = len(_json_content(path, remedy, error))
            if size < expected or (size > expected and not longer):
                how = f"{size:,} bytes instead of {expected:,}"
                raise error(f"{path}: is damaged or was replaced ({how})", remedy)
        case _:
            raise differs(path, remedy, error)


def differs(path: Path, remedy: str, error: type[UserError] = CheckpointError) -> UserError:
    """Return the error for a file with another content than listed."""
    return error(f"{path}: is damaged or was replaced (its checksum differs)", remedy)


def not_verified(path: Path) -> None:
    """Log the warning that a file has no checksum: versions before there were any wrote none."""
    _LOG.warning("%s: not verified: written by an older version", path)


def warn_changed(path: Path) -> None:
    """Log the warning that a file that its user may change has changed."""
    _LOG.warning("%s: was changed or damaged since it was written", path)


def signed_text(text: str) -> str:
    """Return a text of lines, in a format whose comments begin with #, with its checksum in a last line."""
    return text + _LAST_LINE.format(checksum(text.encode()))


def is_verified_text(path: Path, text: str, remedy: str) -> bool:
    """Check a text against the last line of :func:`signed_text`, and return whether it has one.

    Raises:
        CheckpointError: If the text was changed.
    """
    if _is_signed(text, _LAST_LINE):
        return True
    if f"# {ALGORITHM} of" in text:
        raise CheckpointError(f"{path}: is damaged or was changed (its checksum differs)", remedy)
    return False


def write_signed(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, atomically. Its last entry is the checksum of all text before that entry.

    Args:
        path: Path of the file.
        record: Entries of the file, at least one.
    """
    text = json.dumps(record).removesuffix("}")
    write_text(path, text + _LAST_ENTRY.format(checksum(text.encode())))


def read_signed(
    path: Path,
    remedy: str,
    error: type[UserError] = CheckpointError,
    *,
    older: Set[str] | None = None,
) -> dict[str, Any]:
    """Return the entries of a record that :func:`write_signed` wrote.

    Args:
        path: Path of the file.
        remedy: Remedy of the error.
        error: Class of the error.
        older: Entries of a record that an older version wrote, without checksum; None if there was none.

    Raises:
        UserError: If the file is missing, unreadable, damaged or not such a record.
    """
    text = read_text(path, remedy, error)
    record = parse_json(path, text, remedy, error)
    signed = _is_signed(text, _LAST_ENTRY)
    if not signed and record.keys() != older:
        how = "its checksum differs" if ALGORITHM in record else "it has no checksum"
        raise error(f"{path}: is damaged ({how})", remedy)
    record.pop(ALGORITHM, None)
    return record


def _is_signed(text: str, end: str) -> bool:
    """Return whether a text ends in the checksum of what precedes it, in the format ``end``."""
    text = text.replace("\r\n", "\n")
    size = len(end.format(checksum(b"")))
    return text[-size:] == end.format(checksum(text[:-size].encode()))
