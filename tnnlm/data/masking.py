"""Dynamic token masking for masked language modelling, as in BERT (arXiv 1810.04805, section 3.1).

The mask depends only on the seed and the sample's number. A resumed run therefore masks the same tokens as an
uninterrupted one, on any number of ranks, and all validations use the same masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tnnlm.data.mixture import MixedRows
from tnnlm.data.packing import PackedRows
from tnnlm.models.batches import MaskedBatch

HIDDEN, RANDOM = 0.8, 0.1
"""Fractions of the selected tokens replaced by the mask token and by a random token; others are unchanged."""


@dataclass(frozen=True)
class Masking:
    """Parameters of the random masking of a row."""

    fraction: float
    """Fraction of each row's tokens to select; rounded to whole tokens, at least one."""
    mask_id: int
    """Id of the mask token."""
    n_tokens: int
    """Vocabulary size of the tokenizer; random replacements are uniform over ids below it."""
    seed: int
    """Seed of the masks, combined with the sample's number."""

    def hide(self, row: torch.Tensor, sample: int) -> MaskedBatch:
        """Mask tokens of one row.

        Args:
            row: Token ids, (L,).
            sample: Number of the sample in the global order; seeds the mask.

        Returns:
            Tokens (L,), masked positions and their targets, without a batch dimension.
        """
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
    """Map-style data set of packed rows of L tokens with random masks.

    The index is a pair (row, sample), where the sample's number seeds the mask. A plain row index is used as
    the sample's number too, which fixes the mask of each row.
    """

    def __init__(self, rows: PackedRows | MixedRows, masking: Masking) -> None:
        self.rows = rows
        self.masking = masking

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, int]) -> MaskedBatch:
        row, sample = index if isinstance(index, tuple) else (index, index)
        return self.masking.hide(self.rows[row][:-1], sample)
