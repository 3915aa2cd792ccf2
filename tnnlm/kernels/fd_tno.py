"""The frequency-domain Toeplitz neural operator, causal (FD-TNN, arXiv 2305.09028).

The RPE gives the real part R of the kernel's spectrum at the frequencies pi j / L, j = 0 .. L, of a
transform of 2L points, L the training length. The imaginary part of a causal spectrum is the Hilbert
transform of its real part; the same said of taps: the inverse transform r of R is even, and its causal half,
doubled, is the kernel.

    k[0] = r[0]     k[i] = 2 r[i], 0 < i < L     k[L] = r[L]     k[i] = 0, i > L

No decay is imposed: how fast the taps die out follows from how smooth R is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tnnlm.fields import choice, number
from tnnlm.kernels.base import Kernel, KernelConfig, register_kernel
from tnnlm.kernels.rpe import RelativePositionEncoder


@dataclass(kw_only=True)
class FDTNOConfig(KernelConfig):
    """The frequency-domain TNO: an MLP gives the real part of the spectrum, causality the rest."""

    rpe_dim: int = number(64, low=1, high=65_536)
    """width of the network"""
    rpe_layers: int = number(6, low=0, high=1_000)
    """its hidden layers"""
    activation: str = choice("gelu", "gelu", "silu", "relu")
    """the smoother it is, the faster the kernel dies out"""
    rpe_input: str = choice("cosine", "cosine", "angle")
    """cosine: of the frequency, so that the spectrum is as smooth as the network; angle: the frequency
    itself, as in the authors' code, which leaves kinks at both ends and a tail of lag^-2"""
    rpe_norm: bool = True
    """normalise hidden features, as published; false: a plain MLP"""


@register_kernel("fd_tno", FDTNOConfig)
class FDTNOKernel(Kernel):
    """Taps whose spectrum has the RPE's values as its real part. Finite: zero past lag L.

    The grid stays that of the training length at every length, so that the kernel is one kernel: on a grid of
    its own for each length, as published, even its first taps would be others, by what the coarser grid wraps
    round. Past lag L nothing was trained, and the real part that was is met exactly by zeros.
    """

    def __init__(self, config: FDTNOConfig, n_channels: int, max_length: int) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.max_length = max_length
        self.rpe_input = config.rpe_input
        self.rpe = RelativePositionEncoder(
            config.rpe_dim, config.rpe_layers, n_channels, config.activation, config.rpe_norm
        )

    def forward(self, length: int) -> Tensor:
        """The first ``length`` taps, (E, ``length``), in the parameters' dtype (at least float32)."""
        weight, bias = self.rpe.output.weight, self.rpe.output.bias
        with torch.autocast(weight.device.type, enabled=False):
            # The last layer is linear, and so is going to taps: r rows are transformed in place of E. A
            # constant spectrum, the bias, is a tap on lag 0.
            rows = causal_taps(self.rpe.features(self._positions()).T, length)
            k = weight @ rows
            k = torch.cat((k[:, :1] + bias[:, None], k[:, 1:]), dim=1)
            return torch.nn.functional.pad(k, (0, length - k.shape[1]))

    def _positions(self) -> Tensor:
        """Input of the RPE at every frequency, (L + 1, 1)."""
        weight = self.rpe.input.weight
        angle = torch.linspace(0, math.pi, self.max_length + 1, device=weight.device, dtype=torch.float64)
        return (angle.cos() if self.rpe_input == "cosine" else angle).to(weight.dtype)[:, None]


def causal_taps(real: Tensor, length: int) -> Tensor:
    """Taps of the causal kernels with the given real parts of their spectra.

    Args:
        real: (R, L + 1), at the frequencies pi j / L.
        length: how many to return at the most; there are L + 1.

    Returns:
        (R, min(``length``, L + 1))
    """
    last = real.shape[1] - 1
    even = torch.fft.irfft(real, n=2 * last)[:, : min(length, last + 1)]
    doubled = torch.full((even.shape[1],), 2.0, dtype=even.dtype, device=even.device)
    doubled[0] = 1
    doubled[last:] = 1
    return even * doubled
