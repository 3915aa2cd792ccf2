"""Clients that read nothing, send slowly, come in floods or fill the log hurt no other client."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from tests.support.servers import Running, run_server
from tnnlm.inference.generator import TextGenerator
from tnnlm.serving.event_log import EventLog

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
ENDLESS = {"prompt": "the quick", "max_tokens": 10**6, "logit_bias": {"0": -100}, "stream": True}
"""A stream that does not end by itself."""


def connect(running: Running) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", int(running.url.rsplit(":", 1)[1])))
    return connection


def send(connection: socket.socket, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def closed(connection: socket.socket) -> bool:
    """Wait for data; return whether the server has closed the connection instead."""
    try:
        return connection.recv(4096) == b""
    except ConnectionError:
        return True


def lines(caplog: pytest.LogCaptureFixture, kind: str) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    return [line for line in found if line.startswith(kind)]


@pytest.mark.parametrize("by", ["buffer", "deadline"])
def test_a_client_that_does_not_read(
    by: str, generator: TextGenerator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits: dict[str, float] = {"max_tokens": 10**6, "max_answer_bytes": 1 << 30}
    monkeypatch.setattr("tnnlm.serving.connections.SEND_BUFFER", 4096)
    if by == "buffer":
        monkeypatch.setattr("tnnlm.serving.responses.BUFFER_BYTES", 1 << 16)
        limits["send_timeout"] = 10**6
    else:
        limits["send_timeout"] = 1
        monkeypatch.setattr("tnnlm.serving.responses.BUFFER_BYTES", 1 << 40)
    with (
        run_server(generator, reproducible=True, **limits) as running,
        httpx2.Client(base_url=running.url) as client,
    ):
        body = {"prompt": "fox", "max_tokens": 200, "temperature": 0}
        expected = client.post("/v1/completions", json=body, timeout=60).json()["choices"]
        with connect(running) as connection:
            send(connection, ENDLESS | {"stream_options": {"include_timing": True}})
            wait_for(lambda: running.service.scheduler.load["running"] == 1)
            assert client.post("/v1/completions", json=body, timeout=60).json()["choices"] == expected
            wait_for(lambda: running.service.scheduler.load["running"] == 0)
            wait_for(lambda: len(lines(caplog, "unread: ")) == 1)
            if by == "deadline":
                read = b""
                try:
                    while part := connection.recv(1 << 16):
                        read += part
                except ConnectionError:
                    pass
                assert not read.endswith(b"[DONE]\n\n")
        assert client.post("/v1/completions", json=body, timeout=60).json()["choices"] == expected


def test_headers_must_be_complete_in_time(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tnnlm.serving.connections.HEADER_SECONDS", 0.3)
    with run_server(generator) as running:
        with connect(running) as silent, connect(running) as slow, connect(running) as second:
            slow.sendall(b"GET /health HTTP/1.1\r\nHost: local")
            assert closed(silent)
            assert closed(slow)
            second.close()
        with connect(running) as kept:
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in kept.recv(4096)
            kept.sendall(b"GET /hea")
            while not closed(kept):  # the rest of the answer comes first
                pass
        assert len(lines(caplog, "slow header: ")) >= 3
        assert httpx2.get(f"{running.url}/health").status_code == 200


def test_a_flood_of_connections(generator: TextGenerator, caplog: pytest.LogCaptureFixture) -> None:
    with run_server(generator, max_connections=5) as running:
        flood = [connect(running) for _ in range(40)]
        assert all(closed(connection) for connection in flood[5:])
        assert len(lines(caplog, "too many connections: more than 5 (--max-connections)")) == 10
        for connection in flood:
            connection.close()
        wait_for(lambda: _answers(running))


def _answers(running: Running) -> bool:
    try:
        return httpx2.get(f"{running.url}/health").status_code == 200
    except httpx2.TransportError:
        return False


def test_a_header_that_is_too_long(generator: TextGenerator) -> None:
    with run_server(generator) as running, connect(running) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000)
        assert b" 400 " in connection.recv(4096)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of the open files")
def test_a_low_limit_of_open_files_lowers_that_of_connections() -> None:
    code = (
        "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (100, 200));"
        "from tnnlm.serving.connections import raise_descriptors;"
        "print(raise_descriptors(50), r.getrlimit(r.RLIMIT_NOFILE)[0]);"
        "print(raise_descriptors(2048), r.getrlimit(r.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["50", "114", "136", "200"]


def test_the_log_is_not_flooded(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = EventLog(lines=3, seconds=10, clock=lambda: now[0])
    with caplog.at_level(logging.WARNING, "tnnlm.serving"):
        for _ in range(100):
            log.warn("one", "text")
        log.warn("another", "text")
        now[0] = 11.0
        log.warn("one", "text")
    assert [record.getMessage() for record in caplog.records] == [
        *["one: text"] * 3,
        "another: text",
        "one: text (97 similar lines omitted)",
    ]


def test_invalid_http_does_not_flood_the_log(
    generator: TextGenerator, caplog: pytest.LogCaptureFixture
) -> None:
    with run_server(generator) as running:
        for _ in range(30):
            with connect(running) as connection:
                connection.sendall(b"\x16\x03\x01\r\n\r\n")
                connection.recv(4096)
    assert len(lines(caplog, "Invalid HTTP request received.")) <= 10
    assert threading.active_count() < 100
