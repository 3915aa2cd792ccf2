"""Certificate of a conversion: measured errors and costs, stored as conversion.json in a converted model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ConversionReport:
    """Certificate of one converted convolution; errors are measured on the stored float32 parameters."""

    method: str
    """Conversion method, for example ``balanced``."""
    reason: str
    """Reason for choosing this method."""
    order: int
    """Order of the recurrence: number of real state variables per channel."""
    relative_tap_error: float
    """Relative l2 error of the taps, ||k - k^|| / ||k||, over all channels and the lags below the horizon."""
    l1_error: float
    """Relative l1 error of the taps, ||k - k^||_1 / ||k||_1, of the worst channel, over all lags.

    The absolute l1 error bounds |y - y^| for |x| <= 1. It is measured over eight horizons or training
    lengths, and bounded past them by the decay of kernel and recurrence; infinity if the recurrence doesn't
    decay. A channel whose kernel is zero is compared with the largest channel. For kernels without a known
    decay it is the error at the measured lags.
    """
    tail_energy: float
    """Fraction of the kernel's energy at lags from the horizon onwards, of the worst channel."""
    hankel_ratio: float | None
    """Hankel norm of k - k^ divided by its lower bound for this order, a Hankel singular value: 1 is optimal.

    Smaller ratios are impossible, and one that is measured within rounding counts as 1.
    None if the bound is at rounding level, for large orders (ETSC, window), and for poles per channel, which
    don't share one recurrence.
    """
    largest_pole: float
    """Largest modulus of the poles."""
    state_bytes: int
    """Size of the recurrent state in bytes per sequence."""

    def figures(self) -> list[str]:
        """Return the formatted table cells: order, tap and l1 errors, tail, Hankel ratio, largest pole."""
        return [
            str(self.order),
            f"{self.relative_tap_error:.1e}",
            f"{self.l1_error:.1e}",
            f"{self.tail_energy:.1e}",
            "-" if self.hankel_ratio is None else f"{self.hankel_ratio:.2f}",
            f"{self.largest_pole:.5f}",
        ]


@dataclass
class ModelReport:
    """Certificate of a converted model: its layers, memory and perplexities."""

    method: str
    """Requested conversion method, or ``unknown`` if the trained model wasn't available to compare with."""
    horizon: int
    """Number of lags for which the recurrences are meant to equal the kernels."""
    layers: list[ConversionReport]
    """Certificates of the layers."""
    state_bytes: int
    """Size of all recurrent states in bytes per sequence."""
    etsc_state_bytes: int
    """State size of ETSC as published, at the training length, in bytes per sequence."""
    window_state_bytes: int
    """State size of the exact window at this horizon, in bytes per sequence."""
    kv_cache_bytes: int
    """Size of the float32 KV cache of a Transformer of this width and depth after 2,048 tokens, in bytes."""
    seconds: float
    """Duration of the conversion in seconds."""
    warning: str | None = None
    """Warning about outputs past the horizon, if they differ noticeably."""
    ppl: dict[str, dict[str, float]] = field(default_factory=lambda: {"parallel": {}, "recurrent": {}})
    """Perplexities of the parallel and the recurrent form, by sequence length in tokens."""
    ppl_gap: dict[str, dict[str, float]] = field(default_factory=dict)
    """Relative difference of a perplexity to that of the parallel form on the same tokens, by variant and
    length."""
    ppl_gap_error: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """Standard error of ``ppl_gap``, from the differences of the rows; None for a single row."""
    protocol: str = "documents"
    """``data.protocol`` of the perplexities: where end tokens are, and which tokens are scored."""
    ppl_tokens: dict[str, int] = field(default_factory=dict)
    """Number of validation tokens that the perplexities are measured on, by sequence length in tokens."""
    step_difference: dict[str, float] = field(default_factory=dict)
    """Largest difference in nats per token, on a sample, between the steps of a large recurrence and the
    convolution with its taps, by which its perplexity is measured; by variant."""
    not_measured: dict[str, str] = field(default_factory=dict)
    """Reasons why perplexities couldn't be measured on this machine, by engine or sequence length."""

    def to_json(self) -> str:
        """Return the certificate as JSON, in which numbers that are not finite are null."""
        return json.dumps(_finite(asdict(self)), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
