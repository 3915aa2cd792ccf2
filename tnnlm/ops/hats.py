"""Outputs of piecewise linear kernels with knots at dyadic distances, for many tokens at once.

The hat of width r at a token u weights 2 r inputs by a line that rises to u and falls after it:

    T_r(u) = sum_{m=-r..r-1} (1 - |m + 1/2| / r) x(u - m)
    T_2r(u) = T_r(u) + (T_r(u + r) + T_r(u - r)) / 2           two additions for each input and stretch

A scale of a kernel that is linear between knots r lags apart is a sum of hats, up to half a sawtooth D at
both ends, since the hats of the first and last knot extend beyond them:

    D_h(b): rises from 0 to 1 in the h lags before b, and from -1 to 0 in the h lags from b on
    D_2r(b) = D_r(b) + (T_r(b - r) - T_r(b + r)) / 2           where T_r(b) is the hat at lag b

All of these are finite sums of the inputs. Dimensions: B batch, E channels, N inputs, C outputs, d knots
of a scale, J summands of an output, P first lag of the first scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tnnlm.ops.ssm_blocks import convolve

_TILE_BYTES = 1 << 20
"""Size of the inputs of the channels that are processed at a time, which fit the cache of a CPU core."""
_LEAST_CHANNELS = 32
"""Fewer channels at a time take the same time per tile."""


class Shape(NamedTuple):
    """Lags of the scales of a kernel; all scales but the last have ``per_scale`` knots."""

    first: int
    """First lag of the first scale, which is even; scale k begins at 2^k times this lag."""
    per_scale: int
    """Number of knots of a scale that is not cut off, d."""
    complete: int
    """Number of scales with d knots."""
    cut: int
    """Number of knots of a last scale that is cut off, less than d; 0 without one."""

    @property
    def scales(self) -> list[tuple[int, int, int]]:
        """First lag, distance r of the knots, and number of knots of each scale, in the order of lags."""
        counts = [self.per_scale] * self.complete + [self.cut] * (self.cut > 0)
        lags = [self.first << k for k in range(len(counts))]
        return [(lag, lag // self.per_scale, count) for lag, count in zip(lags, counts, strict=True)]

    @property
    def widths(self) -> list[int]:
        """Widths of hats, 1, 2, 4, ..., up to the largest distance of knots."""
        largest = self.scales[-1][1] if self.scales else 0
        return [1 << i for i in range(largest.bit_length())]

    @property
    def tail_lag(self) -> int:
        """First lag of the taps that follow: half a knot's distance before the last knot of the cut scale."""
        end = self.first << self.complete
        r = end // self.per_scale
        return end + r // 2 + (self.cut - 1) * r if self.cut else end

    def rows(self, width: int) -> int:
        """Return how far after the last input hats of a width are needed, negative if only before it."""
        return 2 * width - max(0, self.per_scale * width - self.first)

    def edges(self, width: int) -> Iterator[tuple[int, int, float]]:
        """Yield lag b, knot and factor of the sawteeth D_h(b), for all D_h with h >= 2 ``width``.

        Knots are numbered over all scales.
        """
        for k, (lag, r, count) in enumerate(self.scales):
            if r >= 4 * width:
                yield lag, k * self.per_scale, -0.5
                if count == self.per_scale:
                    yield lag + count * r, k * self.per_scale + count - 1, 0.5

    def summands(self, width: int) -> list[tuple[int, int, float]]:
        """Return the lags of hats of a width that make up an output, with knot and factor of each.

        Hats are taken times 2 ``width``, so that they are plain sums. Width 0 stands for the inputs.
        """
        if width == 0:
            pairs = [((lag - 1, knot, by / 2), (lag, knot, -by / 2)) for lag, knot, by in self.edges(0)]
            return [term for pair in pairs for term in pair]
        terms = []
        for lag, knot, by in self.edges(width):
            terms += [(lag - width, knot, by / (4 * width)), (lag + width, knot, -by / (4 * width))]
        for k, (lag, r, count) in enumerate(self.scales):
            if r == width:
                first = lag + r // 2
                terms += [(first + j * r, k * self.per_scale + j, 0.5 / r) for j in range(count)]
        return terms


class Scales(NamedTuple):
    """Scales of a kernel, and the taps that follow the last knot."""

    shape: Shape
    """Lags of the scales."""
    knots: Tensor
    """Values at the knots of all scales, in the order of their lags, (K, E)."""
    tail: Tensor
    """Further taps, (Q, E), added to those of the scales."""

    @classmethod
    def of(cls, knots: Tensor, cut: Tensor, tail: Tensor, first: int) -> Scales:
        """Return the scales from lag ``first`` on.

        Args:
            knots: Values of complete scales, (S, d, E).
            cut: Values of the scale after them, (K, E), K < d.
            tail: Taps that follow, (Q, E): from half a knot's distance before the last knot of ``cut``.
            first: First lag of the first scale.
        """
        shape = Shape(first, max(1, knots.shape[1]), len(knots), len(cut))
        return cls(shape, torch.cat((knots.flatten(0, 1), cut)), tail)

    @property
    def length(self) -> int:
        """Length of the kernel in lags."""
        return self.shape.tail_lag + len(self.tail)

    def channels_of(self, part: slice) -> Scales:
        """Return the scales of a slice of the channels."""
        return Scales(self.shape, self.knots[:, part], self.tail[:, part])


