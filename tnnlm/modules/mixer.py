"""Sequence mixing by the gated Toeplitz unit of the TNN paper, W_o(SiLU(W_u x) * conv(SiLU(W_v x)))."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tnnlm.modules.long_conv import BiConv, LongConv
from tnnlm.modules.recurrent_conv import RecurrentConv
from tnnlm.ops.recurrence import State


class GatedMixer(nn.Module):
    """Gated long convolution, used instead of attention; W_u and W_v are the two halves of one projection.

    ``conv`` is a ``LongConv`` in training and a ``RecurrentConv`` after conversion; the projections are the
    same modules in both. With a ``BiConv`` the mixer is bidirectional.
    """

    n_states = 1
    """Number of states of the mixer."""
    conv: LongConv | BiConv | RecurrentConv

    def __init__(self, d_model: int, d_inner: int, conv: LongConv | BiConv | RecurrentConv) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, 2 * d_inner)
        self.conv = conv
        self.out_proj = nn.Linear(d_inner, d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None, *features: Tensor) -> Tensor:
        """Return the outputs (B, L, D) for x (B, L, D); ``features`` are those of the kernel, if known.

        Positions where ``mask`` (B, L) is False are padding: they are set to zero before the convolution and
        don't affect other positions.
        """
        gate, value = torch.nn.functional.silu(_channels_first(self.in_proj, x)).chunk(2)
        if mask is not None:
            value = value.masked_fill(~mask, 0.0)
        y = gate * self.conv(value.permute(1, 2, 0), *features).permute(2, 0, 1)
        out: Tensor = self.out_proj(y.flatten(1).T)
        return out.unflatten(0, x.shape[:2])

    def init_state(self, batch_size: int) -> tuple[State, ...]:
        """Return the state before the first token."""
        return (self.conv.init_state(batch_size),)

    def prefill(
        self, x: Tensor, states: tuple[State, ...], lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Process the tokens of x (B, L, D) in parallel and return outputs and the next state."""
        gate, value = self._project(x)
        y, state = self.conv.prefill(value, states[0], lengths)
        return self.out_proj(gate * y), (state,)

    def step(
        self, x: Tensor, states: tuple[State, ...], active: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Process one token x (B, D) and return outputs and the next state."""
        gate, value = self._project(x)
        y, state = self.conv.step(value, states[0], active)
        return self.out_proj(gate * y), (state,)

    def steps(self, x: Tensor, states: tuple[State, ...]) -> tuple[Tensor, list[tuple[State, ...]]]:
        """Process K tokens x (B, K, D) and return outputs and the states after each token."""
        gate, value = self._project(x)
        y, after = self.conv.steps(value, states[0])
        return self.out_proj(gate * y), [(state,) for state in after]

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return silu_of(self.in_proj, x).chunk(2, dim=-1)


def silu_of(layer: nn.Module, x: Tensor) -> Tensor:
    """Return SiLU of a linear layer's outputs, by one operator if the layer has one.

    The outputs of such an operator have the dtype of its weights.
    """
    fused = getattr(layer, "silu", None)
    y: Tensor = torch.nn.functional.silu(layer(x)) if fused is None else fused(x)
    return y


def _channels_first(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer to (B, L, D) and return (O, B, L), the layout that FFTs along the length need.

    The matrix product produces this layout at no cost, and the next product takes it as a transposed operand,
    so that neither the forward nor the backward pass copies a tensor to transpose it.
    """
    if not isinstance(layer, nn.Linear):
        return layer(x).permute(2, 0, 1)
    y = layer.weight @ x.flatten(0, 1).T
    if layer.bias is not None:
        y = y + layer.bias[:, None].to(y.dtype)
    return y.unflatten(1, x.shape[:2])
