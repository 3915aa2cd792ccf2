"""Prompts of chats: the text that the model's chat template makes of messages, and its tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tnnlm.chat.encoding import SpecialTokens
from tnnlm.chat.renderer import LONGEST_TEXT, Renderer
from tnnlm.chat.templates import ASSISTANT, PLAIN, ChatTemplate, Conversation, Message
from tnnlm.errors import UserError
from tnnlm.serving.chat_schemas import ChatMessage
from tnnlm.serving.schemas import ApiError
from tnnlm.tokenizer import TextTokenizer

SECONDS = 2.0
"""Processor time for the text of one conversation, in seconds."""
_PROBE = "answer"


class ChatPrompt(NamedTuple):
    """Text of messages and of the beginning of an answer to them."""

    text: str
    """Text, in which the names of special tokens in messages are hidden."""
    lead: str
    """White space that the template writes before an answer, and so does a model at the beginning of one; it
    is no part of the content of a message."""


class ChatPrompts:
    """Template of a model, rendered by one process that is shared by all requests.

    Args:
        tokenizer: Tokenizer of the model, with its template.
        longest: Largest number of characters of a text.
    """

    def __init__(self, tokenizer: TextTokenizer, longest: int = LONGEST_TEXT) -> None:
        self.stored = tokenizer.chat_template is not None
        """Whether the template is that of the model; otherwise it is the plain one, of ``role: content``."""
        self._renderer = Renderer(SECONDS, min(longest, LONGEST_TEXT))
        template, tokens = tokenizer.chat_template or PLAIN, SpecialTokens(tokenizer)
        self._template = ChatTemplate(template, tokens, self._renderer)
        # One thread talks to the process: requests that wait for it take no threads that others need.
        self._thread = ThreadPoolExecutor(1, "chat")
        self._lead: str | None = None

    @property
    def description(self) -> str:
        """Template in a few words."""
        return "stored with the model" if self.stored else "plain: lines of role: content"

    async def prompt(self, messages: Sequence[ChatMessage]) -> ChatPrompt:
        """Return the text of messages and of the beginning of an answer.

        Raises:
            ApiError: 400 if the template refuses the messages, or needs too long for them.
        """
        given = [message.model_dump(exclude_none=True) for message in messages]
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._rendered, given)
        except UserError as error:
            raise ApiError(400, str(error), "messages") from None

    def close(self) -> None:
        """End the process that renders the template."""
        self._thread.submit(self._renderer.close).result()
        self._thread.shutdown()

    def _rendered(self, messages: Sequence[Message]) -> ChatPrompt:
        if self._lead is None:
            self._lead = self._probed()
        return ChatPrompt(self._template.prompt(messages, "messages"), self._lead)

    def _probed(self) -> str:
        """Return the white space between the beginning of an answer and its content."""
        asked = [{"role": "user", "content": "question"}]
        try:
            begun = self._template.prompt(asked, "messages")
            answered = [*asked, {"role": ASSISTANT, "content": _PROBE}]
            text = self._template.answered(Conversation(answered), "messages").text
        except UserError:  # of a template that takes no such conversation
            return ""
        lead = text[len(begun) :].partition(_PROBE)[0]
        return lead if text.startswith(begun) and lead.isspace() else ""
