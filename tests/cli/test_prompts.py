"""Prompts at the command line and in requests: those without tokens, and names that look like markup."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from tests.support.hf_folders import write_folder
from tnnlm.cli import generate
from tnnlm.deployment.table import _layers
from tnnlm.errors import UserError
from tnnlm.inference.prompts import encode_prompt
from tnnlm.serving.requests import RequestParser
from tnnlm.serving.schemas import ApiError, CompletionRequest
from tnnlm.serving.settings import Settings
from tnnlm.tokenizer import TextTokenizer
from tnnlm.training.summary import _parallel_and_recurrent

END = "<eos>"


def words_only(unknown: str) -> TextTokenizer:
    """Return a tokenizer of two words, whose normalizer removes blanks around the text."""
    tokenizer = Tokenizer(models.WordLevel({END: 0, "cat": 1, "mat": 2}, unk_token=unknown))
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return TextTokenizer(tokenizer, END)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompt: is empty; give at least one character"),
        (" \n ", r"prompt: the tokenizer encodes ' \n ' as no tokens; give other text"),
        ("dog", "prompt: the tokenizer can't encode 'dog' (Exception: "),
        ("\ud800", "prompt: is not valid UTF-8"),
    ],
    ids=repr,
)
def test_a_prompt_without_tokens_is_refused_for_what_it_is(text: str, message: str) -> None:
    tokenizer = words_only("<unknown>")
    assert encode_prompt(tokenizer, "cat mat") == [1, 2]
    with pytest.raises(UserError) as caught:
        encode_prompt(tokenizer, text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    with pytest.raises(ApiError) as refused:
        RequestParser(tokenizer, Settings(name="tiny")).parse(CompletionRequest(prompt=text))
    assert (refused.value.status_code, refused.value.param) == (400, "prompt")
    assert str(refused.value.detail) == str(caught.value)


def test_a_prompt_may_begin_with_a_dash() -> None:
    assert generate.parse(["--prompt=-x"]).prompt == "-x"
    assert generate.parse(["--prompt", "- item"]).prompt == "- item"


def test_only_line_ends_separate_prompts() -> None:
    Path("lines.txt").write_bytes("\ufeffa\u2028b\r\n \nc\x0cd\n".encode())
    assert generate.read_prompts(Path("lines.txt")) == ["a\u2028b", "c\x0cd"]


def test_the_model_is_named_if_none_is_given(script: Any) -> None:
    words = ("--prompt", "The [red]first[/red]", "--max-new-tokens", "1", "--temperature", "0")
    first = write_folder(Path("runs/first/converted"), "tno", "balanced")
    (Path("runs/first/checkpoints")).mkdir()
    done = script("generate", *words)
    assert done.code == 0
    assert done.err.splitlines()[0] == "model: runs/first/converted"
    assert done.out.startswith("The [red]first[/red]")
    assert script("generate", *words, "--json").err == "model: runs/first/converted\n"
    for given in ("first", str(first)):
        assert "model:" not in script("generate", *words, "--model", given).err
    shutil.copytree(first, "runs/second/converted")
    (Path("runs/second/converted/conversion.json")).touch()
    assert script("generate", *words).err.startswith("model: runs/second/converted\n")


def test_a_name_in_brackets_is_no_markup() -> None:
    name, empty = "[bold]a[/bold] :smile: [/b]", SimpleNamespace(layers=[])
    printed = io.StringIO()
    console = Console(file=printed, width=120)
    console.print(_layers(empty, name))  # type: ignore[arg-type]
    console.print(_parallel_and_recurrent(Path(name.replace("/", "|")), {}))
    assert name in printed.getvalue()
    assert f"run {name.replace('/', '|')}" in printed.getvalue()
