"""One layer: prenorm mixer and prenorm channel mixing, each added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from tnnlm.modules.glu import GLU
from tnnlm.modules.mixer import GatedMixer
from tnnlm.modules.norm import SimpleRMSNorm
from tnnlm.ops.recurrence import State


class Block(nn.Module):
    """x + mixer(norm(x)), then x + glu(norm(x)); dropout on both branches."""

    def __init__(self, mixer: GatedMixer, glu: GLU, dropout: float) -> None:
        super().__init__()
        self.norm = SimpleRMSNorm()
        self.mixer = mixer
        self.glu = glu
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D); positions where ``mask`` (B, L) is False are padding."""
        x = x + self.dropout(self.mixer(self.norm(x), mask))
        return self._mix_channels(x)

    def prefill(self, x: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """Advance by the tokens of x (B, L, D)."""
        y, state = self.mixer.prefill(self.norm(x), state, lengths)
        return self._mix_channels(x + self.dropout(y)), state

    def step(self, x: Tensor, state: State, active: Tensor | None = None) -> tuple[Tensor, State]:
        """Advance by one token x (B, D)."""
        y, state = self.mixer.step(self.norm(x), state, active)
        return self._mix_channels(x + self.dropout(y)), state

    def _mix_channels(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.glu(self.norm(x)))
