"""glibc's allocator, told to keep large blocks: what it hands back it page-faults in again next step."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_large_blocks() -> bool:
    """Serve large tensors from the heap and never trim it. Whole training steps on a CPU get 12 to 60 %
    faster.

    Returns:
        whether it was done: only on glibc, and not against a choice of the user's own
        (any MALLOC_* variable, or a preloaded allocator).
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "LD_PRELOAD" in os.environ
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 1 << 28))
        return all(libc.mallopt(key, value) == 1 for key, value in settings)
    return False
