"""Prefix cache: states after token sequences, reused by prompts that begin with the same tokens.

Each prompt belongs to a partition, a secret of a client, and finds no states of other partitions: the number
of cached tokens would tell what other clients asked. Cached states are never modified. A state takes a few
hundred kilobytes whatever the length of its prefix.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeAlias

from tnnlm.inference.generator import GenerationState
from tnnlm.models.causal_lm import state_bytes

Key: TypeAlias = tuple[int, bytes]
"""Length of a token sequence, and hash of its partition and its tokens."""


class PrefixCache:
    """Cache of states with least-recently-used eviction above ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._kept: OrderedDict[Key, GenerationState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, tokens: Sequence[int], partition: bytes = b"") -> tuple[int, GenerationState] | None:
        """Return the length of the longest cached prefix of ``tokens`` and the state after it, or None."""
        lengths = sorted({length for length, _ in self._kept if length <= len(tokens)})
        found = [key for key in _keys(tokens, lengths, partition) if key in self._kept]
        if not found:
            return None
        self._kept.move_to_end(found[-1])
        return found[-1][0], self._kept[found[-1]]

    def put(self, tokens: Sequence[int], state: GenerationState, partition: bytes = b"") -> None:
        """Cache the state after ``tokens``: a single row that shares no memory with a batch."""
        if _size(state) > self.limit:
            return
        (key,) = _keys(tokens, [len(tokens)], partition)
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        self._kept[key] = state
        self.bytes += _size(state)
        while self.bytes > self.limit:
            self.bytes -= _size(self._kept.popitem(last=False)[1])


def _size(state: GenerationState) -> int:
    return state_bytes(state.model_state) + state.logits.nbytes


def _keys(tokens: Sequence[int], lengths: Sequence[int], partition: bytes) -> list[Key]:
    """Return the keys of prefixes of ``tokens`` with these lengths, in ascending order."""
    digest = hashlib.blake2b(key=partition, digest_size=16)
    keys = []
    start = 0
    for length in lengths:
        digest.update(array("q", tokens[start:length]))
        keys.append((length, digest.digest()))
        start = length
    return keys
