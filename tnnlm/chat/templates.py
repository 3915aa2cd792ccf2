"""Chat templates of this package by name, those of files, and the text of conversations by a template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tnnlm.chat.encoding import SpecialTokens
from tnnlm.chat.renderer import RenderedText, Renderer
from tnnlm.errors import DataError, UserError
from tnnlm.reading import read_text

Message = dict[str, Any]
"""Message of a conversation: ``role`` and ``content``, and further entries that a template may read."""
ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that a message can have."""
ASSISTANT = "assistant"
"""Role whose messages are answers."""
PLAIN = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "assistant:{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message.role }}: {{ message.content }}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Lines ``role: content``, with an end token after each answer."""
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, with an end token after each answer unless ``<|im_end|>`` is the end token."""
RAW = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}"
)
"""Contents one after the other, as TRL joins the strings of a prompt and its completion."""
NAMED = {"plain": PLAIN, "chatml": CHATML, "raw": RAW}
"""Templates by the name that ``data.chat_template`` gives them."""


_ANSWER = "content of an answer"
"""Answer by which the text after it is found."""
_GENERATION = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
"""Tag that marks answers."""


class Conversation(NamedTuple):
    """Messages of one example."""

    messages: list[Message]
    given: int = 0
    """Number of leading messages that are a prompt: those of the assistant among them are no answers."""


class AnsweredText(NamedTuple):
    """Text of a conversation with its answers."""

    text: str
    """Text by the template."""
    answers: tuple[tuple[int, int], ...]
    """Ranges [start, end) of the characters that a model learns to generate, in order."""


def named_template(name: str) -> str:
    """Return the template of a name or of a file.

    Raises:
        DataError: If there is neither.
    """
    if name in NAMED:
        return NAMED[name]
    path = Path(name)
    if not path.is_file():
        names = ", ".join(NAMED)
        raise DataError(
            f"data.chat_template={name}: no such file, and no template of this name", f"use {names}"
        )
    return read_text(path, "give another template", DataError)


def check_message(message: Any, where: str) -> Message:
    """Return a message without empty entries.

    Raises:
        DataError: If it isn't an object with a known role and a text.
    """
    if not isinstance(message, dict):
        raise DataError(f"{where}: is no message", 'write {"role": "user", "content": "..."}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: has the role {repr(role)[:80]}", f"use {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{where}: its content is not text but {type(content).__name__}", "write a string")
    return {key: value for key, value in message.items() if value is not None}


class ChatTemplate:
    """Chat template with the tokens that it can write, rendered by one process.

    Args:
        source: Source of the template in Jinja.
        tokens: Special tokens of the tokenizer.
        renderer: Process that renders it.
    """

    def __init__(self, source: str, tokens: SpecialTokens, renderer: Renderer) -> None:
        self.source = source
        self.tokens = tokens
        self._renderer = renderer

    def prompt(self, messages: Sequence[Message], where: str) -> str:
        """Return the text of messages and of the beginning of an answer to them.

        Raises:
            UserError: If the template fails.
        """
        return self._texts([(messages, True)], where)[0].text

    def closing(self) -> str:
        """Return what the template writes between an answer and its end token, such as ``<|im_end|>``.

        Special tokens are written by their names. Empty if there is nothing but white space, or if the
        template fails for a single question with its answer.
        """
        messages = [{"role": "user", "content": "?"}, {"role": ASSISTANT, "content": _ANSWER}]
        try:
            text = self._texts([(messages, False)], "")[0].text
        except UserError:
            return ""
        _, _, after = text.rpartition(_ANSWER)
        return after.partition(self.tokens.eos_token)[0].strip() if _ANSWER in text else ""

    def answered(self, conversation: Conversation, where: str) -> AnsweredText:
        """Return the text of a conversation with its answers.

        They are what the template marks by ``{% generation %}``. If it has no such mark, an answer is the
        text between the beginning of an answer to the messages before it and the messages up to it.

        Raises:
            UserError: If the template fails, or if none of these is the beginning of the next.
        """
        messages, given = conversation
        places = [
            index for index, message in enumerate(messages) if index >= given and message["role"] == ASSISTANT
        ]
        marked = _GENERATION.search(self.source)
        ends = [(given, True)] if given else []
        if not marked:
            ends += [end for index in places for end in ((index, True), (index + 1, False))]
        requests = [(messages, False), *((messages[:end], begun) for end, begun in ends)]
        whole, *parts = self._texts(requests, where)
        start = len(parts[0].text) if given else 0
        spans = [span for span in whole.spans if span[0] >= start]
        if not marked:
            cuts = parts[1:] if given else parts
            spans = _between([cut.text for cut in cuts], whole.text, where)
        return AnsweredText(whole.text, tuple(span for span in spans if span[0] < span[1]))

    def _texts(self, requests: Sequence[tuple[Sequence[Message], bool]], where: str) -> list[RenderedText]:
        """Return the text of each pair of messages and whether an answer to them begins."""
        try:
            variables = [self._variables(messages, begun) for messages, begun in requests]
        except RecursionError:
            raise UserError(f"{where}: a message is nested too deeply") from None
        return self._renderer.render(self.source, variables, where)

    def _variables(self, messages: Sequence[Message], begun: bool) -> dict[str, Any]:
        """Return the variables of a text, which are those that Transformers gives templates."""
        eos = self.tokens.eos_token
        return {
            "messages": [self.tokens.hide_all(message) for message in messages],
            "add_generation_prompt": begun,
            "tools": None,
            "documents": None,
            "eos_token": eos,
            "pad_token": eos,
        }


def _between(cuts: list[str], whole: str, where: str) -> list[tuple[int, int]]:
    """Return the range of each answer, which is between two beginnings of the whole text."""
    spans = []
    for before, after in zip(cuts[::2], cuts[1::2], strict=True):
        if not (after.startswith(before) and whole.startswith(after)):
            raise UserError(
                f"{where}: the chat template changes earlier text when messages follow, hiding the answers",
                "mark them in it by {% generation %} and {% endgeneration %}",
            )
        spans.append((len(before), len(after)))
    return spans
