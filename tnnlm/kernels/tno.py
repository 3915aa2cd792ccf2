"""The Toeplitz neural operator's kernel: k[i] = decay^|i| rpe(i) (arXiv 2305.04749, section 3.2).

The relative position encoder takes the raw integer lag. It runs in float32 whatever the precision policy:
bf16 can't count to 512.
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
    """The Toeplitz neural operator: an MLP on the lag, times decay^lag."""

    decay: float = number(0.99, above=0, high=1)
    """factor per lag, fixed; 1 switches it off"""
    rpe_dim: int = number(64, low=1, high=65_536)
    """width of the position network"""
    rpe_layers: int = number(6, low=0, high=1_000)
    """its hidden layers"""


@register_kernel("tno", TNOConfig)
class TNOKernel(LagKernel):
    """The kernel of a Toeplitz neural network; its decay is fixed, a buffer that checkpoints carry."""

    decays: Tensor

    def __init__(self, config: TNOConfig, n_channels: int, max_length: int = 0) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.rpe = RelativePositionEncoder(config.rpe_dim, config.rpe_layers, n_channels)
        self.register_buffer("decays", torch.full((n_channels,), config.decay))

    @property
    def decay(self) -> Tensor | None:
        """The frozen decay of every channel, (E,)."""
        return self.decays

    def between(self, start: int, stop: int) -> Tensor:
        """Taps at lags ``start`` .. ``stop`` - 1, (E, ``stop`` - ``start``), in the parameters' dtype (at
        least float32); one network serves both signs."""
        weight = self.rpe.input.weight
        with torch.autocast(weight.device.type, enabled=False):
            # The dtype is named: under bf16-true the default is bf16, where 4,096 lags become 769.
            lags = torch.arange(start, stop, device=weight.device, dtype=weight.dtype)
            envelope = self.decays.to(weight.dtype)[:, None] ** lags.abs()
            return self.rpe(lags[:, None]) * envelope
