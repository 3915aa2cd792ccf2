"""Hosts, keys, and what one client learns of another through the prefix cache."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import httpx2
import pytest

from tests.support.scripts import ROOT
from tests.support.servers import run_server
from tnnlm.cli.serve import allowed_hosts, api_keys
from tnnlm.errors import UserError
from tnnlm.inference.generator import TextGenerator
from tnnlm.serving.middleware import host_name


def test_a_foreign_host_is_refused(generator: TextGenerator) -> None:
    """DNS rebinding: the browser of the user sends the name of the attacker's page."""
    hosts = allowed_hosts("127.0.0.1", "proxy.example")
    with run_server(generator, hosts=hosts) as running, httpx2.Client(base_url=running.url) as client:
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example"):
            for path in ("/v1/models", "/metrics", "/", "/health", "/openapi.json"):
                answer = client.get(path, headers={"Host": host})
                assert answer.status_code == 403, (host, path)
                assert "--allowed-hosts" in answer.json()["error"]["message"]
        known = ("localhost", "LOCALHOST:9000", "127.0.0.1:1", "[::1]", "[::1]:8000", "proxy.example:443")
        for host in known:
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200, host


def test_hosts_that_are_allowed() -> None:
    assert allowed_hosts("0.0.0.0", None) is None
    assert allowed_hosts("127.0.0.1", "*") is None
    assert "me.example" in (allowed_hosts("0.0.0.0", "me.example,other") or ())
    assert "localhost" in (allowed_hosts("127.0.0.9", None) or ())
    assert [host_name(host) for host in ("A:80", "[::1]:80", "[fe80::1]", "::1", "b")] == [
        *("a", "::1", "fe80::1", "::1", "b")
    ]


def test_everything_but_page_and_health_follows_the_key(generator: TextGenerator) -> None:
    with run_server(generator, key="one two") as running, httpx2.Client(base_url=running.url) as client:
        for path in ("/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json"):
            assert client.get(path).status_code == 401, path
            assert client.get(path, headers={"Authorization": "Bearer"}).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer one two"}).status_code == 401
            for key in ("one", "two"):
                assert client.get(path, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            assert client.post(path, json={}).status_code == 401, path
            assert client.post(path, json={}, headers={"Authorization": "Bearer two"}).status_code == 400
        for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
            assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    ("options", "variable"),
    [([""], None), (["a", ""], None), (None, ""), (None, "  "), (["a b"], None), (["\u00e9"], None)],
    ids=str,
)
def test_keys_that_no_client_can_send(options: list[str] | None, variable: str | None) -> None:
    with pytest.raises(UserError, match=r"API_KEY|--api-key"):
        api_keys(options, variable)


def test_keys() -> None:
    assert api_keys(None, None) == ()
    assert api_keys(None, "a b") == ("a", "b")
    assert api_keys(["a", "b"], "") == ("a", "b")


def test_an_empty_key_in_the_environment_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "serve.py"), "--model", "nowhere"],
        capture_output=True,
        text=True,
        env=os.environ | {"TNNLM_API_KEY": ""},
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "TNNLM_API_KEY: is empty" in done.stderr


def cached(client: httpx2.Client, headers: dict[str, str], **more: Any) -> int:
    body = {"prompt": [7] * 300, "max_tokens": 1, **more}
    answer = client.post("/v1/completions", json=body, headers=headers).json()
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_no_client_learns_what_another_asked(generator: TextGenerator) -> None:
    with run_server(generator, key="one two") as running, httpx2.Client(base_url=running.url) as client:
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        assert [cached(client, one), cached(client, one)] == [0, 300]
        assert [cached(client, two), cached(client, two)] == [0, 300]
        assert [cached(client, one, cache_salt="a") for _ in range(2)] == [0, 300]
        assert [cached(client, one, cache_salt="b"), cached(client, two, cache_salt="a")] == [0, 0]
    with run_server(generator) as running, httpx2.Client(base_url=running.url) as client:
        assert [cached(client, {}), cached(client, {})] == [0, 300]
        # Another address that a client claims to have changes nothing.
        assert cached(client, {"X-Forwarded-For": "10.0.0.1", "Authorization": "Bearer x"}) == 300
        assert cached(client, {}, cache_salt="a") == 0
        for salt in ("", 5, "a" * 513, ["a"]):
            body = {"prompt": "a", "cache_salt": salt}
            assert client.post("/v1/completions", json=body).status_code == 400
