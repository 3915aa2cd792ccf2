"""Error messages for files that are missing, damaged or of an unknown type."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from tests.support.text_files import LINES, documents, error_of, jsonl, parquet, read, write


def test_text_column_is_refused_without_a_table() -> None:
    message = error_of(write("a.txt", LINES), text_column="body")
    assert message.startswith("data.text_column=body: text files have no columns; omit it")
    write("b.jsonl", jsonl(documents(12), "body"))
    train, val = read("a.txt", "b.jsonl", text_column="body")
    assert len(train + val) == 13


@pytest.mark.parametrize("name", ["missing.txt", "no/such/folder/*.txt"])
def test_missing_file_is_reported(name: str) -> None:
    assert error_of(name) == f"{name}: no such file"


def test_dangling_link_is_reported() -> None:
    Path("link.txt").symlink_to("nowhere.txt")
    assert error_of("link.txt").startswith("link.txt: ")


def test_folder_is_reported_with_the_pattern_to_write() -> None:
    write("books/a.txt", LINES)
    message = error_of("books")
    assert message.startswith("books: is a folder")
    assert "books/**/*.txt" in message


@pytest.mark.parametrize("name", ["a.tsv", "a", "a.gz", "a.zip", "a.tsv.gz"])
def test_unknown_type_is_reported_with_the_known_ones(name: str) -> None:
    message = error_of(write(name, LINES))
    assert message.startswith(f"{name}: unknown file type; use .txt")


def test_no_files_at_all_names_the_setting() -> None:
    assert "data.files" in error_of()


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("empty.txt", b"", "contains no text (it is empty)"),
        ("blank.txt", b" \n\n", "contains no text (1 blank document)"),
        ("empty.txt.gz", gzip.compress(b""), "contains no text"),
        ("blank.jsonl", b'{"text": ""}\n', "contains no text (1 blank row)"),
        ("void.jsonl", b"\n\n", "contains no text (no rows)"),
        ("zero.txt", b"text\0text", "is not text"),
        ("zero.py", b"text\0text", "is not text"),
        ("utf16.txt", LINES.encode("utf-16"), "is UTF-16 text, not UTF-8"),
        ("latin.txt", LINES.encode() + b"\xe9\n", "is not UTF-8"),
        ("latin.md.gz", gzip.compress(b"caf\xe9\n"), "is not UTF-8"),
        ("cut.txt.gz", gzip.compress(LINES.encode())[:-12], "is not a gzip file, or truncated"),
        ("plain.txt.gz", LINES.encode(), "is not a gzip file, or truncated"),
        ("cut.jsonl", jsonl(documents(3)).encode() + b'{"text": "ab', "can't be read"),
        ("cut.jsonl.gz", gzip.compress(jsonl(documents(3)).encode())[:-12], "can't be read"),
        ("binary.jsonl", b"\0\1\2\xff" * 9, "can't be read"),
        ("numbers.jsonl", b'{"text": 5}\n', "column 'text' is not text"),
        ("cut.parquet", parquet(documents(3))[:-9], "can't be read"),
        ("empty.parquet", b"", "can't be read"),
        ("plain.parquet", LINES.encode(), "can't be read"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_damaged_file_is_reported_with_the_reason(name: str, data: bytes, reason: str) -> None:
    message = error_of(write(name, data))
    assert message.startswith(f"{name}: ")
    assert reason in message


@pytest.mark.parametrize(
    ("name", "data"),
    [
        # After the gzip header of ten bytes, a block type follows that deflate does not define.
        ("garbled.txt.gz", gzip.compress(LINES.encode())[:10] + b"\xff" * 50),
        ("empty.jsonl", b""),
        ("plain.jsonl.gz", jsonl(documents(3)).encode()),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_file_is_reported(name: str, data: bytes) -> None:
    assert error_of(write(name, data)).startswith(f"{name}: ")


def test_one_damaged_file_of_many_is_reported() -> None:
    write("good.txt", LINES)
    write("worse.txt", b"a\0b")
    assert error_of("*.txt").startswith("worse.txt: ")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_missing_column_is_reported_with_the_existing_ones(suffix: str) -> None:
    make: Any = jsonl if suffix == ".jsonl" else parquet
    message = error_of(write(f"a{suffix}", make(documents(3), "body")))
    assert message.startswith(f"a{suffix}: has no column 'text', only body")
    assert "data.text_column" in message
