"""Choice of the number of tokens per pass in speculative decoding, from probabilities and measured times.

A pass over k tokens costs c(k) times as much as a single step, and yields 1 + p1 + p1 p2 + ... tokens on
average if each proposed token is right with probability p given that those before it are. The width with the
most tokens per time is taken, which is 1 where proposals are seldom right.
"""

from __future__ import annotations

from collections.abc import Sequence

WIDTHS = (1, 2, 3, 4, 6, 8)
"""Numbers of tokens per pass that are considered."""
PASS_WIDTHS = (2, 4, 8)
"""Numbers of tokens per pass for which packages are compiled."""
_PER_TOKEN = 0.12
"""Assumed cost of each further token of a pass, in single steps, before passes have been timed."""
_RATE = 0.2
"""Weight of the latest measurement in a mean of times."""
_OUTLIER = 2.0
"""A measurement changes a mean as if it were at most this many times as large, or as small."""


def pass_name(width: int, dtype: str) -> str:
    """Return the name of the package of passes over ``width`` tokens with weights of ``dtype``."""
    return f"pass{width}-{dtype}"


class PassCosts:
    """Costs of passes over several tokens, in single steps: assumed first, then measured."""

    def __init__(self, widths: Sequence[int] = WIDTHS, *, measured: bool = True) -> None:
        """Take the widths that the model offers, of which 1 is one.

        Args:
            widths: Numbers of tokens per pass.
            measured: Whether times that are observed replace the assumed costs. Otherwise the widths of
                passes depend on the text alone.
        """
        self.widths = tuple(widths)
        self._measured = measured
        self._costs = {width: 1 + _PER_TOKEN * (width - 1) for width in self.widths}
        self._step = 0.0
        self._ran: set[int] = set()
        self.per_proposal = 0.0
        """Cost of proposing a token, in single steps."""

    def cost(self, width: int) -> float:
        """Return the cost of a pass over ``width`` tokens, in single steps."""
        return self._costs[width]

    def observe(self, width: int, seconds: float) -> None:
        """Take the duration of a pass over ``width`` tokens into account, unless it is the first one.

        The first pass of a width takes longer, because its code and buffers are new.
        """
        if not self._measured or width not in self._ran:
            self._ran.add(width)
            return
        if width == 1:
            self._step = _mean(self._step, seconds) if self._step else seconds
        elif self._step and width in self._costs:
            self._costs[width] = _mean(self._costs[width], seconds / self._step)

    def observe_proposals(self, count: int, seconds: float) -> None:
        """Take the duration of proposing ``count`` tokens into account."""
        if self._measured and self._step and count:
            self.per_proposal = _mean(self.per_proposal, seconds / count / self._step)

    def best_width(self, rows: Sequence[Sequence[float]]) -> int:
        """Return the width with the most tokens per time.

        Args:
            rows: Probability that each proposed token of each row is correct, given that those before it are.
        """
        longest = max(map(len, rows))
        best, best_rate = 1, float(len(rows))
        expected = [1.0] * len(rows)
        products = [1.0] * len(rows)
        done = 0
        for width in self.widths[1:]:
            if width > longest + 1:
                break
            for row, probabilities in enumerate(rows):
                for probability in probabilities[done : width - 1]:
                    products[row] *= probability
                    expected[row] += products[row]
            done = width - 1
            rate = sum(expected) / (self._costs[width] + self.per_proposal * (width - 1))
            if rate > best_rate:
                best, best_rate = width, rate
        return best


def _mean(mean: float, value: float) -> float:
    """Return a running mean with another value, limited so that a disturbed one has little effect."""
    return mean + _RATE * (min(max(value, mean / _OUTLIER), mean * _OUTLIER) - mean)
