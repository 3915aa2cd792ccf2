"""Identity of processes: who wrote a lock or a temporary file, and whether that process still runs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import socket
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

_UNKNOWN = "0" * 8
"""Start of a process on systems that don't tell it."""


class Process(NamedTuple):
    """Process, which a later one with the same number is not."""

    host: str
    """Hash of the host's name and of the namespace of process numbers, which differs between containers."""
    pid: int
    start: str
    """Hash of the boot and of the time of the start."""

    @property
    def tag(self) -> str:
        """Identity as a part of a file name: ``HOST-PID-START``."""
        return f"{self.host}-{self.pid}-{self.start}"

    @property
    def is_local(self) -> bool:
        """Whether the process runs, or ran, where this one can look for it."""
        return self.host == _host()

    @property
    def is_alive(self) -> bool:
        """Whether the process runs; always true for one of another host."""
        if not self.is_local:
            return True
        if not _exists(self.pid):
            return False
        start = _start(self.pid)
        return start is not None and (_UNKNOWN in (start, self.start) or start == self.start)


def this_process() -> Process:
    """Return the identity of this process, also after a fork."""
    return _process(os.getpid())


@cache
def _process(pid: int) -> Process:
    return Process(_host(), pid, _start(pid) or _UNKNOWN)


@cache
def _host() -> str:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return _short(f"{socket.gethostname()} {namespace}")


def _start(pid: int) -> str | None:
    """Return the start of a process, or ``_UNKNOWN``; None if it has ended but was not waited for."""
    try:
        # The name of the program, in parentheses, may contain anything.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:  # not Linux, or the processes of other users are hidden
        return _UNKNOWN
    state, *rest = fields.split()
    return None if state in "ZX" else _short(f"{boot} {rest[18]}")


def _exists(pid: int) -> bool:
    if sys.platform == "win32":
        # Signal 0 would end the process there.
        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
        return bool(handle) and bool(ctypes.windll.kernel32.CloseHandle(handle))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        return True
    return True


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
