"""Batches of the synthetic tasks: what is to be told is what was given, and every batch is its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from experiments.synthetic_tasks import Batch, copying, delay


def draw_copying(seed: int = 0, batch: int = 0) -> Batch:
    return copying(seed, batch, rows=5, symbols=7, vocab_size=9, blanks=3)


def draw_delay(seed: int = 0, batch: int = 0) -> Batch:
    return delay(seed, batch, rows=5, length=40, lag=7)


def test_copying_tells_symbols_blanks_markers() -> None:
    inputs, targets = draw_copying()
    assert inputs.shape == (5, 17)
    assert torch.equal(inputs[:, :7], targets)
    assert bool((inputs[:, 7:10] == 0).all())
    assert bool((inputs[:, 10:] == 8).all())
    many = copying(0, 0, rows=100, symbols=20, vocab_size=9).targets
    assert (int(many.min()), int(many.max())) == (1, 7)


def test_delay_tells_the_signal_later() -> None:
    inputs, targets = draw_delay()
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
    # What is taken off for the start at zero is the same all along.
    assert math.isclose(
        float((inputs - inputs.mean(1, keepdim=True)).square().mean() ** 0.5), 0.5, rel_tol=0.02
    )


@pytest.mark.parametrize("draw", [draw_copying, draw_delay])
def test_batches_follow_from_seed_and_number_alone(draw: Callable[[int, int], Batch]) -> None:
    first = draw(0, 3)
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(0, 3), strict=True))
    for other in (draw(0, 4), draw(1, 3), draw(3, 0)):
        assert not torch.equal(first.inputs, other.inputs)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="no symbols besides blank and marker"):
        copying(0, 0, rows=1, symbols=3, vocab_size=2)
    with pytest.raises(ValueError, match="below the length, 8"):
        delay(0, 0, rows=1, length=8, lag=8)
    with pytest.raises(ValueError, match="below the lowest frequency"):
        delay(0, 0, rows=1, length=8, lag=1, cutoff=0.1)
