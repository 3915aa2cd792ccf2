"""Instructions and their answers: every combination of an operation, a function name and argument names.

A tenth of the combinations is held out: no training pair has that operation with that name and those
arguments, in any wording.
"""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Callable, Iterator
from itertools import permutations, product
from typing import Any, NamedTuple

NUMBERS = ((7, 3), (2, 5), (-4, 6))
"""Arguments of operations on two numbers."""
LISTS = (([3, 1, 2],), ([5],), ([-1, 8, -1, 4],))
"""Arguments of operations on a list."""
SINGLE = ((6,), (-5,), (0,))
"""Arguments of operations on a number."""


class Operation(NamedTuple):
    """Operation in words and in Python, with ``{0}`` and ``{1}`` for the names of its arguments."""

    words: str
    code: str
    function: Callable[..., Any]
    """Function that an answer has to equal."""
    inputs: tuple[tuple[Any, ...], ...]
    """Arguments of the calls by which an answer is checked."""

    @property
    def arity(self) -> int:
        """Number of arguments."""
        return len(self.inputs[0])


OPERATIONS = (
    Operation("{0} plus {1}", "{0} + {1}", operator.add, NUMBERS),
    Operation("{0} minus {1}", "{0} - {1}", operator.sub, NUMBERS),
    Operation("{0} times {1}", "{0} * {1}", operator.mul, NUMBERS),
    Operation("{0} divided by {1}", "{0} / {1}", operator.truediv, NUMBERS),
    Operation("{0} modulo {1}", "{0} % {1}", operator.mod, NUMBERS),
    Operation("the larger of {0} and {1}", "max({0}, {1})", max, NUMBERS),
    Operation("the smaller of {0} and {1}", "min({0}, {1})", min, NUMBERS),
    Operation("whether {0} equals {1}", "{0} == {1}", operator.eq, NUMBERS),
    Operation("whether {0} is less than {1}", "{0} < {1}", operator.lt, NUMBERS),
    Operation("the square of {0}", "{0} * {0}", lambda x: x * x, SINGLE),
    Operation("the double of {0}", "2 * {0}", lambda x: 2 * x, SINGLE),
    Operation("the absolute value of {0}", "abs({0})", abs, SINGLE),
    Operation("the negative of {0}", "-{0}", operator.neg, SINGLE),
    Operation("the length of {0}", "len({0})", len, LISTS),
    Operation("the sum of {0}", "sum({0})", sum, LISTS),
    Operation("the first item of {0}", "{0}[0]", operator.itemgetter(0), LISTS),
    Operation("the last item of {0}", "{0}[-1]", operator.itemgetter(-1), LISTS),
    Operation("the items of {0} in order", "sorted({0})", sorted, LISTS),
    Operation("the largest item of {0}", "max({0})", max, LISTS),
    Operation("the smallest item of {0}", "min({0})", min, LISTS),
)
NAMES = (
    *("add", "apply", "build", "check", "combine", "compare", "compute", "convert", "evaluate", "find"),
    *("handle", "measure", "merge", "process", "reduce", "result", "select", "solve", "update", "value"),
)
ARGUMENTS = tuple("abcdmnpqstvwxyz")
WORDINGS = (
    "Write a function {name} that returns {words}.",
    "Define a function {name} that returns {words}.",
    "Write a Python function called {name} which returns {words}.",
)


class Task(NamedTuple):
    """Instruction with the combination that it is made of."""

    operation: Operation
    name: str
    arguments: tuple[str, ...]
    wording: str

    @property
    def instruction(self) -> str:
        """Instruction in words."""
        words = self.operation.words.format(*self.arguments)
        return self.wording.format(name=self.name, words=words)

    @property
    def answer(self) -> str:
        """Function that solves it."""
        code = self.operation.code.format(*self.arguments)
        return f"def {self.name}({', '.join(self.arguments)}):\n    return {code}"

    @property
    def held_out(self) -> bool:
        """Whether the combination, in any wording, is not in the training pairs."""
        key = f"{self.operation.code} {self.name} {self.arguments}"
        return hashlib.sha256(key.encode()).digest()[0] % 10 == 0


def tasks(held_out: bool, seed: int) -> Iterator[Task]:
    """Yield tasks in random order, equally many of each operation as long as there are any."""
    random_ = random.Random(seed)
    left = [_tasks_of(operation, held_out, random_) for operation in OPERATIONS]
    while left:
        random_.shuffle(left)
        left = [some for some in left if some]
        yield from (some.pop() for some in left)


def _tasks_of(operation: Operation, held_out: bool, random_: random.Random) -> list[Task]:
    names = permutations(ARGUMENTS, operation.arity)
    every = [Task(operation, *chosen) for chosen in product(NAMES, names, WORDINGS)]
    found = [task for task in every if task.held_out == held_out]
    random_.shuffle(found)
    return found


def pair(task: Task) -> dict[str, list[dict[str, str]]]:
    """Return a training row with the columns ``prompt`` and ``completion``, as lists of messages."""
    return {
        "prompt": [{"role": "user", "content": task.instruction}],
        "completion": [{"role": "assistant", "content": task.answer}],
    }
