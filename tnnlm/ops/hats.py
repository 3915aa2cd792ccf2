"""Outputs of piecewise linear kernels with knots at dyadic distances, for many tokens at once.

The hat of width r at a token u weights 2 r inputs by a line that rises to u and falls after it:

    T_r(u) = sum_{m=-r..r-1} (1 - |m + 1/2| / r) x(u - m)
    T_2r(u) = T_r(u) + (T_r(u + r) + T_r(u - r)) / 2           two additions for each input and stretch

A scale of a kernel that is linear between knots r lags apart is a sum of hats, up to half a sawtooth D at
both ends, since the hats of the first and last knot extend beyond them:

    D_h(b): rises from 0 to 1 in the h lags before b, and from -1 to 0 in the h lags from b on
    D_2r(b) = D_r(b) + (T_r(b - r) - T_r(b + r)) / 2           where T_r(b) is the hat at lag b

All of these are finite sums of the inputs. Dimensions: B batch, E channels, N inputs, P outputs, d knots
of a scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tnnlm.ops.ssm_blocks import convolve

_TILE_BYTES = 1 << 22
"""Size of the inputs of the channels that are processed at a time, which fit the cache of a CPU."""


class Scales(NamedTuple):
    """Scales of a kernel, in the order of their lags, and the taps that follow the last knot."""

    lags: list[int]
    """First lag of each scale."""
    stretches: list[int]
    """Distance of the knots of each scale, r, an even number."""
    knots: list[Tensor]
    """Values at the knots of each scale, (d, E); fewer than d in a last scale that is cut off."""
    per_scale: int
    """Number of knots of a scale that is not cut off, d."""
    tail: Tensor
    """Further taps, (Q, E), added to those of the scales."""
    tail_lag: int
    """Lag of the first tap of ``tail``."""
    first: int
    """First lag of the first scale, which is also the number of outputs that are computed at a time, P."""
    length: int
    """Length of the kernel in lags."""

    @classmethod
    def of(cls, knots: Tensor, cut: Tensor, tail: Tensor, first: int) -> Scales:
        """Return the scales from lag ``first`` on.

        Args:
            knots: Values of complete scales, (S, d, E).
            cut: Values of the scale after them, (K, E), K < d.
            tail: Taps that follow, (Q, E): from half a knot's distance before the last knot of ``cut``.
            first: First lag of the first scale.
        """
        d = max(1, knots.shape[1])
        values = [*knots, *([cut] if len(cut) else [])]
        lags = [first << k for k in range(len(values))]
        end = first << len(knots)
        tail_lag = end + end // d // 2 + (len(cut) - 1) * (end // d) if len(cut) else end
        return cls(lags, [lag // d for lag in lags], values, d, tail, tail_lag, first, tail_lag + len(tail))

    def channels_of(self, part: slice) -> Scales:
        """Return the scales of a slice of the channels."""
        return self._replace(knots=[values[:, part] for values in self.knots], tail=self.tail[:, part])

    def edges(self, width: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the ends of scales as lag b and factor (E,) of D_h(b), for all D_h with h >= 2 ``width``."""
        ends = [lag + self.per_scale * r for lag, r in zip(self.lags, self.stretches, strict=True)]
        parts: dict[int, Tensor] = {}
        for lag, end, r, values in zip(self.lags, ends, self.stretches, self.knots, strict=True):
            if r >= 4 * width:
                parts[lag] = parts[lag] - values[0] / 2 if lag in parts else -values[0] / 2
                if len(values) == self.per_scale:
                    parts[end] = values[-1] / 2
        yield from parts.items()

    def rows(self, stretch: int) -> int:
        """Return how far after the last input hats of a width are needed, negative if only before it."""
        return 2 * stretch - max(0, self.per_scale * stretch - self.first)


def far_outputs(scales: Scales, past: Tensor) -> Tensor:
    """Return what inputs contribute at the lags of ``scales`` to the outputs of the P tokens after them.

    Args:
        scales: Scales and taps from lag P on.
        past: Inputs (B, N, E), oldest first, N = ``scales.length`` - 1.

    Returns:
        Contributions (B, P, E).
    """
    batch, stored, channels = past.shape
    if len(scales.tail):
        reach = len(scales.tail) - 1
        y = convolve(past[:, : reach + scales.first], scales.tail.T)[:, reach:].contiguous()
    else:
        y = past.new_zeros(batch, scales.first, channels)
    if not scales.knots:
        return y
    width = channels
    if past.device.type == "cpu":
        width = max(16, _TILE_BYTES // (batch * stored * past.element_size()))
    if width >= channels:
        return y + _hat_outputs(scales, past)
    tiles = [slice(start, start + width) for start in range(0, channels, width)]
    return y + torch.cat([_hat_outputs(scales.channels_of(i), past[..., i]) for i in tiles], dim=2)


def _hat_outputs(scales: Scales, past: Tensor) -> Tensor:
    """Return the contributions of hats and sawteeth, (B, P, E)."""
    stored, count, largest = past.shape[1], scales.first, scales.stretches[-1]
    # Inputs outside of ``past`` are zero. Hats and sawteeth cancel there.
    before, after = 2 * largest, max(scales.rows(r) for r in _widths(largest)) + largest
    x = torch.nn.functional.pad(past, (0, 0, before, after))
    y = past.new_zeros(past.shape[0], count, past.shape[2])
    origin = stored + before
    """Index of the hat at lag 0 of the first output."""

    for lag, factor in scales.edges(0):
        y.addcmul_(_at(x, origin - lag + 1, count) - _at(x, origin - lag, count), factor / 2)
    # Hats times 2 r, so that they are plain sums.
    hats = x[:, 1:] + x[:, :-1]
    for r in _widths(largest):
        if r > 1:
            half = r // 2
            hats = hats[:, : origin + count + scales.rows(r) + half]
            hats = hats[:, half:] + hats[:, :-half]
            hats = hats[:, half:] + hats[:, :-half]
            origin -= half
        for lag, factor in scales.edges(r):
            rise, fall = (_at(hats, origin - lag + shift, count) for shift in (r, -r))
            y.addcmul_(rise - fall, factor / (4 * r))
        for lag, stretch, values in zip(scales.lags, scales.stretches, scales.knots, strict=True):
            if stretch == r:
                for j, value in enumerate(values):
                    y.addcmul_(_at(hats, origin - lag - r // 2 - j * r, count), value / (2 * r))
    return y


def _at(rows: Tensor, first: int, count: int) -> Tensor:
    return rows[:, first : first + count]


def far_cost(scales: Scales, count: int) -> int:
    """Return the multiply-adds of :func:`far_outputs` per channel; an addition counts as one."""
    if not scales.knots:
        return count * len(scales.tail)
    widths = _widths(scales.stretches[-1])
    additions = sum(2 * (scales.length + scales.rows(r)) for r in widths)
    ends = sum(2 * sum(1 for _ in scales.edges(r)) for r in (0, *widths))
    return additions + count * (ends + sum(map(len, scales.knots)) + len(scales.tail))


def _widths(largest: int) -> list[int]:
    """Return 1, 2, 4, ..., ``largest``."""
    return [1 << i for i in range(largest.bit_length())]
