"""Data preparation: the same tokens as train.py, resumable after a kill, no network afterwards."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.support.scripts import ROOT, Result
from tests.support.training_runs import OTHER_DATA
from tnnlm.cli import run
from tnnlm.config.loader import load_config
from tnnlm.config.schema import DataConfig
from tnnlm.data import arrow_text as documents
from tnnlm.data import chunks, packing, token_files, tokenize_split
from tnnlm.data.arrow_text import Documents, index_documents
from tnnlm.data.packing import PackedCorpus, Request, prepare
from tnnlm.data.sources import load_corpus
from tnnlm.data.tasks import split_rows
from tnnlm.errors import DataError
from tnnlm.tokenizer import train_bpe

TEXTS = [f"document {i} says\n" + f"word{i % 17} and {i} " * (5 + i % 11) for i in range(300)]
TOOL = ROOT / "tools/prepare_data.py"
HUB = ("data.source=hub", "data.hub_name=corpus")


@pytest.fixture(autouse=True)
def _hub() -> Any:
    datasets.disable_progress_bars()
    write_hub()
    yield
    datasets.enable_progress_bars()


def write_hub(texts: list[str] = TEXTS) -> None:
    Path("corpus").mkdir(exist_ok=True)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ["", *texts[:150], " \n", *texts[150:]])
    Path("corpus/train.jsonl").write_text(rows)


def config_of(**changes: Any) -> DataConfig:
    return DataConfig(**{"source": "hub", "hub_name": "corpus", "val_fraction": 0.1, **changes})


def tokens(corpus: PackedCorpus) -> list[list[int]]:
    return [corpus.rows(s, 1).tokens[:].tolist() for s in ("train", "val")]


def cached() -> list[str]:
    return sorted(p.name for p in Path(os.environ["TNNLM_CACHE"]).iterdir() if p.name != "datasets")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("n", [5, 300])
def test_documents_on_disk_give_the_split_of_those_in_memory(n: int, streaming: bool, tmp_path: Path) -> None:
    write_hub(TEXTS[:n])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:n])
    Path("same.jsonl").write_text(lines)
    inside = load_corpus(DataConfig(source="files", files=["same.jsonl"], val_fraction=0.1), 7, tmp_path)
    config = config_of(streaming=streaming, max_documents=n if streaming else None)
    outside = load_corpus(config, 7, tmp_path)
    assert list(outside.train) == list(inside.train)
    assert list(outside.val) == list(inside.val)
    if n > 5:
        assert isinstance(outside.train, Documents)


def test_documents_are_a_sequence(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["", "a", "b", None, "c", "d", " "]})
    found = index_documents(
        rows, "text", "here", seed=0, limit=None, kept=tmp_path / "all", normalize=True
    ).select(rows, "text")
    assert list(found) == ["a", "b", "c", "d"]
    assert (len(found), found.size, found[1], found[-1]) == (4, 4, "b", "d")
    assert list(found[2:]) == ["c", "d"]
    first = index_documents(rows, "text", "here", seed=0, limit=3, kept=tmp_path / "first", normalize=True)
    assert list(first.select(rows, "text")) == ["a", "b", "c"]
    numbers = datasets.Dataset.from_dict({"n": [1, 2]})
    with pytest.raises(DataError, match="here: row 1: column 'n' is not text"):
        index_documents(numbers, "n", "here", seed=0, limit=None, kept=tmp_path / "none", normalize=True)


class Killed(BaseException):
    """Exception in place of a kill, which no handler catches."""


@pytest.mark.parametrize("tokenizer", [None, "given.json"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("place", [1, 3, 6])
def test_stopped_preparation_resumes(
    monkeypatch: pytest.MonkeyPatch, place: int, streaming: bool, tokenizer: str | None
) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 300)
    monkeypatch.setattr(tokenize_split, "SAVE_SECONDS", 0)
    monkeypatch.setattr(documents, "CHARACTERS", 4000)
    monkeypatch.setattr(token_files, "SHARD_BYTES", 2003)  # 1001 tokens
    Path("given.json").write_text(train_bpe(TEXTS, 280, "<|endoftext|>", 300, False).to_json())
    config = config_of(streaming=streaming, max_documents=280 if streaming else None, tokenizer=tokenizer)
    whole = prepare(config, 300, 0)
    shards = [name for split in ("train", "val") for name in whole.shards(split)]
    names = {"meta.json", "tokenizer.json", *shards}
    assert whole.layout.per_shard == 1001
    assert len(shards) > 5
    assert {p.name for p in whole.folder.iterdir()} == names
    monkeypatch.setenv("TNNLM_CACHE", "other")
    encoded: list[str] = []
    limit = 40 * place
    encode = packing.TextTokenizer.encode_batch

    def killing(self: Any, texts: list[str]) -> list[list[int]]:
        if len(encoded) >= limit:
            raise Killed
        encoded.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(packing.TextTokenizer, "encode_batch", killing)
    with pytest.raises(Killed):
        prepare(config, 300, 0, resumable=True)
    assert cached()[0].endswith(".part")
    before = len(encoded)
    limit = 10**9
    resumed = prepare(config, 300, 0, resumable=True)
    assert tokens(resumed) == tokens(whole)
    assert (resumed.train, resumed.val) == (whole.train, whole.val)
    # Finished work is not repeated, except for at most one batch.
    assert len(encoded) - len([*resumed_documents(config)]) <= max(20, before // 4)
    assert cached() == [resumed.folder.name]
    assert {p.name for p in resumed.folder.iterdir()} == names


def resumed_documents(config: DataConfig) -> list[str]:
    corpus = load_corpus(config, 0, Path("scratch"))
    return [*corpus.train, *corpus.val]


@pytest.mark.parametrize("place", [1, 4, 9])
def test_preparation_resumes_inside_of_a_document(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 300)
    monkeypatch.setattr(chunks, "CONTEXT", 40)
    monkeypatch.setattr(tokenize_split, "SAVE_SECONDS", 0)
    text = "".join(f"{i} é漢 words and\n\n{'letters' * (i % 50)} " for i in range(200)) + "x" * 3_000
    Path("book.txt").write_text(text, encoding="utf-8")
    Path("given.json").write_text(train_bpe(TEXTS, 280, "<|endoftext|>", 300, False).to_json())
    config = DataConfig(source="files", files=["book.txt"], tokenizer="given.json", val_fraction=0.1)
    encode, calls, last = packing.TextTokenizer.encode_batch, 0, 10**9

    def killing(self: Any, texts: list[str]) -> list[list[int]]:
        nonlocal calls
        calls += 1
        if calls > last:
            raise Killed
        return encode(self, texts)

    monkeypatch.setattr(packing.TextTokenizer, "encode_batch", killing)
    whole = prepare(config, 280, 0)
    total, calls, last = calls, 0, place + 1
    monkeypatch.setenv("TNNLM_CACHE", "other")
    with pytest.raises(Killed):
        prepare(config, 280, 0, resumable=True)
    (part,) = Path("other").glob("*.part")
    progress = json.loads((part / "train.progress").read_text(encoding="utf-8"))
    assert progress["inside"][0] > 300
    calls, last = 0, 10**9
    resumed = prepare(config, 280, 0, resumable=True)
    assert tokens(resumed) == tokens(whole)
    assert (resumed.train, resumed.val) == (whole.train, whole.val)
    assert calls <= total - place + 2


def test_stream_resumes_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHARACTERS", 4000)
    config = config_of(streaming=True, max_documents=280)
    killed: list[Path] = []
    read: list[str] = []
    write_table = documents._write_table

    def killing(texts: list[str], path: Path) -> None:
        if path.name.endswith("3.arrow") and not killed:
            killed.append(path)
            raise Killed
        write_table(texts, path)
        read.extend(texts)

    monkeypatch.setattr(documents, "_write_table", killing)
    Path("scratch").mkdir()
    with pytest.raises(Killed):
        load_corpus(config, 0, Path("scratch"))
    kept = {p.name: p.read_bytes() for p in Path("scratch").glob("*.arrow")}
    assert len(kept) == 3
    before = len(read)
    found = load_corpus(config, 0, Path("scratch"))
    assert sorted([*found.train, *found.val]) == sorted(TEXTS[:280])
    assert all((Path("scratch") / name).read_bytes() == data for name, data in kept.items())
    assert before > 50
    assert sorted(read) == sorted(TEXTS[:280])  # each once: the first three files were not read again


def test_data_that_changed_during_preparation_is_refused(tmp_path: Path) -> None:
    load_corpus(config_of(), 0, tmp_path)
    write_hub(TEXTS[:200])
    with pytest.raises(DataError, match=r"corpus: has changed since .*remove"):
        load_corpus(config_of(), 0, tmp_path)


def test_bad_input_leaves_nothing_behind() -> None:
    with pytest.raises(DataError):
        prepare(config_of(hub_split="nope"), 300, 0, resumable=True)
    assert cached() == []


def test_two_at_once_are_refused() -> None:
    config = config_of()
    folder = Request(config, 300, 0, None).folder()
    with (
        packing._resumable_folder(folder),
        pytest.raises(DataError, match="another process prepares the same"),
    ):
        prepare(config, 300, 0, resumable=True)


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that calls ``tnnlm prepare-data`` in this process."""

    def call(*words: str) -> Result:
        capsys.readouterr()
        return Result(run("prepare-data", words), *capsys.readouterr())

    return call


