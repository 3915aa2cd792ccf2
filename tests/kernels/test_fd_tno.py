"""The frequency-domain TNO kernel: spectrum, causality, lengths, gradients, and decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tnnlm.kernels import FDTNOConfig, FDTNOKernel, build_kernel
from tnnlm.kernels.fd_tno import causal_taps
from tnnlm.ops.reference import toeplitz_dense
from tnnlm.ops.toeplitz import toeplitz

LENGTHS = (1, 2, 7, 16, 33)


def kernel_of(max_length: int, **settings: object) -> FDTNOKernel:
    config = FDTNOConfig(name="fd_tno", **{"rpe_dim": 8, "rpe_layers": 2, **settings})
    return FDTNOKernel(config, 5, max_length).double()


def real_part(kernel: FDTNOKernel) -> Tensor:
    """Return the output of the position encoder at the frequencies pi j / L, (E, L + 1)."""
    return kernel.rpe(kernel._positions())


def dense_taps(real: Tensor) -> Tensor:
    """Return sums of cosines, one per lag, doubled where the even sequence is folded."""
    last = real.shape[1] - 1
    j = torch.arange(last + 1, dtype=torch.float64)
    weight = torch.full_like(j, 2.0)
    weight[0] = weight[last] = 1
    even = real * weight @ torch.cos(math.pi * torch.outer(j, j) / last) / (2 * last)
    return even * weight


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rpe_input", ["cosine", "angle"])
def test_taps_and_gradients_are_those_of_the_dense_formula(length: int, rpe_input: str) -> None:
    kernel = kernel_of(length, rpe_input=rpe_input)
    taps = kernel(length + 1)
    expected = dense_taps(real_part(kernel))
    torch.testing.assert_close(taps, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(taps)
    parameters = list(kernel.parameters())
    gradients = torch.autograd.grad((taps * weights).sum(), parameters)
    dense = torch.autograd.grad((expected * weights).sum(), parameters)
    for one, other in zip(gradients, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", LENGTHS)
def test_gradients_of_the_transform_in_float64(length: int) -> None:
    real = torch.randn(2, length + 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: causal_taps(x, length + 1), (real,))


@pytest.mark.parametrize("length", LENGTHS)
def test_spectrum_is_the_real_part_and_its_hilbert_transform(length: int) -> None:
    kernel = kernel_of(length)
    n = 2 * length
    spectrum = torch.fft.rfft(kernel(length + 1), n=n)
    real = real_part(kernel)
    torch.testing.assert_close(spectrum.real, real, rtol=0, atol=1e-12)
    # The discrete Hilbert transform of a periodic sequence of even length sums odd distances only, with
    # cotangent weights.
    whole = torch.cat((real, real[:, 1:-1].flip(1)), dim=1)
    distance = torch.arange(length + 1)[:, None] - torch.arange(n)
    weight = torch.where(distance % 2 != 0, 2 / n / torch.tan(math.pi * distance.double() / n), 0.0)
    torch.testing.assert_close(spectrum.imag, -whole @ weight.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 7, 31, 32, 33, 100])
def test_any_length_begins_the_same_and_ends_past_the_training_length(length: int) -> None:
    kernel = kernel_of(32)
    k = kernel(length)
    assert k.shape == (5, length)
    torch.testing.assert_close(k, kernel(300)[:, :length], rtol=0, atol=1e-14)
    assert not k[:, 33:].any()


@pytest.mark.parametrize("length", [1, 7, 64, 100])
def test_convolution_and_gradients_match_the_dense_product(length: int) -> None:
    kernel = kernel_of(33)
    x = torch.randn(2, length, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, *kernel.parameters()]
    outputs = [toeplitz(x, kernel(length)), toeplitz_dense(x, kernel(length))]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)
    weights = torch.randn_like(outputs[0])
    fast, slow = (torch.autograd.grad((y * weights).sum(), inputs) for y in outputs)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_float32_under_autocast_and_bf16_casts() -> None:
    kernel = build_kernel(FDTNOConfig(name="fd_tno", rpe_dim=8, rpe_layers=1), 4, 512)
    expected = kernel(700)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kernel(700), expected)
    torch.set_default_dtype(torch.bfloat16)
    try:  # Lightning does this around forward under bf16-true
        assert torch.equal(kernel(700), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(kernel.to(torch.bfloat16)(700), expected)
    assert expected.dtype == torch.float32


def tail(lag: int, **settings: object) -> float:
    """Return the share of the norm past lag 0 that is at ``lag`` or later."""
    torch.manual_seed(0)
    with torch.no_grad():
        k = kernel_of(512, rpe_layers=1, rpe_norm=False, **settings)(512)
    return float(k[:, lag:].norm() / k[:, 1:].norm())


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_a_smooth_network_of_the_cosine_decays_to_rounding_and_a_kinked_one_does_not(
    activation: str,
) -> None:
    assert tail(64, activation=activation) < 1e-10
    assert tail(64, activation="relu") > 1e-5
    # On the angle, the even spectrum has kinks at both ends for any network.
    assert tail(64, activation=activation, rpe_input="angle") > 1e-5
