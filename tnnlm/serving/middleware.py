"""ASGI middleware: a request's body in full before anything looks at it, or a refusal; counted answers.

Written as plain ASGI: a framework's would hand every piece of a stream through a queue of its own.
"""

from __future__ import annotations

import asyncio

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tnnlm.serving.schemas import error_response

BODY_SECONDS = 30.0
"""for a body to arrive"""


class WholeBody:
    """Refuses bodies that are too large (413) or too slow (408), whatever they say of their length."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        try:
            body = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except TimeoutError:
            response = error_response(408, f"the body did not arrive within {BODY_SECONDS:g} seconds")
            return await response(scope, receive, send)
        if body is None:
            # What is left of it is never read.
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


class CountAnswers:
    """Counts the answers of the API by status."""

    def __init__(self, app: ASGIApp, counter: Counter) -> None:
        self.app = app
        self.counter = counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.counter.labels(str(message["status"])).inc()
            await send(message)

        api = scope["type"] == "http" and scope["path"].startswith("/v1/")
        await self.app(scope, receive, counted if api else send)
