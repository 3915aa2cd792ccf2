"""Text files in parts of bounded size: decoding, normalisation, and separators between documents."""

from __future__ import annotations

import codecs
import io
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from tnnlm.data.file_types import opened, suffix_of
from tnnlm.data.stored_texts import PIECE
from tnnlm.data.text import MARK, Tally, normalized
from tnnlm.errors import DataError


def text_pieces(path: Path, tally: Tally, normalize: bool) -> Iterator[str]:
    """Yield the text of a file in parts, normalised if requested.

    Counts what is normalised in ``tally``. Python source may have another encoding than UTF-8.

    Raises:
        DataError: If the file is binary, damaged, or not UTF-8.
    """
    with opened(path) as file:
        if suffix_of(path) == ".py":
            pieces: Iterator[str] = iter([_source(path, file.read(), tally)])
        else:
            pieces = _decoded(path, file)
        yield from (_normalized if normalize else _without_signature)(pieces, tally)


def split_documents(pieces: Iterable[str], separator: str) -> Iterator[Iterator[str]]:
    """Yield each document of a text as an iterator of parts, which has to be read to its end.

    Args:
        ``pieces``: Text in parts.
        separator: Text between documents, which belongs to none of them.
    """
    source, text, start, done = iter(pieces), "", 0, False

    def document() -> Iterator[str]:
        nonlocal text, start, done
        while (at := text.find(separator, start)) < 0:
            # The beginning of a separator may be at the end of the part.
            stop = max(start, len(text) - len(separator) + 1)
            yield text[start:stop]
            following = next(source, None)
            if following is None:
                done = True
                yield text[stop:]
                return
            text, start = text[stop:] + following, 0
        yield text[start:at]
        start = at + len(separator)

    while not done:
        yield document()


def _decoded(path: Path, file: BinaryIO) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    while True:
        data = file.read(PIECE)
        if b"\0" in data:
            raise DataError(f"{path}: is not text (zero byte at {done + data.index(0)})")
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8 text (byte {done - pending + error.start})") from None
        if text:
            yield text
        if not data:
            return
        done += len(data)


def _source(path: Path, data: bytes, tally: Tally) -> str:
    """Return Python source, decoded by the encoding that it declares (PEP 263) if it isn't UTF-8."""
    if b"\0" in data:
        raise DataError(f"{path}: is not text (zero byte at {data.index(0)})")
    try:
        return data.decode()
    except UnicodeDecodeError:
        pass
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        encoding, text = "iso-8859-1", data.decode("latin-1")
    tally.encodings[encoding] += 1
    return text


def _normalized(pieces: Iterator[str], tally: Tally) -> Iterator[str]:
    held = ""
    for piece in pieces:
        text = held + piece
        held = "\r" if text.endswith("\r") else ""  # A line feed may follow in the next part.
        text = text.removesuffix(held)
        tally.count_changes(text)
        yield normalized(text)
    if held:
        tally.count_changes(held)
        yield normalized(held)


def _without_signature(pieces: Iterator[str], tally: Tally) -> Iterator[str]:
    """Yield the text without the mark at its very start: a signature of the encoding, no part of the text."""
    first = next(pieces, "")
    if first.startswith(MARK):
        tally.normalized["byte order marks"] += 1
        first = first[1:]
    yield first
    yield from pieces
