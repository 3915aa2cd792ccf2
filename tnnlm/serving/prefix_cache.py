"""States after token sequences, for prompts that begin with them: forked, never changed.

A state is a few hundred kilobytes however long the sequence: a whole prompt costs what a token costs.
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
"""length and hash of a sequence"""


class PrefixCache:
    """The least recently used go first once ``limit`` bytes are full."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._kept: OrderedDict[Key, GenerationState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, tokens: Sequence[int]) -> tuple[int, GenerationState] | None:
        """How many of ``tokens`` were processed before, and the state after those; None if none were."""
        lengths = sorted({length for length, _ in self._kept if length <= len(tokens)})
        found = [key for key in _keys(tokens, lengths) if key in self._kept]
        if not found:
            return None
        self._kept.move_to_end(found[-1])
        return found[-1][0], self._kept[found[-1]]

    def put(self, tokens: Sequence[int], state: GenerationState) -> None:
        """Keep the state after ``tokens``, one row that shares no memory with a batch."""
        if _size(state) > self.limit:
            return
        (key,) = _keys(tokens, [len(tokens)])
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        self._kept[key] = state
        self.bytes += _size(state)
        while self.bytes > self.limit:
            self.bytes -= _size(self._kept.popitem(last=False)[1])


def _size(state: GenerationState) -> int:
    return state_bytes(state.model_state) + state.logits.nbytes


def _keys(tokens: Sequence[int], lengths: Sequence[int]) -> list[Key]:
    """Keys of the beginnings of ``tokens`` of these lengths, which ascend."""
    digest = hashlib.blake2b(digest_size=16)
    keys = []
    start = 0
    for length in lengths:
        digest.update(array("q", tokens[start:length]))
        keys.append((length, digest.digest()))
        start = length
    return keys
