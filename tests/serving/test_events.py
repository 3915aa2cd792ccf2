"""Server-sent events: their JSON, and how many are written at once."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.serving.test_scheduler import Bench
from tnnlm.inference.generator import TextGenerator
from tnnlm.serving import responses
from tnnlm.serving.responses import CompletionResponse
from tnnlm.serving.sequence import Prompt, SequenceOutput

TEXT = 'a "quote", \\ a line\n, \u2028 and é'


def written(generator: TextGenerator, timing: bool) -> list[bytes]:
    """Return what a response of two sequences writes if all outputs are queued before it begins."""
    sequences = [Bench(generator).sequence() for _ in range(2)]
    prompts = [Prompt([5], [sequence]) for sequence in sequences]

    async def read() -> list[bytes]:
        response = CompletionResponse("tiny", prompts, [], True, 1 << 20)
        for sequence in sequences:
            response.put(SequenceOutput(sequence, TEXT, tokens=1, position=2, step_ms=[1.0]))
        chunks = response.stream(usage=False, timing=timing)
        first = [await anext(chunks)]
        for sequence in sequences:
            response.put(SequenceOutput(sequence, "", position=2, finish="length"))
        return first + [chunk async for chunk in chunks]

    return asyncio.run(read())


def events(chunk: bytes) -> list[dict[str, object]]:
    return [json.loads(line.removeprefix("data: ")) for line in chunk.decode().split("\n\n") if line]


def test_events_that_are_ready_are_one_write(generator: TextGenerator) -> None:
    first, last, done = written(generator, timing=False)
    choice = {"text": TEXT, "logprobs": None, "finish_reason": None}
    assert [event["choices"] for event in events(first)] == [[{"index": i, **choice}] for i in (0, 1)]
    assert len(events(last)) == 2
    assert done == b"data: [DONE]\n\n"
    (timed, *_), (plain, *_) = events(written(generator, timing=True)[0]), events(first)
    assert [*plain] == [*timed][:-1] == ["id", "object", "created", "model", "choices"]
    assert timed["choices"] == plain["choices"]


def test_a_write_has_a_limited_size(generator: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "WRITE", 10)
    assert [len(events(chunk)) for chunk in written(generator, timing=False)[:2]] == [1, 1]
