"""ListOps (arXiv 1804.06028) with the distribution of the Long Range Arena (arXiv 2011.04006).

An expression is a value, or [MIN, [MAX, [MED or [SM (sum modulo 10) of two or more expressions and "]".
The Arena writes it with parentheses that carry no information and are not read. Expressions are drawn
breadth first and by the thousand, so that 100,000 of up to 2,000 symbols take a minute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tnnlm.config.schema import ListOpsConfig
from tnnlm.errors import DataError

SYMBOLS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
"""by number; digits stand for themselves"""
MIN, MAX, MED, SM, END = range(10, 15)
OPERATOR_SHARE = 0.25
"""of the nodes above the greatest depth"""
FOREST = 1 << 14
"""expressions drawn at a time"""
PATIENCE = 200
"""forests in a row without a new expression, after which there are no more"""
_NUMBERS = {symbol: number for number, symbol in enumerate(SYMBOLS)}

Ints = NDArray[np.int64]
Symbols = NDArray[np.uint8]


class Expression(NamedTuple):
    """An expression and its value."""

    symbols: Symbols
    """(L,), numbers of ``SYMBOLS``"""
    value: int


def generate(config: ListOpsConfig, seed: int) -> Iterator[Expression]:
    """Distinct expressions without end, the same ones for the same settings and seed.

    The lengths are those that the trees happen to have: none is cut, those out of bounds are dropped, as
    the Arena does (its bounds, 500 and 2,000, are exclusive there).

    Raises:
        DataError: if there are no more within the bounds, or too few to be found by chance.
    """
    rng = np.random.default_rng(seed)
    seen: set[bytes] = set()
    in_vain = 0
    while in_vain < PATIENCE:
        found = len(seen)
        for expression in _written(_grown(config, rng)):
            key = hashlib.blake2b(expression.symbols.tobytes(), digest_size=12).digest()
            if key not in seen:
                seen.add(key)
                yield expression
        in_vain = in_vain + 1 if len(seen) == found else 0
    raise DataError(
        f"ListOps: {len(seen):,} different expressions of {config.min_length} to {config.max_length} symbols "
        f"were found, and {PATIENCE * FOREST:,} more trees held no other",
        "ask for fewer rows, raise data.listops.max_length, or lower data.listops.min_length",
    )


def encode(text: str) -> Symbols:
    """Numbers of the symbols of an expression, parentheses left out.

    Raises:
        DataError: for a word that is no symbol.
    """
    words = text.replace("(", " ").replace(")", " ").split()
    try:
        return np.array([_NUMBERS[word] for word in words], dtype=np.uint8)
    except KeyError as error:
        raise DataError(f"{error.args[0]!r} is no symbol of ListOps: there is {' '.join(SYMBOLS)}") from None


class _Level(NamedTuple):
    """The nodes of all trees at one depth; those with the same parent stand together."""

    tree: Ints
    parent: Ints
    """index into the level above; of roots, meaningless"""
    symbol: Ints
    """a digit or an operator"""


def _grown(config: ListOpsConfig, rng: np.random.Generator) -> list[_Level]:
    """Levels of ``FOREST`` trees, without those whose length is out of bounds."""
    levels: list[_Level] = []
    tree, parent = np.arange(FOREST), np.zeros(FOREST, dtype=np.int64)
    lengths = np.zeros(FOREST, dtype=np.int64)
    for depth in range(1, config.max_depth + 1):
        splits = rng.random(len(tree)) < OPERATOR_SHARE
        if depth == config.max_depth:
            splits[:] = False
        symbol = np.where(splits, rng.integers(MIN, END, len(tree)), rng.integers(0, 10, len(tree)))
        levels.append(_Level(tree, parent, symbol))
        lengths += np.bincount(tree, weights=1 + splits, minlength=FOREST).astype(np.int64)
        # A tree that is too long already needs no further levels.
        growing = np.flatnonzero(splits & (lengths[tree] <= config.max_length))
        parent = np.repeat(growing, rng.integers(2, config.max_args + 1, len(growing)))
        tree = tree[parent]
    return _kept(levels, (lengths >= config.min_length) & (lengths <= config.max_length))


def _kept(levels: list[_Level], wanted: NDArray[np.bool_]) -> list[_Level]:
    """The levels of some trees alone, numbered anew."""
    number = np.cumsum(wanted) - 1
    kept, above = [], np.zeros(len(wanted), dtype=np.int64)
    for level in levels:
        stays = wanted[level.tree]
        parent = above[level.parent[stays]]
        kept.append(_Level(number[level.tree[stays]], parent, level.symbol[stays]))
        above = np.cumsum(stays) - 1
    return kept


def _written(levels: list[_Level]) -> Iterator[Expression]:
    """Every tree as an expression: values and lengths from the leaves up, places from the roots down."""
    if not len(levels[0].tree):
        return
    lengths, values = _worked_out(levels)
    text = np.empty(int(lengths[0].sum()), dtype=np.uint8)
    ends = np.cumsum(lengths[0])
    place = ends - lengths[0]
    for depth, level in enumerate(levels):
        if depth:
            before = np.cumsum(lengths[depth]) - lengths[depth]
            first = np.searchsorted(level.parent, level.parent)  # of the node's siblings
            place = place[level.parent] + 1 + before - before[first]
        text[place] = level.symbol
        operators = level.symbol >= MIN
        text[(place + lengths[depth] - 1)[operators]] = END
    for start, end, value in zip(ends - lengths[0], ends, values, strict=True):
        yield Expression(text[start:end].copy(), int(value))


def _worked_out(levels: list[_Level]) -> tuple[list[Ints], Ints]:
    """Length of every node's expression, by level, and the value of every root."""
    lengths: list[Ints] = []
    values = below = np.empty(0, dtype=np.int64)
    children = _Level(below, below, below)
    for level in reversed(levels):
        length, value = np.ones(len(level.symbol), dtype=np.int64), level.symbol.copy()
        operators = np.flatnonzero(level.symbol >= MIN)
        if len(operators):
            length[operators] = 2 + np.add.reduceat(lengths[-1], np.searchsorted(children.parent, operators))
            value[operators] = _applied(level.symbol[operators], children.parent, values)
        lengths.append(length)
        values, children = value, level
    return lengths[::-1], values


def _applied(symbols: Ints, parent: Ints, values: Ints) -> Ints:
    """Operators on their children's values; every operator has some, in its order."""
    starts = np.flatnonzero(np.diff(parent, prepend=-1))
    counts = np.diff(starts, append=len(parent))
    ordered = values[np.lexsort((values, parent))]
    middle = starts + counts // 2
    even = (counts + 1) % 2
    results = {
        MIN: ordered[starts],
        MAX: ordered[starts + counts - 1],
        MED: (ordered[middle - even] + ordered[middle]) // 2,
        SM: np.add.reduceat(values, starts) % 10,
    }
    return np.select([symbols == operator for operator in results], list(results.values()))
