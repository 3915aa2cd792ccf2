"""Kernel of the Toeplitz neural operator: k[i] = decay^|i| rpe(i) (arXiv 2305.04749, section 3.2).

The relative position encoder takes the raw integer lag. It runs in float32 under every precision policy,
because bf16 can't represent all integers up to 512.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnnlm.fields import number
from tnnlm.kernels.base import KernelConfig, LagKernel, register_kernel
from tnnlm.kernels.rpe import RelativePositionEncoder


@dataclass(kw_only=True)
class TNOConfig(KernelConfig):
    """Settings of the Toeplitz neural operator: an MLP on the lag, multiplied by decay^lag."""

    decay: float = number(0.99, above=0, high=1)
    """Decay per lag, which is not trained; 0.99 as in the TNN paper. 1 disables it."""
    rpe_dim: int = number(64, low=1, high=65_536)
    """Width of the relative position encoder (RPE)."""
    rpe_layers: int = number(6, low=0, high=1_000)
    """Number of hidden layers of the RPE."""


@register_kernel("tno", TNOConfig)
class TNOKernel(LagKernel):
    """Kernel of a Toeplitz neural network; its decay is a buffer, stored in checkpoints and not trained."""

    decays: Tensor

    def __init__(self, config: TNOConfig, n_channels: int, max_length: int = 0) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.rpe = RelativePositionEncoder(config.rpe_dim, config.rpe_layers, n_channels)
        self.register_buffer("decays", torch.full((n_channels,), config.decay))

    @property
    def decay(self) -> Tensor | None:
        """Frozen decay of each channel, (E,)."""
        return self.decays

    def between(self, start: int, stop: int) -> Tensor:
        """Return the taps at lags ``start`` .. ``stop`` - 1, (E, ``stop`` - ``start``).

        They have the parameters' dtype (at least float32). Lags may be negative: the same network serves both
        signs.
        """
        return self._between(start, stop, slice(None))

    def channel_taps(self, length: int, channels: slice) -> Tensor:
        """Return the first ``length`` taps of some channels, (E', ``length``), without the other channels."""
        return self._between(0, length, channels)

    def _between(self, start: int, stop: int, channels: slice) -> Tensor:
        weight = self.rpe.input.weight
        with torch.autocast(weight.device.type, enabled=False):
            # Under bf16-true the default dtype is bf16, which rounds 4,096 lags to 769 values.
            lags = torch.arange(start, stop, device=weight.device, dtype=weight.dtype)
            envelope = self.decays[channels].to(weight.dtype)[:, None] ** lags.abs()
            return self.rpe(lags[:, None], channels) * envelope
