"""Errors of the commands are one line with exit code 2, which names the option as typed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tnnlm.cli import run
from tnnlm.cli.convert import arguments
from tnnlm.cli.usage import errors_name_options
from tnnlm.errors import CheckpointError, UserError

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
