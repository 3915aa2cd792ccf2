"""Taps of the modes of a diagonal recurrence, to more digits than float64 holds if the residues are float64.

In float64, the rounding of a sum of modes is as large as the error of an exact conversion, which would then
be that of its measurement. Every product here is a float64 matrix product. One of them has factors cut to so
few bits that all of its sums are exact (Ozaki, Ogita, Oishi and Rump 2012); the others are so small that they
may be rounded.

Dimensions: E channels, N modes, L lags.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tnnlm.ops.double_double import ComplexDouble, Double, from_planes, two_sum
from tnnlm.ops.powers import mode_taps, power_table

_POWERS_BYTES = 1 << 25
"""Size in bytes of the powers of the poles that are in memory at a time."""
_SMALLEST = torch.finfo(torch.float64).tiny


class Sums(NamedTuple):
    """Taps as an unevaluated sum of two tensors (E, L) in float64, of which the second one is small."""

    coarse: Tensor
    fine: Tensor

    def taken_from(self, k: Tensor, window: Tensor) -> Tensor:
        """Return k - window - sums, rounded at the end only."""
        rest, lost = two_sum(k, -window)
        return (rest - self.coarse) + (lost - self.fine)


def mode_sums(poles: Tensor, residues: Tensor, length: int) -> Sums:
    """Return the taps Re sum_m c[m] lam[m]^i, (E, ``length``).

    Args:
        poles: Poles lam as planes, (2, N) or (E, 2, N).
        residues: Residues c as planes, (E, 2, N).
        length: Number of taps.
    """
    coarse, fine = residues.new_zeros(2, len(residues), length, dtype=torch.float64)
    if not residues.shape[2]:
        return Sums(coarse, fine)
    exact = residues.dtype == torch.float64
    fewest, each = (8, 128) if exact else (64, 16)
    target = max(2, min(length, max(fewest, _POWERS_BYTES // (each * poles[..., 0, :].numel()))))
    squares = [from_planes(poles)]
    while 1 << (len(squares) - 1) < target:
        squares.append(squares[-1].times(squares[-1]))
    block, turn = 1 << (len(squares) - 1), squares.pop()
    sums = _ExactSums(squares, residues) if exact else _RoundedSums(squares, residues)
    # Taps are computed in blocks, with the residues multiplied by lam^block for each, so that only one block
    # of powers is in memory.
    turned = _one(turn)
    for start in range(0, length, block):
        stop = min(start + block, length)
        coarse[:, start:stop], fine[:, start:stop] = sums.block(turned, stop - start)
        turned = turned.times(turn)
    return Sums(coarse, fine)


class _RoundedSums:
    """Sums in float64, of powers that are rounded once."""

    def __init__(self, squares: list[ComplexDouble], residues: Tensor) -> None:
        self._residues = torch.complex(*residues.double().unbind(-2))
        self._powers = power_table([square.rounded() for square in squares], 1 << len(squares))

    def block(self, turned: ComplexDouble, length: int) -> tuple[Tensor, Tensor]:
        """Return taps (E, ``length``) of the residues times ``turned``, and zeros."""
        c = self._residues * turned.rounded()
        taps = mode_taps(torch.stack((c.real, c.imag), dim=-2), self._powers[..., :length])
        return taps, torch.zeros_like(taps)


class _Split(NamedTuple):
    """Matrix as a sum: entries cut to few bits, what float64 holds besides, and what it doesn't hold."""

    cut: Tensor
    rest: Tensor
    below: Tensor


class _ExactSums:
    """Sums of products of double-double numbers, rounded to two float64 numbers."""

    def __init__(self, squares: list[ComplexDouble], residues: Tensor) -> None:
        # Products of larger numbers would overflow.
        largest = residues.abs().amax()
        self._scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
        self._residues = from_planes(residues / self._scale)
        powers = _one(squares[0]).unsqueeze()
        for square in squares:
            powers = powers.joined(powers.times(square.unsqueeze()))
        self._powers = _split(powers.real, powers.imag, -2)

    def block(self, turned: ComplexDouble, length: int) -> tuple[Tensor, Tensor]:
        """Return coarse and fine parts of the taps (E, ``length``) of the residues times ``turned``."""
        c = self._residues.times(turned)
        weights = _split(c.real, c.imag.negative(), -1)
        powers = _Split(*(part[..., :length] for part in self._powers))
        fine = _product(weights.cut, powers.rest + powers.below)
        fine = fine + _product(weights.rest + weights.below, powers.cut + powers.rest)
        return _product(weights.cut, powers.cut) * self._scale, fine * self._scale


def _one(like: ComplexDouble) -> ComplexDouble:
    real = torch.ones_like(like.real.high)
    return from_planes(torch.stack((real, torch.zeros_like(real)), dim=-2))


def _split(first: Double, second: Double, axis: int) -> _Split:
    """Join two matrices on an axis and cut the entries so that sums of products over it are exact."""
    whole, below = (torch.cat(pair, dim=axis) for pair in zip(first, second, strict=True))
    bits = (52 - math.ceil(math.log2(whole.shape[axis]))) // 2
    exponent = torch.frexp(whole.abs().amax(axis, keepdim=True)).exponent - bits
    step = torch.ldexp(torch.ones_like(whole.narrow(axis, 0, 1)), exponent).clamp(min=_SMALLEST)
    cut = torch.round(whole / step) * step
    return _Split(cut, whole - cut, below)


def _product(weights: Tensor, powers: Tensor) -> Tensor:
    """Return sums over modes of weights (E, N) and powers (N, L) or (E, N, L)."""
    if powers.dim() == 2:
        return weights @ powers
    return (weights.unsqueeze(1) @ powers).squeeze(1)