def test_preparation_survives_sigkill(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hub([f"text {i} " + " ".join(f"w{(i * j) % 977}" for j in range(400)) for i in range(4000)])
    words = [*OTHER_DATA, *HUB]
    process = subprocess.Popen(
        [sys.executable, str(TOOL), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    cache = Path(os.environ["TNNLM_CACHE"])
    while process.poll() is None and not list(cache.glob("*.part/train-00000.bin")):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert list(cache.glob("*.part"))
    done = tool(*words)
    assert done.code == 0, done.err
    for shown in ("train: ", "validation: ", "tokenizer: ", "epochs"):
        assert shown in done.out
    config = load_config(None, words)
    made = prepare(config.data, 400, 0)
    assert str(made.folder) in done.out
    assert cached() == [made.folder.name]
    printed = shlex.split(done.out.splitlines()[-1].partition("HF_HUB_OFFLINE=1 ")[2])
    assert printed == ["python", "train.py", *words]
    monkeypatch.setenv("TNNLM_CACHE", "fresh")
    assert tokens(prepare(config.data, 400, 0)) == tokens(made)


def test_tool_refuses_bad_input(tool: Any) -> None:
    for words in (("data.source=hub",), ("data.hub=x",), ("--config", "nowhere.yaml")):
        refused = tool(*words)
        assert refused.code == 2
        assert refused.err.startswith("error: ")
        assert refused.err.count("\n") == 1


def test_training_on_prepared_data_uses_no_network(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # This is the layout of the Hub cache after a download.
    snapshot = tmp_path / "hub/models--some--tokenizer"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs/main").write_text("abc")
    (snapshot / "snapshots/abc").mkdir(parents=True)
    text = train_bpe(TEXTS, 280, "<|endoftext|>", 300, False).to_json()
    (snapshot / "snapshots/abc/tokenizer.json").write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = load_config(None, [*OTHER_DATA, *HUB, "data.tokenizer=some/tokenizer", "trainer.max_steps=4"])
    corpus = prepare(config.data, config.model.vocab_size, config.seed, resumable=True)
    split_rows(corpus, config)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a network connection was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    words = [*OTHER_DATA, *HUB, "data.tokenizer=some/tokenizer", "trainer.max_steps=4"]
    result = script("train", *words)
    assert result.code == 0, result.err
    assert cached() == [corpus.folder.name]


def test_labelled_sequences_are_prepared_too(tool: Any) -> None:
    words = ["task=classify", "data.source=listops", "model.n_classes=10", "data.listops.train_rows=30"]
    words += ["data.listops.min_length=4", "data.listops.max_length=20", "data.listops.test_rows=10"]
    done = tool(*words, "data.listops.val_rows=10")
    assert done.code == 0, done.err
    assert "train: 30 sequences; " in done.out
    assert "are of the most frequent class" in done.out
    assert "python train.py task=classify" in done.out
    assert len(cached()) == 1
