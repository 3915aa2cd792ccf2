"""SIGTERM and SIGHUP end a command as Ctrl-C does, without leftovers, unless nohup ignores the latter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripts import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals and terminals")
SCRIPT = """
import os, signal, sys
from pathlib import Path
from tnnlm.errors import UserError, run_script
from tnnlm.files import atomic_folder, only_process, write_text

def main():
    with only_process(Path("model"), UserError("in use")), atomic_folder(Path("model")) as temporary:
        (temporary / "weights").write_text("half")
        print("ready", flush=True)
        WAIT
        (temporary / "weights").write_text("whole")
    print("done", flush=True)
    return 0

code = run_script(main)
Path("code").write_text(str(code))
sys.exit(code)
"""


def start(wait: str, ignored: bool = False, **options: Any) -> subprocess.Popen[str]:
    """Start the script, which executes ``wait`` while it writes a folder, with or without SIGHUP ignored."""
    code = SCRIPT.replace("WAIT", wait)
    if ignored:
        code = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{code}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **options)


def finish(wait: str, ignored: bool = False) -> tuple[int, str, str]:
    process = start(wait, ignored, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_command_without_leftovers(name: str) -> None:
    # The second signal comes while the first is handled, as some shells send it.
    wait = f"""try:
            os.kill(os.getpid(), signal.{name})
        finally:
            os.kill(os.getpid(), signal.{name})"""
    assert finish(wait) == (130, "ready\n", "interrupted\n")
    assert os.listdir() == ["code"]


def test_an_ignored_hangup_stays_ignored() -> None:
    assert finish("os.kill(os.getpid(), signal.SIGHUP)", ignored=True) == (0, "ready\ndone\n", "")
    assert Path("model/weights").read_text() == "whole"


def test_a_forked_child_ends_by_the_signal_and_its_parent_goes_on() -> None:
    wait = """child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
        print(os.waitpid(child, 0)[1] == signal.SIGTERM, flush=True)"""
    assert finish(wait) == (0, "ready\nTrue\ndone\n", "")
    assert sorted(os.listdir()) == ["code", "model"]


def test_a_closed_terminal_is_no_error() -> None:
    import pty

    terminal, program = pty.openpty()
    # Without a controlling terminal nobody sends the signal, so that it comes after the terminal was closed.
    (printed, tell), (closed, let) = os.pipe(), os.pipe()
    process = start(
        f"os.write({tell}, b'x'); os.read({closed}, 1); os.kill(os.getpid(), signal.SIGHUP)",
        stdin=program,
        stdout=program,
        stderr=program,
        pass_fds=[tell, closed],
    )
    os.close(program)
    assert os.read(printed, 1) == b"x"
    os.close(terminal)
    os.write(let, b"x")
    assert process.wait(120) == 130
    assert os.listdir() == ["code"]
    for descriptor in (printed, tell, closed, let):
        os.close(descriptor)
