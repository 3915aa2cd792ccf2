"""Service shared by the routes of an application: one model with its scheduler, for one event loop."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI

from tnnlm.errors import UserError
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.grammar import Grammar, GrammarCompiler
from tnnlm.serving.chat import ChatPrompt, ChatPrompts
from tnnlm.serving.chat_schemas import ChatRequest
from tnnlm.serving.event_log import EventLog
from tnnlm.serving.metrics import Metrics
from tnnlm.serving.prompt_queue import ClosedError, QueueFullError
from tnnlm.serving.requests import ParsedRequest, RequestParser
from tnnlm.serving.responses import UNREAD
from tnnlm.serving.scheduler import Scheduler
from tnnlm.serving.schemas import ApiError, SamplingRequest
from tnnlm.serving.sequence import SHUTDOWN, SequenceOutput
from tnnlm.serving.settings import Settings

ANSWERS = 16
"""Number of answers of the largest size that all requests without ``stream`` may have together."""
TOKEN_SECONDS = 0.0005
"""Processor time per token that the grammar of a request may take on the thread that runs the model."""
_BUSY = "too many requests are waiting; retry later"


class Service:
    """Text generator with scheduler, request parser and metrics, for one event loop."""

    def __init__(
        self, generator: TextGenerator, settings: Settings, executor: Executor | None = None
    ) -> None:
        self.settings = settings
        self.metrics, self.log = Metrics(), EventLog()
        self.scheduler = Scheduler(
            generator, settings.limits, self.metrics, self._deliver, executor, self.log, settings.reproducible
        )
        self.parser = RequestParser(generator.tokenizer, settings)
        self.chat = ChatPrompts(generator.tokenizer, settings.limits.max_body_bytes)
        self._grammars = GrammarCompiler(generator.tokenizer, TOKEN_SECONDS)
        self._compiling = ThreadPoolExecutor(1, "grammar")
        self.started = time.time()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._promised = 0

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Start the scheduler with the application, and close it at shutdown."""
        self._loop = asyncio.get_running_loop()
        self.scheduler.start()
        try:
            yield
        finally:
            # Closed in another thread, so that the event loop can deliver the scheduler's last outputs.
            await asyncio.to_thread(self.scheduler.close)
            await asyncio.to_thread(self.chat.close)
            self._compiling.shutdown()

    def chat_tokens(self, prompt: ChatPrompt, partition: bytes) -> list[int]:
        """Return the tokens of the messages of a chat.

        Raises:
            ApiError: 400 if they are not valid Unicode.
        """
        try:
            return self.scheduler.endings.dialogues.encode(prompt.text, partition)
        except UserError as error:
            raise ApiError(400, str(error), "messages") from None

    def parse_chat(
        self, body: ChatRequest, prompt: ChatPrompt, partition: bytes, grammar: Grammar | None
    ) -> ParsedRequest:
        """Return the prompt and sequences of a chat, ready for the scheduler.

        Raises:
            ApiError: 400 or 404, with the invalid parameter.
        """
        tokens = self.chat_tokens(prompt, partition)
        return self.parser.parse_chat(body, prompt, tokens, partition, grammar)

    async def grammar(self, body: SamplingRequest) -> Grammar | None:
        """Return the grammar of the text that a request asks for, if any.

        It is compiled on a separate thread, which releases the interpreter during that.

        Raises:
            ApiError: 400 if it is invalid or too complex.
        """
        schema = None if body.response_format is None else body.response_format.grammar
        compiler, name = self._grammars, "guided_regex" if schema is None else "response_format"
        if schema is not None:
            work = partial(compiler.json_schema, schema, name)
        elif body.guided_regex is not None:
            work = partial(compiler.regex, body.guided_regex, name)
        else:
            return None
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compiling, work)
        except UserError as error:
            raise ApiError(400, str(error), name) from None

    @contextmanager
    def promised(self, parsed: ParsedRequest) -> Iterator[None]:
        """Count the size of an answer that is kept in memory until it is complete.

        Raises:
            ApiError: 429 if all answers together are too large.
        """
        if self._promised + parsed.answer_bytes > ANSWERS * self.settings.limits.max_answer_bytes:
            raise ApiError(429, _BUSY)
        self._promised += parsed.answer_bytes
        try:
            yield
        finally:
            self._promised -= parsed.answer_bytes

    def submit(self, parsed: ParsedRequest) -> None:
        """Submit the prompts of a request to the scheduler.

        Raises:
            ApiError: 429 if the queue is full, 503 if the server is shutting down.
        """
        # A response refers to its sequences. With a cycle, each request would take memory until Python
        # searches all objects for cycles, thousands of requests later.
        owner = weakref.ref(parsed.response)
        for sequence in parsed.response.sequences:
            sequence.owner = owner
        try:
            self.scheduler.submit(parsed.prompts)
        except QueueFullError:
            raise ApiError(429, _BUSY) from None
        except ClosedError:
            raise ApiError(503, SHUTDOWN) from None

    def card(self) -> dict[str, Any]:
        """Return the description of the model for ``/v1/models``."""
        settings, limits = self.settings, self.settings.limits
        return {
            "id": settings.name,
            "object": "model",
            "created": int(self.started),
            "owned_by": "tnnlm",
            "tnnlm": {
                "parameters": settings.parameters,
                "vocabulary": self.parser.tokenizer.size,
                "state_bytes": self.scheduler.row_bytes,
                "engine": settings.engine,
                "chat_template": self.chat.description,
                "max_prompt_tokens": limits.max_prompt_tokens,
                "max_tokens": limits.max_tokens,
                "prompts": [*settings.prompts],
            },
        }

    def health(self) -> dict[str, Any]:
        """Return status and load for ``/health``."""
        return {
            "status": "ok" if self.scheduler.alive else "stopping",
            "model": self.settings.name,
            "uptime_s": round(time.time() - self.started, 1),
            **self.scheduler.load,
        }

    def _deliver(self, outputs: list[SequenceOutput]) -> None:
        assert self._loop is not None
        # A single wake-up of the event loop delivers all outputs of an iteration.
        self._loop.call_soon_threadsafe(self._hand_out, outputs)

    def _hand_out(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            assert output.sequence.owner is not None
            response = output.sequence.owner()
            # None after the request has ended, for example because its client disconnected.
            if response is not None and not response.put(output):
                self.log.warn("unread", f"{response.name}: {UNREAD}")
                self.scheduler.cancel(response.sequences)
