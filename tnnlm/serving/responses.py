"""Responses of the completions API, complete or streamed as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from tnnlm.serving.logprobs import TokenScore
from tnnlm.serving.sequence import TIMEOUT, GeneratedSequence, Prompt, SequenceOutput
from tnnlm.tokenizer import TextTokenizer


class CompletionResponse:
    """Response to one request, assembled from the outputs of its sequences."""

    def __init__(
        self,
        model: str,
        tokenizer: TextTokenizer,
        prompts: list[Prompt],
        echo: bool,
    ) -> None:
        """Create a response; with ``echo``, the text of each sequence begins with its prompt."""
        self.queue: asyncio.Queue[SequenceOutput] = asyncio.Queue()
        self._echo = {
            sequence: tokenizer.decode(prompt.tokens) if echo else ""
            for prompt in prompts
            for sequence in prompt.sequences
        }
        self.sequences = [*self._echo]
        self._tokenizer = tokenizer
        self._prompt_tokens = sum(len(prompt.tokens) for prompt in prompts)
        self._tokens = 0
        self._offsets = [0] * len(self.sequences)
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
            merged: dict[GeneratedSequence, SequenceOutput] = {}
            for output in new:
                if output.sequence in merged:
                    merged[output.sequence].merge(output)
                else:
                    merged[output.sequence] = output
            for output in merged.values():
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
        texts = {sequence: SequenceOutput(sequence, echo) for sequence, echo in self._echo.items()}
        async for output in self.outputs():
            if output.finish == "error":
                raise (TimeoutError if output.error == TIMEOUT else RuntimeError)(output.error)
            texts[output.sequence].merge(output)
        return self._head | {
            "choices": [self._choice(output) for output in texts.values()],
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
        scores = self._scores(output.scores, index) if output.sequence.logprobs is not None else None
        return {"index": index, "text": output.text, "logprobs": scores, "finish_reason": output.finish}

    def _scores(self, scores: list[TokenScore], index: int) -> dict[str, Any]:
        words = [self._word(score.token) for score in scores]
        offsets = []
        for word in words:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(word)
        return {
            "tokens": words,
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [
                {self._word(token): value for token, value in score.top} if score.top else None
                for score in scores
            ],
            "text_offset": offsets,
        }

    def _word(self, token: int) -> str:
        """Decode a single token; one that is not a complete character is shown as in the vocabulary."""
        text = self._tokenizer.decode([token])
        return text if text and "\ufffd" not in text else str(self._tokenizer.tokenizer.id_to_token(token))

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "total_tokens": self._prompt_tokens + self._tokens,
            "prompt_tokens_details": {"cached_tokens": sum(sequence.cached for sequence in self.sequences)},
        }


def _sse(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
