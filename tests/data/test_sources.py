"""Documents from each source and file type, the split, and error messages for damaged input."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tnnlm.config.schema import DataConfig
from tnnlm.data.files import source_files
from tnnlm.data.sources import FEW_DOCUMENTS, load_corpus, source_fingerprint
from tnnlm.errors import DataError

LINES = "".join(f"line {i} of a text\n" for i in range(20))


@pytest.fixture(autouse=True)
def _no_bars() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(name: str, data: str | bytes) -> str:
    """Write a file into the folder of the test."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return name


def jsonl(texts: list[str], column: str = "text") -> str:
    return "".join(json.dumps({column: text}) + "\n" for text in texts)


def parquet(texts: list[str], column: str = "text") -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), sink)
    return bytes(sink.getvalue())


def documents(n: int) -> list[str]:
    """Return distinct documents of unequal length."""
    return [f"document {i}\n" + f"word{i} " * (10 + i % 7) for i in range(n)]


def read(*files: str, seed: int = 0, **changes: Any) -> tuple[list[str], list[str]]:
    """Return both splits of ``files``."""
    corpus = load_corpus(
        DataConfig(**{"source": "files", "files": list(files), **changes}), seed, Path("scratch")
    )
    return list(corpus.train), list(corpus.val)


def error_of(*files: str, **changes: Any) -> str:
    """Return the error message of one line that a user sees."""
    with pytest.raises(DataError) as caught:
        read(*files, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


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


def test_text_column_is_refused_without_a_table() -> None:
    message = error_of(write("a.txt", LINES), text_column="body")
    assert message.startswith("data.text_column=body: text files have no columns; omit it")
    write("b.jsonl", jsonl(documents(12), "body"))
    train, val = read("a.txt", "b.jsonl", text_column="body")
    assert len(train + val) == 13


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


@pytest.mark.parametrize("name", ["a.csv", "a", "a.gz", "a.zip", "a.csv.gz"])
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
        ("utf16.txt", LINES.encode("utf-16"), "is not text"),
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


def test_split_follows_from_the_seed() -> None:
    write("a.jsonl", jsonl(documents(60)))
    assert read("a.jsonl", seed=1, val_fraction=0.2) == read("a.jsonl", seed=1, val_fraction=0.2)
    assert read("a.jsonl", seed=1, val_fraction=0.2) != read("a.jsonl", seed=2, val_fraction=0.2)


def test_split_does_not_depend_on_the_order_of_documents() -> None:
    texts = documents(60)
    _, val = read(write("a.jsonl", jsonl(texts)), val_fraction=0.2)
    _, reversed_val = read(write("b.jsonl", jsonl(texts[::-1])), val_fraction=0.2)
    assert sorted(val) == sorted(reversed_val)


@pytest.mark.parametrize("n", [FEW_DOCUMENTS, 300])
def test_split_is_by_document_and_loses_none(n: int) -> None:
    texts = documents(n)
    train, val = read(write("a.jsonl", jsonl(texts)), val_fraction=0.2)
    assert val
    assert not set(train) & set(val)
    assert Counter(train + val) == Counter(texts)


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5])
def test_split_holds_out_the_fraction(fraction: float) -> None:
    texts = documents(400)
    _, val = read(write("a.jsonl", jsonl(texts)), val_fraction=fraction)
    longest = max(map(len, texts))
    excess = sum(map(len, val)) - fraction * sum(map(len, texts))
    assert 0 <= excess <= longest


def test_split_does_not_hold_out_a_document_that_is_most_of_the_text() -> None:
    texts = [*documents(30), "a huge document\n" * 5_000]
    for seed in range(5):
        train, val = read(write("a.jsonl", jsonl(texts)), val_fraction=0.1, seed=seed)
        assert texts[-1] in train
        assert val


def test_split_keeps_equal_documents_together() -> None:
    # Licences and templates are repeated in many documents; a copy in the training split would spoil the
    # validation.
    texts = [text for text in documents(20) for _ in range(5)]
    train, val = read(write("a.jsonl", jsonl(texts)), val_fraction=0.07)
    assert not set(train) & set(val)


