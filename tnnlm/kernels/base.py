"""What a kernel must offer, and the register of kernels by name.

A kernel turns parameters into taps k (E, L), index = lag. Everything else (training by FFT,
conversion, decoding) works on the taps alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from tnnlm.errors import ConfigError
from tnnlm.ops.recurrence import Params
from tnnlm.precision import KeepsFloat32


@dataclass(kw_only=True)
class KernelConfig:
    """What every kernel's settings have in common: ``name`` selects the schema of the rest."""

    name: str = "tno"
    """which kernel; see tnnlm/kernels"""
    module: str | None = None
    """a Python file or module that registers this kernel; null: one of the package's own"""


KERNEL_SCHEMAS: dict[str, type[KernelConfig]] = {}
"""settings of each kernel, by name; filled by :func:`register_kernel`"""


class Kernel(KeepsFloat32, ABC):
    """Parameters -> taps. Parameters and taps are float32 or wider under every precision policy."""

    n_channels: int
    """E, the number of convolutions"""

    @abstractmethod
    def forward(self, length: int) -> Tensor:
        """The first ``length`` taps, (E, ``length``). Any length, also beyond the training length."""

    def recurrence(self) -> Params | None:
        """The kernel's own exact recurrence, if it has one: another form beside the converted ones."""
        return None

    @property
    def decay(self) -> Tensor | None:
        """Per-channel factor (E,) such that k[i] = decay^i t[i] with t of even size over the lags,
        or None. Conversion moves it into the poles."""
        return None


class LagKernel(Kernel):
    """A kernel whose taps are a function of the lag, negative lags too: one serves both directions."""

    @abstractmethod
    def between(self, start: int, stop: int) -> Tensor:
        """Taps at lags ``start`` .. ``stop`` - 1, (E, ``stop`` - ``start``)."""

    def forward(self, length: int) -> Tensor:
        """The first ``length`` taps, (E, ``length``)."""
        return self.between(0, length)


Builder = Callable[[Any, int, int], Kernel]
_BUILDERS: dict[str, Builder] = {}
_B = TypeVar("_B", bound=Builder)


def register_kernel(name: str, schema: type[KernelConfig]) -> Callable[[_B], _B]:
    """Class decorator: ``model.kernel.name=NAME`` builds kernels by this class.

    Args:
        name: as in configurations.
        schema: a keyword-only dataclass under :class:`KernelConfig`, its settings.

    Returns:
        a decorator for a class that is called with (settings, n_channels, max_length).
    """

    def register(builder: _B) -> _B:
        KERNEL_SCHEMAS[name] = schema
        _BUILDERS[name] = builder
        return builder

    return register


def build_kernel(config: KernelConfig, n_channels: int, max_length: int) -> Kernel:
    """The kernel that ``config.name`` names.

    Args:
        config: its settings.
        n_channels: how many convolutions.
        max_length: the training length.

    Raises:
        ConfigError: if no kernel of that name was registered, or its settings don't fit together.
    """
    if config.name not in _BUILDERS:
        raise unknown_kernel(config.name)
    return _BUILDERS[config.name](config, n_channels, max_length)


def unknown_kernel(name: str) -> ConfigError:
    """The error for a name that no kernel is registered under."""
    return ConfigError(
        f"model.kernel.name={name}: unknown kernel",
        f"there is {', '.join(_BUILDERS)}; model.kernel.module=FILE names the file of another one",
    )
