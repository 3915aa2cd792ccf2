"""Hashes of content: a rewritten file is noticed whatever its time, also in a local folder of a data set."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripts import ROOT
from tnnlm.config.schema import DataConfig
from tnnlm.data import content
from tnnlm.data.content import content_hash, folder_content
from tnnlm.data.packing import PackedCorpus, prepare
from tnnlm.data.sources import load_corpus
from tnnlm.errors import DataError
from tnnlm.tokenizer import train_bpe

TEXTS = [f"document {i} has " + "words " * (5 + i % 3) for i in range(20)]


def write(name: str, texts: list[str]) -> None:
    """Write a file with a fixed modification time."""
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    os.utime(path, (1, 1))


def hub(**changes: Any) -> DataConfig:
    return DataConfig(**{"source": "hub", "hub_name": "corpus", "val_fraction": 0.2, **changes})


def text_of(corpus: PackedCorpus) -> str:
    tokens = [corpus.rows(split, 1).tokens[:].tolist() for split in ("train", "val")]
    return "".join(corpus.tokenizer.decode(part) for part in tokens)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("resumable", [False, True])
def test_rewritten_hub_folder_is_prepared_again(streaming: bool, resumable: bool) -> None:
    config = hub(streaming=streaming, max_documents=20 if streaming else None)
    write("corpus/train.jsonl", TEXTS)
    first = prepare(config, 300, 0, resumable)
    write("corpus/train.jsonl", [text.upper() for text in TEXTS])
    second = prepare(config, 300, 0, resumable)
    assert sorted(text_of(second).split()) == sorted(text_of(first).upper().split())
    assert "the train split has" in str(first.report.change(second.report))
    shutil.move("corpus", "moved")
    Path("moved").rename("elsewhere")
    Path("parent").mkdir()
    shutil.move("elsewhere", "parent/corpus")
    assert prepare(hub(**vars_of(config), hub_name="parent/corpus"), 300, 0).folder == second.folder


def vars_of(config: DataConfig) -> dict[str, Any]:
    return {"streaming": config.streaming, "max_documents": config.max_documents}


def test_index_of_rewritten_rows_is_refused() -> None:
    write("corpus/train.jsonl", TEXTS)
    load_corpus(hub(), 0, Path("scratch"))
    write("corpus/train.jsonl", [text.upper() for text in TEXTS])
    with pytest.raises(DataError, match="has changed since its preparation began"):
        load_corpus(hub(), 0, Path("scratch"))


def test_rewritten_tokenizer_file_is_used() -> None:
    write("corpus/train.jsonl", TEXTS)
    for end in ("ing", "xyz"):
        text = " ".join(f"{text}{end}" for text in TEXTS)
        Path("given.json").write_text(train_bpe([text], 280, "<|endoftext|>", 1, False).to_json())
        os.utime("given.json", (1, 1))
        corpus = prepare(hub(tokenizer="given.json"), 300, 0)
        assert json.loads((corpus.folder / "tokenizer.json").read_text()) == json.loads(
            Path("given.json").read_text()
        )


def test_hash_of_a_settled_file_is_remembered_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "SETTLED", -1.0)
    write("a.jsonl", TEXTS)
    first = content_hash(Path("a.jsonl"))
    hashed: list[Any] = []
    digest = content.hashlib.file_digest
    monkeypatch.setattr(content.hashlib, "file_digest", lambda *args: hashed.append(args) or digest(*args))
    assert content_hash(Path("a.jsonl")) == first
    assert hashed == []
    Path("a.jsonl").rename("b.jsonl")
    Path("b.jsonl").write_bytes(Path("b.jsonl").read_bytes().upper())
    os.utime("b.jsonl", (1, 1))
    assert content_hash(Path("b.jsonl")) != first


def test_hash_of_a_new_file_is_not_remembered() -> None:
    write("a.jsonl", TEXTS)
    content_hash(Path("a.jsonl"))
    status = Path("a.jsonl").stat()
    assert not any(status.st_ino in key for key in content._remembered)


def test_content_of_a_folder_has_names_without_the_folder_and_skips_git() -> None:
    write("corpus/train.jsonl", TEXTS)
    write("corpus/.git/index", TEXTS)
    assert folder_content(Path("corpus")) == [("train.jsonl", content_hash(Path("corpus/train.jsonl")))]


def test_hub_validation_documents_that_were_trained_on_are_counted() -> None:
    write("corpus/train.jsonl", TEXTS)
    write("corpus/validation.jsonl", [*TEXTS[:3], "another document"])
    report = prepare(hub(hub_val_split="validation"), 300, 0).report
    assert (report.documents, report.duplicates, report.shared) == (24, 3, 3)
    assert list(report.lines())[-1] == "warning: 3 documents of other splits equal training documents"


def test_equal_rows_of_a_hub_folder_are_refused() -> None:
    Path("corpus").mkdir()
    shutil.copy(ROOT / "tests/cases/equal_rows.jsonl", "corpus/train.jsonl")
    with pytest.raises(DataError, match="all 100 documents are equal"):
        prepare(hub(), 300, 0)


def test_hub_folder_of_dates_is_refused_and_not_converted() -> None:
    # The datasets library reads such a column as times, whose text may differ from that in the file.
    Path("corpus").mkdir()
    shutil.copy(ROOT / "tests/cases/dates.jsonl", "corpus/train.jsonl")
    with pytest.raises(DataError, match="column 'text' is not text but datetime"):
        prepare(hub(), 300, 0)


@pytest.mark.parametrize("name", ["corpus #2", "a:b"])
def test_hub_folder_of_any_name_is_read(name: str) -> None:
    write(f"{name}/train.jsonl", TEXTS)
    assert prepare(hub(hub_name=name), 300, 0).report.documents == 20


@pytest.mark.parametrize("name", ["corpus [1]", "all*"])
def test_hub_folder_whose_name_is_a_pattern_is_refused(name: str) -> None:
    write(f"{name}/train.jsonl", TEXTS)
    with pytest.raises(DataError, match="takes it as a pattern; rename it without"):
        prepare(hub(hub_name=name), 300, 0)
