"""Tokenizers: lossless encoding, streaming byte by byte, and error messages for invalid tokenizers."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models

from tnnlm.errors import DataError
from tnnlm.tokenizer import TextTokenizer, load_tokenizer, train_bpe

EOS = "<|endoftext|>"
ASCII = ["def add(a, b):\n    return a + b\n", "hello world, hello text\n"] * 5
TEXTS = [
    "def add(a, b):",
    "".join(map(chr, range(256))),
    "naïve café, Ωμέγα, \ufffd",
    "漢字とかな, 한국어",
    "😀 👩‍👩‍👧‍👦 🇪🇺",
    "\x00\x7f \r\n\t  two  spaces ",
    f"before {EOS} after",
    "",
]


def bpe(vocab_size: int = 300) -> TextTokenizer:
    """Return a tokenizer trained on ASCII only, so that all other characters are unseen."""
    return train_bpe(ASCII, vocab_size, EOS, len(ASCII), progress=False)


def library_tokenizer() -> Tokenizer:
    """Return a tokenizer as another program would have saved it."""
    return Tokenizer.from_str(bpe().to_json())


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("vocab_size", [257, 300])
def test_decode_inverts_encode(text: str, vocab_size: int) -> None:
    tokenizer = bpe(vocab_size)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_byte_has_a_token() -> None:
    tokenizer = bpe(257)
    assert tokenizer.size == 257
    # Every byte that occurs in UTF-8, in a character with as few other bytes as possible.
    text = "".join(map(chr, [*range(0x250), 0x800, 0xFFFD, 0x10000, 0x10FFFF]))
    assert len(tokenizer.encode(text)) == len(text.encode())


def test_train_bpe_keeps_to_the_vocabulary_size() -> None:
    tokenizer = bpe(280)
    assert tokenizer.size <= 280
    assert max(max(tokenizer.encode(text), default=0) for text in TEXTS) < 280
    assert tokenizer.eos_id < 280


def test_train_bpe_is_deterministic() -> None:
    assert bpe().fingerprint == bpe().fingerprint
    assert bpe().fingerprint != bpe(280).fingerprint


def test_from_json_gives_equal_ids() -> None:
    tokenizer = bpe()
    again = TextTokenizer.from_json(tokenizer.to_json(), EOS)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_encode_batch_matches_encode() -> None:
    tokenizer = bpe()
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_encode_of_the_end_token_is_not_the_end() -> None:
    tokenizer = bpe()
    text = f"a{EOS}b{EOS}"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.eos_id not in tokenizer.encode_batch([text])[0]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_omits_the_end_token() -> None:
    tokenizer = bpe()
    assert tokenizer.decode([tokenizer.eos_id, *tokenizer.encode("a"), tokenizer.eos_id]) == "a"


@pytest.mark.parametrize("text", TEXTS)
def test_stream_joined_equals_decode(text: str) -> None:
    tokenizer = bpe()
    ids = tokenizer.encode(text)
    assert "".join(tokenizer.stream(iter(ids))) == tokenizer.decode(ids) == text


def test_stream_buffers_a_character_until_it_is_complete() -> None:
    tokenizer = bpe()
    ids = tokenizer.encode("a😀漢z")
    assert len(ids) == 1 + 4 + 3 + 1
    assert list(tokenizer.stream(ids)) == ["a", "😀", "漢", "z"]


def test_stream_yields_each_chunk_before_it_takes_the_next_token() -> None:
    tokenizer = bpe()
    taken = []

    def tokens() -> Any:
        for token in tokenizer.encode("a😀b"):
            taken.append(token)
            yield token

    assert [(piece, len(taken)) for piece in tokenizer.stream(tokens())] == [("a", 1), ("😀", 5), ("b", 6)]


def test_stream_shows_an_unfinished_character_as_decode_does() -> None:
    tokenizer = bpe()
    ids = tokenizer.encode("a😀")[:-1]
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids) == "a\ufffd"


def test_stream_joined_equals_decode_for_any_ids() -> None:
    # An untrained model generates bytes that are not UTF-8, and end tokens at any position.
    tokenizer = bpe()
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(tokenizer.size) for _ in range(draw.randrange(30))]
        assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


def test_missing_end_token_is_an_error_that_names_file_and_setting() -> None:
    with pytest.raises(DataError, match=r"mine\.json: has no token '<eos>'.*data\.eos_token"):
        TextTokenizer.from_json(bpe().to_json(), "<eos>", "mine.json")


def test_load_tokenizer_reads_a_file() -> None:
    Path("mine.json").write_text(bpe().to_json(), encoding="utf-8")
    assert load_tokenizer("mine.json", EOS).fingerprint == bpe().fingerprint


@pytest.mark.parametrize("name", ["missing.json", "no/such/folder/tokenizer", "."])
def test_load_tokenizer_reports_a_missing_file(name: str) -> None:
    with pytest.raises(DataError, match="no such tokenizer file") as caught:
        load_tokenizer(name, EOS)
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize(
    "data", [b"", b"not json", b"[]", b"{}", b'{"model": {}}', b"\xff\x00\xfe"], ids=lambda data: repr(data)
)
def test_load_tokenizer_reports_an_invalid_file(data: bytes) -> None:
    Path("bad.json").write_bytes(data)
    with pytest.raises(DataError, match=r"not a tokenizer\.json") as caught:
        load_tokenizer("bad.json", EOS)
    assert str(caught.value).startswith("bad.json: ")
    assert "\n" not in str(caught.value)


def test_load_tokenizer_reports_an_unknown_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise Exception(f"no {name}\nfor a long reason")

    monkeypatch.setattr("tnnlm.tokenizer.Tokenizer", SimpleNamespace(from_pretrained=fail))
    with pytest.raises(DataError, match=r"^nobody/nothing: no such file, and no hub tokenizer") as caught:
        load_tokenizer("nobody/nothing", EOS)
    assert "\n" not in str(caught.value)


def test_given_tokenizer_neither_truncates_nor_pads() -> None:
    # Many published files contain the truncation and padding of their model.
    given = library_tokenizer()
    given.enable_truncation(3)
    given.enable_padding(length=64)
    tokenizer = TextTokenizer.from_json(given.to_str(), EOS)
    texts = ["hello world, and far more than three tokens", "a"]
    assert tokenizer.encode(texts[0]) == bpe().encode(texts[0])
    assert tokenizer.encode_batch(texts) == bpe().encode_batch(texts)


def test_size_is_above_every_id() -> None:
    # Published vocabularies have gaps, and the embedding needs a row for the highest id.
    given = Tokenizer(models.WordLevel({"a": 0, "<eos>": 50}, unk_token="a"))
    assert TextTokenizer(given, "<eos>").size > 50


def test_given_end_token_that_is_not_special_does_not_end_a_document() -> None:
    given = library_tokenizer()
    given.add_tokens([AddedToken("<end>", special=False)])
    tokenizer = TextTokenizer(given, "<end>")
    assert tokenizer.eos_id not in tokenizer.encode("a<end>b")
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos_id]) == "a"
