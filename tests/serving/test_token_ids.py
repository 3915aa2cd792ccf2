"""Token ids of prompts and completions, with which a client continues from the state of the server."""

from __future__ import annotations

import json
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.support.servers import Running, run_server
from tnnlm.inference.generator import TextGenerator


def post(server: Running, **body: Any) -> str:
    data = json.dumps({"prompt": "the quick", "temperature": 0, "return_token_ids": True, **body}).encode()
    request = Request(f"{server.url}/v1/completions", data, {"Content-Type": "application/json"})
    with urlopen(request, timeout=300) as answer:
        return str(answer.read().decode())


def complete(server: Running, **body: Any) -> dict[str, Any]:
    return dict(json.loads(post(server, **body)))


def test_ids_continue_from_the_state_and_give_the_same_text(
    server: Running, generator: TextGenerator
) -> None:
    encode = generator.tokenizer.encode
    prompts = ["the quick brown", "jumps over the lazy dog"]
    whole = complete(server, prompt=prompts, max_tokens=24)
    begun = complete(server, prompt=prompts, max_tokens=15)
    ids = [choice["prompt_token_ids"] + choice["token_ids"] for choice in begun["choices"]]
    assert [choice["prompt_token_ids"] for choice in begun["choices"]] == list(map(encode, prompts))
    rest = complete(server, prompt=ids, max_tokens=9)
    for i in range(2):
        assert (
            ids[i] + rest["choices"][i]["token_ids"] == encode(prompts[i]) + whole["choices"][i]["token_ids"]
        )
        text = begun["choices"][i]["text"] + rest["choices"][i]["text"]
        assert text == whole["choices"][i]["text"]
    usage = rest["usage"]
    # The last token of each was sampled, and is not part of the state.
    assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] == 2


def test_stream_has_the_ids_of_the_whole_answer(server: Running) -> None:
    sampled = {"n": 2, "seed": 4, "temperature": 1, "max_tokens": 12, "echo": True}
    whole = complete(server, **sampled)["choices"]
    lines = post(server, **sampled, stream=True).split("\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    for choice in whole:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert parts[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert not any("prompt_token_ids" in part for part in parts[1:])
        assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        assert "".join(part["text"] for part in parts) == choice["text"]


def test_ids_are_returned_only_if_requested(server: Running) -> None:
    assert "token_ids" not in post(server, return_token_ids=False, max_tokens=2)


def test_ids_count_in_the_size_of_the_answer(generator: TextGenerator) -> None:
    sizes = {"n": 4, "max_tokens": 16_000}
    with run_server(generator, max_answer_bytes=20 * 4 * 16_000) as small:  # less than 16 + 8 bytes a token
        with pytest.raises(HTTPError) as refused:
            post(small, **sizes)
        error = json.load(refused.value)["error"]["message"]
        assert error.endswith("return_token_ids to stay below 1 MiB (--max-answer-mb)")
