"""Linear layers for a single row, as an elementwise product and a sum that a compiler fuses into one loop.

The loop reads the weights in their stored dtype at memory bandwidth and converts them to float32 in
registers, so x stays in float32 for any dtype of weights. A matrix product would compile to a library call,
which can't be fused with adjacent operations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tnnlm.inference.linear import NarrowLinear
from tnnlm.machine.capabilities import cpu_level

_BYTES = 4
"""Number of int8 weights packed into an int32."""


class RowLinear(NarrowLinear):
    """Linear layer y = x W^T + b for one row, with W in one of ``DTYPES``."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (1, I) -> (1, O)."""
        return self.completed((x.unsqueeze(-2) * self.weight.to(x.dtype)).sum(-1))


class FourByteRowLinear(NarrowLinear):
    """Linear layer y = x W^T + b for one row, with four int8 weights packed into each int32.

    Without AVX-512, PyTorch's compiler converts int8 to float32 element by element, ten times slower than
    memory bandwidth allows. Shifts of int32 and their conversion to float32 are vectorised.
    """

    words: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Pack the weights; I must be a multiple of four."""
        super().__init__(weight, bias, "int8")
        self.quarter = weight.shape[1] // _BYTES
        # Byte i of word q is column i I/4 + q, so that each shift applies to a contiguous slice of the
        # inputs.
        octets = self.weight.unflatten(1, (_BYTES, self.quarter)).to(torch.int32).bitwise_and(0xFF)
        places = 8 * torch.arange(_BYTES, dtype=torch.int32, device=weight.device)
        self.register_buffer("words", (octets << places[:, None]).sum(1, dtype=torch.int32))
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (1, I) -> (1, O)."""
        products = x.new_zeros(())
        for i, part in enumerate(x.unsqueeze(-2).split(self.quarter, dim=-1)):
            # The left shift moves the byte to the top, and the arithmetic right shift extends its sign.
            products = products + part * ((self.words << (24 - 8 * i)) >> 24).to(x.dtype)
        return self.completed(products.sum(-1))


def row_linear(weight: Tensor, bias: Tensor | None, dtype: str) -> nn.Module:
    """Return the single-row layer that compiles to the fastest code on this CPU.

    Args:
        weight: Weights, (O, I).
        bias: Bias, (O,), or None.
        dtype: Dtype of the weights.
    """
    if dtype == "int8" and weight.shape[1] % _BYTES == 0 and not cpu_level().startswith("AVX512"):
        return FourByteRowLinear(weight, bias)
    return RowLinear(weight, bias, dtype)
