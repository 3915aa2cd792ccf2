"""What a conversion costs and how far it is off: measured on the stored numbers, never estimated."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tnnlm.conversion.convert import kernels, recurrences
from tnnlm.conversion.horizon import ROUNDING, tail_energy
from tnnlm.kernels import Kernel
from tnnlm.model import CausalLM
from tnnlm.ops import ssm
from tnnlm.ops.ssm import SSMParams

EXTENT = 4
"""errors past the horizon are looked for up to so many horizons"""


@dataclass(frozen=True)
class LayerReport:
    """One convolution, measured."""

    order: int
    """real state numbers per channel"""
    relative_tap_error: float
    """||k - k^|| / ||k|| over all channels, at lags below the horizon"""
    l1_error: float
    """worst channel's ||k - k^||_1 / ||k||_1, past the horizon too: bounds |y - y^| for |x| <= 1"""
    tail_energy: float
    """worst channel's share of the kernel's energy at lags from the horizon on"""
    state_bytes: int
    """per sequence"""


@dataclass
class ConversionReport:
    """A converted model, measured. Perplexities are keyed by length in tokens."""

    method: str
    horizon: int
    layers: list[LayerReport]
    state_bytes: int
    seconds: float
    ppl: dict[str, dict[str, float]] = field(default_factory=lambda: {"parallel": {}, "recurrent": {}})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for conversion.json."""
        return asdict(self)

    @property
    def warning(self) -> str | None:
        """In words, what the horizon leaves out; None if that is float32 rounding or less."""
        worst = max(layer.tail_energy for layer in self.layers)
        if worst <= ROUNDING**2:
            return None
        return (
            f"the horizon of {self.horizon} leaves {worst**0.5:.1e} of the kernel's norm outside: from lag "
            f"{self.horizon} on outputs will differ from the parallel model's; use --horizon auto"
        )


def measure(
    model: CausalLM, converted: CausalLM, *, method: str, horizon: int, seconds: float
) -> ConversionReport:
    """Compare every layer of ``converted`` with the kernel it came from.

    Args:
        model: the trained model, in its parallel form.
        converted: its converted copy.
        method, horizon, seconds: how it was converted, and how long that took.
    """
    pairs = zip(kernels(model), recurrences(converted), strict=True)
    layers = [measure_layer(kernel, params, horizon) for kernel, params in pairs]
    return ConversionReport(method, horizon, layers, sum(layer.state_bytes for layer in layers), seconds)


def measure_layer(kernel: Kernel, params: SSMParams, horizon: int) -> LayerReport:
    """Compare the effective taps of ``params`` with those of ``kernel``, up to ``EXTENT`` horizons."""
    with torch.no_grad():
        k = kernel(EXTENT * horizon).double()
        error = k - ssm.taps(params, k.shape[1])
    tiny = torch.finfo(torch.float64).tiny
    inside = error[:, :horizon].norm() / k[:, :horizon].norm().clamp(min=tiny)
    return LayerReport(
        order=ssm.order(params),
        relative_tap_error=float(inside),
        l1_error=float((error.abs().sum(1) / k.abs().sum(1).clamp(min=tiny)).max()),
        tail_energy=tail_energy(k, horizon),
        state_bytes=ssm.state_bytes(params),
    )
