"""Train/validation split by document, determined only by the seed and the documents' contents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tnnlm.data.document_file import StoredDocuments
from tnnlm.data.report import DataReport
from tnnlm.errors import DataError

FEW_DOCUMENTS = 10
"""Minimum number of documents for a split by document; with fewer, the end of each document is held out."""


@dataclass(frozen=True)
class Corpus:
    """Documents of the training and validation splits."""

    train: Sequence[str]
    val: Sequence[str]
    report: DataReport = field(default_factory=DataReport)
    """Report of the data set, without the splits, which are counted during tokenization."""


def hold_out(
    lengths: NDArray[np.int64], hashes: NDArray[np.bytes_], fraction: float, unit: str = "document"
) -> NDArray[np.bool_]:
    """Select documents in the order of their hashes until they have ``fraction`` of all characters.

    Copies of a document go to the same split. The selection exceeds ``fraction`` by no more than a quarter of
    it, or by the mean length of a document: documents too large for that, or repeated too often, are not held
    out.

    Args:
        lengths: Length of each document in characters, (n,).
        hashes: Hash of each document, (n,); identical documents have equal hashes.
        fraction: Fraction of the characters to hold out.
        unit: Name of a document in the error.

    Returns:
        Boolean mask of the held-out documents, (n,).

    Raises:
        DataError: If no document can be held out, because all or most are equal.
    """
    total = int(lengths.sum())
    budget = fraction * total
    # A single huge document would dominate the validation split and not represent the others.
    largest = max(budget / 4, total / len(lengths))
    chosen = np.zeros(len(lengths), dtype=bool)
    taken = 0
    order = np.argsort(hashes, kind="stable")
    # Copies are adjacent in this order; a copy left in training would leak into validation.
    ends = np.append(np.flatnonzero(hashes[order][1:] != hashes[order][:-1]) + 1, len(order))
    start = 0
    for end in ends:
        if taken >= budget:
            break
        copies, start = order[start:end], end
        length = int(lengths[copies[0]])
        if length <= largest and taken + length * len(copies) <= budget + largest:
            chosen[copies] = True
            taken += length * len(copies)
    if not taken:
        if len(ends) == 1:
            found, remedy = f"all {len(hashes):,} {unit}s are equal", "remove the copies"
        else:
            found = f"the {len(hashes):,} {unit}s are copies of {len(ends):,}"
            found += ", each too frequent to hold out"
            remedy = "remove the copies, raise data.val_fraction"
        raise DataError(f"data: {found}", f"{remedy}, or set data.validation")
    return chosen


def split_texts(texts: list[str], hashes: NDArray[np.bytes_], fraction: float) -> Corpus:
    """Split documents in memory; of fewer than ``FEW_DOCUMENTS`` the end of each document is held out.

    Args:
        ``texts``: Documents, n of them.
        hashes: Hash of each document by :func:`~tnnlm.data.text.text_hash`, (n,).
        fraction: Fraction of the characters to hold out.

    Raises:
        DataError: If no document can be held out, see :func:`hold_out`.
    """
    if len(texts) < FEW_DOCUMENTS:
        pairs = [_cut(text, fraction) for text in texts]
        return Corpus([a for a, _ in pairs if a], [b for _, b in pairs if b])
    lengths = np.array([len(text) for text in texts], np.int64)
    some = hold_out(lengths, hashes, fraction)
    train = [text for text, out in zip(texts, some, strict=True) if not out]
    return Corpus(train, [text for text, out in zip(texts, some, strict=True) if out])


def split_stored(found: StoredDocuments, fraction: float) -> Corpus:
    """Split documents on disk as :func:`split_texts` splits those in memory.

    Args:
        found: Documents.
        fraction: Fraction of the characters to hold out.

    Raises:
        DataError: If no document can be held out, see :func:`hold_out`.
    """
    if len(found.lengths) < FEW_DOCUMENTS:
        return Corpus(*found.texts().cut(found.lengths, fraction))
    some = hold_out(found.lengths, found.hashes, fraction)
    return Corpus(found.texts(~some), found.texts(some))


def _cut(text: str, fraction: float) -> tuple[str, str]:
    """Return a document's beginning and its last ``fraction``, split at a line break if possible."""
    at = round(len(text) * (1 - fraction))
    line = text.rfind("\n", 0, at) + 1
    at = line if line > at / 2 else at
    return text[:at], text[at:]
