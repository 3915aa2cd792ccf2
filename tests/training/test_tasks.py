"""Validation means are weighted by size and computed in float64 under every precision policy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tnnlm.training.tasks import WeightedMean

BATCHES = [(1000.0 + index / 3, 301 + index) for index in range(50)]
"""Sums and counts: more counts than bfloat16 can add, and more digits than float32 has."""


@pytest.mark.parametrize(
    "move",
    [
        lambda module: module,
        lambda module: module.to(torch.device("cpu")),
        lambda module: module.to(dtype=torch.bfloat16),
        lambda module: module.float(),
    ],
    ids=["as made", "moved", "bfloat16", "float32"],
)
def test_mean_stays_in_float64(move: object) -> None:
    mean = WeightedMean()
    move(nn.ModuleList([mean]))  # type: ignore[operator]
    for _ in range(2):
        for total, count in BATCHES:
            mean.add(total, count)
        expected = sum(total for total, _ in BATCHES) / sum(count for _, count in BATCHES)
        assert mean.compute().dtype == torch.float64
        assert float(mean.compute()) == pytest.approx(expected, rel=1e-14)
        mean.reset()


def test_batch_of_nothing_counts_nothing() -> None:
    mean = WeightedMean()
    mean.add(6.0, 3)
    mean.add(0.0, 0)
    assert float(mean.compute()) == 2.0


def test_nan_is_not_skipped() -> None:
    mean = WeightedMean()
    mean.add(math.nan, 3)
    mean.add(6.0, 3)
    assert math.isnan(float(mean.compute()))
