"""Selection of the rows of validation text that perplexities are measured on, by tokens or by time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SECONDS = 30.0
"""Time that all perplexities of a conversion take together, in seconds."""
FEWEST_ROWS = 16
"""Number of rows that are measured at each length even if they take longer."""
LONGEST_SECONDS = 1800.0
"""Time in seconds beyond which there are fewer rows than ``FEWEST_ROWS``."""


def spread(rows: int, available: int) -> Tensor:
    """Return the indices (``rows``,) of evenly spaced rows: the first documents alone are not typical."""
    return torch.linspace(0, available - 1, rows).round().long()


def rows_of_tokens(tokens: int, available: dict[int, int]) -> dict[int, Tensor]:
    """Return the rows that contain a number of tokens at each length, at least one row.

    Args:
        tokens: Number of tokens.
        available: Number of rows of the validation split by length.
    """
    return {length: spread(min(rows, max(1, tokens // length)), rows) for length, rows in available.items()}


def rows_in_time(
    available: dict[int, int], seconds_per_row: Callable[[int], float]
) -> tuple[dict[int, Tensor], dict[str, str]]:
    """Return the rows whose measurement takes about ``SECONDS``, and the lengths that take far too long.

    The time that a length leaves is used for the next one. At least ``FEWEST_ROWS`` rows of each length are
    measured, or as many as there are or as take ``LONGEST_SECONDS``.

    Args:
        available: Number of rows of the validation split by length, the shortest length first.
        seconds_per_row: Function that measures how long all variants take for a row of a length.

    Returns:
        Rows by length, and the reason for each length at which a single row would take too long.
    """
    chosen: dict[int, Tensor] = {}
    omitted: dict[str, str] = {}
    used = per_token = 0.0
    for position, (length, rows) in enumerate(available.items()):
        shares = [max(total - used, 0) / (len(available) - position) for total in (SECONDS, LONGEST_SECONDS)]
        seconds = per_token * length
        if _affordable(seconds, shares, rows):  # otherwise measuring the time would take too long as well
            seconds = seconds_per_row(length)
            per_token = seconds / length
        if found := _affordable(seconds, shares, rows):
            chosen[length] = spread(found, rows)
            used += found * seconds
        else:
            omitted[f"context of {length:,} tokens"] = (
                f"a row takes {math.ceil(seconds / 60):,} minutes; --perplexity-tokens {length} measures one"
            )
    return chosen, omitted


def _affordable(seconds: float, shares: list[float], available: int) -> int:
    """Return the number of rows to measure if each takes so long.

    Args:
        seconds: Time per row.
        shares: Shares of ``SECONDS`` and of ``LONGEST_SECONDS`` that these rows may take.
        available: Number of rows of the validation split.
    """
    if not seconds:
        return available
    fit, most = (int(min(share / seconds, available)) for share in shares)
    return max(fit, min(FEWEST_ROWS, most))
