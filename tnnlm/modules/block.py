"""One layer of the model: prenorm sequence mixing and prenorm channel mixing with residual connections."""

from __future__ import annotations

from torch import Tensor, nn

from tnnlm.modules.glu import GLU
from tnnlm.modules.mixer import GatedMixer
from tnnlm.modules.norm import SimpleRMSNorm
from tnnlm.ops.recurrence import State


class Block(nn.Module):
    """Prenorm residual block: x + mixer(norm(x)), then x + glu(norm(x)), with dropout on both branches."""

    def __init__(self, mixer: GatedMixer, glu: GLU, dropout: float) -> None:
        super().__init__()
        self.norm = SimpleRMSNorm()
        self.mixer = mixer
        self.glu = glu
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the outputs (B, L, D) for x (B, L, D); where ``mask`` (B, L) is False, x is padding."""
        x = x + self.dropout(self.mixer(self.norm(x), mask))
        return self._mix_channels(x)

    def prefill(self, x: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """Process the tokens of x (B, L, D) in parallel and return outputs and the next state."""
        y, state = self.mixer.prefill(self.norm(x), state, lengths)
        return self._mix_channels(x + self.dropout(y)), state

    def step(self, x: Tensor, state: State, active: Tensor | None = None) -> tuple[Tensor, State]:
        """Process one token x (B, D) and return outputs and the next state."""
        y, state = self.mixer.step(self.norm(x), state, active)
        return self._mix_channels(x + self.dropout(y)), state

    def _mix_channels(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.glu(self.norm(x)))
