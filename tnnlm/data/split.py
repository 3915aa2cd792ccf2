"""What is held out for validation: by document, from the seed and the texts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnnlm.data.arrow_text import text_hash

FEW_DOCUMENTS = 10
"""below this, every document is cut in two: a split by document would hold out too much or nothing"""


@dataclass(frozen=True)
class Corpus:
    """The two splits, a document each entry."""

    train: Sequence[str]
    val: Sequence[str]


def hold_out(lengths: NDArray[np.int64], hashes: NDArray[np.bytes_], fraction: float) -> NDArray[np.bool_]:
    """Which documents are held out: in the order of their hashes until ``fraction`` of the characters.

    Args:
        lengths: characters of each document, (n,).
        hashes: of each, (n,): equal texts have equal ones.
        fraction: share of the characters.
    """
    total = int(lengths.sum())
    budget = fraction * total
    # One huge document would be most of the held-out text, and no fair sample of the rest.
    largest = max(budget / 4, total / len(lengths))
    chosen = np.zeros(len(lengths), dtype=bool)
    taken = count = 0
    last: Any = None
    for index in np.argsort(hashes, kind="stable"):
        # Equal texts come in a row: none may stay behind in training.
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
    """Split texts in memory; fewer than ``FEW_DOCUMENTS`` are cut in two, each of them."""
    if len(texts) < FEW_DOCUMENTS:
        pairs = [_cut(text, fraction) for text in texts]
        return Corpus([a for a, _ in pairs if a], [b for _, b in pairs if b])
    lengths = np.array([len(text) for text in texts], np.int64)
    some = hold_out(lengths, np.array([text_hash(seed, text) for text in texts], "S16"), fraction)
    train = [text for text, out in zip(texts, some, strict=True) if not out]
    return Corpus(train, [text for text, out in zip(texts, some, strict=True) if out])


def _cut(text: str, fraction: float) -> tuple[str, str]:
    """The beginning and the last ``fraction`` of a text, cut at a line where there is one."""
    at = round(len(text) * (1 - fraction))
    line = text.rfind("\n", 0, at) + 1
    at = line if line > at / 2 else at
    return text[:at], text[at:]
