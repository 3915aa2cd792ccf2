"""The Hyena kernel: the authors' filter and operator, lags past its length, and its finite recurrence."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from tests.support.reference import reference
from tnnlm.conversion import convert_taps
from tnnlm.conversion.horizon import auto_horizon
from tnnlm.kernels import HyenaConfig, HyenaKernel
from tnnlm.ops.toeplitz import toeplitz

LENGTH = 40


def kernel_of(**settings: object) -> HyenaKernel:
    config = {"width": 12, "bands": 2, "length": LENGTH}
    return HyenaKernel(HyenaConfig(name="hyena", **{**config, **settings}), 8, 64).double()


def with_reference_weights(**settings: object) -> HyenaKernel:
    tensors, _ = reference("hyena_operator")
    weights = {
        name.removeprefix("weights.filter_fn."): t for name, t in tensors.items() if "filter_fn" in name
    }
    kernel = kernel_of(**settings)
    with torch.no_grad():
        for index, layer in enumerate(kernel.hidden):
            layer.weight.copy_(weights[f"implicit_filter.{2 * index}.weight"])
            layer.bias.copy_(weights[f"implicit_filter.{2 * index}.bias"])
            kernel.frequencies[index] = weights[f"implicit_filter.{2 * index + 1}.freq"][0]
        kernel.output.weight.copy_(weights["implicit_filter.6.weight"])
        kernel.deltas.copy_(weights["modulation.deltas"].flatten())
        kernel.bias.copy_(weights["bias"])
        if kernel.encoding is not None:
            kernel.encoding.copy_(weights["pos_emb.z"][0])
    return kernel


@pytest.mark.parametrize("train_encoding", [False, True])
def test_taps_equal_the_filter_of_the_authors(train_encoding: bool) -> None:
    tensors, _ = reference("hyena_operator")
    kernel = with_reference_weights(train_encoding=train_encoding)
    expected = tensors["filter"][0].T.clone()
    expected[:, 0] += kernel.bias.detach()
    # The reference computes the encoding in float32.
    atol = 1e-14 if train_encoding else 1e-5
    torch.testing.assert_close(kernel(LENGTH), expected, rtol=0, atol=atol)


def test_operator_of_order_2_equals_that_of_the_authors() -> None:
    tensors, _ = reference("hyena_operator")
    u = linear(tensors["x"], tensors["weights.in_proj.weight"], tensors["weights.in_proj.bias"])
    short = tensors["weights.short_filter.weight"][:, 0].flip(1)
    x0, x1, v = (toeplitz(u, short) + tensors["weights.short_filter.bias"]).chunk(3, dim=2)
    kernel = with_reference_weights(train_encoding=True)
    y = x0 * toeplitz(v * x1, kernel(LENGTH))
    y = linear(y, tensors["weights.out_proj.weight"], tensors["weights.out_proj.bias"])
    torch.testing.assert_close(y, tensors["y"], rtol=0, atol=1e-13)


@pytest.mark.parametrize("length", [1, 7, 39, 40, 41, 130])
def test_taps_past_the_length_are_zero_and_do_not_depend_on_the_sequence(length: int) -> None:
    kernel = kernel_of()
    k = kernel(length)
    assert k.shape == (8, length)
    torch.testing.assert_close(k[:, :LENGTH], kernel(LENGTH)[:, :length], rtol=0, atol=1e-14)
    assert not k[:, LENGTH:].any()
    assert kernel(LENGTH)[:, -1].abs().min() > 0


def test_every_parameter_has_a_gradient() -> None:
    kernel = kernel_of(train_encoding=True)
    kernel(LENGTH).square().sum().backward()
    for name, parameter in kernel.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    k = [p for n, p in kernel.named_parameters() if n in ("output.weight", "bias")]
    assert torch.autograd.gradcheck(lambda *_: kernel(5), k)


def test_horizon_is_the_length_and_the_window_is_exact() -> None:
    kernel = kernel_of()
    assert auto_horizon(kernel, 16) == LENGTH
    k = kernel(3 * LENGTH).detach()
    params, report = convert_taps(k[:, :LENGTH], method="window")
    torch.testing.assert_close(params.taps(3 * LENGTH), k, rtol=0, atol=1e-6)
    assert report.order == LENGTH
