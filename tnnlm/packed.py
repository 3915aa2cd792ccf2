"""Linear layers for decoding: weights laid out, or rounded, so that reading them costs the least.

A decoded token reads every weight once, so that the matrix-vector product should run at the memory's
speed. PyTorch's float32 one does not: measured on one core, 15 GB/s where oneDNN with weights it packed
itself reads 27, and the memory gives 37. Rounding weights to bfloat16 or int8 halves or quarters what
is read; activations between layers, states and recurrences stay float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tnnlm.errors import UserError
from tnnlm.model import CausalLM

DTYPES = ("float32", "bfloat16", "int8")
"""of weights"""
_BLOCK = 32
_FEW_ROWS = 16
"""up to so many rows int8 weights are multiplied as they are; above, rounding them back once is faster"""


class PackedLinear(nn.Module):
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
        y: Tensor = self._multiply(x.to(self.dtype), self._packed, self._bias, "none", [], "")
        return y.to(x.dtype)


class Int8Linear(nn.Module):
    """y = x W^T + b with W in int8 and a scale per output, symmetric; x is rounded to bfloat16."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        integers, scale = to_int8(weight)
        self.register_buffer("weight", integers)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        # The operation has no tail: on other sizes it reads past the end.
        whole = self.weight.shape[0] % _BLOCK == 0 and self.weight.shape[1] % _BLOCK == 0
        if whole and len(rows) <= _FEW_ROWS:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = torch.nn.functional.linear(rows, self.weight.bfloat16() * self.scale[:, None])
        y = y.to(x.dtype)
        return (y if self.bias is None else y + self.bias).unflatten(0, x.shape[:-1])


class RowLinear(nn.Module):
    """y = x W^T + b for one row, as a product and a sum: for a compiler, which makes of it a loop over W.

    That loop reads W as it lies, at the speed of the memory, and widens it in registers: x stays float32
    under any dtype of weights. Written as a matrix product it would be a call of a library, with
    whatever stands around it cut off.
    """

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

    def forward(self, x: Tensor) -> Tensor:
        """(1, I) -> (1, O)."""
        y = (x.unsqueeze(-2) * self.weight.to(x.dtype)).sum(-1)
        if self.scale is not None:
            y = y * self.scale
        return y if self.bias is None else y + self.bias


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric rounding of W (O, I): integers, and a scale per output (O,) in bfloat16."""
    weight = weight.detach().float()
    # A row of zeros keeps a scale that bfloat16 can hold; rounded first, so that the integers belong to
    # the one that is used.
    scale = (weight.abs().amax(1).clamp(min=1e-30) / 127).bfloat16()
    return (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def can_pack(device: torch.device) -> bool:
    """Whether :class:`PackedLinear` works there."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available()


def decoding_linear(weight: Tensor, bias: Tensor | None, dtype: str) -> nn.Module:
    """The fastest layer for decoding with weights of ``dtype``.

    Args:
        weight: (O, I), on the device it will run on.
        bias: (O,) or None.
        dtype: one of ``DTYPES``.

    Raises:
        UserError: for a dtype that this device has no operation for.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if dtype == "int8":
        layer = Int8Linear(weight, bias)
        try:
            layer(weight.new_zeros(1, weight.shape[1]))
        except RuntimeError as error:
            raise UserError(f"dtype int8: not on {weight.device} ({str(error).splitlines()[0]})") from None
        return layer
    kept = getattr(torch, dtype)
    if can_pack(weight.device):
        return PackedLinear(weight, bias, kept)
    return cast_linear(weight, bias, kept)


def replace_linears(model: CausalLM, make: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
    """Put what ``make`` returns for (weight, bias) in the place of every linear layer and of the head."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, make(child.weight, child.bias))
    model.head = make(model.embedding.weight, None)
    model.eval().requires_grad_(False)


def cast_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> CastLinear:
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