@pytest.mark.parametrize("n", [1, 3, FEW_DOCUMENTS - 1])
def test_split_cuts_few_documents_in_two_and_loses_nothing(n: int) -> None:
    texts = [LINES.replace("line", f"line {i} {'x' * i}") for i in range(n)]
    train, val = read(write("a.jsonl", jsonl(texts)), val_fraction=0.25)
    assert [a + b for a, b in zip(train, val, strict=True)] == texts
    assert sum(map(len, val)) == pytest.approx(0.25 * sum(map(len, texts)), rel=0.2)
    # The cut is at a line break if there is one nearby.
    assert all(text.endswith("\n") for text in train)


def test_split_cuts_a_text_of_one_line() -> None:
    text = "word " * 100
    train, val = read(write("a.txt", text), val_fraction=0.1)
    assert (len(train[0]), train[0] + val[0]) == (450, text)


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


def hub(name: str = "corpus", **changes: Any) -> tuple[list[str], list[str]]:
    """Return both splits of a local folder in the format of the datasets library."""
    return read(source="hub", hub_name=name, **changes)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_folder_is_read(streaming: bool) -> None:
    texts = documents(20)
    write("corpus/train.jsonl", jsonl(texts))
    train, val = hub(streaming=streaming, max_documents=15 if streaming else None)
    assert sorted(train + val) == sorted(texts[:15] if streaming else texts)


def test_hub_validation_split_is_used_unchanged() -> None:
    texts = documents(20)
    write("corpus/train.jsonl", jsonl(texts[:15]))
    write("corpus/validation.jsonl", jsonl(texts[15:]))
    assert hub(hub_val_split="validation") == (texts[:15], texts[15:])


def test_hub_streaming_needs_max_documents() -> None:
    write("corpus/train.jsonl", jsonl(documents(3)))
    assert "data.max_documents" in error_of(source="hub", hub_name="corpus", streaming=True)


def test_hub_without_name_reports_the_setting() -> None:
    assert "data.hub_name" in error_of(source="hub")


@pytest.mark.parametrize("changes", [{"hub_split": "nope"}, {"hub_config": "nope"}, {"text_column": "nope"}])
def test_hub_reports_what_the_data_set_lacks(changes: dict[str, str]) -> None:
    write("corpus/train.jsonl", jsonl(documents(3)))
    message = error_of(source="hub", hub_name="corpus", **changes)
    assert message.startswith("corpus: ")
    assert "nope" in message


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_splits_must_differ(streaming: bool) -> None:
    texts = documents(20)
    write("corpus/train.jsonl", jsonl(texts[:15]))
    write("corpus/validation.jsonl", jsonl(texts[15:]))
    words: dict[str, Any] = {"streaming": streaming, "max_documents": 99}
    for same in ("train", " train", "train[:100%]", "train[0:]"):
        message = error_of(source="hub", hub_name="corpus", hub_val_split=same, **words)
        assert message.startswith(f"data.hub_val_split={same}: is the split to train on; ")
    assert hub(hub_val_split="validation", **words) == (texts[:15], texts[15:])


def test_hub_slices_of_a_split_may_be_held_out() -> None:
    texts = documents(20)
    write("corpus/train.jsonl", jsonl(texts))
    assert hub(hub_split="train[:15]", hub_val_split="train[15:]") == (texts[:15], texts[15:])


CARD = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "card", ["../secret.jsonl", "{}/secret.jsonl", "a/../../*.jsonl", "link.jsonl", "up/*.jsonl"]
)
def test_hub_folder_must_not_refer_to_files_outside(card: str, streaming: bool) -> None:
    write("secret.jsonl", jsonl(documents(20)))
    write("corpus/a/README.md", "")
    Path("corpus/link.jsonl").symlink_to(Path("secret.jsonl").resolve())
    Path("corpus/up").symlink_to(Path.cwd())
    write("corpus/README.md", CARD.format(card.format(Path.cwd())))
    message = error_of(source="hub", hub_name="corpus", streaming=streaming, max_documents=99)
    assert message.startswith("corpus: refers to ")
    assert message.endswith(", outside of the folder; copy the file into the folder")
    assert not Path("scratch").exists()


