"""Masking of tokens: a fixed number per row, 80 / 10 / 10, and deterministic per sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tnnlm.data.masking import MaskedRows, Masking
from tnnlm.data.packing import PackedRows

MASK_ID = 301


def masking(fraction: float = 0.15, seed: int = 0) -> Masking:
    return Masking(fraction, MASK_ID, 302, seed)


def test_targets_are_the_original_tokens_and_the_rest_is_unchanged() -> None:
    row = torch.randint(300, (100,))
    tokens, positions, targets = masking().hide(row, 3)
    assert torch.equal(row[positions], targets)
    rest = torch.ones(100, dtype=torch.bool)
    rest[positions] = False
    assert torch.equal(tokens[rest], row[rest])


@pytest.mark.parametrize(("length", "fraction", "expected"), [(100, 0.15, 15), (32, 0.15, 5), (2, 0.15, 1)])
def test_every_row_has_the_same_number_of_masked_tokens(length: int, fraction: float, expected: int) -> None:
    for sample in range(5):
        positions = masking(fraction).hide(torch.zeros(length, dtype=torch.long), sample).positions
        assert len(set(positions.tolist())) == expected


def test_80_percent_are_masked_10_random_and_10_unchanged() -> None:
    row = torch.full((20_000,), 7)
    tokens, positions, _ = masking(0.5).hide(row, 0)
    seen = tokens[positions]
    assert float((seen == MASK_ID).float().mean()) == pytest.approx(0.8, abs=0.015)
    assert float((seen == 7).float().mean()) == pytest.approx(0.1, abs=0.01)
    others = seen[(seen != 7) & (seen != MASK_ID)]
    assert len(others.unique()) > 250


def test_masking_depends_on_sample_and_seed() -> None:
    row = torch.randint(300, (64,))
    first, again = masking().hide(row, 5), masking().hide(row, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.positions, masking().hide(row, 6).positions)
    assert not torch.equal(first.positions, masking(seed=1).hide(row, 5).positions)


def test_rows_are_indexed_alone_or_with_their_sample() -> None:
    rows = MaskedRows(PackedRows(np.arange(100, dtype=np.int32), 10), masking())
    assert len(rows) == 9
    assert len(rows[0].tokens) == 10
    assert torch.equal(rows[2].positions, rows[2, 2].positions)
    one, other = rows[2, 2], rows[2, 11]
    assert not torch.equal(one.positions, other.positions)
    # Row 2 holds tokens 20 .. 29, so the targets follow from the masked positions.
    assert torch.equal(other.targets, 20 + other.positions)
