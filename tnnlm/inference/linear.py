"""Linear layers for decoding, with weights packed or quantised to minimise memory traffic.

A decoding step reads every weight once, so a matrix-vector product is bound by memory bandwidth. Measured on
one core, PyTorch's float32 product reads 15 GB/s, oneDNN with prepacked weights 27 GB/s, and the memory gives
37 GB/s. Weights in bfloat16 or float16 halve the traffic, and int8 quarters it; activations between layers,
states and recurrences stay in float32. :mod:`tnnlm.inference.linear_choice` selects the layer for a device
and dtype.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tnnlm.machine.capabilities import capability
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.empty import without_weights

DTYPES = ("float32", "bfloat16", "float16", "int8")
"""Supported dtypes of weights."""
INT8_BLOCK = 32
"""Block size of the int8 operator: in_features and out_features must be multiples of it."""
_FEW_ROWS = 16
"""Largest batch for the int8 operator; for more rows, dequantising the weights first is faster."""
_SMALLEST_EXPONENT = -100
"""Smallest exponent assumed for an output's largest weight; it keeps scales normal float32 numbers."""
_HALF_ROWS = 3
"""Batches are padded to a multiple of this, so that FBGEMM has no remainder of one or two rows."""
_TILE_BYTES = 1 << 19
"""Size in bytes of a tile of weights in float32; it fits into the L2 cache."""
_PARTS = (32, 16, 8, 4, 2, 1)
"""Numbers of parts of a matrix that MKL multiplies by a single row."""
_PACKED_ROWS = 64
"""Batch size that oneDNN packs float32 weights for. With the order of memory for a single row, products of a
few rows take up to twice as long, and those of a single row as long."""


