"""Chunks of long documents, which are tokenized in parallel, and batches of chunks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

CHUNK = 1 << 18
"""Characters per chunk of a long document; chunks are tokenized in parallel."""
_BORDER = re.compile(r"\n(?=\S)")


class Chunk(NamedTuple):
    """Document, or part of a long one."""

    text: str
    ends_document: bool


def chunks_of(texts: Iterable[str], characters: int = CHUNK) -> Iterator[Chunk]:
    """Yield documents, with long ones split into chunks that are tokenized in parallel.

    A chunk ends after a line break that is followed by a non-space character: no token of a byte-level BPE
    spans such a boundary, so the tokens are the same as without chunks.
    """
    for text in texts:
        start = 0
        while start < len(text):
            border = _BORDER.search(text, start + characters)
            stop = border.start() + 1 if border else len(text)
            yield Chunk(text[start:stop], stop == len(text))
            start = stop


def batches_of(texts: Iterable[str]) -> Iterator[list[Chunk]]:
    """Yield batches of chunks of about equal total length, large enough to keep all cores busy."""
    characters = CHUNK * max(4, os.cpu_count() or 1)
    batch: list[Chunk] = []
    size = 0
    for chunk in chunks_of(texts):
        batch.append(chunk)
        size += len(chunk.text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class CountedText:
    """Text of chunks, counted for the report of progress."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._chunks = chunks
        self._characters = 0
        self._read = False

    def __iter__(self) -> Iterator[str]:
        """Yield the text of each chunk."""
        for chunk in self._chunks:
            self._characters += len(chunk.text)
            yield chunk.text
        self._read = True

    def __str__(self) -> str:
        """Return how much was read, and whether that was all."""
        return f"{self._characters:,} characters read" + (", merging" if self._read else "")
