"""Relative position encoder (RPE) of Toeplitz neural networks (arXiv 2305.04749, section 3.2).

It is an MLP on one number, a lag or a frequency. All layers but the last are shared by all channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tnnlm.kernels.network import joint_linear
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

    def forward(self, positions: Tensor) -> Tensor:
        """Return the values at positions (L, 1) as (E, L), contiguous along L for the FFT."""
        return self.values(self.features(positions))

    def values(self, features: Tensor, channels: slice = slice(None)) -> Tensor:
        """Return the values (E, L) of features (L, r); ``channels`` selects the channels to compute."""
        weight, bias = self.output.weight[channels], self.output.bias[channels]
        return torch.addmm(bias[:, None], weight, features.T)

    def features(self, positions: Tensor) -> Tensor:
        """Return the input features of the last layer, (L, r), for positions (L, 1)."""
        return self._features(positions, (self.input, *self.hidden))

    @property
    def settings(self) -> tuple[str, bool]:
        """Activation and whether features are normalised."""
        return self.activation.__name__, self.norm

    @staticmethod
    def joint_features(encoders: Sequence[RelativePositionEncoder], positions: Tensor) -> Tensor:
        """Return the features (N, L, r) of N encoders of equal shapes and settings for positions (L, 1)."""
        groups = zip(*((encoder.input, *encoder.hidden) for encoder in encoders), strict=True)
        layers = [partial(joint_linear, group) for group in groups]
        return encoders[0]._features(positions.expand(len(encoders), -1, -1), layers)

    def _features(self, h: Tensor, layers: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
        first, *others = layers
        h = first(h)
        for layer in others:
            h = layer(self._activate(h))
        return self._activate(h)

    def _activate(self, h: Tensor) -> Tensor:
        return self.activation(simple_rms_norm(h) if self.norm else h)
