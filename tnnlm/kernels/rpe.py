"""Relative position encoder (RPE) of Toeplitz neural networks (arXiv 2305.04749, section 3.2).

It is an MLP on one number, a lag or a frequency. All layers but the last are shared by all channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tnnlm.ops.norm import simple_rms_norm

ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}


class RelativePositionEncoder(nn.Module):
    """MLP from positions (L, 1) to values (E, L).

    The layers are Linear(1, r), then ``layers`` times [norm, activation, Linear(r, r)], then norm, activation
    and Linear(r, E).
    """

    def __init__(
        self, width: int, layers: int, n_channels: int, activation: str = "relu", norm: bool = True
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.norm = norm
        self.input = nn.Linear(1, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.output = nn.Linear(width, n_channels)

    def forward(self, positions: Tensor, channels: slice = slice(None)) -> Tensor:
        """Return the values at positions (L, 1) as (E, L), contiguous along L for the FFT.

        ``channels`` selects the channels to compute.
        """
        weight, bias = self.output.weight[channels], self.output.bias[channels]
        return torch.addmm(bias[:, None], weight, self.features(positions).T)

    def features(self, positions: Tensor) -> Tensor:
        """Return the input features of the last layer, (L, r), for positions (L, 1)."""
        h = self.input(positions)
        for layer in self.hidden:
            h = layer(self._activate(h))
        return self._activate(h)

    def _activate(self, h: Tensor) -> Tensor:
        return self.activation(simple_rms_norm(h) if self.norm else h)
