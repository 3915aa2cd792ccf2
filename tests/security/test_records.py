"""Records of what this machine made or ran: no one but the user can make one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.scripts import ROOT
from tnnlm import trust
from tnnlm.errors import UserError
from tnnlm.files import cache_root
from tnnlm.trust import remember, remembered

posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="permissions of POSIX")


def folder() -> Path:
    return next(Path("cache").glob("trust*"))


def test_record_is_for_exactly_its_facts() -> None:
    assert not remembered("step", sha256="1")
    assert remember("step", sha256="1")
    assert remembered("step", sha256="1")
    assert not remembered("step", sha256="2")
    assert not remembered("module", sha256="1")
    assert not remembered("step", sha256="1", torch="2")


def test_record_under_another_key_does_not_count() -> None:
    remember("step", sha256="1")
    (folder() / "key").unlink()
    assert not remembered("step", sha256="1")
    remember("step", sha256="2")
    assert not remembered("step", sha256="1")


@posix
def test_key_and_records_are_private() -> None:
    remember("step", sha256="1")
    assert folder().stat().st_mode & 0o777 == 0o700
    assert (folder() / "key").stat().st_mode & 0o777 == 0o600
    assert {path.suffix for path in folder().iterdir()} == {"", ".json"}


def test_file_system_without_hard_links_has_records(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert remember("step", sha256="1")
    assert remembered("step", sha256="1")
    key = (folder() / "key").read_bytes()
    assert len(key) == 32
    assert {path.suffix for path in folder().iterdir()} == {"", ".json"}
    # A process that comes second takes the key of the first.
    monkeypatch.setattr(trust, "_key", lambda folder: (folder / "key").read_bytes())
    assert trust._new_key(folder()) == key


@posix
@pytest.mark.parametrize("name", ["", "key"])
def test_key_that_others_may_know_does_not_count(name: str) -> None:
    remember("step", sha256="1")
    (folder() / name).chmod(0o755 if name == "" else 0o644)
    assert not remembered("step", sha256="1")
    assert not remember("step", sha256="2")


@posix
def test_link_in_place_of_the_key_or_the_folder_does_not_count() -> None:
    remember("step", sha256="1")
    key = folder() / "key"
    key.rename("key")
    key.symlink_to(Path("key").absolute())
    assert not remembered("step", sha256="1")
    key.unlink()
    Path("key").rename(key)
    own = folder()
    target = own.rename("elsewhere").absolute()
    own.symlink_to(target)
    assert not remembered("step", sha256="1")


@pytest.mark.parametrize("length", [0, 31, 33])
def test_damaged_key_does_not_count(length: int) -> None:
    remember("step", sha256="1")
    (folder() / "key").write_bytes(bytes(length))
    assert not remembered("step", sha256="1")
    assert not remember("step", sha256="1")


def test_cache_that_cannot_be_written_is_no_error() -> None:
    Path("cache").write_text("a file")
    assert not remember("step", sha256="1")
    assert not remembered("step", sha256="1")


@posix
def test_folder_named_like_a_home_holds_no_records(monkeypatch: pytest.MonkeyPatch) -> None:
    remember("step", sha256="1")
    Path("~/.cache").mkdir(parents=True)
    Path("cache").rename("~/.cache/tnnlm")
    monkeypatch.delenv("TNNLM_CACHE")
    monkeypatch.setattr(os.path, "expanduser", str)  # a container whose user is unknown, without HOME
    assert not remembered("step", sha256="1")
    assert not remember("step", sha256="1")
    with pytest.raises(UserError, match="set TNNLM_CACHE"):
        cache_root()


def test_processes_that_start_together_agree_on_one_key() -> None:
    code = "from tnnlm.trust import remember; assert remember('step', sha256='1')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(4)]
    assert [process.wait() for process in started] == [0] * 4
    assert len(list(folder().glob("*.json"))) == 1
    assert remembered("step", sha256="1")
