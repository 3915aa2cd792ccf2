"""SimpleRMSNorm of the TNN paper: x / (||x||_2 / sqrt(d) + 1e-8), without a learnable scale."""

from __future__ import annotations

import torch
from torch import Tensor


def simple_rms_norm(x: Tensor) -> Tensor:
    """Scale the last axis (..., D) to root mean square 1 (arXiv 2305.04749, section 3.3)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / (norm * x.shape[-1] ** -0.5 + 1e-8)
