"""Argument parsers of the commands: their usage lines, options that several commands share, the check that
every option on the command line has an effect, and errors that name the options as typed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tnnlm.errors import OneLineParser, UserError, command
from tnnlm.trust import Trust

_NOT_GIVEN = object()
_SETTING = re.compile(r"(layer \d+: )?([a-z][a-z_ -]*?)( \S+: .*)", re.DOTALL)
"""Reason of an error about the value of a setting: ``top_k -2: ...``, or ``layer 0: order 9: ...``."""


class Condition(NamedTuple):
    """Condition on the other options, without which an option would be ignored."""

    holds: Callable[[argparse.Namespace], bool]
    """Whether the option has an effect, given the parsed arguments."""
    otherwise: str
    """Why it has none, as in ``--option: otherwise``."""
    remedy: str
    """Change to the command line that solves the problem."""


def parser_of(
    name: str, description: str | None, kind: type[OneLineParser] = OneLineParser
) -> argparse.ArgumentParser:
    """Return a parser whose usage line and examples show the command in the way the user called it.

    Args:
        name: Name of the subcommand.
        description: Text of ``--help``; its examples begin with ``tnnlm NAME``.
        kind: Class of the parser.
    """
    called = command(name)
    return kind(
        prog=called,
        description=(description or "").replace(f"tnnlm {name}", called),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def path_argument(word: str) -> Path:
    """Return the path that a word is; an empty one would mean the current folder."""
    if word == "":
        raise argparse.ArgumentTypeError("is empty")
    return Path(word)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and the settings that override it to a parser."""
    settings = parser.add_argument_group("settings")
    settings.add_argument(
        "--config",
        default="demo",
        metavar="NAME|FILE",
        help="Name of an included configuration, such as tnn_wt103, or path of a YAML file. (default: demo)",
    )
    settings.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="Settings that override the configuration, such as optim.lr=1e-3.",
    )


def add_device(add: Callable[..., Any]) -> None:
    """Add ``--device`` and ``--dtype``; ``add`` is the ``add_argument`` of a parser or a group."""
    add("--device", default="auto", metavar="NAME", help="Device: cpu, cuda, cuda:1 ... (default: auto)")
    add(
        "--dtype",
        default="float32",
        metavar="NAME",
        help="Dtype of the linear layers' weights: float32, bfloat16, float16 or int8. (default: float32)",
    )


def add_trust(
    add: Callable[..., Any], *, module: bool = True, compiled: bool = True, training: bool = False
) -> None:
    """Add the options for code that a model carries or names; see :func:`trust_of`.

    Args:
        add: The ``add_argument`` of a parser or a group.
        module: Add ``--kernel-module``; train.py has ``model.kernel.module`` instead.
        compiled: Add ``--trust-compiled``, for commands that run compiled steps.
        training: Whether the command trains, and may run the classes that a run names.
    """
    if module:
        add(
            "--kernel-module",
            metavar="FILE",
            help="Python file or module of the kernel of a checkpoint, if it is not part of tnnlm; must have "
            "the recorded hash. (default: the recorded one, if it ran on this machine before)",
        )
    add(
        "--trust-code",
        action="store_true",
        help="Run the kernel module that a run or checkpoint names, whoever wrote it and whatever its hash"
        + (
            ". With --resume, also the loggers, callbacks and profiler that the run names."
            if training
            else "."
        ),
    )
    if compiled:
        add(
            "--trust-compiled",
            action="store_true",
            help="Load a compiled step that another machine made; it is native code.",
        )


def trust_of(args: argparse.Namespace) -> Trust:
    """Return the code that the options of :func:`add_trust` allow to run.

    Raises:
        UserError: If ``--kernel-module`` is empty.
    """
    module = getattr(args, "kernel_module", None)
    if module == "":
        raise UserError("--kernel-module: is empty", "give the Python file of the kernel, or omit it")
    compiled = getattr(args, "trust_compiled", False)
    return Trust(code=args.trust_code, compiled=compiled, module=module)


def given_options(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> list[str]:
    """Return the long names of the options on a command line, also of those that are given their default.

    Args:
        parser: Parser that accepts the command line.
        words: Command line; None takes ``sys.argv``.
    """
    options = {
        flag: action.dest for flag, action in parser._option_string_actions.items() if flag[:2] == "--"
    }
    found = argparse.Namespace(**dict.fromkeys(options.values(), _NOT_GIVEN))
    parser.parse_known_args(words, found)
    return [flag for flag, name in options.items() if getattr(found, name) is not _NOT_GIVEN]


def check_effective(
    parser: argparse.ArgumentParser,
    words: Sequence[str] | None,
    args: argparse.Namespace,
    conditions: Mapping[str, Condition],
) -> None:
    """Check that no option on a command line is ignored because of another one.

    Args:
        parser: Parser of the command.
        words: Command line; None takes ``sys.argv``.
        args: Arguments that the parser returned for it.
        conditions: Condition by long option name, for options that do not always have an effect.

    Raises:
        UserError: If an option has no effect; the message names it.
    """
    for option in given_options(parser, words):
        if option in conditions and not conditions[option].holds(args):
            raise UserError(f"{option}: {conditions[option].otherwise}", conditions[option].remedy)


@contextmanager
def errors_name_options(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Name options as typed in errors of the library about the values of settings.

    ``top_k -2: must be 0 or more`` becomes ``--top-k -2: must be 0 or more`` if ``parser`` has this option.

    Raises:
        UserError: The error of the body, with the option in place of the setting.
    """
    try:
        yield
    except UserError as error:
        found = _SETTING.fullmatch(error.reason)
        option = "--" + re.sub("[_ ]", "-", found[2]) if found else ""
        if found is None or option not in parser._option_string_actions:
            raise
        raise type(error)(f"{found[1] or ''}{option}{found[3]}", error.remedy) from None
