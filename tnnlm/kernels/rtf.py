"""Rational transfer function kernel (RTF, arXiv 2405.06147).

    H(z) = h0 + (b[1] z^-1 + .. + b[n] z^-n) / (1 + a[1] z^-1 + .. + a[n] z^-n)

The spectrum is the quotient of two FFTs of the training length L, so that time and memory don't depend on n.
Sampling the spectrum at L points aliases the infinite impulse response h: the taps in training are
k[i] = sum over j of h[i + j L]. For i < L they equal the taps of another numerator over the same
denominator, the row vector c = b (I - A^L)^-1 in companion form (section 3.3). Here c is computed from the
taps: the product of 1 + a and their power series has only n terms.

At an odd L the authors' code samples L + 1 points. Its weights give the same taps here with a training length
of L + 1, and other ones with L.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from tnnlm.errors import ConfigError
from tnnlm.fields import choice, number
from tnnlm.kernels.base import Kernel, KernelConfig, register_kernel
from tnnlm.ops.companion import CompanionParams
from tnnlm.ops.toeplitz import fft_length

MONTEL = 1 - 1e-4
"""Maximum sum of the moduli of a denominator's coefficients under the Montel constraint."""


@dataclass(kw_only=True)
class RTFConfig(KernelConfig):
    """Settings of the RTF kernel, a numerator over a denominator in z^-1."""

    state_size: int = number(16, low=1, high=65_536)
    """Degree n of numerator and denominator, which is the state size per channel; must be below
    ``model.max_length``."""
    denominators: int | None = number(None, low=1, high=1_000_000)
    """Number of denominators, each shared by an equal number of channels (null: one per channel)."""
    init: str = choice("zero", "zero", "xavier")
    """Initialisation of numerators and denominators: zero (the kernel starts as the identity, h0 = 1) or
    xavier (Xavier uniform)."""
    constraint: str = choice("none", "none", "montel")
    """Constraint on the denominators: none, or montel (the moduli of the coefficients sum to less than 1,
    which keeps all poles inside the unit circle)."""


@register_kernel("rtf", RTFConfig)
class RTFKernel(Kernel):
    """Rational transfer function kernel with one numerator per channel and optionally shared denominators."""

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
        """Return the first ``length`` taps, (E, ``length``), in the parameters' dtype (at least float32).

        Taps past the training length are computed from the recurrence.
        """
        with torch.autocast(self.direct.device.type, enabled=False):
            k = self._taps(self.direct.dtype)[:, :length]
            if length <= self.max_length:
                return k
            rest = self.recurrence().taps(length)[:, self.max_length :]
            return torch.cat((k, rest.to(k.dtype)), dim=1)

    def recurrence(self) -> CompanionParams:
        """Return a recurrence with the taps of this kernel at every lag.

        It is computed in float64 and returned in the parameters' dtype.
        """
        return self._recurrence(self.direct.dtype)

    def _recurrence(self, dtype: torch.dtype) -> CompanionParams:
        """Return the recurrence, computed in float64, in a dtype."""
        k, a = self._taps(torch.float64), self._coefficients()
        n = a.shape[1]
        size = fft_length(2 * n)
        # The first n terms of (1 + a) times the taps from lag 1. What aliasing adds at lag 0 has no delay and
        # is part of the direct tap.
        below = torch.fft.rfft(nn.functional.pad(a.double(), (1, 0), value=1.0), n=size)
        taps = torch.fft.rfft(k[:, 1 : n + 1], n=size).unflatten(0, (len(a), -1))
        numerator = torch.fft.irfft((taps * below[:, None]).flatten(0, 1), n=size)[:, :n]
        return CompanionParams(k[:, 0].to(dtype), numerator.to(dtype), a.to(dtype))

    @torch.no_grad()
    def continue_from(self, trained: Self) -> str:
        """Take the weights of a kernel, with a numerator that gives its taps at the lags of another length.

        With the taps k of its recurrence, the product of 1 + a and the spectrum of k[0] .. k[L - 1], sampled
        at L points, has the powers 0 .. n only: those of the convolution of both, wrapped around at L.
        """
        length, a = self.max_length, trained._coefficients().double()
        n = a.shape[1]
        lags = torch.arange(n + 1)
        k = trained._double_taps(length).unflatten(0, (len(a), -1))
        product = k[..., lags].clone()
        for power in range(1, n + 1):
            product += a[:, None, power - 1, None] * k[..., (lags - power) % length]
        # The power 0 acts at every lag through 1 / (1 + a); the direct tap acts at lag 0 alone.
        numerator = product[..., 1:] - product[..., :1] * a[:, None]
        self.direct.copy_(product[..., 0].flatten())
        self.numerator.copy_(numerator.flatten(0, 1))
        self.denominator.copy_(trained.denominator)
        return "its recurrence continues exactly"

    def _double_taps(self, length: int) -> Tensor:
        """Return the first ``length`` taps in float64, (E, ``length``); past the training length, those of
        the recurrence.
        """
        k = self._taps(torch.float64)[:, :length]
        if length <= self.max_length:
            return k
        rest = self._recurrence(torch.float64).taps(length)[:, self.max_length :]
        return torch.cat((k, rest.to(k.dtype)), dim=1)

    def _coefficients(self) -> Tensor:
        """Return the coefficients a[1] .. a[n] of the denominators under the constraint, (G, n)."""
        if self.constraint == "none":
            return self.denominator
        total = self.denominator.abs().sum(1, keepdim=True)
        return self.denominator / (total / MONTEL).clamp(min=1)

    def _taps(self, dtype: torch.dtype) -> Tensor:
        """Return the taps up to the training length, (E, L)."""
        length = self.max_length
        above = torch.fft.rfft(nn.functional.pad(self.numerator.to(dtype), (1, 0)), n=length)
        below = torch.fft.rfft(nn.functional.pad(self._coefficients().to(dtype), (1, 0), value=1.0), n=length)
        groups = len(below)
        spectrum = above.unflatten(0, (groups, -1)) / below[:, None]
        k = torch.fft.irfft(spectrum.flatten(0, 1), n=length)
        return torch.cat((k[:, :1] + self.direct.to(dtype)[:, None], k[:, 1:]), dim=1)
