"""Chunks of long documents, which are tokenized in parallel, and batches of chunks.

Documents are read in parts, so that memory holds some chunks of a document of any size.
"""

from __future__ import annotations

import bisect
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from tnnlm.data.text import lines_in

CHUNK = 1 << 18
"""Characters per chunk of a long document; chunks are tokenized in parallel."""
CONTEXT = 256
"""Characters on each side of a seam that decide about it, and that are tokenized before the next chunk."""
TRIES = 64
"""Number of possible seams that are tried in each way."""
_LINE = re.compile(r"\n(?=\S)")
_SEAM = re.compile(r"\n(?=\S)|(?<=\S)(?= \S)")


class Encoder(Protocol):
    """Tokenizer, such as :class:`~tnnlm.tokenizer.TextTokenizer`."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of a text, and the first character and the end of each token."""


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
    ids: list[int] | None = None
    """Token ids of a chunk that ends inside of a word; None: they are those of ``encode(before + text)``."""
    cuts_word: bool = False
    """Whether the next chunk continues the last word."""

    @property
    def ends(self) -> bool:
        """Whether an end token follows."""
        return self.ends_document or self.ends_line


class Seam(NamedTuple):
    """End of the text before a chunk, and the number of its tokens."""

    before: str = ""
    tokens: int = 0


START = Seam()
"""Beginning of a document."""


