"""Base class of modules that stay in float32 or wider under every precision policy.

Poles, residues and the position network are ordinary weights to ``module.to(bfloat16)``, but bf16 poles
cause relative errors above 1, and bf16 positions round 4,096 lags to 769 values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class KeepsFloat32(nn.Module):
    """Module that follows device moves and casts to wider dtypes, and ignores casts below float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: _at_least_float32(fn, tensor), recurse)


def _at_least_float32(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    moved = fn(tensor)
    if moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32:
        # Move the original tensor: the cast copy is rounded already.
        return tensor.to(device=moved.device)
    return moved


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which FFTs and recurrences run: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
