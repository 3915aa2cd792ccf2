"""SGConv kernel (arXiv 2210.09298, section 3): sub-kernels at scales 1, 1, 2, 4, ...

Sub-kernel i has ``kernel_dim`` parameters per channel and is upsampled by linear interpolation to
2^max(0, i-1) times that length. Each sub-kernel has 1 / decay of the amplitude of the previous one. The
concatenation of all sub-kernels, which may be longer than ``length``, is divided by its norm at
initialisation. The kernel is zero from lag ``length`` onwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from tnnlm.fields import number
from tnnlm.kernels.base import Kernel, KernelConfig, register_kernel
from tnnlm.ops.multirate import MultirateParams, multirate


@dataclass(kw_only=True)
class SGConvConfig(KernelConfig):
    """Settings of the SGConv kernel: sub-kernels of increasing length and decreasing amplitude."""

    kernel_dim: int = number(16, low=1, high=65_536)
    """Number of parameters of each sub-kernel per channel, which is also the number of lags of the first two;
    each further sub-kernel spans twice the lags of the previous one."""
    decay_min: float = number(2.0, low=1, high=100)
    """Ratio of the amplitudes of consecutive sub-kernels in the first channel; channels in between are
    interpolated linearly to ``decay_max``."""
    decay_max: float = number(2.0, low=1, high=100)
    """Ratio of the amplitudes of consecutive sub-kernels in the last channel."""
    length: int | None = number(None, low=1, high=1 << 24)
    """Length of the kernel in lags; later taps are zero (null: the training length)."""


@register_kernel("sgconv", SGConvConfig)
class SGConvKernel(Kernel):
    """Multi-scale kernel with a learnable skip connection at lag 0."""

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
        # Stored in checkpoints as buffers: the kernel at initialisation can't be reconstructed later.
        self.register_buffer("amplitudes", decays ** -torch.arange(scales)[:, None])
        self.register_buffer("initial_norm", torch.ones(n_channels))
        with torch.no_grad():
            self.initial_norm.copy_(self._concatenated().norm(dim=1))

    def leave_lag_zero(self) -> None:
        """Remove the skip connection, which a bidirectional model has once."""
        with torch.no_grad():
            self.skip.zero_()
        self.skip.requires_grad_(False)

    @property
    def support(self) -> int:
        """Length of the kernel, from which on its taps are zero."""
        return self.length

    def forward(self, length: int) -> Tensor:
        """Return the first ``length`` taps, (E, ``length``), in the parameters' dtype (at least float32)."""
        with torch.autocast(self.skip.device.type, enabled=False):
            k = self._unscaled() / self.initial_norm[:, None]
            k = torch.cat((k[:, :1] + self.skip[:, None], k[:, 1:]), dim=1)[:, :length]
            return nn.functional.pad(k, (0, length - k.shape[1]))

    @torch.no_grad()
    def continue_from(self, trained: Self) -> str:
        """Take the weights of a kernel of another length; further scales, and lags, start at zero.

        Values whose lags were all past the end of the kernel were not trained, and become zero.
        """
        width, known = self.scales.shape[2], min(len(self.scales), len(trained.scales))
        self.scales.zero_()
        for own, other in ((self.scales, trained.scales), (self.amplitudes, trained.amplitudes)):
            own[:known] = other[:known]
        self.skip.copy_(trained.skip)
        self.initial_norm.copy_(trained.initial_norm)
        for index, values in enumerate(self.scales[:known]):
            # Value q acts on the lags of cell q and, by interpolation, on half of the cell before.
            factor = 1 << max(0, index - 1)
            first = width * factor * min(index, 1) + torch.arange(width) * factor - factor // 2
            values[:, (first >= trained.length).to(values.device)] = 0
        more = len(self.scales) - known
        if more:
            return f"it gets {more} scale{'s' * (more > 1)} more, of taps that start at zero"
        return f"its {known} scales end at lag {self.length:,}"

    def recurrence(self) -> MultirateParams:
        """Return a recurrence with the taps of this kernel at every lag, in the parameters' dtype."""
        factors = self.amplitudes / self.initial_norm
        knots = self.scales.transpose(1, 2) * factors[:, None]
        return multirate(knots, self(self.length), self.length)

    def _unscaled(self) -> Tensor:
        """Return the taps (E, length) before normalisation and skip connection."""
        return self._concatenated()[:, : self.length]

    def _concatenated(self) -> Tensor:
        """Return all lags of the sub-kernels, (E, length or more)."""
        parts = []
        for index, (values, amplitude) in enumerate(zip(self.scales, self.amplitudes, strict=True)):
            parts.append(_stretched(values * amplitude[:, None], 1 << max(0, index - 1)))
        return torch.cat(parts, dim=1)


def _stretched(values: Tensor, factor: int) -> Tensor:
    """Return values (E, K) interpolated linearly to ``factor`` times as many, which is a power of two.

    The result is that of ``interpolate(mode="linear")``, whose gradient on a GPU sums in no fixed order.
    Value q is in the middle of outputs q * factor to (q + 1) * factor - 1, and each of these is a combination
    of the value and its two neighbours: a product with the same matrix (3, ``factor``) for every q.
    """
    if factor == 1:
        return values
    # Distance from value q in units of the distance of two values, exact in float32.
    offset = (torch.arange(factor, device=values.device, dtype=values.dtype) + 0.5) / factor - 0.5
    matrix = torch.stack((-offset, 1 - offset.abs(), offset)).clamp(min=0)
    before = torch.cat((values[:, :1], values[:, :-1]), dim=1)
    after = torch.cat((values[:, 1:], values[:, -1:]), dim=1)
    return (torch.stack((before, values, after), dim=2) @ matrix).flatten(1)
