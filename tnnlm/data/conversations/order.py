"""Order of conversations in training: rows of like length together, otherwise random; it resumes exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnnlm.data.sampler import GlobalOrderSampler


def like_lengths(
    lengths: NDArray[np.integer], seed: tuple[int, int], block: int, start: int = 0
) -> NDArray[np.int64]:
    """Return a permutation of rows in which those of a block have like lengths.

    The blocks are in random order, and so are rows of equal length. A block ends at each multiple of
    ``block`` of the global order, so that batches of this size are blocks in every epoch.

    Args:
        lengths: Length of each row, (n,).
        seed: Seed and epoch.
        block: Number of rows of a block.
        start: Number of samples before the first one in the global order.
    """
    random = np.random.default_rng(seed)
    by_length = np.lexsort((random.random(len(lengths)), lengths))
    n, first = len(lengths), -start % block
    cuts = np.unique(np.clip([0, *range(first, n, block), n], 0, n))
    order = np.empty(n, np.int64)
    taken = 0
    for place in random.permutation(len(cuts) - 1):
        begin, end = cuts[place], cuts[place + 1]
        order[begin:end] = random.permutation(by_length[taken : taken + end - begin])
        taken += end - begin
    return order


@dataclass(eq=False)
class AnswerSampler(GlobalOrderSampler):
    """Batch sampler of rows of which some tokens are scored.

    It yields pairs (row, divisor), where the divisor is
    :attr:`~tnnlm.models.batches.AnswerBatch.divisor` of the batch: it knows the rows of all batches and ranks
    of an optimizer step.
    """

    _: KW_ONLY
    lengths: NDArray[np.integer]
    """Length of each row in tokens, (n,)."""
    answers: NDArray[np.integer]
    """Number of scored tokens of each row, (n,)."""
    accumulate: int = 1
    """Number of batches per optimizer step and rank."""
    block: Callable[[], int] = field(kw_only=True)
    """Function that returns the number of rows of like length that follow each other."""

    def order_of(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of the rows in an epoch."""
        return like_lengths(self.lengths, (self.seed, epoch), self.block(), epoch * self.n_rows)

    def __iter__(self) -> Iterator[list[Any]]:
        start = self.begin()
        batches = self.accumulate * self.world_size
        divisor = 1.0
        for batch in range(self.n_batches):
            if batch % self.accumulate == 0:
                step = start + batch * self.world_size * self.batch_size
                scored = self.answers[self.rows_of(step, batches * self.batch_size)].sum()
                divisor = max(1, int(scored)) / batches
            begin = start + (batch * self.world_size + self.rank) * self.batch_size
            yield [(row, divisor) for row in self.rows_of(begin, self.batch_size)]
