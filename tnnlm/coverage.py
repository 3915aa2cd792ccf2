"""Characters of a text that a tokenizer doesn't know, or changes, so that the text can't be recovered.

Byte-level tokenizers reproduce every text. Others may have an unknown token that stands for characters
outside of their vocabulary, drop them, or normalise the text, for example to lower case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Encoding

from tnnlm.tokenizer import TextTokenizer


class Coverage(NamedTuple):
    """Number of characters that a tokenizer was given, and of those that its tokens don't tell."""

    characters: int
    """Number of characters, without white space around a text."""
    unknown: int
    """Characters that the unknown token stands for, and those without a token; white space doesn't count."""
    changed: int
    """Further characters that the decoded tokens don't contain, such as capitals or line ends."""


def coverage(tokenizer: TextTokenizer, documents: Sequence[str]) -> Coverage:
    """Return how many characters of documents the tokenizer doesn't know, and how many others it changes.

    Decoded tokens are compared with the text by how often each character occurs, so a change of the order is
    not noticed. The name of the unknown token in a text, as in WikiText, is known.

    Args:
        tokenizer: Tokenizer.
        documents: Strings that it can encode, which it does in parallel on all cores.
    """
    stripped = [text.strip() for text in documents]
    encodings = tokenizer.tokenizer.encode_batch(stripped, add_special_tokens=False)
    parts = [
        _coverage_of(tokenizer, text, encoding) for text, encoding in zip(stripped, encodings, strict=True)
    ]
    return Coverage(*map(sum, zip(*parts, strict=True))) if parts else Coverage(0, 0, 0)


def _coverage_of(tokenizer: TextTokenizer, text: str, encoding: Encoding) -> Coverage:
    """Return the coverage of one text, which was encoded."""
    known, gaps, unknown_id = [], [], tokenizer.unknown_id
    for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        name = tokenizer.tokenizer.id_to_token(token)
        if token == unknown_id and text[start:end].strip() != name:
            gaps.append(text[start:end])
        else:
            known.append(token)
    # Some decoders join tokens by blanks, so each gap may have taken one with it.
    left = Counter(text) - Counter("".join(gaps)) - Counter({" ": len(gaps)})
    decoded = Counter(tokenizer.decode(known))
    for token in known:
        if token == unknown_id and tokenizer.detokenizer.is_special(token):
            # The decoder skips its name, which the text contains.
            decoded.update(f" {tokenizer.tokenizer.id_to_token(token)}")
    missing = left - decoded
    # Offsets don't tell dropped characters: tokens behind them move to the front.
    dropped = min(_letters(missing), max(0, _letters(left) - _letters(decoded)))
    unknown = _letters(Counter("".join(gaps))) + dropped
    return Coverage(len(text), unknown, missing.total() - dropped)


def _letters(counts: Counter[str]) -> int:
    """Return the number of characters that aren't white space."""
    return sum(number for character, number in counts.items() if not character.isspace())