def test_hub_folder_with_a_directory_outside_is_refused() -> None:
    write("other/train.jsonl", jsonl(documents(20)))
    write("corpus/README.md", CARD.replace("data_files", "data_dir").format("../other"))
    write("corpus/train.jsonl", jsonl(documents(20)))
    assert "outside of the folder" in error_of(source="hub", hub_name="corpus")


def test_hub_folder_may_contain_links_and_snapshots_link_to_their_blobs() -> None:
    texts = documents(20)
    write("cache/blobs/0", jsonl(texts))
    write("cache/snapshots/1/data/other.txt", "")
    Path("cache/snapshots/1/train.jsonl").symlink_to("../../blobs/0")
    train, val = hub("cache/snapshots/1")
    assert sorted(train + val) == sorted(texts)


def test_hub_name_of_a_file_type_is_a_folder_and_not_the_working_directory() -> None:
    write("train.jsonl", jsonl(["outside"] * 20))
    assert error_of(source="hub", hub_name="json").startswith("data.hub_name=json: is a file type")
    texts = documents(20)
    write("json/train.jsonl", jsonl(texts))
    train, val = hub("json")
    assert sorted(train + val) == sorted(texts)


def test_hub_folder_with_a_script_runs_no_code() -> None:
    write("corpus/corpus.py", "from pathlib import Path\nPath('ran').touch()\n")
    write("corpus/train.jsonl", jsonl(documents(20)))
    assert error_of(source="hub", hub_name="corpus").startswith("corpus: can't be read: ")
    assert error_of(source="hub", hub_name="corpus/corpus.py").startswith("corpus/corpus.py: can't be read: ")
    assert not Path("ran").exists()


def test_hub_folder_without_data_is_reported() -> None:
    Path("corpus").mkdir()
    assert error_of(source="hub", hub_name="corpus").startswith("corpus: ")


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("Dataset 'nobody/nothing' doesn't exist on the Hub"),
        ConnectionError("Couldn't reach 'nobody/nothing' on the Hub"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_unknown_hub_name_is_reported(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both are subclasses of OSError, but no disk or permission raises them.
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert error_of(source="hub", hub_name="nobody/nothing").startswith("nobody/nothing: ")


def test_hub_stream_that_fails_is_reported() -> None:
    # A stream is read row by row, so the damage only shows late.
    write("corpus/train.jsonl", jsonl(documents(3)) + '{"text": "ab')
    message = error_of(source="hub", hub_name="corpus", streaming=True, max_documents=9)
    assert message.startswith("corpus: ")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_hub_row_that_is_not_utf8_is_named(kind: str, streaming: bool) -> None:
    cells = [f"document {i}".encode() for i in range(300)]
    cells[270] = b"bad \xff here"
    if kind == "jsonl":
        write("corpus/train.jsonl", b"".join(b'{"text": "%b"}\n' % cell for cell in cells))
    else:
        binary = pyarrow.array(cells, type=pyarrow.binary())
        text = pyarrow.Array.from_buffers(pyarrow.string(), len(cells), binary.buffers())
        Path("corpus").mkdir()
        pyarrow.parquet.write_table(pyarrow.table({"text": text}), "corpus/train.parquet")
    place = "after row 270" if streaming else "row 271"
    message = error_of(source="hub", hub_name="corpus", streaming=streaming, max_documents=300)
    assert message == f"corpus: {place}: is not UTF-8 text (byte 4)"


def test_hub_row_of_a_stream_that_is_not_text_is_named() -> None:
    write("corpus/train.jsonl", '{"text": null, "n": 1}\n{"text": "a", "n": 2}\n')
    message = error_of(source="hub", hub_name="corpus", streaming=True, max_documents=9, text_column="n")
    assert message.startswith("corpus: row 1: column 'n' is not text but int")


def test_full_disk_is_not_reported_as_damaged_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    write("corpus/train.jsonl", jsonl(documents(3)))
    with pytest.raises(OSError, match="No space left"):
        hub()


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


def test_source_fingerprint_changes_with_the_files_of_a_hub_folder() -> None:
    config = DataConfig(source="hub", hub_name="corpus")
    write("corpus/train.jsonl", jsonl(documents(3)))
    before = source_fingerprint(config)
    write("corpus/train.jsonl", jsonl(documents(3)).upper())
    assert source_fingerprint(config) != before
