"""Linear layers for decoding: weights laid out, or rounded, so that reading them costs the least.

A decoded token reads every weight once, so that the matrix-vector product should run at the memory's
speed. PyTorch's float32 one does not: measured on one core, 15 GB/s where oneDNN with weights it packed
itself reads 27, and the memory gives 37. Rounding weights to bfloat16 or int8 halves or quarters what
is read; activations between layers, states and recurrences stay float32. :mod:`tnnlm.inference.linear_choice`
says which layer runs where.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tnnlm.machine.capabilities import capability
from tnnlm.models.causal_lm import CausalLM

DTYPES = ("float32", "bfloat16", "int8")
"""of weights"""
INT8_BLOCK = 32
"""sizes that the int8 operator takes are multiples of it"""
_FEW_ROWS = 16
"""up to so many rows int8 weights are multiplied as they are; above, rounding them back once is faster"""
_SMALLEST_EXPONENT = -100
"""of an output's largest weight: scales stay normal float32 numbers"""
_HALF_ROWS = 3
"""a multiple of which FBGEMM never ends in a rest of one or two rows"""
_TILE_BYTES = 1 << 19
"""of widened weights: a tile stays in the second-level cache"""


class InferenceLinear(nn.Module):
    """y = x W^T + b with W packed by oneDNN, in float32 or bfloat16; x and y keep their dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        # One overload, so that no call looks for it.
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        # Opaque tensors, which no state dict can hold.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), 1)
        self._bias = None if bias is None else bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        y = self._multiply(x.to(self.dtype), self._packed, self._bias, "none", [], "")
        return y.to(x.dtype)


class HalfLinear(nn.Module):
    """y = x W^T + b with bfloat16 weights that FBGEMM holds in float16 and multiplies in float32.

    The weights of every output are stored times a power of two, so that the largest lies between 2^14 and
    2^15: float16 then holds every bfloat16 weight down to 2^-29 of it exactly, and smaller ones to 2^-40 of
    it, which is below the rounding of a float32 sum. An output with a weight that is not finite is NaN:
    FBGEMM would make a number of it.
    """

    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        rounded = weight.detach().bfloat16().double()
        largest = rounded.abs().amax(1)
        finite = largest.isfinite()
        exponent = torch.frexp(largest.nan_to_num(0, 0, 0)).exponent.clamp(min=_SMALLEST_EXPONENT) - 15
        scale = torch.ldexp(torch.ones_like(largest), exponent)
        stored = (rounded / scale[:, None]).masked_fill(~finite[:, None], 0).float()
        # Opaque, as above.
        self._packed = torch.ops.quantized.linear_prepack_fp16(stored, None)
        self._multiply = torch.ops.quantized.linear_dynamic_fp16.default
        self.register_buffer("scale", scale.masked_fill(~finite, math.nan).float())
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the dtype of ``x``."""
        rows = x.reshape(-1, x.shape[-1]).float()
        # FBGEMM multiplies blocks of rows and sums a rest of one or two in another order: padded, a row has
        # the same bits in any batch of two or more. Alone it stays, which is faster.
        rest = -len(rows) % _HALF_ROWS if len(rows) > 1 else 0
        padded = torch.nn.functional.pad(rows, (0, 0, 0, rest)) if rest else rows.contiguous()
        y = self._multiply(padded, self._packed)[: len(rows)]
        y = y * self.scale if self.bias is None else torch.addcmul(self.bias, y, self.scale)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


class NarrowLinear(nn.Module):
    """What layers of weights in float32, bfloat16 or int8 hold: the rounded W (O, I), a scale per output for
    int8, and the bias, both in float32. How they multiply is up to subclasses."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: str) -> None:
        super().__init__()
        scale = None
        if dtype == "int8":
            weight, scale = to_int8(weight)
            scale = scale.float()
        else:
            weight = weight.detach().to(getattr(torch, dtype))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def completed(self, y: Tensor) -> Tensor:
        """The layer's output (..., O) from the product y of x and the rounded W."""
        if self.scale is not None:
            y = y * self.scale
        return y if self.bias is None else y + self.bias


class WidenedLinear(NarrowLinear):
    """y = x W^T + b with narrow weights, widened to float32 a tile at a time: for machines that have no
    operator for them. The memory is read once, at the narrow width."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the dtype of ``x``."""
        rows = x.reshape(-1, x.shape[-1]).float()
        tile = max(1, _TILE_BYTES // (4 * rows.shape[1]))
        y = torch.cat([rows @ part.float().T for part in self.weight.split(tile)], dim=1)
        return self.completed(y).to(x.dtype).unflatten(0, x.shape[:-1])


class Int8Linear(WidenedLinear):
    """y = x W^T + b with W in int8 and a scale per output, symmetric: by PyTorch's weight-only int8 operator,
    which takes x in bfloat16, for few rows, and widened for many."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias, "int8")
        assert self.scale is not None
        self._scale = self.scale.bfloat16()
        # The operator has no tail: on other sizes it reads past the end.
        self._whole = weight.shape[0] % INT8_BLOCK == 0 and weight.shape[1] % INT8_BLOCK == 0
        self._half = weight.device.type != "cpu" or bool(capability("bfloat16_arithmetic"))

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the dtype of ``x``."""
        rows = x.reshape(-1, x.shape[-1])
        if self._whole and len(rows) <= _FEW_ROWS:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self._scale)
        elif self._half:
            y = torch.nn.functional.linear(rows.bfloat16(), self.weight.bfloat16() * self._scale[:, None])
        else:
            return super().forward(x)
        y = y.to(x.dtype)
        return (y if self.bias is None else y + self.bias).unflatten(0, x.shape[:-1])


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric rounding of W (O, I): integers, and a scale per output (O,) in bfloat16."""
    weight = weight.detach().float()
    # A row of zeros keeps a scale that bfloat16 can hold; rounded first, so that the integers belong to
    # the one that is used.
    scale = (weight.abs().amax(1).clamp(min=1e-30) / 127).bfloat16()
    return (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def replace_linears(model: CausalLM, make: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
    """Put what ``make`` returns for (weight, bias) in the place of every linear layer and of the head."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, make(child.weight, child.bias))
    model.head = make(model.embedding.weight, None)
    model.eval().requires_grad_(False)


def cast_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> CastLinear:
    """A plain linear layer with weights of ``dtype``."""
    layer = CastLinear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return layer


class CastLinear(nn.Linear):
    """A plain linear layer whose weights may be narrower than its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the dtype of ``x``."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)
