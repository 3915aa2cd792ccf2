"""Dataclass fields of settings with bounds or choices, which :mod:`tnnlm.config.checks` validates."""

from __future__ import annotations

from dataclasses import field
from typing import Any


class Component(dict[str, Any]):
    """Class by its ``class_path``, with the ``init_args`` of its constructor if there are any."""


_UNCHANGED: Any = object()
LARGEST = 10**12
"""Default upper bound of integers: 64 bits hold it times the bound of ``trainer.accumulate``."""


def number(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    word: str | None = None,
    before: Any = _UNCHANGED,
) -> Any:
    """Return a field with bounds: ``low`` <= value <= ``high`` and value > ``above``.

    None and ``word`` are valid as well. Without ``high``, a field whose default is not a float is an integer
    of at most ``LARGEST``. ``before`` is the value for runs and checkpoints that were saved before the
    setting existed, if it differs from ``default``.
    """
    if high is None and not isinstance(default, float):
        high = LARGEST
    metadata = {"low": low, "high": high, "above": above, "word": word}
    if before is not _UNCHANGED:
        metadata["before"] = before
    return field(default=default, metadata=metadata)


def text(default: str | None, *, empty: bool = False) -> Any:
    """Return a field of text, which may be empty if ``empty`` is true; fields without metadata may not."""
    return field(default=default, metadata={"empty": empty})


def choice(default: str, *options: str) -> Any:
    """Return a field whose value is one of ``options``."""
    return field(default=default, metadata={"options": options})
