"""A kill at any point of a write leaves the old or the new content, and nothing after the next start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.scripts import ROOT
from tnnlm.errors import UserError
from tnnlm.files import only_process, remove_leftovers, restore_replaced, write_text
from tnnlm.files.leftovers import temporary_path
from tnnlm.files.processes import Process, this_process

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
KILLED_AT_EVERY_POINT = """
import os, signal, sys
from pathlib import Path
from tnnlm.files import atomic, atomic_folder, remove_leftovers, write_text

folder = Path(sys.argv[1])
if sys.argv[2] == "renamed":
    atomic.exchange = lambda new, old: False

def write(text):
    with atomic_folder(folder / "model") as temporary:
        for name in ("weights", "config"):
            (temporary / name).write_text(text)
    write_text(folder / "report", text)

def kill_at(number):
    points = [0]
    def count(event, arguments):
        if event == "open" or event.startswith(("os.", "shutil.", "ctypes.")):
            points[0] += 1
            if points[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)

write("0")
number, status, before = 0, 1, "0"
while status:
    number += 1
    child = os.fork()
    if not child:
        kill_at(number)
        write(str(number))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    remove_leftovers(folder)
    assert sorted(os.listdir(folder)) == ["model", "report"], os.listdir(folder)
    found = {(folder / "model" / name).read_text() for name in os.listdir(folder / "model")}
    assert os.listdir(folder / "model").__len__() == 2 and len(found) == 1, found
    after = found.pop()
    assert after in (before, str(number))
    assert (folder / "report").read_text() in (before, str(number))
    before = after
    write_text(folder / "report", before)
print(number, after)
"""


@FORKS
@pytest.mark.parametrize("way", ["exchanged", "renamed"])
def test_a_kill_at_every_point_leaves_one_whole_folder(way: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_POINT, str(tmp_path / "out"), way],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    points, content = map(int, done.stdout.split())
    assert content == points > 15
    assert ("restored" in done.stderr) is (way == "renamed")


DEAD = this_process()._replace(start="00000001")
"""Earlier process with the number of this one."""
FOREIGN = Process("0123abcd", 1, "00000001")
"""Process of another host, of which nobody here knows whether it runs."""


def left_by(process: Process, name: str, kind: str = "tmp", number: int = 7) -> Path:
    """Create and return a temporary file for ``name``; a folder for ``kind`` old."""
    path = Path(f".{name}.{process.tag}-{number}.{kind}")
    if kind == "old":
        path.mkdir()
        (path / "part").write_text("old")
    else:
        path.write_text("half")
    return path


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="only Linux tells the start of a process")
def test_only_files_of_ended_processes_are_removed() -> None:
    kept = {
        temporary_path(Path("a")).name,
        left_by(FOREIGN, "a").name,
        ".a.tmp", ".a.4711.tmp", "a.old", f"a.{DEAD.tag}-7.tmp", ".a.0123abcd-1-00000001.tmp",
    }  # fmt: skip
    for name in kept:
        Path(name).touch()
    left_by(DEAD, "a")
    link = Path(f".b.{DEAD.tag}-8.tmp")
    link.symlink_to("elsewhere")
    remove_leftovers(Path())
    assert {path.name for path in Path().iterdir()} == kept | {link.name}


def test_files_of_another_host_are_removed_by_the_owner_and_after_a_day() -> None:
    old, owned, other = left_by(FOREIGN, "a", number=1), left_by(FOREIGN, "b"), left_by(FOREIGN, "c")
    os.utime(old, (0, 0))
    remove_leftovers(Path(), owned="b")
    assert (old.exists(), owned.exists(), other.exists()) == (False, False, True)
    remove_leftovers(Path(), owned="*")
    assert not other.exists()


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="only Linux tells the start of a process")
def test_a_folder_is_put_back_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    left_by(DEAD, "model", "old")
    left_by(DEAD, "model")
    restore_replaced(Path("model"))
    assert capsys.readouterr().err == "model: restored, because a process was killed while it replaced it\n"
    assert Path("model/part").read_text() == "old"
    left_by(DEAD, "model", "old")
    remove_leftovers(Path())  # the killed process had written the new one
    assert os.listdir() == ["model"]
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="only Linux tells the start of a process")
def test_a_write_removes_what_was_left_in_its_folder() -> None:
    left = left_by(DEAD, "other")
    write_text(Path("report"), "new")
    assert not left.exists()


@FORKS
def test_lock_files_of_killed_processes_are_removed() -> None:
    code = """
import os, signal
from pathlib import Path
from tnnlm.errors import UserError
from tnnlm.files import only_process
with only_process(Path("run"), UserError("in use")):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert os.listdir() == [".run.lock"]
    Path(".user.lock").touch()
    with only_process(Path("other"), UserError("in use")):
        remove_leftovers(Path())
        assert sorted(os.listdir()) == [".other.lock", ".user.lock"]


def test_missing_folders_have_no_leftovers() -> None:
    remove_leftovers(Path("nowhere"))
    restore_replaced(Path("nowhere/model"))
    assert not Path("nowhere").exists()
