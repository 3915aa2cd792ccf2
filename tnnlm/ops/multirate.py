"""Exact recurrence of multi-scale kernels such as SGConv (arXiv 2210.09298): parameters, state, and steps.

From lag P = d r on, the kernel consists of scales with d knots each, in which it is linear between knots that
are r, 2 r, 4 r, ... lags apart. The P latest inputs are multiplied by their taps. What earlier inputs
contribute at lags from P on is computed for P outputs at a time, by :mod:`tnnlm.ops.hats`, once every P
tokens. All sums are finite sums of stored inputs, and no sum is carried from token to token, so rounding
errors don't grow. Dimensions: B batch, L length, E channels, P latest inputs, N stored inputs, S scales.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tnnlm.ops.hats import Scales, far_cost, far_outputs
from tnnlm.ops.ssm_blocks import convolve
from tnnlm.precision import working_dtype

MAX_LENGTH = 1 << 24
"""Largest length of a kernel in lags."""
_BALANCE = 8
"""P is about the square root of this times the length. A step takes P multiplications, and about this many
additions for each lag of the kernel are distributed over P tokens."""


class MultirateState(NamedTuple):
    """Decoding state of one convolution, which has a fixed size and is never modified in place.

    The tokens of a sequence are divided into turns of P tokens.
    """

    recent: Tensor
    """Last P inputs, newest first, (B, P, E)."""
    past: Tensor
    """Inputs before the current turn, oldest first, (B, N, E)."""
    ahead: Tensor
    """Contributions of ``past`` at lags from P on to the outputs of the current turn, (B, P, E)."""
    turn: Tensor
    """Number of processed tokens of the current turn, from 0 to P - 1, (B,). It has the dtype of the other
    tensors, which represents it exactly, so that all tensors of a state have one dtype."""


class MultirateParams(NamedTuple):
    """Parameters of a finite kernel that is piecewise linear with knots at dyadic distances from lag P on."""

    near: Tensor
    """Taps of lags 0 .. P - 1, (P, E)."""
    knots: Tensor
    """Values at the knots of the scales from lag P on, (S, d, E). Scale k begins at lag P 2^k and has knots
    2^k P / d apart; S may be 0."""
    cut: Tensor
    """Values at the first knots of a last scale that ends early, (K, E); K may be 0."""
    tail: Tensor
    """Taps that follow, added to the line that falls from the last value of ``cut`` to zero, (Q, E)."""

    @property
    def METHOD(self) -> str:
        """Conversion method that offers the recurrence if a kernel defines it: multirate."""
        return "multirate"

    def check(self) -> None:
        """Check that the shapes describe a kernel, as those of a damaged file may not.

        Raises:
            ValueError: If they don't.
        """
        shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in self._asdict().items())
        if [part.dim() for part in self] != [2, 3, 2, 2] or len({part.shape[-1] for part in self}) != 1:
            raise ValueError(f"shapes {shapes}: expected (P, E), (S, d, E), (K, E) and (Q, E)")
        latest, (scales, d, _) = len(self.near), self.knots.shape
        cells, rest = divmod(latest, max(1, d))
        dyadic = cells >= 2 and cells.bit_count() == 1 and rest == 0 and d >= 1
        short = latest << scales <= MAX_LENGTH and len(self.tail) <= latest << scales
        if not latest or (self._has_far() and not (dyadic and short and len(self.cut) <= d)):
            raise ValueError(f"shapes {shapes}: are not those of a multi-scale kernel")

    def init_state(self, batch_size: int) -> MultirateState:
        """Return the state before the first token: zeros, in the taps' dtype and on their device."""
        latest, channels = self.near.shape
        stored = self.length() - 1 if self._has_far() else 0
        new = self.near.new_zeros
        return MultirateState(
            new(batch_size, latest, channels),
            new(batch_size, stored, channels),
            new(batch_size, latest if stored else 0, channels),
            new(batch_size),
        )

    def step(
        self, x: Tensor, state: MultirateState, active: Tensor | None = None
    ) -> tuple[Tensor, MultirateState]:
        """Process one token x (B, E) and return output and next state.

        Rows where ``active`` (B,) is False keep their state.
        """
        y, after = self.step_within_turn(x, state, active)
        if not self._has_far():
            return y, after
        past, ahead = self._begin_turn(after.turn < state.turn, after)
        return y, after._replace(past=past, ahead=ahead)

    def step_within_turn(
        self, x: Tensor, state: MultirateState, active: Tensor | None = None
    ) -> tuple[Tensor, MultirateState]:
        """Process one token as :meth:`step` does, without a change of ``past`` and ``ahead``.

        The result equals that of :meth:`step` for all rows except those that :meth:`ends_turn` says end their
        turn.
        """
        u = x.to(state.recent.dtype)
        recent = torch.cat((u.unsqueeze(1), state.recent[:, :-1]), dim=1)
        y = (recent * self.near).sum(1)
        if self._has_far():
            y = y + _rows(state.ahead, state.turn.long(), 1).squeeze(1)
        turn = (state.turn + 1) % len(self.near)
        if active is not None:
            recent = torch.where(active[:, None, None], recent, state.recent)
            turn = torch.where(active, turn, state.turn)
        return y.to(x.dtype), state._replace(recent=recent, turn=turn)

    def ends_turn(self, state: MultirateState) -> bool:
        """Return whether the next token ends the turn of any row; it reads ``turn`` from the device."""
        return self._has_far() and bool((state.turn == len(self.near) - 1).any())

    def prefill(
        self, x: Tensor, state: MultirateState, lengths: Tensor | None = None
    ) -> tuple[Tensor, MultirateState]:
        """Process the tokens of x (B, L, E) in parallel by an FFT convolution.

        Arguments and return values are those of :meth:`tnnlm.ops.ssm.SSMParams.prefill`.
        """
        u = x.to(state.recent.dtype)
        latest, stored = len(self.near), state.past.shape[1]
        # The inputs before x: the last P, preceded by those of ``past`` that are older.
        done = state.turn.long()
        older = _rows(state.past, done, max(stored - latest, 0))
        inputs = torch.cat((older, state.recent.flip(1), u), dim=1)
        before = inputs.shape[1] - u.shape[1]
        y = convolve(inputs, self.taps(self.length()).to(u.dtype))[:, before:]
        counts = torch.full_like(done, u.shape[1]) if lengths is None else lengths.to(done)
        turn = (done + counts) % latest
        recent = _rows(inputs, before + counts - latest, latest).flip(1)
        past, ahead = state.past, state.ahead
        if stored:
            begun = done + counts >= latest
            moved = _rows(inputs, (counts - turn).clamp(min=0), stored)
            past = torch.where(begun[:, None, None], moved, past)
            ahead = torch.where(begun[:, None, None], far_outputs(self._scales(), past), ahead)
        return y.to(x.dtype), MultirateState(recent, past, ahead, turn.to(u.dtype))

    def taps(self, length: int) -> Tensor:
        """Return the effective taps, which are zero from the length of the kernel on, in float64.

        They have shape (E, ``length``).
        """
        scales = self._scales()
        k = self.near.new_zeros(scales.length, self.near.shape[1], dtype=torch.float64)
        k[: len(self.near)] = self.near
        for lag, stretch, values in zip(scales.lags, scales.stretches, scales.knots, strict=True):
            falls = len(values) < scales.per_scale
            if falls:  # to a value of zero at the next knot
                values = nn.functional.pad(values, (0, 0, 0, 1))
            width = len(values) * stretch - (stretch // 2 if falls else 0)
            line = nn.functional.interpolate(
                values.double().T[None], size=len(values) * stretch, mode="linear"
            )[0].T[:width]
            k[lag : lag + width] += line[: scales.length - lag]
        k[scales.tail_lag :] += self.tail
        return nn.functional.pad(k[:length].T, (0, max(0, length - scales.length)))

    def difference(self, k: Tensor) -> Tensor:
        """Return taps k (E, L) less the effective taps, in float64."""
        return k.double() - self.taps(k.shape[1])

    def multiply_adds(self) -> int:
        """Return the multiply-adds of one step, the mean over the tokens of a turn."""
        latest, channels = self.near.shape
        far = far_cost(self._scales(), latest) if self._has_far() else 0
        return channels * (latest + -(-far // latest))

    def order(self) -> int:
        """Return the state size in real numbers per channel."""
        return sum(part.shape[1] for part in self.init_state(1)[:3])

    def length(self) -> int:
        """Return the length of the kernel in lags; later taps are zero."""
        return self._scales().length

    def largest_pole(self) -> float:
        """Return 0: the kernel is finite."""
        return 0.0

    def channels_of(self, part: slice) -> MultirateParams:
        """Return the recurrence restricted to a slice of the channels."""
        return MultirateParams(*(tensor[..., part] for tensor in self))

    def to_dtype(self, dtype: torch.dtype) -> MultirateParams:
        """Return the recurrence with its tensors cast to ``dtype``, at least float32."""
        return MultirateParams(*(part.to(working_dtype(dtype)) for part in self))

    def _has_far(self) -> bool:
        return bool(len(self.knots) + len(self.cut) + len(self.tail))

    def _scales(self) -> Scales:
        return Scales.of(self.knots, self.cut, self.tail, len(self.near))

    def _begin_turn(self, ended: Tensor, state: MultirateState) -> tuple[Tensor, Tensor]:
        """Return ``past`` and ``ahead`` for the next turn in the rows where ``ended`` (B,) is True."""
        recent, past, ahead, _ = state
        rows = ended.nonzero().squeeze(1)
        if not len(rows):
            return past, ahead
        if len(rows) < len(ended):
            recent, past = recent[rows], past[rows]
        past = torch.cat((past, recent.flip(1)), dim=1)[:, -past.shape[1] :]
        ahead = far_outputs(self._scales(), past)
        if len(rows) < len(ended):
            return state.past.index_copy(0, rows, past), state.ahead.index_copy(0, rows, ahead)
        return past, ahead


class MultirateWithinTurn(MultirateParams):
    """Recurrence whose steps don't begin a turn, for programs without branches."""

    __slots__ = ()
    CHANGED = ("recent", "turn")
    """Fields of the state that a step changes."""

    def step(
        self, x: Tensor, state: MultirateState, active: Tensor | None = None
    ) -> tuple[Tensor, MultirateState]:
        """Process one token that doesn't end a turn; see :meth:`MultirateParams.step_within_turn`."""
        return self.step_within_turn(x, state, active)


def multirate(knots: Tensor, near: Tensor, length: int) -> MultirateParams:
    """Return the recurrence of a kernel of interpolated sub-kernels, as that of SGConv.

    Sub-kernel i has d values, which are interpolated linearly to 2^max(0, i - 1) times that length.

    Args:
        knots: Values (S, d, E) of all sub-kernels, with all factors.
        near: First taps (E, T), for the lags that are taken from here: all if T is ``length`` at least.
        length: Length of the kernel in lags, at most that of all sub-kernels.
    """
    d = knots.shape[1]
    latest = 2 * d
    while latest * latest < _BALANCE * length:
        latest *= 2
    latest = min(latest, length)
    first = max(latest // d, 1).bit_length()
    complete = [values for i, values in enumerate(knots) if i >= first and d << i <= length]
    rest = knots[first + len(complete) :] if latest < length else knots[:0]
    cut, tail = knots.new_zeros(0, knots.shape[2]), knots.new_zeros(0, knots.shape[2])
    begin = latest << len(complete)
    if len(rest) and begin < length:
        stretch = begin // d
        # A knot is taken if the line that falls from it to zero at the next knot ends within the kernel.
        count = max(0, (length - begin - stretch // 2) // stretch)
        cut = rest[0, :count]
        line = nn.functional.interpolate(rest[0].T[None], size=begin, mode="linear")[0].T[: length - begin]
        after = stretch // 2 + (count - 1) * stretch if count else 0
        tail = line[after:].clone()
        if count:
            fall = 1 - (torch.arange(stretch).to(line) + 0.5) / stretch
            tail[:stretch] -= fall[:, None] * cut[-1]
    far = torch.stack(complete) if complete else knots[:0]
    return MultirateParams(near[:, :latest].T.contiguous(), far, cut.contiguous(), tail)


def _rows(x: Tensor, first: Tensor, count: int) -> Tensor:
    """Return ``count`` consecutive rows of x (B, L, E) from row ``first`` (B,) on, (B, count, E)."""
    index = first[:, None] + torch.arange(count, device=x.device)
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
