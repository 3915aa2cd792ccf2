"""Errors that a user can mend, and the one place that turns them into a line and exit code 2."""

from __future__ import annotations

import errno
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class UserError(ValueError):
    """Input that can't be used.

    Args:
        reason: names the input and says what is wrong with it.
        remedy: what to do, if the reason doesn't say it; ``str()`` gives "reason; remedy".
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason = reason
        self.remedy = remedy


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, or out of range."""


class DataError(UserError):
    """Text or a tokenizer that can't be used."""


class CheckpointError(UserError):
    """A run, checkpoint or converted model that is missing, damaged or not ours."""


OS_PROBLEMS = {
    errno.ENOSPC: UserError("the disk is full", "free some space and run the same command again"),
    errno.EDQUOT: UserError("the disk quota is used up", "free some space and run the same command again"),
    errno.EACCES: UserError("no permission", "choose another place or change the permissions"),
    errno.EPERM: UserError("no permission", "choose another place or change the permissions"),
    errno.EROFS: UserError("the file system is read-only", "choose another place"),
    errno.EFBIG: UserError("the file is larger than the system allows", "raise the limit (ulimit -f)"),
    errno.ENAMETOOLONG: UserError("the name is too long", "choose a shorter one"),
    errno.ENOTDIR: UserError("a part of this path is a file, not a folder", "choose another place"),
    errno.EISDIR: UserError("is a folder", "give the name of a file"),
}
"""errors of the operating system that a user can mend: what is wrong, and what to do"""
OS_ADVICE = {number: str(problem) for number, problem in OS_PROBLEMS.items()}
"""the same in one line"""


def one_line(error: BaseException) -> str:
    """An error in one line: a user's as it is, others with what to do about them or with their type."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in OS_ADVICE:
        return OS_ADVICE[error.errno]
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


@contextmanager
def collect_failure(failures: MutableMapping[str, str], name: str) -> Iterator[None]:
    """Go on after a step that nothing depends on, whatever it raised: the reason goes into ``failures``.

    For measurements and optional files beside work that is finished, which no failure of theirs may lose.

    Args:
        failures: name of the step -> reason.
        name: of this step.
    """
    try:
        yield
    except Exception as error:
        failures[name] = one_line(error)


def command(name: str) -> str:
    """How to call a subcommand: by its script in a checkout, else by the command ``tnnlm``.

    Args:
        name: such as ``train`` or ``prepare-data``.
    """
    own = f"tnnlm {name}"
    script, checkout = f"{name.replace('-', '_')}.py", Path(__file__).parents[1]
    if Path(sys.argv[0]).stem in ("tnnlm", "__main__") or not (checkout / "pyproject.toml").is_file():
        return own
    places = (folder for folder in ("", "tools/") if (checkout / folder / script).is_file())
    return next((f"python {folder}{script}" for folder in places), own)


def run_script(main: Callable[[], int]) -> int:
    """Run a script's ``main`` and return its exit code.

    A :class:`UserError`, and an operating-system error that a user can mend (full disk, missing
    permission), become one line on stderr and exit code 2. Everything else is a defect of ours
    and keeps its traceback. Ctrl-C outside of training gives 130, as shells expect; the interrupt may
    carry a message of what was finished.
    """
    _replace_unprintable()
    with _noted_interrupts() as interrupts:
        try:
            return _exit_code(main)
        except Exception:
            # Some libraries swallow an interrupt of their import, and then miss what was not imported.
            if not interrupts:
                raise
            print("interrupted", file=sys.stderr)
            return 130


def _exit_code(main: Callable[[], int]) -> int:
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
    except OSError as error:
        advice = OS_ADVICE.get(error.errno or 0)
        if advice is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(": ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Ctrl-C raises KeyboardInterrupt as always, and is noted in the list; not where it was taken over."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _replace_unprintable() -> None:
    """Print a question mark for a character that the output's encoding lacks, such as a Windows code page:
    a generated character must not end a script."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
