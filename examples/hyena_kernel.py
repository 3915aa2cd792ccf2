"""A kernel of one's own: a Hyena-style implicit filter with its window (arXiv 2302.10866, section 3.3).

A small network with sine activations on an encoding of the lag, times a window that decays, at a rate of
its own in every channel. Train, convert and generate with it, without touching the package:

    python train.py model.kernel.name=hyena model.kernel.module=examples/hyena_kernel.py \\
        conversion.method=auto name=hyena
    python convert.py runs/hyena --method auto
    python generate.py --model runs/hyena --prompt "import "

Three steps: settings, a ``Kernel`` that turns parameters into taps, and a name for the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnnlm.fields import number
from tnnlm.kernels import Kernel, KernelConfig, register_kernel


# Step 1: settings, with defaults and bounds. They are checked like all others, as model.kernel.bands=8.
@dataclass(kw_only=True)
class HyenaConfig(KernelConfig):
    """A network on the lag, times a window."""

    width: int = number(32, low=1, high=65_536)
    """of the network"""
    bands: int = number(8, low=0, high=1_000)
    """sines and cosines in the encoding of the lag"""
    frequency: float = number(10.0, above=0, high=1e4)
    """of the sine activations"""
    memory: float = number(0.5, above=0, high=100)
    """lags, over the training length, after which the slowest channel's window has fallen to 1 %"""
    floor: float = number(0.0, low=0, high=1)
    """what the window never falls below; above 0 the kernel doesn't die out"""


# Step 3: a name. Step 2: the kernel, built as Class(settings, n_channels, max_length).
@register_kernel("hyena", HyenaConfig)
class HyenaKernel(Kernel):
    """Taps (E, L) for any L, in the parameters' dtype. Everything else follows from them."""

    rates: Tensor

    def __init__(self, config: HyenaConfig, n_channels: int, max_length: int) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.max_length = max_length
        self.config = config
        self.input = nn.Linear(1 + 2 * config.bands, config.width)
        self.hidden = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, n_channels, bias=False)
        # From the slowest channel to one that is ten times as fast. A buffer: checkpoints carry it.
        slowest = -math.log(0.01) / (config.memory * max_length)
        self.register_buffer("rates", slowest * torch.logspace(0, 1, n_channels))

    def forward(self, length: int) -> Tensor:
        """The first ``length`` taps; a longer call begins with the same ones."""
        weight = self.input.weight
        with torch.autocast(weight.device.type, enabled=False):
            lags = torch.arange(length, device=weight.device, dtype=weight.dtype)[:, None]
            turns = 2 * math.pi * lags / self.max_length * torch.arange(1, self.config.bands + 1).to(lags)
            encoding = torch.cat((lags / self.max_length, turns.sin(), turns.cos()), dim=1)
            hidden = torch.sin(self.config.frequency * self.input(encoding))
            hidden = torch.sin(self.config.frequency * self.hidden(hidden))
            window = torch.exp(-lags * self.rates.to(lags)) + self.config.floor
            taps: Tensor = (self.output(hidden) * window).T
            return taps
