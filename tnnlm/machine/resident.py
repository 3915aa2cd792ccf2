"""The resident memory of a process, without a package that takes seconds to import: short processes ask."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path


def resident_peak() -> int:
    """Largest resident memory of this process so far, in bytes; 0 where the system doesn't tell.

    Linux is read from /proc: a process inherits its parent's figure from getrusage.
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
        import psutil  # installed with the extra [train] on Windows, which records the peak

        return int(psutil.Process().memory_info().peak_wset)
    return 0
