"""Custom kernel: a Hyena-style implicit filter with a window (arXiv 2302.10866, section 3.3).

The taps are a small network with sine activations on an encoding of the lag, multiplied by an exponential
window with a different rate in each channel. Train, convert and generate with it, without changes to the
package:

    python train.py model.kernel.name=hyena_style model.kernel.module=examples/hyena_kernel.py \\
        conversion.method=auto name=hyena
    python convert.py runs/hyena --method auto
    python generate.py --model runs/hyena --prompt "import "

A custom kernel takes three steps: define its settings, define a ``Kernel`` that turns parameters into taps,
and register both under a name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnnlm.fields import number
from tnnlm.kernels import Kernel, KernelConfig, register_kernel


# Step 1: settings with defaults and bounds, which are checked like all others, such as model.kernel.bands=8.
@dataclass(kw_only=True)
class HyenaConfig(KernelConfig):
    """Settings of the kernel: a network on the lag, multiplied by a window."""

    width: int = number(32, low=1, high=65_536)
    """Width of the network."""
    bands: int = number(8, low=0, high=1_000)
    """Number of sine and cosine pairs in the encoding of the lag."""
    frequency: float = number(10.0, above=0, high=1e4)
    """Frequency of the sine activations."""
    memory: float = number(0.5, above=0, high=100)
    """Lag at which the slowest window has decayed to 1 %, as a fraction of the training length."""
    floor: float = number(0.0, low=0, high=1)
    """Constant added to the window; above 0 the kernel doesn't decay to zero."""


# Step 2: the kernel, which is built as Class(settings, n_channels, max_length). Step 3: the decorator, which
# registers it.
@register_kernel("hyena_style", HyenaConfig)
class HyenaKernel(Kernel):
    """Hyena-style kernel with taps (E, L) for any L, in the parameters' dtype."""

    rates: Tensor

    def __init__(self, config: HyenaConfig, n_channels: int, max_length: int) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.max_length = max_length
        self.config = config
        self.input = nn.Linear(1 + 2 * config.bands, config.width)
        self.hidden = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, n_channels, bias=False)
        # The fastest channel decays ten times as fast as the slowest. Buffers are saved in checkpoints.
        slowest = -math.log(0.01) / (config.memory * max_length)
        self.register_buffer("rates", slowest * torch.logspace(0, 1, n_channels))

    def forward(self, length: int) -> Tensor:
        """Return the first ``length`` taps, (E, ``length``); a tap doesn't depend on ``length``."""
        weight = self.input.weight
        with torch.autocast(weight.device.type, enabled=False):
            lags = torch.arange(length, device=weight.device, dtype=weight.dtype)[:, None]
            phases = 2 * math.pi * lags / self.max_length * torch.arange(1, self.config.bands + 1).to(lags)
            encoding = torch.cat((lags / self.max_length, phases.sin(), phases.cos()), dim=1)
            hidden = torch.sin(self.config.frequency * self.input(encoding))
            hidden = torch.sin(self.config.frequency * self.hidden(hidden))
            window = torch.exp(-lags * self.rates.to(lags)) + self.config.floor
            taps: Tensor = (self.output(hidden) * window).T
            return taps
