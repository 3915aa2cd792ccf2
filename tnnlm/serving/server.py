"""Web server of an application, which bounds connections and tells running streams that it stops."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI

from tnnlm.errors import UserError
from tnnlm.serving.connections import MOST_HEADER_BYTES, protocol_class
from tnnlm.serving.event_log import LimitLines
from tnnlm.serving.service import Service

GRACE = 30
"""Default of the seconds for running requests to finish."""
LAST_WORDS = 5
"""Seconds for the last events of streams, after the time for running requests."""
KEEP_ALIVE = 30
"""Seconds after which a connection without a request is closed."""
SWITCH_SECONDS = 0.0005
"""Longest wait of the thread that runs the model for one that formats log-probabilities.

The model's thread hands over the interpreter at every operator, dozens of times per step, and waits this long
to get it back; Python's default is ten times as long.
"""
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
"""Signals that stop the server; the last one does not exist on every system."""


class Server(uvicorn.Server):
    """Server of uvicorn that ends running streams with an error event before it closes their connections."""

    def __init__(self, app: FastAPI, grace: float = GRACE) -> None:
        """Create a server.

        Args:
            app: Application from :func:`tnnlm.serving.app.create_app`.
            grace: Seconds for running requests to finish after a signal.
        """
        self._service: Service = app.state.service
        self._grace = grace
        log = self._service.log
        config = uvicorn.Config(
            app,
            port=0,
            http=protocol_class(self._service.settings.limits, log),
            ws="none",
            lifespan="on",
            log_level="warning",
            # The address that a client claims in X-Forwarded-For would choose its part of the prefix cache.
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=int(grace) + LAST_WORDS,
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        )
        for name in ("uvicorn.error", "asyncio"):
            logger = logging.getLogger(name)
            if not any(isinstance(known, LimitLines) for known in logger.filters):
                logger.addFilter(LimitLines(log))
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop: give running requests their time, then end them with an error, and close."""
        ending = asyncio.ensure_future(self._end_streams())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_streams(self) -> None:
        await asyncio.sleep(self._grace)
        # In another thread, so that the event loop can deliver the scheduler's last outputs.
        await asyncio.to_thread(self._service.scheduler.close)


def run(app: FastAPI, listener: socket.socket, grace: float = GRACE) -> None:
    """Serve an application until SIGTERM, Ctrl-C or SIGHUP; call it on the main thread."""
    server = Server(app, grace)
    sys.setswitchinterval(SWITCH_SECONDS)

    def stop(number: int, frame: Any) -> None:
        server.handle_exit(number, frame)

    for name in SIGNALS:
        number = getattr(signal, name, None)
        # A program that nohup started ignores SIGHUP, and must continue to do so. After shutdown, uvicorn
        # restores these handlers and raises the signal again; the defaults would end the process by it.
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        UserError: If the address is invalid or in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
        # Connections inherit the option. Without it, a chunk of a stream waits 40 ms for the acknowledgement
        # of the chunk before.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: {reason}") from None
