"""Archives that ``torch.save`` writes: their structure, and the checksum of every member.

``torch.load`` verifies no checksums, and unpacks whatever an archive claims.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_BLOCK = 1 << 20
_LOCAL = struct.Struct("<26xHH")
"""Header of a member: the lengths of its name and of further fields, which follow it."""
_VALUES = re.compile(r"/data/[^/]*$")
"""Name of a member with the values of a tensor."""


def write_archive(content: Any, path: Path, name: Path) -> None:
    """Save a checkpoint and flush it to the disk.

    Args:
        content: Dict of plain data and tensors.
        path: File to write.
        name: Path that errors name, if ``path`` is a temporary file.

    Raises:
        OSError: If the disk is full, or on any other error of the operating system.
    """
    try:
        # An open file, because torch's writer of paths reports a full disk only in a message.
        with path.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        # torch raises a second error while it closes the file after the failed write.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        raise OSError(cause.errno, os.strerror(cause.errno), str(name)) from None


def archive_fault(path: Path, *, tensors: bool = True) -> str | None:
    """Return what is wrong with an archive in a few words; None if it is intact.

    Its members are stored without compression, so none is larger than the file. They are read once, in
    parallel.

    Args:
        path: The archive.
        tensors: Whether to read the values of tensors, which are nearly all of the file.

    Raises:
        OSError: If the file can't be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
        return "it is not an archive, or truncated"
    if len({member.filename for member in members}) != len(members):
        return "two of its members have the same name"
    if any(member.compress_type or member.flag_bits & 1 for member in members):
        return "a member is compressed or encrypted"
    size = path.stat().st_size
    if sum(member.file_size for member in members) > size:
        return "its members are larger than the file"
    if not all(0 <= member.header_offset < size for member in members):
        return "a member begins outside of the file"
    read = [member for member in members if tensors or not _VALUES.search(member.filename)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        intact = pool.map(lambda member: _is_intact(path, member), read)
        damaged = [member.filename for member, same in zip(read, intact, strict=True) if not same]
    return f"checksum of {_listed(damaged)}" if damaged else None


def _is_intact(path: Path, member: zipfile.ZipInfo) -> bool:
    """Return whether a member has the checksum that the directory of the archive states."""
    found, left = 0, member.file_size
    with path.open("rb") as file:
        file.seek(member.header_offset)
        header = file.read(_LOCAL.size)
        if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
            return False
        file.seek(sum(_LOCAL.unpack(header)), os.SEEK_CUR)
        while left and (data := file.read(min(_BLOCK, left))):
            found, left = zlib.crc32(data, found), left - len(data)
    return not left and found == member.CRC


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0][:80]!r}{more}"
