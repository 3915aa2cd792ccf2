"""Normalisation layers."""

from __future__ import annotations

from torch import Tensor, nn

from tnnlm.ops.norm import simple_rms_norm


class SimpleRMSNorm(nn.Module):
    """Root-mean-square normalisation of the last axis, without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., D) normalised along its last axis."""
        return simple_rms_norm(x)
