"""ETSC reproduces n taps (invariant 5 of CONTRIBUTING.md), and follows the published formula past n."""

from __future__ import annotations

import math

import pytest
import torch

from tnnlm.conversion import etsc, window
from tnnlm.conversion.etsc import roots_of_unity

LENGTHS = (1, 2, 3, 63, 64, 100, 511, 512)


def random_taps(n: int, decay: float, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    t = torch.randn(channels, n, dtype=torch.float64)
    rates = torch.full((channels,), decay, dtype=torch.float64)
    return t, rates, t * rates[:, None] ** torch.arange(n)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("decay", [1.0, 0.99, 0.5])
def test_etsc_reproduces_n_taps(n: int, decay: float) -> None:
    _, rates, k = random_taps(n, decay)
    found = etsc(k, rates).taps(n)
    assert (found - k).norm() <= 1e-12 * k.norm()


@pytest.mark.parametrize("n", [4096, 8191, 8192, 16384])
@pytest.mark.parametrize("decay", [1.0, 0.999])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_etsc_reproduces_as_many_taps_as_in_the_paper(n: int, decay: float, dtype: torch.dtype) -> None:
    _, rates, k = random_taps(n, decay)
    k = k.to(dtype)
    found = etsc(k, rates).taps(n)
    assert (found - k).norm() <= (1e-12 if dtype == torch.float64 else 5e-6) * k.norm()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 9, 16, 513, 1000])
def test_roots_of_unity_lie_in_every_octant(n: int) -> None:
    expected = torch.polar(
        torch.ones(n // 2 + 1, dtype=torch.float64), 2 * math.pi * torch.arange(n // 2 + 1).double() / n
    )
    found = torch.complex(*roots_of_unity(n))
    assert (found - expected).abs().max() <= 1e-15
    if n % 2 == 0:
        assert found[-1] == -1


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("decay", [1.0, 0.99])
def test_etsc_past_n_follows_the_formula(n: int, decay: float) -> None:
    t, rates, k = random_taps(n, decay)
    found = etsc(k, rates).taps(3 * n + 3)
    lags = torch.arange(3 * n + 3)
    envelope = decay ** lags.double()
    balanced = torch.cat((t, -t.sum(1, keepdim=True)), dim=1)
    expected = balanced[:, lags % (n + 1)] * envelope
    assert (found - expected).norm() <= 1e-11 * expected.norm()


def test_etsc_shares_poles_of_equal_decays_only() -> None:
    _, rates, k = random_taps(20, 0.9)
    assert etsc(k, rates).poles.shape == (2, 10)
    rates = torch.tensor([0.9, 0.8, 0.7], dtype=torch.float64)
    params = etsc(k, rates)
    assert params.poles.shape == (3, 2, 10)
    assert (params.taps(20) - k).norm() <= 1e-12 * k.norm()


@pytest.mark.parametrize("n", LENGTHS)
def test_etsc_folds_pairs_and_has_order_n(n: int) -> None:
    params = etsc(torch.randn(2, n, dtype=torch.float64))
    assert params.residues.shape[2] == (n + 1) // 2
    assert params.order() == n


def test_etsc_survives_an_underflowing_decay() -> None:
    k = torch.zeros(1, 4000, dtype=torch.float64)
    k[0, :3] = torch.tensor([1.0, 0.5, 0.25])
    found = etsc(k, torch.tensor([0.5])).taps(4000)
    assert torch.isfinite(found).all()
    assert (found - k).norm() <= 1e-12 * k.norm()


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5, float("nan")])
def test_etsc_refuses_a_decay_outside_the_unit_interval(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        etsc(torch.ones(1, 4, dtype=torch.float64), torch.tensor([decay]))


@pytest.mark.parametrize("convert", [etsc, window])
@pytest.mark.parametrize(
    "taps", [torch.ones(2, 0), torch.tensor([[1.0, float("nan")]]), torch.tensor([[float("inf")]])]
)
def test_conversions_refuse_unusable_taps(convert: object, taps: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="finite"):
        convert(taps.double())  # type: ignore[operator]


def test_window_keeps_its_taps_and_nothing_else() -> None:
    k = torch.randn(3, 17, dtype=torch.float64)
    found = window(k).taps(40)
    assert torch.equal(found[:, :17], k)
    assert not found[:, 17:].any()
