"""Documents from text files and tables, and the fingerprint of their sources."""

from __future__ import annotations

import gzip
import os
import shutil
from typing import Any

import pytest

from tests.support.text_files import LINES, documents, jsonl, parquet, read, write
from tnnlm.config.schema import DataConfig
from tnnlm.data.files import source_files
from tnnlm.data.sources import FEW_DOCUMENTS, source_fingerprint


def test_stdlib_has_enough_text_and_no_tests() -> None:
    files = source_files(DataConfig(source="stdlib"))
    assert sum(path.stat().st_size for path in files) > 5_000_000
    assert {"argparse.py", "dataclasses.py"} <= {path.name for path in files}
    folders = {folder for path in files for folder in path.parts[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert files == sorted(files)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ".txt.gz", ".py.gz", ".md.gz"])
def test_text_file_is_one_document(suffix: str) -> None:
    data = LINES.encode()
    name = write(f"a{suffix}", gzip.compress(data) if suffix.endswith(".gz") else data)
    train, val = read(name)
    assert "".join(train + val) == LINES


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".jsonl.gz", ".parquet.gz"])
def test_table_row_is_one_document(suffix: str) -> None:
    texts = documents(12)
    data = jsonl(texts).encode() if "jsonl" in suffix else parquet(texts)
    name = write(f"a{suffix}", gzip.compress(data) if suffix.endswith(".gz") else data)
    train, val = read(name)
    assert sorted(train + val) == sorted(texts)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_text_column_is_read(suffix: str) -> None:
    texts = documents(12)
    make: Any = jsonl if suffix == ".jsonl" else parquet
    train, val = read(write(f"a{suffix}", make(texts, "body")), text_column="body")
    assert sorted(train + val) == sorted(texts)


@pytest.mark.parametrize("n", [12, 14], ids=["same size", "another size"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz", "corpus/train.jsonl"])
def test_table_that_changed_is_read_again(name: str, n: int) -> None:
    # The datasets library caches tables by path and modification time.
    def write_rows(texts: list[str]) -> None:
        data = parquet(texts) if "parquet" in name else jsonl(texts).encode()
        write(name, gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
        os.utime(name, (1, 1))

    hub = {"source": "hub", "hub_name": "corpus"} if "/" in name else {}
    write_rows(documents(12))
    before = read(name, **hub)
    shutil.rmtree("scratch", ignore_errors=True)
    texts = [text.upper() for text in documents(n)]
    write_rows(texts)
    train, val = read(name, **hub)
    assert sorted(train + val) == sorted(texts)
    assert before != (train, val)


def test_byte_order_mark_is_removed() -> None:
    train, _ = read(write("a.txt", b"\xef\xbb\xbf" + LINES.encode()))
    assert train[0].startswith("line 0")


def test_python_source_in_another_encoding_is_read() -> None:
    train, _ = read(write("a.py", "# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1") * 9))
    assert "é" in train[0]


def test_blank_documents_are_skipped() -> None:
    texts = documents(12)
    train, val = read(write("a.jsonl", jsonl(["", *texts, " \n"])))
    assert sorted(train + val) == sorted(texts)


def test_globs_match_and_each_file_is_read_once() -> None:
    write("top.txt", "top")
    write("a/one.txt", "one")
    write("a/b/two.txt", "two")
    write("a/b/three.md", "three")

    def names(*patterns: str) -> list[str]:
        return [path.name for path in source_files(DataConfig(source="files", files=list(patterns)))]

    assert names("*.txt") == ["top.txt"]
    assert names("a/**/*.txt") == ["two.txt", "one.txt"]
    assert names("**/*.txt", "a/*.txt", "top.txt") == ["two.txt", "one.txt", "top.txt"]
    # A pattern may match folders, but only files count.
    assert names("a/b/**") == ["three.md", "two.txt"]


@pytest.mark.parametrize("name", ["notes [1].txt", "notes [1].jsonl", "what?.txt"])
def test_file_name_that_looks_like_a_pattern_is_read(name: str) -> None:
    write(name, jsonl(documents(12)))
    train, val = read(name)
    assert train
    assert val


@pytest.mark.parametrize("limit", [2, 15])
def test_max_documents_is_honoured(limit: int) -> None:
    texts = documents(40)
    train, val = read(write("a.jsonl", jsonl(["", *texts])), max_documents=limit, val_fraction=0.3)
    if limit < FEW_DOCUMENTS:
        assert [a + b for a, b in zip(train, val, strict=True)] == texts[:limit]
    else:
        assert sorted(train + val) == sorted(texts[:limit])


def test_max_documents_reads_no_further_file() -> None:
    for i in range(3):
        write(f"{i}.txt", LINES)
    write("9.txt", b"\0")
    train, _ = read("*.txt", max_documents=3)
    assert len(train) == 3


def test_source_fingerprint_changes_with_the_files() -> None:
    config = DataConfig(source="files", files=["*.txt"])
    write("a.txt", LINES)
    seen = {source_fingerprint(config)}
    write("b.txt", LINES)
    seen.add(source_fingerprint(config))
    write("b.txt", LINES + "more")
    os.utime("b.txt", (1, 1))
    seen.add(source_fingerprint(config))
    write("b.txt", LINES + "MORE")
    os.utime("b.txt", (1, 1))
    seen.add(source_fingerprint(config))
    os.utime("b.txt", (2, 2))
    assert source_fingerprint(config) in seen
    assert len(seen) == 4
