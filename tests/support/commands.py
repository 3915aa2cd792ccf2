"""Commands in documentation and help: their lines, their scripts, and a check of their arguments."""

from __future__ import annotations

import importlib
import importlib.util
import io
import shlex
import sys
from contextlib import redirect_stdout
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.scripts import ROOT
from tnnlm.cli import COMMANDS, module_of
from tnnlm.config.loader import load_config
from tnnlm.config.shipped import find_config


def commands_of(text: str) -> list[str]:
    """Return the lines of a shell script, with continued lines joined and without comment lines."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


@cache
def script_module(name: str) -> ModuleType:
    """Import a script such as ``tools/plot_run.py``; for a subcommand, import its module in ``tnnlm.cli``."""
    if (command := Path(name).stem.replace("_", "-")) in COMMANDS:
        return importlib.import_module(module_of(command))
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up the module there
    spec.loader.exec_module(module)
    return module


def help_of(name: str) -> str:
    """Return what a script prints with ``--help``."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit) as stop:
            script_module(name).parse()
    assert stop.value.code == 0
    return printed.getvalue()


def examples_of(text: str) -> list[str]:
    """Return the commands in the section ``Examples:`` of a help text, up to its first empty line."""
    lines = text.partition("\nExamples:\n")[2].splitlines()
    return commands_of("\n".join(takewhile(str.strip, lines)))


def script_call(words: list[str]) -> tuple[str, list[str]] | None:
    """Return the script of this repository that a command runs, directly or through a launcher, and its
    arguments; None if it runs none."""
    for index, word in enumerate(words):
        if " " in word and ".py" in word:  # sbatch --wrap "..."
            return script_call(shlex.split(word))
        if word.endswith(".py"):
            return word, words[index + 1 :]
        if word.endswith(".sbatch"):
            return "train.py", words[index + 1 :]
    return None


def check_arguments(name: str, words: list[str]) -> None:
    """Parse arguments with the script's parser; for a script that takes settings, load them as well.

    A configuration called ``my*`` stands for a file of the reader and is not loaded.
    """
    module = script_module(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *words])
        try:
            args = module.parse()
        except SystemExit:
            pytest.fail(f"{name} does not accept {shlex.join(words)}")
    if name in ("train.py", "tools/prepare_data.py"):
        config = "demo" if args.config.startswith("my") else args.config
        load_config(find_config(config), args.overrides)
