"""Answer to a request that is not streamed, kept as encoded JSON, and the size that an answer may have."""

from __future__ import annotations

import io
import json
from typing import Any

from tnnlm.serving.wire import WireFormat

TOKEN_BYTES = 16
"""Bytes of a token of text, on average; most tokens take less."""
SCORED_BYTES = 48
"""Bytes of the log-probability of a token, with its text and its offset."""
ID_BYTES = 8
"""Bytes of a token id with its comma."""
ALTERNATIVE_BYTES = 40
"""Bytes of one entry of ``top_logprobs``."""
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def answer_bytes(tokens: int, logprobs: int | None, scale: int = 1) -> int:
    """Return the estimated size of an answer in bytes.

    Args:
        tokens: Number of tokens over all sequences, with those of echoed prompts.
        logprobs: Number of alternatives per token; None for an answer without log-probabilities.
        scale: Size of log-probabilities relative to those of completions.
    """
    scores = 0 if logprobs is None else SCORED_BYTES + ALTERNATIVE_BYTES * (logprobs + 1)
    return tokens * (TOKEN_BYTES + scale * scores)


class EncodedChoice:
    """One choice of an answer, which takes as much memory as its JSON."""

    def __init__(self, text: str = "") -> None:
        """Begin a choice whose text begins with ``text``."""
        self._text = io.StringIO()
        self._columns: dict[str, io.StringIO] = {}
        self.size = 0
        """Size in characters."""
        self.add(text, None)

    def add(self, text: str, entries: dict[str, list[Any]] | None) -> None:
        """Append text, and the ``logprobs`` of further tokens."""
        self.size += self._text.write(text)
        for name, values in (entries or {}).items():
            column = self._columns.setdefault(name, io.StringIO())
            if values:
                if column.tell():
                    column.write(",")
                self.size += column.write(to_json(values)[1:-1])

    def encode(
        self, index: int, finish: str | None, wire: WireFormat, token_ids: dict[str, list[int]]
    ) -> str:
        """Return the JSON of the finished choice; ``token_ids`` are further fields."""
        columns = ",".join(f'"{name}":[{column.getvalue()}]' for name, column in self._columns.items())
        logprobs = f"{{{columns}}}" if self._columns else "null"
        text = to_json(self._text.getvalue())
        choice = wire.encoded(index, text, logprobs, to_json(finish))
        return f"{choice[:-1]},{to_json(token_ids)[1:]}" if token_ids else choice


def to_json(value: Any) -> str:
    """Return compact JSON.

    Raises:
        ValueError: If a number is not finite.
    """
    return _ENCODER.encode(value)
