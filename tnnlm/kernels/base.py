"""What a kernel must offer, and the register of kernels by name.

A kernel turns parameters into taps k (E, L), index = lag. Everything else (training by FFT,
conversion, decoding) works on the taps alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tnnlm.config import KernelConfig
from tnnlm.precision import KeepsFloat32


class Kernel(KeepsFloat32, ABC):
    """Parameters -> taps. Parameters and taps are float32 or wider under every precision policy."""

    n_channels: int
    """E, the number of convolutions"""

    @abstractmethod
    def forward(self, length: int) -> Tensor:
        """The first ``length`` taps, (E, ``length``). Any length, also beyond the training length."""

    @property
    def decay(self) -> Tensor | None:
        """Per-channel factor (E,) such that k[i] = decay^i t[i] with t of even size over the lags,
        or None. Conversion moves it into the poles."""
        return None


Builder = Callable[[Any, int], Kernel]
_BUILDERS: dict[str, Builder] = {}


def register_kernel(name: str) -> Callable[[Builder], Builder]:
    """Class decorator: build kernels named ``name`` by calling the class with (config, n_channels)."""

    def register(builder: Builder) -> Builder:
        _BUILDERS[name] = builder
        return builder

    return register


def build_kernel(config: KernelConfig, n_channels: int) -> Kernel:
    """The kernel that ``config.name`` names, with ``n_channels`` convolutions.

    Raises:
        KeyError: if no kernel of that name was registered.
    """
    return _BUILDERS[config.name](config, n_channels)
