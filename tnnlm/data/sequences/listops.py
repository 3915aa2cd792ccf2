"""ListOps (arXiv 1804.06028) with the distribution of the Long Range Arena (arXiv 2011.04006).

An expression is a digit, or one of the operators [MIN, [MAX, [MED and [SM (sum modulo 10) followed by two or
more expressions and "]". The published files also contain parentheses, which carry no information and are
dropped. Trees are sampled level by level in large vectorised batches: 100,000 expressions of up to 2,000
symbols take a minute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tnnlm.config.sequences import ListOpsConfig
from tnnlm.errors import DataError

SYMBOLS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
"""Symbols by number; digits have their value as number."""
MIN, MAX, MED, SM, END = range(10, 15)
OPERATOR_SHARE = 0.25
"""Probability that a node above the maximum depth is an operator."""
FOREST = 1 << 14
"""Number of trees sampled per batch."""
PATIENCE = 200
"""Number of consecutive batches without a new expression before generation fails."""
_NUMBERS = {symbol: number for number, symbol in enumerate(SYMBOLS)}

Ints = NDArray[np.int64]
Symbols = NDArray[np.uint8]


class Expression(NamedTuple):
    """ListOps expression with its value."""

    symbols: Symbols
    """Indices into ``SYMBOLS``, (L,)."""
    value: int
    """Value of the expression, 0 to 9."""


def generate(config: ListOpsConfig, seed: int) -> Iterator[Expression]:
    """Yield distinct expressions without end, deterministically for given settings and seed.

    Expressions shorter or longer than the bounds are discarded, not truncated, as in the Long Range Arena
    (whose bounds of 500 and 2,000 symbols are exclusive).

    Args:
        config: Bounds of length, depth and number of arguments.
        seed: Seed of the random trees.

    Raises:
        DataError: If ``PATIENCE`` batches in a row contain no new expression within the bounds.
    """
    rng = np.random.default_rng(seed)
    seen: set[bytes] = set()
    in_vain = 0
    while in_vain < PATIENCE:
        found = len(seen)
        for expression in _expressions(_sample_trees(config, rng)):
            key = hashlib.blake2b(expression.symbols.tobytes(), digest_size=12).digest()
            if key not in seen:
                seen.add(key)
                yield expression
        in_vain = in_vain + 1 if len(seen) == found else 0
    raise DataError(
        f"data.listops: only {len(seen):,} different expressions of {config.min_length} to "
        f"{config.max_length} symbols were found, and {PATIENCE * FOREST:,} more trees contained no other",
        "request fewer rows, raise data.listops.max_length, or lower data.listops.min_length",
    )


def encode(text: str) -> Symbols:
    """Encode an expression as indices into ``SYMBOLS``; parentheses are dropped.

    Raises:
        DataError: If the expression contains an unknown symbol.
    """
    words = text.replace("(", " ").replace(")", " ").split()
    try:
        return np.array([_NUMBERS[word] for word in words], dtype=np.uint8)
    except KeyError as error:
        raise DataError(
            f"{error.args[0]!r} is not a ListOps symbol, expected one of {' '.join(SYMBOLS)}"
        ) from None


class _Level(NamedTuple):
    """Nodes of all trees at one depth; nodes with the same parent are adjacent."""

    tree: Ints
    """Index of each node's tree."""
    parent: Ints
    """Index of each node's parent in the level above; unused for roots."""
    symbol: Ints
    """Digit or operator of each node, as index into ``SYMBOLS``."""


def _sample_trees(config: ListOpsConfig, rng: np.random.Generator) -> list[_Level]:
    """Sample ``FOREST`` trees and return the levels of those whose length is within the bounds."""
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
        # A tree that already exceeds the maximum length is discarded anyway.
        growing = np.flatnonzero(splits & (lengths[tree] <= config.max_length))
        parent = np.repeat(growing, rng.integers(2, config.max_args + 1, len(growing)))
        tree = tree[parent]
    return _select(levels, (lengths >= config.min_length) & (lengths <= config.max_length))


def _select(levels: list[_Level], kept: NDArray[np.bool_]) -> list[_Level]:
    """Return the levels of the trees where ``kept`` is true, with tree and parent indices renumbered."""
    number = np.cumsum(kept) - 1
    selected, above = [], np.zeros(len(kept), dtype=np.int64)
    for level in levels:
        stays = kept[level.tree]
        parent = above[level.parent[stays]]
        selected.append(_Level(number[level.tree[stays]], parent, level.symbol[stays]))
        above = np.cumsum(stays) - 1
    return selected


def _expressions(levels: list[_Level]) -> Iterator[Expression]:
    """Yield the expression of every tree.

    Values and lengths are computed from the leaves up, positions of the symbols from the roots down.
    """
    if not len(levels[0].tree):
        return
    lengths, values = _evaluate(levels)
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


def _evaluate(levels: list[_Level]) -> tuple[list[Ints], Ints]:
    """Return the length of every node's expression, by level, and the value of every root."""
    lengths: list[Ints] = []
    values = below = np.empty(0, dtype=np.int64)
    children = _Level(below, below, below)
    for level in reversed(levels):
        length, value = np.ones(len(level.symbol), dtype=np.int64), level.symbol.copy()
        operators = np.flatnonzero(level.symbol >= MIN)
        if len(operators):
            length[operators] = 2 + np.add.reduceat(lengths[-1], np.searchsorted(children.parent, operators))
            value[operators] = _apply(level.symbol[operators], children.parent, values)
        lengths.append(length)
        values, children = value, level
    return lengths[::-1], values


def _apply(symbols: Ints, parent: Ints, values: Ints) -> Ints:
    """Apply each operator to the values of its children, which are ordered by parent."""
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
