"""Instruction pairs: held-out combinations, and answers that are only run if their syntax is harmless."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from instruction_pairs.running import Answer, refused, results
from instruction_pairs.tasks import OPERATIONS, Task, pair, tasks
from tests.support.conversations import TINY, write_rows
from tnnlm.config.loader import load_config
from tnnlm.data.conversations.examples import read_examples
from tnnlm.data.text import Tally


def answer(source: str, name: str = "f") -> Answer:
    return Answer(source, name, [[7, 3]], [10])


def expected_answer(task: Task) -> Answer:
    inputs = task.operation.inputs
    return Answer(task.answer, task.name, inputs, [task.operation.function(*given) for given in inputs])


def test_no_training_pair_has_a_held_out_combination() -> None:
    combinations = [
        {(task.operation.code, task.name, task.arguments) for task in tasks(held_out, 0)}
        for held_out in (False, True)
    ]
    assert not combinations[0] & combinations[1]
    assert 0.08 < len(combinations[1]) / len(combinations[0] | combinations[1]) < 0.12
    first = [task.operation for task in islice(tasks(True, 1), len(OPERATIONS))]
    assert {operation.code for operation in first} == {operation.code for operation in OPERATIONS}


def test_expected_answers_are_right_and_pairs_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = [*islice(tasks(True, 1), 60)]
    expected = [expected_answer(task) for task in chosen]
    assert results(expected) == [True] * 60
    path = write_rows([pair(task) for task in chosen], "pairs.jsonl")
    config = load_config(None, [*TINY, f"data.files={path}", "data.format=prompt_completion"])
    assert len([*read_examples(config.data, Tally())]) == 60


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(a, b):\n    return a + b", ""),
        ("def f(a, b):\n    return max(a, b)[-1]", ""),
        ("def f(a, b) return a", "is not Python"),
        ("def g(a, b):\n    return a", "is not one function f"),
        ("import os\ndef f(a, b):\n    return a", "is not one function f"),
        ("def f(a, b=open('x')):\n    return a", "is not one function f"),
        ("@print\ndef f(a, b):\n    return a", "is not one function f"),
        ("def f(a, b):\n    while True: pass", "is not one function f"),
        ("def f(a, b):\n    return open('x')", "calls another function"),
        ("def f(a, b):\n    return a.__class__", "contains Attribute"),
        ("def f(a, b):\n    return (lambda: 1)()", "calls another function"),
        ("def f(a, b):\n    return 9 ** 9", "contains Pow"),
        ("def f(a, b):\n    return 99999 * a", "contains a constant"),
        ("def f(a, b):\n    return 'x'", "contains a constant"),
        ("def f(a, b):\n    return c", "uses c"),
        ("def f(a, b):\n    return " + " + ".join("a" * 60), "is too long"),
    ],
)
def test_only_small_expressions_are_run(source: str, reason: str) -> None:
    assert refused(source, "f").startswith(reason)
    assert bool(refused(source, "f")) == bool(reason)


def test_wrong_failing_and_refused_answers_are_told_apart() -> None:
    found = results(
        [
            answer("def f(a, b):\n    return a + b"),
            answer("def f(a, b):\n    return a - b"),
            answer("def f(a, b):\n    return a / 0"),
            answer("import os"),
            answer("def f(b, a):\n    return a + b"),
        ]
    )
    assert found == [True, False, None, None, True]
