"""The rational transfer function kernel (arXiv 2405.06147).

    H(z) = h0 + (b[1] z^-1 + .. + b[n] z^-n) / (1 + a[1] z^-1 + .. + a[n] z^-n)

Its spectrum is a quotient of two FFTs of the training length L: time and memory don't depend on n.
Sampling L points of the circle wraps the infinite kernel round: the taps that train are
k[i] = sum over j of h[i + j L]. They are, for i < L, those of another numerator over the same
denominator, row vector c = b (I - A^L)^-1 in companion form (section 3.3). Here c is read off the taps
themselves: 1 + a times their series ends after n terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnnlm.errors import ConfigError
from tnnlm.fields import choice, number
from tnnlm.kernels.base import Kernel, KernelConfig, register_kernel
from tnnlm.ops.companion import CompanionParams
from tnnlm.ops.toeplitz import fft_length

MONTEL = 1 - 1e-4
"""largest sum of the moduli of a denominator's coefficients under the Montel constraint"""


@dataclass(kw_only=True)
class RTFConfig(KernelConfig):
    """RTF: a rational transfer function, numerator over denominator."""

    state_size: int = number(16, low=1, high=65_536)
    """n, the degree of both; below the training length"""
    denominators: int | None = number(None, low=1, high=1_000_000)
    """how many denominators, each for as many channels; null: one per channel"""
    init: str = choice("zero", "zero", "xavier")
    """zero: the identity, h0 = 1; xavier: uniform in both"""
    constraint: str = choice("none", "none", "montel")
    """montel: coefficients of a denominator sum to less than 1 in modulus, so that no pole leaves the
    unit circle"""


@register_kernel("rtf", RTFConfig)
class RTFKernel(Kernel):
    """Numerators per channel over denominators per channel or shared."""

    def __init__(self, config: RTFConfig, n_channels: int, max_length: int) -> None:
        super().__init__()
        groups = config.denominators or n_channels
        if n_channels % groups:
            raise ConfigError(
                f"model.kernel.denominators={groups}: must divide the {n_channels} channels evenly"
            )
        if config.state_size >= max_length:
            raise ConfigError(
                f"model.kernel.state_size={config.state_size}: must be below the training length, "
                f"{max_length}"
            )
        self.n_channels = n_channels
        self.max_length = max_length
        self.constraint = config.constraint
        self.direct = nn.Parameter(torch.ones(n_channels))
        self.numerator = nn.Parameter(torch.zeros(n_channels, config.state_size))
        self.denominator = nn.Parameter(torch.zeros(groups, config.state_size))
        if config.init == "xavier":
            nn.init.xavier_uniform_(self.numerator)
            nn.init.xavier_uniform_(self.denominator)

    def forward(self, length: int) -> Tensor:
        """The first ``length`` taps, (E, ``length``), in the parameters' dtype (at least float32).

        Those past the training length are what the recurrence makes of them.
        """
        with torch.autocast(self.direct.device.type, enabled=False):
            k = self._taps(self.direct.dtype)[:, :length]
            if length <= self.max_length:
                return k
            rest = self.recurrence().taps(length)[:, self.max_length :]
            return torch.cat((k, rest.to(k.dtype)), dim=1)

    def recurrence(self) -> CompanionParams:
        """The same kernel as a recurrence, at every lag, in the parameters' dtype; worked out in float64."""
        k, a = self._taps(torch.float64), self._coefficients()
        n = a.shape[1]
        size = fft_length(2 * n)
        # (1 + a) times the taps from lag 1 on, n terms of it; what the wrapping put on lag 0 has no delay
        # and belongs to the direct tap.
        below = torch.fft.rfft(nn.functional.pad(a.double(), (1, 0), value=1.0), n=size)
        taps = torch.fft.rfft(k[:, 1 : n + 1], n=size).unflatten(0, (len(a), -1))
        numerator = torch.fft.irfft((taps * below[:, None]).flatten(0, 1), n=size)[:, :n]
        return CompanionParams(k[:, 0].to(a.dtype), numerator.to(a.dtype), a)

    def _coefficients(self) -> Tensor:
        """a[1] .. a[n], (G, n)."""
        if self.constraint == "none":
            return self.denominator
        total = self.denominator.abs().sum(1, keepdim=True)
        return self.denominator / (total / MONTEL).clamp(min=1)

    def _taps(self, dtype: torch.dtype) -> Tensor:
        """Taps of the training length, (E, L)."""
        length = self.max_length
        above = torch.fft.rfft(nn.functional.pad(self.numerator.to(dtype), (1, 0)), n=length)
        below = torch.fft.rfft(nn.functional.pad(self._coefficients().to(dtype), (1, 0), value=1.0), n=length)
        groups = len(below)
        spectrum = above.unflatten(0, (groups, -1)) / below[:, None]
        k = torch.fft.irfft(spectrum.flatten(0, 1), n=length)
        return torch.cat((k[:, :1] + self.direct.to(dtype)[:, None], k[:, 1:]), dim=1)
