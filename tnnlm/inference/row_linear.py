"""Linear layers for a single row, as an elementwise product and a sum that a compiler fuses into one loop.

The loop reads the weights in their stored dtype at memory bandwidth and converts them to float32 in
registers, so x stays in float32 for any dtype of weights. A matrix product would compile to a library call,
which can't be fused with adjacent operations. The inputs are computed before the loop: fused into it, a
normalisation would be repeated for every output, which takes longer than reading narrow weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tnnlm.inference.linear import NarrowLinear
from tnnlm.machine.capabilities import cpu_level

_LANES = 16
"""Outputs in a block of int8 weights, as many as an AVX-512 register holds in float32."""
_BYTES = 4
"""Number of int8 weights packed into an int32, and of inputs that are summed before they are accumulated."""


class RowLinear(NarrowLinear):
    """Linear layer y = x W^T + b for one row, with W in one of ``DTYPES``."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (1, I) -> (1, O)."""
        return self.completed((stored(x).unsqueeze(-2) * self.weight.to(x.dtype)).sum(-1))


class BlockedRowLinear(NarrowLinear):
    """Linear layer y = x W^T + b for one row, with int8 weights in blocks of 16 outputs.

    A vector holds the outputs of a block, so that no sum over a vector is needed, and four products are added
    before the accumulator, whose latency would limit the speed otherwise.
    """

    blocks: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Rearrange the weights; I must be a multiple of four."""
        super().__init__(weight, bias, "int8")
        self.outputs = weight.shape[0]
        padded = nn.functional.pad(self.weight, (0, 0, 0, -self.outputs % _LANES))
        # (O/16, I/4, 4, 16)
        blocks = padded.unflatten(0, (-1, _LANES)).unflatten(2, (-1, _BYTES)).permute(0, 2, 3, 1)
        self.register_buffer("blocks", blocks.contiguous())
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (1, I) -> (1, O)."""
        inputs = stored(x).unflatten(-1, (-1, _BYTES)).unsqueeze(-3).unsqueeze(-1)
        products = inputs[..., 0, :] * self.blocks[..., 0, :].to(x.dtype)
        for i in range(1, _BYTES):
            products = products + inputs[..., i, :] * self.blocks[..., i, :].to(x.dtype)
        return self.completed(products.sum(-2).flatten(-2)[..., : self.outputs])


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
        for i, part in enumerate(stored(x).unsqueeze(-2).split(self.quarter, dim=-1)):
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
    if dtype != "int8" or weight.shape[1] % _BYTES:
        return RowLinear(weight, bias, dtype)
    if cpu_level().startswith("AVX512"):
        return BlockedRowLinear(weight, bias)
    return FourByteRowLinear(weight, bias)


def stored(x: Tensor) -> Tensor:
    """Return x; a compiled step computes it in a separate loop and stores it."""
    if not torch.compiler.is_exporting():
        return x
    from torch._inductor import test_operators  # noqa: F401  # defines the operator

    stored: Tensor = torch.ops._inductor_test.realize(x)
    return stored
