"""Hyena kernel (arXiv 2302.10866, section 3.3): an MLP with sine activations on the lag, times a window.

    k[i] = mlp(z[i]) (exp(-t[i] |delta|) + shift)        t[i] = i / (L - 1)
    z[i] = t[i], cos(f w[i]), -sin(f w[i])               w[i] = 2 pi i / L, with the frequencies f

A bias is added to the tap at lag 0. The time t is defined up to the length L, where the MLP was trained; the
kernel is finite, with taps that are zero from lag L onwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn

from tnnlm.errors import ConfigError
from tnnlm.fields import number
from tnnlm.kernels.base import KernelConfig, register_kernel
from tnnlm.kernels.network import NetworkKernel, joint_linear

LOWEST_FREQUENCY = 1e-4
"""Frequency of the first band, in periods per length of the kernel."""
FASTEST, SLOWEST = 0.3, 1.5
"""Times t after which the window of the last and of the first channel has decayed to ``DECAYED``."""
DECAYED = 0.01
"""Value of the window, without its shift, that defines its rate."""


@dataclass(kw_only=True)
class HyenaConfig(KernelConfig):
    """Settings of the Hyena kernel: a network on the lag, multiplied by an exponential window."""

    width: int = number(64, low=1, high=65_536)
    """Width of the network."""
    layers: int = number(2, low=0, high=1_000)
    """Number of hidden layers of the network."""
    bands: int = number(1, low=1, high=1_000)
    """Number of sine and cosine pairs in the encoding of the lag."""
    frequency: float = number(10.0, above=0, high=1e4)
    """Initial frequency of the sine activations, which are trained."""
    shift: float = number(0.05, low=0, high=1)
    """Constant added to the window; above 0 the kernel doesn't decay to zero within its length."""
    length: int | None = number(None, low=2, high=1 << 24)
    """Length of the kernel in lags; later taps are zero (null: the training length)."""
    train_encoding: bool = False
    """Whether the encoding of the lags is a parameter, of ``length`` rows, that is trained."""


@register_kernel("hyena", HyenaConfig)
class HyenaKernel(NetworkKernel):
    """Implicit kernel with one output of the network per channel and a bias at lag 0."""

    deltas: Tensor
    fixed_because = "its network is trained on lags as fractions of its length"

    def __init__(self, config: HyenaConfig, n_channels: int, max_length: int) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.length = config.length or max_length
        if self.length < 2:
            raise ConfigError(f"model.kernel.length={self.length}: must be at least 2", "set it to 2 or more")
        self.bands = config.bands
        self.shift = config.shift
        widths = [1 + 2 * config.bands, *[config.width] * (config.layers + 1)]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.frequencies = nn.Parameter(torch.full((config.layers + 1, config.width), config.frequency))
        self.output = nn.Linear(config.width, n_channels, bias=False)
        self.bias = nn.Parameter(torch.randn(n_channels))
        first, last = (math.log(DECAYED) / time for time in (SLOWEST, FASTEST))
        self.register_buffer("deltas", torch.linspace(first, last, n_channels))
        self.encoding = nn.Parameter(self._encode(self.bias)) if config.train_encoding else None

    @property
    def support(self) -> int:
        """Length of the kernel, from which on its taps are zero."""
        return self.length

    def forward(self, length: int, features: Tensor | None = None) -> Tensor:
        """Return the first ``length`` taps, (E, ``length``), in the parameters' dtype (at least float32)."""
        with torch.autocast(self.bias.device.type, enabled=False):
            known = min(length, self.length)
            time = self._lags(self.bias)[:known, None] / (self.length - 1)
            if features is None:
                features = self._features(self._inputs()[:known], self.hidden, self.frequencies)
            window = torch.exp(-time * self.deltas.to(features.dtype).abs()) + self.shift
            k = (self.output(features) * window).T
            k = torch.cat((k[:, :1] + self.bias[:, None], k[:, 1:]), dim=1)
            return nn.functional.pad(k, (0, length - known))

    def continue_from(self, trained: Self) -> str | None:
        """Take the weights of a kernel of the same length, whatever the training length."""
        if self.length != trained.length:
            return None
        self.load_state_dict(trained.state_dict())
        return f"it still ends at lag {self.length:,}"

    @property
    def settings(self) -> tuple[Hashable, ...]:
        """Length and number of bands of the encoding of the lags."""
        return self.length, self.bands

    @classmethod
    def joint_features(cls, kernels: Sequence[Self], length: int) -> Tensor:
        """Return the features (N, min(``length``, L), width) of the networks of N kernels."""
        first = kernels[0]
        with torch.autocast(first.bias.device.type, enabled=False):
            if first.encoding is None:
                inputs = first._inputs().expand(len(kernels), -1, -1)
            else:
                inputs = torch.stack([kernel._inputs() for kernel in kernels])
            groups = zip(*(kernel.hidden for kernel in kernels), strict=True)
            layers = [partial(joint_linear, group) for group in groups]
            frequencies = torch.stack([kernel.frequencies for kernel in kernels], dim=1)
            return first._features(inputs[:, :length], layers, frequencies[:, :, None])

    def _features(
        self, h: Tensor, layers: Iterable[Callable[[Tensor], Tensor]], frequencies: Tensor
    ) -> Tensor:
        for layer, factors in zip(layers, frequencies, strict=True):
            h = torch.sin(factors * layer(h))
        return h

    def _inputs(self) -> Tensor:
        """Return the encoding of all lags, (L, 1 + 2 bands)."""
        return self._encode(self.bias) if self.encoding is None else self.encoding

    def _lags(self, like: Tensor) -> Tensor:
        """Return the lags 0 .. L - 1, (L,); under bf16-true the default dtype can't represent them."""
        return torch.arange(self.length, device=like.device, dtype=like.dtype)

    def _encode(self, like: Tensor) -> Tensor:
        """Return the encoding z of all lags, (L, 1 + 2 bands), in the dtype and on the device of ``like``."""
        lags = self._lags(like)[:, None]
        ends = (LOWEST_FREQUENCY, self.bands - 1)
        bands = torch.linspace(*ends, self.bands, dtype=like.dtype, device=like.device)
        phases = lags * (2 * math.pi / self.length) * bands
        return torch.cat((lags / (self.length - 1), phases.cos(), -phases.sin()), dim=1)
