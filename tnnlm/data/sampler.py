"""Batch sampler with a resumable global order of the training rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch.utils.data import Sampler

from tnnlm.data.order import MixedOrder, Permutations, Share


@dataclass(eq=False)
class GlobalOrderSampler(Sampler[list[Any]]):
    """Batch sampler whose order depends only on the seed and the number of samples seen.

    The global order is an endless sequence of permutations of the rows, each seeded by (seed, epoch), or of
    the rows of the sources of a mixture (:mod:`tnnlm.data.order`). With W
    ranks and batch size B, batch b of rank r is samples [(b W + r) B, (b W + r + 1) B) after ``start``. An
    optimizer step of A batches thus consumes the next A W B samples, in whatever way that product is split
    into batches and ranks, and a resumed run only sets a larger ``start``.
    """

    n_rows: int
    _: KW_ONLY
    batch_size: int
    n_batches: int
    seed: int
    start: int | Callable[[], int] = 0
    """Number of samples already consumed by all ranks, or a function that returns it at each iteration."""
    rank: int = 0
    world_size: int = 1
    mixture: Sequence[Share] = ()
    """Rows and weight of each source of a mixture, whose rows follow one another; empty for a single one."""
    resampled: bool = False
    """Yield (row, sample) pairs instead of row indices, for data randomised per sample, such as masks."""

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[list[Any]]:
        order: Permutations | MixedOrder = Permutations(self.n_rows, self.seed)
        if self.mixture:
            order = MixedOrder(self.mixture, self.seed)
        start = self.start() if callable(self.start) else self.start
        first = start + self.rank * self.batch_size
        for batch in range(self.n_batches):
            rows: list[Any] = []
            begin = first + batch * self.world_size * self.batch_size
            for sample in range(begin, begin + self.batch_size):
                row = order.row(sample)
                rows.append((row, sample) if self.resampled else row)
            yield rows
