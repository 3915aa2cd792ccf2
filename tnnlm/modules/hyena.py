"""Hyena operator of order 2 (arXiv 2302.10866): gates and values from short convolutions, then a long one.

    x0, x1, v = short(W_in x)        y = W_out(x0 * conv(x1 * v))

The short convolution of three taps per channel is a part of the weights, not of the conversion; its state is
the last two inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tnnlm.modules.long_conv import BiConv, LongConv
from tnnlm.modules.recurrent_conv import RecurrentConv
from tnnlm.ops.recurrence import State, steps
from tnnlm.ops.ssm import SSMParams, SSMState
from tnnlm.precision import KeepsFloat32

SHORT_TAPS = 3
"""Number of taps of the short convolution."""


class ShortConv(KeepsFloat32):
    """Causal convolution with a few trained taps and a bias per channel, with forward, prefill and step."""

    def __init__(self, channels: int, taps: int = SHORT_TAPS) -> None:
        super().__init__()
        bound = taps**-0.5
        self.taps = nn.Parameter(torch.empty(channels, taps).uniform_(-bound, bound))
        """Taps, (E, K), index = lag."""
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    @property
    def params(self) -> SSMParams:
        """Recurrence of the taps: a window without poles."""
        channels = len(self.taps)
        return SSMParams(self.taps, self.taps.new_zeros(2, 0), self.taps.new_zeros(channels, 2, 0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (B, L, E) for x (B, L, E)."""
        with torch.autocast(x.device.type, enabled=False):
            padded = nn.functional.pad(x.to(self.taps.dtype).transpose(1, 2), (self.taps.shape[1] - 1, 0))
            y = nn.functional.conv1d(padded, self.taps.flip(1)[:, None], self.bias, groups=len(self.taps))
            return y.transpose(1, 2).to(x.dtype)

    def init_state(self, batch_size: int) -> SSMState:
        """Return the state before the first token, which is not sharded where the taps are."""
        (channels, taps), like = self.taps.shape, self.taps
        window = torch.zeros(batch_size, channels, taps - 1, dtype=like.dtype, device=like.device)
        return SSMState(window, window[..., :0], window[..., :0])

    def prefill(self, x: Tensor, state: SSMState, lengths: Tensor | None) -> tuple[Tensor, SSMState]:
        """Process the tokens of x (B, L, E); see :meth:`tnnlm.ops.recurrence.Recurrence.prefill`."""
        with torch.autocast(x.device.type, enabled=False):
            y, state = self.params.prefill(x, state, lengths)
            return y + self.bias.to(y.dtype), state

    def step(self, x: Tensor, state: SSMState, active: Tensor | None) -> tuple[Tensor, SSMState]:
        """Process one token x (B, E); see :meth:`tnnlm.ops.recurrence.Recurrence.step`."""
        with torch.autocast(x.device.type, enabled=False):
            y, state = self.params.step(x, state, active)
            return y + self.bias.to(y.dtype), state

    def steps(self, x: Tensor, state: SSMState) -> tuple[Tensor, list[State]]:
        """Process K tokens x (B, K, E) and keep each state; see :func:`tnnlm.ops.recurrence.steps`."""
        with torch.autocast(x.device.type, enabled=False):
            y, states = steps(self.params, x, state)
            return y + self.bias.to(y.dtype), states


class HyenaMixer(nn.Module):
    """Hyena operator with one long convolution; its states are those of the short and the long one."""

    n_states = 2
    """Number of states of the mixer."""
    conv: LongConv | BiConv | RecurrentConv

    def __init__(self, d_model: int, conv: LongConv | BiConv | RecurrentConv) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.short = ShortConv(3 * d_model)
        self.conv = conv
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None, *features: Tensor) -> Tensor:
        """Return the outputs (B, L, D) for x (B, L, D); where ``mask`` (B, L) is False, x is padding.

        ``features`` are those of the kernel, if known.
        """
        u = self.in_proj(x)
        if mask is not None:
            u = u.masked_fill(~mask[..., None], 0.0)
        gate, factor, value = self.short(u).chunk(3, dim=-1)
        value = factor * value
        if mask is not None:
            value = value.masked_fill(~mask[..., None], 0.0)
        out: Tensor = self.out_proj(gate * self.conv(value, *features))
        return out

    def init_state(self, batch_size: int) -> tuple[State, ...]:
        """Return the states before the first token."""
        return self.short.init_state(batch_size), self.conv.init_state(batch_size)

    def prefill(
        self, x: Tensor, states: tuple[State, ...], lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Process the tokens of x (B, L, D) in parallel and return outputs and the next states."""
        short, long = states
        assert isinstance(short, SSMState)
        u, short = self.short.prefill(self.in_proj(x), short, lengths)
        gate, factor, value = u.chunk(3, dim=-1)
        y, long = self.conv.prefill(factor * value, long, lengths)
        return self.out_proj(gate * y), (short, long)

    def step(
        self, x: Tensor, states: tuple[State, ...], active: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Process one token x (B, D) and return outputs and the next states."""
        short, long = states
        assert isinstance(short, SSMState)
        u, short = self.short.step(self.in_proj(x), short, active)
        gate, factor, value = u.chunk(3, dim=-1)
        y, long = self.conv.step(factor * value, long, active)
        return self.out_proj(gate * y), (short, long)

    def steps(self, x: Tensor, states: tuple[State, ...]) -> tuple[Tensor, list[tuple[State, ...]]]:
        """Process K tokens x (B, K, D) and return outputs and the states after each token."""
        short, long = states
        assert isinstance(short, SSMState)
        u, shorts = self.short.steps(self.in_proj(x), short)
        gate, factor, value = u.chunk(3, dim=-1)
        y, longs = self.conv.steps(factor * value, long)
        return self.out_proj(gate * y), list(zip(shorts, longs, strict=True))