class InferenceLinear(nn.Module):
    """Linear layer y = x W^T + b with W prepacked by oneDNN in float32 or bfloat16; y has the dtype of x."""

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        # A single overload avoids overload resolution at each call.
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        # The packed tensor is opaque and can't be saved; a compiled step refers to it by its name.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), _PACKED_ROWS)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))
        self._operands = self.packed, self.bias  # a module takes a microsecond to find a parameter

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., I) -> (..., O)."""
        return self._product(x, "none").to(x.dtype)

    def silu(self, x: Tensor) -> Tensor:
        """Apply the layer and SiLU in one operator: (..., I) -> (..., O), in the dtype of the weights."""
        return self._product(x, "swish")

    def _product(self, x: Tensor, activation: str) -> Tensor:
        packed, bias = (self.packed, self.bias) if torch.compiler.is_exporting() else self._operands
        y: Tensor = self._multiply(x.to(self.dtype), packed, bias, activation, [], "")
        return y


class Float32Linear(InferenceLinear):
    """Linear layer y = x W^T + b in float32: MKL multiplies a single row, oneDNN several.

    For a single row, MKL's batched product reads plain weights nearly twice as fast as
    oneDNN reads packed ones. W is split by outputs into equal parts, which are the batch. The plain weights
    are those that the model was loaded with, usually a mapped file; the packed ones are a copy.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias, torch.float32)
        outputs, inputs = weight.shape
        self.parts = next(parts for parts in _PARTS if outputs % parts == 0)
        """Number of parts; 1 if the number of outputs is odd, and MKL is not used."""
        plain = weight.detach().float().contiguous()
        self._weight = plain.view(self.parts, outputs // self.parts, inputs)
        self._bias = None if self.bias is None else self.bias.view(self.parts, -1, 1)

    def _product(self, x: Tensor, activation: str) -> Tensor:
        inputs = x.shape[-1]
        if torch.compiler.is_exporting() or self.parts == 1 or x.numel() != inputs:
            return super()._product(x, activation)
        y = row_product(x.to(self.dtype).reshape(1, inputs), self._weight, self._bias)
        if activation == "swish":
            y = nn.functional.silu(y, inplace=True)
        return y.view(*x.shape[:-1], -1)


def row_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply a row x (1, I) by the parts of W (P, O/P, I) and add b (P, O/P, 1).

    Returns:
        The product, (P, O/P, 1), whose elements are those of x W^T + b in order.
    """
    # MKL is several times slower unless this is a transposed matrix for it, with a stride of I.
    column = x.unsqueeze(0).mT.expand(weight.shape[0], -1, 1)
    return torch.bmm(weight, column) if bias is None else torch.baddbmm(bias, weight, column)


class HalfLinear(nn.Module):
    """Linear layer y = x W^T + b with weights in float16 or bfloat16, which FBGEMM multiplies in float32.

    FBGEMM stores float16. As :func:`to_float16` scales every output, it represents bfloat16 weights down to
    2^-29 of the largest exactly, and smaller ones to within 2^-40 of it, which is below the rounding error of
    a float32 sum. An output with a weight that is not finite is NaN, because FBGEMM would return a finite
    number.
    """

    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: str = "float16") -> None:
        super().__init__()
        stored, scale = to_float16(weight.bfloat16() if dtype == "bfloat16" else weight)
        # The packed tensor is opaque and can't be stored in a state dict.
        self._packed = torch.ops.quantized.linear_prepack_fp16(stored.float(), None)
        self._multiply = torch.ops.quantized.linear_dynamic_fp16.default
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., I) -> (..., O), in the dtype of ``x``."""
        rows = x.reshape(-1, x.shape[-1]).float()
        # FBGEMM multiplies blocks of rows, and sums a remainder of one or two rows in another order. With
        # padding, a row's outputs are bitwise identical in any batch of two or more. A single row is not
        # padded, for speed.
        rest = -len(rows) % _HALF_ROWS if len(rows) > 1 else 0
        padded = torch.nn.functional.pad(rows, (0, 0, 0, rest)) if rest else rows.contiguous()
        y = self._multiply(padded, self._packed)[: len(rows)]
        y = y * self.scale if self.bias is None else torch.addcmul(self.bias, y, self.scale)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


class NarrowLinear(nn.Module):
    """Base of layers with weights in float32, bfloat16, float16 or int8.

    Holds the rounded W (O, I), and in float32 a scale per output for float16 and int8, and the bias.
    Subclasses implement the product.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: str) -> None:
        super().__init__()
        weight, scale = narrowed(weight, dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def completed(self, y: Tensor) -> Tensor:
        """Apply scale and bias to the product y of x and the rounded W, (..., O)."""
        if self.scale is not None:
            y = y * self.scale
        return y if self.bias is None else y + self.bias


class WidenedLinear(NarrowLinear):
    """Linear layer y = x W^T + b that converts narrower weights to float32 one tile at a time.

    It runs on machines without an operator for such weights, and reads each weight from memory once.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., I) -> (..., O), in the dtype of ``x``."""
        rows = x.reshape(-1, x.shape[-1]).float()
        tile = max(1, _TILE_BYTES // (4 * rows.shape[1]))
        y = torch.cat([rows @ part.float().T for part in self.weight.split(tile)], dim=1)
        return self.completed(y).to(x.dtype).unflatten(0, x.shape[:-1])


class Int8Linear(WidenedLinear):
    """Linear layer y = x W^T + b with weight-only int8 quantisation, symmetric, with one scale per output.

    Small batches use PyTorch's weight-only int8 operator, which takes x in bfloat16; larger ones dequantise W
    first.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias, "int8")
        assert self.scale is not None
        self._scale = self.scale.bfloat16()
        # The operator doesn't handle remainders: with other sizes it reads out of bounds.
        self._whole = weight.shape[0] % INT8_BLOCK == 0 and weight.shape[1] % INT8_BLOCK == 0
        self._half = bool(capability("bfloat16_arithmetic"))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., I) -> (..., O), in the dtype of ``x``."""
        rows = x.reshape(-1, x.shape[-1])
        if self._whole and len(rows) <= _FEW_ROWS:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self._scale)
        elif self._half:
            y = torch.nn.functional.linear(rows.bfloat16(), self.weight.bfloat16() * self._scale[:, None])
        else:
            return super().forward(x)
        y = y.to(x.dtype)
        return (y if self.bias is None else y + self.bias).unflatten(0, x.shape[:-1])


class QuantizedLinear(nn.Module):
    """Linear layer y = x W^T + b with int8 weights; FBGEMM rounds the inputs to integers and sums exactly.

    Each row of x is divided by its largest absolute value, so that it is rounded independently of the other
    rows. A row's outputs are therefore bitwise identical in any batch. Without VNNI instructions, FBGEMM adds
    pairs of products in 16 bits; inputs then have 7 bits instead of 8, so that no sum overflows.
    """

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        integers, scale = to_int8(weight)
        with warnings.catch_warnings():
            # PyTorch deprecates quantised tensors, which FBGEMM takes; without them the probe fails.
            warnings.simplefilter("ignore")
            zeros = torch.zeros(len(scale), dtype=torch.long)
            quantized = torch._make_per_channel_quantized_tensor(integers, scale.double(), zeros, 0)
            # The packed tensor is opaque and can't be stored in a state dict.
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self._multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        levels = 127 if capability("fbgemm_8bit_inputs") else 63
        self._step, self._zero = 1 / levels, levels + 1
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., I) -> (..., O), in the dtype of ``x``."""
        rows = x.reshape(-1, x.shape[-1]).float()
        # A row of zeros becomes NaN, which FBGEMM rounds to some integer, and zero times its output is zero.
        largest = torch.linalg.vector_norm(rows, math.inf, dim=1, keepdim=True)
        y = self._multiply(rows / largest, self._step, self._zero, self._packed)
        y = y.mul_(largest) if self.bias is None else torch.addcmul(self.bias, y, largest)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


