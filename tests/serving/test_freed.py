"""A request is freed as soon as it ends, without a search of all objects for cycles."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.security.test_clients import connect, send, wait_for
from tests.support.servers import Running, run_server
from tnnlm.inference.generator import TextGenerator
from tnnlm.serving.sequence import Prompt

ENDLESS = {"max_tokens": 10**5, "logit_bias": {"0": -100}}


@pytest.fixture
def running(generator: TextGenerator) -> Iterator[Running]:
    with run_server(generator) as running:
        httpx2.post(f"{running.url}/v1/completions", json={"prompt": "a"}, timeout=60)
        gc.collect()
        gc.disable()
        yield running
        gc.enable()


def watch(running: Running, monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Return a list to which references to prompts, sequences and responses are added."""
    seen: list[weakref.ref[Any]] = []
    submit = running.service.scheduler.submit

    def watched(prompts: list[Prompt]) -> None:
        seen.extend(weakref.ref(prompt) for prompt in prompts)
        seen.extend(weakref.ref(sequence) for prompt in prompts for sequence in prompt.sequences)
        seen.extend(sequence.owner for prompt in prompts for sequence in prompt.sequences)  # type: ignore[misc]
        submit(prompts)

    monkeypatch.setattr(running.service.scheduler, "submit", watched)
    return seen


def freed(seen: list[weakref.ref[Any]]) -> None:
    """Wait until all objects are freed."""
    assert seen
    wait_for(lambda: not any(reference() for reference in seen))


def test_requests_that_end(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    for body in (
        {"prompt": "fox"},
        {"prompt": ["fox", "dog"], "n": 2, "logprobs": 2, "echo": True, "presence_penalty": 1},
    ):
        for stream in (False, True):
            seen = watch(running, monkeypatch)
            more = {"max_tokens": 5, "stream": stream}
            answer = httpx2.post(f"{running.url}/v1/completions", json=body | more, timeout=60)
            assert answer.status_code == 200
            freed(seen)


@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_fail(stream: bool, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(running, monkeypatch)
    monkeypatch.setattr(running.service.scheduler._batch._model, "step", lambda *_: 1 / 0)
    body = {"prompt": "fox", "max_tokens": 5, "stream": stream}
    answer = httpx2.post(f"{running.url}/v1/completions", json=body, timeout=60)
    assert "ZeroDivisionError" in answer.text
    freed(seen)


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_disconnect(stream: bool, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(running, monkeypatch)
    with connect(running) as connection:
        send(connection, ENDLESS | {"prompt": "fox", "stream": stream})
        wait_for(lambda: len(seen) == 3)
        if stream:
            assert b" 200 " in connection.recv(4096)
    freed(seen)
