"""Detokenization of every kind of decoder: token by token as all at once, and in linear time."""

from __future__ import annotations

import pickle
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models

from tnnlm.detokenizer import CONTEXT, HELD, Detokenizer, TextStream
from tnnlm.tokenizer import TextTokenizer, train_bpe

EOS = "<|endoftext|>"
LETTERS = [chr(code) for code in range(97, 123)]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MARKED = ["\u2581", "\u2581the", "\u2581a", "cat", "s", "\u2581\u2581", "é", "\ufffd", ".", "n't"]
SUFFIXED = ["the</w>", "ca", "t</w>", "s</w>", ".</w>", "a</w>"]
PIECES = ["the", "##s", "cat", ".", "##ing", "'", "don"]


def tokenizer_with(decoder: Any, words: list[str]) -> TextTokenizer:
    """Return a tokenizer of these tokens and the end token with a decoder."""
    tokens = [EOS, *dict.fromkeys([*words, "a"])]
    vocabulary = {word: i for i, word in enumerate(tokens)}
    suffix = {"end_of_word_suffix": "</w>"} if "a</w>" in words else {}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [], **suffix) if suffix else models.WordLevel(vocabulary, unk_token="a")
    )
    if decoder is not None:
        tokenizer.decoder = decoder
    return TextTokenizer(tokenizer, EOS)


def llama(strip: bool = True) -> TextTokenizer:
    """Return a tokenizer with the decoder of Llama 2, or of Gemma, which keeps a leading space."""
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    return tokenizer_with(
        decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps), MARKED + BYTES
    )


DECODERS = {
    "byte-level": lambda: train_bpe(["the cat sat; the cats"] * 3, 300, EOS, 3, False),
    "llama": llama,
    "gemma": lambda: llama(strip=False),
    "metaspace": lambda: tokenizer_with(decoders.Metaspace(), MARKED),
    "metaspace-never": lambda: tokenizer_with(decoders.Metaspace(prepend_scheme="never"), MARKED),
    "none": lambda: tokenizer_with(None, LETTERS),
    "word-piece": lambda: tokenizer_with(decoders.WordPiece(), PIECES),
    "suffix": lambda: tokenizer_with(decoders.BPEDecoder(), SUFFIXED),
    "regex": lambda: tokenizer_with(decoders.Replace(Regex("_+"), " "), ["_a", "b__", "c"]),
}


@pytest.fixture(scope="module", params=DECODERS)
def tokenizer(request: pytest.FixtureRequest) -> TextTokenizer:
    return DECODERS[request.param]()


def streamed(tokenizer: TextTokenizer, ids: list[int], started: bool = False) -> str:
    return "".join(tokenizer.stream(ids, started))


def test_stream_equals_the_decoder_of_the_library(tokenizer: TextTokenizer) -> None:
    draw = random.Random(0)
    # Runs of byte tokens that are no UTF-8 differ from the library: see the test below.
    names = {i: tokenizer.tokenizer.id_to_token(i) for i in range(tokenizer.size)}
    ordinary = [i for i, name in names.items() if name not in BYTES]
    for _ in range(200):
        ids = [draw.choice(ordinary) for _ in range(draw.randrange(60))]
        expected = tokenizer.tokenizer.decode(ids)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids) == expected


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 300), max_size=40))
def test_byte_level_text_is_that_of_the_library(ids: list[int]) -> None:
    tokenizer = DECODERS["byte-level"]()
    ids = [token for token in ids if token < tokenizer.size]
    assert streamed(tokenizer, ids) == tokenizer.decode(ids) == tokenizer.tokenizer.decode(ids)


def test_valid_byte_fallback_is_that_of_the_library() -> None:
    tokenizer = llama()
    spelt = [tokenizer.id_of(f"<0x{byte:02X}>") for byte in " naïve 😀 é中".encode()]
    ids = [tokenizer.id_of("\u2581the"), *spelt, tokenizer.id_of("cat")]
    assert streamed(tokenizer, ids) == tokenizer.decode(ids) == tokenizer.tokenizer.decode(ids)


def test_invalid_byte_fallback_keeps_the_valid_characters() -> None:
    # The library replaces the whole run of byte tokens, also a character that was already shown.
    tokenizer = llama()
    spelt = [tokenizer.id_of(f"<0x{byte:02X}>") for byte in "€".encode() + b"\xff"]
    ids = [tokenizer.id_of("\u2581the"), *spelt, tokenizer.id_of("cat")]
    assert streamed(tokenizer, ids) == tokenizer.decode(ids) == "the€\ufffdcat"


