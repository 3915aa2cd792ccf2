"""Order of conversations: like lengths together, every row once per epoch, equal on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from tnnlm.data.conversations.order import AnswerSampler, like_lengths

RNG = np.random.default_rng(0)
LENGTHS, ANSWERS = RNG.permutation(200)[:37] + 2, RNG.integers(1, 9, 37)


def batches(
    batch_size: int, n: int, *, start: int = 0, accumulate: int = 1, rank: int = 0, ranks: int = 1
) -> list:
    sampler = AnswerSampler(
        37,
        batch_size=batch_size,
        n_batches=n,
        seed=3,
        start=start,
        rank=rank,
        world_size=ranks,
        lengths=LENGTHS,
        answers=ANSWERS,
        accumulate=accumulate,
        block=lambda: 4,
    )
    return list(sampler)


@pytest.mark.parametrize("start", [0, 37, 74])
def test_every_row_occurs_once_and_blocks_have_like_lengths(start: int) -> None:
    order = like_lengths(LENGTHS, (3, start // 37), 4, start)
    assert sorted(order.tolist()) == list(range(37))
    first = -start % 4
    ranked = np.argsort(np.argsort(LENGTHS))
    whole = [order[i : i + 4] for i in range(first, 34, 4)]
    assert all(np.ptp(ranked[block]) == 3 for block in whole)
    assert [sorted(b.tolist()) for b in whole] != sorted(sorted(b.tolist()) for b in whole)


def test_order_does_not_depend_on_ranks_batches_or_resuming() -> None:
    plain = [row for batch in batches(4, 24) for row, _ in batch]
    resumed = [row for batch in batches(4, 14, start=40) for row, _ in batch]
    assert plain[40:] == resumed
    halves = [batches(2, 24, rank=rank, ranks=2) for rank in (0, 1)]
    assert plain == [row for pair in zip(*halves, strict=True) for batch in pair for row, _ in batch]
    assert plain == [row for batch in batches(2, 48, accumulate=2) for row, _ in batch]


def test_divisors_make_a_step_the_mean_over_its_answers() -> None:
    ranks = [batches(2, 12, accumulate=3, rank=rank, ranks=2) for rank in (0, 1)]
    for step in range(4):
        parts = [batch for rank in ranks for batch in rank[3 * step : 3 * step + 3]]
        answers = sum(int(ANSWERS[row]) for batch in parts for row, _ in batch)
        assert {divisor for batch in parts for _, divisor in batch} == {answers / 6}
