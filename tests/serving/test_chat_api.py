"""The chat API, called with the client library of OpenAI, and conversations that continue their states."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from tests.support.servers import Running, run_server
from tnnlm.chat.templates import PLAIN
from tnnlm.inference.generator import TextGenerator

CLOSE = PLAIN.replace("{% generation %} {{", "{% generation %}{{")
"""Plain template whose answers don't begin with a space, which a random model wouldn't write."""
HELLO = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the quick brown"}]
ENDLESS = [{"role": "user", "content": "loop"}]
HELLO_TEXT = "system: be brief\nuser: the quick brown\nassistant:"


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, messages: list[Any] = HELLO, **more: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 12, **more}
    )


def complete(server: Running, **body: Any) -> dict[str, Any]:
    answer = httpx2.post(f"{server.url}/v1/completions", json={"temperature": 0, **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_answer_is_the_completion_of_the_text_of_the_messages(
    client: openai.OpenAI, server: Running, generator: TextGenerator
) -> None:
    answer = ask(client)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    text = complete(server, prompt=HELLO_TEXT, max_tokens=12)["choices"][0]["text"]
    assert choice.message.content == text.removeprefix(" ")
    assert answer.usage.prompt_tokens == len(generator.tokenizer.encode(HELLO_TEXT))
    assert answer.usage.completion_tokens == 12
    parts = [{"type": "text", "text": "the quick"}, {"type": "text", "text": "brown"}]
    lines = ask(client, [HELLO[0], {"role": "user", "content": parts}])
    joined = ask(client, [HELLO[0], {"role": "user", "content": "the quick\nbrown"}])
    assert lines.choices[0].message.content == joined.choices[0].message.content


def test_stream_has_the_role_first_and_the_usage_last(client: openai.OpenAI) -> None:
    whole = ask(client, n=2, temperature=1, seed=3, max_tokens=40)
    options = {"include_usage": True}
    sampling = {"temperature": 1, "seed": 3, "max_tokens": 40}
    chunks = list(ask(client, n=2, stream=True, stream_options=options, **sampling))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    for index in range(2):
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert (own[0].delta.role, own[0].delta.content) == ("assistant", "")
        assert not any(choice.delta.role for choice in own[1:])
        text = "".join(choice.delta.content or "" for choice in own)
        assert text == whole.choices[index].message.content
        assert [choice.finish_reason for choice in own if choice.finish_reason] == [
            whole.choices[index].finish_reason
        ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_logprobs_are_those_of_completions_in_the_format_of_chats(
    client: openai.OpenAI, server: Running
) -> None:
    answer = ask(client, logprobs=True, top_logprobs=2, max_tokens=6)
    content = answer.choices[0].logprobs.content
    scores = complete(server, prompt=HELLO_TEXT, max_tokens=6, logprobs=2)["choices"][0]["logprobs"]
    assert [entry.token for entry in content] == scores["tokens"]
    assert [entry.logprob for entry in content] == pytest.approx(scores["token_logprobs"], abs=1e-5)
    data = b"".join(bytes(entry.bytes) for entry in content)
    assert data.decode(errors="replace").removeprefix(" ") == answer.choices[0].message.content
    for entry in content:
        first, _ = entry.top_logprobs
        assert first.token == entry.token, "the sampling is greedy"
    streamed = list(ask(client, logprobs=True, max_tokens=6, stream=True))
    parts = [c.choices[0].logprobs for c in streamed if c.choices[0].logprobs]
    assert [entry.token for part in parts for entry in part.content] == scores["tokens"]
    assert not parts[0].content[0].top_logprobs


def test_stop_and_limits(client: openai.OpenAI) -> None:
    text = ask(client, max_tokens=60).choices[0].message.content
    answer = ask(client, max_completion_tokens=60, stop=text[20:23], max_tokens=60)
    assert answer.choices[0].message.content == text[: text.index(text[20:23])]
    assert answer.choices[0].finish_reason == "stop"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages: "),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role: "),
    ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, '"type": "text"'),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages.0.mood: no such parameter"),
    ({"messages": [*HELLO] * 513}, "messages: "),
    ({"messages": [{"role": "user", "content": "a" * 9000}]}, "messages: the messages have"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: tool calls are not supported"),
    ({"tool_choice": "auto"}, "tool_choice: tool calls are not supported"),
    ({"extra_body": {"functions": [{}]}}, "functions: tool calls are not supported"),
    ({"top_logprobs": 3}, "top_logprobs: needs logprobs=true"),
    ({"max_completion_tokens": 13}, "max_completion_tokens: differs from max_tokens"),
    ({"max_tokens": 5000}, "max_tokens: must be at most 3,000"),
    ({"n": 65}, "n: prompts times n must be at most 64"),
    ({"extra_body": {"prompt": "x"}}, "prompt: no such parameter"),
    ({"extra_body": {"echo": True}}, "echo: no such parameter"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_bad_requests_say_what_is_wrong(client: openai.OpenAI, change: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **change)
    assert message in str(caught.value)
    assert caught.value.param in (*change.get("extra_body", change),)


def test_defaults_of_clients_change_nothing(client: openai.OpenAI) -> None:
    usual = ask(client).choices[0].message
    neutral = {"tools": [], "tool_choice": "none", "store": False, "modalities": ["text"], "logprobs": None}
    again = ask(client, **neutral, extra_body={"add_generation_prompt": True, "functions": []})
    assert again.choices[0].message.content == usual.content
    # Messages as the client library returns them, with their nulls.
    assert ask(client, [*HELLO, usual.to_dict(exclude_none=False), HELLO[1]]).choices


def test_other_models_and_keys_are_refused(client: openai.OpenAI, generator: TextGenerator) -> None:
    with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
        ask(client, model="gpt-2")
    with run_server(generator, key="secret") as locked:
        base = f"{locked.url}/v1"
        with pytest.raises(openai.AuthenticationError, match="API key"):
            ask(openai.OpenAI(base_url=base, api_key="wrong", max_retries=0))
        assert ask(openai.OpenAI(base_url=base, api_key="secret")).choices


def test_a_request_without_a_limit_of_tokens_ends(server: Running) -> None:
    body = {"messages": HELLO, "temperature": 0}
    answer = httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
    assert answer["usage"]["completion_tokens"] <= 2048


@pytest.fixture
def close(generator: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Running, Running]]:
    """Servers with the stored template ``CLOSE``, with and without a cache of states."""
    monkeypatch.setattr(generator.tokenizer, "chat_template", CLOSE)
    with run_server(generator) as running, run_server(generator, cache_bytes=0) as without:
        yield running, without


def chat(server: Running, messages: list[Any], **more: Any) -> dict[str, Any]:
    body = {"messages": messages, "temperature": 0, **more}
    answer = httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def prefilled(server: Running) -> float:
    (line,) = (
        line
        for line in httpx2.get(f"{server.url}/metrics").text.splitlines()
        if line.startswith("tnnlm_prompt_tokens_total ")
    )
    return float(line.split()[1])


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1, "seed": 4, "stream": False}], ids=str)
def test_second_turn_prefills_only_its_own_tokens(
    close: tuple[Running, Running], generator: TextGenerator, sampling: dict[str, Any]
) -> None:
    server, without = close
    encode = generator.tokenizer.encode
    messages: list[Any] = [*HELLO]
    read = prefilled(server)
    own = encode(HELLO_TEXT)
    before = 0
    for question in ("jumps over", "a lazy dog", "zzz"):
        answer = chat(server, messages, max_tokens=30, **sampling)
        usage = answer["usage"]
        assert prefilled(server) - read == len(own)
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - len(own)
        read += len(own)
        # The last token of an answer that its limit ends has not been read yet.
        assert usage["prompt_tokens"] == before + len(own)
        before += len(own) + usage["completion_tokens"] - (answer["choices"][0]["finish_reason"] == "length")
        content = answer["choices"][0]["message"]["content"]
        messages += [{"role": "assistant", "content": content}, {"role": "user", "content": question}]
        own = [generator.tokenizer.eos_id, *encode(f"\nuser: {question}\nassistant:")]
        if answer["choices"][0]["finish_reason"] == "length":
            own.insert(0, -1)  # the last token, whose id doesn't matter here
    # Reading all of it gives the same text.
    parsed = server.service.scheduler.endings.dialogues._kept
    tokens = [*parsed[next(reversed(parsed))]][: usage["prompt_tokens"]]
    whole = complete(without, prompt=tokens, max_tokens=30, **sampling)
    assert whole["choices"][0]["text"] == content
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_answers_of_others_and_changed_answers_are_read_again(close: tuple[Running, Running]) -> None:
    server, _ = close
    content = chat(server, HELLO, max_tokens=30)["choices"][0]["message"]["content"]
    after = [{"role": "user", "content": "and"}]

    def cached(text: str, **more: Any) -> int:
        messages = [*HELLO, {"role": "assistant", "content": text}, *after]
        usage = chat(server, messages, max_tokens=1, **more)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    first = len(server.service.parser.tokenizer.encode(HELLO_TEXT))
    assert cached(content) == first + 29
    assert cached(content + "!") <= first
    assert cached(content[:-1]) <= first
    assert cached(content, cache_salt="other") == 0


def test_name_of_the_end_token_in_a_message_is_text(
    close: tuple[Running, Running], generator: TextGenerator
) -> None:
    server, _ = close
    messages = [{"role": "user", "content": "a<eos>b"}]
    usage = chat(server, messages, max_tokens=1)["usage"]
    assert usage["prompt_tokens"] == len(generator.tokenizer.encode("user: a<eos>b\nassistant:"))


def test_template_that_refuses_or_fails_is_reported(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('no system') }}{% endif %}"
    source += "{% if messages[0].content == 'loop' %}{% for _ in range(99999) %}{% for _ in range(99999) %}"
    source += "{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}"
    monkeypatch.setattr(generator.tokenizer, "chat_template", source)
    monkeypatch.setattr("tnnlm.serving.chat.SECONDS", 0.3)
    with run_server(generator) as running:
        card = httpx2.get(f"{running.url}/v1/models/tiny").json()
        assert card["tnnlm"]["chat_template"] == "stored with the model"
        for messages, reason in (
            (HELLO, "no system"),
            ([{"role": "user", "content": "loop"}], "0.3 seconds"),
        ):
            answer = httpx2.post(f"{running.url}/v1/chat/completions", json={"messages": messages})
            assert answer.status_code == 400
            assert reason in answer.json()["error"]["message"]
            assert answer.json()["error"]["param"] == "messages"
        assert chat(running, [{"role": "user", "content": "fox"}], max_tokens=1)["choices"]


def test_model_without_a_template_says_that_it_uses_the_plain_one(server: Running) -> None:
    card = httpx2.get(f"{server.url}/v1/models").json()["data"][0]
    assert card["tnnlm"]["chat_template"] == "plain: lines of role: content"
    described = httpx2.get(f"{server.url}/openapi.json").json()
    assert "/v1/chat/completions" in described["paths"]
    assert {"ChatRequest", "CompletionRequest"} <= described["components"]["schemas"].keys()
    assert json.dumps(described)


def test_tokens_and_text(server: Running, generator: TextGenerator) -> None:
    def call(path: str, **body: Any) -> dict[str, Any]:
        found: dict[str, Any] = httpx2.post(f"{server.url}{path}", json=body).json()
        return found

    tokenizer = generator.tokenizer
    found = call("/tokenize", model="tiny", prompt="fox é", return_token_strs=True)
    assert found["tokens"] == tokenizer.encode("fox é")
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 2000)
    assert found["token_strs"][-2:] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert call("/detokenize", tokens=found["tokens"]) == {"prompt": "fox é"}
    assert call("/detokenize", tokens=[tokenizer.eos_id]) == {"prompt": "<eos>"}
    assert call("/tokenize", prompt="<eos>", parse_special=True)["tokens"] == [tokenizer.eos_id]
    assert call("/tokenize", messages=HELLO)["tokens"] == tokenizer.encode(HELLO_TEXT)
    for path, body, message in (
        ("/tokenize", {}, "messages: give either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "messages: give either prompt or messages"),
        ("/tokenize", {"prompt": ""}, "prompt: is empty"),
        ("/tokenize", {"prompt": "a" * 9000}, "at most 2,000"),
        ("/tokenize", {"prompt": "a", "model": "b"}, "use 'tiny'"),
        ("/detokenize", {"tokens": [10**6]}, "tokens: token ids must be from 0 to"),
        ("/detokenize", {"tokens": "a"}, "tokens: "),
    ):
        assert message in call(path, **body)["error"]["message"], body
