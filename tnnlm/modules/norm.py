"""Normalisation layers, and the choice of the one before the output layer."""

from __future__ import annotations

from torch import Tensor, nn

from tnnlm.ops.norm import simple_rms_norm


class SimpleRMSNorm(nn.Module):
    """Root-mean-square normalisation of the last axis, without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., D) normalised along its last axis."""
        return simple_rms_norm(x)


def final_norm(name: str, d_model: int) -> nn.Module:
    """Return the norm before the output layer: ``simple_rms``, or ``layer`` for an affine LayerNorm.

    The published TNN language models (arXiv 2305.04749) use the SimpleRMSNorm inside the blocks, but end in a
    LayerNorm with scale and bias, 2 ``d_model`` parameters.
    """
    return nn.LayerNorm(d_model) if name == "layer" else SimpleRMSNorm()
