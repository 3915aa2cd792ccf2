"""Check of functions that a model wrote: by their syntax, then by calls in a separate process.

Only expressions of a short list of Python's constructs are run, so that an answer reaches neither files nor
modules nor attributes; the process has no builtins but those of the list, and a time limit.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

FUNCTIONS = ("abs", "len", "max", "min", "sorted", "sum")
"""Functions that an answer may call."""
MOST_NODES = 40
"""Largest number of nodes in the syntax tree of an answer."""
SECONDS = 60
"""Time for all calls together."""
_EXPRESSIONS = (
    ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.Subscript, ast.Name, ast.Constant, ast.Load,
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Mod, ast.USub, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt,
    ast.GtE,
)  # fmt: skip
_RUNNER = """
import builtins, json, sys
functions = {name: getattr(builtins, name) for name in %r}
for line in sys.stdin:
    source, name, inputs, expected = json.loads(line)
    try:
        space = {"__builtins__": functions}
        exec(source, space)
        right = all(space[name](*given) == result for given, result in zip(inputs, expected))
    except Exception:
        print("null", flush=True)
    else:
        print(json.dumps(bool(right)), flush=True)
"""


class Answer(NamedTuple):
    """Answer of a model, and what its function has to return."""

    source: str
    name: str
    inputs: Sequence[Sequence[Any]]
    """Arguments of each call."""
    expected: Sequence[Any]
    """Result of each call."""


def refused(source: str, name: str) -> str:
    """Return why an answer is not run; empty if it is one function that returns an allowed expression."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "is not Python"
    if sum(1 for _ in ast.walk(tree)) > MOST_NODES:
        return "is too long"
    match tree.body:
        case [
            ast.FunctionDef(
                name=found,
                args=ast.arguments(vararg=None, kwarg=None, kwonlyargs=[], defaults=[]),
                body=[ast.Return(value=ast.expr() as value)],
                decorator_list=[],
                returns=None,
            )
        ] if found == name:
            pass
        case _:
            return f"is not one function {name} that returns an expression"
    arguments = {argument.arg for argument in ast.walk(tree) if isinstance(argument, ast.arg)}
    for node in ast.walk(value):
        if not isinstance(node, _EXPRESSIONS):
            return f"contains {type(node).__name__}"
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS):
            return "calls another function"
        if isinstance(node, ast.Name) and node.id not in (*arguments, *FUNCTIONS):
            return f"uses {node.id}"
        if isinstance(node, ast.Constant) and not (isinstance(node.value, int) and abs(node.value) < 1000):
            return "contains a constant other than a small integer"
    return ""


def results(answers: Sequence[Answer]) -> list[bool | None]:
    """Return of each answer whether it returns what is expected; None if it is refused or fails.

    An answer that takes too long ends the process; it and those after it count as failed.
    """
    found: list[bool | None] = [None] * len(answers)
    runs = [index for index, answer in enumerate(answers) if not refused(answer.source, answer.name)]
    lines = "".join(json.dumps(answers[index]) + "\n" for index in runs)
    command = [sys.executable, "-I", "-c", _RUNNER % (FUNCTIONS,)]
    try:
        done = subprocess.run(
            command, input=lines, capture_output=True, encoding="utf-8", timeout=SECONDS, check=False
        )
        output = done.stdout
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else (error.stdout or "")
    for index, line in zip(runs, output.splitlines(), strict=False):
        found[index] = json.loads(line)
    return found
