"""Files and folders are written atomically, and no temporary file remains."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from tnnlm.errors import OS_PROBLEMS, UserError
from tnnlm.files import (
    atomic,
    atomic_file,
    atomic_folder,
    check_file,
    check_folder,
    check_parents,
    only_process,
    write_text,
)


def fill_file(temporary: Path) -> None:
    temporary.write_text("new")


def fill_folder(temporary: Path) -> None:
    (temporary / "part").write_text("new")


KINDS = pytest.mark.parametrize(
    ("atomic", "fill"), [(atomic_file, fill_file), (atomic_folder, fill_folder)], ids=["file", "folder"]
)
Atomic = Callable[[Path], AbstractContextManager[Path]]
Fill = Callable[[Path], None]


def content(path: Path) -> str:
    """Return the text of a file, or of the only file of a folder."""
    return (path / "part" if path.is_dir() else path).read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@KINDS
def test_path_appears_at_the_end_of_the_block(atomic: Atomic, fill: Fill, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "target"
    with atomic(path) as temporary:
        fill(temporary)
        assert not path.exists()
        # A rename is atomic only within a file system.
        assert temporary.parent == path.parent
    assert content(path) == "new"
    assert names(path.parent) == ["target"]


@KINDS
def test_path_is_replaced(atomic: Atomic, fill: Fill, tmp_path: Path) -> None:
    path = tmp_path / "target"
    with atomic(path) as temporary:
        fill(temporary)
        (temporary / "part" if temporary.is_dir() else temporary).write_text("old")
    assert content(path) == "old"
    with atomic(path) as temporary:
        fill(temporary)
        assert content(path) == "old"
    assert content(path) == "new"
    assert names(tmp_path) == ["target"]


@KINDS
@pytest.mark.parametrize("error", [OSError("disk is full"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_error_leaves_the_old_one_and_no_other_file(
    atomic: Atomic, fill: Fill, error: BaseException, tmp_path: Path
) -> None:
    path = tmp_path / "target"
    with atomic(path) as temporary:
        fill(temporary)

    def fail() -> None:
        with atomic(path) as temporary:
            if temporary.is_dir():
                (temporary / "part").write_text("half")
            else:
                temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert content(path) == "new"
    assert names(tmp_path) == ["target"]


@KINDS
def test_error_at_the_first_time_leaves_nothing(atomic: Atomic, fill: Fill, tmp_path: Path) -> None:
    def fail() -> None:
        with atomic(tmp_path / "target") as temporary:
            fill(temporary)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert names(tmp_path) == []


def test_folder_replaces_all_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "target"
    path.mkdir()
    (path / "stale").write_text("old")
    with atomic_folder(path) as temporary:
        fill_folder(temporary)
    assert names(path) == ["part"]


@pytest.mark.parametrize("call", [1, 2], ids=["old one moved away", "new one moved in"])
def test_interrupted_exchange_leaves_one_complete_folder(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "target"
    path.mkdir()
    (path / "part").write_text("old")
    monkeypatch.setattr("tnnlm.files.atomic.exchange", lambda new, old: False)
    calls, rename = [0], os.replace

    def interrupted(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).is_dir():
            calls[0] += 1
            if calls[0] == call:
                raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as temporary:
        fill_folder(temporary)
    assert content(path) == {1: "old", 2: "new"}[call]
    assert names(tmp_path) == ["target"]


@pytest.mark.skipif(os.name == "nt", reason="needs permissions")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "file", "new")
        with atomic_folder(tmp_path / "folder") as temporary:
            fill_folder(temporary)
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "file", tmp_path / "folder")]
    assert modes == [0o666 & ~mask, 0o777 & ~mask]
    assert (tmp_path / "folder/part").stat().st_mode & 0o777 == 0o666 & ~mask


@KINDS
@pytest.mark.skipif(os.name == "nt", reason="needs permissions")
def test_permissions_of_what_is_replaced_are_kept(atomic: Atomic, fill: Fill, tmp_path: Path) -> None:
    path = tmp_path / "target"
    with atomic(path) as temporary:
        fill(temporary)
    path.chmod(0o750)
    with atomic(path) as temporary:
        fill(temporary)
    assert path.stat().st_mode & 0o777 == 0o750


def test_what_has_the_temporary_name_already_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that others can write to, it may be a link to any file of the user."""
    mine, link = tmp_path / "mine", tmp_path / ".a.txt.tmp"
    mine.write_text("mine")
    link.symlink_to(mine)
    names = iter([link, tmp_path / ".a.txt.2.tmp"])
    monkeypatch.setattr(atomic, "temporary_path", lambda path: next(names))
    write_text(tmp_path / "a.txt", "new")
    assert (mine.read_text(), (tmp_path / "a.txt").read_text()) == ("mine", "new")
    assert link.is_symlink()


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    with atomic_folder(tmp_path / "link") as temporary:
        fill_folder(temporary)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "target") == "new"


def test_write_text_is_utf8_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    write_text(path, "naïve 漢字")
    assert path.read_bytes() == "naïve 漢字".encode()
    assert names(tmp_path) == ["a.txt"]


def test_write_text_that_fails_leaves_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "a lone surrogate is not UTF-8: \ud800")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


VIRTUAL = pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a virtual file system")


@VIRTUAL
@pytest.mark.parametrize("check", [check_parents, check_folder])
def test_folder_that_nobody_can_create_is_refused(check: Callable[[Path], None]) -> None:
    with pytest.raises(UserError, match=r"^/proc/x/y: nothing can be created in /proc; choose another path$"):
        check(Path("/proc/x/y"))


@VIRTUAL
@pytest.mark.parametrize("place", ["/proc/x", "/proc/x/y"])
def test_unwritable_place_is_no_bug_of_the_package(place: str) -> None:
    path = Path(place)
    for opened in (atomic_file(path), atomic_folder(path), only_process(path, UserError("is in use"))):
        with pytest.raises(UserError, match="nothing can be created"), opened:
            pass
    for write in (check_file, partial(write_text, text="")):
        with pytest.raises(UserError, match=rf"^{place}: nothing can be created in /proc"):
            write(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_device_or_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (check_file, partial(write_text, text="")):
        with pytest.raises(UserError, match=rf"^{pipe}: is not a regular file; choose another path$"):
            write(pipe)
    assert pipe.is_fifo()
    with pytest.raises(UserError, match="is a folder; give the name of a file"):
        check_file(tmp_path)
    assert names(tmp_path) == ["pipe"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_unwritable_parent_is_refused(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    with pytest.raises(UserError) as refused:
        check_folder(tmp_path / "a" / "b")
    expected = OS_PROBLEMS[number]
    assert str(refused.value) == f"{tmp_path}/a/b: {expected.reason} ({tmp_path}); {expected.remedy}"
    check_folder(tmp_path)  # data that was prepared before may be on a read-only disk
