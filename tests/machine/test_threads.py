"""Number of threads available to this process: CPU affinity, and quotas of Linux control groups."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tnnlm.machine import threads
from tnnlm.machine.threads import ThreadLimit, cgroup_quota, limit_threads, thread_limit

FILES: dict[str, tuple[dict[str, str], float | None]] = {
    "version 2, in a container": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"},
        1.5,
    ),
    "version 2, without a quota": (
        {"proc/self/cgroup": "0::/user\n", "sys/fs/cgroup/user/cpu.max": "max 100000\n"},
        None,
    ),
    "version 2, the parent's is smaller": (
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/pod/box/cpu.max": "400000 100000\n",
        },
        0.5,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:devices:/x\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/\n",
            "sys/fs/cgroup/cpu/docker/a/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu/docker/a/cpu.cfs_period_us": "100000\n",
        },
        3.0,
    ),
    "version 1, the path is the host's": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/a\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        2.0,
    ),
    "version 1, mounted with another controller": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/a\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpuset/docker/a/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpuset/docker/a/cpu.cfs_period_us": "100000\n",
        },
        2.5,
    ),
    "version 1, mounted in another order": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpuacct,cpu/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpuacct,cpu/cpu.cfs_period_us": "100000\n",
        },
        1.5,
    ),
    "version 1, not mounted": ({"proc/self/cgroup": "4:cpu,cpuacct:/docker/a\n"}, None),
    "version 1, without a quota": (
        {
            "proc/self/cgroup": "4:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "damaged": ({"proc/self/cgroup": "nonsense\n0::/\n", "sys/fs/cgroup/cpu.max": "12\n"}, None),
    "no control groups": ({}, None),
}


def write_root(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("case", FILES)
def test_quota_of_the_control_group(case: str, tmp_path: Path) -> None:
    files, expected = FILES[case]
    assert cgroup_quota(write_root(tmp_path, files)) == expected


def test_control_group_of_any_name_is_read(tmp_path: Path) -> None:
    write_root(tmp_path, FILES["version 2, in a container"][0])
    (tmp_path / "proc/self/cgroup").write_bytes(b"0::/caf\xe9\n")
    assert cgroup_quota(tmp_path) == 1.5


def test_limit_is_the_smaller_of_affinity_and_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_root(tmp_path, FILES["version 2, in a container"][0])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert thread_limit(root) == ThreadLimit(2, "control group's quota of 1.5 CPUs")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert thread_limit(root).threads == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert thread_limit(tmp_path / "nothing") == ThreadLimit(1, "CPU count")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Return a function that lists the calls of ``torch.set_num_threads``, with 64 threads at the start."""
    told: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: (told or [64])[-1])
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    for name in threads._CHOSEN:
        monkeypatch.delenv(name, raising=False)
    return lambda: told


def test_threads_are_lowered_to_the_limit_and_never_raised(
    used: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "thread_limit", lambda: ThreadLimit(3, "quota"))
    assert limit_threads() == ThreadLimit(3, "quota")
    assert used() == [3]
    monkeypatch.setattr(threads, "thread_limit", lambda: ThreadLimit(8, "quota"))
    assert limit_threads() == ThreadLimit(3, "PyTorch's default")
    assert used() == [3]


@pytest.mark.parametrize("value", ["64", " 064 ", "+64", "64,2", "64, 2"])
def test_number_of_threads_set_by_the_user_is_kept(
    value: str, used: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "thread_limit", lambda: ThreadLimit(3, "quota"))
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert limit_threads() == ThreadLimit(64, "OMP_NUM_THREADS")
    assert used() == []


@pytest.mark.parametrize("value", ["", " ", "0", "-1", "abc", "4x", "1.5", "0x4", "4,", "4,0", "4 2"])
@pytest.mark.parametrize("name", threads._CHOSEN)
def test_value_that_openmp_ignores_is_no_choice(
    name: str, value: str, used: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "thread_limit", lambda: ThreadLimit(3, "quota"))
    monkeypatch.setenv(name, value)
    assert limit_threads() == ThreadLimit(3, "quota")
    assert used() == [3]
