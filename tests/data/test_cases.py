"""Inputs that public bug reports of other tools describe, and what is read of them."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.support.scripts import ROOT
from tnnlm.config.schema import DataConfig
from tnnlm.data.packing import PackedCorpus, prepare
from tnnlm.data.report import DataReport
from tnnlm.data.sources import Corpus, load_corpus
from tnnlm.errors import DataError

CASES = ROOT / "tests/cases"


def read(*names: str, **changes: Any) -> Corpus:
    """Return the documents of files in this folder, or of ``tests/cases``."""
    files = [name if Path(name).exists() or "*" in name else str(CASES / name) for name in names]
    return load_corpus(DataConfig(source="files", files=files, **changes), 0, Path("scratch"))


def documents(corpus: Corpus) -> list[str]:
    return [*corpus.train, *corpus.val]


def first_line(corpus: Corpus) -> str:
    return next(corpus.report.lines())


def write_parquet(name: str, texts: list[Any]) -> str:
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}), name)
    return name


def test_rows_that_look_like_dates_are_text() -> None:
    expected = [json.loads(line)["text"] for line in (CASES / "dates.jsonl").read_text().splitlines()]
    assert sorted(documents(read("dates.jsonl"))) == sorted(expected)


@pytest.mark.parametrize("value", ["2024-01-01T10:00:00Z", "2024-01-01 10:00", "12:30", "1e3", "NaN", "true"])
def test_strings_of_a_table_are_never_converted(value: str) -> None:
    Path("a.jsonl").write_text("".join(json.dumps({"text": f"{value}{end}"}) + "\n" for end in ("", " ")))
    corpus = read("a.jsonl", val_fraction=0.5)
    assert [a + b for a, b in zip(corpus.train, corpus.val, strict=True)] == [value, f"{value} "]


@pytest.mark.parametrize("name", ["empty.jsonl", "rows.parquet", "blank.txt", "void.txt", "void.jsonl.gz"])
def test_file_without_text_is_named_beside_others_and_refused_alone(name: str) -> None:
    shutil.copy(CASES / "empty.jsonl", "empty.jsonl")
    write_parquet("rows.parquet", [])
    Path("blank.txt").write_text(" \n")
    Path("void.txt").write_text("")
    Path("void.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match=rf"^{name}: contains no text"):
        read(name)
    corpus = read(name, "crlf.txt")
    assert corpus.report.without_text == [name]
    assert corpus.report.files == 2
    assert f"warning: {name}: contains no text, skipped" in list(corpus.report.lines())
    assert documents(corpus) == documents(read("crlf.txt"))


def test_line_ends_are_normalized_and_counted() -> None:
    raw = (CASES / "crlf.txt").read_bytes().decode()
    corpus = read("crlf.txt")
    assert "".join(documents(corpus)) == raw.replace("\r\n", "\n")
    assert corpus.report.normalized == {"carriage returns": 59}
    assert "normalized 59 carriage returns" in first_line(corpus)
    kept = read("crlf.txt", normalize_text=False)
    assert "".join(documents(kept)) == raw
    assert kept.report.normalized == {}


def test_lone_carriage_returns_are_line_ends() -> None:
    Path("a.txt").write_bytes(b"one\rtwo\r\nthree\r\r\n" * 9)
    corpus = read("a.txt")
    assert "".join(documents(corpus)) == "one\ntwo\nthree\n\n" * 9
    assert corpus.report.normalized == {"carriage returns": 36}


def test_byte_order_marks_are_removed_and_counted() -> None:
    raw = (CASES / "two_byte_order_marks.txt").read_bytes().decode()
    corpus = read("two_byte_order_marks.txt")
    assert "".join(documents(corpus)) == raw.replace("\ufeff", "")
    assert corpus.report.normalized == {"byte order marks": 2}
    kept = read("two_byte_order_marks.txt", normalize_text=False)
    assert "".join(documents(kept)) == raw[1:]
    assert kept.report.normalized == {"byte order marks": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "corpus/train.jsonl"])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_tables_are_normalized_and_counted_too(name: str, streaming: bool) -> None:
    texts = [f"\ufeffrow {i}\r\nends\r\n" for i in range(12)]
    Path("corpus").mkdir()
    if name.endswith("jsonl"):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in [*texts, None, " \r\n"])
        Path(name).write_text(rows)
    else:
        write_parquet(name, [*texts, None, " \r\n"])
    if name.startswith("corpus"):
        words: Any = {"streaming": streaming, "max_documents": 99 if streaming else None}
        corpus = load_corpus(DataConfig(source="hub", hub_name="corpus", **words), 0, Path("."))
    else:
        corpus = read(name)
    assert sorted(documents(corpus)) == sorted(f"row {i}\nends\n" for i in range(12))
    assert corpus.report.normalized == {"carriage returns": 24, "byte order marks": 12}
    assert corpus.report.dropped == {"null": 1, "blank": 1}
    assert corpus.report.documents == 12


def test_null_rows_are_dropped_and_counted() -> None:
    corpus = read("null_rows.jsonl")
    rows = [json.loads(line) for line in (CASES / "null_rows.jsonl").read_text().splitlines()]
    texts = [row["text"] for row in rows if row["text"] is not None]
    assert sorted(documents(corpus)) == sorted(texts)
    assert corpus.report.dropped == {"null": len(rows) - len(texts)}
    assert f"dropped {len(rows) - len(texts)} null" in first_line(corpus)


def test_rows_without_the_column_are_dropped_and_counted() -> None:
    Path("a.jsonl").write_text('{"other": 1}\n' + '{"text": "some words"}\n\n' * 2)
    assert read("a.jsonl").report.dropped == {"null": 1}
    Path("a.jsonl").write_text('{"other": 1}\n{"third": 1}\n')
    with pytest.raises(DataError, match="has no column 'text', only other, third"):
        read("a.jsonl")
    Path("a.jsonl").write_text('{"text": null}\n' * 3)
    with pytest.raises(DataError, match=r"contains no text \(3 null rows\)"):
        read("a.jsonl")


def test_rows_that_are_all_equal_are_refused() -> None:
    for fraction in (0.02, 0.1, 0.5):
        with pytest.raises(DataError, match="all 100 documents are equal; remove the copies"):
            read("equal_rows.jsonl", val_fraction=fraction)


@pytest.mark.parametrize("copies", [2, 5, 20, 60])
@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.3])
def test_copies_do_not_hold_out_far_more_than_the_fraction(copies: int, fraction: float) -> None:
    texts = [f"template {i % 7}" for i in range(7 * copies)] + [f"document {i:03}" for i in range(200)]
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for seed in range(4):
        config = DataConfig(source="files", files=["a.jsonl"], val_fraction=fraction)
        corpus = load_corpus(config, seed, Path("."))
        held_out = sum(map(len, corpus.val)) / sum(map(len, texts))
        assert 0 < held_out <= 1.25 * fraction + 1.2 / len(texts)
        assert not set(corpus.train) & set(corpus.val)
        assert corpus.report.duplicates == 7 * (copies - 1)


def test_copies_that_are_all_too_frequent_are_refused() -> None:
    Path("a.jsonl").write_text("".join(json.dumps({"text": f"row {i % 3}"}) + "\n" for i in range(60)))
    with pytest.raises(DataError, match="the 60 documents are copies of 3, each too frequent to hold out"):
        read("a.jsonl")


@pytest.mark.parametrize(
    "name",
    ["number #2.txt", "[x].txt", "${h}.txt", "a: b.txt", "*.txt", "~x.txt", "a::b.jsonl", "[1] #2.jsonl"],
)
def test_file_name_of_any_characters_is_read(name: str) -> None:
    rows = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(12))
    Path(name).write_text(rows)
    assert len(documents(load_corpus(DataConfig(source="files", files=[name]), 0, Path(".")))) in (2, 12)


def test_file_of_the_cases_with_a_number_sign_is_read() -> None:
    assert "".join(documents(read("number #2.txt"))) == (CASES / "number #2.txt").read_text()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": "ab', "line 2 is not JSON"),
        (b'["text"]', "line 2 is not a JSON object; write one object per line"),
        (b'{"text": "caf\xe9"}', "line 2 is not UTF-8 text (byte 13 of the line)"),
        (b'{"text": "\\ud83d"}', "line 2 has half of a surrogate pair"),
        (b'{"text": ' + b"[" * 100_000, "line 2 is not JSON"),
        (b'{"text": ' + b"9" * 5_000 + b"}", "line 2 is not JSON"),
        (b'{"text": 5}', "line 2: column 'text' is not text but int"),
        (b'{"text": "a", "n": 1, "text": "b"}', "line 2 has the key 'text' 2 times; keep one of them"),
    ],
)
def test_damaged_row_is_named_by_its_line(line: bytes, told: str) -> None:
    Path("a.jsonl").write_bytes(b'{"text": "good \\ud83d\\ude00"}\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        read("a.jsonl")
    assert str(caught.value).startswith("a.jsonl: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_of_any_size_and_doubled_keys_of_other_columns_are_no_text() -> None:
    numbers = '"n": 1, "n": -123456789012345678901234567890, "x": 1e999, "m": {"text": "a", "text": "b"}'
    Path("a.jsonl").write_text("".join(f'{{"text": "row {i}", {numbers}}}\n' for i in range(12)))
    assert sorted(documents(read("a.jsonl"))) == sorted(f"row {i}" for i in range(12))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_parquet_row_that_is_not_utf8_is_named(suffix: str) -> None:
    texts = pyarrow.array([b"good row"] * 1_500 + [b"caf\xe9", b"good row"])
    column = pyarrow.StringArray.from_buffers(len(texts), *texts.buffers()[1:])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), "a.parquet")
    if suffix:
        Path(f"a.parquet{suffix}").write_bytes(gzip.compress(Path("a.parquet").read_bytes()))
    with pytest.raises(DataError, match=rf"^a\.parquet{suffix}: row 1501: is not UTF-8 text \(byte 3\)$"):
        read(f"a.parquet{suffix}")


def test_python_source_is_read_in_the_encoding_that_it_declares() -> None:
    Path("a.py").write_bytes("# -*- coding: koi8-r -*-\nname = 'текст'\n".encode("koi8-r") * 9)
    corpus = read("a.py")
    assert "текст" in documents(corpus)[0]
    assert corpus.report.encodings == {"koi8-r": 1}
    assert "not UTF-8: 1 in koi8-r" in first_line(corpus)


def prepared(**changes: Any) -> PackedCorpus:
    files = [str(CASES / name) for name in ("null_rows.jsonl", "crlf.txt", "empty.jsonl")]
    return prepare(DataConfig(**{"source": "files", "files": files, "val_fraction": 0.2, **changes}), 300, 0)


def test_cached_corpus_reports_the_same() -> None:
    first = prepared().report
    assert prepared().report == first
    assert DataReport.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    assert next(iter(first.lines())) == (
        "data: 3 files, 46 documents; dropped 15 null; normalized 59 carriage returns"
    )
    for split in first.splits.values():
        assert len(split.sha256) == 64


def test_hash_of_the_splits_follows_from_their_text_alone() -> None:
    first = prepared().report
    for name in ("null_rows.jsonl", "crlf.txt", "empty.jsonl"):
        shutil.copy(CASES / name, name)
    moved = prepared(files=["null_rows.jsonl", "crlf.txt", "empty.jsonl"], cache_dir="other").report
    assert first.change(moved) is None
    text = Path("crlf.txt").read_text().replace("line 0 ", "line 9 ")
    Path("crlf.txt").write_text(text)
    changed = first.change(prepared(files=["null_rows.jsonl", "crlf.txt"]).report)
    assert changed == "the train split has other content of the same size"
    assert "split has" in str(first.change(prepared(val_fraction=0.3).report))
    assert "instead of" in str(first.change(prepared(files=["null_rows.jsonl"]).report))
    assert first.change(prepared(eos_token="<end>").report) == (
        "data.eos_token is '<end>' instead of '<|endoftext|>'"
    )
