"""Long documents in pieces, which are tokenized in parallel, and batches of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PIECE = 1 << 18
"""Characters per chunk of a long document; chunks are tokenized in parallel."""
_BORDER = re.compile(r"\n(?=\S)")


class Piece(NamedTuple):
    """Document, or part of a long one."""

    text: str
    ends_document: bool


def pieces_of(texts: Iterable[str], characters: int = PIECE) -> Iterator[Piece]:
    """Yield documents, with long ones split into chunks that are tokenized in parallel.

    A chunk ends after a line break that is followed by a non-space character: no token of a byte-level BPE
    spans such a boundary, so the tokens are the same as without chunks.
    """
    for text in texts:
        start = 0
        while start < len(text):
            border = _BORDER.search(text, start + characters)
            stop = border.start() + 1 if border else len(text)
            yield Piece(text[start:stop], stop == len(text))
            start = stop


def batches_of(texts: Iterable[str]) -> Iterator[list[Piece]]:
    """Yield batches of chunks of about equal total length, large enough to keep all cores busy."""
    characters = PIECE * max(4, os.cpu_count() or 1)
    batch: list[Piece] = []
    size = 0
    for piece in pieces_of(texts):
        batch.append(piece)
        size += len(piece.text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class CountedText:
    """Text of pieces, counted for the report of progress."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = pieces
        self._characters = 0
        self._read = False

    def __iter__(self) -> Iterator[str]:
        """Yield the text of each piece."""
        for piece in self._pieces:
            self._characters += len(piece.text)
            yield piece.text
        self._read = True

    def __str__(self) -> str:
        """Return how much was read, and whether that was all."""
        return f"{self._characters:,} characters read" + (", merging" if self._read else "")
