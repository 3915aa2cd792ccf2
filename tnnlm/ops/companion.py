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
from torch.nn.functional import pad

from tnnlm.ops.division import divide, pole_radius
from tnnlm.ops.double_double import Double, two_product, two_sum
from tnnlm.ops.toeplitz import toeplitz
from tnnlm.precision import working_dtype

EXACT_ORDER = 64
"""Largest order at which differences from given taps are exact; the time is proportional to the order."""


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

    @property
    def METHOD(self) -> str:
        """Conversion method that offers the recurrence if a kernel defines it: companion."""
        return "companion"

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
        """Process the tokens of x (B, L, E) in parallel: w by division, then y by an FFT convolution with c.

        Arguments and return values are those of :meth:`tnnlm.ops.ssm.SSMParams.prefill`. All of it runs in
        float64, because w may be much larger than inputs and outputs.
        """
        length, n = x.shape[1], self.order()
        u, past = x.double(), state.recent.double().flip(-1).permute(1, 0, 2)
        groups = len(self.denominator)
        w = divide(_grouped(u.permute(2, 0, 1), groups), self.denominator, _grouped(past, groups))
        w = w.unflatten(1, (x.shape[2] // groups, -1)).flatten(0, 1)
        history = torch.cat((past, w), dim=2).permute(1, 2, 0)
        y = self.direct * u + toeplitz(history, pad(self.numerator.double(), (1, 0)))[:, n:]
        if lengths is None:
            recent = history[:, length:]
        else:
            index = lengths.to(x.device)[:, None] + torch.arange(n, device=x.device)
            recent = history.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
        recent = recent.flip(1).transpose(1, 2).to(state.recent.dtype)
        return y.to(x.dtype), CompanionState(recent.contiguous())

    def taps(self, length: int) -> Tensor:
        """Return the effective taps, d and then the series of c / (1 + a), (E, ``length``), in float64.

        They are not finite from the lag on at which they overflow, if a pole is outside the unit circle.
        """
        series = rational_series(self.numerator, self.denominator, max(1, length - 1))
        return torch.cat((self.direct.double()[:, None], series[:, : length - 1]), dim=1)

    def difference(self, k: Tensor) -> Tensor:
        """Return taps k (E, L) less the effective taps, in float64.

        In float64 and up to an order of ``EXACT_ORDER``, what is divided by 1 + a is (1 + a) k - c, which is
        small, and not c, of which the rounding errors would be as large as the difference.
        """
        k = k.double()
        if self.numerator.dtype != torch.float64 or self.order() > EXACT_ORDER or k.shape[1] == 1:
            return k - self.taps(k.shape[1])
        c, a = self.numerator, _per_channel(self)
        # Products of larger numbers would overflow.
        largest = torch.maximum(k.abs().amax(), c.abs().amax())
        scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
        series = k[:, 1:] / scale
        length = series.shape[1]
        below = pad(c[:, :length] / scale, (0, max(0, length - c.shape[1])))
        rest = Double(*two_sum(series, -below))
        for lag in range(1, min(self.order() + 1, length)):
            earlier = pad(series[:, :-lag], (lag, 0))
            rest = rest.plus(Double(*two_product(a[:, lag - 1 : lag], earlier)))
        missed = divide((rest.high + rest.low).unsqueeze(1), a).squeeze(1) * scale
        return torch.cat(((k[:, 0] - self.direct)[:, None], missed), dim=1)

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


def rational_series(numerator: Tensor, a: Tensor, length: int) -> Tensor:
    """Expand (c[1] + c[2] z + ..) / (1 + a[1] z + .. + a[n] z^n) into a power series, in float64.

    Args:
        numerator: Coefficients c, (E, m).
        a: Coefficients a, (G, n); each row is shared by E / G consecutive rows of c.
        length: Number of coefficients to return, at least 1.

    Returns:
        First coefficients of the series, (E, ``length``).
    """
    above = pad(numerator[:, :length], (0, max(0, length - numerator.shape[1])))
    return divide(above.unflatten(0, (len(a), -1)), a).flatten(0, 1)


def _per_channel(params: CompanionParams) -> Tensor:
    """Return the denominators as (E, n), each repeated for E / G consecutive channels."""
    rows, channels = params.denominator, len(params.numerator)
    return rows if len(rows) == channels else rows.repeat_interleave(channels // len(rows), dim=0)


def _grouped(rows: Tensor, groups: int) -> Tensor:
    """Return (E, B, L) as (G, E / G * B, L), by denominator."""
    return rows.unflatten(0, (groups, -1)).flatten(1, 2)
