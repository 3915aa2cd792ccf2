"""Tokens of conversations up to the end of an answer, found again by their text.

A client sends the whole conversation with each message. The next prompt begins with the text of the last one
and its answer, whose tokens may be others than those of encoding the text: a model can write a word in parts,
and an encoder joins characters across the beginning of an answer. A prompt therefore takes the tokens that
the model has read and written, after which the prefix cache has its state.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeAlias

from tnnlm.chat.encoding import SpecialTokens

MOST = 4096
"""Maximum number of conversations."""
_ENTRY_BYTES = 300
"""Memory of an entry without its tokens in bytes, about."""
Key: TypeAlias = tuple[bytes, int, bytes]
"""Partition, number of characters of a text, and hash of the text."""


class Dialogues:
    """Tokens of conversations by text, with least-recently-used eviction; used by several threads.

    Args:
        tokens: Special tokens of the tokenizer, which templates write.
        limit: Maximum size in bytes.
    """

    def __init__(self, tokens: SpecialTokens, limit: int) -> None:
        self._tokens = tokens
        self._limit = limit
        self._bytes = 0
        self._kept: OrderedDict[Key, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def put(
        self, text: str, prompt: Sequence[int], answer: Sequence[int], partition: bytes, lead: str = ""
    ) -> None:
        """Keep the tokens of a conversation.

        Args:
            text: Text of the prompt, in which names of special tokens in messages are hidden.
            prompt: Tokens of the prompt.
            answer: Tokens of the answer, without the end token.
            partition: Part of the prefix cache that belongs to the client.
            lead: White space that the template writes before an answer, also before one that a model wrote
                without it.
        """
        found = array("q", prompt)
        found.extend(answer)
        if _size(found) > self._limit:
            return
        text += lead + self._tokens.written(answer).removeprefix(lead)
        ((key, _),) = _keys(text, [len(text)], partition)
        with self._lock:
            self._drop(key)
            self._kept[key] = found
            self._bytes += _size(found)
            while self._bytes > self._limit or len(self._kept) > MOST:
                self._drop(next(iter(self._kept)))

    def encode(self, text: str, partition: bytes) -> list[int]:
        """Return the tokens of a conversation that a template made.

        The longest beginning of it that was kept has its tokens if the rest begins with a special token,
        which no encoder joins to what precedes it.

        Raises:
            UserError: If the text is not valid Unicode.
        """
        with self._lock:
            lengths = sorted({length for own, length, _ in self._kept if own == partition})
        keys = _keys(text, [length for length in lengths if length <= len(text)], partition)
        keys = [(key, end) for key, end in keys if self._tokens.begins(text, end)]
        with self._lock:
            found = [key for key, _ in keys if key in self._kept]
            if found:
                self._kept.move_to_end(found[-1])
                begun = self._kept[found[-1]].tolist()
        if not found:
            return self._tokens.encode(text)
        return begun + self._tokens.encode(text[found[-1][1] :])

    def _drop(self, key: Key) -> None:
        gone = self._kept.pop(key, None)
        self._bytes -= 0 if gone is None else _size(gone)


def _size(tokens: array[int]) -> int:
    return _ENTRY_BYTES + tokens.itemsize * len(tokens)


def _keys(text: str, lengths: Sequence[int], partition: bytes) -> list[tuple[Key, int]]:
    """Return the keys of the beginnings of a text that have these lengths, ascending, with the lengths."""
    digest = hashlib.blake2b(digest_size=16)
    keys, start = [], 0
    for length in lengths:
        digest.update(text[start:length].encode("utf-8", "surrogatepass"))
        keys.append(((partition, length, digest.digest()), length))
        start = length
    return keys
