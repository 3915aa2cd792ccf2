"""Modules whose tensors never go below float32, whatever a precision policy casts.

Poles, residues and the position network look like ordinary weights to ``module.to(bfloat16)``,
but bf16 poles give relative errors above 1 and bf16 positions collapse 4,096 lags to 769 values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class KeepsFloat32(nn.Module):
    """A module that follows device moves and casts upward, and ignores casts below float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: _at_least_float32(fn, tensor), recurse)


def _at_least_float32(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    moved = fn(tensor)
    if moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32:
        # Cast the original, not the rounded copy, so that no digit is lost on the way.
        return tensor.to(device=moved.device)
    return moved


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that FFTs and recurrences run in: float64 stays float64, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
