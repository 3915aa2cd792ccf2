"""Rows with hidden tokens, as BERT has them (arXiv 1810.04805, section 3.1), drawn anew at each reading.

What is hidden follows from (seed, sample) alone: a resumed run hides what an unbroken one would have, on
any number of ranks, and every validation hides the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tnnlm.data.packing import PackedRows
from tnnlm.models.batches import MaskedBatch

HIDDEN, RANDOM = 0.8, 0.1
"""shares of the chosen tokens that become the mask token, and any token; the rest stays"""


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden."""

    fraction: float
    """of a row that is chosen: rounded, at least one token, as many in each row"""
    mask_id: int
    n_tokens: int
    """ids below this are what a token may become"""
    seed: int

    def hide(self, row: torch.Tensor, sample: int) -> MaskedBatch:
        """Hide tokens of one row (L,); a batch of one without its first dimension."""
        random = np.random.default_rng((self.seed, sample))
        count = max(1, round(self.fraction * len(row)))
        positions = torch.from_numpy(np.sort(random.choice(len(row), count, replace=False)))
        fate = torch.from_numpy(random.random(count))
        others = torch.from_numpy(random.integers(self.n_tokens, size=count))
        targets, tokens = row[positions], row.clone()
        tokens[positions] = torch.where(
            fate < HIDDEN, self.mask_id, torch.where(fate < HIDDEN + RANDOM, others, targets)
        )
        return MaskedBatch(tokens, positions, targets)


class MaskedRows(torch.utils.data.Dataset[MaskedBatch]):
    """Packed rows of L tokens, some of them hidden.

    Indexed by (row, sample), where the sample's number says what is hidden; a row alone is its own sample.
    """

    def __init__(self, rows: PackedRows, masking: Masking) -> None:
        self.rows = rows
        self.masking = masking

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, int]) -> MaskedBatch:
        row, sample = index if isinstance(index, tuple) else (index, index)
        return self.masking.hide(self.rows[row][:-1], sample)
