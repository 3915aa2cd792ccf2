"""The relative position encoder (RPE) of Toeplitz neural networks (arXiv 2305.04749, section 3.2): an MLP on
one number, a lag or a frequency, the same for all channels up to its last layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tnnlm.ops.norm import simple_rms_norm

ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}


class RelativePositionEncoder(nn.Module):
    """Positions (L, 1) -> (E, L): Linear(1, r), ``layers`` times [norm, activation, Linear(r, r)], then norm,
    activation, Linear(r, E)."""

    def __init__(
        self, width: int, layers: int, n_channels: int, activation: str = "relu", norm: bool = True
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.norm = norm
        self.input = nn.Linear(1, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.output = nn.Linear(width, n_channels)

    def forward(self, positions: Tensor) -> Tensor:
        """Values at the given positions, (L, 1) -> (E, L), written as transforms want them."""
        return torch.addmm(self.output.bias[:, None], self.output.weight, self.features(positions).T)

    def features(self, positions: Tensor) -> Tensor:
        """What the last layer combines, (L, 1) -> (L, r)."""
        h = self.input(positions)
        for layer in self.hidden:
            h = layer(self._activate(h))
        return self._activate(h)

    def _activate(self, h: Tensor) -> Tensor:
        return self.activation(simple_rms_norm(h) if self.norm else h)
