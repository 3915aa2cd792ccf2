"""Any request, valid or not, gets a completion or an error, and the server keeps running."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.servers import Running, run_server
from tnnlm.inference.generator import TextGenerator
from tnnlm.serving.chat_schemas import ChatRequest
from tnnlm.serving.schemas import CompletionRequest
from tnnlm.serving.tokenization import DetokenizeRequest, TokenizeRequest

EXAMPLES = 500
"""Number of examples of each of the two kinds of requests."""
OF_OTHERS = 150
"""Number of examples of requests to each endpoint besides completions."""

many = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**80), 2**80)
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from(["\ud800", "\x00", "a" * 3000, "<eos>", "\U0001f600" * 50, "NaN"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)
NAMES = list(CompletionRequest.model_fields)
sensible: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(min_size=1, max_size=30) | st.lists(st.integers(-1, 310), max_size=9),
    "max_tokens": st.integers(0, 9),
    "temperature": st.floats(0, 3),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(0, 400),
    "n": st.integers(1, 5),
    "seed": st.integers(),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=5),
    "stream": st.booleans(),
    "logprobs": st.integers(0, 6),
    "echo": st.booleans(),
    "presence_penalty": st.floats(-3, 3),
    "repetition_penalty": st.floats(0.5, 2),
    "min_p": st.floats(0, 1),
    "response_format": st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object", "x"])}),
    "guided_regex": st.text(max_size=6) | st.sampled_from(["[a-z]+", "(a|b)*", "((((", "\\d{1,9}"]),
    "logit_bias": st.dictionaries(st.integers(-1, 400).map(str), st.floats(-101, 101), max_size=3),
}


KINDS = ("application/json", "text/plain", "multipart/form-data", "application/json; charset=x")
PATHS = ("/v1/completions", "/v1/models", "/v1/models/%00", "/v1/chat/completions", "/page.py")


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Generate requests that are mostly valid, with arbitrary values in a few fields."""
    body = {name: draw(strategy) for name, strategy in sensible.items() if draw(st.booleans())}
    for name in draw(st.lists(st.sampled_from(NAMES) | st.text(max_size=8), max_size=2)):
        body[name] = draw(values)
    return body


roles = st.sampled_from(["system", "user", "assistant", "developer", "tool", ""])
contents = st.text(st.characters(), max_size=20) | st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": st.text(max_size=9)}),
    max_size=3,
)
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": contents}), max_size=4)
BODIES: dict[str, tuple[list[str], dict[str, st.SearchStrategy[Any]]]] = {
    "/v1/chat/completions": (
        list(ChatRequest.model_fields),
        {
            **{name: strategy for name, strategy in sensible.items() if name not in ("prompt", "echo")},
            "messages": messages,
            "logprobs": st.booleans(),
            "top_logprobs": st.integers(0, 6),
        },
    ),
    "/tokenize": (
        list(TokenizeRequest.model_fields),
        {"prompt": st.text(max_size=9), "messages": messages, "return_token_strs": st.booleans()},
    ),
    "/detokenize": (
        list(DetokenizeRequest.model_fields),
        {"tokens": st.lists(st.integers(-1, 310), max_size=9)},
    ),
}


@st.composite
def other_requests(draw: st.DrawFn, path: str) -> dict[str, Any]:
    """Generate requests to an endpoint besides completions, as those above."""
    names, valid = BODIES[path]
    body = {name: draw(strategy) for name, strategy in valid.items() if draw(st.booleans())}
    for name in draw(st.lists(st.sampled_from(names) | st.text(max_size=8), max_size=2)):
        body[name] = draw(values)
    return body


@pytest.fixture(scope="module")
def small(generator: TextGenerator) -> Iterator[Running]:
    with run_server(generator, max_batch=8, max_tokens=8, max_prompt_tokens=1000) as running:
        yield running


@pytest.fixture(scope="module")
def client(small: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=small.url, timeout=30) as client:
        yield client


def check(response: httpx2.Response) -> None:
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"]
        assert "\n" not in error["message"]
        assert "Traceback" not in error["message"]


@many
@given(body=requests())
def test_any_request(client: httpx2.Client, small: Running, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    headers = {"Content-Type": "application/json"}
    check(client.post("/v1/completions", content=content, headers=headers))
    assert small.service.scheduler.alive


@pytest.mark.parametrize("path", BODIES)
@settings(many, max_examples=OF_OTHERS)
@given(data=st.data())
def test_any_request_to_other_endpoints(
    client: httpx2.Client, small: Running, path: str, data: st.DataObject
) -> None:
    content = json.dumps(data.draw(other_requests(path))).encode("utf-8", "surrogatepass")
    check(client.post(path, content=content, headers={"Content-Type": "application/json"}))
    assert small.service.scheduler.alive


@many
@given(
    content=st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()),
    kind=st.sampled_from(
        ["application/json", "text/plain", "multipart/form-data", "application/json; charset=x"]
    ),
    path=st.sampled_from(
        ["/v1/completions", "/v1/models", "/v1/models/%00", "/v1/chat/completions", "/tokenize", "/page.py"]
    ),
    method=st.sampled_from(["POST", "PUT", "DELETE", "GET", "HEAD"]),
)
def test_any_body(client: httpx2.Client, content: bytes, kind: str, path: str, method: str) -> None:
    response = client.request(method, path, content=content, headers={"Content-Type": kind})
    if method == "HEAD":
        assert response.status_code < 500
    else:
        check(response)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"prompt":' * 20_000,
        b'{"prompt": ' + b"9" * 100_000 + b"}",
        b'{"prompt": ' + json.dumps("ab" * 90_000).encode() + b"}",
        b'{"prompt": ' + json.dumps("\U0001f600" * 20_000).encode() + b"}",
        b'{"max_tokens": 1e400, "prompt": "a"}',
        b'{"temperature": NaN, "prompt": "a"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": "a", "model": "\\ud800"}',
        b'{"prompt": "a", "prompt": ""}',
        b'"prompt"',
        b"null",
        b"",
        b"\xff\xfe",
    ],
    ids=lambda content: repr(content[:24]),
)
def test_malformed_bodies(client: httpx2.Client, content: bytes) -> None:
    response = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert 400 <= response.status_code < 500
    check(response)


def test_broken_http(small: Running, client: httpx2.Client) -> None:
    address = ("127.0.0.1", int(small.url.rsplit(":", 1)[1]))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for sent in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        head + b"Content-Length: -5\r\n\r\n",
        head + b"Content-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        head + b"Content-Length: 99999999999\r\n\r\n{",
        head + b"Transfer-Encoding: chunked\r\n\r\nfffffff\r\n{",
    ):
        with socket.create_connection(address, timeout=5) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(4096)
            assert not answer or answer.split(b" ")[1][:1] == b"4"
    with socket.create_connection(address, timeout=5) as connection:
        # The web server treats an unknown version as HTTP/1; any complete response is accepted.
        connection.sendall(b"GET / HTTP/9.9\r\n\r\n")
        assert connection.recv(4096)[:9] == b"HTTP/1.1 "
    assert client.get("/health").json()["status"] == "ok"


def test_a_body_that_never_comes(generator: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnnlm.serving.middleware.BODY_SECONDS", 0.3)
    with run_server(generator) as running:
        address = ("127.0.0.1", int(running.url.rsplit(":", 1)[1]))
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{"
            )
            assert b" 408 " in connection.recv(4096)
