"""ASGI middleware that buffers and limits request bodies, answers HEAD, and counts responses.

It is plain ASGI, because Starlette's BaseHTTPMiddleware passes each chunk of a stream through an additional
queue.
"""

from __future__ import annotations

import asyncio

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tnnlm.serving.schemas import error_response

BODY_SECONDS = 30.0
"""Seconds within which a request body must arrive."""


class WholeBody:
    """Middleware that buffers a body and rejects one that is too large (413) or too slow (408).

    It counts the bytes that arrive and ignores the Content-Length header.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Receive the body, then pass the request to the application."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        try:
            body = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except TimeoutError:
            response = error_response(408, f"the body did not arrive within {BODY_SECONDS:g} seconds")
            return await response(scope, receive, send)
        if body is None:
            # The rest of the body is not received, so the connection can't be reused.
            headers = {"Connection": "close"}
            response = error_response(413, f"the body is larger than {self.limit:,} bytes", headers=headers)
            return await response(scope, receive, send)
        replayed = False

        async def again() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        return await self.app(scope, again, send)

    async def _read(self, receive: Receive) -> bytes | None:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b""
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.limit:
                return None
            if not message.get("more_body"):
                return b"".join(parts)


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
