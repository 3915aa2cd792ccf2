"""Tokens of conversations on disk, and the data sets of rows that training and validation read from them.

A split is one stream of tokens: each conversation, and an end token after it. A second file tells of each
token whether it is part of an answer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tnnlm.data.token_files import Layout
from tnnlm.files import flush_to_disk
from tnnlm.models.batches import PADDING, AnswerBatch, inputs_of, unscored

WIDTH = 32
"""Multiple to which the number of inputs of a batch is padded, so that few different sizes occur."""
_KINDS = ("tokens", "answers", "lengths")


def stored_files(split: str) -> list[str]:
    """Return the names of the files of a split: tokens, marks of answers, and lengths of conversations."""
    return [f"{split}.{kind}" for kind in _KINDS]


def write_conversations(
    folder: Path,
    split: str,
    layout: Layout,
    conversations: Iterator[tuple[list[int], list[bool]]],
    eos_id: int,
) -> int:
    """Write a split, and return its number of tokens with those between conversations.

    Args:
        folder: Folder of the files.
        split: Name of the split, "train" or "val".
        layout: Type of the token ids.
        conversations: Token ids of each conversation, and whether each is part of an answer.
        eos_id: End token, which is written after each conversation.
    """
    tokens, answers, lengths = (folder / name for name in stored_files(split))
    total = 0
    with tokens.open("wb") as ids, answers.open("wb") as marks, lengths.open("wb") as sizes:
        for row, scored in conversations:
            ids.write(np.array([*row, eos_id], layout.dtype).tobytes())
            marks.write(np.array([*scored, False], np.uint8).tobytes())
            sizes.write(np.array([len(row)], "<u4").tobytes())
            total += len(row) + 1
    for path in (tokens, answers, lengths):
        flush_to_disk(path)
    return total


class AnswerRows(torch.utils.data.Dataset[Any]):
    """Map-style data set of rows of token ids (L + 1,), of which those that are no answers are unscored.

    They are encoded by :func:`~tnnlm.models.batches.unscored`, and of different lengths. A pair (row,
    divisor) as index returns a pair (tokens, divisor), for :func:`collate_answers`.

    Args:
        folder: Folder of the files.
        split: Name of the split.
        layout: Type of the token ids.
        length: Largest number of inputs of a row. Of a longer conversation, the beginning is used.
        packed: Cut the stream of all conversations into rows of this length, so that a row may begin and end
            inside of conversations.
    """

    def __init__(self, folder: Path, split: str, layout: Layout, length: int, packed: bool = False) -> None:
        self._folder = folder
        self._split = split
        self._dtype = layout.dtype
        self.length = length
        sizes = np.fromfile(folder / f"{split}.lengths", "<u4").astype(np.int64)
        first = np.concatenate([[0], np.cumsum(sizes + 1)])
        if packed:
            starts = np.arange(0, max(0, first[-1] - length), length)
            ends = starts + length + 1
        else:
            starts, ends = first[:-1], first[:-1] + np.minimum(sizes, length + 1)
        answers = self._answers_between(starts + 1, ends)
        kept = answers > 0
        self.n_cut = 0 if packed else int((kept & (sizes > length + 1)).sum())
        """Number of conversations that are cut."""
        self.n_skipped = 0 if packed else int((~kept).sum())
        """Number of conversations without an answer in their first L + 1 tokens."""
        self._starts, self._ends, self.answers = starts[kept], ends[kept], answers[kept]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Number of inputs of each row."""
        return self._ends - self._starts - 1

    def by_length(self, max_tokens: int | None = None, longer_than: int = 0) -> AnswerRows:
        """Return rows in order of their length.

        Args:
            max_tokens: Maximum number of inputs of all rows together; None for all rows.
            longer_than: Number of inputs that each row exceeds.
        """
        sizes = self.sizes
        chosen = np.flatnonzero(sizes > longer_than)
        if max_tokens is not None:
            chosen = chosen[np.cumsum(sizes[chosen]) <= max_tokens]
        chosen = chosen[np.argsort(sizes[chosen], kind="stable")]
        found = copy.copy(self)
        found._starts, found._ends = self._starts[chosen], self._ends[chosen]
        found.answers = self.answers[chosen]
        return found

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int | tuple[int, float]) -> torch.Tensor | tuple[torch.Tensor, float]:
        if isinstance(index, tuple):
            return self._row(index[0]), index[1]
        if not 0 <= index < len(self):
            raise IndexError(index)  # required to end ``for row in rows``
        return self._row(index)

    def __getstate__(self) -> dict[str, Any]:
        # Spawned loader processes map the files again.
        return {key: value for key, value in self.__dict__.items() if key != "_files"}

    @cached_property
    def _files(self) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        def mapped(kind: str, dtype: str) -> NDArray[Any]:
            path = self._folder / f"{self._split}.{kind}"
            return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)

        return mapped("tokens", self._dtype), mapped("answers", "u1")

    def _row(self, index: int) -> torch.Tensor:
        tokens, answers = self._files
        part = slice(self._starts[index], self._ends[index])
        row = torch.from_numpy(tokens[part].astype(np.int64))
        scored = torch.from_numpy(answers[part].astype(bool))
        scored[0] = False
        return row.where(scored, unscored(row))

    def _answers_between(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of answer tokens in each range; ranges may be empty, and ascend."""
        marks = self._files[1]
        # The last token of the stream is no answer, so that a range may as well end before it.
        pairs = np.minimum(np.stack([starts, ends], 1), len(marks) - 1).ravel()
        return np.where(ends > starts, np.add.reduceat(marks, pairs, dtype=np.int64)[::2], 0)


def collate_answers(length: int, rows: Sequence[Any]) -> AnswerBatch:
    """Return a batch of rows, padded to the longest of them.

    Args:
        length: Largest number of inputs of a row.
        rows: Rows of :class:`AnswerRows`, or pairs of a row and the divisor of the batch.
    """
    divisor = rows[0][1] if isinstance(rows[0], tuple) else None
    tokens = [row[0] if isinstance(row, tuple) else row for row in rows]
    inputs = max(len(row) for row in tokens) - 1
    width = max(inputs, min(length, -(-inputs // WIDTH) * WIDTH)) + 1
    padded = torch.stack(
        [torch.nn.functional.pad(row, (0, width - len(row)), value=PADDING) for row in tokens]
    )
    return AnswerBatch(inputs_of(padded), padded[:, 1:] >= 0, divisor)


class PaddedRows(torch.utils.data.Dataset[torch.Tensor]):
    """Map-style data set of rows (L + 1,) that are all padded to one length, for evaluations."""

    def __init__(self, rows: AnswerRows, length: int) -> None:
        self._rows = rows
        self._length = length

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        row = self._rows[index]
        assert isinstance(row, torch.Tensor)
        return torch.nn.functional.pad(row, (0, self._length + 1 - len(row)), value=PADDING)
