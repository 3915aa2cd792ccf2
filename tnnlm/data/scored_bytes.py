"""Number of UTF-8 bytes of the tokens that a validation scores, for bits per byte."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnnlm.data.packing import PackedCorpus, PackedRows
from tnnlm.data.token_files import StoredTokens
from tnnlm.tokenizer import TextTokenizer

_TOKENS = 1 << 22
"""Number of tokens that are counted at a time."""


def bytes_per_scored_token(corpus: PackedCorpus, rows: PackedRows, split: str) -> float:
    """Return the UTF-8 bytes of text per token that the rows of a split have as targets.

    The rows may cover a part of the split only, whose text may be longer or shorter per token than the rest.
    Their share of the bytes of the split is that of the bytes of their tokens. For a byte-level tokenizer
    the result is exact; one that normalises text, or has an unknown token, changes text by a factor that is
    assumed to be the same in the whole split.

    Args:
        corpus: Tokenized corpus.
        rows: Rows of the split, from its first token on.
        split: Name of the split, "train" or "val".
    """
    info, end = corpus.report.splits[split], len(rows) * rows.length + 1
    whole, size = corpus.rows(split, rows.length).tokens, corpus.tokenizer.size
    scored = _occurrences(whole, 1, end, size)
    total = scored + _occurrences(whole, 0, 1, size) + _occurrences(whole, end, len(whole), size)
    sizes = _sizes(corpus.tokenizer, np.flatnonzero(total))
    of_rows, of_split = (int(counts[list(sizes)] @ [*sizes.values()]) for counts in (scored, total))
    return info.bytes * of_rows / of_split / (end - 1) if of_split else info.bytes_per_token


def _occurrences(tokens: NDArray[Any] | StoredTokens, start: int, stop: int, size: int) -> NDArray[np.int64]:
    """Return how often each token id below ``size`` occurs from ``start`` to ``stop``, exclusive, (size,)."""
    total = np.zeros(size, np.int64)
    for begin in range(start, stop, _TOKENS):
        total += np.bincount(tokens[begin : min(stop, begin + _TOKENS)], minlength=size)
    return total


def _sizes(tokenizer: TextTokenizer, ids: NDArray[np.int64]) -> dict[int, int]:
    """Return the number of bytes that each token adds to a text; special tokens add none."""
    tokens, detokenizer = [int(i) for i in ids], tokenizer.detokenizer
    return {i: 0 if detokenizer.is_special(i) else len(detokenizer.token_bytes(i)) for i in tokens}