def narrowed(weight: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """Round W (O, I) to one of ``DTYPES``.

    Returns:
        Rounded W and, for float16 and int8, the scale of each output in float32, (O,).
    """
    if dtype == "float16":
        return to_float16(weight)
    if dtype == "int8":
        integers, scale = to_int8(weight)
        return integers, scale.float()
    return weight.detach().to(getattr(torch, dtype)), None


def to_float16(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round W (O, I) to float16 with a power of two per output as scale, (O,) in float32.

    The largest weight of an output is between 2^14 and 2^15, so that weights of any size have the precision
    of float16. The scale of an output with a weight that is not finite is NaN, and its weights are zero.
    """
    weight = weight.detach().float()
    largest = weight.abs().amax(1)
    finite = largest.isfinite()
    exponent = torch.frexp(largest.nan_to_num(0, 0, 0)).exponent.clamp(min=_SMALLEST_EXPONENT) - 15
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    stored = (weight / scale[:, None]).masked_fill(~finite[:, None], 0).half()
    return stored, scale.masked_fill(~finite, math.nan)


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise W (O, I) symmetrically to int8 with a scale per output, (O,) in bfloat16."""
    weight = weight.detach().float()
    # The clamp keeps the scale of a row of zeros representable in bfloat16. The scale is rounded before the
    # division, so that the integers match the scale that is used.
    scale = (weight.abs().amax(1).clamp(min=1e-30) / 127).bfloat16()
    return (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def replace_linears(model: CausalLM, make: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
    """Replace every linear layer and the head by ``make(weight, bias)``."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, make(child.weight, child.bias))
    model.head = make(model.embedding.weight, None)
    model.eval().requires_grad_(False)


def cast_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> CastLinear:
    """Return a plain linear layer with weights of ``dtype``."""
    with without_weights():
        layer = CastLinear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return layer


class CastLinear(nn.Linear):
    """Plain linear layer whose weights may have a narrower dtype than its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., I) -> (..., O), in the dtype of ``x``."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)
