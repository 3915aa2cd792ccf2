"""Bidirectional kernels: negative lags from the same or a second network, and lag 0 counted once."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import FAMILIES
from tnnlm.kernels import TNOConfig, TNOKernel, TwoSidedKernel, build_kernel


def two_sided(family: str, max_length: int = 32) -> TwoSidedKernel:
    kernel = TwoSidedKernel(FAMILIES[family](), 6, max_length).double()
    for parameter in kernel.parameters():  # an RTF is initialised to the identity
        torch.nn.init.normal_(parameter, std=0.1)
    return kernel


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 2, 7, 32])
def test_lags_that_are_not_negative_are_the_causal_kernel(family: str, length: int) -> None:
    kernel = two_sided(family)
    k = kernel(length)
    assert k.shape == (6, 2 * length - 1)
    torch.testing.assert_close(k[:, length - 1 :], kernel.kernel(length), rtol=0, atol=1e-12)


def test_negative_lags_of_a_tno_use_the_same_network_with_the_decay_of_the_distance() -> None:
    kernel = TwoSidedKernel(TNOConfig(decay=0.9, rpe_dim=8, rpe_layers=2), 5, 32).double()
    assert kernel.reverse is None
    assert isinstance(kernel.kernel, TNOKernel)
    k = kernel(20)
    for lag in (-19, -3, -1, 4):
        value = kernel.kernel.rpe(torch.tensor([[float(lag)]], dtype=torch.float64))[:, 0]
        decay = torch.tensor(0.9, dtype=torch.float32).double()
        torch.testing.assert_close(k[:, lag + 19], value * decay ** abs(lag), rtol=1e-12, atol=0)
    assert not torch.allclose(k, k.flip(1), atol=1e-3)


@pytest.mark.parametrize("family", ["sgconv", "rtf"])
def test_negative_lags_of_others_are_a_second_kernel(family: str) -> None:
    kernel = two_sided(family)
    assert kernel.reverse is not None
    torch.testing.assert_close(kernel(16)[:, :15].flip(1), kernel.reverse(16)[:, :15], rtol=0, atol=0)
    single = build_kernel(FAMILIES[family](), 6, 32)
    own = sum(p.numel() for p in kernel.parameters() if p.requires_grad)
    # SGConv's skip connection at lag 0 exists once.
    assert own == 2 * sum(p.numel() for p in single.parameters()) - (6 if family == "sgconv" else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_taps_have_the_energy_of_both_sides(family: str) -> None:
    kernel = two_sided(family)
    folded = kernel.folded(20)
    assert folded.shape == (12, 20)
    torch.testing.assert_close(folded.square().sum(), kernel(20).square().sum())
    torch.testing.assert_close(folded[6:, 3], kernel(20)[:, 19 - 3])


def test_bidirectional_kernels_stay_in_float32() -> None:
    kernel = TwoSidedKernel(TNOConfig(rpe_dim=8, rpe_layers=1), 4, 32)
    expected = kernel(300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kernel.to(torch.bfloat16)(300), expected)
