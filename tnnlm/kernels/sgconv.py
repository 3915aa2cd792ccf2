"""The SGConv kernel (arXiv 2210.09298, section 3): sub-kernels at scales 1, 1, 2, 4, ...

Sub-kernel i has ``kernel_dim`` parameters, is stretched by linear interpolation to 2^max(0, i-1) times
as many lags, and its amplitude is 1 / decay of the one before. Their concatenation is divided by the
norm that it had at initialisation. Finite: zero from ``length`` lags on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnnlm.fields import number
from tnnlm.kernels.base import Kernel, KernelConfig, register_kernel


@dataclass(kw_only=True)
class SGConvConfig(KernelConfig):
    """SGConv: sub-kernels stretched over ever longer lags, each fainter than the one before."""

    kernel_dim: int = number(16, low=1, high=65_536)
    """parameters of each sub-kernel; the first two span as many lags, the next twice as many ..."""
    decay_min: float = number(2.0, low=1, high=100)
    """amplitude of a scale over that of the next, of the first channel"""
    decay_max: float = number(2.0, low=1, high=100)
    """and of the last; evenly spaced between"""
    length: int | None = number(None, low=1, high=1 << 24)
    """lags of the whole kernel, zero from there on; null: the training length"""


@register_kernel("sgconv", SGConvConfig)
class SGConvKernel(Kernel):
    """Multi-scale kernel with a learnable skip on lag 0."""

    initial_norm: Tensor
    amplitudes: Tensor

    def __init__(self, config: SGConvConfig, n_channels: int, max_length: int) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.length = config.length or max_length
        scales = 1
        while config.kernel_dim << (scales - 1) < self.length:
            scales += 1
        self.scales = nn.Parameter(torch.randn(scales, n_channels, config.kernel_dim))
        self.skip = nn.Parameter(torch.randn(n_channels))
        decays = torch.linspace(config.decay_min, config.decay_max, n_channels)
        # Buffers, so that a checkpoint carries them: the kernel of the first step can't be had again.
        self.register_buffer("amplitudes", decays ** -torch.arange(scales)[:, None])
        self.register_buffer("initial_norm", torch.ones(n_channels))
        with torch.no_grad():
            self.initial_norm.copy_(self._unscaled().norm(dim=1))

    def forward(self, length: int) -> Tensor:
        """The first ``length`` taps, (E, ``length``), in the parameters' dtype (at least float32)."""
        with torch.autocast(self.skip.device.type, enabled=False):
            k = self._unscaled() / self.initial_norm[:, None]
            k = torch.cat((k[:, :1] + self.skip[:, None], k[:, 1:]), dim=1)[:, :length]
            return nn.functional.pad(k, (0, length - k.shape[1]))

    def _unscaled(self) -> Tensor:
        """(E, length), before the norm and the skip."""
        parts = []
        for index, (values, amplitude) in enumerate(zip(self.scales, self.amplitudes, strict=True)):
            width = values.shape[1] << max(0, index - 1)
            stretched = nn.functional.interpolate(values[None], size=width, mode="linear")[0]
            parts.append(stretched * amplitude[:, None])
        return torch.cat(parts, dim=1)[:, : self.length]
