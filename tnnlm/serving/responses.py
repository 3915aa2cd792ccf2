"""Answers of the completions API, whole or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from tnnlm.serving.logprobs import TokenScore
from tnnlm.serving.sequence import TIMEOUT, Event, Job
from tnnlm.tokenizer import TextTokenizer


class Answer:
    """The texts of one request, filled by events."""

    def __init__(
        self, model: str, tokenizer: TextTokenizer, prompts: list[list[int]], jobs: list[Job]
    ) -> None:
        self.jobs = jobs
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        self.echo: list[str] = [""] * len(jobs)
        """what each text begins with"""
        self._tokenizer = tokenizer
        self._prompt_tokens = sum(map(len, prompts))
        self._tokens = 0
        self._offsets = [0] * len(jobs)
        self._index = {job: index for index, job in enumerate(jobs)}
        self._open = set(jobs)
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    async def events(self) -> AsyncIterator[Event]:
        """What happens, in order, until all texts have ended; what has piled up of a text comes as one."""
        while self._open:
            new = [await self.queue.get()]
            while not self.queue.empty():
                new.append(self.queue.get_nowait())
            merged: dict[Job, Event] = {}
            for event in new:
                if event.job in merged:
                    merged[event.job].merge(event)
                else:
                    merged[event.job] = event
            for event in merged.values():
                self._tokens += event.tokens
                if event.finish:
                    self._open.discard(event.job)
                yield event

    async def whole(self) -> dict[str, Any]:
        """The answer to a request without ``stream``.

        Raises:
            TimeoutError: if the time of a text ran out before its first token.
            RuntimeError: with another error of a text.
        """
        texts = {job: Event(job, self.echo[index]) for job, index in self._index.items()}
        async for event in self.events():
            if event.finish == "error":
                raise (TimeoutError if event.error == TIMEOUT else RuntimeError)(event.error)
            texts[event.job].merge(event)
        return self._head | {
            "choices": [self._choice(event) for event in texts.values()],
            "usage": self._usage(),
        }

    async def stream(self, usage: bool, timing: bool) -> AsyncIterator[bytes]:
        """The answer as server-sent events; ends with ``[DONE]``, or with an error event."""
        for job, index in self._index.items():
            if self.echo[index]:
                yield _sse(self._head | {"choices": [self._choice(Event(job, self.echo[index]))]})
        async for event in self.events():
            if event.finish == "error":
                error = {"message": event.error, "type": "server_error", "param": None, "code": None}
                yield _sse({"error": error})
                return
            if not (event.text or event.finish or event.scores or timing):
                continue
            chunk = self._head | {"choices": [self._choice(event)]}
            if timing:
                chunk["tnnlm"] = {
                    "position": event.position,
                    "step_ms": [round(ms, 3) for ms in event.step_ms],
                }
            yield _sse(chunk)
        if usage:
            yield _sse(self._head | {"choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _choice(self, event: Event) -> dict[str, Any]:
        index = self._index[event.job]
        scores = self._scores(event.scores, index) if event.job.logprobs is not None else None
        return {"index": index, "text": event.text, "logprobs": scores, "finish_reason": event.finish}

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
        """A token alone; one that is no whole character by its bytes' names."""
        text = self._tokenizer.decode([token])
        return text if text and "\ufffd" not in text else str(self._tokenizer.tokenizer.id_to_token(token))

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "total_tokens": self._prompt_tokens + self._tokens,
            "prompt_tokens_details": {"cached_tokens": sum(job.cached for job in self.jobs)},
        }


def _sse(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
