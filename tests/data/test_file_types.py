"""Files of every type and compression, separators between documents, and files to validate on."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from tests.support.text_files import documents, error_of, jsonl, parquet, read, write
from tnnlm.config.loader import Base, load_config
from tnnlm.config.schema import DataConfig
from tnnlm.data import plain_text, stored_texts, tables
from tnnlm.data.files import unescaped
from tnnlm.data.plain_text import split_documents
from tnnlm.data.sources import load_corpus
from tnnlm.errors import ConfigError

TEXTS = documents(30)


def zstd(data: bytes) -> bytes:
    """Return compressed data in two frames, as parallel programs write it."""
    half = len(data) // 2
    codec = pyarrow.Codec("zstd")
    return b"".join(codec.compress(part, asbytes=True) for part in (data[:half], data[half:]))


def comma_separated(texts: list[str]) -> str:
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    return "id,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(quoted))


KINDS: dict[str, Callable[[list[str]], str | bytes]] = {
    "a.jsonl": jsonl,
    "a.parquet": parquet,
    "a.csv": comma_separated,
    "array.json": lambda texts: json.dumps(
        [{"id": i, "text": text} for i, text in enumerate(texts)], indent=1
    ),
    "lines.json": jsonl,
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_tables_have_the_same_documents(name: str, compression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_BLOCK", 7)  # Every item of an array is incomplete at first.
    content = KINDS[name](TEXTS)
    data = content.encode() if isinstance(content, str) else content
    packed = {"": lambda x: x, ".gz": gzip.compress, ".zst": zstd}[compression](data)
    train, val = read(write(name + compression, packed))
    assert sorted(train + val) == sorted(TEXTS)
    assert read(write("plain.jsonl", jsonl(TEXTS))) == (train, val)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,body\n1,x\n", "has no column 'text', only id, body"),
        ("a.csv", "id,text\n1,x,y\n", "line 2 has 3 cells instead of 2"),
        ("a.csv", 'id,text\n1,"x\n', "line 2: unexpected end of data"),
        ("a.csv", "text,text\n1,x\n", "has 2 columns 'text'"),
        ("a.csv", b"id,text\n1,\xff\n", "is not UTF-8 text"),
        ("a.csv", "", "contains no text"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', "item 2 is not JSON"),
        ("a.json", '[{"text": "a"}, {"text": "b"', "item 2 is not JSON, or the file is truncated"),
        (
            "a.json",
            '[{"text": "a" "b"}, ' + "{}, " * 9 + "{}]",
            "(Expecting ',' delimiter at character 14 of it)",
        ),
        ("a.json", '[{"text": "a"}, 3]', "item 2 is not a JSON object"),
        ("a.json", '[{"text": 3}]', "column 'text' is not text but int"),
        ("a.json", "[]", "contains no text"),
        ("a.json", '[{"text": "a"}] x', "has text after the end of the array"),
        ("a.json", '{"text": "a",\n "id": 3}', "line 1 is not JSON"),
        ("a.txt", "text".encode("utf-16"), "is UTF-16 text, not UTF-8; convert it: iconv"),
        ("a.csv.gz", gzip.compress("id,text\n1,x".encode("utf-16")), "is UTF-16 text"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "is UTF-16 text"),
        ("a.txt.zst", b"no such thing", "is not a Zstandard file, or truncated"),
        ("a.txt.zst", zstd(b"text " * 1000)[:-3], "is not a Zstandard file, or truncated"),
    ],
)
def test_damaged_tables_are_refused(name: str, content: str | bytes, message: str) -> None:
    assert message in error_of(write(name, content))


def test_large_text_files_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(random.Random(0).choices(["é", "漢", "\r\n", "\r", "\ufeff", "a", " b", "\n"], k=999))
    expected = text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")
    whole = read(write("a.txt", text), val_fraction=0.3)
    for size in (2, 3, 5):
        monkeypatch.setattr(stored_texts, "PIECE", size)
        monkeypatch.setattr(plain_text, "PIECE", size)
        found = load_corpus(
            DataConfig(source="files", files=["a.txt"], val_fraction=0.3), size, Path("scratch")
        )
        assert (list(found.train), list(found.val)) == whole
        assert whole[0][0] + whole[1][0] == expected
        assert found.report.normalized == {
            "carriage returns": text.count("\r"),
            "byte order marks": text.count("\ufeff"),
        }
        assert "byte 4" in error_of(write("bad.txt", b"a\xc3\xa9b\xff"))
        assert "zero byte at 4" in error_of(write("zero.txt", b"a\xc3\xa9b\0"))


@pytest.mark.parametrize("separator", ["---", "\n\n", "x"])
def test_separators_cut_a_text_into_documents(separator: str) -> None:
    text = separator.join(["", "ab", "c-", "-", "\n", "de"]) + separator
    for size in range(1, 9):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        found = ["".join(document) for document in split_documents(pieces, separator)]
        assert found == text.split(separator)


def test_documents_of_one_file_are_split_like_those_of_many() -> None:
    for i, text in enumerate(TEXTS):
        write(f"many/{i:02}.txt", text)
    one = write("one.txt", "\r\n%%\r\n".join(TEXTS) + "\r\n%%\r\n")
    assert read(one, document_separator=r"\n%%\n") == read("many/*.txt")
    assert unescaped(r"\n\t") == "\n\t"


def test_validation_files_are_the_validation_split() -> None:
    train, val = write("train.jsonl", jsonl(TEXTS[:20])), [write("val.csv", comma_separated(TEXTS[19:]))]
    assert read(train, validation=val) == (TEXTS[:20], TEXTS[19:])
    report = load_corpus(DataConfig(source="files", files=[train], validation=val), 0, Path("scratch")).report
    assert (report.files, report.documents, report.shared, report.duplicates) == (2, 31, 1, 1)
    assert "no such file" in error_of(train, validation=["none.txt"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["data.validation=b.txt", "data.val_fraction=0.1"],
            "data.val_fraction: is not used with data.valid",
        ),
        (
            ["data.source=hub", "data.hub_name=x", "data.hub_val_split=y", "data.validation=b.txt"],
            "data.hub_val_split: is not used with data.validation",
        ),
        (["data.tokenizer=x", "data.tokenizer_sample=5000"], "data.tokenizer_sample: is not used with"),
    ],
)
def test_settings_that_another_one_replaces_are_refused(words: list[str], message: str) -> None:
    files: list[Any] = [] if "data.source=hub" in words else ["data.files=a.txt"]
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*files, *words])


def test_a_later_layer_may_replace_a_setting() -> None:
    Path("c.yaml").write_text("data: {files: a.txt, val_fraction: 0.1}")
    assert load_config("c.yaml", ["data.validation=b.txt"]).data.validation == ["b.txt"]
    Path("c.yaml").write_text("data: {files: a.txt, validation: b.txt}")
    with pytest.raises(ConfigError, match="val_fraction: is not used with"):
        load_config("c.yaml", ["data.val_fraction=0.1"])
    # The file describes other data, but its tokenizer is used.
    Path("c.yaml").write_text("data: {hub_name: x, hub_val_split: y, tokenizer: t.json}")
    assert load_config("c.yaml", ["data.files=a.txt", "data.val_fraction=0.1"]).data.val_fraction == 0.1
    with pytest.raises(ConfigError, match=r"tokenizer_sample: is not used with data\.tokenizer \(comm"):
        load_config("c.yaml", ["data.files=a.txt", "data.tokenizer_sample=5000"])


@pytest.mark.parametrize("over_file", [False, True])
def test_the_tokenizer_of_weights_leaves_nothing_to_sample(over_file: bool) -> None:
    Path("c.yaml").write_text("data: {tokenizer_sample: 5000}")
    base = Base({"data": {"tokenizer": "t.json"}}, "runs/a", over_file)
    words = ["init.weights=runs/a", "data.files=a.txt"]
    with pytest.raises(ConfigError, match=r"tokenizer_sample: is not used .* which init.weights sets"):
        load_config(None, [*words, "data.tokenizer_sample=6000"], base=base)
    if over_file:  # weights override a file that the user did not name
        assert load_config("c.yaml", words, base=base).data.tokenizer == "t.json"
