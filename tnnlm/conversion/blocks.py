"""Channels in blocks: float64 algebra on 16,384 x 16,384 float32 taps in a few gigabytes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

CHANNELS = 256
"""channels that are held in float64 at a time"""


def channel_blocks(k: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Taps (E, T) in float64, some channels at a time: 16,384 x 16,384 taps take 2 GB in all."""
    for start in range(0, k.shape[0], CHANNELS):
        part = slice(start, min(start + CHANNELS, k.shape[0]))
        yield part, k[part].double()