class _Window:
    """Beginning of the rest of a document that is read in parts."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = iter(pieces)
        self.text = ""
        self.complete = False
        """Whether ``text`` is all of the rest."""

    def fill(self, size: int | None = None) -> str:
        """Return the rest, at least ``size`` characters of it, or all if ``size`` is None."""
        parts, n = [self.text], len(self.text)
        while not self.complete and (size is None or n < size):
            piece = next(self._pieces, None)
            if piece is None:
                self.complete = True
            else:
                parts.append(piece)
                n += len(piece)
        self.text = "".join(parts) if len(parts) > 1 else self.text
        return self.text

    def drop(self, size: int) -> None:
        """Remove the first ``size`` characters."""
        self.text = self.text[size:]


def chunks_of(documents: Iterable[Iterable[str]]) -> Iterator[Chunk]:
    """Yield documents in parts, with long ones split into chunks, where possible between lines."""
    for pieces in documents:
        window = _Window(pieces)
        while text := window.fill(4 * CHUNK):
            border = _LINE.search(text, CHUNK)
            stop = border.end() if border else len(text)
            yield Chunk(text[:stop], window.complete and stop == len(text))
            window.drop(stop)


def exact_chunks_of(
    documents: Iterable[Iterable[str]], tokenizer: Encoder, begun: Seam = START
) -> Iterator[Chunk]:
    """Yield documents, with long ones split into chunks that together have the tokens of the whole document.

    A chunk ends between two tokens that are the same with and without the text after it. The tokens of the
    next one are those after ``tokens_before`` in ``encode(before + text)``. Both rely on tokens depending on
    no more than ``CONTEXT`` characters before and after them.

    Chunks end before a line or a word if such a place is near, which no token of a tokenizer that splits text
    into words crosses. Otherwise they end between two tokens of the same word, where byte pair encoding is
    exact too: the first merge across the border between two tokens would depend on these two alone, and
    every pair of neighbours is inside of a text that was tokenized as a whole. A document without such a
    place is one chunk.

    Args:
        documents: Documents, each in parts.
        tokenizer: Tokenizer.
        begun: Seam that the first document begins after, if it is the rest of one.
    """
    for pieces in documents:
        window = _Window(pieces)
        while text := window.fill(2 * (CHUNK + CONTEXT)):
            cut = _cut(text, begun, window.complete, tokenizer)
            if cut is None:
                yield Chunk(window.fill(), True, *begun)
                break
            chunk, begun = cut
            yield chunk
            window.drop(len(chunk.text))
        begun = START


def _cut(text: str, begun: Seam, complete: bool, tokenizer: Encoder) -> tuple[Chunk, Seam] | None:
    """Return a chunk at the beginning of a text and the seam after it; None if the text has to stay whole."""
    for border in itertools.islice(_SEAM.finditer(text, CHUNK), TRIES):
        stop = border.end()
        if not complete and stop + CONTEXT > len(text):
            break
        before, after = text[stop - CONTEXT : stop], text[stop : stop + CONTEXT]
        tokens = tokenizer.encode(before)
        if tokenizer.encode(before + after)[: len(tokens)] == tokens:
            return Chunk(text[:stop], False, *begun), Seam(before, len(tokens))
    if complete and len(text) <= 2 * (CHUNK + CONTEXT):
        return None
    return _cut_inside_word(text, begun, tokenizer)


def _cut_inside_word(text: str, begun: Seam, tokenizer: Encoder) -> tuple[Chunk, Seam] | None:
    """Return a chunk that ends between two tokens, and the seam after it; None if there is no such place.

    The tokens before the seam are the first ones of the text with which the next chunk is tokenized.
    """
    whole = begun.before + text[: CHUNK + CONTEXT]
    rest = begun.before + text
    ids, spans = tokenizer.encode_spans(whole)
    last = len(whole) - CONTEXT
    # Tokens that share a character with the one before them don't begin at a border.
    borders = [0, *(i for i in range(1, len(ids)) if spans[i - 1][1] == spans[i][0] <= last)]
    starts = [spans[i][0] for i in borders] if ids else []
    for place in range(len(starts) - 1, max(0, len(starts) - 1 - TRIES), -1):
        i, stop = borders[place], starts[place]
        first = borders[min(bisect.bisect_left(starts, stop - CONTEXT), place - 1)]
        before = rest[spans[first][0] : stop]
        after = rest[stop : stop + CHUNK + CONTEXT]
        if i > begun.tokens and tokenizer.encode(before + after)[: i - first] == ids[first:i]:
            cuts_word = not whole[stop - 1].isspace() and not whole[stop].isspace()
            end = stop - len(begun.before)
            chunk = Chunk(text[:end], False, *begun, ids=ids[begun.tokens : i], cuts_word=cuts_word)
            return chunk, Seam(before, i - first)
    return None


def line_chunks_of(documents: Iterable[Iterable[str]], tokenizer: Encoder) -> Iterator[Chunk]:
    """Yield the lines of documents without surrounding white space, blank ones included, in exact chunks."""
    for pieces in documents:
        for line, last in lines_in(pieces):
            for chunk in exact_chunks_of([[line]], tokenizer) if line else (Chunk("", True),):
                ends = chunk.ends_document
                yield chunk._replace(ends_line=ends, ends_document=ends and last)


def batches_of(
    documents: Iterable[Iterable[str]], tokenizer: Encoder, begun: Seam = START
) -> Iterator[list[Chunk]]:
    """Yield batches of exact chunks of documents; two at once are large enough to keep all cores busy."""
    yield from _batches(exact_chunks_of(documents, tokenizer, begun))


def line_batches_of(
    documents: Iterable[Iterable[str]], tokenizer: Encoder, begun: Seam = START
) -> Iterator[list[Chunk]]:
    """Yield batches of exact chunks of lines, of the size of :func:`batches_of`."""
    assert begun == START
    yield from _batches(line_chunks_of(documents, tokenizer))


def _batches(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    characters = CHUNK * max(4, (os.cpu_count() or 1) // 2)
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
    """Text of chunks, or of a sample of them at equal distances, counted for the report of progress."""

    def __init__(self, chunks: Iterable[Chunk], share: float = 1.0) -> None:
        """Read the given share of ``chunks``."""
        self._chunks = chunks
        self._share = share
        self.characters = 0
        """Number of characters that were read so far."""
        self._read = False

    def __iter__(self) -> Iterator[str]:
        """Yield the text of each chunk of the sample."""
        for number, chunk in enumerate(self._chunks, 1):
            if int(number * self._share) > int((number - 1) * self._share):
                self.characters += len(chunk.text)
                yield chunk.text
        self._read = True

    def __str__(self) -> str:
        """Return how much was read, and whether that was all."""
        return f"{self.characters:,} characters read" + (", merging" if self._read else "")
