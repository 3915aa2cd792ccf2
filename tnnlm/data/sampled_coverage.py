"""Coverage of a corpus by its tokenizer, measured on a sample of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tnnlm.coverage import Coverage, coverage
from tnnlm.data.stored_texts import StoredTexts
from tnnlm.data.text import lines_of
from tnnlm.tokenizer import TextTokenizer

SAMPLE = 200_000
"""Largest number of characters of a split that are checked."""
DOCUMENTS = 200
"""Largest number of documents that they are from, spread over the split."""


def sampled_coverage(tokenizer: TextTokenizer, splits: Sequence[Sequence[str]], protocol: str) -> Coverage:
    """Return how many characters of the splits' samples the tokenizer doesn't know or changes.

    Args:
        tokenizer: Tokenizer of the corpus.
        splits: Documents of each split.
        protocol: ``data.protocol``; with ``fairseq``, the end tokens stand for the line ends.
    """
    texts = [text for documents in splits for text in _sample(documents)]
    if protocol == "fairseq":
        texts = [line for text in texts for line in lines_of(text)]
    return coverage(tokenizer, texts)


def _sample(documents: Sequence[str]) -> Iterator[str]:
    """Yield the beginnings of documents at equal distances."""
    n, left = min(DOCUMENTS, len(documents)), SAMPLE
    for i in range(n):
        index, size = i * len(documents) // n, left // (n - i)
        if isinstance(documents, StoredTexts):
            text = documents.beginning(index, size)
        else:
            text = documents[index][:size]
        left -= len(text)
        yield text