def far_outputs(scales: Scales, past: Tensor, count: int, gap: int = 0) -> Tensor:
    """Return what inputs contribute at the lags of ``scales`` to the outputs of some tokens after them.

    Args:
        scales: Scales and taps from lag P = ``scales.shape.first`` on.
        past: Inputs (B, N, E), oldest first, N + ``gap`` >= ``scales.length`` - 1.
        count: Number of outputs, C.
        gap: Number of tokens between the last input and the first output; ``gap`` + C is at most P.

    Returns:
        Contributions (B, C, E).
    """
    batch, stored, channels = past.shape
    if len(scales.tail):
        reach = len(scales.tail) - 1
        first = stored + gap + 1 - scales.length
        y = convolve(past[:, first : first + reach + count], scales.tail.T)[:, reach:].contiguous()
    else:
        y = past.new_zeros(batch, count, channels)
    if not len(scales.knots):
        return y
    width = channels
    if past.device.type == "cpu":
        width = max(_LEAST_CHANNELS, _TILE_BYTES // (batch * stored * past.element_size()))
    if width >= channels:
        return y + _hat_outputs(scales, past, count, gap)
    tiles = [slice(start, start + width) for start in range(0, channels, width)]
    return y + torch.cat(
        [_hat_outputs(scales.channels_of(i), past[..., i], count, gap) for i in tiles], dim=2
    )


def _hat_outputs(scales: Scales, past: Tensor, count: int, gap: int) -> Tensor:
    """Return the contributions of hats and sawteeth, (B, C, E)."""
    batch, stored, channels = past.shape
    plan = _plan(scales.shape, stored, count, gap, past.device)
    factors = scales.knots.index_select(0, plan.knots) * plan.factors.to(past.dtype)
    # Inputs outside of ``past`` are zero. Hats and sawteeth cancel there.
    x = torch.nn.functional.pad(past, (0, 0, plan.before, plan.after))
    y = past.new_zeros(batch, count, channels)
    hats = x
    for width, end, rows, begin in plan.parts:
        if width == 1:
            hats = x[:, 1:] + x[:, :-1]
        elif width:
            half = width // 2
            hats = hats[:, :end]
            hats = hats[:, half:] + hats[:, :-half]
            hats = hats[:, half:] + hats[:, :-half]
        if len(rows):
            terms = hats.index_select(1, rows).view(batch, -1, count, channels)
            y += (terms * factors[begin : begin + terms.shape[1], None]).sum(1)
    return y


class _Plan(NamedTuple):
    """Summands of outputs, which are the same for all kernels of a shape."""

    before: int
    """Zeros before the inputs."""
    after: int
    """Zeros after the inputs."""
    knots: Tensor
    """Knot of each summand of an output, (J,)."""
    factors: Tensor
    """Factor of each summand, (J, 1)."""
    parts: list[tuple[int, int, Tensor, int]]
    """For each width of hats, and 0 for the inputs: width, end of the narrower hats that it is computed from,
    rows of the hats that are summands of the outputs, (J' C), and the number of summands before these."""


@lru_cache(maxsize=64)
def _plan(shape: Shape, stored: int, count: int, gap: int, device: torch.device) -> _Plan:
    widths = shape.widths
    before = 2 * widths[-1]
    after = max(shape.rows(width) for width in widths) + widths[-1]
    # Index of the hat at lag 0 of the first output.
    origin = stored + gap + before
    summands: list[tuple[int, int, float]] = []
    parts = []
    with torch.inference_mode(False):
        outputs = torch.arange(count, device=device)
        for width in (0, *widths):
            half = width // 2
            end = origin + count + shape.rows(width) + half
            origin -= half
            terms = shape.summands(width)
            first = torch.tensor([origin - lag for lag, _, _ in terms], dtype=torch.long, device=device)
            parts.append((width, end, (first[:, None] + outputs).flatten(), len(summands)))
            summands += terms
        knots = torch.tensor([knot for _, knot, _ in summands], device=device)
        factors = torch.tensor([[by] for _, _, by in summands], dtype=torch.float64, device=device)
    return _Plan(before, after, knots, factors, parts)


def far_cost(scales: Scales, count: int) -> int:
    """Return the multiply-adds of :func:`far_outputs` per channel; an addition counts as one."""
    shape = scales.shape
    additions = sum(2 * (scales.length + shape.rows(width)) for width in shape.widths)
    summands = sum(len(shape.summands(width)) for width in (0, *shape.widths)) if shape.widths else 0
    return additions + count * (summands + len(scales.tail))
