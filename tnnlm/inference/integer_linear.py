"""Linear layer with int8 weights and 8-bit inputs whose product a compiled step can call."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tnnlm.inference.linear import to_int8

_LARGEST = 127
"""Largest integer of a rounded input."""
_ZERO = 128
"""Integer of an input that is zero."""
_BLOCK = 64
"""Largest number of inputs in a block."""


class IntegerLinear(nn.Module):
    """Linear layer y = x W^T + b with int8 weights and 8-bit inputs, whose products oneDNN sums exactly.

    It computes what :class:`tnnlm.inference.linear.QuantizedLinear` does with 8-bit inputs. Its weights are a
    plain tensor instead of an opaque object, so that a package can refer to them. Without compilation it is
    the slower one, because the inputs are rounded in separate operations. The CPU needs VNNI instructions.
    """

    step: Tensor
    zero: Tensor
    scale: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        integers, scale = to_int8(weight)
        self._multiply = torch.ops.onednn.qlinear_pointwise.tensor
        self.packed = nn.Parameter(torch.ops.onednn.qlinear_prepack(integers, None), requires_grad=False)
        # Two copies each, of which the product takes the first: the compiler turns numbers and tensors of a
        # single number into constants, which a package can't hold.
        self.register_buffer("step", torch.full((2,), 1 / _LARGEST))
        self.register_buffer("zero", torch.full((2,), _ZERO, dtype=torch.int32))
        self.register_buffer("scale", scale.float())
        self.register_buffer("zeros", torch.zeros(len(scale), dtype=torch.int32))
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self._blocks = max(2, math.ceil(weight.shape[1] / _BLOCK))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., I) -> (..., O), in the dtype of ``x``."""
        rows = x.reshape(-1, x.shape[-1]).float()
        # By block first, because the compiler fails to fuse a maximum of all inputs with changes of a state.
        missing = -rows.shape[1] % self._blocks
        padded = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
        largest = padded.unflatten(1, (self._blocks, -1)).abs().amax(2).amax(1, keepdim=True)
        # A row of zeros becomes NaN, which is rounded to some integer, and zero times its output is zero.
        rounded = (rows / largest * _LARGEST).round().add(_ZERO).to(torch.uint8)
        y = self._multiply(
            rounded, self.step[:1], self.zero[:1], self.packed, self.scale, self.zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        y = y * largest if self.bias is None else torch.addcmul(self.bias, y, largest)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])
