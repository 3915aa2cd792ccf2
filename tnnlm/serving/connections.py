"""Connections of the web server, with deadlines for slow and unread ones and a limit of their number."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tnnlm.serving.event_log import EventLog
from tnnlm.serving.settings import Limits

HEADER_SECONDS = 10.0
"""Seconds within which the first header of a connection, or a begun header, must arrive."""
MOST_HEADER_BYTES = 1 << 15
"""Maximum size of the header of a request in bytes."""
SEND_BUFFER = 1 << 18
"""Bytes that the operating system holds for a client which does not read."""
SPARE_DESCRIPTORS = 64
"""File descriptors for everything but connections."""


class LimitedProtocol(H11Protocol):
    """Connection of uvicorn that is closed if it is one too many, idle, slow with its header, or unread.

    :func:`protocol_class` sets the attributes of the class.
    """

    limits: ClassVar[Limits]
    log: ClassVar[EventLog]
    opened: ClassVar[set[LimitedProtocol]]

    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first header, or close the connection if there are too many."""
        super().connection_made(transport)
        if len(self.opened) >= self.limits.max_connections:
            self._close(
                "too many connections", f"more than {self.limits.max_connections} (--max-connections)"
            )
            return
        self.opened.add(self)
        own: socket.socket = transport.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._expect_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection and its timers."""
        super().connection_lost(exc)
        self.opened.discard(self)
        _cancel(self._timer)
        _cancel(self._unread)

    def data_received(self, data: bytes) -> None:
        """Pass data on; a header that has begun must be complete in time."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._expect_header()
        else:
            _cancel(self._timer)
            self._timer = None

    def pause_writing(self) -> None:
        """Stop sending, because the buffer is full; the client must read within ``send_timeout`` seconds."""
        super().pause_writing()
        if self._unread is None:
            message = f"the client read nothing for {self.limits.send_timeout:g} seconds (--send-timeout)"
            self._unread = self.loop.call_later(self.limits.send_timeout, self._close, "unread", message)

    def resume_writing(self) -> None:
        """Continue to send, because the client has read."""
        super().resume_writing()
        _cancel(self._unread)
        self._unread = None

    def _expect_header(self) -> None:
        """Close the connection unless a header is complete in time, however many parts arrive of it."""
        if self._timer is None:
            message = f"no complete header within {HEADER_SECONDS:g} seconds"
            self._timer = self.loop.call_later(HEADER_SECONDS, self._close, "slow header", message)

    def _close(self, kind: str, message: str) -> None:
        """Close the connection with all that was not read; its requests are cancelled as disconnected."""
        self.log.warn(kind, message)
        self.transport.abort()


def protocol_class(limits: Limits, log: EventLog) -> type[LimitedProtocol]:
    """Return a class for the connections of one server."""
    attributes: dict[str, Any] = {"limits": limits, "log": log, "opened": set()}
    return type("Connection", (LimitedProtocol,), attributes)


def raise_descriptors(connections: int) -> int:
    """Raise the process's limit of open files as far as needed for this many connections, and allowed.

    Returns:
        Number of connections for which the limit is enough, at most ``connections`` and at least 1.
    """
    try:
        import resource
    except ModuleNotFoundError:  # on Windows, which has no such limit
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    enough = connections if soft == resource.RLIM_INFINITY else soft - SPARE_DESCRIPTORS
    return max(1, min(connections, enough))


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
