"""Streams of greedy requests, whose completions are compared with those of the same requests alone."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

PATH = "/v1/completions"
KINDS = 48
"""Number of different requests; each stream sends them in a different random order."""
TEXT = (
    "a server that many streams share must lose nothing mix nothing and keep its memory flat while prompts "
    "of three to two hundred words come and go and some clients neither read nor finish what they began"
)
WORDS = TEXT.split()


@dataclass
class Tally:
    """Counts and times measured with a given number of streams."""

    streams: int
    seconds: float = 0.0
    texts: int = 0
    """Requests sent."""
    lost: int = 0
    """Requests without a complete answer."""
    mixed: int = 0
    """Completions that differ from that of the same request alone."""
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    """Times to first token, in seconds."""
    between: list[float] = field(default_factory=list)
    """Times between chunks of a stream, in seconds."""
    memory: list[float] = field(default_factory=list)
    """Resident memory of the server in MiB, once per second."""

    def summary(self) -> dict[str, Any]:
        """Return the results as plain data: times as 50th and 99th percentiles in milliseconds, memory as
        the median of each quarter of the time in MiB."""
        quarter = max(1, len(self.memory) // 4)
        parts = [self.memory[at * quarter : (at + 1) * quarter] or [0.0] for at in range(4)]
        return {
            "streams": self.streams,
            "seconds": round(self.seconds, 1),
            "texts": self.texts,
            "lost": self.lost,
            "mixed": self.mixed,
            "tokens_per_s": round(self.tokens / max(self.seconds, 1e-9), 1),
            "first_token_ms": [round(1e3 * percentile(self.first, p), 1) for p in (50, 99)],
            "between_tokens_ms": [round(1e3 * percentile(self.between, p), 1) for p in (50, 99)],
            "memory_mib": [round(percentile(part, 50)) for part in parts],
        }


def percentile(values: list[float], p: float) -> float:
    """Return a percentile by nearest rank; 0 for an empty list."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] if ordered else 0.0


def requests(longest: int) -> list[dict[str, Any]]:
    """Return greedy requests with prompts and completions of many lengths, at most ``longest`` new tokens."""
    rng = random.Random(0)
    made = []
    for index in range(KINDS):
        words = rng.choices(WORDS, k=rng.choice((3, 10, 40, 200)))
        text = f"{index} {' '.join(words)}"
        made.append({"prompt": text, "max_tokens": rng.randint(16, longest), "temperature": 0})
    return made


class Stage:
    """The part of a load test that is measured at present; streams continue from one to the next."""

    def __init__(self, tally: Tally) -> None:
        self.now = tally


class Client:
    """Client of a server's completions API."""

    def __init__(self, session: Any, url: str) -> None:
        self.session = session
        self.url = url + PATH

    async def stream(self, request: dict[str, Any], stage: Stage) -> str | None:
        """Return the completion, or None if it is incomplete; add the measured times to the stage."""
        text, last, started = [], None, time.perf_counter()
        finish = None
        body = request | {"stream": True, "stream_options": {"include_usage": True}}
        async with self.session.post(self.url, json=body) as response:
            if response.status != 200:
                return None
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter()
                chunk = json.loads(line[6:])
                if chunk.get("usage"):
                    stage.now.tokens += chunk["usage"]["completion_tokens"]
                for choice in chunk.get("choices", ()):
                    times = stage.now.first if last is None else stage.now.between
                    times.append(now - (last or started))
                    last = now
                    text.append(choice["text"])
                    finish = choice["finish_reason"] or finish
        return "".join(text) if finish else None


async def load(
    client: Client,
    stage: Stage,
    streams: int,
    seconds: float,
    work: list[dict[str, Any]],
    expected: list[str],
    server: Any,
) -> None:
    """Keep streams busy, then wait for the requests that still run.

    Args:
        client: Client of the server.
        stage: Receives the results in its present part.
        streams: Number of concurrent streams.
        seconds: Time during which new requests are sent.
        work: Requests to choose from.
        expected: Completion of each request when it runs alone.
        server: Process of the server (psutil) whose memory is recorded; None records no memory.
    """
    started = time.perf_counter()
    bar = tqdm(total=round(seconds), desc=f"{streams} streams", unit="s", leave=False, disable=None)

    async def worker(number: int) -> None:
        rng = random.Random(number)
        while time.perf_counter() - started < seconds:
            index = rng.randrange(len(work))
            text = await client.stream(work[index], stage)
            tally = stage.now
            tally.texts += 1
            tally.lost += text is None
            tally.mixed += text is not None and text != expected[index]

    async def watch() -> None:
        while True:
            await asyncio.sleep(1)
            bar.update(1)
            if server is not None:
                stage.now.memory.append(server.memory_info().rss / 2**20)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(worker(number) for number in range(streams)))
    watching.cancel()
    bar.close()
