"""A request whose work fails ends alone, with an error and a line in the log; all others end bit-equal."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from tests.serving.test_scheduler import Bench
from tests.support.servers import run_server
from tnnlm.inference.generator import TextGenerator
from tnnlm.serving.chat_schemas import ChatRequest
from tnnlm.serving.schemas import CompletionRequest
from tnnlm.serving.sequence import GeneratedSequence, Prompt

HEALTHY = 20
EXTREME: list[Any] = [
    *(2**31, -(2**31), 2**53, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64 - 1, 2**64, 0, -1),
    *(float("nan"), float("inf"), float("-inf"), 5e-324, 1e308, 0.5),
    *(True, None, "", "a\x00b", "\ud800", "\U0001f600" * 40, [], {}, [[]], {"5": {"6": []}}),
    *([""], ["\ud800"], ["\U0001f600"] * 16, [1] * 2000, ["a"] * 300, {"5": 1e308}, {str(2**64): 1}),
    {str(token): -100 for token in range(290)},
]
ENDPOINTS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("/v1/completions", {"prompt": "a"}, [*CompletionRequest.model_fields, "no_such_field"]),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}]},
        # The other fields are those of completions.
        [*sorted(ChatRequest.model_fields.keys() - CompletionRequest.model_fields.keys()), "logprobs"],
    ),
]


def healthy(index: int) -> dict[str, Any]:
    sampled = {"temperature": 1.5, "seed": index, "top_p": 0.9, "top_k": 50} if index % 2 else {}
    return {"prompt": f"fox {index}", "max_tokens": 40 + 5 * index, "temperature": 0, **sampled}


def complete(client: httpx2.Client, body: dict[str, Any]) -> str:
    text = ""
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    assert line == "data: [DONE]" or not line
    return text


def test_extreme_values_of_every_field_beside_healthy_streams(generator: TextGenerator) -> None:
    with (
        run_server(generator, max_prompt_tokens=1000, max_tokens=200, reproducible=True) as running,
        httpx2.Client(base_url=running.url, timeout=120, limits=httpx2.Limits(max_connections=64)) as client,
        ThreadPoolExecutor(HEALTHY) as pool,
    ):
        expected = [complete(client, healthy(index)) for index in range(HEALTHY)]
        over = threading.Event()

        def repeat(index: int) -> set[str]:
            texts = {complete(client, healthy(index))}
            while not over.is_set():
                texts.add(complete(client, healthy(index)))
            return texts

        streams = [pool.submit(repeat, index) for index in range(HEALTHY)]
        try:
            for path, asked, fields in ENDPOINTS:
                for name in fields:
                    for value in EXTREME:
                        body = {**asked, "max_tokens": 3, "temperature": 1, name: value}
                        content = json.dumps(body).encode("utf-8", "surrogatepass")
                        headers = {"Content-Type": "application/json"}
                        answer = client.post(path, content=content, headers=headers)
                        assert answer.status_code in (200, 400, 404), (name, value)
                        if answer.status_code != 200:
                            assert "\n" not in answer.json()["error"]["message"]
        finally:
            over.set()
        assert [stream.result() for stream in streams] == [{text} for text in expected]
        assert 'reason="error"' not in client.get("/metrics").text


@pytest.fixture
def make(generator: TextGenerator) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def build(**limits: float) -> Bench:
        made.append(Bench(generator, **limits))
        made[-1].scheduler.start()
        return made[-1]

    yield build
    for bench in made:
        bench.scheduler.close()


def broken(*_: Any) -> Any:
    raise ZeroDivisionError("of this row")


def by_random_number(bench: Bench, sequence: GeneratedSequence, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batched sampling raises because of one row."""
    monkeypatch.setattr(sequence.sampler, "uniform", broken, raising=False)
    monkeypatch.setattr(sequence.sampler, "random", None, raising=False)


def by_penalty(bench: Bench, sequence: GeneratedSequence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence.sampler, "took", broken)


def by_detokenizer(bench: Bench, sequence: GeneratedSequence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence.text._stream, "push", broken)


def by_stop_string(bench: Bench, sequence: GeneratedSequence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence.text, "_stops", (None,))


def by_logprobs(bench: Bench, sequence: GeneratedSequence, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence.logprobs = -1


def by_prompt(bench: Bench, sequence: GeneratedSequence, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id without an embedding."""


FAULTS = (by_random_number, by_penalty, by_detokenizer, by_stop_string, by_logprobs, by_prompt)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_an_exception_ends_its_row_only(
    fault: Callable[[Bench, GeneratedSequence, pytest.MonkeyPatch], None],
    make: Callable[..., Bench],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def others(bench: Bench) -> list[GeneratedSequence]:
        return [bench.sequence(60, seed=seed or None) for seed in range(4)]

    alone, beside = make(), make()
    expected = others(alone)
    for sequence in expected:
        alone.ask("the quick", sequence)
    alone.collector.wait(*expected)
    good, bad = others(beside), beside.sequence(60, seed=9)
    for sequence in good:
        sequence.logprobs = 2
    with caplog.at_level(logging.WARNING, "tnnlm.serving"):
        fault(beside, bad, monkeypatch)
        for sequence in good[:2]:
            beside.ask("the quick", sequence)
        beside.collector.wait(*good[:2], tokens=2)
        prompt = [10**6] if fault is by_prompt else beside.generator.tokenizer.encode("the quick")
        beside.scheduler.submit([Prompt(prompt, [bad])])
        for sequence in good[2:]:
            beside.ask("the quick", sequence)
        beside.collector.wait(bad, *good)
    assert [sequence.drawn for sequence in good] == [sequence.drawn for sequence in expected]
    assert [beside.collector.text(one) for one in good] == [alone.collector.text(one) for one in expected]
    assert beside.collector.finish(bad) == "error"
    assert beside.collector.outputs[bad][-1].error
    (line,) = (record.getMessage() for record in caplog.records if record.name == "tnnlm.serving")
    assert line.startswith("failed: 1 sequence(s) ended: ")
    assert ".py:" in line


def test_a_failed_step_ends_its_rows_and_not_those_that_wait(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(max_batch=1, max_queue=4)
    model = bench.scheduler._batch._model
    plain, failures = model.step, [ZeroDivisionError("of the step")]

    def step(*given: Any) -> Any:
        if failures:
            raise failures.pop()
        return plain(*given)

    monkeypatch.setattr(model, "step", step)
    first, waiting = bench.sequence(20), bench.sequence(20)
    with bench.scheduler._queue.changed:  # both are queued before the first iteration
        bench.ask("the quick", first)
        bench.ask("the quick", waiting)
    bench.collector.wait(first, waiting)
    assert "ZeroDivisionError" in bench.collector.outputs[first][-1].error
    assert bench.collector.finish(waiting) in ("length", "stop")


def test_an_exception_in_the_answer_ends_one_stream(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The formatting of log-probabilities fails after the scheduler has delivered them."""
    monkeypatch.setattr("tnnlm.serving.logprobs.LogprobsFormat.entries", broken)
    with run_server(generator) as running, httpx2.Client(base_url=running.url, timeout=60) as client:
        body = {"prompt": "a", "max_tokens": 5, "logprobs": 1}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 500
        assert "ZeroDivisionError" in answer.json()["error"]["message"]
        streamed = client.post("/v1/completions", json=body | {"stream": True}).text
        assert "ZeroDivisionError" in json.loads(streamed.strip().splitlines()[-1][6:])["error"]["message"]
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 5}).status_code == 200
    assert sum("of this row" in record.getMessage() for record in caplog.records) == 2
