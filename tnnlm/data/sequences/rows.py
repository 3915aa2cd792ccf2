"""Labelled sequences on disk: bytes of all rows one after the other, memory-mapped, and where each begins.

Stored are symbols, 0 to 255; a token is its symbol + 1, so that token 0 is padding alone. A row is one
sequence, or two, where a pair is classified.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tnnlm.errors import DataError
from tnnlm.models.batches import LabelledBatch

PAD = 0
"""the token behind a sequence's end"""
SPLITS = ("train", "val", "test")


class Example(NamedTuple):
    """One row as it is read from its source."""

    parts: tuple[bytes, ...]
    """symbols of each sequence"""
    label: int


class LabelledRows(torch.utils.data.Dataset[LabelledBatch]):
    """The rows of one split, each padded or cut to ``length`` tokens. Stacked, they are a batch."""

    def __init__(self, folder: Path, split: str, length: int) -> None:
        self.length = length
        self._source = (folder, split)
        self.labels: NDArray[np.uint8] = np.load(folder / f"{split}.labels.npy")
        ends: NDArray[np.int64] = np.load(folder / f"{split}.ends.npy")
        self._bounds = np.concatenate([np.zeros(1, dtype=np.int64), ends])
        self.parts = len(ends) // max(1, len(self.labels))
        # An empty file can't be mapped.
        empty = np.empty(0, dtype=np.uint8)
        self._symbols = (
            np.memmap(folder / f"{split}.bin", dtype=np.uint8, mode="r") if self._bounds[-1] else empty
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> LabelledBatch:
        if not 0 <= index < len(self):
            raise IndexError(index)  # ends ``for row in rows``
        tokens = np.full((self.parts, self.length), PAD, dtype=np.int64)
        lengths = np.zeros(self.parts, dtype=np.int64)
        for part in range(self.parts):
            symbols = self.symbols(index, part)[: self.length]
            tokens[part, : len(symbols)] = symbols.astype(np.int64) + 1
            # A sequence without content is one pad: a mean over nothing is none.
            lengths[part] = max(1, len(symbols))
        if self.parts == 1:
            tokens, lengths = tokens[0], lengths[0]
        label = torch.tensor(int(self.labels[index]))
        return LabelledBatch(torch.from_numpy(tokens), torch.as_tensor(lengths), label)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the file's name: a loader process that is spawned maps it, and copies nothing."""
        return LabelledRows, (*self._source, self.length)

    def symbols(self, index: int, part: int = 0) -> NDArray[np.uint8]:
        """A sequence as it is stored, whole."""
        start, end = self._bounds[self.parts * index + part :][:2]
        return self._symbols[start:end]

    @property
    def majority(self) -> float:
        """Share of the commonest label: what a classifier reaches that reads nothing."""
        return float(np.bincount(self.labels).max() / len(self.labels))


def write_rows(folder: Path, split: str, examples: Iterable[Example], n_classes: int) -> int:
    """Write a split, row by row, and return how many there were.

    Raises:
        DataError: for a label out of range.
    """
    ends: list[int] = []
    labels: list[int] = []
    end = 0
    with (folder / f"{split}.bin").open("wb") as file:
        for example in examples:
            if not 0 <= example.label < n_classes:
                raise DataError(
                    f"row {len(labels) + 1} of {split}: label {example.label}, expected 0 to {n_classes - 1}"
                )
            for part in example.parts:
                file.write(part)
                end += len(part)
                ends.append(end)
            labels.append(example.label)
    np.save(folder / f"{split}.ends.npy", np.array(ends, dtype=np.int64))
    np.save(folder / f"{split}.labels.npy", np.array(labels, dtype=np.uint8))
    return len(labels)


class LabelledCorpus(NamedTuple):
    """All splits of a task on disk."""

    folder: Path
    rows: dict[str, int]
    """by split"""

    def split(self, name: str, length: int) -> LabelledRows:
        """The rows of one of ``SPLITS``."""
        return LabelledRows(self.folder, name, length)


def write_corpus(folder: Path, task: str, source: Iterator[tuple[str, Iterable[Example]]]) -> None:
    """Fill ``folder`` with the splits of a task of ``SEQUENCE_TASKS``."""
    counts = {
        name: write_rows(folder, name, examples, SEQUENCE_TASKS[task].n_classes) for name, examples in source
    }
    (folder / "meta.json").write_text(json.dumps({"task": task, "rows": counts}), encoding="utf-8")


def read_corpus(folder: Path) -> LabelledCorpus:
    """What :func:`write_corpus` left."""
    return LabelledCorpus(folder, json.loads((folder / "meta.json").read_text(encoding="utf-8"))["rows"])


class SequenceTask(NamedTuple):
    """What is classified."""

    n_classes: int
    n_symbols: int
    """tokens are 1 to this, 0 pads"""
    length: int
    """tokens of a sequence at the most, as published"""
    parts: int = 1
    """sequences per row: 2 where a pair is classified"""


SEQUENCE_TASKS = {
    "listops": SequenceTask(10, 15, 2_000),
    "text": SequenceTask(2, 256, 4_000),
    "retrieval": SequenceTask(2, 256, 4_000, parts=2),
    "image": SequenceTask(10, 256, 1_024),
    "pathfinder": SequenceTask(2, 256, 1_024),
    "pathx": SequenceTask(2, 256, 16_384),
}
"""of the Long Range Arena"""
