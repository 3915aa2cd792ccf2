"""The Makefile refuses an unsuitable interpreter in one line, before it creates anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.scripts import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture(autouse=True)
def _clone() -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copyfile(ROOT / name, name)


def fake_python(path: Path, version: tuple[int, int, int]) -> Path:
    """Write an interpreter that reports another version."""
    pretend = f"import sys; sys.version_info = (*{version}, 'final', 0); "
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{pretend}$2"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


def make(*words: str) -> subprocess.CompletedProcess[str]:
    # Variables of an outer make are removed, because these tests may run under `make test`.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    own.pop("PYTHON", None)
    return subprocess.run(
        ["make", *words], env=own, capture_output=True, encoding="utf-8", check=False, timeout=60
    )


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_old_python_is_refused(target: str) -> None:
    fake_python(Path("python3.10"), (3, 10, 13))
    message = f"needs Python 3.11 or newer, ./python3.10 is 3.10.13: make {target} PYTHON=python3.11"
    assert_refused(make(target, "PYTHON=./python3.10"), message)
    assert not Path(".venv").exists()


def test_missing_python_is_refused() -> None:
    message = "./nowhere is missing or does not run, tnnlm needs Python 3.11 or newer: make demo PYTHON="
    assert_refused(make("PYTHON=./nowhere"), message)


@pytest.mark.parametrize("value", ["", " "])
def test_empty_python_is_refused(value: str) -> None:
    message = "PYTHON is empty, tnnlm needs Python 3.11 or newer: make test PYTHON=python3.11"
    assert_refused(make("test", f"PYTHON={value}"), message)
    fake_python(Path(".venv/bin/python"), (3, 11, 7))  # no other interpreter is started
    assert make("--dry-run", "test", f"PYTHON={value}").returncode == 0


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 14, 2), (4, 0, 0)])
def test_newer_python_is_accepted(version: tuple[int, int, int]) -> None:
    fake_python(Path("python"), version)
    done = make("--dry-run", "test", "PYTHON=./python")
    assert done.returncode == 0, done.stderr
    assert "./python -m venv .venv" in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].startswith(".venv/bin/python -m pytest")


@pytest.mark.parametrize("pip", [True, False])
def test_environment_of_an_old_python_is_refused(pip: bool) -> None:
    fake_python(Path(".venv/bin/python"), (3, 10, 13))
    if pip:
        Path(".venv/bin/pip").touch()
    message = "newer, .venv/bin/python is 3.10.13: rm -r .venv && make test PYTHON=python3.11"
    assert_refused(make("test", f"PYTHON={sys.executable}"), message)
    Path(".venv/bin/python").unlink()
    assert_refused(make("test"), ".venv/bin/python is missing or does not run")


def test_environment_without_pip_is_completed_by_its_own_python() -> None:
    # Another version would mix the packages of both.
    fake_python(Path(".venv/bin/python"), (3, 11, 7))
    done = make("--dry-run", "test", f"PYTHON={sys.executable}")
    assert done.returncode == 0, done.stderr
    assert "|| .venv/bin/python -m venv .venv" in done.stdout


def test_environment_can_complete_itself() -> None:
    pytest.importorskip("ensurepip")  # a separate package on Debian
    for command in ([sys.executable, "-m", "venv", "--without-pip"], [".venv/bin/python", "-m", "venv"]):
        subprocess.run([*command, ".venv"], check=True)
    subprocess.run([".venv/bin/python", "-m", "pip", "--version"], check=True, capture_output=True)


def test_environment_is_used_whatever_the_default_python_is() -> None:
    fake_python(Path(".venv/bin/python"), (3, 11, 7))
    Path(".venv/bin/pip").touch()
    Path(".venv/installed").touch()
    done = make("--dry-run", "test", "PYTHON=./nowhere")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(".venv/bin/python -m pytest")
