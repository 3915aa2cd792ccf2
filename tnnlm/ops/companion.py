"""The companion recurrence of a rational transfer function: parameters, state, step, parallel prefill.

    w[t] = x[t] - sum_{i=1..n} a[i] w[t-i]                    the last n values of w are the state
    y[t] = d x[t] + sum_{i=1..n} c[i] w[t-i]                  H(z) = d + c(z) / (1 + a(z))

n real numbers of state per channel and 2 n + 1 multiply-adds, with any poles, repeated ones and a
finite beginning included, which a diagonal form can't hold. Letters: B batch, L length, E channels,
n state size, G denominators.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tnnlm.ops.toeplitz import fft_length, toeplitz
from tnnlm.precision import working_dtype

_WRAP = 8
"""points of an FFT over coefficients of a power series"""
_SMALL = 48
"""state size up to which n^3 is less than FFTs of ``_WRAP`` lengths: five times at n = 16"""
_BISECTIONS = 30
"""of the largest pole's modulus: to 1e-9"""


class CompanionState(NamedTuple):
    """What is carried between tokens: fixed size, passed in and returned, never changed in place."""

    recent: Tensor
    """the last n values of w, newest first as the coefficients are, (B, E, n)"""


class CompanionParams(NamedTuple):
    """Parameters of one recurrent convolution in companion form."""

    direct: Tensor
    """the tap at lag 0, d, (E,)"""
    numerator: Tensor
    """c[1] .. c[n], (E, n)"""
    denominator: Tensor
    """a[1] .. a[n], (G, n): channels in order, E / G of them share a row"""

    def init_state(self, batch_size: int) -> CompanionState:
        """The state before the first token: zeros, in the numerator's dtype and on its device."""
        return CompanionState(self.numerator.new_zeros(batch_size, *self.numerator.shape))

    def step(
        self, x: Tensor, state: CompanionState, active: Tensor | None = None
    ) -> tuple[Tensor, CompanionState]:
        """Advance by one token x (B, E); rows where ``active`` (B,) is False keep their state."""
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
        """Advance by the tokens of x (B, L, E) at once, by FFT convolutions; arguments and what is returned
        are those of :func:`tnnlm.ops.ssm.SSMParams.prefill`."""
        u = x.to(state.recent.dtype)
        length, n = x.shape[1], self.order()
        past = state.recent.flip(-1).transpose(1, 2)
        # What the state does to the next n values of w is what these inputs would do from rest.
        reach = min(n, length)
        old = torch.cat((past, past.new_zeros(past.shape[0], reach, past.shape[2])), dim=1)
        echo = toeplitz(old, _delayed(_per_channel(self)))[:, n:]
        driven = torch.cat((u[:, :reach] - echo, u[:, reach:]), dim=1)
        # Outputs by the taps, which are of the size of the outputs, and not by way of w, which may be larger.
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
        """The effective taps: d at lag 0, then the series of c / (1 + a), (E, ``length``) in float64."""
        a = self.denominator
        radius = 1.0 if bool(_schur_cohn(a.double()).all()) else self.largest_pole()
        series = rational_series(self.numerator, _per_channel(self), max(1, length - 1), radius)
        return torch.cat((self.direct.double()[:, None], series[:, : length - 1]), dim=1)

    def multiply_adds(self) -> int:
        """Multiply-adds of one step: two per channel and state number, one for the direct tap."""
        channels, order = self.numerator.shape
        return channels * (2 * order + 1)

    def order(self) -> int:
        """Real state numbers per channel."""
        return self.numerator.shape[1]

    def largest_pole(self) -> float:
        """Largest modulus of a pole of any channel."""
        return float(pole_radius(self.denominator.detach()).max())

    def channels_of(self, part: slice) -> CompanionParams:
        """The recurrence of some channels alone, a denominator for each."""
        return CompanionParams(self.direct[part], self.numerator[part], _per_channel(self)[part])

    def to_dtype(self, dtype: torch.dtype) -> CompanionParams:
        """The same recurrence stored at ``dtype``, never below float32."""
        return CompanionParams(*(part.to(working_dtype(dtype)) for part in self))


def rational_series(numerator: Tensor, a: Tensor, length: int, radius: float = 1.0) -> Tensor:
    """The first ``length`` coefficients of (c[1] + c[2] z + ..) / (1 + a[1] z + .. + a[n] z^n), in float64.

    Of small systems by powers of the state matrix. Of large ones by FFT, on a circle so small that what
    wraps round has faded: with ``_WRAP`` times as many points as coefficients and a damping that leaves
    eps^(1 / _WRAP) at the last of them, both what wraps round and what undoing the damping adds are
    float64 rounding, wherever the poles are up to ``radius``.

    Args:
        numerator: (G, m), m <= n.
        a: (G, n).
        length: at least 1.
        radius: largest modulus of a pole, or more.

    Returns:
        (G, ``length``); not finite where it grows out of range.
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
    """c A^i b in the companion form: rows c A^r for r < m, columns A^(q m) b, and all their products."""
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
    """Largest root modulus of z^n + a[1] z^(n-1) + .. + a[n], (G, n) -> (G,), by bisection.

    O(n^2) each, where eigenvalues take O(n^3): all roots of the polynomial in r z lie inside the unit
    circle as soon as r is larger than the radius (Schur and Cohn).
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
    """Whether all roots lie inside the unit circle, (G, n) -> (G,): every reflection coefficient does."""
    inside = torch.ones(len(a), dtype=torch.bool, device=a.device)
    while a.shape[1]:
        reflection, rest = a[:, -1:], a[:, :-1]
        inside = inside & (reflection.abs() < 1).squeeze(1)
        # Of those that failed nothing more is asked; NaN is no smaller than 1 either.
        reflection = torch.where(inside[:, None], reflection, 0.0)
        a = (rest - reflection * rest.flip(1)) / (1 - reflection.square())
    return inside


def _per_channel(params: CompanionParams) -> Tensor:
    return _repeat(params.denominator, len(params.numerator))


def _repeat(rows: Tensor, channels: int) -> Tensor:
    """(G, ...) -> (E, ...), E / G channels in a row sharing one."""
    return rows if len(rows) == channels else rows.repeat_interleave(channels // len(rows), dim=0)


def _delayed(coefficients: Tensor) -> Tensor:
    """Coefficients of lags 1 .. n as taps from lag 0 on."""
    return torch.nn.functional.pad(coefficients, (1, 0))
