"""Generated ListOps expressions: values, lengths and labels against independent evaluations."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.support.listops import decode, evaluate
from tnnlm.config.sequences import ListOpsConfig
from tnnlm.data.sequences.listops import END, MIN, SYMBOLS, Expression, encode, generate
from tnnlm.errors import DataError

SHORT = ListOpsConfig(min_length=4, max_length=60, max_depth=5, max_args=6)


def some(config: ListOpsConfig = SHORT, rows: int = 400, seed: int = 0) -> list[Expression]:
    return list(itertools.islice(generate(config, seed), rows))


def by_python(text: str) -> int:
    """Return the value of an expression, evaluated by the parser of Python."""
    names = {"[MIN": "smallest(", "[MAX": "largest(", "[MED": "median(", "[SM": "modulo(", "]": "),"}
    code = "".join(names.get(word, f"{word},") for word in text.split()).rstrip(",")
    functions: dict[str, Any] = {
        "smallest": lambda *v: min(v),
        "largest": lambda *v: max(v),
        "median": lambda *v: int(statistics.median(v)),
        "modulo": lambda *v: sum(v) % 10,
    }
    return eval(code, functions)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MED 1 2 4 9 ]", 3),
        ("[MED 1 2 5 9 ]", 3),
        ("[MED 8 1 5 ]", 5),
        ("[SM 9 9 9 ]", 7),
        ("( ( ( [SM 9 ) 9 ) ] )", 8),
    ],
)
def test_evaluate(text: str, value: int) -> None:
    assert evaluate(encode(text)) == value


@pytest.mark.parametrize("text", ["", "1 2", "[MIN 1 2", "[MIN ]", "1 ]", "[MIN 1 2 ] 3", "]"])
def test_evaluate_refuses_invalid_expressions(text: str) -> None:
    with pytest.raises(ValueError, match=r"expression|operator"):
        evaluate(encode(text))


def test_encode_reports_an_unknown_word() -> None:
    with pytest.raises(DataError, match=r"'\[AVG' is not a ListOps symbol"):
        encode("[AVG 1 2 ]")


def test_values_are_those_of_independent_evaluations() -> None:
    for symbols, value in some():
        text = decode(symbols)
        assert evaluate(symbols) == value == by_python(text), text
        assert encode(text).tolist() == symbols.tolist()


def test_lengths_depth_and_arguments_are_within_bounds() -> None:
    config = ListOpsConfig(min_length=10, max_length=40, max_depth=4, max_args=3)
    for symbols, _ in some(config):
        assert 10 <= len(symbols) <= 40
        depth, deepest, arguments = 1, 1, [0]
        for number in symbols.tolist():
            if number == END:
                assert 2 <= arguments.pop() <= 3
                depth -= 1
                continue
            arguments[-1] += 1
            deepest = max(deepest, depth)
            if number >= MIN:
                depth += 1
                arguments.append(0)
        assert depth == 1
        assert deepest <= 4


def test_long_expressions_match_the_arena() -> None:
    for symbols, value in some(ListOpsConfig(), rows=20):
        assert 500 < len(symbols) < 2000
        assert evaluate(symbols) == value


def test_same_seed_same_expressions() -> None:
    first, again, other = (some(seed=seed) for seed in (0, 0, 1))
    assert [decode(one.symbols) for one in first] == [decode(one.symbols) for one in again]
    assert [decode(one.symbols) for one in first] != [decode(one.symbols) for one in other]


def test_expressions_are_distinct() -> None:
    rows = some(ListOpsConfig(min_length=4, max_length=5, max_depth=2), rows=2000)
    assert len({one.symbols.tobytes() for one in rows}) == 2000


def test_too_many_rows_are_refused() -> None:
    # Only 400 different expressions [OP a b ] exist.
    with pytest.raises(DataError, match="400 different expressions of 4 to 4 symbols"):
        some(ListOpsConfig(min_length=4, max_length=4, max_depth=2), rows=401)


def recursive(rng: random.Random, depth: int, config: ListOpsConfig) -> list[str]:
    """Sample an expression recursively, as the Arena describes it."""
    if depth == config.max_depth or rng.random() > 0.25:
        return [str(rng.randrange(10))]
    parts = [rng.choice(SYMBOLS[MIN:END])]
    for _ in range(rng.randint(2, config.max_args)):
        parts += recursive(rng, depth + 1, config)
    return [*parts, "]"]


def test_distribution_matches_recursive_sampling() -> None:
    rng = random.Random(0)
    sampled: list[list[str]] = []
    while len(sampled) < 3000:
        words = recursive(rng, 1, SHORT)
        if SHORT.min_length <= len(words) <= SHORT.max_length:
            sampled.append(words)
    ours = some(rows=3000)
    lengths = [[len(words) for words in sampled], [len(one.symbols) for one in ours]]
    # The limits are six standard errors of a difference of means, here and below.
    assert abs(np.mean(lengths[0]) - np.mean(lengths[1])) < 6 * np.std(lengths[0]) * (2 / 3000) ** 0.5
    shares = [
        Counter(word for words in sampled for word in words),
        Counter(SYMBOLS[number] for one in ours for number in one.symbols.tolist()),
    ]
    for symbol in SYMBOLS:
        a, b = (share[symbol] / share.total() for share in shares)
        assert a == pytest.approx(b, rel=0.1)
    labels = [Counter(by_python(" ".join(words)) for words in sampled), Counter(one.value for one in ours)]
    for value in range(10):
        assert abs(labels[0][value] - labels[1][value]) < 6 * (2 * 300) ** 0.5
