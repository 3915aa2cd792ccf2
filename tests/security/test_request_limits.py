"""One request holds a limited share of the server: rows, memory, bytes of its answer and time of the loop."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx2
import pytest
from starlette.types import Message

from tests.support.servers import run_server
from tnnlm.inference.generator import TextGenerator
from tnnlm.serving import middleware
from tnnlm.serving.answer import answer_bytes
from tnnlm.serving.logprobs import LogprobsFormat

LARGE = [
    ({"n": 5}, "n: prompts times n must be at most 4 (--max-request-rows)"),
    ({"prompt": ["a", "b", "c"], "n": 2}, "n: prompts times n must be at most 4 (--max-request-rows)"),
    ({"prompt": [[5] * 600] * 2}, "the prompts have 1,200 tokens together; send at most 1,000"),
    ({"n": 4, "max_tokens": 2000, "logprobs": 20}, "8,000 tokens with 20 logprobs, about 6 MiB; reduce n, "),
    ({"prompt": [5] * 900, "n": 4, "logprobs": 20, "echo": True, "max_tokens": 1}, "n, max_tokens, echo, "),
    ({"max_tokens": 2001}, "max_tokens: must be at most 2,000 (--max-tokens)"),
]


def test_products_are_limited(generator: TextGenerator) -> None:
    limits = {
        "max_request_rows": 4,
        "max_prompt_tokens": 1000,
        "max_tokens": 2000,
        "max_answer_bytes": 1 << 20,
    }
    with run_server(generator, **limits) as running, httpx2.Client(base_url=running.url) as client:
        for change, message in LARGE:
            answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 10, **change})
            assert answer.status_code == 400, change
            assert message in answer.json()["error"]["message"]
        body = {"prompt": "a", "n": 4, "max_tokens": 10, "logprobs": 20, "echo": True}
        answer = client.post("/v1/completions", json=body)
        assert len(answer.content) < 4096 + answer_bytes(4 * 11, 20)


def test_an_answer_that_grows_beyond_its_estimate_is_refused(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tnnlm.serving.requests.answer_bytes", lambda *_: 0)
    with run_server(generator, max_answer_bytes=2000) as running:
        body = {"prompt": "a", "max_tokens": 1000, "logprobs": 20}
        answer = httpx2.post(f"{running.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert "(--max-answer-mb)" in answer.json()["error"]["message"]


def test_all_answers_together_are_limited(generator: TextGenerator) -> None:
    with run_server(generator, max_answer_bytes=1 << 20) as running:
        running.service._promised = 16 << 20
        body = {"prompt": "a", "max_tokens": 10}
        answer = httpx2.post(f"{running.url}/v1/completions", json=body)
        assert answer.status_code == 429
        running.service._promised = 0
        assert httpx2.post(f"{running.url}/v1/completions", json=body).status_code == 200
        assert running.service._promised == 0


def test_log_probabilities_are_formatted_off_the_event_loop(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[tuple[str, int]] = []
    plain = LogprobsFormat.entries

    def spy(self: LogprobsFormat, scores: Any) -> dict[str, Any]:
        threads.append((threading.current_thread().name, len(scores)))
        return plain(self, scores)

    monkeypatch.setattr(LogprobsFormat, "entries", spy)
    with run_server(generator) as running, httpx2.Client(base_url=running.url, timeout=60) as client:
        body = {"prompt": [5] * 700, "max_tokens": 20, "logprobs": 20, "echo": True, "n": 2}
        whole = client.post("/v1/completions", json=body).json()
        streamed = client.post("/v1/completions", json=body | {"stream": True, "temperature": 0}).text
    assert all(len(choice["logprobs"]["tokens"]) >= 701 for choice in whole["choices"])
    assert streamed.endswith("data: [DONE]\n\n")
    formatted = [(name, n) for name, n in threads if n]
    assert sum(n for _, n in formatted) >= 4 * 701
    assert all(name.startswith("encoder") and n <= 256 for name, n in formatted)


def test_all_bodies_together_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODIES", 2)
    statuses: list[int] = []
    held = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await held.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def attack() -> None:
        bodies = middleware.WholeBody(app, 1000)
        scope: dict[str, Any] = {"type": "http", "method": "POST", "headers": []}

        async def receive() -> Message:
            return {"type": "http.request", "body": b"x" * 900, "more_body": False}

        tasks = [asyncio.create_task(bodies(scope, receive, send)) for _ in range(3)]
        while not statuses:
            await asyncio.sleep(0)
        held.set()
        await asyncio.gather(*tasks)
        await bodies(scope, receive, send)

    asyncio.run(attack())
    assert statuses == [429, 200, 200, 200]


def test_a_large_body_is_validated_off_the_event_loop(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    plain = json.loads

    def spy(text: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return plain(text, **options)

    monkeypatch.setattr("tnnlm.serving.json_body.json.loads", spy)
    with run_server(generator) as running:
        httpx2.post(f"{running.url}/v1/completions", json={"prompt": [5] * 1000, "max_tokens": 1})
    assert threads
    assert all(thread.name.startswith("asyncio_") for thread in threads)
