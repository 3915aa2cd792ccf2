"""States after token sequences, for prompts that begin with them: forked, never changed.

A state is a few hundred kilobytes however long the sequence: a whole prompt costs what a token costs.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from tnnlm.inference.generator import GenerationState
from tnnlm.models.causal_lm import state_bytes

Key: TypeAlias = tuple[int, bytes]
"""length and hash of a sequence"""


class _Kept(NamedTuple):
    state: GenerationState
    size: int


class PrefixCache:
    """The least recently used go first once ``limit`` bytes are full."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()
        self._lengths: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, tokens: Sequence[int]) -> tuple[int, GenerationState] | None:
        """How many of ``tokens`` were processed before, and the state after those; None if none were."""
        lengths = sorted(length for length in self._lengths if length <= len(tokens))
        found = [key for key in _keys(tokens, lengths) if key in self._kept]
        if not found:
            return None
        self._kept.move_to_end(found[-1])
        return found[-1][0], self._kept[found[-1]].state

    def put(self, tokens: Sequence[int], state: GenerationState) -> None:
        """Keep the state after ``tokens``, one row that shares no memory with a batch."""
        size = state_bytes(state.model_state) + state.logits.numel() * state.logits.element_size()
        if size > self.limit:
            return
        (key,) = _keys(tokens, [len(tokens)])
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        self._kept[key] = _Kept(state, size)
        self._lengths[key[0]] += 1
        self.bytes += size
        while self.bytes > self.limit:
            old, kept = self._kept.popitem(last=False)
            self.bytes -= kept.size
            self._lengths[old[0]] -= 1
            if not self._lengths[old[0]]:
                del self._lengths[old[0]]


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
