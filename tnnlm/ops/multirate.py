"""Exact recurrence of multi-scale kernels such as SGConv (arXiv 2210.09298): parameters, state, and steps.

From lag P = d r on, the kernel consists of scales with d knots each, in which it is linear between knots that
are r, 2 r, 4 r, ... lags apart. The P latest inputs are multiplied by their taps. What earlier inputs
contribute at lags from P on is computed for the outputs of T = P / 2 tokens at a time, by
:mod:`tnnlm.ops.hats`. It depends on inputs T tokens before them at the latest, so that each of these T tokens
computes it for some channels. All sums are finite sums of stored inputs, and no sum is carried from token to
token, so rounding errors don't grow. Dimensions: B batch, L length, E channels, P latest inputs, S scales.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tnnlm.ops.hats import Scales, far_cost, far_outputs
from tnnlm.ops.ssm_blocks import convolve
from tnnlm.ops.turns import MultirateState, as_pages, rows_from
from tnnlm.precision import working_dtype

MAX_LENGTH = 1 << 24
"""Largest length of a kernel in lags."""
_BALANCE = 8
"""P is about the square root of this times the length. A step takes P multiplications, and about this many
additions for each lag of the kernel are distributed over P tokens."""
_CACHE_LINE = 16
"""Number of float32 channels of a cache line, which a CPU reads at once."""
_LEAST_INPUTS = 1 << 15
"""Work on fewer inputs at a time, over lags and channels, takes no less time on a CPU."""


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
        turn = self._turn()
        new = self.near.new_zeros
        return MultirateState(
            new(batch_size, latest, channels),
            tuple(new(batch_size, turn, channels) for _ in range(self._pages())),
            new(batch_size, turn, channels),
            new(batch_size, turn, channels),
            new(batch_size, 3),
        )

    def step(
        self, x: Tensor, state: MultirateState, active: Tensor | None = None
    ) -> tuple[Tensor, MultirateState]:
        """Process one token x (B, E) and return output and next state.

        Rows where ``active`` (B,) is False keep their state.
        """
        y, after = self.step_within_turn(x, state, active)
        return y, self.work_ahead(after)

    def step_within_turn(
        self, x: Tensor, state: MultirateState, active: Tensor | None = None
    ) -> tuple[Tensor, MultirateState]:
        """Process one token as :meth:`step` does, without branches.

        :meth:`work_ahead` must be applied to the state before the next token.
        """
        u = x.to(state.recent.dtype)
        recent = torch.cat((u.unsqueeze(1), state.recent[:, :-1]), dim=1)
        y = (recent * self.near).sum(1)
        clock = state.clock
        if self._turn():
            y = y + rows_from(state.ahead, clock[:, 0].long(), 1).squeeze(1)
            clock = torch.cat((clock[:, :1] + 1, clock[:, 1:]), dim=1)
        if active is not None:
            recent = torch.where(active[:, None, None], recent, state.recent)
            clock = torch.where(active[:, None], clock, state.clock)
        return y.to(x.dtype), state._replace(recent=recent, clock=clock)

    def tokens_to_next_turn(self, state: MultirateState) -> int:
        """Return the smallest number of tokens of a row to the end of its turn, at least 1."""
        turn = self._turn()
        return turn - int(state.clock[:, 0].amax()) if turn else sys.maxsize

    def work_ahead(self, state: MultirateState) -> MultirateState:
        """Return the state after the work for the next turn that is due; the turn begins if the other ended.

        It reads three numbers per row from the device of the state.
        """
        turn, channels = self._turn(), self.near.shape[1]
        if not turn:
            return state
        # On a GPU the work takes little time and many launches, so that it is done at the end of the turn.
        share = self._share() if state.clock.device.type == "cpu" else 0
        due: dict[tuple[int, int, int], list[int]] = {}
        ended: dict[int, list[int]] = {}
        for row, (done, ready, oldest) in enumerate(state.clock.long().tolist()):
            end = channels if done == turn else min(channels, share * done)
            if ready < end:
                due.setdefault((ready, end, oldest), []).append(row)
            if done == turn:
                ended.setdefault(oldest, []).append(row)
        if due:
            state = self._extend(state, due)
        return state.next_turn(ended) if ended else state

    def _extend(self, state: MultirateState, due: dict[tuple[int, int, int], list[int]]) -> MultirateState:
        """Compute ``coming`` for the rows by first channel, end of the channels, and oldest page."""
        coming, clock, turn = state.coming.clone(), state.clock.clone(), self._turn()
        for (first, end, oldest), rows in due.items():
            part = slice(first, end)
            pages = (*state.pages[oldest:], *state.pages[:oldest])
            chosen = slice(None) if len(rows) == len(clock) else rows
            past = torch.cat([page[chosen, :, part] for page in pages], dim=1)
            coming[chosen, :, part] = far_outputs(self.channels_of(part)._scales(), past, turn, turn)
            clock[chosen, 1] = end
        return state._replace(coming=coming, clock=clock)

    def prefill(
        self, x: Tensor, state: MultirateState, lengths: Tensor | None = None
    ) -> tuple[Tensor, MultirateState]:
        """Process the tokens of x (B, L, E) in parallel by an FFT convolution.

        Arguments and return values are those of :meth:`tnnlm.ops.ssm.SSMParams.prefill`.
        """
        u = x.to(state.recent.dtype)
        latest, turn = len(self.near), self._turn()
        done = state.clock[:, 0].long()
        # The inputs before x: the last P, preceded by those of earlier turns that are older.
        past = state.in_order() if turn else u[:, :0]
        stored = past.shape[1]
        inputs = torch.cat((rows_from(past, done, max(stored - latest, 0)), state.recent.flip(1), u), dim=1)
        before = inputs.shape[1] - u.shape[1]
        y = convolve(inputs, self.taps(self.length()).to(u.dtype))[:, before:].to(x.dtype)
        counts = torch.full_like(done, u.shape[1]) if lengths is None else lengths.to(done)
        recent = rows_from(inputs, before + counts - latest, latest).flip(1)
        if not turn:
            return y, state._replace(recent=recent)
        done, ready, oldest = (done + counts) % turn, *state.clock[:, 1:].long().unbind(1)
        begun = (state.clock[:, 0].long() + counts) // turn
        new = (begun > 0)[:, None, None]
        pages, ahead = state.pages, state.ahead
        if bool(new.any()):
            past = torch.where(new, rows_from(inputs, (counts - done).clamp(min=0), stored), past)
            oldest = (oldest + begun) % len(pages)
            pages = as_pages(past, oldest, turn)
            ahead = torch.where(
                new, far_outputs(self._scales(), past[:, stored + 1 - self.length() :], turn), ahead
            )
        coming = torch.where(new, 0, state.coming)
        clock = torch.stack((done, torch.where(begun > 0, 0, ready), oldest), dim=1).to(u.dtype)
        return y, self.work_ahead(MultirateState(recent, pages, ahead, coming, clock))

    def taps(self, length: int) -> Tensor:
        """Return the effective taps, which are zero from the length of the kernel on, in float64.

        They have shape (E, ``length``).
        """
        scales = self._scales()
        shape = scales.shape
        k = self.near.new_zeros(scales.length, self.near.shape[1], dtype=torch.float64)
        k[: len(self.near)] = self.near
        counts = [count for _, _, count in shape.scales]
        for (lag, stretch, count), values in zip(shape.scales, scales.knots.split(counts), strict=True):
            falls = count < shape.per_scale
            if falls:  # to a value of zero at the next knot
                values = nn.functional.pad(values, (0, 0, 0, 1))
            width = len(values) * stretch - (stretch // 2 if falls else 0)
            line = nn.functional.interpolate(
                values.double().T[None], size=len(values) * stretch, mode="linear"
            )[0].T[:width]
            k[lag : lag + width] += line[: scales.length - lag]
        k[shape.tail_lag :] += self.tail
        return nn.functional.pad(k[:length].T, (0, max(0, length - scales.length)))

    def difference(self, k: Tensor) -> Tensor:
        """Return taps k (E, L) less the effective taps, in float64."""
        return k.double() - self.taps(k.shape[1])

    def multiply_adds(self) -> int:
        """Return the multiply-adds of one step, the mean over the tokens of a turn."""
        latest, channels = self.near.shape
        turn = self._turn()
        return channels * (latest + (-(-far_cost(self._scales(), turn) // turn) if turn else 0))

    def order(self) -> int:
        """Return the state size in real numbers per channel."""
        return len(self.near) + (self._pages() + 2) * self._turn()

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

    def _turn(self) -> int:
        """Return the number of tokens of a turn, T; 0 if the kernel reaches the latest inputs only."""
        return len(self.near) // 2 if self._has_far() else 0

    def _share(self) -> int:
        """Return the number of channels that each token of a turn does the work ahead for on a CPU."""
        turn = self._turn()
        fewest = max(-(-self.near.shape[1] // turn), _LEAST_INPUTS // (self._pages() * turn))
        return -(-fewest // _CACHE_LINE) * _CACHE_LINE

    def _pages(self) -> int:
        turn = self._turn()
        return -(-(self.length() - 1) // turn) if turn else 0


class MultirateWithinTurn(MultirateParams):
    """Recurrence whose steps do no work ahead, for programs without branches."""

    __slots__ = ()
    READ = ("recent", "ahead", "clock")
    """Fields of the state that a step reads."""
    CHANGED = ("recent", "clock")
    """Fields of the state that a step changes."""

    def step(
        self, x: Tensor, state: MultirateState, active: Tensor | None = None
    ) -> tuple[Tensor, MultirateState]:
        """Process one token; see :meth:`MultirateParams.step_within_turn`."""
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
