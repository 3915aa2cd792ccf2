"""ASGI middleware that checks hosts, buffers and limits request bodies, answers HEAD, and counts responses.

It is plain ASGI, because Starlette's BaseHTTPMiddleware passes each chunk of a stream through an additional
queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tnnlm.serving.schemas import error_response

BODY_SECONDS = 30.0
"""Seconds within which a request body must arrive."""
BODIES = 64
"""Number of bodies of the largest size that are held in memory at once."""


class KnownHost:
    """Middleware that refuses requests for unknown hosts (403).

    A stranger's page can make its name point to this machine (DNS rebinding), and its scripts may then read
    every answer; the Host header still has that name.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self.app = app
        self.hosts = {host_name(host) for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request for a known host to the application, whatever the port."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(given) == 1 and host_name(given[0]) in self.hosts:
            return await self.app(scope, receive, send)
        shown = repr(given[0][:128]) if given else "no name"
        message = f"Host: {shown} is not a name of this server; start it with --allowed-hosts NAME"
        return await error_response(403, message)(scope, receive, send)


def host_name(host: str) -> str:
    """Return the name or address of a Host header without its port, in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0][1:]
    name, colon, _ = host.rpartition(":")
    return host if not colon or ":" in name else name


class WholeBody:
    """Middleware that buffers a body and rejects one that is too large (413) or too slow (408).

    It counts the bytes that arrive and ignores the Content-Length header. All bodies together, from their
    first byte to the beginning of their response, have at most :data:`BODIES` times the limit; further ones
    get 429.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Receive the body, then pass the request to the application."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        size = 0

        def count(read: int) -> bool:
            nonlocal size
            size += read
            self._held += read
            return size <= self.limit and self._held <= BODIES * self.limit

        async def released(message: Message) -> None:
            nonlocal size
            self._held, size = self._held - size, 0
            await send(message)

        try:
            await self._pass_on(scope, receive, released, count)
        finally:
            self._held -= size

    async def _pass_on(
        self, scope: Scope, receive: Receive, send: Send, count: Callable[[int], bool]
    ) -> None:
        try:
            body = await asyncio.wait_for(_read(receive, count), BODY_SECONDS)
        except TimeoutError:
            response = error_response(408, f"the body did not arrive within {BODY_SECONDS:g} seconds")
            return await response(scope, receive, send)
        if isinstance(body, bytes):
            return await self.app(scope, _replayed(body, receive), send)
        # The rest of the body is not received, so the connection can't be reused.
        headers = {"Connection": "close"}
        response = error_response(429, "too many large requests; retry later", headers=headers)
        if body > self.limit:
            response = error_response(413, f"the body is larger than {self.limit:,} bytes", headers=headers)
        return await response(scope, receive, send)


async def _read(receive: Receive, count: Callable[[int], bool]) -> bytes | int:
    """Return a body; the number of bytes received if ``count`` refuses more."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        parts.append(message.get("body", b""))
        if not count(len(parts[-1])):
            return sum(map(len, parts))
        if not message.get("more_body"):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a function that receives a body at once, then what comes after it."""
    kept = [body]

    async def again() -> Message:
        return {"type": "http.request", "body": kept.pop(), "more_body": False} if kept else await receive()

    return again


class HeadAsGet:
    """Middleware that answers HEAD on every path of GET, with the status and headers of GET and no body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a HEAD request to the application as GET."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self.app(scope, receive, send)

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        return await self.app({**scope, "method": "GET"}, receive, without_body)


class CountAnswers:
    """Middleware that counts responses of the API by status."""

    def __init__(self, app: ASGIApp, counter: Counter) -> None:
        self.app = app
        self.counter = counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request to the application and count its response."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.counter.labels(str(message["status"])).inc()
            await send(message)

        api = scope["type"] == "http" and scope["path"].startswith("/v1/")
        await self.app(scope, receive, counted if api else send)
