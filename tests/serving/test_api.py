"""The HTTP API, called with the client library of OpenAI."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest

from tests.support.servers import Running, run_server
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.sampling import SamplingParams
from tnnlm.serving.schemas import CompletionRequest

PROMPT = "the quick brown"


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def own_text(generator: TextGenerator, prompt: str, tokens: int) -> str:
    return "".join(generator.stream(generator.prefill([prompt]), tokens, SamplingParams(temperature=0))[1])


def complete(client: openai.OpenAI, **more: Any) -> Any:
    return client.completions.create(**{"model": "tiny", "prompt": PROMPT, "temperature": 0, **more})


def test_models(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert card.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    assert card.tnnlm["state_bytes"] > 0  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
        client.models.retrieve("gpt-2")


def test_completion(client: openai.OpenAI, generator: TextGenerator) -> None:
    answer = complete(client, max_tokens=40)
    assert answer.choices[0].text == own_text(generator, PROMPT, 40)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(generator.tokenizer.encode(PROMPT))
    assert answer.usage.completion_tokens == 40
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 40


def test_stream_equals_the_complete_response(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=60)
    chunks = list(complete(client, max_tokens=60, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert not any(chunk.usage for chunk in chunks[:-1])


def test_timing_is_returned_on_request(client: openai.OpenAI) -> None:
    options = {"include_timing": True}
    chunks = list(complete(client, max_tokens=30, stream=True, stream_options=options))
    told = [chunk.tnnlm for chunk in chunks]
    assert sum(len(part["step_ms"]) for part in told) == 29, "the first token is the prompt's"
    positions = [part["position"] for part in told]
    assert positions == sorted(positions)


def test_n_seeds_and_several_prompts(client: openai.OpenAI) -> None:
    def texts(**more: Any) -> list[str]:
        answer = complete(client, temperature=1, max_tokens=12, **more)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    assert len(set(texts(n=4))) > 1
    assert texts(n=4, seed=5) == texts(n=4, seed=5) != texts(n=4, seed=6)
    several = texts(prompt=["the quick", "lazy dog"], n=2, seed=5)
    assert len(several) == 4
    streamed = dict.fromkeys(range(4), "")
    for chunk in complete(client, temperature=1, max_tokens=12, n=4, seed=5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == texts(n=4, seed=5)


def test_token_ids_are_a_prompt(client: openai.OpenAI, generator: TextGenerator) -> None:
    ids = generator.tokenizer.encode(PROMPT)
    texts = {complete(client, prompt=prompt).choices[0].text for prompt in (PROMPT, ids, [ids], [PROMPT])}
    assert len(texts) == 1


def test_stop(client: openai.OpenAI) -> None:
    text = complete(client, max_tokens=100).choices[0].text
    stop = text[30:34]
    for given in (stop, ["not there", stop]):
        answer = complete(client, max_tokens=100, stop=given)
        assert answer.choices[0].text == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
    chunks = list(complete(client, max_tokens=100, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]


def test_logprobs_and_echo(client: openai.OpenAI, generator: TextGenerator) -> None:
    answer = complete(client, max_tokens=6, logprobs=3)
    scores = answer.choices[0].logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == 6
    for own, top in zip(scores.token_logprobs, scores.top_logprobs, strict=True):
        assert own == pytest.approx(max(top.values()))
        assert len(top) == 3
    ids = generator.tokenizer.encode(PROMPT)
    echoed = complete(client, max_tokens=6, logprobs=3, echo=True)
    assert echoed.choices[0].text == PROMPT + answer.choices[0].text
    scores = echoed.choices[0].logprobs
    assert len(scores.tokens) == len(ids) + 6
    assert "".join(scores.tokens[: len(ids)]) == PROMPT
    assert scores.token_logprobs[0] is None
    # Log-probabilities of the prompt, requested token by token.
    for end in range(1, len(ids)):
        expected = generator.prefill_tokens([ids[:end]]).logits.log_softmax(-1)[0, ids[end]]
        assert scores.token_logprobs[end] == pytest.approx(expected.item(), abs=1e-4)
    only = complete(client, max_tokens=0, logprobs=1, echo=True, prompt=PROMPT * 40)
    assert only.choices[0].text == PROMPT * 40
    assert len(only.choices[0].logprobs.tokens) == len(generator.tokenizer.encode(PROMPT * 40))


def test_bias_and_nulls(client: openai.OpenAI, server: Running, generator: TextGenerator) -> None:
    (token,) = generator.tokenizer.encode("z")
    assert complete(client, max_tokens=3, logit_bias={str(token): 100}).choices[0].text == "zzz"
    body = {"prompt": PROMPT, "stop": None, "seed": None, "logprobs": None, "suffix": None, "max_tokens": 2}
    assert httpx2.post(f"{server.url}/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "prompt: is empty"),
        ({"prompt": []}, "expected a string"),
        ({"prompt": [PROMPT, 3]}, "expected a string"),
        ({"prompt": [1, 99999]}, "token ids must be from 0 to"),
        ({"prompt": "a" * 9000}, "at most 2,000"),
        ({"max_tokens": 5000}, "at most 3,000"),
        ({"max_tokens": -1}, "max_tokens: .*greater than or equal to 0"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": -0.5}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"extra_body": {"top_k": -2}}, "top_k"),
        ({"n": 300}, "n: "),
        ({"stop": [""]}, "from 1 to 512 characters"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"best_of": 3}, "best_of: not supported"),
        ({"suffix": "end"}, "generates left to right"),
        ({"logit_bias": {"x": 1}}, "'x' is not a token id"),
        ({"extra_body": {"min_p": 1.1}}, "min_p: Input should be less than or equal to 1"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty: "),
        ({"extra_body": {"typical_p": 0.1}}, "typical_p: no such parameter"),
        ({"extra_body": {"guided_regex": "a" * 5000}}, "guided_regex: "),
        ({"extra_body": {"response_format": {"type": "xml"}}}, "response_format.type: "),
        (
            {"extra_body": {"response_format": {"type": "json_schema"}}},
            "response_format.json_schema: belongs",
        ),
    ],
    ids=str,
)
def test_bad_requests_say_what_is_wrong(client: openai.OpenAI, change: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        complete(client, **change)
    assert caught.value.param in (*change.get("extra_body", change),)


NOT_IGNORED = {
    '{"prompt": "a", "max_tokens": 1, "prompt": "b"}': ("prompt", "prompt: is given twice; omit"),
    '{"prompt": "a", "logit_bias": {"5": 1, "5": 2}}': ("5", "5: is given twice"),
    '{"prompt": "a", "stream": true, "stream_options": {"x": 1, "x": 1}}': ("x", "x: is given twice"),
    '{"prompt": "a", "logit_bias": {"05": 1}}': ("logit_bias", "'05' is not a token id"),
    '{"prompt": "a", "stream_options": {}}': ("stream_options", "stream_options: only applies to stream"),
    '{"prompt": "a", "repetition_penalty": true}': ("repetition_penalty", "valid number"),
    '{"prompt": "a", "ignore_eos": 0}': ("ignore_eos", "no such parameter"),
    '{"prompt": "a", "min_tokens": false}': ("min_tokens", "no such parameter"),
    '{"prompt": "a", "min_p": NaN}': ("min_p", "finite number"),
    '{"prompt": "a", "logit_bias": {"5": Infinity}}': ("logit_bias", "finite number"),
    '{"prompt": "a", "n": true}': ("n", "valid integer"),
    '{"prompt": "a", "max_tokens": 1.0}': ("max_tokens", "valid integer"),
    '{"prompt": "a", "seed": ' + "9" * 5000 + "}": (None, "the body is not valid JSON"),
    '{"prompt": ' + "[" * 90_000: (None, "the body is not valid JSON"),
}


@pytest.mark.parametrize("body", NOT_IGNORED, ids=lambda body: body[:60])
def test_nothing_in_a_body_is_ignored(server: Running, body: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx2.post(f"{server.url}/v1/completions", content=body, headers=headers)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == NOT_IGNORED[body][0]
    assert NOT_IGNORED[body][1] in error["message"]


INTEGERS = ("max_tokens", "top_k", "n", "best_of", "seed", "logprobs")
NUMBERS = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty")


@pytest.mark.parametrize(
    "value",
    [2**63, 2**64, -(2**63) - 1, 10**30, 10**400],
    ids=lambda v: f"{v:.3e}" if v < 10**300 else "1e400",
)
def test_huge_integers_are_refused_in_every_field(server: Running, client: openai.OpenAI, value: int) -> None:
    bodies: list[dict[str, Any]] = [{name: value} for name in (*INTEGERS, *NUMBERS)]
    bodies += [{"prompt": [value]}, {"prompt": [[5], [5, value]]}, {"logit_bias": {"5": value}}]
    bodies += [{"logit_bias": {str(abs(value)): 1}}]
    if value == 2**63:
        bodies.remove({"seed": value})  # seeds up to 2^64 - 1 are valid, as in PyTorch
    fields = CompletionRequest.model_fields.items()
    assert {name for name, field in fields if "int" in str(field.annotation)} == {*INTEGERS, "prompt"}
    running = complete(client, max_tokens=3000, stream=True, logit_bias={"0": -100})
    for body in bodies:
        response = httpx2.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, **body})
        assert response.status_code == 400, body
        assert response.json()["error"]["param"] == next(iter(body))
    assert [chunk.choices[0].finish_reason for chunk in running][-1] == "length"


def test_the_largest_integers_are_harmless(client: openai.OpenAI) -> None:
    usual = complete(client, temperature=1, seed=1, max_tokens=20).choices[0].text
    for extra in ({"top_k": 2**63 - 1}, {"top_k": 300}, {"top_k": -1}, {"top_k": 0}):
        found = complete(client, temperature=1, seed=1, max_tokens=20, extra_body=extra)
        assert found.choices[0].text == usual
    assert complete(client, seed=2**64 - 1).choices


def test_defaults_of_other_clients(client: openai.OpenAI) -> None:
    greedy = complete(client, max_tokens=20).choices[0].text
    assert complete(client, max_tokens=20, temperature=1, top_p=0).choices[0].text == greedy
    both = {"top_k": 40}
    assert complete(client, max_tokens=20, temperature=1, top_p=0, extra_body=both).choices[0].text == greedy
    neutral = {"min_p": 0.0, "repetition_penalty": 1.0, "top_k": -1, "ignore_eos": False, "min_tokens": 0}
    neutral |= {"length_penalty": 1.0, "use_beam_search": False, "skip_special_tokens": True, "typical_p": 1}
    assert complete(client, max_tokens=20, best_of=1, extra_body=neutral).choices[0].text == greedy


def test_head_is_answered_where_get_is(server: Running) -> None:
    for path in ("/health", "/metrics", "/v1/models", "/v1/models/tiny", "/", "/page.js", "/openapi.json"):
        head, get = (httpx2.request(method, f"{server.url}{path}") for method in ("HEAD", "GET"))
        assert head.status_code == get.status_code == 200, path
        assert head.content == b""
        assert head.headers["content-type"] == get.headers["content-type"]
    assert httpx2.head(f"{server.url}/v1/completions").status_code == 405
    assert httpx2.head(f"{server.url}/v1/models/gpt-2").status_code == 404
    assert httpx2.head(f"{server.url}/nowhere").status_code == 404


def test_other_refusals(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
        complete(client, model="gpt-2")
    url = f"{server.url}/v1/completions"
    assert "valid JSON" in httpx2.post(url, content=b"{", headers={"content-type": "application/json"}).text
    assert httpx2.post(url, content=b"x" * 400_000).status_code == 413
    assert httpx2.get(url).status_code == 405
    assert httpx2.get(f"{server.url}/nowhere").json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/v1/embeddings", 404, "POST /v1/embeddings: no such endpoint; use one of GET /v1/models, "),
        ("GET", "/nowhere", 404, "GET /nowhere: no such endpoint; use one of GET /v1/models, "),
        ("GET", "/page.py", 404, "GET /page.py: no such endpoint"),
        ("DELETE", "/v1/" + "a%0A" * 900, 404, "DELETE /v1/a"),
        ("GET", "/v1/completions", 405, "this path does not support the method; use POST"),
        ("PUT", "/v1/models", 405, "this path does not support the method; use GET"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_unknown_paths_and_methods(
    server: Running, method: str, path: str, status: int, message: str
) -> None:
    response = httpx2.request(method, f"{server.url}{path}")
    assert response.status_code == status
    error = response.json()["error"]
    assert {*error} == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (None, "unknown_url")
    assert message in error["message"]
    assert len(error["message"]) < 500
    assert error["message"].isprintable()
    if status == 404:
        assert "POST /v1/completions" in error["message"]
        assert "POST /v1/chat/completions" in error["message"]


def test_key(generator: TextGenerator) -> None:
    with run_server(generator, key="a-key") as running:
        base = f"{running.url}/v1"
        assert complete(openai.OpenAI(base_url=base, api_key="a-key"), max_tokens=2).choices
        for wrong in ("another", "a-key-"):
            with pytest.raises(openai.AuthenticationError, match="API key"):
                complete(openai.OpenAI(base_url=base, api_key=wrong))
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=base, api_key="another").models.list()
        assert httpx2.get(f"{running.url}/health").status_code == 200


def test_many_streams_are_neither_lost_nor_mixed(server: Running, generator: TextGenerator) -> None:
    prompts = [f"{word} {index}" for index, word in enumerate(("the quick", "fox", "dog;", "jugs") * 8)]
    lengths = [5 + 9 * (index % 7) for index in range(len(prompts))]

    async def one(client: openai.AsyncOpenAI, prompt: str, tokens: int) -> str:
        stream = await client.completions.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=tokens, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, *pair) for pair in zip(prompts, lengths, strict=True)))

    texts = asyncio.run(all_of_them())
    single = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    for prompt, tokens, text in zip(prompts, lengths, texts, strict=True):
        assert complete(single, prompt=prompt, max_tokens=tokens).choices[0].text == text
        assert text == own_text(generator, prompt, tokens)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_slot(generator: TextGenerator, stream: bool) -> None:
    with run_server(generator, max_batch=1) as running:
        address = ("127.0.0.1", int(running.url.rsplit(":", 1)[1]))
        body = json.dumps({"prompt": PROMPT, "max_tokens": 100_000, "stream": stream}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.create_connection(address) as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            wait_for(lambda: running.service.scheduler.load["running"] == 1)
        wait_for(lambda: running.service.scheduler.load["running"] == 0)
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", timeout=20)
        assert complete(client, max_tokens=2).choices
        assert 'finished_total{reason="cancelled"} 1.0' in httpx2.get(f"{running.url}/metrics").text


def wait_for(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_is_reported(generator: TextGenerator) -> None:
    with run_server(generator, max_batch=1, max_queue=1) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        first = complete(client, max_tokens=50_000, stream=True)
        second = complete(client, max_tokens=50_000, stream=True)
        with pytest.raises(openai.RateLimitError, match="too many requests are waiting"):
            complete(client)
        first.close()
        second.close()


def test_time_limit(generator: TextGenerator) -> None:
    with run_server(generator, timeout=1) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        answer = complete(client, max_tokens=100_000)
        assert answer.choices[0].finish_reason == "length"
        assert 0 < answer.usage.completion_tokens < 100_000


def test_health_and_metrics(server: Running, client: openai.OpenAI) -> None:
    before = httpx2.get(f"{server.url}/health").json()
    assert before["status"] == "ok"
    with ThreadPoolExecutor() as pool:
        done = pool.submit(complete, client, max_tokens=2000)
        wait_for(lambda: httpx2.get(f"{server.url}/health").json()["running"] == 1)
        done.result()
    text = httpx2.get(f"{server.url}/metrics").text
    for name in ("new_tokens_total", "step_seconds_bucket", "texts_running", "cache_bytes"):
        assert f"tnnlm_{name}" in text
    counts = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("tnnlm_first_token"))
    assert float(counts["tnnlm_first_token_seconds_count"]) >= 1
    assert float(counts["tnnlm_first_token_seconds_sum"]) > 0
