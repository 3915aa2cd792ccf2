"""Modules of a decoding step whose operations are fused; see :mod:`tnnlm.ops.fused`.

They share the layers of the modules that they replace. A step modifies the state that it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tnnlm.modules.block import Block
from tnnlm.modules.glu import GLU
from tnnlm.modules.mixer import GatedMixer
from tnnlm.modules.norm import SimpleRMSNorm
from tnnlm.modules.recurrent_conv import RecurrentConv
from tnnlm.ops import fused
from tnnlm.ops.recurrence import State
from tnnlm.ops.ssm import SSMParams, SSMState


class FusedRMSNorm(SimpleRMSNorm):
    """Root-mean-square normalisation in one operator."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., D) normalised along its last axis."""
        return fused.rms_norm(x)


class FusedGLU(GLU):
    """Gated linear unit with one operator between its projections."""

    def __init__(self, glu: GLU) -> None:
        """Take the layers of ``glu``."""
        nn.Module.__init__(self)
        self.in_proj, self.out_proj = glu.in_proj, glu.out_proj

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (..., D) for x (..., D)."""
        return self.out_proj(fused.silu_gate(self.in_proj(x)))


class FusedMixer(GatedMixer):
    """Gated recurrence with diagonal modes, whose step in place is one operator between its projections."""

    def __init__(self, mixer: GatedMixer) -> None:
        """Take the layers of a mixer for which :func:`can_fuse` holds."""
        nn.Module.__init__(self)
        self.in_proj, self.conv, self.out_proj = mixer.in_proj, mixer.conv, mixer.out_proj

    def step(
        self, x: Tensor, states: tuple[State, ...], active: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Process one token x (B, D) and return outputs and the next state."""
        (state,) = states
        assert isinstance(self.conv, RecurrentConv)
        assert isinstance(state, SSMState)
        y, window = fused.gated_step(self.in_proj(x), *self.conv.params, *state, active)
        return self.out_proj(y), (SSMState(window, state.real, state.imag),)


def can_fuse(mixer: nn.Module) -> bool:
    """Return whether a mixer is gated and its recurrence has diagonal modes in float32."""
    if not (type(mixer) is GatedMixer and isinstance(mixer.conv, RecurrentConv)):
        return False
    params = mixer.conv.params
    return isinstance(params, SSMParams) and params.residues.dtype == torch.float32


def fused_parts(block: Block) -> dict[str, nn.Module]:
    """Return fused modules by the names of the modules of a block that they replace."""
    parts: dict[str, nn.Module] = {
        name: FusedRMSNorm() for name in ("norm", "glu_norm") if type(getattr(block, name)) is SimpleRMSNorm
    }
    if can_fuse(block.mixer):
        assert isinstance(block.mixer, GatedMixer)
        parts["mixer"] = FusedMixer(block.mixer)
    if type(block.glu) is GLU:
        parts["glu"] = FusedGLU(block.glu)
    return parts
