"""Global order of the training rows: endless permutations of the rows of one source, or of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BITS = 62
"""Binary places of shares."""


class Share(NamedTuple):
    """Rows of one source of a mixture."""

    n_rows: int
    weight: float


class Permutations:
    """Endless sequence of permutations of rows, each seeded by its number and further integers."""

    def __init__(self, n_rows: int, *seed: int) -> None:
        self._n_rows = n_rows
        self._seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def row(self, sample: int) -> int:
        """Return the row of a sample."""
        epoch, place = divmod(sample, self._n_rows)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((*self._seed, epoch)).permutation(self._n_rows)
        return int(self._order[place])


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
        self._rows = [Permutations(share.n_rows, seed, number) for number, share in enumerate(shares)]

    def row(self, sample: int) -> int:
        """Return the row of a sample."""
        source, number = self._interleaving.place(sample)
        return int(self._firsts[source] + self._rows[source].row(number))
