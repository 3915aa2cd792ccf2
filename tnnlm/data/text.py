"""Documents as text: cells of tables, normalisation, hashes, and counts of what was dropped or changed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tnnlm.config.values import one_line
from tnnlm.errors import DataError

MARK = "\ufeff"
"""Byte order mark: a signature at the start of a file, which joining files leaves inside the text."""
_MARKS = bytes(ord(" ") if chr(byte).isspace() else ord("x") for byte in range(256))
"""Space for each byte of ASCII that is white space, else x."""
_LISTED = 10
"""Number of columns that an error lists."""
NULL, BLANK = "null", "blank"
"""Reasons to drop a row: it has no text (or lacks the column), or only white space."""


@dataclass
class Tally:
    """Counts of the documents that were read; addition joins two parts of a data set."""

    documents: int = 0
    """Documents that were kept."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Dropped rows by reason."""
    normalized: Counter[str] = field(default_factory=Counter)
    """Changed or removed characters by kind."""
    encodings: Counter[str] = field(default_factory=Counter)
    """Files that are not UTF-8, by encoding."""

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Tally:
        """Return the counts that :meth:`to_dict` returned."""
        return cls(
            found["documents"], *(Counter(found[key]) for key in ("dropped", "normalized", "encodings"))
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain values, for JSON."""
        return {
            name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()
        }

    def __add__(self, other: Tally) -> Tally:
        """Return the sum of both counts."""
        return Tally(
            self.documents + other.documents,
            self.dropped + other.dropped,
            self.normalized + other.normalized,
            self.encodings + other.encodings,
        )

    def keep(self, text: str | None, normalize: bool, blank: bool = False) -> str | None:
        """Count a document and return its text, normalised if requested, or None if it has no text.

        With ``blank``, a document of white space is kept: it is an empty line of the text.
        """
        if text is None:
            self.dropped[NULL] += 1
            return None
        changed = normalized(text) if normalize else text
        if not blank and not changed.strip():
            self.dropped[BLANK] += 1
            return None
        if changed is not text:
            self.count_changes(text)
        self.documents += 1
        return changed

    def count_changes(self, text: str) -> None:
        """Count the characters of a text that its normalisation changes or removes."""
        for kind, character in (("carriage returns", "\r"), ("byte order marks", MARK)):
            if number := text.count(character):
                self.normalized[kind] += number


def normalized(text: str) -> str:
    r"""Return the text with the line ends ``\r\n`` and ``\r`` as ``\n``, and without byte order marks."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.replace(MARK, "") if MARK in text else text


def lines_of(text: str) -> list[str]:
    """Return the lines of a text without surrounding white space; a text without line end is one line."""
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def lines_in(pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield the lines of a text in parts, as :func:`lines_of`, each with whether it is the last one."""
    rest, before = "", None
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            if before is not None:
                yield before, False
            before = line.strip()
    if rest or before is None:
        if before is not None:
            yield before, False
        before = rest.strip()
    yield before, True


def words_in(text: str, ends: bool) -> int:
    """Return the number of words, separated by white space, and of line ends, as in WikiText's perplexities.

    Args:
        text: Text, or a part of one that is cut between words.
        ends: Whether the text ends here; an end without a line end counts as one.
    """
    if text.isascii():  # Counted several times faster than by a list of all words.
        marks = text.encode().translate(_MARKS)
        words = marks.count(b" x") + marks.startswith(b"x")
    else:
        words = len(text.split())
    return words + text.count("\n") + (ends and not text.endswith("\n"))


def text_of(cell: Any, column: str, where: str) -> str | None:
    """Return the string in a table cell, or None if the cell is null.

    Raises:
        DataError: If the cell contains something other than a string.
    """
    if cell is not None and not isinstance(cell, str):
        raise DataError(
            f"{where}: column {column!r} is not text but {type(cell).__name__}",
            "select the text column with data.text_column=...",
        )
    return cell


def text_hash(seed: int, text: str) -> bytes:
    """Return the first 16 bytes of the SHA-256 hash of seed and document.

    The order of the hashes determines the validation split; 16 bytes are enough to tell documents apart.
    """
    return hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()[:16]


class TextHash:
    """SHA-256 hash of a sequence of documents, which can be continued from an intermediate value."""

    def __init__(self, so_far: str = "") -> None:
        self.value = so_far
        """Hash of the documents that have ended."""
        self._document = hashlib.sha256()

    def add(self, encoded: bytes, ends_document: bool) -> None:
        """Add the next bytes of the current document."""
        self._document.update(encoded)
        if ends_document:
            self.value = hashlib.sha256(bytes.fromhex(self.value) + self._document.digest()).hexdigest()
            self._document = hashlib.sha256()


def count(number: int, unit: str) -> str:
    """Return a number with its unit, in the plural unless it is one."""
    return f"{number:,} {unit}" if number == 1 else f"{number:,} {unit}s"


def listed(names: Iterable[str]) -> str:
    """Return the first names of columns, shortened, for an error message: a file may have any."""
    found = list(names)
    more = [f"... ({len(found):,} in all)"] if len(found) > _LISTED else []
    return ", ".join([*map(one_line, found[:_LISTED]), *more]) or "none"


def shown(counts: Iterable[tuple[str, int]]) -> str:
    """Return counts by kind as a list, such as ``25 null, 3 blank``."""
    return ", ".join(f"{number:,} {kind}" for kind, number in counts)
