"""Examples in ``--help``: the parser of each script accepts the commands that its help shows.

A command is parsed, not run. Settings of train.py and prepare_data.py are loaded, too, so that an example
fails if a setting or an included configuration has been renamed.
"""

from __future__ import annotations

import shlex
import sys
from itertools import takewhile

import pytest

from tests.support.commands import check_arguments, examples_of, help_of, script_call, script_module
from tests.support.scripts import ROOT
from tnnlm.cli import COMMANDS

OTHER_PROGRAMS = {"curl"}
"""Programs in examples that are not scripts of this repository."""
SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for path in sorted([*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")])
    if path.name != "setup.py"
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_of_help_are_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    examples = examples_of(help_of(name))
    assert examples, f"{name} --help shows no examples"
    for line in examples:
        words = shlex.split(line, comments=True)
        if words[0] in OTHER_PROGRAMS:
            continue
        call = script_call(words)
        assert call is not None, f"{name}: {line}: does not run a script"
        assert call[0] == name, f"{name}: {line}: runs another script"
        check_arguments(name, list(takewhile(lambda word: word != ">", call[1])))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_command_as_it_was_called(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = f"{command.replace('-', '_')}.py"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/tnnlm", command, "--help"])
    with pytest.raises(SystemExit):
        script_module(script).parse(["--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: tnnlm {command} ")
    assert script not in "\n".join(examples_of(text))
