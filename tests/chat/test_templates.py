"""Output of chat templates, their answers, and their tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import date

import pytest

from tests.support.conversations import turn
from tnnlm.chat.encoding import SpecialTokens
from tnnlm.chat.renderer import Renderer
from tnnlm.chat.templates import CHATML, PLAIN, RAW, ChatTemplate, Conversation, named_template
from tnnlm.errors import DataError, UserError
from tnnlm.tokenizer import TextTokenizer, train_bpe

END = "<|endoftext|>"
UNMARKED = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TALK = Conversation(
    [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Bye"), turn("assistant", "Oh")]
)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_bpe(["hello there"] * 9, 300, END, 9, progress=False)


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    with Renderer() as process:
        yield process


def answers(source: str, talk: Conversation, tokenizer: TextTokenizer, renderer: Renderer) -> list[str]:
    text, spans = ChatTemplate(source, SpecialTokens(tokenizer), renderer).answered(talk, "here")
    return [text[start:end] for start, end in spans]


def test_plain_template_is_lines_of_role_and_content(tokenizer: TextTokenizer, renderer: Renderer) -> None:
    chat = ChatTemplate(PLAIN, SpecialTokens(tokenizer), renderer)
    assert chat.prompt(TALK.messages[:1], "here") == "user: Hi\nassistant:"
    assert chat.answered(TALK, "here").text == (
        f"user: Hi\nassistant: Hello{END}\nuser: Bye\nassistant: Oh{END}\n"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (PLAIN, [f" Hello{END}", f" Oh{END}"]),
        (RAW, [f"Hello{END}", f"Oh{END}"]),
        (CHATML, [f"Hello<|im_end|>{END}", f"Oh<|im_end|>{END}"]),
        (UNMARKED, [f"Hello{END}\n", f"Oh{END}\n"]),
    ],
)
def test_answers_are_what_follows_the_beginning_of_a_turn(
    source: str, expected: list[str], tokenizer: TextTokenizer, renderer: Renderer
) -> None:
    assert answers(source, TALK, tokenizer, renderer) == expected
    given = TALK._replace(given=3)  # the first answer belongs to the prompt
    assert answers(source, given, tokenizer, renderer) == expected[1:]


def test_template_that_changes_earlier_text_needs_marks(tokenizer: TextTokenizer, renderer: Renderer) -> None:
    source = "{{ messages | length }}" + UNMARKED
    with pytest.raises(UserError, match=r"here: the chat template changes earlier text .*mark them"):
        answers(source, TALK, tokenizer, renderer)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for %}", "line 1: "),
        ("{{ messages[9].content.x }}", "no element 9"),
        ("{{ raise_exception('no system role') }}", "no system role"),
    ],
)
def test_template_that_fails_is_reported(
    source: str, reason: str, tokenizer: TextTokenizer, renderer: Renderer
) -> None:
    with pytest.raises(UserError, match=rf"here: the chat template fails \(.*{reason}"):
        answers(source, TALK, tokenizer, renderer)
    assert answers(PLAIN, TALK, tokenizer, renderer)  # by the same process


def test_end_token_in_a_message_is_text(tokenizer: TextTokenizer, renderer: Renderer) -> None:
    tokens = SpecialTokens(tokenizer)
    hidden = ["\U0010fffd", "\U0010fffd\U000f0001", f"a{END}b"]
    for content in hidden:
        assert tokens.show(tokens.hide(content)) == content
    talk = [turn("user", f"a{END}b")]
    text = (
        ChatTemplate(PLAIN, tokens, renderer)
        .answered(Conversation([*talk, turn("assistant", "x")]), "here")
        .text
    )
    ids = tokens.encode(text)
    assert ids.count(tokenizer.eos_id) == 1
    assert tokenizer.encode(f"user: a{END}b\nassistant: x") == [
        *tokens.encode(text.split("assistant")[0]),
        *tokenizer.encode("assistant: x"),
    ]


def test_end_token_inside_further_entries_is_text(tokenizer: TextTokenizer, renderer: Renderer) -> None:
    tokens = SpecialTokens(tokenizer)
    call = {"role": "assistant", "content": "x", "calls": [{f"a{END}": f"b{END}", "at": date(2026, 1, 2)}]}
    source = "{% for m in messages %}{{ m.calls | tojson }}{% endfor %}{{ eos_token }}"
    text = ChatTemplate(source, tokens, renderer).answered(Conversation([call], given=1), "here").text
    assert tokens.show(text) == f'[{{"a{END}": "b{END}", "at": "2026-01-02"}}]{END}'
    assert tokens.encode(text).count(tokenizer.eos_id) == 1


def test_deeply_nested_entry_is_refused(tokenizer: TextTokenizer, renderer: Renderer) -> None:
    value: list[object] = []
    for _ in range(sys.getrecursionlimit()):
        value = [value]
    talk = [{**turn("user", "x"), "more": value}]
    with pytest.raises(UserError, match="here: a message is nested too deeply"):
        ChatTemplate(PLAIN, SpecialTokens(tokenizer), renderer).prompt(talk, "here")


def test_unknown_template_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.chat_template=nosuch: .*use plain, chatml, raw"):
        named_template("nosuch")
