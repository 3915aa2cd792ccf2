"""Responses of the completions API, complete or streamed as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from tnnlm.serving.logprobs import LogprobsFormat
from tnnlm.serving.sequence import TIMEOUT, GeneratedSequence, Prompt, SequenceOutput


class CompletionResponse:
    """Response to one request, assembled from the outputs of its sequences."""

    def __init__(
        self,
        model: str,
        prompts: list[Prompt],
        formats: list[LogprobsFormat],
    ) -> None:
        """Create a response to ``prompts``, with a format of ``logprobs`` for each of their sequences."""
        self.queue: asyncio.Queue[SequenceOutput] = asyncio.Queue()
        self._echo = {sequence: prompt.echo for prompt in prompts for sequence in prompt.sequences}
        self.sequences = [*self._echo]
        self._prompts = prompts
        self._formats = formats
        self._prompt_tokens = sum(len(prompt.tokens) for prompt in prompts)
        self._tokens = 0
        self._index = {sequence: index for index, sequence in enumerate(self.sequences)}
        self._open = set(self.sequences)
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    async def outputs(self) -> AsyncIterator[SequenceOutput]:
        """Yield outputs in order until all sequences have finished; merge queued outputs of a sequence."""
        while self._open:
            new = [await self.queue.get()]
            while not self.queue.empty():
                new.append(self.queue.get_nowait())
            queued: dict[GeneratedSequence, list[SequenceOutput]] = {}
            for output in new:
                queued.setdefault(output.sequence, []).append(output)
            for output in map(SequenceOutput.joined, queued.values()):
                self._tokens += output.tokens
                if output.finish:
                    self._open.discard(output.sequence)
                yield output

    async def whole(self) -> dict[str, Any]:
        """Return the complete response, for a request without ``stream``.

        Raises:
            TimeoutError: If a sequence timed out before its first token.
            RuntimeError: If a sequence failed for another reason.
        """
        parts = {sequence: [SequenceOutput(sequence, echo)] for sequence, echo in self._echo.items()}
        async for output in self.outputs():
            if output.finish == "error":
                raise (TimeoutError if output.error == TIMEOUT else RuntimeError)(output.error)
            parts[output.sequence].append(output)
        return self._head | {
            "choices": [self._choice(SequenceOutput.joined(outputs)) for outputs in parts.values()],
            "usage": self._usage(),
        }

    async def stream(self, usage: bool, timing: bool) -> AsyncIterator[bytes]:
        """Yield the response as server-sent events; the last one is ``[DONE]`` or an error."""
        for sequence, echo in self._echo.items():
            if echo:
                yield _sse(self._head | {"choices": [self._choice(SequenceOutput(sequence, echo))]})
        async for output in self.outputs():
            if output.finish == "error":
                error = {"message": output.error, "type": "server_error", "param": None, "code": None}
                yield _sse({"error": error})
                return
            if not (output.text or output.finish or output.scores or timing):
                continue
            chunk = self._head | {"choices": [self._choice(output)]}
            if timing:
                chunk["tnnlm"] = {
                    "position": output.position,
                    "step_ms": [round(ms, 3) for ms in output.step_ms],
                }
            yield _sse(chunk)
        if usage:
            yield _sse(self._head | {"choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _choice(self, output: SequenceOutput) -> dict[str, Any]:
        index = self._index[output.sequence]
        scored = output.sequence.logprobs is not None
        scores = self._formats[index].entries(output.scores) if scored else None
        return {"index": index, "text": output.text, "logprobs": scores, "finish_reason": output.finish}

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "total_tokens": self._prompt_tokens + self._tokens,
            # A prompt is prefilled once, whatever the number of its completions.
            "prompt_tokens_details": {"cached_tokens": sum(prompt.cached for prompt in self._prompts)},
        }


def _sse(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