@pytest.mark.parametrize("name", ["llama", "metaspace", "word-piece", "none", "suffix"])
def test_a_text_that_has_started_keeps_its_space(name: str) -> None:
    tokenizer = DECODERS[name]()
    words = {"word-piece": ["the", "cat"], "none": ["b", "c"], "suffix": ["the</w>", "s</w>"]}
    first, second = (tokenizer.id_of(word) for word in words.get(name, ["\u2581the", "\u2581a"]))
    whole = tokenizer.decode([first, second])
    assert " " in whole
    assert tokenizer.decode([first]) + tokenizer.decode([second], started=True) == whole
    assert tokenizer.decode([first]) + streamed(tokenizer, [second], started=True) == whole


def test_stream_equals_decode_at_any_split(tokenizer: TextTokenizer) -> None:
    draw = random.Random(1)
    for _ in range(100):
        ids = [draw.randrange(tokenizer.size) for _ in range(draw.randrange(1, 40))]
        stream, whole = TextStream(tokenizer.detokenizer), streamed(tokenizer, ids)
        cut = draw.randrange(len(ids))
        before = "".join(stream.push(token) for token in ids[:cut])
        forks = [stream.fork(), stream.fork()]
        for other in forks:
            assert before + "".join(map(other.push, ids[cut:])) + other.finish() == whole


def test_offsets_are_those_of_the_character_with_the_first_byte() -> None:
    tokenizer = DECODERS["byte-level"]()
    byte = {tokenizer.detokenizer.token_bytes(i): i for i in reversed(range(tokenizer.size))}
    stream = TextStream(tokenizer.detokenizer)

    def starts(data: bytes) -> list[int]:
        found = []
        for value in data:
            stream.push(byte[bytes([value])])
            found.append(stream.start)
        return found

    assert starts("a😀é".encode()) == [0, 1, 1, 1, 1, 2, 2]
    assert starts(b"b\xf0\x9fc\xffd\xe2\xe2\x82\xacz") == [3, 4, 4, 5, 6, 7, 8, 9, 9, 9, 10]


def test_special_tokens_are_shown_on_request() -> None:
    tokenizer = llama()
    stream = TextStream(tokenizer.detokenizer)
    the = tokenizer.id_of("\u2581the")
    assert [stream.push(tokenizer.eos_id, show_special=True), stream.push(the)] == [EOS, "the"]
    assert [stream.push(tokenizer.eos_id), stream.push(the), stream.start] == ["", " the", len(EOS) + 3]


def test_a_shown_special_token_is_behind_the_tokens_that_are_held() -> None:
    tokenizer = tokenizer_with(decoders.Replace(Regex("_+"), " "), ["\ufffd", "b", "c"])
    ids = [tokenizer.id_of(name) for name in ("b", "\ufffd", EOS, "c")]
    stream = TextStream(tokenizer.detokenizer)
    text = "".join(stream.push(token, show_special=True) for token in ids[:3])
    assert stream.start == len(text) - len(EOS)
    text += stream.push(ids[3]) + stream.finish()
    assert text.replace(" ", "") == f"b\ufffd{EOS}c"


def test_a_tokenizer_can_be_pickled(tokenizer: TextTokenizer) -> None:
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.decode([*range(9)]) == tokenizer.decode([*range(9)])


class Counted:
    """Tokenizer that counts the tokens that its decoder reads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.inner, self.read, self.longest = tokenizer, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def decode(self, ids: list[int], **options: Any) -> str:
        self.read += len(ids)
        self.longest = max(self.longest, len(ids))
        return str(self.inner.decode(ids, **options))

    def id_to_token(self, token: int) -> Any:
        self.read += 1
        return self.inner.id_to_token(token)


@pytest.mark.parametrize("kind", ["ordinary", "continuation bytes", "replacement characters", "end tokens"])
def test_time_is_linear_for_any_tokens(tokenizer: TextTokenizer, kind: str) -> None:
    """The decoder reads a bounded number of tokens per token, and the stream holds a bounded number."""
    names = {i: tokenizer.tokenizer.id_to_token(i) for i in range(tokenizer.size)}
    wanted = {
        "ordinary": [*names],
        "continuation bytes": [i for i, name in names.items() if name in ("<0x80>", "Ģ")],
        "replacement characters": [i for i, name in names.items() if name in ("\ufffd", "<0xFF>", "ÿ")],
        "end tokens": [tokenizer.eos_id],
    }[kind]
    if not wanted:
        pytest.skip("the tokenizer has no such token")
    for length in (200, 400):
        counted = Counted(tokenizer.tokenizer)
        stream = TextStream(Detokenizer(counted))  # type: ignore[arg-type]
        for i in range(length):
            stream.push(wanted[i % len(wanted)])
            assert len(stream._window) <= 2 * CONTEXT + HELD
            assert len(stream._utf8.getstate()[0]) < HELD
        stream.finish()
        assert counted.read <= (2 * CONTEXT + 3) * (length + 3)
        assert counted.longest <= 2 * CONTEXT + HELD
