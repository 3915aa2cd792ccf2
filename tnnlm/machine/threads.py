"""How many CPU threads this process may use: its affinity, and the quota of its control group.

PyTorch starts one thread per core it sees. In a container with a CPU quota (Docker's ``--cpus``, Kubernetes'
limits) it sees the cores of the whole host, and threads beyond the quota only stop each other.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

_CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""variables by which a user, or torchrun, has chosen already"""
_NUMBER = r"\s*\+?0*[1-9][0-9]*\s*"
_NUMBERS = re.compile(rf"{_NUMBER}(,{_NUMBER})*", re.ASCII)
"""what OpenMP takes: a number of threads, or one for each level of nested loops"""
_FILES_V1: tuple[str, ...] = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
_FILES_V2: tuple[str, ...] = ("cpu.max",)
"""of a control group: quota and period"""


class ThreadLimit(NamedTuple):
    """Threads that may compute at the same time, and what limits them."""

    threads: int
    reason: str


def thread_limit(root: Path = Path("/")) -> ThreadLimit:
    """The smaller of the cores that this process may run on and its control group's CPU quota.

    A quota that is no whole number is rounded up, as Go and the JVM do.

    Args:
        root: of the file system, where ``proc`` and ``sys`` are looked for.
    """
    if hasattr(os, "sched_getaffinity"):
        limit = ThreadLimit(len(os.sched_getaffinity(0)), "CPU affinity")
    else:
        limit = ThreadLimit(os.cpu_count() or 1, "CPU count")
    quota = cgroup_quota(root)
    if quota is not None and math.ceil(quota) < limit.threads:
        return ThreadLimit(max(1, math.ceil(quota)), f"control group's quota of {quota:g} CPUs")
    return limit


def limit_threads() -> ThreadLimit:
    """Lower PyTorch's number of threads to :func:`thread_limit`, and return the number in use.

    It is never raised, and a choice by OMP_NUM_THREADS or MKL_NUM_THREADS stands. A value that OpenMP
    ignores, such as 0 or a word, is none: PyTorch starts a thread per core then.
    """
    for name in _CHOSEN:
        if _NUMBERS.fullmatch(os.environ.get(name, "")):
            return ThreadLimit(torch.get_num_threads(), name)
    limit = thread_limit()
    if limit.threads >= torch.get_num_threads():
        return ThreadLimit(torch.get_num_threads(), "PyTorch's default")
    torch.set_num_threads(limit.threads)
    return limit


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """CPUs that the control group of this process and its parents may use (versions 1 and 2); None if there
    is no quota.

    Args:
        root: of the file system.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            mounts, files = [root / "sys/fs/cgroup"], _FILES_V2
        elif "cpu" in controllers.split(","):
            mounts, files = _mounts_v1(root), _FILES_V1
        else:
            continue
        found = (_quota(folder, files) for folder in _groups(mounts, path))
        quotas += [quota for quota in found if quota is not None]
    return min(quotas, default=None)


def _mounts_v1(root: Path) -> list[Path]:
    """Folders of the controller ``cpu``: its own, or one that it shares, whatever the order of the names.
    Only some systems add a link ``cpu`` to a shared one."""
    try:
        return [folder for folder in (root / "sys/fs/cgroup").iterdir() if "cpu" in folder.name.split(",")]
    except OSError:
        return []


def _groups(mounts: list[Path], path: str) -> Iterator[Path]:
    """The folder of a control group under every mount, and those of its parents."""
    for mount in mounts:
        # Inside a container the path may be the host's: its own limits lie at the mount itself then.
        own = mount / path.strip("/")
        yield own
        yield from (parent for parent in own.parents if parent.is_relative_to(mount))


def _quota(folder: Path, files: tuple[str, ...]) -> float | None:
    """CPUs of one control group, from its quota and period in microseconds; None for no quota ("max", -1)."""
    try:
        texts = [(folder / name).read_text(encoding="utf-8") for name in files]
        quota, period = map(int, " ".join(texts).split())
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None
