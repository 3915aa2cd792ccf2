"""Labelled sequences on disk: the concatenated bytes of all rows, memory-mapped, with offsets and labels.

The files contain symbols, 0 to 255; the token of a symbol is its number plus one, and token 0 is padding. A
row is one sequence, or two for tasks that classify pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tnnlm.checksums import list_files
from tnnlm.data.prepared import open_prepared, write_meta
from tnnlm.data.report import DataReport, SplitInfo
from tnnlm.data.text import TextHash
from tnnlm.errors import DataError
from tnnlm.models.batches import LabelledBatch

PAD = 0
"""Padding token id."""
SPLITS = ("train", "val", "test")


class Example(NamedTuple):
    """Labelled row of a source."""

    parts: tuple[bytes, ...]
    """Symbols of each sequence: one, or two for a pair."""
    label: int
    """Class index."""


class LabelledRows(torch.utils.data.Dataset[LabelledBatch]):
    """Map-style data set of one split, with sequences padded or truncated to ``length`` tokens."""

    def __init__(self, folder: Path, split: str, length: int) -> None:
        self.length = length
        self._source = (folder, split)
        self.labels: NDArray[np.uint8] = np.load(folder / f"{split}.labels.npy")
        ends: NDArray[np.int64] = np.load(folder / f"{split}.ends.npy")
        self._bounds = np.concatenate([np.zeros(1, dtype=np.int64), ends])
        self.parts = len(ends) // max(1, len(self.labels))
        # An empty file can't be memory-mapped.
        empty = np.empty(0, dtype=np.uint8)
        self._symbols = (
            np.memmap(folder / f"{split}.bin", dtype=np.uint8, mode="r") if self._bounds[-1] else empty
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> LabelledBatch:
        if not 0 <= index < len(self):
            raise IndexError(index)  # required to end ``for row in rows``
        tokens = np.full((self.parts, self.length), PAD, dtype=np.int64)
        lengths = np.zeros(self.parts, dtype=np.int64)
        for part in range(self.parts):
            symbols = self.symbols(index, part)[: self.length]
            tokens[part, : len(symbols)] = symbols.astype(np.int64) + 1
            # An empty sequence counts one padding token, so that mean pooling doesn't divide by zero.
            lengths[part] = max(1, len(symbols))
        if self.parts == 1:
            tokens, lengths = tokens[0], lengths[0]
        label = torch.tensor(int(self.labels[index]))
        return LabelledBatch(torch.from_numpy(tokens), torch.as_tensor(lengths), label)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by file name, so that spawned loader workers memory-map the files again."""
        return LabelledRows, (*self._source, self.length)

    def symbols(self, index: int, part: int = 0) -> NDArray[np.uint8]:
        """Return the symbols of a stored sequence, neither padded nor truncated."""
        start, end = self._bounds[self.parts * index + part :][:2]
        return self._symbols[start:end]

    @property
    def majority(self) -> float:
        """Fraction of the most frequent label: the accuracy of the majority-class baseline."""
        return float(np.bincount(self.labels).max() / len(self.labels))


class SeenRows:
    """Rows that were written so far, to count repetitions."""

    def __init__(self) -> None:
        self.duplicates = 0
        """Rows that equal an earlier one of any split."""
        self.shared = 0
        """Rows of another split that equal a row of the training split."""
        self._splits: dict[bytes, str] = {}

    def add(self, digest: bytes, split: str) -> None:
        """Count a row of a split, given the hash of its sequences."""
        first = self._splits.setdefault(digest, "")
        self.duplicates += first != ""
        self.shared += first == "train" != split
        self._splits[digest] = first or split


def write_rows(
    folder: Path, split: str, examples: Iterable[Example], n_classes: int, seen: SeenRows
) -> SplitInfo:
    """Write a split row by row, and return its sizes and hash; a symbol counts as a token and a byte.

    Args:
        folder: Folder of the corpus.
        split: Name of the split.
        examples: Rows of the split.
        n_classes: Number of classes; labels are 0 to ``n_classes - 1``.
        seen: Rows of the splits before; updated in place.

    Raises:
        DataError: If a label is out of range.
    """
    ends: list[int] = []
    labels: list[int] = []
    end = 0
    content = TextHash()
    with (folder / f"{split}.bin").open("wb") as file:
        for example in examples:
            if not 0 <= example.label < n_classes:
                raise DataError(
                    f"row {len(labels) + 1} of {split}: label {example.label}, expected 0 to {n_classes - 1}"
                )
            row = hashlib.sha256()
            for part in example.parts:
                row.update(len(part).to_bytes(8, "big") + part)
                file.write(part)
                end += len(part)
                ends.append(end)
            labels.append(example.label)
            seen.add(row.digest()[:16], split)
            content.add(row.digest() + bytes([example.label]), ends_document=True)
    np.save(folder / f"{split}.ends.npy", np.array(ends, dtype=np.int64))
    np.save(folder / f"{split}.labels.npy", np.array(labels, dtype=np.uint8))
    return SplitInfo(len(labels), end, end, content.value)


class LabelledCorpus(NamedTuple):
    """All splits of a classification task on disk."""

    folder: Path
    report: DataReport

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows by split."""
        return {name: info.documents for name, info in self.report.splits.items()}

    def split(self, name: str, length: int) -> LabelledRows:
        """Return the data set of one of ``SPLITS``, with ``length`` tokens per sequence."""
        return LabelledRows(self.folder, name, length)


def write_corpus(
    folder: Path, key: str, task: str, source: Iterator[tuple[str, Iterable[Example]]], report: DataReport
) -> None:
    """Write all splits of a task of ``SEQUENCE_TASKS`` to ``folder``, and the report with their sizes.

    Args:
        folder: Folder to write to.
        key: Name of the folder when it is complete.
        task: Name of the task.
        source: Name and rows of each split.
        report: Report without the sizes of the splits.
    """
    seen, classes = SeenRows(), SEQUENCE_TASKS[task].n_classes
    splits = {name: write_rows(folder, name, examples, classes, seen) for name, examples in source}
    report = replace(
        report,
        documents=sum(info.documents for info in splits.values()),
        dropped=dict(report.dropped),
        duplicates=seen.duplicates,
        shared=seen.shared,
        splits=splits,
    )
    names = sorted(path.name for path in folder.iterdir())
    write_meta(folder, key, {"task": task, **report.to_dict()}, list_files(folder, names))


def read_corpus(folder: Path) -> LabelledCorpus:
    """Open a corpus that :func:`write_corpus` wrote.

    Raises:
        DataError: If a file of it is damaged.
    """
    return open_prepared(folder, lambda meta: LabelledCorpus(folder, DataReport.from_dict(meta)))


class SequenceTask(NamedTuple):
    """Properties of a classification task."""

    n_classes: int
    """Number of classes."""
    n_symbols: int
    """Number of symbols; tokens are 1 to ``n_symbols``, and 0 is padding."""
    length: int
    """Maximum sequence length in tokens, as published."""
    parts: int = 1
    """Number of sequences per row: 2 for tasks that classify pairs."""


SEQUENCE_TASKS = {
    "listops": SequenceTask(10, 15, 2_000),
    "text": SequenceTask(2, 256, 4_000),
    "retrieval": SequenceTask(2, 256, 4_000, parts=2),
    "image": SequenceTask(10, 256, 1_024),
    "pathfinder": SequenceTask(2, 256, 1_024),
    "pathx": SequenceTask(2, 256, 16_384),
}
"""Tasks of the Long Range Arena (arXiv 2011.04006), by name."""
