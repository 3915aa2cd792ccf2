"""Linear layers with int8 weights and integer inputs, compared with the same integers in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.support.simulated import forget_probes
from tnnlm.inference.integer_linear import IntegerLinear
from tnnlm.inference.linear import QuantizedLinear, narrowed
from tnnlm.inference.linear_choice import choose_linear
from tnnlm.inference.row_linear import BlockedRowLinear, RowLinear
from tnnlm.machine import capabilities
from tnnlm.machine.capabilities import WITHOUT, capability

ROWS = (*range(1, 18), 31, 64, 65)
LEVELS = {7: 63, 8: 127}
"""Largest integer of an input, by number of bits."""


class Kind(NamedTuple):
    """Layer that rounds its inputs to integers."""

    make: Callable[[Tensor, Tensor | None], nn.Module]
    bits: int


@pytest.fixture(params=["FBGEMM, 7 bits", "FBGEMM, 8 bits", "oneDNN"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    """Return a layer that runs on this machine."""
    if request.param == "oneDNN":
        if not capability("onednn_int8"):
            pytest.skip("no oneDNN, or no VNNI instructions")
        return Kind(IntegerLinear, 8)
    if not capability("fbgemm_int8"):
        pytest.skip("no FBGEMM")
    bits = 7 if "7" in request.param else 8
    if bits == 7:
        monkeypatch.setenv(WITHOUT, "fbgemm_8bit_inputs")
    elif not capability("fbgemm_8bit_inputs"):
        pytest.skip("sums of 8-bit inputs overflow")
    return Kind(QuantizedLinear, bits)


def expected(x: Tensor, weight: Tensor, bias: Tensor, levels: int) -> Tensor:
    """Return the product of the rounded inputs and weights in float64."""
    integers, scale = narrowed(weight, "int8")
    assert scale is not None
    largest = x.double().abs().amax(1, keepdim=True)
    rounded = (x / largest.float() * levels).double().round().nan_to_num() * largest / levels
    return rounded @ integers.double().T * scale.double() + bias.double()


@pytest.mark.parametrize("shape", [(5, 1), (33, 7), (96, 130), (64, 64)])
def test_integer_products_are_exact_for_odd_sizes_and_any_scale(shape: tuple[int, int], kind: Kind) -> None:
    for size in (1e-40, 1e-30, 1.0, 1e30):
        weight, bias = torch.randn(shape), torch.randn(shape[0]) * size
        layer = kind.make(weight, bias)
        for n in ROWS:
            x = torch.randn(n, shape[1]) * size
            x[n // 2] = 0
            reference = expected(x, weight, bias, LEVELS[kind.bits])
            # An input halfway between two integers may be rounded to either: one step of one input.
            step = 1.01 * x.abs().max() / LEVELS[kind.bits] * weight.abs().max()
            error = (layer(x) - reference).abs()
            assert error.max() <= step
            assert (error <= 1e-5 * reference.abs().max()).float().mean() >= 0.9


def test_sums_of_the_largest_products_do_not_overflow(kind: Kind) -> None:
    weight = torch.ones(40, 512)
    weight[::2] *= -1
    y = kind.make(weight, None)(torch.full((3, 512), 2.0))
    torch.testing.assert_close(y, 2 * 512 * weight[:, 0].expand(3, -1), rtol=3e-3, atol=0)
    # Without VNNI two products are added in 16 bits; inputs are stored from 0 to twice their largest integer.
    assert kind.bits == 8 or 2 * (2 * LEVELS[kind.bits] + 1) * 127 < 1 << 15


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_input_that_is_not_finite_stays_in_its_row(bad: float, kind: Kind) -> None:
    x = torch.randn(4, 24)
    x[2, 5] = bad
    y = kind.make(torch.randn(16, 24), torch.randn(16))(x)
    assert not y[2].isfinite().any()
    assert y[[0, 1, 3]].isfinite().all()


def test_a_row_has_the_same_bits_alone_and_in_any_batch(kind: Kind) -> None:
    layer, x = kind.make(torch.randn(200, 96), torch.randn(200)), torch.randn(70, 96)
    whole = layer(x)
    for n in ROWS:
        assert torch.equal(layer(x[4 : 4 + n]), whole[4 : 4 + n]), f"{n} rows"


def test_operator_that_is_slow_without_vectors_is_not_used_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "cpu_level", lambda: "DEFAULT")
    monkeypatch.setattr(capabilities.platform, "machine", lambda: "AMD64")
    monkeypatch.setenv(WITHOUT, "fbgemm_int8")
    forget_probes()
    try:
        choice = choose_linear(torch.device("cpu"), "int8")
        assert choice.name == "widened in tiles"
        assert "no int8: PyTorch's int8 operator is slow without AVX2" in choice.reason
    finally:
        monkeypatch.undo()
        forget_probes()


@pytest.mark.parametrize("outputs", [1, 16, 33])
def test_blocks_of_outputs_hold_the_same_int8_weights(outputs: int) -> None:
    weight, bias, x = torch.randn(outputs, 28), torch.randn(outputs), torch.randn(1, 28)
    reference = RowLinear(weight, bias, "int8")(x)
    torch.testing.assert_close(BlockedRowLinear(weight, bias)(x), reference, rtol=0, atol=1e-5)
