"""Number of usable CPU threads, from the CPU affinity of the process and the quota of its control group.

PyTorch starts one thread per visible core. In a container with a CPU quota (Docker's ``--cpus``, Kubernetes'
limits) all cores of the host are visible, and threads beyond the quota only cause throttling. Whether threads
that wait for each other keep their cores busy is decided before torch is imported, so this module imports it
only where it is used.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables with which the user, or torchrun, sets the number of threads."""
_added: dict[str, str] = {}
"""Environment variables that :func:`share_cores` has set."""
_NUMBER = r"\s*\+?0*[1-9][0-9]*\s*"
_NUMBERS = re.compile(rf"{_NUMBER}(,{_NUMBER})*", re.ASCII)
"""Values that OpenMP accepts: a number of threads, or one number per nesting level."""
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Environment variables with which the user sets how threads of OpenMP wait (GNU, LLVM and Intel)."""
_SHORT_WAIT = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""Iterations (GNU) or milliseconds (LLVM, Intel) for which a thread spins before it sleeps.

Measured with GNU's library on two cores, training alone takes as long as with the default wait, and next to
one busy process it keeps 0.35 of its speed instead of 0.31. Waiting for a tenth of that, or
OMP_WAIT_POLICY=PASSIVE, keeps 0.6, but costs a training or decoding step 14 to 30 % when nothing else runs.
"""
_FILES_V1: tuple[str, ...] = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
"""Files of a version 1 control group with quota and period, in microseconds."""
_FILES_V2: tuple[str, ...] = ("cpu.max",)
"""Files of a version 2 control group with quota and period, in microseconds."""


class ThreadLimit(NamedTuple):
    """Number of threads that can run at the same time, and the reason for the limit."""

    threads: int
    reason: str


def thread_limit(root: Path = Path("/")) -> ThreadLimit:
    """Return the smaller of the CPU affinity of this process and the CPU quota of its control group.

    A fractional quota is rounded up, as in Go and the JVM.

    Args:
        root: Root of the file system with ``proc`` and ``sys``.
    """
    if hasattr(os, "sched_getaffinity"):
        limit = ThreadLimit(len(os.sched_getaffinity(0)), "CPU affinity")
    else:
        limit = ThreadLimit(os.cpu_count() or 1, "CPU count")
    quota = cgroup_quota(root)
    if quota is not None and math.ceil(quota) < limit.threads:
        return ThreadLimit(max(1, math.ceil(quota)), f"control group's quota of {quota:g} CPUs")
    return limit


def share_cores() -> None:
    """Set the environment of this process and its children so that they share the cores with other programs.

    Threads of OpenMP that wait for each other sleep after a short time of spinning. A thread that spins keeps
    its core, while the thread that it waits for shares the other one with another program. Tokenizers start
    as many threads as PyTorch may use. Variables that the user has set are kept. The libraries read them when
    they are loaded, so this does nothing once torch is imported.
    """
    if "torch" in sys.modules:
        return
    if not any(name in os.environ for name in _WAITING):
        _added.update(_SHORT_WAIT)
    if "RAYON_NUM_THREADS" not in os.environ:
        # torchrun gives every rank one thread, but only one rank tokenizes while the others wait.
        names = () if "TORCHELASTIC_RUN_ID" in os.environ else filter(_chosen, _CHOSEN)
        own = [int(os.environ[name].partition(",")[0]) for name in names]
        _added["RAYON_NUM_THREADS"] = str(own[0] if own else thread_limit().threads)
    os.environ.update(_added)


def user_environment() -> dict[str, str]:
    """Return the environment without what :func:`share_cores` has added, for programs of others."""
    return {name: value for name, value in os.environ.items() if name not in _added}


def limit_threads() -> ThreadLimit:
    """Lower PyTorch's number of threads to :func:`thread_limit`, and return the number in use.

    The number is never raised, and OMP_NUM_THREADS or MKL_NUM_THREADS takes precedence. A value that OpenMP
    ignores, such as 0 or a word, counts as unset, because PyTorch then starts one thread per core.
    """
    import torch

    for name in filter(_chosen, _CHOSEN):
        return ThreadLimit(torch.get_num_threads(), name)
    limit = thread_limit()
    if limit.threads >= torch.get_num_threads():
        return ThreadLimit(torch.get_num_threads(), "PyTorch's default")
    torch.set_num_threads(limit.threads)
    return limit


def loader_processes(wanted: int) -> int:
    """Return the number of data loader processes to start: ``wanted``, at most one per usable CPU."""
    return min(wanted, thread_limit().threads)


def _chosen(name: str) -> bool:
    """Return whether an environment variable holds a number of threads."""
    return _NUMBERS.fullmatch(os.environ.get(name, "")) is not None


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """Return the CPU quota of this process in CPUs, or None without a quota.

    It is the smallest quota of its control group (version 1 or 2) and the parents of that group.

    Args:
        root: Root of the file system with ``proc`` and ``sys``.
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
    """Return the mount points of the controller ``cpu``, which may be shared, such as ``cpu,cpuacct``.

    Only some systems add a link ``cpu`` to a shared mount point.
    """
    try:
        return [folder for folder in (root / "sys/fs/cgroup").iterdir() if "cpu" in folder.name.split(",")]
    except OSError:
        return []


def _groups(mounts: list[Path], path: str) -> Iterator[Path]:
    """Yield the folders of a control group and its parents under every mount point."""
    for mount in mounts:
        # In a container the path may be the host's; the limits are then at the mount point itself.
        own = mount / path.strip("/")
        yield own
        yield from (parent for parent in own.parents if parent.is_relative_to(mount))


def _quota(folder: Path, files: tuple[str, ...]) -> float | None:
    """Return the quota of one control group in CPUs (quota / period), or None without a quota ("max", -1)."""
    try:
        texts = [(folder / name).read_text(encoding="utf-8") for name in files]
        quota, period = map(int, " ".join(texts).split())
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None
