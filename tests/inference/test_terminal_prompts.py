"""Prompts that the tokenizer knows in part or not at all, alone and as lines of a conversation."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.support.converted import write_converted
from tests.support.models import FAMILIES, tiny_config
from tests.support.scripts import assert_refused
from tnnlm.conversion import convert_model
from tnnlm.errors import UserError
from tnnlm.inference.engine import EngineInfo
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.prompts import encode_prompt
from tnnlm.inference.sampling import SamplingParams
from tnnlm.inference.session import GenerationSession
from tnnlm.models.causal_lm import CausalLM
from tnnlm.serving.requests import RequestParser
from tnnlm.serving.schemas import ApiError, CompletionRequest
from tnnlm.serving.settings import Settings
from tnnlm.tokenizer import TextTokenizer

END = "<eos>"
INFO = EngineInfo(name="eager", device="cpu", dtype="float32", linear="plain")


@pytest.fixture
def writer() -> TextGenerator:
    """Return a generator with a random model of letters."""
    torch.manual_seed(0)
    letters = {END: 0, "N": 1, **{letter: i for i, letter in enumerate("ACGT\n ", 2)}}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="N"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    model = convert_model(CausalLM(tiny_config(kernel=FAMILIES["tno"]())).eval())
    return TextGenerator(model, TextTokenizer(tokenizer, END))


def session_of(writer: TextGenerator) -> GenerationSession:
    return GenerationSession(writer, SamplingParams(temperature=0), 3, 0, INFO)


def test_unknown_characters_of_a_prompt_are_counted(
    writer: TextGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    session = session_of(writer)
    session.show("ACGTN", 1, io.StringIO())
    assert capsys.readouterr().err == ""
    line = "warning: 2 of 5 characters of the prompt are unknown to the tokenizer\n"
    session_of(writer).show("AxCyG", 1, io.StringIO())
    assert capsys.readouterr().err == line
    session_of(writer).measure("AxCyG", 2)
    assert capsys.readouterr().err == line
    session_of(writer).measure_batch(["AxC", "yG"])
    assert capsys.readouterr().err == line
    session_of(writer).show_batch(["AxC", "yG"], io.StringIO())
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("prompt", ["x", "x y\n", "xyz"])
def test_a_prompt_without_a_known_character_is_refused(writer: TextGenerator, prompt: str) -> None:
    with pytest.raises(UserError, match="prompt: the tokenizer knows no character of "):
        writer(prompt)
    parser = RequestParser(writer.tokenizer, Settings(name="tiny"))
    with pytest.raises(ApiError) as refused:
        parser.parse(CompletionRequest(prompt=prompt))
    assert (refused.value.status_code, refused.value.param) == (400, "prompt")
    assert parser.parse(CompletionRequest(prompt=f"A{prompt}")).prompts[0].tokens[0] == 2


@pytest.mark.parametrize("prompt", ["N", "NN", " ", "\n"])
def test_the_name_of_the_unknown_token_and_white_space_are_prompts(
    writer: TextGenerator, prompt: str
) -> None:
    assert len(encode_prompt(writer.tokenizer, prompt)) == len(prompt)


def test_a_conversation_goes_on_after_a_bad_line(
    writer: TextGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out, mixed = io.StringIO(), io.StringIO(), "ACG\nxyz\n\ud800\nT\n"
    session_of(writer).converse("GT", io.StringIO("ACG\nT\n"), good)
    assert capsys.readouterr().err == ""
    session = session_of(writer)
    session.converse("GT", io.StringIO(mixed), out)
    assert out.getvalue() == good.getvalue()
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith("error: prompt: the tokenizer knows no character of 'xyz")
    assert errors[1] == "error: prompt: is not valid UTF-8"
    with pytest.raises(UserError, match="knows no character"):
        session_of(writer).converse("xyz", io.StringIO("A\n"), out)
    session.state = writer.prefill(["A", "C"])
    with pytest.raises(UserError, match="the state has 2 rows"):
        session.converse(None, io.StringIO("A\n"), out)


def test_lines_that_are_not_utf8_do_not_end_the_command(
    writer: TextGenerator, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path("model")
    write_converted(folder, writer.tokenizer)
    words = ("generate", "--model", str(folder), "--max-new-tokens", "2", "--temperature", "0")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\nACG\n"), encoding="utf-8"))
    done = script(*words, "--interactive")
    assert done.code == 0
    assert "error: prompt: is not valid UTF-8\n" in done.err
    assert done.out.count("\n") >= 1
    assert_refused(script(*words, "--prompt", "xyz", "--json"), "prompt: the tokenizer knows no character")
