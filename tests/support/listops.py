"""Evaluation of ListOps expressions symbol by symbol, as a reference for the generator."""

from __future__ import annotations

from tnnlm.data.sequences.listops import END, MAX, MED, MIN, SM, SYMBOLS, Symbols


def decode(symbols: Symbols) -> str:
    """Return the expression as a string; the inverse of :func:`encode`."""
    return " ".join(SYMBOLS[number] for number in symbols)


def evaluate(symbols: Symbols) -> int:
    """Return the value of an expression, 0 to 9; medians of an even number of values are rounded down.

    Raises:
        ValueError: If the symbols are no expression.
    """
    stack: list[tuple[int, list[int]]] = [(END, [])]
    for number in symbols.tolist():
        if MIN <= number < END:
            stack.append((number, []))
            continue
        if number == END:
            operator, values = stack.pop()
            if not values or not stack:
                raise ValueError("an operator without arguments, or an end without an operator")
            number = _apply(operator, sorted(values))
        stack[-1][1].append(number)
    if len(stack) != 1 or len(stack[0][1]) != 1:
        raise ValueError("more than one expression, or one that doesn't end")
    return stack[0][1][0]


def _apply(operator: int, values: list[int]) -> int:
    middle = len(values) // 2
    if operator == MED:
        return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) // 2
    return {MIN: values[0], MAX: values[-1], SM: sum(values) % 10}[operator]
