"""Kernel of the Toeplitz neural operator: k[i] = decay^|i| rpe(i) (arXiv 2305.04749, section 3.2).

The relative position encoder takes the raw integer lag. It runs in float32 under every precision policy,
because bf16 can't represent all integers up to 512.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tnnlm.fields import number
from tnnlm.kernels.base import KernelConfig, LagKernel, register_kernel
from tnnlm.kernels.network import NetworkKernel
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
class TNOKernel(NetworkKernel, LagKernel):
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

    def forward(self, length: int, features: Tensor | None = None) -> Tensor:
        """Return the first ``length`` taps, (E, ``length``); see :meth:`between`."""
        return self._taps(self._lags(0, length), slice(None), features)

    def continue_from(self, trained: Self) -> str:
        """Take the weights of a kernel, which don't depend on the training length."""
        self.load_state_dict(trained.state_dict())
        return "its position network is evaluated at the further lags"

    @property
    def settings(self) -> tuple[Hashable, ...]:
        """Settings of the RPE."""
        return self.rpe.settings

    @classmethod
    def joint_features(cls, kernels: Sequence[Self], length: int) -> Tensor:
        """Return the features (N, ``length``, r) of the RPEs of N kernels."""
        lags = kernels[0]._lags(0, length)
        with torch.autocast(lags.device.type, enabled=False):
            return RelativePositionEncoder.joint_features([kernel.rpe for kernel in kernels], lags[:, None])

    def between(self, start: int, stop: int) -> Tensor:
        """Return the taps at lags ``start`` .. ``stop`` - 1, (E, ``stop`` - ``start``).

        They have the parameters' dtype (at least float32). Lags may be negative: the same network serves both
        signs.
        """
        return self._taps(self._lags(start, stop), slice(None))

    def channel_taps(self, length: int, channels: slice) -> Tensor:
        """Return the first ``length`` taps of some channels, (E', ``length``), without the other channels."""
        return self._taps(self._lags(0, length), channels)

    def _lags(self, start: int, stop: int) -> Tensor:
        weight = self.rpe.input.weight
        # Under bf16-true the default dtype is bf16, which rounds 4,096 lags to 769 values.
        return torch.arange(start, stop, device=weight.device, dtype=weight.dtype)

    def _taps(self, lags: Tensor, channels: slice, features: Tensor | None = None) -> Tensor:
        with torch.autocast(lags.device.type, enabled=False):
            envelope = self.decays[channels].to(lags.dtype)[:, None] ** lags.abs()
            known = self.rpe.features(lags[:, None]) if features is None else features
            return self.rpe.values(known, channels) * envelope
