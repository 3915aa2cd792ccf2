"""Generated rows on disk: disjoint splits, deterministic, padded and complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import default_collate

from tests.support.listops import evaluate
from tnnlm.config.loader import load_config
from tnnlm.data.sequences import prepare
from tnnlm.data.sequences.prepare import prepare_sequences
from tnnlm.data.sequences.rows import SPLITS, Example, LabelledRows, SeenRows, write_rows
from tnnlm.data.sources import cache_folder
from tnnlm.models.batches import LabelledBatch

SETTINGS = (
    "task=classify",
    "model.n_classes=10",
    "data.source=listops",
    "data.listops.min_length=4",
    "data.listops.max_length=30",
    "data.listops.max_depth=3",
    "data.listops.train_rows=60",
    "data.listops.val_rows=20",
    "data.listops.test_rows=20",
    "model.max_length=32",
    "model.vocab_size=300",
)


def texts(rows: LabelledRows) -> list[bytes]:
    return [bytes(rows.symbols(index)) for index in range(len(rows))]


def test_splits_are_disjoint_and_deterministic(tmp_path: Path) -> None:
    corpus = prepare_sequences(load_config(None, [*SETTINGS]))
    again = prepare_sequences(load_config(None, [*SETTINGS, f"data.cache_dir={tmp_path / 'other'}"]))
    assert corpus.folder != again.folder
    found = []
    for name, count in zip(SPLITS, (60, 20, 20), strict=True):
        rows, same = corpus.split(name, 32), again.split(name, 32)
        assert len(rows) == count
        assert texts(rows) == texts(same)
        assert rows.labels.tolist() == same.labels.tolist()
        found += texts(rows)
    assert len(set(found)) == 100
    other = prepare_sequences(load_config(None, [*SETTINGS, "seed=1"]))
    assert texts(other.split("train", 32)) != texts(corpus.split("train", 32))


def test_the_folder_of_an_older_version_is_named_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(None, [*SETTINGS])
    old = cache_folder(config.data) / prepare._key(config, [], prepare.VERSION - 1)
    old.mkdir(parents=True)
    for _ in range(2):
        corpus = prepare_sequences(config)
    assert corpus.folder != old
    assert old.is_dir()
    assert capsys.readouterr().err == (
        f"{old}: not used: written by an older version without checksums; the sequences are prepared again, "
        "and this old folder may be deleted\n"
    )


def test_rows_are_padded_and_labelled() -> None:
    rows = prepare_sequences(load_config(None, [*SETTINGS])).split("val", 32)
    batch = default_collate([rows[index] for index in range(len(rows))])
    assert isinstance(batch, LabelledBatch)
    assert (batch.tokens.shape, batch.lengths.shape, batch.labels.shape) == ((20, 32), (20,), (20,))
    for tokens, length, label in zip(batch.tokens, batch.lengths, batch.labels, strict=True):
        assert (tokens[length:] == 0).all()
        assert evaluate((tokens[:length] - 1).numpy().astype(np.uint8)) == label
    with pytest.raises(IndexError):
        rows[20]


def test_majority(tmp_path: Path) -> None:
    examples = [Example((bytes([label]),), label) for label in (1, 1, 0, 1)]
    assert write_rows(tmp_path, "train", examples, 2, SeenRows()).documents == 4
    assert LabelledRows(tmp_path, "train", 4).majority == 0.75


@pytest.mark.parametrize("parts", [1, 2])
def test_empty_sequences(tmp_path: Path, parts: int) -> None:
    write_rows(tmp_path, "train", [Example((b"",) * parts, 0)] * 2, 2, SeenRows())
    row: Any = LabelledRows(tmp_path, "train", 3)[1]
    assert row.lengths.tolist() == ([1, 1] if parts == 2 else 1)
    assert row.tokens.sum() == 0
