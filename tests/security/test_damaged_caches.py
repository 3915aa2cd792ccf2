"""Every file of a cache, and the data that it is made from, damaged in many ways: one line, or no change."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from tests.support.damage import Damage, check_refused, flips, refusal, replacements, truncations
from tests.support.text_files import documents, jsonl, parquet, write
from tests.support.training_runs import SETTINGS, write_text
from tnnlm.config.loader import load_config
from tnnlm.config.schema import DataConfig
from tnnlm.data import arrow_text, chunks, token_files, tokenize_split
from tnnlm.data.arrow_text import index_documents, materialize_stream
from tnnlm.data.content import checksum
from tnnlm.data.packing import prepare
from tnnlm.data.report import DataReport, SplitInfo, read_report, write_report
from tnnlm.data.sequences.prepare import prepare_sequences
from tnnlm.errors import DataError

TEXT = DataConfig(source="files", files=["corpus.jsonl"], val_fraction=0.3)
WORDS = (
    "task=classify",
    "model.n_classes=10",
    "data.source=listops",
    "data.listops.min_length=4",
    "data.listops.max_length=30",
    "data.listops.train_rows=30",
    "data.listops.val_rows=10",
    "data.listops.test_rows=10",
    "model.max_length=32",
    "model.vocab_size=300",
)


def damages(path: Path, *others: Path, n: int = 4) -> list[Damage]:
    """Return damages of a file, the same ones in every run; with ``TNNLM_NIGHTLY`` more of them."""
    rng, whole = random.Random(path.name), os.environ.get("TNNLM_NIGHTLY") == "1"
    cut, flipped = truncations(path, 50 if whole else n, rng), flips(path, 200 if whole else n, rng)
    return [*cut, *flipped, *replacements(path, *others)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "SHARD_BYTES", 2_000)
    write("corpus.jsonl", jsonl(documents(60)))


def prepared(seed: int = 0) -> Any:
    return prepare(TEXT, 280, seed)


def sequences(seed: int = 0) -> Any:
    return prepare_sequences(load_config(None, [*WORDS, f"seed={seed}"]))


@pytest.mark.parametrize("kind", [prepared, sequences])
def test_damaged_cache_is_refused_in_one_line(kind: Callable[..., Any]) -> None:
    folder, other = kind().folder, kind(seed=1).folder
    files = sorted(folder.iterdir())
    assert len(files) == {prepared: 5, sequences: 10}[kind]
    for path in files:
        neighbour = files[files.index(path) - 1]
        for damage in damages(path, other / path.name, neighbour):
            with damage.of(path):
                message = check_refused(kind, path, damage)
            assert f"delete {folder} to prepare the data again" in message
    assert refusal(kind) is None


def test_training_on_a_damaged_cache_ends_with_one_line(script: Any) -> None:
    write_text()
    words = [*SETTINGS, "trainer.max_steps=1"]
    config = load_config(None, words)
    folder = prepare(config.data, config.model.vocab_size, config.seed).folder
    path = folder / "train-00001.bin"
    (damage,) = flips(path, 1, random.Random(0))
    with damage.of(path):
        done = script("train", *words)
    assert done.code == 2
    told = "is damaged or was replaced (its checksum differs); delete"
    assert done.err == f"error: {path}: {told} {folder} to prepare the data again\n"
    assert not Path("runs").exists()


def test_cache_that_was_renamed_is_refused() -> None:
    folder, other = prepared().folder, prepared(seed=1).folder
    shutil.rmtree(folder)
    other.rename(folder)
    with pytest.raises(DataError, match=r"meta\.json: belongs to other data; delete "):
        prepared()


def test_ranks_that_are_not_the_first_of_their_machine_check_sizes_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = prepared().folder / "train-00000.bin"
    monkeypatch.setattr("tnnlm.data.prepared.rank_zero_only.rank", 5)
    read: list[str] = []
    monkeypatch.setattr("tnnlm.data.prepared.checksum", lambda path: read.append(path.name) or checksum(path))
    for variable, value, reads in [("LOCAL_RANK", "1", 0), ("LOCAL_RANK", "0", 3), ("SLURM_LOCALID", "0", 3)]:
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            prepared()
        assert len(read) == reads
        read.clear()
    os.truncate(path, 10)
    check_refused(prepared, path, Damage("truncated", lambda *_: None))


class Killed(BaseException):
    """Exception in place of a kill, which no handler catches."""


@pytest.fixture
def unfinished(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that a killed preparation left."""
    monkeypatch.setattr(tokenize_split, "SAVE_SECONDS", 0)
    monkeypatch.setattr(chunks, "CHUNK", 300)
    batches, limit = tokenize_split.batches_of, 30

    def killing(*args: Any) -> Iterator[Any]:
        for number, chunk in enumerate(chunk for batch in batches(*args) for chunk in batch):
            if number == limit:
                raise Killed
            yield [chunk]

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_split, "batches_of", killing)
        with pytest.raises(Killed):
            prepare(TEXT, 280, 0, resumable=True)
    (part,) = Path("cache").glob("*.part")
    return part


