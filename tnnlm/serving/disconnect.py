"""End of the work for a client that disconnects before it has its whole answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

_Result = TypeVar("_Result")


class EventStream(StreamingResponse):
    """Response of server-sent events that calls a function at its end, also if the client disconnects.

    Starlette ends a stream with an exception that refers to itself through its traceback, and so to the
    request, which then takes memory until Python searches all objects for cycles.
    """

    def __init__(
        self, events: AsyncIterator[bytes], headers: Mapping[str, str], at_end: Callable[[], None]
    ) -> None:
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events while the client is connected."""
        try:
            await while_connected(receive, self.stream_response(send))
        finally:
            self._at_end()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result | None:
    """Return the result of work; if the client disconnects first, cancel the work and return None."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
        del task  # the traceback of its exception refers to this frame


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
