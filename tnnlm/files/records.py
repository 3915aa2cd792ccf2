"""Record of the process that holds a lock, inside the lock file."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from tnnlm.files.processes import Process, this_process

_LONGEST = 1024
"""Most bytes of a lock file that are read."""


class Record(NamedTuple):
    """Process that took a lock, which may have ended."""

    process: Process
    host: str
    """Name of the process's host."""
    since: datetime
    """Time at which it took the lock."""

    def __str__(self) -> str:
        return f"process {self.process.pid} on {self.host} since {self.since:%Y-%m-%d %H:%M:%S}"


def write_record(descriptor: int) -> None:
    """Write this process to the lock file that it has locked, behind the byte that is locked on Windows."""
    process = this_process()
    fields = {
        "pid": process.pid,
        "name": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": process.host,
        "start": process.start,
    }
    # A full disk must not keep a run from being locked.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"\n{json.dumps(fields)}\n".encode())


def read_record(file: Path) -> Record | None:
    """Return the record in a lock file; None if there is none."""
    try:
        with file.open("rb") as opened:
            opened.seek(1)
            found: Any = json.loads(opened.read(_LONGEST))
        process = Process(str(found["host"]), int(found["pid"]), str(found["start"]))
        record = Record(process, str(found["name"]), datetime.fromisoformat(found["since"]).astimezone())
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return record if record.host.isprintable() and 0 < process.pid < 1 << 31 else None


def holder_of(file: Path) -> Record | None:
    """Return the record in a lock file of a process that may hold it; None if that process has ended."""
    record = read_record(file)
    return record if record is not None and record.process.is_alive else None
