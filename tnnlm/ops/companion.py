"""Companion recurrence of a rational transfer function: parameters, state, step and parallel prefill.

    w[t] = x[t] - sum_{i=1..n} a[i] w[t-i]                    the last n values of w are the state
    y[t] = d x[t] + sum_{i=1..n} c[i] w[t-i]                  H(z) = d + c(z) / (1 + a(z))

It takes n real numbers of state and 2 n + 1 multiply-adds per channel. Unlike a diagonal recurrence it
represents any poles, including repeated poles and poles at zero. Dimensions: B batch, L length, E channels,
n state size, G denominators.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tnnlm.ops.toeplitz import fft_length, toeplitz
from tnnlm.precision import working_dtype

_WRAP = 8
"""Ratio of the points of an FFT to the number of coefficients of a power series."""
_SMALL = 48
"""State size n up to which powers of the state matrix, O(n^3), are faster than FFTs; five times at n = 16."""
_BISECTIONS = 30
"""Number of bisections for the largest modulus of a pole, which give it to 1e-9."""


class CompanionState(NamedTuple):
    """Decoding state of one convolution, which has a fixed size and is never modified in place."""

    recent: Tensor
    """Last n values of w, newest first, (B, E, n)."""


class CompanionParams(NamedTuple):
    """Parameters of a recurrence in companion form."""

    direct: Tensor
    """Tap d at lag 0, (E,)."""
    numerator: Tensor
    """Coefficients c[1] .. c[n], (E, n)."""
    denominator: Tensor
    """Coefficients a[1] .. a[n], (G, n); each row is shared by E / G consecutive channels."""

    def init_state(self, batch_size: int) -> CompanionState:
        """Return the state before the first token: zeros, in the numerator's dtype and on its device."""
        return CompanionState(self.numerator.new_zeros(batch_size, *self.numerator.shape))

    def step(
        self, x: Tensor, state: CompanionState, active: Tensor | None = None
    ) -> tuple[Tensor, CompanionState]:
        """Process one token x (B, E) and return output and next state.

        Rows where ``active`` (B,) is False keep their state.
        """
        recent = state.recent
        u = x.to(recent.dtype)
        w = u - torch.einsum("bep,ep->be", recent, _per_channel(self))
        y = self.direct * u + torch.einsum("bep,ep->be", recent, self.numerator)
        after = torch.cat((w.unsqueeze(-1), recent[..., :-1]), dim=-1)
        if active is not None:
            after = torch.where(active[:, None, None], after, recent)
        return y.to(x.dtype), CompanionState(after)

    def prefill(
        self, x: Tensor, state: CompanionState, lengths: Tensor | None = None
    ) -> tuple[Tensor, CompanionState]:
        """Process the tokens of x (B, L, E) in parallel by FFT convolutions.

        Arguments and return values are those of :meth:`tnnlm.ops.ssm.SSMParams.prefill`.
        """
        u = x.to(state.recent.dtype)
        length, n = x.shape[1], self.order()
        past = state.recent.flip(-1).transpose(1, 2)
        # The state affects the next n values of w as these inputs would, starting from a zero state.
        reach = min(n, length)
        old = torch.cat((past, past.new_zeros(past.shape[0], reach, past.shape[2])), dim=1)
        echo = toeplitz(old, _delayed(_per_channel(self)))[:, n:]
        driven = torch.cat((u[:, :reach] - echo, u[:, reach:]), dim=1)
        # Outputs are computed from the taps and not from w: w may be much larger than the outputs.
        tail = rational_series(self.numerator, _per_channel(self), length).to(u.dtype)
        y = self.direct * u + toeplitz(driven, _delayed(tail))
        y[:, :reach] += toeplitz(old, _delayed(self.numerator))[:, n:]
        one = torch.ones_like(self.denominator[:, :1])
        impulse = rational_series(one, self.denominator, length).to(u.dtype)
        history = torch.cat((past, toeplitz(driven, _repeat(impulse, u.shape[2]))), dim=1)
        if lengths is None:
            recent = history[:, length:]
        else:
            index = lengths.to(x.device)[:, None] + torch.arange(n, device=x.device)
            recent = history.gather(1, index[:, :, None].expand(-1, -1, u.shape[2]))
        return y.to(x.dtype), CompanionState(recent.flip(1).transpose(1, 2).contiguous())

    def taps(self, length: int) -> Tensor:
        """Return the effective taps, d and then the series of c / (1 + a), (E, ``length``), in float64."""
        a = self.denominator
        radius = 1.0 if bool(_schur_cohn(a.double()).all()) else self.largest_pole()
        series = rational_series(self.numerator, _per_channel(self), max(1, length - 1), radius)
        return torch.cat((self.direct.double()[:, None], series[:, : length - 1]), dim=1)

    def multiply_adds(self) -> int:
        """Return the multiply-adds of one step: per channel, two for each state number and one for lag 0."""
        channels, order = self.numerator.shape
        return channels * (2 * order + 1)

    def order(self) -> int:
        """Return the state size in real numbers per channel, n."""
        return self.numerator.shape[1]

    def largest_pole(self) -> float:
        """Return the largest modulus of all poles, over all channels."""
        return float(pole_radius(self.denominator.detach()).max())

    def channels_of(self, part: slice) -> CompanionParams:
        """Return the recurrence restricted to a slice of the channels, with a denominator per channel."""
        return CompanionParams(self.direct[part], self.numerator[part], _per_channel(self)[part])

    def to_dtype(self, dtype: torch.dtype) -> CompanionParams:
        """Return the recurrence with its tensors cast to ``dtype``, at least float32."""
        return CompanionParams(*(part.to(working_dtype(dtype)) for part in self))


