"""A second owner is refused and told who the first is; no lock outlives the process that held it."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import pytest

from tests.support.scripts import ROOT
from tnnlm.errors import UserError
from tnnlm.files import locks, network, only_process

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs signals and fork")
HOLD = """
import os, sys
from pathlib import Path
from tnnlm.errors import UserError
from tnnlm.files import only_process
with only_process(Path("run"), UserError("in use")):
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network._said.clear()
    Path("run").mkdir()


@contextmanager
def holder(block: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process that runs ``block`` while it holds the lock, and wait for its first line."""
    code = HOLD + "".join(f"    {line}\n" for line in block.splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def refusal(path: str = "run") -> str:
    """Return the error of an attempt to lock."""
    with pytest.raises(UserError) as refused, only_process(Path(path), UserError(f"{path}: in use", "wait")):
        pass
    return str(refused.value)


def lock(path: str = "run") -> None:
    with only_process(Path(path), UserError(f"{path}: in use")):
        pass


def test_the_holder_is_named() -> None:
    with holder('print("held", flush=True)\nsys.stdin.read()') as process:
        found = refusal()
        named = rf"process {process.pid} on {re.escape(socket.gethostname())} since 20..-..-.. ..:..:.."
        assert re.fullmatch(rf"run: in use \({named}\); wait", found)
    lock()
    assert os.listdir() == ["run"]


def test_a_link_is_the_same_folder() -> None:
    Path("link").symlink_to("run")
    with only_process(Path("link"), UserError("in use")):
        assert refusal("run").startswith("run: in use (process ")


@POSIX
def test_a_folder_under_another_path_is_the_same() -> None:
    # As a bind mount shows it, whose lock file is another one.
    descriptor = os.open("run", os.O_RDONLY)
    assert filelock.lock_descriptor(descriptor, blocking=False)
    assert "has locked the folder itself" in refusal()
    assert os.listdir() == ["run"]
    os.close(descriptor)
    lock()


@POSIX
def test_a_child_does_not_keep_the_lock_of_a_killed_process() -> None:
    block = """if os.fork():
    print("held", flush=True)
    os.kill(os.getpid(), 9)
sys.stdin.read()"""
    with holder(block) as process:
        assert process.wait() == -signal.SIGKILL
        assert Path(".run.lock").exists()
        lock()  # while the child still waits
        assert os.listdir() == ["run"]


@POSIX
def test_a_child_that_ends_does_not_release_the_lock() -> None:
    block = """if os.fork():
    os.wait()
    print("held", flush=True)
    sys.stdin.read()"""
    with holder(block):
        assert "process" in refusal()


def test_a_damaged_record_names_nobody() -> None:
    with only_process(Path("run"), UserError("in use")):
        whole = Path(".run.lock").read_text()
        for text in ("", "\n" + "[" * 2000, whole.replace('"pid": ', '"pid": -')):
            Path(".run.lock").write_text(text)
            assert refusal() == "run: in use; wait"


@POSIX
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_file_stands_for_one(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def acquire(self: Any, **options: Any) -> None:
        Path(self.lock_file).touch()
        raise OSError(number, os.strerror(number))

    class NoLock(filelock.FileLock):
        pass

    monkeypatch.setattr(NoLock, "acquire", acquire)
    monkeypatch.setattr(locks, "FileLock", NoLock)
    with only_process(Path("run"), UserError("in use")):
        assert refusal() == f"run: in use (see {Path.cwd()}/.run.soft.lock); wait"
    lock()
    assert capsys.readouterr().err.count("its file system has no locks; .run.soft.lock stands for one") == 1
    assert os.listdir() == ["run"]


@POSIX
def test_the_file_of_a_killed_process_that_stands_for_a_lock_is_taken_over() -> None:
    code = (
        'import filelock, os; lock = filelock.SoftFileLock("soft"); lock.acquire(); os.kill(os.getpid(), 9)'
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert Path("soft").exists()
    locks._soft_lock(Path("soft"), UserError("in use")).release()
    assert os.listdir() == ["run"]


def test_a_network_file_system_is_named_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = (
        f"/dev/sda / ext4 rw 0 0\nserver:/home {str(Path.cwd()).replace(' ', chr(92) + '040')} nfs4 rw 0 0\n"
    )
    monkeypatch.setattr(network, "mount_table", lambda: table)
    lock()
    lock()
    assert capsys.readouterr().err == (
        f"warning: {Path.cwd()}: is on nfs4, a network file system, where a lock may not hold between "
        "machines; do not use it for the same run or folder on two of them\n"
    )
    monkeypatch.setattr(network, "mount_table", lambda: table + f"tmpfs {Path.cwd()} tmpfs rw 0 0\n")
    assert network.network_file_system(Path("run")) is None


def test_systems_without_a_table_of_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise FileNotFoundError

    monkeypatch.setattr(network, "mount_table", missing)
    assert network.network_file_system(Path("run")) is None
