"""Documents in one UTF-8 file on disk, which are written, split and read in parts of bounded size.

A document may be larger than memory. Memory holds only its place, length and hash, about 40 bytes.
"""

from __future__ import annotations

import codecs
import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

PIECE = 1 << 20
"""Bytes that are read at a time."""
_PLACES = 1 << 16
"""Documents whose places are converted to integers of Python at a time."""
_CONTINUATION = 0x80
"""First two bits of the bytes of a character after its first one."""


@dataclass(frozen=True, eq=False)
class StoredTexts(Sequence[str]):
    """Sequence of documents that are ranges of bytes of one file."""

    path: Path
    starts: NDArray[np.int64]
    """First byte of each document, (n,)."""
    stops: NDArray[np.int64]
    """End of each document in bytes, (n,)."""
    size: int
    """Total number of characters."""

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> StoredTexts: ...
    def __getitem__(self, index: int | slice) -> str | StoredTexts:
        """Return one document, or a lazy slice of them, which keeps the ``size`` of the full sequence."""
        if isinstance(index, slice):
            return replace(self, starts=self.starts[index], stops=self.stops[index])
        index = range(len(self))[index]
        with self.path.open("rb", buffering=0) as file:
            return "".join(read_text(file, int(self.starts[index]), int(self.stops[index])))

    def __iter__(self) -> Iterator[str]:
        return map("".join, self.pieces())

    def pieces(self, first: int = 0, skipped: int = 0) -> Iterator[Iterator[str]]:
        """Yield each document from number ``first`` on as an iterator of parts, to be read in this order.

        Args:
            first: Number of the first document.
            skipped: Number of bytes of the first document that are skipped.
        """
        with self.path.open("rb", buffering=PIECE) as file:
            for i in range(first, len(self), _PLACES):
                some = slice(i, i + _PLACES)
                for start, stop in zip(self.starts[some].tolist(), self.stops[some].tolist(), strict=True):
                    yield read_text(file, start + skipped, stop)
                    skipped = 0

    def beginning(self, index: int, characters: int) -> str:
        """Return the first ``characters`` of a document."""
        with self.path.open("rb", buffering=0) as file:
            start = int(self.starts[index])
            stop = min(int(self.stops[index]), start + 4 * characters)
            return "".join(read_text(file, start, stop))[:characters]

    def cut(self, lengths: NDArray[np.int64], fraction: float) -> tuple[StoredTexts, StoredTexts]:
        """Return the beginnings of the documents, and the last ``fraction`` of each; empty ones are omitted.

        Args:
            lengths: Length of each document in characters, (n,).
            fraction: Fraction of the characters of each document that its end has.
        """
        with self.path.open("rb", buffering=0) as file:
            places = zip(self.starts.tolist(), self.stops.tolist(), lengths.tolist(), strict=True)
            borders = [_border(file, start, stop, n, fraction) for start, stop, n in places]
        at = np.array([byte for byte, _ in borders], np.int64)
        kept = sum(character for _, character in borders)
        parts = (self.starts, at, kept), (at, self.stops, int(lengths.sum()) - kept)
        first, last = (
            StoredTexts(self.path, starts[starts < stops], stops[starts < stops], size)
            for starts, stops, size in parts
        )
        return first, last


def characters_of(texts: Sequence[str]) -> int:
    """Return the number of characters of documents, which those on disk know."""
    known = getattr(texts, "size", None)
    return sum(map(len, texts)) if known is None else int(known)


def documents_of(texts: Sequence[str], first: int = 0, skipped: int = 0) -> Iterator[Iterator[str]]:
    """Yield documents as iterators of parts, see :meth:`StoredTexts.pieces`, whatever holds them."""
    if isinstance(texts, StoredTexts):
        yield from texts.pieces(first, skipped)
        return
    for text in texts[first:]:
        rest = text.encode("utf-8", "surrogatepass")[skipped:] if skipped else None
        yield iter([text if rest is None else rest.decode("utf-8", "surrogatepass")])
        skipped = 0


def bytes_before(texts: Sequence[str], index: int, size: int) -> Iterator[bytes]:
    """Yield the first ``size`` bytes of a document in parts."""
    documents = documents_of(texts, index)  # The first one is read while this iterator is open.
    for piece in next(documents) if size else ():
        data = piece.encode("utf-8", "surrogatepass")[:size]
        size -= len(data)
        yield data
        if not size:
            return


def read_text(file: BinaryIO, start: int, stop: int) -> Iterator[str]:
    """Yield the text of a range of bytes in parts; a character that ``stop`` cuts apart is omitted."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
    for data in read_range(file, start, stop):
        if text := decoder.decode(data):
            yield text


def read_range(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """Yield a range of bytes of a file in parts."""
    while start < stop:
        file.seek(start)
        data = file.read(min(PIECE, stop - start))
        if not data:
            return
        start += len(data)
        yield data


def _border(file: BinaryIO, start: int, stop: int, n: int, fraction: float) -> tuple[int, int]:
    """Return where the last ``fraction`` of a document begins, in bytes of the file and in characters.

    It is the last line break before that place, unless that halves the beginning.
    """
    at = round(n * (1 - fraction))
    line = (start, 0)
    done = 0
    for data in read_range(file, start, stop):
        begins = (np.frombuffer(data, np.uint8) & 0xC0) != _CONTINUATION
        left, n_begins = at - done, int(np.count_nonzero(begins))
        border = int(np.flatnonzero(begins)[left]) if left < n_begins else len(data)
        if (end := data.rfind(b"\n", 0, border) + 1) > 0:
            line = start + end, done + int(np.count_nonzero(begins[:end]))
        if left < n_begins:
            return line if line[1] > at / 2 else (start + border, at)
        done += n_begins
        start += len(data)
    return line if line[1] > at / 2 else (stop, n)


class TextWriter:
    """Writer of documents to one file, part by part, which measures and hashes them."""

    def __init__(self, path: Path, seed: int) -> None:
        """Write to ``path``; ``seed`` is that of :func:`~tnnlm.data.text.text_hash`."""
        self._path = path
        self._file = path.open("wb", buffering=PIECE)
        self._seed = seed
        self._starts, self._stops, self._lengths = array("q"), array("q"), array("q")
        self._hashes = bytearray()

    def __enter__(self) -> TextWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, pieces: Iterable[str], blank: bool = False) -> bool:
        """Write a document unless it has only white space; return whether it was written.

        With ``blank``, white space is written too; its hash is zero.
        """
        start = stop = self._stops[-1] if self._stops else 0
        length, has_text, sha256 = 0, False, hashlib.sha256(f"{self._seed}:".encode())
        for piece in pieces:
            data = piece.encode("utf-8", "surrogatepass")
            has_text = has_text or bool(piece and not piece.isspace())
            sha256.update(data)
            self._file.write(data)
            length, stop = length + len(piece), stop + len(data)
        if not (has_text or blank):
            self._file.seek(start)
            self._file.truncate()
            return False
        for column, value in ((self._starts, start), (self._stops, stop), (self._lengths, length)):
            column.append(value)
        self._hashes += sha256.digest()[:16] if has_text else bytes(16)
        return True

    @property
    def has_text(self) -> bool:
        """Whether a document with more than white space was written."""
        return any(self._hashes)

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return place, length in characters and hash of each document, (n,) each."""
        return {
            "starts": np.array(self._starts, np.int64),
            "stops": np.array(self._stops, np.int64),
            "lengths": np.array(self._lengths, np.int64),
            "hashes": np.frombuffer(bytes(self._hashes), "S16"),
        }
