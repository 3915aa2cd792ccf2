"""The TNO kernel: the published formula, and float32 under every precision policy."""

from __future__ import annotations

import pytest
import torch

from tnnlm.kernels import TNOConfig, TNOKernel, build_kernel


def test_tno_taps_are_the_published_formula() -> None:
    kernel = TNOKernel(TNOConfig(decay=0.9, rpe_dim=8, rpe_layers=3), 5).double()
    taps = kernel(20)
    for lag in (0, 1, 19):
        h = (
            torch.tensor([float(lag)], dtype=torch.float64) @ kernel.rpe.input.weight.T
            + kernel.rpe.input.bias
        )
        for layer in kernel.rpe.hidden:
            h = layer(torch.relu(h / (h.norm() / 8**0.5 + 1e-8)))
        h = kernel.rpe.output(torch.relu(h / (h.norm() / 8**0.5 + 1e-8)))
        # The decay is stored and trained in float32.
        decay = torch.tensor(0.9, dtype=torch.float32).double()
        torch.testing.assert_close(taps[:, lag], h * decay**lag, rtol=1e-12, atol=0)


def test_tno_is_registered_and_has_frozen_decays() -> None:
    kernel = build_kernel(TNOConfig(decay=0.97), 6, 32)
    assert isinstance(kernel, TNOKernel)
    assert kernel.decay is not None
    assert kernel.decay.shape == (6,)
    assert "decays" in dict(kernel.named_buffers())
    assert not any(p is kernel.decay for p in kernel.parameters())


@pytest.mark.parametrize("length", [1, 3, 1000])
def test_tno_gives_any_length_and_a_longer_one_begins_the_same(length: int) -> None:
    kernel = TNOKernel(TNOConfig(rpe_dim=8, rpe_layers=1), 4)
    torch.testing.assert_close(kernel(length), kernel(2 * length)[:, :length], rtol=0, atol=1e-6)


def test_tno_runs_in_float32_under_autocast_and_bf16_casts() -> None:
    kernel = TNOKernel(TNOConfig(rpe_dim=8, rpe_layers=1), 4)
    expected = kernel(4096)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kernel(4096), expected)
    torch.set_default_dtype(torch.bfloat16)
    try:  # Lightning does this around forward under bf16-true
        assert torch.equal(kernel(4096), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(kernel.to(torch.bfloat16)(4096), expected)
    assert torch.equal(kernel.half()(4096), expected)


def test_tno_gradients_reach_every_parameter() -> None:
    kernel = TNOKernel(TNOConfig(rpe_dim=8, rpe_layers=2), 4)
    kernel(50).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in kernel.parameters())
