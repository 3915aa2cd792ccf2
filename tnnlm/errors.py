"""Errors that a user can fix, and the entry point wrapper that reports them in one line with exit code 2."""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from tnnlm.signals import noted_interrupts


class UserError(ValueError):
    """Invalid input that the user can fix.

    Every message has the pattern ``PLACE: what is wrong; what to do``. PLACE is the setting, the option, or
    the file with its line number where known. The rest starts in lower case, has no full stop at its end, and
    states the remedy in the imperative:

        data.txt: is not UTF-8 text (byte 17)
        model.vocab_size=100: listops needs 15 symbols and a padding token; set it to 16 or more

    Args:
        reason: The place and the problem, ``PLACE: what is wrong``.
        remedy: Action that solves the problem, in the imperative; empty if the reason makes it obvious.
            With a remedy, ``str()`` returns ``reason; remedy``.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}" if self.remedy else self.reason


class ConfigError(UserError):
    """Setting that is unknown, has the wrong type, or is out of range."""


class DataError(UserError):
    """Data set or tokenizer that is missing, unreadable or unsuitable."""


class CheckpointError(UserError):
    """Run, checkpoint or converted model that is missing, damaged, or not created by this package."""


class OneLineParser(argparse.ArgumentParser):
    """Parser of a command line that raises a :class:`UserError` where argparse prints the usage and exits."""

    _words: list[str]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line as argparse does, and note it for the remedies of errors."""
        self._words = [*(sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise an error for a message of argparse, which begins with the argument or ends with it.

        Raises:
            UserError: Always.
        """
        text = message.removeprefix("argument ")
        kind, _, unknown = text.partition("unrecognized arguments: ")
        option = re.fullmatch(r"(--\S+): expected one argument", text)
        value = self._value_with_dash(option[1]) if option else None
        if option and value:
            remedy = f"write {option[1]}={shlex.quote(value)} for a value with a dash in front"
            raise UserError(text, remedy)
        if not kind and unknown:
            text = f"{unknown}: not an option or argument of this command"
            name = unknown.partition(" ")[0].partition("=")[0]
            if near := difflib.get_close_matches(name, self._option_string_actions, n=1, cutoff=0.75):
                raise UserError(text, f"did you mean {near[0]}?")
        raise UserError(text, f"see {self.prog} --help")

    def _value_with_dash(self, option: str) -> str | None:
        """Return the word behind an option if it begins with a dash and is not an option itself."""
        behind = self._words[self._words.index(option) + 1 :] if option in self._words else []
        known = bool(behind) and behind[0].partition("=")[0] in self._option_string_actions
        return behind[0] if behind and behind[0][:1] == "-" and not known else None


OS_PROBLEMS = {
    errno.ENOSPC: UserError("the disk is full", "free some space and run the same command again"),
    errno.EDQUOT: UserError("the disk quota is used up", "free some space and run the same command again"),
    errno.EACCES: UserError("permission denied", "choose another path or change the permissions"),
    errno.EPERM: UserError("permission denied", "choose another path or change the permissions"),
    errno.EROFS: UserError("the file system is read-only", "choose another path"),
    errno.EFBIG: UserError("the file exceeds the size limit", "raise the limit (ulimit -f)"),
    errno.ENAMETOOLONG: UserError("the file name is too long", "choose a shorter one"),
    errno.ENOTDIR: UserError("a parent of this path is a file, not a folder", "choose another path"),
    errno.EISDIR: UserError("is a folder", "specify a file"),
    errno.EIO: UserError("the device reports an error", "check the disk, and restore the file from a copy"),
    errno.ELOOP: UserError("is a symbolic link that leads nowhere or is not followed", "restore the file"),
    errno.EEXIST: UserError("a file of this name exists", "choose another path"),
}
"""Operating-system errors that a user can fix, by ``errno``."""
OS_ADVICE = {number: str(problem) for number, problem in OS_PROBLEMS.items()}
"""Messages of ``OS_PROBLEMS``, problem and remedy in one line, by ``errno``."""


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line.

    A :class:`UserError` gives its message unchanged, an operating-system error of ``OS_PROBLEMS`` its problem
    and remedy, and any other error its type and the first line of its message.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in OS_ADVICE:
        return OS_ADVICE[error.errno]
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


@contextmanager
def collect_failure(failures: MutableMapping[str, str], name: str) -> Iterator[None]:
    """Run an optional step and record its failure in ``failures`` instead of raising it.

    Used for measurements and optional files, whose failure must not discard the main result.

    Args:
        failures: Reason of each failure by name of the step; updated in place.
        name: Name of this step.
    """
    try:
        yield
    except Exception as error:
        failures[name] = one_line(error)


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra, such as ``serve``.

    In a checkout it installs the checkout with the extra, and elsewhere the packages themselves. It never
    names tnnlm, because what is on the index of packages under this name is not ours.
    """
    if (Path(__file__).parents[1] / "pyproject.toml").is_file():
        return f"pip install -c constraints.txt -e '.[{extra}]'"
    packages = [
        shlex.quote(line.partition(";")[0].strip())
        for line in metadata.requires("tnnlm") or ()
        if re.search(rf"extra == ['\"]{extra}['\"]", line)
    ]
    return " ".join(["pip install", *packages])


def command(name: str, *words: str | Path) -> str:
    """Return the command line of a subcommand: its script in a checkout, otherwise ``tnnlm NAME``.

    Args:
        name: Name of the subcommand, such as ``train`` or ``prepare-data``.
        words: Arguments, which are quoted for the shell where necessary.
    """
    called = f"tnnlm {name}"
    script, checkout = f"{name.replace('-', '_')}.py", Path(__file__).parents[1]
    program = Path(sys.argv[0])
    installed = program.stem == "tnnlm" or program == Path(__file__).with_name("__main__.py")
    if not installed and (checkout / "pyproject.toml").is_file():
        places = (folder for folder in ("", "tools/") if (checkout / folder / script).is_file())
        called = next((f"python {folder}{script}" for folder in places), called)
    return " ".join([called, *(shlex.quote(str(word)) for word in words)])


def run_script(main: Callable[[], int]) -> int:
    """Run a script's ``main`` and return its exit code.

    A :class:`UserError`, or an operating-system error that a user can fix (full disk, missing permission),
    is reported in one line on stderr with exit code 2. Any other exception is a bug in this package and keeps
    its traceback. Ctrl-C returns 130, the shell convention for SIGINT, as do SIGTERM and SIGHUP; arguments of
    the ``KeyboardInterrupt`` are printed as well, for example to report what was completed.
    """
    _replace_unprintable()
    with noted_interrupts() as interrupts:
        try:
            return _exit_code(main)
        except Exception:
            # Some libraries swallow a KeyboardInterrupt during import and fail later with another error.
            if not interrupts:
                raise
            print("interrupted", file=sys.stderr)
            return 130


def _exit_code(main: Callable[[], int]) -> int:
    try:
        return main()
    except UserError as error:
        _report(str(error))
        return 2
    except BrokenPipeError:
        return 1
    except OSError as error:
        advice = OS_ADVICE.get(error.errno or 0)
        if advice is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _report(f"{where}{advice}")
        return 2
    except KeyboardInterrupt as interrupt:
        print(": ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130


def _report(message: str) -> None:
    """Print an error in one line, whatever characters the file name or the argument in it contains."""
    print("error:", " ".join(message.splitlines()), file=sys.stderr)


def _replace_unprintable() -> None:
    """Make stdout print a question mark for a character that its encoding can't represent.

    A generated character outside a Windows code page must not abort a script.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
