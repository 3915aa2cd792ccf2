"""Dialogues: the state continues from turn to turn, and equals that of reading the whole text again."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.converted import write_converted
from tests.support.models import tiny_config
from tnnlm.chat.renderer import Renderer
from tnnlm.chat.templates import CHATML, PLAIN
from tnnlm.cli.generate import main, parse
from tnnlm.conversion import convert_model
from tnnlm.errors import UserError
from tnnlm.inference.chat import ChatSession, chat
from tnnlm.inference.engine import EngineInfo
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.load import load
from tnnlm.inference.sampling import SamplingParams
from tnnlm.inference.session import GenerationSession, ended_by
from tnnlm.models.causal_lm import CausalLM
from tnnlm.tokenizer import TextTokenizer, train_bpe

END = "<|endoftext|>"
INFO = EngineInfo(name="eager", device="cpu", dtype="float32", linear="plain")
TRIMMED = PLAIN.replace("{{ message.content }}{{ eos_token }}", "{{ message.content | trim }}{{ eos_token }}")
CLOSE = PLAIN.replace("{% generation %} {{", "{% generation %}{{")
"""Plain template whose answers don't begin with a space, which a random model wouldn't write."""
COUNTED = "{{ messages | length }} " + PLAIN


class Counting(TextGenerator):
    """Generator that records how many tokens each prefill reads."""

    read: list[int]

    def prefill_tokens(self, rows: Any, state: Any = None) -> Any:
        self.read = [*getattr(self, "read", []), len(rows[0])]
        return super().prefill_tokens(rows, state)


@pytest.fixture
def tokenizer() -> TextTokenizer:
    return train_bpe(["user: hello there assistant"] * 9, 300, END, 9, progress=False)


@pytest.fixture
def renderer() -> Iterator[Renderer]:
    with Renderer() as process:
        yield process


@pytest.fixture
def writer(tokenizer: TextTokenizer) -> Counting:
    torch.manual_seed(0)
    return Counting(convert_model(CausalLM(tiny_config()).eval(), method="etsc", horizon=400), tokenizer)


def chat_of(writer: TextGenerator, renderer: Renderer, template: str | None) -> ChatSession:
    writer.tokenizer.chat_template = template
    return ChatSession(GenerationSession(writer, SamplingParams(temperature=0), 6, 0, INFO), renderer)


def test_turn_continues_the_state_of_the_last_one(writer: Counting, renderer: Renderer) -> None:
    talk, out = chat_of(writer, renderer, CLOSE), io.StringIO()
    answers = [talk.answer(prompt, out) for prompt in ("hello", "there", f"a{END}")]
    assert out.getvalue() == "".join(answer.lstrip() for answer in answers)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 3
    assert talk._state is not None
    history = talk._state.history
    assert history is not None
    whole = writer.prefill_tokens([list(history[0])])
    torch.testing.assert_close(talk._state.logits, whole.logits, rtol=1e-4, atol=1e-5)
    *turns, everything = writer.read
    assert sum(turns) + 3 * 6 == everything
    # Each answer was cut before its end token, which the next turn reads.
    assert list(history[0]).count(writer.tokenizer.eos_id) == 2


def test_answer_that_the_template_trims_is_continued(
    writer: Counting, renderer: Renderer, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = chat_of(writer, renderer, TRIMMED)
    talk.answer("hello", None)
    talk.messages[-1]["content"] = " two words "
    talk._read = "user: hello\nassistant: two words"
    talk.answer("there", None)
    assert capsys.readouterr().err == ""


def test_template_that_changes_earlier_text_is_read_again(
    writer: Counting, renderer: Renderer, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = chat_of(writer, renderer, COUNTED)
    for prompt in ("hello", "there"):
        talk.answer(prompt, None)
    assert (
        capsys.readouterr().err
        == "chat: the text of this turn doesn't continue that of the last one; reading all of it\n"
    )
    assert writer.read[1] > writer.read[0] + 6


@pytest.mark.parametrize("special", [True, False])
def test_text_that_the_template_writes_after_an_answer_ends_it_and_is_not_doubled(
    tokenizer: TextTokenizer, renderer: Renderer, special: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if special:
        tokenizer.tokenizer.add_special_tokens(["<|im_end|>"])
        tokenizer = TextTokenizer(tokenizer.tokenizer, END)
    torch.manual_seed(0)
    writer = Counting(convert_model(CausalLM(tiny_config()).eval(), method="etsc", horizon=400), tokenizer)
    talk, out = chat_of(writer, renderer, CHATML), io.StringIO()
    name = [tokenizer.id_of("<|im_end|>")] if special else tokenizer.encode("<|im_end|>")
    planned = iter([*tokenizer.encode("there"), *name, tokenizer.eos_id, *tokenizer.encode("user")])
    monkeypatch.setattr("tnnlm.inference.generator.sample", lambda *args: torch.tensor([next(planned)]))
    talk._session.max_new_tokens = len(name) + len(tokenizer.encode("there")) + 1
    assert talk.answer("hello", out) == "there"
    assert out.getvalue() == "there"
    monkeypatch.setattr("tnnlm.inference.generator.sample", lambda *args: torch.tensor([tokenizer.eos_id]))
    talk.answer("hello", out)
    assert talk._state is not None
    assert talk._state.history is not None
    read = tokenizer.tokenizer.decode(list(talk._state.history[0]), skip_special_tokens=False)
    begin = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert read == f"{begin}there<|im_end|>{END}\n{begin}"


def test_closing_text_may_be_spread_over_chunks() -> None:
    for chunks in (["a<", "b<|e", "nd|>c"], ["a<b<|end|>"], [*"a<b<|end|>c"]):
        assert "".join(ended_by("<|end|>", iter(chunks))) == "a<b"
    assert "".join(ended_by("<|end|>", iter(["a", "<|en", "<|en"]))) == "a<|en<|en"


def test_model_without_template_uses_the_plain_one(
    writer: Counting, capsys: pytest.CaptureFixture[str]
) -> None:
    writer.tokenizer.chat_template = None
    session = GenerationSession(writer, SamplingParams(temperature=0), 6, 0, INFO)
    chat(session, ["hello"], dialogue=False, as_json=False, n_samples=1)
    assert "no chat template; using the template plain" in capsys.readouterr().err
    assert writer.read == [len(writer.tokenizer.encode("user: hello\nassistant:"))]


def test_message_that_is_refused_leaves_the_dialogue_as_it_was(
    writer: Counting, renderer: Renderer, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = chat_of(writer, renderer, CLOSE)
    talk.converse(io.StringIO("hello\n\udcff\n\nthere\n"), io.StringIO())
    assert [m["content"] for m in talk.messages[::2]] == ["hello", "there"]
    assert capsys.readouterr().err == "error: prompt: is not valid UTF-8\n"


@pytest.fixture
def folder(tmp_path: Path, tokenizer: TextTokenizer) -> Path:
    tokenizer.chat_template = PLAIN
    write_converted(tmp_path / "model", tokenizer)
    return tmp_path / "model"


def test_converted_folder_keeps_the_template_and_answers(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(folder, engine="eager").tokenizer.chat_template == PLAIN
    words = [
        "--chat",
        "--model",
        str(folder),
        "--max-new-tokens",
        "5",
        "--temperature",
        "0",
        "--engine",
        "eager",
    ]
    assert main([*words, "--prompt", "hello"]) == 0
    single = capsys.readouterr().out
    assert main([*words, "--prompt", "hello", "--json"]) == 0
    assert '"text": ' in capsys.readouterr().out
    assert main([*words, "--prompt", "hello", "--num-samples", "2"]) == 0
    assert capsys.readouterr().out == "".join(f"--- sample {i}\n{single}" for i in (1, 2))
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert main(words) == 0
    assert capsys.readouterr().out == single


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--chat --load-state s --prompt x", "--load-state"),
        ("--chat --save-state s --prompt x", "--save-state"),
        ("--chat --json", "--json"),
        ("--chat --num-samples 2", "--num-samples"),
    ],
)
def test_options_without_effect_in_a_chat_are_refused(words: str, reason: str) -> None:
    with pytest.raises(UserError) as error:
        parse(words.split())
    assert str(error.value).startswith(reason)
