"""Exit codes of scripts: an error that a user can fix is one line, and a bug keeps its traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tnnlm.errors import CheckpointError, ConfigError, DataError, UserError, command, run_script


def script_raising(error: BaseException) -> int:
    """Return the exit code of a script that raises ``error``."""

    def main() -> int:
        raise error

    return run_script(main)


@pytest.mark.parametrize("code", [0, 1])
def test_run_script_passes_the_code_on(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(lambda: code) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [UserError, ConfigError, DataError, CheckpointError])
def test_user_error_is_one_line_and_code_2(kind: type[UserError], capsys: pytest.CaptureFixture[str]) -> None:
    assert script_raising(kind("book.txt: no such file")) == 2
    assert capsys.readouterr() == ("", "error: book.txt: no such file\n")


def test_a_name_with_a_line_break_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert script_raising(UserError("runs/a\nb: no such run", "give another")) == 2
    assert script_raising(OSError(errno.EACCES, "denied", "runs/a\r\nb")) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: runs/a b: no such run; give another"
    assert second.startswith("error: runs/a b: permission denied")


def test_user_error_has_a_reason_and_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    error = CheckpointError("last.ckpt: is damaged", "take another one")
    assert (error.reason, error.remedy) == ("last.ckpt: is damaged", "take another one")
    assert script_raising(error) == 2
    assert capsys.readouterr().err == "error: last.ckpt: is damaged; take another one\n"
    # Loader processes pickle errors.
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reason, again.remedy) == (str(error), error.reason, error.remedy)
    assert UserError("book.txt: no such file").remedy == ""


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST]
)
def test_os_error_that_a_user_can_fix_is_one_line_and_code_2(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script_raising(OSError(number, "as the system says it", "/data/last.ckpt")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: /data/last.ckpt: ")
    assert err.count("\n") == 1


def test_os_error_without_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert script_raising(OSError(errno.ENOSPC, "No space left on device")) == 2
    assert capsys.readouterr().err.startswith("error: the disk is full")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("ours"),
        RuntimeError("ours"),
        AssertionError("ours"),
        OSError("no number"),
        OSError(errno.EBADF, "Bad file descriptor"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_keep_their_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)) as caught:
        script_raising(error)
    assert caught.value is error
    assert capsys.readouterr() == ("", "")


def test_keyboard_interrupt_is_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert script_raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_broken_pipe_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    # In `generate.py | head`, the reader has closed the pipe, so there is nobody to report to.
    assert script_raising(BrokenPipeError(errno.EPIPE, "Broken pipe")) == 1
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Enable Ctrl-C, which background jobs of a shell ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_that_a_library_swallows_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def swallowed() -> int:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        raise AttributeError("module has no attribute")

    assert run_script(swallowed) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(AttributeError):
        run_script(lambda: int(object().missing))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["try #2", "a b", "it's", "$x", "plain"])
def test_a_command_in_a_message_can_be_pasted_for_any_name(name: str) -> None:
    words = shlex.split(command("train", "--resume", Path("runs") / name), comments=True)
    assert words[-2:] == ["--resume", f"runs/{name}"]
