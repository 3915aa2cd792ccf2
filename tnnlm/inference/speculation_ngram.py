"""Proposals from the text itself: the tokens that followed an earlier occurrence of the last few tokens.

It is known as prompt lookup. An index of all n-grams of 2 to 4 tokens is updated in constant time per token.
The lookup runs also where nothing is proposed, so that the probability that a proposal is correct is
estimated without the cost of a pass. Where no proposal has been worth a pass for a while, the proposer rests:
tokens are collected, and indexed together after a pause that doubles each time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import count as places_from

_SIZES = (4, 3, 2)
"""Numbers of tokens that are looked up, in this order."""
_LONGEST = 1 << 18
"""Number of latest tokens that are indexed at least; older ones are forgotten."""
_CLASSES = (3, 4, 6, 10, 18)
"""Lengths of agreement that begin another class of proposals; each has a separate estimate."""
_CLASS_OF = tuple(bisect_right(_CLASSES, agreed) for agreed in range(_CLASSES[-1] + 1))
"""Class of a proposal by the length of the agreement that it follows; the last one is for longer ones."""
_PRIOR = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
"""Probability that the proposed token is right before any was observed, by class."""
_WEIGHT = 4.0
"""Number of observations that the prior counts as."""
_KEPT = 0.95
"""Weight of an observation relative to the next one of its class."""
_PATIENCE = 32
"""Number of tokens without a proposal after which the proposer rests."""
_PAUSES = 32, 256
"""Shortest and longest rest, in tokens."""
_TRIAL = 32
"""Number of latest tokens that are compared with what would have been proposed, at the end of a rest."""
_WORTH = 0.125
"""Share of them that must have been right, or the proposer rests again."""


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
        self._idle = 0
        self._pause = _PAUSES[0]
        self._waiting: list[int] | None = None
        """Tokens that have not been indexed; None unless the proposer rests."""
        self._catch_up([*history])

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens of the sequence, and compare them with those that were to be expected."""
        if self._waiting is not None:
            self._waiting.extend(tokens)
            return
        for token in tokens:
            self._append(token)
        if len(self._tokens) >= 2 * _LONGEST:
            self._forget()

    def rest(self) -> int:
        """Return the number of next tokens for which nothing will be proposed, which may come together."""
        return 0 if self._waiting is None else max(self._pause - len(self._waiting), 0)

    def probabilities(self, most: int) -> list[float]:
        """Return the probability that each of up to ``most`` proposals is correct, if those before it are."""
        if self._waiting is not None and (len(self._waiting) < self._pause or not self._wakes()):
            return []
        self._idle += 1
        if self._idle > _PATIENCE:
            self._rest()
            return []
        if self._cursor is None:
            return []
        longest = len(_CLASS_OF) - 1
        return [
            self._hits[index] / self._seen[index]
            for index in (_CLASS_OF[min(self._agreed + ahead, longest)] for ahead in range(most))
        ]

    def propose(self, count: int) -> list[int]:
        """Return ``count`` tokens that may follow the sequence, of which there are probabilities."""
        assert self._cursor is not None
        self._idle, self._pause = 0, _PAUSES[0]
        proposed: list[int] = []
        for place in range(self._cursor, self._cursor + count):
            # Where the text repeats itself, the end of the earlier occurrence is what is proposed here.
            beyond = place - len(self._tokens)
            proposed.append(self._tokens[place] if beyond < 0 else proposed[beyond])
        return proposed

    def distributions(self) -> None:
        """Return None: proposals are not random."""
        return

    def _rest(self) -> None:
        self._waiting, self._pause = [], min(2 * self._pause, _PAUSES[1])

    def _wakes(self) -> bool:
        """Index the tokens of a rest, and rest again unless many of the last ones were to be expected."""
        waiting, self._waiting, self._idle = self._waiting or [], None, 0
        right = self._catch_up(waiting)
        if right < _WORTH * _TRIAL:
            self._rest()
        return self._waiting is None

    def _catch_up(self, tokens: list[int]) -> int:
        """Append many tokens, and return how many of the last ``_TRIAL`` were to be expected."""
        if len(tokens) > _TRIAL:
            self._index(tokens[:-_TRIAL])
            self._cursor, self._agreed = None, 0
        right = sum([self._append(token) for token in tokens[-_TRIAL:]])
        if len(self._tokens) >= 2 * _LONGEST:
            self._forget()
        return right

    def _append(self, token: int) -> bool:
        """Append a token, and return whether it was to be expected."""
        hit = False
        if self._cursor is not None:
            hit = self._tokens[self._cursor] == token
            self._learn(self._agreed, hit)
            self._cursor, self._agreed = (self._cursor + 1, self._agreed + 1) if hit else (None, 0)
        self._tokens.append(token)
        last = tuple(self._tokens[-_SIZES[0] :])
        keys = [last[-size:] for size in _SIZES if size <= len(last)]
        if self._cursor is None:
            for key in keys:
                if (place := self._places.get(key)) is not None:
                    self._cursor, self._agreed = place, len(key)
                    break
        for key in keys:
            self._places[key] = len(self._tokens)
        return hit

    def _index(self, tokens: Sequence[int]) -> None:
        """Append tokens without a comparison, at a fraction of the time per token."""
        start = len(self._tokens)
        self._tokens.extend(tokens)
        for size in _SIZES:
            first = max(start - size + 1, 0)
            recent = self._tokens[first:]
            keys = zip(*(recent[shift:] for shift in range(size)), strict=False)
            self._places.update(zip(keys, places_from(first + size), strict=False))

    def _learn(self, agreed: int, hit: bool) -> None:
        index = _CLASS_OF[min(agreed, len(_CLASS_OF) - 1)]
        self._hits[index] = _KEPT * self._hits[index] + hit
        self._seen[index] = _KEPT * self._seen[index] + 1

    def _forget(self) -> None:
        """Index the latest tokens alone, which takes constant time per token on average."""
        dropped = len(self._tokens) - _LONGEST
        if self._cursor is not None:
            self._cursor = self._cursor - dropped if self._cursor >= dropped else None
        kept, self._tokens, self._places = self._tokens[dropped:], [], {}
        self._index(kept)
