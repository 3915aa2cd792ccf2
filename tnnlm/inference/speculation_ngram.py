"""Proposals from the text itself: the tokens that followed an earlier occurrence of the last few tokens.

It is known as prompt lookup. An index of all n-grams of 2 to 4 tokens is updated in constant time per token.
The lookup runs for every token, also where nothing is proposed, so that the probability that a proposal is
correct is estimated without the cost of a pass.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

_SIZES = (4, 3, 2)
"""Numbers of tokens that are looked up, in this order."""
_LONGEST = 1 << 18
"""Number of latest tokens that are indexed at least; older ones are forgotten."""
_CLASSES = (3, 4, 6, 10, 18)
"""Lengths of agreement that begin another class of proposals; each has a separate estimate."""
_PRIOR = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
"""Probability that the proposed token is right before any was observed, by class."""
_WEIGHT = 4.0
"""Number of observations that the prior counts as."""
_KEPT = 0.95
"""Weight of an observation relative to the next one of its class."""


class NgramProposer:
    """Proposer for one sequence, which follows the latest earlier occurrence of its last tokens."""

    def __init__(self, history: Iterable[int]) -> None:
        """Index the tokens of the sequence so far."""
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}
        self._cursor: int | None = None
        self._agreed = 0
        self._hits = [_WEIGHT * prior for prior in _PRIOR]
        self._seen = [_WEIGHT] * len(_PRIOR)
        self.extend(history)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens of the sequence, and compare them with those that were to be expected."""
        for token in tokens:
            self._append(token)
        if len(self._tokens) >= 2 * _LONGEST:
            self._forget()

    def probabilities(self, most: int) -> list[float]:
        """Return the probability that each of up to ``most`` proposals is correct, if those before it are."""
        if self._cursor is None:
            return []
        return [self._probability(self._agreed + ahead) for ahead in range(most)]

    def propose(self, count: int) -> list[int]:
        """Return ``count`` tokens that may follow the sequence, of which there are probabilities."""
        assert self._cursor is not None
        proposed: list[int] = []
        for place in range(self._cursor, self._cursor + count):
            # Where the text repeats itself, the end of the earlier occurrence is what is proposed here.
            beyond = place - len(self._tokens)
            proposed.append(self._tokens[place] if beyond < 0 else proposed[beyond])
        return proposed

    def distributions(self) -> None:
        """Return None: proposals are not random."""
        return

    def _append(self, token: int) -> None:
        if self._cursor is not None:
            hit = self._tokens[self._cursor] == token
            self._learn(self._agreed, hit)
            self._cursor, self._agreed = (self._cursor + 1, self._agreed + 1) if hit else (None, 0)
        self._tokens.append(token)
        keys = self._last_ngrams()
        if self._cursor is None:
            for key in keys:
                if (place := self._places.get(key)) is not None:
                    self._cursor, self._agreed = place, len(key)
                    break
        for key in keys:
            self._places[key] = len(self._tokens)

    def _last_ngrams(self) -> list[tuple[int, ...]]:
        last = tuple(self._tokens[-_SIZES[0] :])
        return [last[-size:] for size in _SIZES if size <= len(last)]

    def _probability(self, agreed: int) -> float:
        index = _class(agreed)
        return self._hits[index] / self._seen[index]

    def _learn(self, agreed: int, hit: bool) -> None:
        index = _class(agreed)
        self._hits[index] = _KEPT * self._hits[index] + hit
        self._seen[index] = _KEPT * self._seen[index] + 1

    def _forget(self) -> None:
        """Index the latest tokens alone, which takes constant time per token on average."""
        dropped = len(self._tokens) - _LONGEST
        if self._cursor is not None:
            self._cursor = self._cursor - dropped if self._cursor >= dropped else None
        kept, self._tokens, self._places = self._tokens[dropped:], [], {}
        for token in kept:
            self._tokens.append(token)
            for key in self._last_ngrams():
                self._places[key] = len(self._tokens)


def _class(agreed: int) -> int:
    """Return the class of a proposal that follows an agreement of this many tokens."""
    return bisect_right(_CLASSES, agreed)
