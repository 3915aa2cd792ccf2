"""Hostile clients of a server: slow, unread, cancelled, oversized and with extreme fields."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any, TypeAlias
from urllib.parse import urlsplit

EXTREME: tuple[Any, ...] = (
    *(2**31, 2**53, 2**63 - 1, 2**63, 2**64, -1, 0, -(2**63), 1e308, 5e-324, 2.5),
    *(float("nan"), float("inf"), True, None, "", "\x00", "\ud800", [], {}, [[]], {"5": 1e308}, ["a"] * 300),
    {str(token): -100 for token in range(250)},
)
FIELDS = (
    *("prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "best_of", "seed", "stop", "logprobs"),
    *("echo", "presence_penalty", "frequency_penalty", "logit_bias", "stream_options", "cache_salt", "none"),
)
LONG = {"prompt": "a b c " * 40, "stream": True, "stream_options": {"include_timing": True}}
"""A stream with large chunks."""
PAUSE = 0.2
"""Seconds between two attempts of a client."""
Attack: TypeAlias = Callable[["Hostile", random.Random], Awaitable[None]]


def attack(url: str, api_key: str | None, clients: int, seconds: float) -> Counter[str]:
    """Attack a server with a number of clients for a time; return the number of attempts by their end.

    It runs in a separate process, so that the clients which are measured don't wait for what it computes.
    """
    return asyncio.run(_attack(url, api_key, clients, seconds))


async def _attack(url: str, api_key: str | None, clients: int, seconds: float) -> Counter[str]:
    import aiohttp

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        hostile = Hostile(session, url, api_key)
        await hostile.run(clients, seconds)
    return hostile.statuses


class Hostile:
    """Group of hostile clients; each repeats one kind of attack until it is cancelled."""

    def __init__(self, session: Any, url: str, api_key: str | None) -> None:
        """Create a group that sends requests in a session of aiohttp, and to raw connections."""
        self.session, self.url = session, url
        self.statuses: Counter[str] = Counter()
        """Number of attempts by kind and HTTP status; ``closed`` if the server closed the connection."""
        address = urlsplit(url)
        self._address = address.hostname or "127.0.0.1", address.port or 80
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""

    async def run(self, clients: int, seconds: float) -> None:
        """Attack with a number of clients for a time, the kinds alternately."""
        tasks = [
            asyncio.create_task(self._repeat(attack, random.Random(number)))
            for number, attack in zip(range(clients), _attacks(), strict=False)
        ]
        await asyncio.sleep(seconds)
        pending = set(tasks)
        while pending:  # asyncio.wait_for of Python 3.11 may lose a cancellation
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=1)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _repeat(self, attack: Attack, rng: random.Random) -> None:
        while True:
            try:
                await attack(self, rng)
            except (OSError, EOFError):
                self.statuses[f"{attack.__name__} closed"] += 1
            await asyncio.sleep(PAUSE)

    async def post(self, kind: str, body: bytes, read: int | None = None) -> None:
        """Send a body and read the answer, or only a given number of its lines."""
        import aiohttp

        headers = {"Content-Type": "application/json"}
        try:
            async with self.session.post(f"{self.url}/v1/completions", data=body, headers=headers) as answer:
                self.statuses[f"{kind} {answer.status}"] += 1
                if read is None:
                    await answer.read()
                for _ in range(read or 0):
                    await answer.content.readline()
                answer.close()
        except aiohttp.ClientError:
            self.statuses[f"{kind} closed"] += 1

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection whose data is not read beyond a small buffer."""
        return await asyncio.open_connection(*self._address, limit=1 << 12)

    def head(self) -> str:
        """Return the header of a request without its length and the empty line at its end."""
        name, port = self._address
        return (
            f"POST /v1/completions HTTP/1.1\r\nHost: {name}:{port}\r\n{self._key}"
            "Content-Type: application/json\r\n"
        )


async def slow(of: Hostile, rng: random.Random) -> None:
    """Send one character of a header per second."""
    reader, writer = await of.connect()
    try:
        for letter in of.head() + "X: " + "a" * 1000:
            writer.write(letter.encode())
            await writer.drain()
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), 1)
                raise EOFError
    finally:
        writer.transport.abort()


async def unread(of: Hostile, rng: random.Random) -> None:
    """Ask for long streams and read nothing of them."""
    _, writer = await of.connect()
    body = json.dumps(LONG | {"max_tokens": 100_000, "n": 4}).encode()
    try:
        writer.write(of.head().encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        of.statuses["unread sent"] += 1
        await asyncio.sleep(60)
    finally:
        writer.transport.abort()


async def cancelled(of: Hostile, rng: random.Random) -> None:
    """Disconnect after a few tokens, or while the prompt is processed."""
    words = " ".join(rng.choices(("def", "return", "for", "in", "self"), k=rng.choice((3, 3000))))
    body = LONG | {"prompt": words, "max_tokens": 50_000, "n": rng.choice((1, 8))}
    await of.post("cancelled", json.dumps(body).encode(), read=rng.choice((0, 1, 9)))


async def oversized(of: Hostile, rng: random.Random) -> None:
    """Send bodies and products that are too large, and products just below the limit."""
    large = {"prompt": "a " * 300, "n": 64, "echo": True, "logprobs": 20, "max_tokens": 2000}
    bodies = [
        b'{"prompt": "' + b"a" * (8 << 20) + b'"}',
        json.dumps(large | {"n": 256}).encode(),
        json.dumps(large).encode(),
        json.dumps(large | {"n": 16, "max_tokens": 100}).encode(),
        b"[" * 100_000,
    ]
    await of.post("oversized", rng.choice(bodies))


async def extreme(of: Hostile, rng: random.Random) -> None:
    """Send extreme values of one field."""
    body = {"prompt": "a", "max_tokens": 20, "temperature": 1, rng.choice(FIELDS): rng.choice(EXTREME)}
    await of.post("extreme", json.dumps(body).encode("utf-8", "surrogatepass"))


def _attacks() -> Iterator[Attack]:
    return itertools.cycle((slow, unread, cancelled, oversized, extreme))
