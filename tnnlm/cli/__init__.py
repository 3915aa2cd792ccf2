"""The command ``tnnlm`` with its subcommands, each in a module of its own; and the scripts of the checkout.

``tnnlm train`` and ``python train.py`` are the same. A subcommand's module has ``main(words)``, which returns
an exit code, and ``summary``. It is imported when it is called, so that each loads what it needs alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from tnnlm import __version__
from tnnlm.errors import UserError, run_script

COMMANDS = {
    "train": "train a model, and turn its checkpoints into recurrences",
    "convert": "convert a trained checkpoint into a recurrence",
    "generate": "generate text with a converted model",
    "serve": "serve a converted model by OpenAI's completions API",
    "prepare-data": "download and tokenize the data of a run before it starts",
}
"""name -> what it does"""


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of the command ``tnnlm``: run a subcommand, and return its exit code.

    Args:
        words: of the command line, without the program's name; None takes ``sys.argv``.
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
    """Run a subcommand; whatever goes wrong by the user's doing is one line and exit code 2.

    Args:
        name: of ``COMMANDS``.
        words: its arguments; None takes ``sys.argv``.
    """
    return run_script(lambda: int(_module(name).main(words)))


def _module(name: str) -> ModuleType:
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command", f"there are {', '.join(COMMANDS)}")
    return import_module(f"{__name__}.{name.replace('-', '_')}")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tnnlm COMMAND ...",
            "",
            "Train long-convolution language models in parallel, deploy them as recurrences.",
            "",
            *lines,
            "",
            "tnnlm COMMAND --help shows the arguments of a command; tnnlm --version the version.",
        ]
    )
