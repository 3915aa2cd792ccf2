"""Train/validation split by document, determined only by the seed and the documents' contents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnnlm.data.arrow_text import text_hash

FEW_DOCUMENTS = 10
"""Minimum number of documents for a split by document; with fewer, the end of each document is held out."""


@dataclass(frozen=True)
class Corpus:
    """Documents of the training and validation splits."""

    train: Sequence[str]
    val: Sequence[str]


def hold_out(lengths: NDArray[np.int64], hashes: NDArray[np.bytes_], fraction: float) -> NDArray[np.bool_]:
    """Select documents in the order of their hashes until they have ``fraction`` of all characters.

    Copies of a document go to the same split, unless nothing would be left to train on. Documents too large
    to be a fair sample are not held out.

    Args:
        lengths: Length of each document in characters, (n,).
        hashes: Hash of each document, (n,); identical documents have equal hashes.
        fraction: Fraction of the characters to hold out.

    Returns:
        Boolean mask of the held-out documents, (n,).
    """
    total = int(lengths.sum())
    budget = fraction * total
    # A single huge document would dominate the validation split and not represent the others.
    largest = max(budget / 4, total / len(lengths))
    chosen = np.zeros(len(lengths), dtype=bool)
    taken = count = 0
    last: Any = None
    for index in np.argsort(hashes, kind="stable"):
        # Identical documents are adjacent in this order; a copy left in training would leak into validation.
        again = hashes[index] == last and count < len(lengths) - 1
        if taken >= budget and not again:
            break
        if lengths[index] <= largest:
            chosen[index] = True
            last = hashes[index]
            taken += int(lengths[index])
            count += 1
    return chosen


def split_texts(texts: list[str], fraction: float, seed: int) -> Corpus:
    """Split documents in memory; of fewer than ``FEW_DOCUMENTS`` the end of each document is held out."""
    if len(texts) < FEW_DOCUMENTS:
        pairs = [_cut(text, fraction) for text in texts]
        return Corpus([a for a, _ in pairs if a], [b for _, b in pairs if b])
    lengths = np.array([len(text) for text in texts], np.int64)
    some = hold_out(lengths, np.array([text_hash(seed, text) for text in texts], "S16"), fraction)
    train = [text for text, out in zip(texts, some, strict=True) if not out]
    return Corpus(train, [text for text, out in zip(texts, some, strict=True) if out])


def _cut(text: str, fraction: float) -> tuple[str, str]:
    """Return a document's beginning and its last ``fraction``, split at a line break if possible."""
    at = round(len(text) * (1 - fraction))
    line = text.rfind("\n", 0, at) + 1
    at = line if line > at / 2 else at
    return text[:at], text[at:]
