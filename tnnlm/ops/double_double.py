"""Numbers of about 31 digits as unevaluated sums of two float64 numbers, real and complex.

The error of a float64 sum or product is itself a float64 number (Knuth 1969; Dekker 1971), so that every
machine has these digits, unlike wider float types. Numbers must stay below 1e290: larger ones overflow in a
product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SPLITTER = 2.0**27 + 1


class Double(NamedTuple):
    """Real numbers high + low, where low is at most a rounding of high."""

    high: Tensor
    low: Tensor

    def plus(self, other: Double) -> Double:
        """Return the sum, with an error relative to the larger term."""
        total, error = two_sum(self.high, other.high)
        return _renormalised(total, error + (self.low + other.low))

    def times(self, other: Double) -> Double:
        """Return the product."""
        product, error = two_product(self.high, other.high)
        return _renormalised(product, error + (self.high * other.low + self.low * other.high))

    def negative(self) -> Double:
        """Return the number with the other sign."""
        return Double(-self.high, -self.low)


class ComplexDouble(NamedTuple):
    """Complex numbers."""

    real: Double
    imag: Double

    def times(self, other: ComplexDouble) -> ComplexDouble:
        """Return the product, with an error relative to the modulus."""
        real = self.real.times(other.real).plus(self.imag.times(other.imag).negative())
        return ComplexDouble(real, self.real.times(other.imag).plus(self.imag.times(other.real)))

    def unsqueeze(self) -> ComplexDouble:
        """Return the numbers with a further last axis."""
        return ComplexDouble(*(Double(*(x.unsqueeze(-1) for x in part)) for part in self))

    def joined(self, other: ComplexDouble) -> ComplexDouble:
        """Return both numbers side by side on the last axis."""
        pairs = [zip(a, b, strict=True) for a, b in zip(self, other, strict=True)]
        return ComplexDouble(*(Double(*(torch.cat(pair, dim=-1) for pair in part)) for part in pairs))

    def rounded(self) -> Tensor:
        """Return the numbers in complex128."""
        return torch.complex(self.real.high, self.imag.high)


def from_planes(planes: Tensor) -> ComplexDouble:
    """Return the complex numbers whose real and imaginary planes are on the last axis but one."""
    real, imag = planes.double().unbind(-2)
    zero = torch.zeros_like(real)
    return ComplexDouble(Double(real, zero), Double(imag, zero))


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rounded sum and its error, exactly."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rounded product and its error, exactly unless the error underflows."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return a number as a sum of two with half as many digits."""
    scaled = _SPLITTER * a
    high = scaled - (scaled - a)
    return high, a - high


def _renormalised(high: Tensor, low: Tensor) -> Double:
    total = high + low
    return Double(total, low - (total - high))
