"""Command line interface: the command ``tnnlm`` and its subcommands, one module each.

``tnnlm train`` and, in a checkout, ``python train.py`` are the same. The module of a subcommand defines
``main(words)``, which returns an exit code. It is imported only when the subcommand is called, so that each
command loads only the libraries that it uses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from tnnlm import __version__
from tnnlm.errors import UserError, run_script
from tnnlm.machine.threads import share_cores

COMMANDS = {
    "train": "train a model and convert its checkpoints into recurrences",
    "convert": "convert a trained checkpoint into a recurrence",
    "generate": "generate text with a converted model",
    "serve": "serve a converted model with an OpenAI-compatible API",
    "push": "upload a converted model to the Hugging Face Hub",
    "import": "import a checkpoint of another implementation as a run",
    "prepare-data": "download and tokenize the data of a run before training",
}
"""Subcommands: name -> summary for ``tnnlm --help``."""
_MODULES = {"import": "import_weights"}
"""Modules of the subcommands whose names are keywords of Python."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the subcommand that the command line selects, and return its exit code.

    Args:
        words: Command line without the program's name; None takes ``sys.argv``.
    """
    words = sys.argv[1:] if words is None else list(words)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    return run(words[0], words[1:])


def run(name: str, words: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code; an error that the user can fix is one line and exit code 2.

    Args:
        name: One of ``COMMANDS``.
        words: Arguments of the subcommand; None takes ``sys.argv``.
    """
    share_cores()  # before the module of the subcommand imports torch
    return run_script(lambda: int(_module(name).main(words)))


def module_of(name: str) -> str:
    """Return the full name of the module of a subcommand."""
    return f"{__name__}.{_MODULES.get(name, name.replace('-', '_'))}"


def _module(name: str) -> ModuleType:
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command", f"choose one of {', '.join(COMMANDS)}")
    return import_module(module_of(name))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tnnlm COMMAND ...",
            "",
            "Train long-convolution language models in parallel and deploy them as recurrences.",
            "",
            *lines,
            "",
            "Run tnnlm COMMAND --help for the options of a command, tnnlm --version for the version.",
        ]
    )
