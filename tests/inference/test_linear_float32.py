"""Float32 layers of the packed engine: MKL for a single row, oneDNN for several."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from tnnlm.inference.linear import Float32Linear, InferenceLinear, row_product
from tnnlm.inference.linear_choice import choose_linear
from tnnlm.machine import capabilities
from tnnlm.machine.capabilities import capability

CPU = torch.device("cpu")
needs_both = pytest.mark.skipif(
    not (capability("onednn_float32") and capability("mkl_float32")), reason="needs oneDNN and MKL"
)


@needs_both
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("outputs", "inputs", "parts"), [(96, 40, 32), (36, 7, 4), (33, 1, 1), (2, 129, 2)])
def test_layer_equals_float64_for_any_size(outputs: int, inputs: int, parts: int, bias: bool) -> None:
    weight = torch.randn(outputs, inputs)
    offset = torch.randn(outputs) if bias else None
    layer = choose_linear(CPU, "float32").make(weight, offset)
    assert isinstance(layer, Float32Linear)
    assert layer.parts == parts
    for shape in ((1,), (1, 1), (3,), (2, 5)):
        x = torch.randn(*shape, inputs)
        expected = x.double() @ weight.double().T + (0 if offset is None else offset.double())
        with torch.inference_mode():
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(layer.silu(x).double(), silu(expected), rtol=1e-5, atol=1e-5)
            assert layer(x.double()).dtype == torch.float64


@needs_both
def test_row_may_be_a_view_with_any_strides() -> None:
    weight, x = torch.randn(32, 6), torch.randn(6, 4)
    layer = Float32Linear(weight, None)
    row = x.T[1:2]
    torch.testing.assert_close(layer(row), row @ weight.T)


@needs_both
def test_weights_of_a_single_row_are_not_copied() -> None:
    weight = torch.randn(64, 8)
    layer = Float32Linear(weight, None)
    assert layer._weight.data_ptr() == weight.data_ptr()


def test_product_of_a_row_has_the_order_of_the_outputs() -> None:
    weight, x, bias = torch.randn(12, 5), torch.randn(1, 5), torch.randn(12)
    found = row_product(x, weight.view(4, 3, 5), bias.view(4, 3, 1))
    assert found.shape == (4, 3, 1)
    torch.testing.assert_close(found.flatten(), (x @ weight.T)[0] + bias)


def test_without_mkl_all_rows_are_multiplied_by_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(capabilities.WITHOUT, "mkl_float32")
    if not capability("onednn_float32"):
        pytest.skip("no oneDNN")
    assert type(choose_linear(CPU, "float32").make(torch.randn(32, 8), None)) is InferenceLinear
