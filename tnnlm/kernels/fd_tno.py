"""The frequency-domain Toeplitz neural operator, causal (FD-TNN, arXiv 2305.09028).

The RPE gives the real part R of the kernel's spectrum at the frequencies pi j / L, j = 0 .. L, of a
transform of 2L points, where L is the training length. The imaginary part of a causal spectrum is the Hilbert
transform of its real part. In terms of taps: the inverse transform r of R is even, and its causal half,
doubled, is the kernel.

    k[0] = r[0]     k[i] = 2 r[i], 0 < i < L     k[L] = r[L]     k[i] = 0, i > L

No decay is imposed: the smoother R is, the faster the taps decay.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tnnlm.fields import choice, number
from tnnlm.kernels.base import KernelConfig, register_kernel
from tnnlm.kernels.network import NetworkKernel
from tnnlm.kernels.rpe import RelativePositionEncoder


@dataclass(kw_only=True)
class FDTNOConfig(KernelConfig):
    """Settings of the frequency-domain TNO: an MLP gives the real part of the spectrum of a causal kernel."""

    rpe_dim: int = number(64, low=1, high=65_536)
    """Width of the relative position encoder (RPE)."""
    rpe_layers: int = number(6, low=0, high=1_000)
    """Number of hidden layers of the RPE."""
    activation: str = choice("gelu", "gelu", "silu", "relu")
    """Activation function of the RPE. The smoother it is, the faster the kernel decays."""
    rpe_input: str = choice("cosine", "cosine", "angle")
    """Input of the RPE: cosine (the cosine of the frequency, which makes the spectrum as smooth as the RPE)
    or angle (the frequency, as in the authors' code, which causes kinks at both ends of the spectrum and a
    tail of the kernel that decays as lag^-2 only)."""
    rpe_norm: bool = True
    """Whether to normalise the hidden features of the RPE, as published."""


@register_kernel("fd_tno", FDTNOConfig)
class FDTNOKernel(NetworkKernel):
    """Causal kernel whose spectrum has the values of the RPE as its real part; zero past lag L.

    The frequency grid is that of the training length at every length, so that the taps don't depend on the
    length. With a separate grid per length, as published, even the first taps would change, because a coarser
    grid aliases differently. Taps past lag L were never trained, and zeros there match the trained real part
    exactly.
    """

    fixed_because = "its spectrum is trained at the frequencies of its training length"

    def __init__(self, config: FDTNOConfig, n_channels: int, max_length: int) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.max_length = max_length
        self.rpe_input = config.rpe_input
        self.rpe = RelativePositionEncoder(
            config.rpe_dim, config.rpe_layers, n_channels, config.activation, config.rpe_norm
        )

    def forward(self, length: int, features: Tensor | None = None) -> Tensor:
        """Return the first ``length`` taps, (E, ``length``), in the parameters' dtype (at least float32)."""
        weight, bias = self.rpe.output.weight, self.rpe.output.bias
        with torch.autocast(weight.device.type, enabled=False):
            # The last layer and the transform are both linear, so that only the r features are transformed
            # instead of all E channels. The bias is a constant spectrum, which is a tap at lag 0.
            if features is None:
                features = causal_taps(self.rpe.features(self._positions()).T, length)
            k = weight @ features
            k = torch.cat((k[:, :1] + bias[:, None], k[:, 1:]), dim=1)
            return torch.nn.functional.pad(k, (0, length - k.shape[1]))

    @property
    def settings(self) -> tuple[Hashable, ...]:
        """Settings of the RPE, and the frequencies that it is evaluated at."""
        return *self.rpe.settings, self.rpe_input, self.max_length

    @classmethod
    def joint_features(cls, kernels: Sequence[Self], length: int) -> Tensor:
        """Return the taps (N, r, min(``length``, L + 1)) of the features of the RPEs of N kernels."""
        positions = kernels[0]._positions()
        with torch.autocast(positions.device.type, enabled=False):
            spectra = RelativePositionEncoder.joint_features([kernel.rpe for kernel in kernels], positions)
            return causal_taps(spectra.mT, length)

    def _positions(self) -> Tensor:
        """Return the input of the RPE at every frequency, (L + 1, 1)."""
        weight = self.rpe.input.weight
        angle = torch.linspace(0, math.pi, self.max_length + 1, device=weight.device, dtype=torch.float64)
        return (angle.cos() if self.rpe_input == "cosine" else angle).to(weight.dtype)[:, None]


def causal_taps(real: Tensor, length: int) -> Tensor:
    """Return the taps of causal kernels, given the real parts of their spectra.

    Args:
        real: Real parts (..., L + 1) at the frequencies pi j / L.
        length: Maximum number of taps to return; the kernels have L + 1.

    Returns:
        Taps (..., min(``length``, L + 1)).
    """
    last = real.shape[-1] - 1
    even = torch.fft.irfft(real, n=2 * last)[..., : min(length, last + 1)]
    doubled = torch.full((even.shape[-1],), 2.0, dtype=even.dtype, device=even.device)
    doubled[:1] = 1  # on a GPU, doubled[0] = 1 copies a number from the host and waits for it
    doubled[last:] = 1
    return even * doubled
