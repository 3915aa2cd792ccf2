"""Responses of completions and chats, complete or streamed as server-sent events.

Log-probabilities and long strings are formatted and encoded on a separate thread, in parts, because the event
loop serves the other streams during this time.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tnnlm.serving.answer import EncodedChoice, to_json
from tnnlm.serving.logprobs import ScoreFormat
from tnnlm.serving.sequence import GeneratedSequence, Prompt, SequenceOutput
from tnnlm.serving.settings import BUFFER_BYTES
from tnnlm.serving.token_ids import TokenIds
from tnnlm.serving.wire import COMPLETION, WireFormat

UNREAD = "the client reads too slowly, its buffer is full"
"""Error of a stream whose client does not read."""
PIECE = 256
"""Log-probabilities that are formatted at once."""
WRITE = 1 << 16
"""Bytes of events that are written at once."""
_LONG = 1 << 16
_OUTPUT_BYTES = 512
_SCORE_BYTES = 120
"""Memory of an output and of one entry of its log-probabilities in bytes, about."""
_REST = ',"logprobs":null,"finish_reason":null}]}\n\n'
"""End of the event of a running sequence, after its text."""
_encoder = ThreadPoolExecutor(1, "encoder")
_Result = TypeVar("_Result")


class SequenceError(Exception):
    """Raised if a sequence of a response failed, with the message for the client."""


class AnswerTooLargeError(Exception):
    """Raised if an answer exceeds its limit although its estimated size does not."""


class CompletionResponse:
    """Response to one request, assembled from the outputs of its sequences."""

    def __init__(
        self,
        model: str,
        prompts: list[Prompt],
        formats: Sequence[ScoreFormat],
        streamed: bool,
        most: int,
        wire: WireFormat = COMPLETION,
        token_ids: bool = False,
    ) -> None:
        """Create a response.

        Args:
            model: Name of the model.
            prompts: Prompts with their sequences.
            formats: Format of ``logprobs`` for each sequence.
            streamed: Whether outputs are sent as they come, so that they pile up if the client does not read.
            most: Maximum size of an answer in bytes.
            wire: Format of the endpoint.
            token_ids: Whether to return the ids of the tokens of prompts and completions.
        """
        self.queue: asyncio.Queue[SequenceOutput] = asyncio.Queue()
        self._echo = {sequence: prompt.echo for prompt in prompts for sequence in prompt.sequences}
        self.sequences = [*self._echo]
        self._prompts = prompts
        self._formats = formats
        self._most = most
        self._buffer = BUFFER_BYTES * len(self.sequences) if streamed else None
        self._held = 0
        self._unread = False
        self._prompt_tokens = sum(len(prompt.tokens) for prompt in prompts)
        self._tokens = 0
        self._index = {sequence: index for index, sequence in enumerate(self.sequences)}
        self._open = set(self.sequences)
        self._head = {
            "id": f"{wire.prefix}-{uuid.uuid4().hex}",
            "object": wire.event if streamed else wire.answer,
            "created": int(time.time()),
            "model": model,
        }
        self._wire = wire
        self._token_ids = TokenIds(prompts) if token_ids else None
        start = f"data: {to_json(self._head)[:-1]},"
        self._starts = {
            sequence: f'{start}"choices":[{{"index":{index},{wire.before}'.encode()
            for sequence, index in self._index.items()
        }
        """Beginning of the event of a running sequence, before its text."""
        self._rest = f"{wire.after}{_REST}".encode()

    @property
    def name(self) -> str:
        """Identifier of the response."""
        return str(self._head["id"])

    def put(self, output: SequenceOutput) -> bool:
        """Queue an output; return False if the client does not read, so that the sequences must end.

        The outputs that wait are then replaced by an error. Scores of the prompt don't count, because the
        size of the answer limits them.
        """
        if self._unread:
            return True
        if self._buffer is not None and output.tokens:
            entries = sum(1 + len(score.top) for score in output.scores)
            self._held += _OUTPUT_BYTES + len(output.text) + _SCORE_BYTES * entries
            if self._held > self._buffer:
                self._unread = True
                while not self.queue.empty():
                    self.queue.get_nowait()
                output = SequenceOutput(output.sequence, finish="error", error=UNREAD)
        self.queue.put_nowait(output)
        return not self._unread

    async def outputs(self) -> AsyncIterator[list[SequenceOutput]]:
        """Yield the outputs that are queued until all sequences have finished, in order for each sequence.

        Consecutive outputs of a sequence are merged.

        Raises:
            SequenceError: If a sequence failed.
        """
        while self._open:
            ready: list[SequenceOutput] = []
            for output in await self._queued():
                if output.finish == "error":
                    yield ready
                    raise SequenceError(output.error)
                self._tokens += output.tokens
                if output.finish:
                    self._open.discard(output.sequence)
                ready.append(output)
            yield ready

    async def _queued(self) -> list[SequenceOutput]:
        """Wait for outputs; return all that are queued, in order for each sequence."""
        first = await self.queue.get()
        if self.queue.empty():
            self._held = 0
            return [first]
        queued = {first.sequence: [first]}
        while not self.queue.empty():
            output = self.queue.get_nowait()
            queued.setdefault(output.sequence, []).append(output)
        self._held = 0
        return [piece for outputs in queued.values() for piece in _pieces(outputs)]

    async def whole(self) -> bytes:
        """Return the complete response as JSON, for a request without ``stream``.

        Raises:
            SequenceError: If a sequence failed.
            AnswerTooLargeError: If the answer exceeds its limit.
        """
        choices = {sequence: EncodedChoice(echo) for sequence, echo in self._echo.items()}
        finishes: dict[GeneratedSequence, str | None] = {}
        counts = Counter[GeneratedSequence]()
        size = sum(choice.size for choice in choices.values())
        async for outputs in self.outputs():
            for output in outputs:
                choice = choices[output.sequence]
                size -= choice.size
                await self._add(choice, output)
                size += choice.size
                if size > self._most:
                    raise AnswerTooLargeError
                finishes[output.sequence] = output.finish
                counts[output.sequence] += output.tokens

        def encoded() -> bytes:
            parts = [
                choice.encode(self._index[of], finishes[of], self._wire, self._ids(of, counts[of]))
                for of, choice in choices.items()
            ]
            rest = to_json({"usage": self._usage()})[1:]
            return f'{to_json(self._head)[:-1]},"choices":[{",".join(parts)}],{rest}'.encode()

        return await _off_loop(size > _LONG, encoded)

    async def stream(self, usage: bool, timing: bool) -> AsyncIterator[bytes]:
        """Yield the response as server-sent events, up to ``[DONE]``; events that are ready are one write.

        Raises:
            SequenceError: If a sequence failed.
        """
        for sequence, echo in self._echo.items():
            if self._wire.role:
                yield event(self._head | {"choices": [self._wire.opening(self._index[sequence])]})
            if echo:
                yield await self._chunk(SequenceOutput(sequence, echo), False)
        async for outputs in self.outputs():
            events = bytearray()
            for output in outputs:
                ids = self._token_ids and output.tokens
                if output.text or output.finish or output.scores or timing or ids:
                    events += await self._chunk(output, timing)
                if len(events) > WRITE:
                    yield bytes(events)
                    events.clear()
            if events:
                yield bytes(events)
        if usage:
            yield event(self._head | {"choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    async def _chunk(self, output: SequenceOutput, timing: bool) -> bytes:
        extra = timing or self._token_ids or output.sequence.logprobs is not None
        if not (extra or output.finish or _slow(output)):  # as nearly all are, so that it is made of parts
            return self._starts[output.sequence] + to_json(output.text).encode() + self._rest

        def encoded() -> bytes:
            index, logprobs = self._index[output.sequence], self._logprobs(output)
            choice = self._wire.choice(index, output.text, logprobs, output.finish)
            choice |= self._ids(output.sequence, output.tokens)
            chunk: dict[str, Any] = self._head | {"choices": [choice]}
            if timing:
                step_ms = [round(ms, 3) for ms in output.step_ms]
                chunk["tnnlm"] = {"position": output.position, "step_ms": step_ms}
            return event(chunk)

        begins = self._token_ids is not None and self._token_ids.begins(output.sequence)
        return await _off_loop(begins or _slow(output), encoded)

    async def _add(self, choice: EncodedChoice, output: SequenceOutput) -> None:
        await _off_loop(_slow(output), lambda: choice.add(output.text, self._logprobs(output)))

    def _logprobs(self, output: SequenceOutput) -> dict[str, Any] | None:
        if output.sequence.logprobs is None:
            return None
        return self._formats[self._index[output.sequence]].entries(output.scores)

    def _ids(self, sequence: GeneratedSequence, count: int) -> dict[str, list[int]]:
        return {} if self._token_ids is None else self._token_ids.fields(sequence, count)

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "total_tokens": self._prompt_tokens + self._tokens,
            # A prompt is prefilled once, whatever the number of its completions.
            "prompt_tokens_details": {"cached_tokens": sum(prompt.cached for prompt in self._prompts)},
        }


def event(data: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + to_json(data).encode() + b"\n\n"


def error_event(message: str) -> bytes:
    """Return the event that ends a stream with an error."""
    return event({"error": {"message": message, "type": "server_error", "param": None, "code": None}})


def _pieces(outputs: Sequence[SequenceOutput]) -> list[SequenceOutput]:
    """Merge consecutive outputs of a sequence, but at most :data:`PIECE` log-probabilities or one output."""
    groups: list[list[SequenceOutput]] = []
    scores = 0
    for output in outputs:
        if not groups or (scores and scores + len(output.scores) > PIECE) or output.finish == "error":
            groups.append([])
            scores = 0
        groups[-1].append(output)
        scores += len(output.scores)
    return [SequenceOutput.joined(group) for group in groups]


def _slow(output: SequenceOutput) -> bool:
    return bool(output.scores) or len(output.text) > _LONG


async def _off_loop(slow: bool, work: Callable[[], _Result]) -> _Result:
    """Return the result of work, which runs on another thread if it is slow."""
    if slow:
        return await asyncio.get_running_loop().run_in_executor(_encoder, work)
    return work()
