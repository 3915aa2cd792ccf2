"""Batches of the synthetic tasks: targets follow from the inputs, and all batches differ."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from experiments.synthetic_tasks import Batch, copying, delay


def sample_copying(seed: int = 0, batch: int = 0) -> Batch:
    return copying(seed, batch, rows=5, symbols=7, vocab_size=9, blanks=3)


def sample_delay(seed: int = 0, batch: int = 0) -> Batch:
    return delay(seed, batch, rows=5, length=40, lag=7)


def test_copying_has_symbols_blanks_and_markers() -> None:
    inputs, targets = sample_copying()
    assert inputs.shape == (5, 17)
    assert torch.equal(inputs[:, :7], targets)
    assert bool((inputs[:, 7:10] == 0).all())
    assert bool((inputs[:, 10:] == 8).all())
    many = copying(0, 0, rows=100, symbols=20, vocab_size=9).targets
    assert (int(many.min()), int(many.max())) == (1, 7)


def test_delay_targets_are_the_delayed_signal() -> None:
    inputs, targets = sample_delay()
    assert inputs.shape == targets.shape == (5, 40)
    assert torch.equal(targets[:, 7:], inputs[:, :-7])
    assert bool((targets[:, :7] == 0).all())
    assert bool((inputs[:, 0] == 0).all())


@pytest.mark.parametrize("length", [40, 41])
@pytest.mark.parametrize("cutoff", [0.1, 0.25, 0.5])
def test_signals_end_at_the_cutoff_and_have_their_rms(length: int, cutoff: float) -> None:
    inputs = delay(0, 0, rows=4000, length=length, lag=1, cutoff=cutoff, rms=0.5).inputs.double()
    power = torch.fft.rfft(inputs).abs().square().mean(0)
    above = torch.fft.rfftfreq(length, dtype=torch.float64) > cutoff
    assert float(power[above].sum()) <= 1e-10 * float(power.sum())
    # The offset that makes the signal start at zero is constant over the sequence.
    assert math.isclose(
        float((inputs - inputs.mean(1, keepdim=True)).square().mean() ** 0.5), 0.5, rel_tol=0.02
    )


@pytest.mark.parametrize("sample", [sample_copying, sample_delay])
def test_batches_follow_from_seed_and_number_alone(sample: Callable[[int, int], Batch]) -> None:
    first = sample(0, 3)
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(first, sample(0, 3), strict=True))
    for other in (sample(0, 4), sample(1, 3), sample(3, 0)):
        assert not torch.equal(first.inputs, other.inputs)


def test_impossible_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="no symbols besides blank and marker"):
        copying(0, 0, rows=1, symbols=3, vocab_size=2)
    with pytest.raises(ValueError, match="below the length, 8"):
        delay(0, 0, rows=1, length=8, lag=8)
    with pytest.raises(ValueError, match="below the lowest frequency"):
        delay(0, 0, rows=1, length=8, lag=1, cutoff=0.1)
