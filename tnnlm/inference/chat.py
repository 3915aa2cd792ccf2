"""Dialogues with a converted model: its chat template makes prompts of messages.

The state of the model continues from turn to turn. A turn reads only what its text adds to that of the last
turn, if the template extends it; otherwise the whole text is read again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from tnnlm.chat.encoding import SpecialTokens
from tnnlm.chat.renderer import Renderer
from tnnlm.chat.templates import ASSISTANT, PLAIN, ChatTemplate, Message
from tnnlm.errors import UserError
from tnnlm.inference.generation_state import GenerationState
from tnnlm.inference.session import GenerationSession, answer_lines
from tnnlm.tokenizer import TextTokenizer

_NO_TEXT = UserError("prompt: the chat template makes no text of it", "use another template")


class EncodedChats(NamedTuple):
    """Messages as prompts."""

    rows: list[list[int]]
    """Token ids of each message, with the beginning of an answer to it."""
    closing: str
    """Text that ends answers, see :meth:`~tnnlm.chat.templates.ChatTemplate.closing`."""


def encode_chats(tokenizer: TextTokenizer, prompts: Sequence[str]) -> EncodedChats:
    """Return messages of a user as prompts, each with the beginning of an answer to it.

    The template is that of the tokenizer, or the plain one.

    Raises:
        UserError: If the tokenizer's chat template fails, or makes no text of a message.
    """
    with Renderer() as renderer:
        chat = ChatTemplate(tokenizer.chat_template or PLAIN, SpecialTokens(tokenizer), renderer)
        texts = [chat.prompt([user(prompt)], "prompt") for prompt in prompts]
        rows = list(chat.tokens.encode_batch(texts))
        closing = chat.closing()
    if not all(rows):
        raise _NO_TEXT
    return EncodedChats(rows, closing)


def until(closing: str, text: str) -> str:
    """Return the text before a closing text, or all of it if there is none."""
    return text.partition(closing)[0] if closing else text


def user(content: str) -> Message:
    """Return a message of the user.

    Raises:
        UserError: If it is not valid Unicode.
    """
    try:
        content.encode()
    except UnicodeEncodeError:
        raise UserError("prompt: is not valid UTF-8") from None
    return {"role": "user", "content": content}


class ChatSession:
    """Dialogue of a user with a model.

    Args:
        session: Loaded model with its sampling parameters.
        renderer: Process that renders the template.
    """

    def __init__(self, session: GenerationSession, renderer: Renderer) -> None:
        self._session = session
        tokenizer = session.generator.tokenizer
        self._chat = ChatTemplate(tokenizer.chat_template or PLAIN, SpecialTokens(tokenizer), renderer)
        self.messages: list[Message] = []
        """Messages so far."""
        self._read = ""
        """Text that the state has read, with the answer that was generated from it."""
        self._state: GenerationState | None = None
        self._closing = self._chat.closing()

    def answer(self, prompt: str, out: TextIO | None) -> str:
        """Generate the answer to a message and return it; it is streamed to ``out`` if that is given.

        If the message is refused, the dialogue is as before.

        Raises:
            UserError: If the message is not valid Unicode, or the template fails.
        """
        asked = user(prompt)
        messages, text = self._continued(asked)
        if self._state is not None and text.startswith(self._read):
            tokens, before = self._chat.tokens.encode(text[len(self._read) :]), self._state
        else:
            if self._state is not None:
                line = "the text of this turn doesn't continue that of the last one; reading all of it"
                print(f"chat: {line}", file=sys.stderr)
            tokens, before = self._chat.tokens.encode(text), None
        if not tokens and before is None:
            raise _NO_TEXT
        generator = self._session.generator
        state = generator.prefill_tokens([tokens], before) if tokens or before is None else before
        record = self._session.stream(state, out, stripped=True, closing=self._closing)
        written = self._chat.tokens.written(record.tokens)
        answer = self._chat.tokens.show(until(self._closing, written))
        self._state, self._read = record.state, text + written
        self.messages = [*messages, {"role": ASSISTANT, "content": answer}]
        return answer

    def _continued(self, asked: Message) -> tuple[list[Message], str]:
        """Return the messages with a new one, and their text.

        The last answer may begin or end in white space that the template writes itself. It is stripped if
        the text extends what was read only then.
        """
        messages = [*self.messages, asked]
        text = self._chat.prompt(messages, "prompt")
        if self._state is None or text.startswith(self._read):
            return messages, text
        for strip in (str.lstrip, str.strip):
            answer = {**self.messages[-1], "content": strip(self.messages[-1]["content"])}
            changed = [*self.messages[:-1], answer, asked]
            other = self._chat.prompt(changed, "prompt")
            if other.startswith(self._read):
                return changed, other
        return messages, text

    def converse(self, source: TextIO, out: TextIO) -> None:
        """Answer each line of ``source`` until it ends; a line that is refused is reported on stderr."""

        def answer(line: str) -> None:
            self.answer(line.removesuffix("\n"), out)
            out.write("\n")

        answer_lines(source, out, answer)


def chat(
    session: GenerationSession, prompts: Sequence[str], *, dialogue: bool, as_json: bool, n_samples: int
) -> None:
    """Answer prompts on stdout, each as the only message, or all of them and those of stdin as a dialogue.

    Args:
        session: Loaded model.
        prompts: Messages of the user.
        dialogue: Whether they are the first messages of one dialogue.
        as_json: Print answers and measurements as JSON.
        n_samples: Number of answers to a single message.
    """
    tokenizer = session.generator.tokenizer
    if tokenizer.chat_template is None:
        print("chat: the model has no chat template; using the template plain", file=sys.stderr)
    if dialogue:
        with Renderer() as renderer:
            found = ChatSession(session, renderer)
            for prompt in prompts:
                found.answer(prompt, sys.stdout)
                sys.stdout.write("\n")
            found.converse(sys.stdin, sys.stdout)
        return
    rows, closing = encode_chats(tokenizer, [*prompts] * n_samples)
    if as_json:
        measured = session.measure_rows(rows)
        measured["samples"] = [until(closing, text) for text in measured["samples"]]
        first = {"prompt": prompts[0], "text": measured["samples"][0]}
        print(json.dumps({**measured, **(first if len(prompts) == 1 else {})}, ensure_ascii=False))
    elif len(rows) == 1:
        session.stream(session.generator.prefill_tokens(rows), sys.stdout, stripped=True, closing=closing)
        sys.stdout.write("\n")
    else:
        for index, text in enumerate(session.measure_rows(rows)["samples"]):
            title = prompts[index] if len(prompts) > 1 else f"sample {index + 1}"
            sys.stdout.write(f"--- {title}\n{until(closing, text).lstrip()}\n")
