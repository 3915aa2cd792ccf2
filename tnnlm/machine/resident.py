"""Resident memory of this process and free memory, measured without slow imports for short processes."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path


def resident_peak() -> int:
    """Return the peak resident memory of this process in bytes, or 0 if the system doesn't report it.

    On Linux it comes from /proc, because getrusage starts from the peak of the parent process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    with contextlib.suppress(ImportError):
        import resource  # Unix only

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(ImportError, AttributeError):
        import psutil  # the extra [train] installs it on Windows, the only system where it reports the peak

        return int(psutil.Process().memory_info().peak_wset)
    return 0


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the memory in bytes that Linux can give to programs without swapping; None on other systems.

    The limit of a container counts where its control group is mounted at its root, as is usual.

    Args:
        root: Root of the file system with ``proc`` and ``sys``.
    """
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit
        group = root / "sys/fs/cgroup"
        limit, used = (
            int((group / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current")
        )
        found.append(max(0, limit - used))
    return min(found, default=None)
