"""Chunks of long documents, which are tokenized in parallel, and batches of chunks."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

from tnnlm.data.text import lines_of

CHUNK = 1 << 18
"""Characters per chunk of a long document; chunks are tokenized in parallel."""
CONTEXT = 256
"""Characters on each side of a seam that decide about it, and that are tokenized before the next chunk."""
TRIES = 64
"""Number of possible seams that are tried before the rest of a document becomes a single chunk."""
_LINE = re.compile(r"\n(?=\S)")
_SEAM = re.compile(r"\n(?=\S)|(?<=\S)(?= \S)")

Encode: TypeAlias = Callable[[str], list[int]]


class Chunk(NamedTuple):
    """Document, or part of a long one."""

    text: str
    ends_document: bool
    before: str = ""
    """End of the text before this chunk, which is tokenized with it: tokenizers may add a space at the
    beginning of a text."""
    tokens_before: int = 0
    """Number of tokens of ``before``, which belong to the chunk before."""
    ends_line: bool = False
    """Whether a line ends here that an end token follows, as with the protocol ``fairseq``."""

    @property
    def ends(self) -> bool:
        """Whether an end token follows."""
        return self.ends_document or self.ends_line


def chunks_of(texts: Iterable[str]) -> Iterator[Chunk]:
    """Yield documents, with long ones split into chunks at line breaks before a non-space character."""
    for text in texts:
        start = 0
        while start < len(text):
            border = _LINE.search(text, start + CHUNK)
            stop = border.end() if border else len(text)
            yield Chunk(text[start:stop], stop == len(text))
            start = stop


def exact_chunks_of(texts: Iterable[str], encode: Encode) -> Iterator[Chunk]:
    """Yield documents, with long ones split into chunks that together have the tokens of the whole document.

    A chunk ends between two tokens that are the same with and without the text after it. The tokens of the
    next one are those after ``tokens_before`` in ``encode(before + text)``. Both rely on tokens depending on
    no more than ``CONTEXT`` characters before and after them. A document without such a seam is one chunk.

    Args:
        ``texts``: Documents.
        encode: Function that returns the tokens of a text.
    """
    for text in texts:
        start, before, known = 0, "", 0
        while start < len(text):
            stop, tokens = _seam(text, start + CHUNK, encode)
            yield Chunk(text[start:stop], stop == len(text), before, known)
            start, before, known = stop, text[max(0, stop - CONTEXT) : stop], tokens


def _seam(text: str, position: int, encode: Encode) -> tuple[int, int]:
    """Return the first seam from a position on, or the end, and the number of tokens of the text before."""
    for border in itertools.islice(_SEAM.finditer(text, position), TRIES):
        stop = border.end()
        before, after = text[max(0, stop - CONTEXT) : stop], text[stop : stop + CONTEXT]
        tokens = encode(before)
        if encode(before + after)[: len(tokens)] == tokens:
            return stop, len(tokens)
    return len(text), 0


def line_chunks_of(texts: Iterable[str], encode: Encode) -> Iterator[Chunk]:
    """Yield the lines of documents without surrounding white space, blank ones included, in exact chunks."""
    for text in texts:
        lines = lines_of(text)
        for index, line in enumerate(lines):
            last = index == len(lines) - 1
            for chunk in exact_chunks_of([line], encode) if line else (Chunk("", True),):
                ends = chunk.ends_document
                yield chunk._replace(ends_line=ends, ends_document=ends and last)


def batches_of(texts: Iterable[str], encode: Encode) -> Iterator[list[Chunk]]:
    """Yield batches of exact chunks of documents, large enough to keep all cores busy."""
    yield from _batches(exact_chunks_of(texts, encode))


def line_batches_of(texts: Iterable[str], encode: Encode) -> Iterator[list[Chunk]]:
    """Yield batches of exact chunks of lines, large enough to keep all cores busy."""
    yield from _batches(line_chunks_of(texts, encode))


def _batches(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    characters = CHUNK * max(4, os.cpu_count() or 1)
    batch: list[Chunk] = []
    size = 0
    for chunk in chunks:
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
