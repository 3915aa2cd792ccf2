"""Sequence mixing of S4 layers (arXiv 2111.00396), as SGConv and RTF layers use it: W_out GELU(conv(x))."""

from __future__ import annotations

from torch import Tensor, nn

from tnnlm.modules.long_conv import BiConv, LongConv
from tnnlm.modules.recurrent_conv import RecurrentConv
from tnnlm.ops.recurrence import State


class S4Mixer(nn.Module):
    """Long convolution, GELU and a linear layer, whose output is gated by half of it if ``gated``."""

    n_states = 1
    """Number of states of the mixer."""
    conv: LongConv | BiConv | RecurrentConv

    def __init__(self, d_model: int, conv: LongConv | BiConv | RecurrentConv, gated: bool) -> None:
        super().__init__()
        self.conv = conv
        self.gated = gated
        self.out_proj = nn.Linear(d_model, 2 * d_model if gated else d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None, *features: Tensor) -> Tensor:
        """Return the outputs (B, L, D) for x (B, L, D); where ``mask`` (B, L) is False, x is padding.

        ``features`` are those of the kernel, if known.
        """
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        return self._project(self.conv(x, *features))

    def init_state(self, batch_size: int) -> tuple[State, ...]:
        """Return the state before the first token."""
        return (self.conv.init_state(batch_size),)

    def prefill(
        self, x: Tensor, states: tuple[State, ...], lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Process the tokens of x (B, L, D) in parallel and return outputs and the next state."""
        y, state = self.conv.prefill(x, states[0], lengths)
        return self._project(y), (state,)

    def step(
        self, x: Tensor, states: tuple[State, ...], active: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Process one token x (B, D) and return outputs and the next state."""
        y, state = self.conv.step(x, states[0], active)
        return self._project(y), (state,)

    def steps(self, x: Tensor, states: tuple[State, ...]) -> tuple[Tensor, list[tuple[State, ...]]]:
        """Process K tokens x (B, K, D) and return outputs and the states after each token."""
        y, after = self.conv.steps(x, states[0])
        return self._project(y), [(state,) for state in after]

    def _project(self, y: Tensor) -> Tensor:
        out: Tensor = self.out_proj(nn.functional.gelu(y))
        return nn.functional.glu(out, dim=-1) if self.gated else out
