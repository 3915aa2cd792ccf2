"""Channel mixing by a multilayer perceptron, W_2 GELU(W_1 x), as in GPT-2 and HyenaDNA."""

from __future__ import annotations

from torch import Tensor, nn


class MLP(nn.Module):
    """Multilayer perceptron with the tanh approximation of GELU."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, d_hidden)
        self.out_proj = nn.Linear(d_hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (..., D) for x (..., D)."""
        out: Tensor = self.out_proj(nn.functional.gelu(self.in_proj(x), approximate="tanh"))
        return out
