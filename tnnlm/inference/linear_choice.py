"""Selection of the fastest linear layer for a dtype of weights on a device.

On a CPU the selection depends on its capabilities (:mod:`tnnlm.machine.capabilities`); a GPU runs plain
products in float32 or bfloat16. All layers for a dtype round the weights identically. Some also round a
layer's inputs: oneDNN and GPUs with bfloat16 weights and PyTorch's int8 operator to bfloat16, and FBGEMM with
int8 weights to integers of 7 or 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tnnlm.errors import UserError
from tnnlm.inference.integer_linear import IntegerLinear
from tnnlm.inference.linear import (
    DTYPES,
    Float32Linear,
    HalfLinear,
    InferenceLinear,
    Int8Linear,
    QuantizedLinear,
    WidenedLinear,
    cast_linear,
)
from tnnlm.machine.capabilities import capability

BATCH_DTYPES = ("float32", "bfloat16", "int8")
"""Dtypes whose products a compiled step of batches can call, on CPUs where oneDNN has operators for them."""


class Choice(NamedTuple):
    """Selected linear layer for one dtype on one device."""

    name: str
    """Name of the operator, as shown in the description of the engine."""
    make: Callable[[Tensor, Tensor | None], nn.Module]
    """Function (weight, bias) -> layer."""
    batch_invariant: bool = False
    """Whether a row's outputs are bitwise identical in any batch of two or more rows."""
    reason: str = ""
    """Why no faster operator was selected."""


def choose_linear(device: torch.device, dtype: str) -> Choice:
    """Select the fastest layer for weights of ``dtype`` whose operator works on ``device``.

    Raises:
        UserError: If the dtype is unknown, or the device has no operator for it.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if device.type != "cpu":
        return _choose_elsewhere(device, dtype)
    missing: list[str] = []
    for name, choice in _ON_CPU[dtype]:
        found = capability(name) if name else None
        if found is None or found:
            return choice._replace(reason="; ".join(missing))
        missing.append(f"no {name}: {found.reason}")
    raise AssertionError("the last choice needs no capability")


def choose_batch_linear(dtype: str) -> Choice | None:
    """Select the layer whose product a compiled step of batches can call on this CPU; None if there is none.

    For int8 it is another layer than the one that runs without compilation.
    """
    if dtype == "int8":
        return _COMPILED_INT8 if capability("onednn_int8") else None
    choice = choose_linear(torch.device("cpu"), dtype)
    return choice if choice.name == _ONEDNN else None


def _choose_elsewhere(device: torch.device, dtype: str) -> Choice:
    # PyTorch's int8 operator runs on GPUs too, but many times slower than a product in bfloat16. A product in
    # float16 would also round the inputs to float16, and overflow beyond 65504.
    if reason := {"int8": "no fast operator", "float16": "no product with float32 inputs"}.get(dtype):
        raise UserError(f"--dtype {dtype}: PyTorch has {reason} on {device.type}", "use --dtype bfloat16")
    return Choice("plain", partial(cast_linear, dtype=getattr(torch, dtype)))


def _widened_bfloat16(weight: Tensor, bias: Tensor | None) -> WidenedLinear:
    # PyTorch converts float16 to float32 faster than bfloat16. The scales make it as exact.
    return WidenedLinear(weight.bfloat16(), bias, "float16")


def _float32(weight: Tensor, bias: Tensor | None) -> InferenceLinear:
    if capability("mkl_float32"):
        return Float32Linear(weight, bias)
    return InferenceLinear(weight, bias, torch.float32)


_WITHOUT_AVX512 = not torch.cpu._is_avx512_supported()
"""Whether FBGEMM gives a row the same bits in any batch: with AVX-512 some of its versions don't."""
_ONEDNN = "oneDNN"
_COMPILED_INT8 = Choice("oneDNN int8", IntegerLinear, True)
_ON_CPU = {
    "float32": (
        ("onednn_float32", Choice(_ONEDNN, _float32, True)),
        ("", Choice("plain", partial(cast_linear, dtype=torch.float32))),
    ),
    "bfloat16": (
        ("onednn_bfloat16", Choice(_ONEDNN, partial(InferenceLinear, dtype=torch.bfloat16), True)),
        ("fbgemm_float16", Choice("FBGEMM float16", partial(HalfLinear, dtype="bfloat16"), _WITHOUT_AVX512)),
        ("", Choice("widened in tiles", _widened_bfloat16)),
    ),
    "float16": (
        ("fbgemm_float16", Choice("FBGEMM float16", HalfLinear, _WITHOUT_AVX512)),
        ("", Choice("widened in tiles", partial(WidenedLinear, dtype="float16"))),
    ),
    "int8": (
        ("fbgemm_int8", Choice("FBGEMM int8", QuantizedLinear, True)),
        ("int8", Choice("int8", Int8Linear)),
        ("", Choice("widened in tiles", partial(WidenedLinear, dtype="int8"))),
    ),
}
"""Layers for each dtype as (required capability, layer), fastest first; the last requires none."""
