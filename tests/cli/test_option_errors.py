"""Errors of the commands are one line with exit code 2, which names the option as typed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.support.commands import script_module
from tests.support.scripts import ROOT
from tnnlm.cli import run
from tnnlm.cli.convert import arguments
from tnnlm.cli.usage import errors_name_options
from tnnlm.errors import CheckpointError, UserError, run_script

OUT_OF_RANGE = {
    "generate --prompt x --temperature -1": "--temperature -1.0: must be from 0",
    "generate --prompt x --temperature nan": "--temperature nan: must be from 0",
    "generate --prompt x --top-k -2": "--top-k -2: must be 0",
    "generate --prompt x --top-p 1.5": "--top-p 1.5: must be from 0",
    "generate --prompt x --max-new-tokens -1": "--max-new-tokens -1: must be from 0",
    "generate --prompt x --seed -1": "--seed -1: must be from 0",
    "generate --prompt x --num-samples 0": "--num-samples 0: must be from 1",
    "convert --order 0": "--order 0: ",
    "convert --method gradient --lr -1": "--lr -1.0: ",
    "serve --port -1": "--port -1: must be from 0 to 65,535",
    "serve --max-batch 0": "--max-batch 0: must be from 1",
    "serve --max-queue -1": "--max-queue -1: must be from 0",
    "serve --max-prompt-tokens 0": "--max-prompt-tokens 0: must be from 1",
    "serve --max-tokens 0": "--max-tokens 0: must be from 1",
    "serve --max-request-rows 0": "--max-request-rows 0: must be from 1",
    "serve --max-answer-mb 0": "--max-answer-mb 0: must be from 1",
    "serve --max-connections 0": "--max-connections 0: must be from 1",
    "serve --send-timeout nan": "--send-timeout nan: must be from 1",
    "serve --timeout nan": "--timeout nan: must be from 1",
    "serve --timeout inf": "--timeout inf: must be from 1",
    "serve --cache-mb -1": "--cache-mb -1: must be from 0",
    "serve --cache-mb 1048577": "--cache-mb 1048577: must be from 0",
    "serve --grace -1": "--grace -1: must be from 0",
}


@pytest.mark.parametrize("line", OUT_OF_RANGE)
def test_a_value_out_of_range_names_the_option(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *words = shlex.split(line)
    assert run(name, words) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {OUT_OF_RANGE[line]}")
    assert err.count("\n") == 1
    assert out == ""
    assert not list(Path().iterdir())


NOT_USABLE = {
    "generate": "--prompt: is missing; give --prompt TEXT, --prompts FILE",
    "generate --prompt": "--prompt: expected one argument; see ",
    "generate --prompt --json": "--prompt: expected one argument; see ",
    "generate --prompt -x": "--prompt: expected one argument; write --prompt=-x for a value with a dash",
    "generate --prompt '--a\nb'": "--prompt: expected one argument; write --prompt='--a b' for",
    "generate --prompt x --nonsense": "--nonsense: not an option or argument of this command; see ",
    "generate --prompt x --max-tokens 8": "--max-tokens 8: not an option or argument of this command; did ",
    "generate --prompt x '--a\nb'": "--a b: not an option",
    "generate --prompt x --temperature hot": "--temperature: invalid float value: 'hot'; see ",
    "generate --pro x": "ambiguous option: --pro could match",
    "train --from nowhere": "--from: invalid choice: 'nowhere'",
    "train --nonsense": "--nonsense: not an option",
    "convert --compile runs/demo": "--compile: runs/demo: is not one of float32",
    "convert a b": "b: not an option or argument",
    "generate --prompt x --model ''": "--model: is empty; omit it",
    "convert ''": "RUN: is empty; omit it",
    "serve --model ''": "--model: is empty",
    "convert --out ''": "--out: is empty",
    "generate --prompts ''": "--prompts: is empty",
    "generate --prompt x --save-state ''": "--save-state: is empty",
    "serve --port http": "--port: invalid int value: 'http'",
    "prepare-data --nonsense": "--nonsense: not an option",
}


@pytest.mark.parametrize("line", NOT_USABLE)
def test_a_command_line_that_cannot_be_used_is_one_line(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *words = shlex.split(line)
    assert run(name, words) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {NOT_USABLE[line]}")
    assert err.count("\n") == 1
    assert out == ""


def test_every_script_reports_errors_of_its_command_line_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted((ROOT / "tools").glob("*.py")):
        if "run_script(main)" not in path.read_text(encoding="utf-8"):
            continue  # a command of tnnlm, or a tool that runs without the package
        monkeypatch.setattr("sys.argv", [path.name, "--nonsense"])
        assert run_script(script_module(f"tools/{path.name}").main) == 2, path
        assert capsys.readouterr().err.count("\n") == 1, path


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("window taps 9: must be below the horizon, 8", "--window-taps 9: must be below the horizon, 8"),
        ("layer 2: order 9: must be above 10", "layer 2: --order 9: must be above 10"),
        ("tolerance 1e-09: can't be met", "--tolerance 1e-09: can't be met"),
        ("order: is a folder", "order: is a folder"),
        ("layer 2: is no option", "layer 2: is no option"),
    ],
)
def test_errors_of_the_library_name_the_option(reason: str, expected: str) -> None:
    with pytest.raises(CheckpointError) as caught, errors_name_options(arguments()):
        raise CheckpointError(reason, "lower it")
    error: UserError = caught.value
    assert (error.reason, error.remedy) == (expected, "lower it")
