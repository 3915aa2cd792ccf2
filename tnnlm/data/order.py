"""Global order of the training rows: endless permutations of the rows of one source, or of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_BITS = 62
"""Binary places of shares."""


class Share(NamedTuple):
    """Rows of one source of a mixture."""

    n_rows: int
    weight: float


def permutation(n_rows: int, *seed: int) -> NDArray[np.int64]:
    """Return a random permutation of rows, (n,)."""
    return np.random.default_rng(seed).permutation(n_rows)


class Permutations:
    """Endless sequence of permutations of rows."""

    def __init__(self, n_rows: int, order_of: Callable[[int], NDArray[np.int64]]) -> None:
        """Create the sequence.

        Args:
            n_rows: Number of rows.
            order_of: Function that returns the permutation of an epoch, (n,).
        """
        self._n_rows = n_rows
        self._order_of = order_of
        self._orders: dict[int, NDArray[np.int64]] = {}

    @classmethod
    def seeded(cls, n_rows: int, *seed: int) -> Permutations:
        """Return random permutations, each seeded by ``seed`` and its number."""
        return cls(n_rows, lambda epoch: permutation(n_rows, *seed, epoch))

    def row(self, sample: int) -> int:
        """Return the row of a sample."""
        epoch, place = divmod(sample, self._n_rows)
        if epoch not in self._orders:
            # An optimizer step and its batches may extend over two epochs.
            self._orders = {known: order for known, order in self._orders.items() if known == epoch - 1}
            self._orders[epoch] = self._order_of(epoch)
        return int(self._orders[epoch][place])

    def forget(self) -> None:
        """Compute permutations again, because what ``order_of`` depends on may have changed."""
        self._orders.clear()


class Interleaving:
    """Endless sequence of sources, in which each source has its share of every part of the sequence.

    Among the first n samples, the number of those of a source differs from n times its share by no more than
    the number of sources. Sources are split off one after another: source 1 has the samples s at which
    floor(s p + u) grows, for its share p and a phase u that the seed determines, and the others share the
    rest in the same way. The number of samples of a source before any sample so takes a few operations in
    integers, and no state is needed to resume.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        random = np.random.default_rng((seed, len(weights)))
        left = [sum(weights[i:]) for i in range(len(weights))]
        self._shares = [
            (round(weight / rest * (1 << _BITS)), int(random.integers(1 << _BITS)))
            for weight, rest in zip(weights[:-1], left, strict=False)
        ]

    def place(self, sample: int) -> tuple[int, int]:
        """Return the source of a sample, and the number of earlier samples of that source."""
        for source, (share, phase) in enumerate(self._shares):
            before = (sample * share + phase) >> _BITS
            if ((sample + 1) * share + phase) >> _BITS > before:
                return source, before
            sample -= before
        return len(self._shares), sample


class MixedOrder:
    """Order of the rows of several sources, which are numbered one source after another."""

    def __init__(self, shares: Sequence[Share], seed: int) -> None:
        self._interleaving = Interleaving([share.weight for share in shares], seed)
        self._firsts = [0, *np.cumsum([share.n_rows for share in shares])[:-1].tolist()]
        self._rows = [Permutations.seeded(share.n_rows, seed, number) for number, share in enumerate(shares)]

    def row(self, sample: int) -> int:
        """Return the row of a sample."""
        source, number = self._interleaving.place(sample)
        return int(self._firsts[source] + self._rows[source].row(number))