def tokens_of(corpus: Any) -> list[list[int]]:
    return [corpus.rows(split, 1).tokens[:].tolist() for split in ("train", "val")]


def test_damaged_rest_of_a_killed_preparation_changes_no_token(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens_of(prepare(replace(TEXT, cache_dir="whole"), 280, 0))
    files = sorted(path.name for path in unfinished.iterdir())
    assert files[:3] == ["files.documents", "files.survey.json", "files.survey.npz"]
    assert files[3:6] == ["tokenizer.json", "tokenizer.progress", "train-00000.bin"]
    assert files[-1] == "train.progress"
    kept, cache = unfinished.rename("kept"), Path("again")
    refused = 0
    for name in files:
        for damage in damages(kept / name, n=2):
            shutil.copytree(kept, cache / unfinished.name)
            (cache / unfinished.name / name).unlink()
            damage.make(kept / name, cache / unfinished.name / name)
            found = check_unused(lambda: prepare(in_cache(cache), 280, 0, resumable=True), name, damage)
            refused += found is None
            assert found is None or tokens_of(found) == expected, f"{name}, {damage}: other tokens"
            shutil.rmtree(cache)
    assert refused > 40


def in_cache(folder: Path) -> DataConfig:
    return replace(TEXT, cache_dir=str(folder))


def check_unused(call: Callable[[], Any], name: str, damage: Damage) -> Any:
    """Check that a call names a damaged file, or return its result, None if it was refused."""
    found: list[Any] = []
    message = refusal(lambda: found.append(call()))
    assert message is None or name in message, f"{name}, {damage}: not named in {message!r}"
    return found[0] if found else None


def stream(folder: Path) -> list[str]:
    """Return the documents of a stream that is written to tables in ``folder``, and indexed."""
    rows = datasets.Dataset.from_dict({"text": documents(40)}).to_iterable_dataset()
    table, _ = materialize_stream(rows, "text", "here", limit=40, folder=folder, name="all", normalize=True)
    index = index_documents(
        table, "text", "here", seed=0, limit=None, kept=folder / "all.survey.npz", normalize=True
    )
    return [*index.select(table, "text")]


def test_damaged_tables_of_a_stream_change_no_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arrow_text, "CHARACTERS", 1_500)
    folder = Path("scratch")
    folder.mkdir()
    expected = stream(folder)
    assert expected == documents(40)
    files = sorted(folder.iterdir())
    assert {path.name for path in files} > {
        "all-00001.arrow",
        "all.stream.json",
        "all.survey.json",
        "all.survey.npz",
    }
    kept, refused = folder.rename("kept"), 0
    for path in files:
        for damage in damages(kept / path.name, n=2):
            shutil.copytree(kept, folder)
            path.unlink()
            damage.make(kept / path.name, path)
            # Tables that are written again are other ones for the index, whose folder the message names.
            name = folder.name if damage.name == "missing" else path.name
            found = check_unused(lambda: stream(folder), name, damage)
            refused += found is None
            assert found in (None, expected), f"{path.name}, {damage}: other documents"
            shutil.rmtree(folder)
    assert refused > 40


@pytest.mark.parametrize("name", ["corpus.txt", "corpus.jsonl", "corpus.parquet"])
def test_damaged_data_file_is_refused_or_read_as_it_is(name: str) -> None:
    texts = documents(60)
    content = {"txt": "".join(texts), "jsonl": jsonl(texts), "parquet": parquet(texts)}[name.split(".")[1]]
    path, refused = Path(write(name, content)), 0
    for damage in damages(path):
        with damage.of(path):
            call = lambda: prepare(replace(TEXT, files=[name], cache_dir="fresh"), 280, 0)  # noqa: E731
            refused += check_unused(call, name, damage) is None
    assert refused > 6


def test_damaged_report_of_a_run_is_refused() -> None:
    run = Path("run")
    write_report(run, DataReport(source="files", splits={"train": SplitInfo(3, 50, 90, "abc")}))
    path = run / "data.json"
    for damage in damages(path):
        with damage.of(path):
            found = check_unused(lambda: read_report(run), path.name, damage)
            assert found is None or damage.name == "missing" or found.splits
    assert refusal(lambda: read_report(run)) is None


def test_flipped_bit_is_found_in_every_place_of_a_shard() -> None:
    path = prepared().folder / "val-00000.bin"
    size = path.stat().st_size
    for damage in flips(path, 8 * size, random.Random(0))[:: max(1, size // 20)]:
        with damage.of(path):
            check_refused(prepared, path, damage)
    assert np.fromfile(path, "<u2").max() < 280
