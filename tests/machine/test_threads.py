"""Threads of this process: CPU affinity and quotas of Linux control groups, and how threads wait."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.scripts import ROOT
from tnnlm.machine import threads
from tnnlm.machine.threads import ThreadLimit, cgroup_quota, limit_threads, loader_processes, thread_limit

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


ENTRY_POINTS = {
    "train.py": ["train.py"],
    "convert.py": ["convert.py"],
    "generate.py": ["generate.py", "--prompt", "a"],
    "serve.py": ["tools/serve.py"],
    "prepare_data.py": ["tools/prepare_data.py"],
    "tnnlm train": ["-m", "tnnlm", "train"],
    "benchmark.py": ["tools/benchmark.py", "--help"],
    "reproduce.py": ["tools/reproduce.py", "--list"],
}
"""Command lines that import torch, by name."""
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "RAYON_NUM_THREADS")


def start(words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the root of the repository without variables that set threads, except the given ones."""
    unset = {*threads._WAITING, *threads._CHOSEN, "RAYON_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in unset} | variables
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


def seen_by_torch(words: list[str], folder: Path, **variables: str) -> list[str]:
    """Return the values of ``VARIABLES`` at the moment when a command line imports torch."""
    code = f"import os, sys\nprint(*(os.environ.get(name, '-') for name in {VARIABLES!r}))\nsys.exit()\n"
    (folder / "torch.py").write_text(code, encoding="utf-8")
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "tools")])
    done = start(words, PYTHONPATH=path, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_threads_wait_for_a_short_time_before_torch_is_imported(name: str, tmp_path: Path) -> None:
    expected = ["-", "10000", "1", str(thread_limit().threads)]
    assert seen_by_torch(ENTRY_POINTS[name], tmp_path) == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"OMP_WAIT_POLICY": "ACTIVE", "RAYON_NUM_THREADS": "7"}, ["ACTIVE", "-", "-", "7"]),
        ({"GOMP_SPINCOUNT": "100", "OMP_NUM_THREADS": "3,2"}, ["-", "100", "-", "3"]),
        (
            {"KMP_BLOCKTIME": "0", "OMP_NUM_THREADS": "7", "TORCHELASTIC_RUN_ID": "none"},
            ["-", "-", "0", str(thread_limit().threads)],
        ),
    ],
)
def test_waiting_and_threads_set_by_the_user_are_kept(
    variables: dict[str, str], expected: list[str], tmp_path: Path
) -> None:
    assert seen_by_torch(ENTRY_POINTS["generate.py"], tmp_path, **variables) == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PyTorch brings GNU OpenMP on Linux only")
def test_openmp_of_a_process_and_of_its_children_waits_for_a_short_time() -> None:
    code = (
        "import multiprocessing as m; from tnnlm.machine.threads import share_cores\n"
        "def child(): import torch\n"
        "if __name__ == '__main__':\n"
        "    share_cores(); import torch\n"
        "    p = m.get_context('spawn').Process(target=child); p.start(); p.join()"
    )
    Path("waiting.py").write_text(code, encoding="utf-8")
    done = start([str(Path("waiting.py").resolve())], OMP_DISPLAY_ENV="VERBOSE", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("GOMP_SPINCOUNT = '10000'") == 2


def test_environment_is_not_changed_once_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*threads._WAITING, "RAYON_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    threads.share_cores()
    assert dict(os.environ) == before


def test_loader_processes_are_at_most_the_usable_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "thread_limit", lambda: ThreadLimit(3, "quota"))
    assert [loader_processes(wanted) for wanted in (0, 2, 3, 64)] == [0, 2, 3, 3]
