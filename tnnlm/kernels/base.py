"""Base classes of kernels, and the registry of kernels by name.

A kernel turns parameters into taps k (E, L), index = lag. FFT training, conversion and decoding use nothing
but the taps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor

from tnnlm.errors import ConfigError
from tnnlm.fields import number
from tnnlm.ops.recurrence import Params
from tnnlm.precision import KeepsFloat32


@dataclass(kw_only=True)
class KernelConfig:
    """Settings that all kernels have; ``name`` selects the kernel, which adds further settings."""

    name: str = "tno"
    """Name of the kernel: tno, fd_tno, sgconv, rtf, hyena, or a name that ``module`` registers."""
    module: str | None = None
    """Python file or module that registers a custom kernel (null: the kernel is part of tnnlm)."""
    module_sha256: str | None = None
    """SHA-256 of the source of ``module``, which the run records; other source is refused (null: any)."""
    reverse_lag: int = number(1, low=0, high=1, before=0)
    """Distance at which the first tap of the second kernel of a bidirectional model acts: 1 as in the code of
    S4 and SGConv, or 0, where lag 0 belongs to the first kernel and this tap is not used. Models trained
    before this setting existed have 0. Kernels that are defined at negative lags (tno, fd_tno) have no second
    kernel."""


KERNEL_SCHEMAS: dict[str, type[KernelConfig]] = {}
"""Settings schema of each kernel by name; :func:`register_kernel` adds entries."""


class Kernel(KeepsFloat32, ABC):
    """Module that turns parameters into taps, both float32 or wider under every precision policy."""

    n_channels: int
    """Number of convolutions, E."""
    fixed_because: ClassVar[str] = "it doesn't define how its taps continue past its training length"
    """Why :meth:`continue_from` can't take the weights of another training length."""

    @abstractmethod
    def forward(self, length: int) -> Tensor:
        """Return the first ``length`` taps, (E, ``length``); any length, even beyond the training length."""

    def channel_taps(self, length: int, channels: slice) -> Tensor:
        """Return the first ``length`` taps of some channels, (E', ``length``).

        Kernels that can compute them without the other channels override this, which saves memory where a
        process convolves a part of the channels only.
        """
        return self(length)[channels]

    def leave_lag_zero(self) -> None:
        """Remove what acts at lag 0 alone; called for a second kernel, whose first tap is at distance 1."""

    def recurrence(self) -> Params | None:
        """Return an exact recurrence of the kernel, or None if the kernel doesn't have one."""
        return None

    def continue_from(self, trained: Self) -> str | None:
        """Take the weights of a kernel of the same settings that was trained at another length.

        The taps at the lags that both lengths have stay the same.

        Args:
            trained: Kernel, which is not changed.

        Returns:
            How the taps at further lags are defined, for the log; None if the kernel can't continue, which
            ``fixed_because`` explains. Its weights are then unchanged.
        """
        return None

    @property
    def support(self) -> int | None:
        """Number of lags from which on every tap is zero by definition; None if the kernel never ends."""
        return None

    @property
    def decay(self) -> Tensor | None:
        """Decay of each channel, (E,), or None.

        The kernel is k[i] = decay^i t[i], where t neither grows nor decays; conversion moves the decay into
        the poles.
        """
        return None


class LagKernel(Kernel):
    """Kernel defined at negative lags too, so that one instance serves both directions."""

    @abstractmethod
    def between(self, start: int, stop: int) -> Tensor:
        """Return the taps at lags ``start`` .. ``stop`` - 1, (E, ``stop`` - ``start``)."""

    def forward(self, length: int) -> Tensor:
        """Return the first ``length`` taps, (E, ``length``)."""
        return self.between(0, length)


Builder = Callable[[Any, int, int], Kernel]
_BUILDERS: dict[str, Builder] = {}
_B = TypeVar("_B", bound=Builder)


def register_kernel(name: str, schema: type[KernelConfig]) -> Callable[[_B], _B]:
    """Register a kernel class for ``model.kernel.name=NAME``; use it as a class decorator.

    Args:
        name: Name of the kernel in configurations.
        schema: Settings of the kernel, a keyword-only dataclass derived from :class:`KernelConfig`.

    Returns:
        Decorator for a class that is constructed with (settings, n_channels, max_length).
    """

    def register(builder: _B) -> _B:
        KERNEL_SCHEMAS[name] = schema
        _BUILDERS[name] = builder
        return builder

    return register


def build_kernel(config: KernelConfig, n_channels: int, max_length: int) -> Kernel:
    """Build the kernel registered as ``config.name``.

    Args:
        config: Settings of the kernel.
        n_channels: Number of convolutions, E.
        max_length: Training length in tokens.

    Raises:
        ConfigError: If no kernel is registered under that name, or its settings are inconsistent.
    """
    if config.name not in _BUILDERS:
        raise unknown_kernel(config.name)
    return _BUILDERS[config.name](config, n_channels, max_length)


def unknown_kernel(name: str) -> ConfigError:
    """Return the error for a name under which no kernel is registered."""
    return ConfigError(
        f"model.kernel.name={name}: unknown kernel",
        f"choose one of {', '.join(_BUILDERS)}, or load another kernel with model.kernel.module=FILE",
    )