def rational_series(numerator: Tensor, a: Tensor, length: int, radius: float = 1.0) -> Tensor:
    """Expand (c[1] + c[2] z + ..) / (1 + a[1] z + .. + a[n] z^n) into a power series, in float64.

    Small systems use powers of the state matrix. Large systems use FFTs on a circle whose radius is small
    enough for aliasing to be negligible: with ``_WRAP`` times as many points as coefficients, and a damping
    of eps^(1 / _WRAP) at the last coefficient, both aliasing and the error of undoing the damping are at the
    level of float64 rounding, for all poles with a modulus up to ``radius``.

    Args:
        numerator: Coefficients c, (G, m), m <= n.
        a: Coefficients a, (G, n).
        length: Number of coefficients to return, at least 1.
        radius: Largest modulus of a pole, or an upper bound.

    Returns:
        First coefficients of the series, (G, ``length``); not finite if they overflow.
    """
    if a.shape[1] <= _SMALL:
        return _series_by_states(numerator.double(), a.double(), length)
    points = fft_length(_WRAP * max(length, a.shape[1] + 1, numerator.shape[1]))
    damping = torch.finfo(torch.float64).eps ** (1 / points) / radius
    scale = damping ** torch.arange(max(length, a.shape[1] + 1, numerator.shape[1]), device=a.device).double()
    whole = torch.nn.functional.pad(a.double(), (1, 0), value=1.0) * scale[: a.shape[1] + 1]
    above = torch.fft.rfft(numerator.double() * scale[: numerator.shape[1]], n=points)
    return torch.fft.irfft(above / torch.fft.rfft(whole, n=points), n=points)[:, :length] / scale[:length]


def _series_by_states(numerator: Tensor, a: Tensor, length: int) -> Tensor:
    """Return c A^i b in companion form as products of rows c A^r, r < m, and columns A^(q m) b."""
    n = a.shape[1]
    matrix = torch.diag_embed(a.new_ones(len(a), n - 1), offset=-1)
    matrix[:, 0] = -a
    rows = torch.nn.functional.pad(numerator, (0, n - numerator.shape[1]))[:, None]
    columns = torch.nn.functional.pad(a.new_ones(len(a), 1), (0, n - 1))[:, :, None]
    while rows.shape[1] ** 2 < length:
        rows = torch.cat((rows, rows @ matrix), dim=1)
        matrix = matrix @ matrix
    while rows.shape[1] * columns.shape[2] < length:
        columns = torch.cat((columns, matrix @ columns), dim=2)
        matrix = matrix @ matrix
    return (columns.transpose(1, 2) @ rows.transpose(1, 2)).flatten(1)[:, :length]


def pole_radius(a: Tensor) -> Tensor:
    """Return the largest modulus of the roots of z^n + a[1] z^(n-1) + .. + a[n], (G, n) -> (G,).

    It is found by bisection at O(n^2) per step, compared with O(n^3) for eigenvalues: all roots of the
    polynomial in r z are inside the unit circle (Schur-Cohn test) if and only if r exceeds this modulus.
    """
    a = a.double()
    inside = _schur_cohn(a)
    low = torch.where(inside, 0.0, 1.0).to(a)
    # Cauchy's bound.
    high = torch.where(inside, 1.0, 1.0 + a.abs().amax(1))
    exponents = torch.arange(1, a.shape[1] + 1, dtype=a.dtype, device=a.device)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = _schur_cohn(a / middle[:, None] ** exponents)
        low, high = torch.where(below, low, middle), torch.where(below, middle, high)
    return high


def _schur_cohn(a: Tensor) -> Tensor:
    """Return whether all roots are inside the unit circle, (G, n) -> (G,).

    By Schur and Cohn, this holds if and only if all reflection coefficients are inside it.
    """
    inside = torch.ones(len(a), dtype=torch.bool, device=a.device)
    while a.shape[1]:
        reflection, rest = a[:, -1:], a[:, :-1]
        inside = inside & (reflection.abs() < 1).squeeze(1)
        # Polynomials that failed need no further test. A comparison with NaN is False, so NaN fails.
        reflection = torch.where(inside[:, None], reflection, 0.0)
        a = (rest - reflection * rest.flip(1)) / (1 - reflection.square())
    return inside


def _per_channel(params: CompanionParams) -> Tensor:
    return _repeat(params.denominator, len(params.numerator))


def _repeat(rows: Tensor, channels: int) -> Tensor:
    """Return rows (G, ...) as (E, ...), each repeated for E / G consecutive channels."""
    return rows if len(rows) == channels else rows.repeat_interleave(channels // len(rows), dim=0)


def _delayed(coefficients: Tensor) -> Tensor:
    """Return coefficients of lags 1 .. n as taps of lags 0 .. n."""
    return torch.nn.functional.pad(coefficients, (1, 0))
