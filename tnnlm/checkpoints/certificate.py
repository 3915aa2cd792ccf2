"""The certificate of a conversion, as converted folders store it: what it costs and how far it is off."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ConversionReport:
    """The certificate of one convolution. Errors are of the stored float32 numbers."""

    method: str
    reason: str
    """why this method"""
    order: int
    """real state numbers per channel"""
    relative_tap_error: float
    """||k - k^|| / ||k|| over all channels, at lags below the horizon"""
    l1_error: float
    """worst channel's ||k - k^||_1 / ||k||_1, past the horizon too: bounds |y - y^| for |x| <= 1"""
    tail_energy: float
    """worst channel's share of the kernel's energy at lags from the horizon on"""
    hankel_ratio: float | None
    """Hankel norm of k - k^ over the Hankel singular value that no recurrence of this order can
    beat: 1 is optimal. None where that value is rounding, for large orders (ETSC, window), and for
    poles per channel, which are no single recurrence."""
    largest_pole: float
    """largest modulus"""
    state_bytes: int
    """per sequence"""

    def figures(self) -> list[str]:
        """As tables show them: order, errors of the taps and in l1, tail, Hankel ratio, largest pole."""
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
    """A converted model, measured. Perplexities are keyed by form, then by length in tokens."""

    method: str
    horizon: int
    layers: list[ConversionReport]
    state_bytes: int
    etsc_state_bytes: int
    """of ETSC at the training length, as published"""
    window_state_bytes: int
    """of the exact window at this horizon"""
    kv_cache_bytes: int
    """of a Transformer of this width and depth after 2,048 tokens, in float32"""
    seconds: float
    warning: str | None = None
    """what is wrong past the horizon, if that matters"""
    ppl: dict[str, dict[str, float]] = field(default_factory=lambda: {"parallel": {}, "recurrent": {}})
    not_measured: dict[str, str] = field(default_factory=dict)
    """forms whose perplexity could not be measured on this machine, with the reason"""
