"""Data sets of the hub and local folders in their format: documents, splits and error messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.support.text_files import documents, error_of, jsonl, read, write
from tnnlm.config.schema import DataConfig
from tnnlm.data.sources import source_fingerprint


@pytest.fixture(autouse=True)
def _no_bars() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


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


def test_table_of_the_library_that_has_changed_is_refused() -> None:
    write("corpus/train.jsonl", jsonl(documents(20)))
    hub()
    (table,) = Path("cache").rglob("*-train.arrow")
    data = table.read_bytes()
    assert data.count(b"document 3\n") == 1
    table.write_bytes(data.replace(b"document 3\n", b"document 8\n"))
    message = error_of(source="hub", hub_name="corpus")
    assert f"{table.name}: is damaged or was replaced" in message
    assert message.endswith(f"{table.parent.name} to prepare the data again")
    table.write_bytes(data)
    hub()


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


def test_source_fingerprint_changes_with_the_files_of_a_hub_folder() -> None:
    config = DataConfig(source="hub", hub_name="corpus")
    write("corpus/train.jsonl", jsonl(documents(3)))
    before = source_fingerprint(config)
    write("corpus/train.jsonl", jsonl(documents(3)).upper())
    assert source_fingerprint(config) != before
