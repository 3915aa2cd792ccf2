"""Linear layers of one row, written as a product and a sum, of which a compiler makes a single loop.

That loop reads the weights as they lie, at the speed of the memory, and widens them in registers: x stays
float32 under any dtype of weights. Written as a matrix product it would be a call of a library, with whatever
stands around it cut off.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tnnlm.inference.linear import NarrowLinear
from tnnlm.machine.capabilities import cpu_level

_BYTES = 4
"""int8 weights in an int32"""


class RowLinear(NarrowLinear):
    """y = x W^T + b with W in float32, bfloat16 or int8."""

    def forward(self, x: Tensor) -> Tensor:
        """(1, I) -> (1, O)."""
        return self.completed((x.unsqueeze(-2) * self.weight.to(x.dtype)).sum(-1))


class FourByteRowLinear(NarrowLinear):
    """y = x W^T + b with int8 weights, four of them in an int32 that shifts take apart.

    PyTorch's compiler turns int8 into float32 element by element where there is no AVX-512, ten times slower
    than the memory; int32 it shifts and converts in vectors.
    """

    words: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """I has to be a multiple of four."""
        super().__init__(weight, bias, "int8")
        self.quarter = weight.shape[1] // _BYTES
        # Byte i of word q is column i I/4 + q: every shift then belongs to a run of inputs that lie together.
        octets = self.weight.unflatten(1, (_BYTES, self.quarter)).to(torch.int32).bitwise_and(0xFF)
        places = 8 * torch.arange(_BYTES, dtype=torch.int32, device=weight.device)
        self.register_buffer("words", (octets << places[:, None]).sum(1, dtype=torch.int32))
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        """(1, I) -> (1, O)."""
        products = x.new_zeros(())
        for i, part in enumerate(x.unsqueeze(-2).split(self.quarter, dim=-1)):
            # Up to the sign bit and down again: the shift to the right keeps the sign.
            products = products + part * ((self.words << (24 - 8 * i)) >> 24).to(x.dtype)
        return self.completed(products.sum(-1))


def row_linear(weight: Tensor, bias: Tensor | None, dtype: str) -> nn.Module:
    """The layer that compiles best on this CPU.

    Args:
        weight: (O, I).
        bias: (O,) or None.
        dtype: of the weights.
    """
    if dtype == "int8" and weight.shape[1] % _BYTES == 0 and not cpu_level().startswith("AVX512"):
        return FourByteRowLinear(weight, bias)
    return RowLinear(weight, bias, dtype)
