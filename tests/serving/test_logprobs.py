"""The ``logprobs`` of completions, as OpenAI's API gives them, and the usage of tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from tests.support.servers import Running, run_server
from tnnlm.detokenizer import Detokenizer
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.sampling import SamplingParams, sample
from tnnlm.serving.logprobs import LogprobsFormat, TokenScore, score_tokens
from tnnlm.serving.requests import RequestParser
from tnnlm.serving.schemas import CompletionRequest
from tnnlm.serving.settings import Settings
from tnnlm.tokenizer import TextTokenizer

MIXED = "na\u00efve \U0001f600 \u00e9\u4e2d"
END = "<eos>"
BIASES = [{}, {"0": 100}]


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=30) as client:
        yield client


def complete(client: httpx2.Client, prompt: Any, **more: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 6, **more}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def check_offsets(text: str, scores: dict[str, Any], shown: tuple[str, ...] = ()) -> None:
    """Check that the text from an offset on begins with the token; special tokens need not be part of it."""
    assert {len(scores[key]) for key in scores} == {len(scores["tokens"])}
    assert scores["text_offset"] == sorted(scores["text_offset"])
    for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
        if token.startswith("bytes:"):
            data = re.sub(r"\\x(..)", lambda found: chr(int(found[1], 16)), token.removeprefix("bytes:"))
            letter = text[offset]
            assert letter == "\ufffd" or data.encode("latin-1") in text[offset : offset + 9].encode()
        elif token != END or END in shown:
            assert text[offset:].startswith(token)
        else:
            assert offset == len(text)


@pytest.mark.parametrize("bias", BIASES, ids=str)
@pytest.mark.parametrize("prompt", [MIXED, "ab", [0, 5, 6], [5, 0, 6], [5, 6, 0], [0]], ids=str)
def test_the_text_from_an_offset_on_begins_with_the_token(
    client: httpx2.Client, prompt: Any, bias: dict[str, int]
) -> None:
    plain = complete(client, prompt, logprobs=2, logit_bias=bias)["choices"][0]
    check_offsets(plain["text"], plain["logprobs"])
    echoed = complete(client, prompt, logprobs=2, logit_bias=bias, echo=True)["choices"][0]
    n_prompt = len(echoed["logprobs"]["tokens"]) - len(plain["logprobs"]["tokens"])
    echo = echoed["text"].removesuffix(plain["text"])
    own = {key: values[:n_prompt] for key, values in echoed["logprobs"].items()}
    check_offsets(echo, own, shown=(END,))
    assert echoed["logprobs"]["tokens"][n_prompt:] == plain["logprobs"]["tokens"]
    moved = [offset + len(echo) for offset in plain["logprobs"]["text_offset"]]
    assert echoed["logprobs"]["text_offset"][n_prompt:] == moved
    assert echo == (prompt if isinstance(prompt, str) else "".join(own["tokens"]))


def test_parts_of_characters_are_given_in_bytes(client: httpx2.Client) -> None:
    scores = complete(client, "\u00e9\U0001f600x", echo=True, max_tokens=0, logprobs=0)["choices"][0][
        "logprobs"
    ]
    assert scores["tokens"] == [
        *(f"bytes:\\x{byte:02x}" for byte in "\u00e9\U0001f600".encode()),
        "x",
    ]
    assert scores["text_offset"] == [0, 0, 1, 1, 1, 1, 2]


def test_a_character_that_the_prompt_begins_is_completed_by_the_completion(
    client: httpx2.Client, generator: TextGenerator
) -> None:
    ids = generator.tokenizer.encode("a\u00e9")
    choice = complete(client, ids[:-1], echo=True, max_tokens=1, logprobs=0, logit_bias={str(ids[-1]): 100})
    assert choice["choices"][0]["text"] == "a\u00e9"
    assert choice["choices"][0]["logprobs"]["text_offset"] == [0, 1, 1]
    only = complete(client, ids[:-1], echo=True, max_tokens=0, logprobs=0)["choices"][0]
    assert only["text"] == "a\ufffd"


def test_the_end_token_has_an_entry(client: httpx2.Client, generator: TextGenerator) -> None:
    """The harness drops the last entry, because it requests one token more than it scores."""
    plain = complete(client, "ab", logprobs=1, logit_bias={"0": 100}, max_tokens=1)["choices"][0]
    assert (plain["text"], plain["finish_reason"]) == ("", "stop")
    assert plain["logprobs"]["tokens"] == [END]
    logits = generator.token_logits(generator.prefill(["ab"]).logits).double().log_softmax(-1)
    assert plain["logprobs"]["token_logprobs"] == [pytest.approx(logits[0, 0].item(), abs=1e-4)]
    for bias in BIASES:
        echoed = complete(client, "ab", logprobs=1, logit_bias=bias, max_tokens=1, echo=True)["choices"][0]
        assert len(echoed["logprobs"]["tokens"]) == len(generator.tokenizer.encode("ab")) + 1


@pytest.mark.parametrize("token", range(4))
def test_ids_of_equal_text_keep_an_entry_each(token: int) -> None:
    words = {"<0x41>": 0, "A": 1, "<0xE2>": 2, "bytes:\\xe2": 3, "<unk>": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    for n in range(5):
        (score,) = score_tokens(torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]), [token], n)
        found = LogprobsFormat(Detokenizer(tokenizer), False, 0, None).entries([score])
        (top,), (word,) = found["top_logprobs"], found["tokens"]
        assert top[word] == score.logprob
        assert sorted(top.values()) == sorted({value for _, value in score.top} | {score.logprob})
        assert word == ("A", "A", "bytes:\\xe2", "bytes:\\xe2")[token]
    assert sum(key.startswith("token_id:") for key in top) == 2


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("decoder", [decoders.ByteLevel(), decoders.BPEDecoder()], ids=["bytes", "window"])
def test_the_end_token_is_behind_a_character_that_it_cuts(decoder: Any, echo: bool) -> None:
    names = {"bytes": ["a", "\u00f0", "\u0141"], "window": ["a", "\ufffd"]}
    words = [END, *names["bytes" if isinstance(decoder, decoders.ByteLevel) else "window"]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.decoder = decoder
    wrapped = TextTokenizer(tokenizer, END)
    parsed = RequestParser(wrapped, Settings(name="tiny")).parse(
        CompletionRequest(prompt=[0, 1], echo=echo, logprobs=0)
    )
    (sequence,) = parsed.response.sequences
    drawn = [1, *range(2, len(words)), wrapped.eos_id]
    text = parsed.prompts[0].echo + "".join(map(sequence.text.push, drawn)) + sequence.text.finish()
    assert text.endswith("a\ufffd")
    scored = [TokenScore(token, 0.0, ()) for token in (parsed.prompts[0].tokens if echo else []) + drawn]
    offsets = parsed.response._formats[0].entries(scored)["text_offset"]
    assert offsets[-1] == len(text)
    assert offsets[-2] == len(text) - 1


@pytest.mark.parametrize("n", [0, 1, 3])
def test_the_token_is_among_its_alternatives(client: httpx2.Client, n: int) -> None:
    more = {"logprobs": n, "temperature": 3, "seed": 1, "max_tokens": 40, "echo": True}
    scores = complete(client, MIXED, **more)["choices"][0]["logprobs"]
    assert scores["top_logprobs"][0] is None
    assert scores["token_logprobs"][0] is None
    others = 0
    for token, score, top in [*zip(*[scores[key] for key in [*scores][:3]], strict=True)][1:]:
        assert top[token] == score
        assert n <= len(top) <= n + 1
        others += len(top) == n + 1
    assert others > 0


def test_streamed_logprobs_equal_those_of_the_complete_response(client: httpx2.Client) -> None:
    more = {"logprobs": 2, "echo": True, "temperature": 2, "seed": 3, "max_tokens": 60}
    whole = complete(client, MIXED, **more)["choices"][0]
    body = {"prompt": MIXED, "stream": True, **more}
    lines = client.post("/v1/completions", json=body).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for key, values in whole["logprobs"].items():
        assert [value for choice in choices for value in choice["logprobs"][key]] == values


def test_stop_strings_end_the_text_before_the_tokens(client: httpx2.Client) -> None:
    text = complete(client, "the quick", max_tokens=60)["choices"][0]["text"]
    choice = complete(client, "the quick", max_tokens=60, logprobs=0, stop=text[20:24])["choices"][0]
    assert choice["text"] == text[: text.index(text[20:24])]
    for token, offset in zip(*[choice["logprobs"][key] for key in ("tokens", "text_offset")], strict=True):
        assert token.startswith("bytes:") or text[offset:].startswith(token)


def test_cached_tokens_are_at_most_those_of_the_prompt(generator: TextGenerator) -> None:
    with run_server(generator) as running, httpx2.Client(base_url=running.url) as client:
        usages = [complete(client, prompt, n=3)["usage"] for prompt in ([5, 6], [5, 6], [[5, 6], [5, 6]])]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached == [0, 2, 4]
    assert [usage["prompt_tokens"] for usage in usages] == [2, 2, 4]


def test_special_tokens_in_text_are_parsed_only_on_request(generator: TextGenerator) -> None:
    def ids(client: httpx2.Client, **more: Any) -> list[str]:
        scores = complete(client, f"{END}ab", echo=True, max_tokens=0, logprobs=0, **more)
        return scores["choices"][0]["logprobs"]["tokens"]

    for setting in (False, True):
        running = run_server(generator, parse_special=setting)
        with running as served, httpx2.Client(base_url=served.url) as client:
            assert (ids(client)[0] == END) is setting
            assert ids(client, parse_special=True)[0] == END
            assert ids(client, parse_special=False)[0] != END
            assert "".join(ids(client, parse_special=False)) == f"{END}ab"


@pytest.fixture(scope="module")
def gapped(generator: TextGenerator) -> TextGenerator:
    """Return a generator whose tokenizer lacks three ids of the model: two in a gap, and the last ones."""
    data = json.loads(generator.tokenizer.to_json())
    words = data["model"]["vocab"]
    moved = {word: index + (2 if index >= 290 else 0) for word, index in words.items() if index < 294}
    data["model"]["vocab"] = moved
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in data["model"]["merges"]]
    data["model"]["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= {*moved}]
    return TextGenerator(generator.model, TextTokenizer.from_json(json.dumps(data), END))


def test_ids_that_the_tokenizer_lacks_have_no_probability(gapped: TextGenerator) -> None:
    missing = gapped.tokenizer.missing_ids(300)
    assert {290, 291} < {*missing}
    assert gapped.tokenizer.size < 300
    known = [token for token in range(300) if token not in missing]
    ids = [5, 6, 7, 8]
    logits = torch.stack([gapped.prefill_tokens([ids[:end]]).logits[0] for end in range(1, 4)])
    expected = logits[:, known].double().log_softmax(-1)
    with run_server(gapped) as running, httpx2.Client(base_url=running.url) as client:
        scores = complete(client, ids, echo=True, max_tokens=0, logprobs=20)["choices"][0]["logprobs"]
        drawn = complete(client, ids, temperature=100, max_tokens=200, n=4, logprobs=0)
        for body in ({"prompt": [5, 290]}, {"prompt": "a", "logit_bias": {"291": 1}}):
            assert client.post("/v1/completions", json=body).status_code == 400
    for row, token, score in zip(expected, ids[1:], scores["token_logprobs"][1:], strict=True):
        assert score == pytest.approx(row[known.index(token)].item(), abs=1e-4)
    words = {gapped.tokenizer.tokenizer.id_to_token(token) for token in known}
    assert len(words) == len(known)
    assert all(choice["logprobs"]["tokens"] for choice in drawn["choices"])
    assert "" not in {token for choice in drawn["choices"] for token in choice["logprobs"]["tokens"]}


def test_generate_never_samples_ids_that_the_tokenizer_lacks(gapped: TextGenerator) -> None:
    logits = gapped.token_logits(torch.zeros(1, 300))
    drawn = {
        int(sample(logits, settings, torch.Generator().manual_seed(seed)))
        for settings in (
            SamplingParams(temperature=1),
            SamplingParams(temperature=100, top_p=0.999, top_k=280),
        )
        for seed in range(1000)
    }
    assert len(drawn) > 200
    assert not drawn.intersection(gapped.tokenizer.missing_ids(300))
