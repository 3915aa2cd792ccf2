"""The prefix cache: lookup by the longest prefix, and eviction of the least recently used entry."""

from __future__ import annotations

import torch

from tnnlm.inference.generator import GenerationState
from tnnlm.models.causal_lm import ModelState
from tnnlm.ops.ssm import SSMState
from tnnlm.serving.prefix_cache import PrefixCache

SIZE = 4 * (3 * 2 + 10)


def state(length: int) -> GenerationState:
    part = torch.zeros(1, 1, 2)
    return GenerationState(ModelState((SSMState(part, part, part),)), torch.zeros(1, 10), (length,), 0.0)


def test_the_longest_prefix_is_found() -> None:
    cache = PrefixCache(100 * SIZE)
    for length in (2, 5, 3):
        cache.put(range(length), state(length))
    for asked, expected in ((1, None), (2, 2), (4, 3), (5, 5), (9, 5)):
        found = cache.longest(list(range(asked)))
        assert (found and found[0]) == expected
        assert found is None or found[1].lengths == (expected,)
    assert cache.longest([0, 1, 2, 9, 9]) is not None
    assert cache.longest([1, 2, 3, 4, 5]) is None


def test_the_least_recently_used_is_evicted_first() -> None:
    cache = PrefixCache(3 * SIZE)
    for start in (10, 20, 30):
        cache.put([start], state(1))
    assert cache.bytes == 3 * SIZE
    assert cache.longest([10]) is not None
    cache.put([40], state(1))
    assert (cache.longest([20]), len(cache), cache.bytes) == (None, 3, 3 * SIZE)
    assert all(cache.longest([start]) for start in (10, 30, 40))
    cache.put([40], state(1))
    assert (len(cache), cache.bytes) == (3, 3 * SIZE)


def test_a_cache_of_zero_bytes_stores_nothing() -> None:
    cache = PrefixCache(0)
    cache.put([1], state(1))
    assert cache.longest([1]) is None
