"""Checksums (xxh3-128) of files, and strings and records that contain a checksum of the rest.

A checksum detects damage and mistaken files, not forgery: whoever changes a file can change its checksum.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from tnnlm.errors import CheckpointError
from tnnlm.reading import check_regular, read_json, unreadable

_BLOCK = 1 << 20
_LOG = logging.getLogger("tnnlm")
_LINE = re.compile(r"# xxh3_128 of the lines above: ([0-9a-f]{32})\n\Z")


def checksum(data: bytes | memoryview) -> str:
    """Return the checksum of bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def file_checksum(path: Path) -> str:
    """Return the checksum of a file, which is read in blocks.

    Raises:
        OSError: If it can't be read.
    """
    found, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            found.update(block[:size])
    return found.hexdigest()


def list_files(folder: Path, names: Iterable[str]) -> dict[str, list[Any]]:
    """Return size in bytes and checksum of files of a folder, by name, for :func:`check_files`."""
    return {name: [(folder / name).stat().st_size, file_checksum(folder / name)] for name in names}


def check_files(folder: Path, listed: Mapping[str, Any], remedy: str) -> None:
    """Check that files of a folder are those that :func:`list_files` listed; they are read in parallel.

    Raises:
        CheckpointError: If a file is missing, unreadable, or has another size or content.
    """
    for name in listed:
        check_file(folder / name, listed[name], remedy, contents=False)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(lambda name: check_file(folder / name, listed[name], remedy), listed):
            pass


def check_file(path: Path, listed: Any, remedy: str, *, contents: bool = True) -> None:
    """Check the size of a file and, with ``contents``, its checksum.

    Args:
        path: Path of the file.
        listed: Size and checksum of the file.
        remedy: Remedy of the error.
        contents: Whether to read the file.

    Raises:
        CheckpointError: If it is missing, unreadable, or has another size or content.
    """
    size = check_regular(path, remedy)
    try:
        same = [size, file_checksum(path)] == listed if contents else [size] == listed[:1]
    except OSError as problem:
        raise unreadable(path, problem, remedy, CheckpointError) from None
    if not same:
        raise CheckpointError(f"{path}: is damaged or was replaced (its checksum differs)", remedy)


def not_verified(path: Path) -> None:
    """Log the warning that a file has no checksum: versions before there were any wrote none."""
    _LOG.warning("%s: not verified: written by an older version", path)


def warn_changed(path: Path) -> None:
    """Log the warning that a file that its user may change has changed."""
    _LOG.warning("%s: was changed or damaged since it was written", path)


def signed_text(text: str) -> str:
    """Return a text of lines, in a format whose comments begin with #, with its checksum in a last line."""
    return f"{text}# xxh3_128 of the lines above: {checksum(text.encode())}\n"


def is_verified_text(path: Path, text: str, remedy: str) -> bool:
    """Check a text against the last line of :func:`signed_text`, and return whether it has one.

    Raises:
        CheckpointError: If the text was changed.
    """
    line = _LINE.search(text)
    if line is None and "# xxh3_128 of" not in text:
        return False
    if line is None or line[1] != checksum(text[: line.start()].encode()):
        raise CheckpointError(f"{path}: is damaged or was changed (its checksum differs)", remedy)
    return True


def signed_record(record: Mapping[str, Any]) -> str:
    """Return a record as JSON, with the checksum of its other entries in the entry ``xxh3_128``."""
    return json.dumps({**record, "xxh3_128": _record_checksum(record)})


def read_signed_record(path: Path, remedy: str) -> tuple[dict[str, Any], bool]:
    """Return the entries of a record that :func:`signed_record` made, and whether it has a checksum.

    Raises:
        CheckpointError: If the file is missing, unreadable or damaged.
    """
    record = read_json(path, remedy, largest=1 << 20)
    found = record.pop("xxh3_128", None)
    if found is not None and found != _record_checksum(record):
        raise CheckpointError(f"{path}: is damaged (its checksum differs)", remedy)
    return record, found is not None


def _record_checksum(record: Mapping[str, Any]) -> str:
    return checksum(json.dumps(record, sort_keys=True).encode())
