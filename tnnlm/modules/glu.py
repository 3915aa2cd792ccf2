"""Channel mixing by the gated linear unit of the TNN paper (arXiv 2305.04749), W_3(SiLU(W_1 x) * W_2 x)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GLU(nn.Module):
    """Gated linear unit; W_1 and W_2 are the two halves of one projection."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, 2 * d_hidden)
        self.out_proj = nn.Linear(d_hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (..., D) for x (..., D)."""
        gate, value = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(torch.nn.functional.silu(gate) * value)
