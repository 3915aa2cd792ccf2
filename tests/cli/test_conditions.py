"""Options that another option makes meaningless are refused in one line, before anything is written."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.support.hf_folders import write_folder
from tests.support.scripts import SCRIPTS
from tnnlm.cli import convert
from tnnlm.cli.usage import given_options
from tnnlm.config.schema import ConversionConfig
from tnnlm.errors import UserError, command

REFUSED = {
    "train --json": "--json: formats the output of --dry-run; add --dry-run",
    "train --json --find-lr": "--json: formats the output of --dry-run",
    "train --from previous": "--from: selects a checkpoint for --resume; add --resume",
    "train --from last": "--from: selects a checkpoint for --resume",
    "train --from last --job nightly": "--from: selects a checkpoint for --resume",
    "train --config rtf_demo --resume": "--config: has no effect with --resume",
    "train --resume demo --config demo": "--config: has no effect with --resume",
    "train --resume --job nightly": "--job: selects the run by itself; omit --resume",
    "train --find-lr --dry-run": "--find-lr: tries learning rates on a new model",
    "train --print-config --dry-run": "--print-config: prints all settings and nothing else; omit --dry-run",
    "train --find-lr --resume demo": "--find-lr: tries learning rates on a new model",
    "train --find-lr --job nightly": "--find-lr: tries learning rates on a new model",
    "convert --tolerance 1e-3 --order 4": "--tolerance: only applies to --method auto, and to balanced",
    "generate --prompt x --prompts lines.txt": "--prompt: can't be combined with --prompts",
    "generate --prompt - --interactive": "nor - with --interactive, which reads stdin too",
    "generate --interactive --prompts lines.txt": "--interactive: takes prompts from stdin",
    "generate --prompts lines.txt --num-samples 2": "--num-samples: applies to a single prompt",
    "generate --interactive --num-samples 2": "--num-samples: applies to a single prompt",
    "generate --interactive --json": "--json: can't be combined with --interactive",
    "generate --speculate small --prompts lines.txt": "--speculate: a draft model applies to one completion",
    "generate --speculate small --prompt x --num-samples 2": "--speculate: a draft model applies to one",
    "generate --prompt x --save-state s --num-samples 2": "--save-state: saves the state of one sample",
}
ACCEPTED = (
    "train --dry-run --json",
    "train --dry-run --job nightly",
    "train --dry-run --resume demo --from previous",
    "train --resume demo --from previous optim.lr=1e-3",
    "train optim.lr=1e-3 --resume",
    "train --job nightly --config rtf_demo",
    "train --config rtf_demo --find-lr",
    "convert --order 16",
    "convert --tolerance 1e-4 --poles channel --window-taps 2",
    "generate --prompts lines.txt --num-samples 1 --json",
    "generate --prompts lines.txt --save-state s",
    "generate --interactive --prompt x --save-state s",
    "generate --load-state s --seed 1 --num-samples 4 --json",
    "generate --interactive --speculate small --save-state s",
    "generate --prompts lines.txt --speculate ngram",
    "generate --prompt x --temperature 0 --top-k 5 --top-p 0.5 --seed 3",
)


@pytest.mark.parametrize("line", REFUSED)
def test_an_option_without_effect_is_refused_before_any_write(script: Any, line: str) -> None:
    name, *words = shlex.split(line)
    done = script(name, *words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: --")
    assert REFUSED[line] in done.err
    assert done.err.count("\n") == 1
    assert not list(Path().iterdir())


@pytest.mark.parametrize("line", ACCEPTED)
def test_options_with_an_effect_are_accepted(line: str) -> None:
    name, *words = shlex.split(line)
    SCRIPTS[name].parse(words)


USED = {
    "balanced": {"--tolerance", "--order", "--poles", "--window-taps"},
    "auto": {"--tolerance", "--window-taps"},
    "gradient": {"--order", "--steps", "--lr"},
    "etsc": set(),
    "window": set(),
    "companion": set(),
    "multirate": set(),
}
VALUES = {
    "--tolerance": "1e-3",
    "--order": "4",
    "--poles": "shared",
    "--window-taps": "0",
    "--steps": "2000",
    "--lr": "0.01",
}


@pytest.mark.parametrize("option", VALUES)
@pytest.mark.parametrize("method", ConversionConfig.__dataclass_fields__["method"].metadata["options"])
def test_convert_takes_the_options_of_its_method_only(method: str, option: str) -> None:
    """An option that is given its default is refused too, because the user expects an effect."""
    words = ["--method", method, option, VALUES[option]]
    if option in USED[method]:
        assert convert.parse(words).method == method
    else:
        with pytest.raises(UserError, match=rf"^{option}: only applies to --method .*; omit it"):
            convert.parse(words)


def test_every_option_of_a_conversion_is_in_the_table() -> None:
    assert {f"--{flag}" for flag in convert.FLAGS.values()} == {"--method", "--horizon", *VALUES}
    assert set(convert.CONDITIONS) == set(VALUES)


def test_a_converted_model_takes_no_option_of_a_conversion(script: Any) -> None:
    write_folder(Path("out"), "tno", "balanced")
    for words in (("--method", "balanced"), ("--order", "4"), ("--tolerance", "1e-3"), ("--force",)):
        done = script("convert", "out", "--export", *words)
        assert done.code == 2
        assert done.err.startswith(
            f"error: out: is already converted, {words[0]} has no effect; give the run"
        )
    assert script("convert", "out").err.startswith("error: out: is already converted; add --compile")


def test_given_options_include_those_with_their_default() -> None:
    parser = convert.arguments()
    words = ["runs/demo", "--method=balanced", "--compile", "float32", "int8", "--force"]
    assert given_options(parser, words) == ["--method", "--force", "--compile"]
    assert given_options(parser, []) == []


def set_age(path: Path, seconds: int) -> None:
    os.utime(path, (1_000_000_000 - seconds,) * 2)


def test_generate_warns_of_a_model_older_than_its_run(script: Any) -> None:
    folder = write_folder(Path("runs/demo/converted"), "tno", "balanced")
    words = ("--prompt", "The", "--max-new-tokens", "2", "--temperature", "0")
    assert "warning" not in script("generate", *words).err
    best = Path("runs/demo/checkpoints/best.ckpt")
    best.parent.mkdir()
    best.write_bytes(b"")
    set_age(best, 50)
    set_age(folder / "model.safetensors", 100)
    again = f"{command('convert')} runs/demo --force"
    warning = f"warning: {folder}: is older than {best}; convert again with: {again}\n"
    for model in ((), ("--model", "demo"), ("--model", "runs/demo"), ("--model", str(folder))):
        done = script("generate", *words, *model)
        assert done.code == 0
        assert done.err.startswith(warning)
        assert done.err.count("warning") == 1
    # Standard output is for the completion.
    assert script("generate", *words, "--json").out.startswith("{")
    set_age(folder / "model.safetensors", 50)
    assert "warning" not in script("generate", *words).err


def test_the_command_that_converts_again_keeps_the_folder(script: Any) -> None:
    folder = write_folder(Path("runs/my run/order16"), "tno", "balanced")
    last = Path("runs/my run/checkpoints/last.ckpt")
    last.parent.mkdir()
    last.write_bytes(b"")
    set_age(folder / "model.safetensors", 100)
    done = script("generate", "--prompt", "The", "--max-new-tokens", "1", "--model", str(folder))
    assert f"{command('convert')} 'runs/my run' --out 'runs/my run/order16' --force\n" in done.err
