"""Checks of the bounds and choices of settings, whether from a file, an override, an option or a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any

from tnnlm.config.values import kinds_of
from tnnlm.errors import ConfigError


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield name, value and metadata of every field; fields of nested groups are called ``group.name``."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, item.metadata


def check_settings(settings: Any, shown: Callable[[str, Any], str] = "{}={}".format) -> None:
    """Raise an error if a value is outside the bounds or choices of its field.

    Args:
        settings: Dataclass whose fields are created with :mod:`tnnlm.fields`.
        shown: Formats the name and value of a field for the error message.

    Raises:
        ConfigError: If a value is invalid; the error reports the first one.
    """
    for name, value, metadata in leaves(settings):
        check_value(shown(name, value), value, metadata)


def check_value(shown: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Raise an error if a value is outside the bounds or choices given by the metadata of its field.

    Raises:
        ConfigError: If the value is invalid; the message begins with ``shown``.
    """
    options, word = metadata.get("options"), metadata.get("word")
    if options and value not in options:
        raise ConfigError(f"{shown}: expected one of {', '.join(options)}")
    low, high, above = (metadata.get(name) for name in ("low", "high", "above"))
    if value is None or value == word or low is high is above is None:
        return
    if isinstance(value, str):
        raise ConfigError(f"{shown}: expected a number or {word or 'auto'}")
    if value != value:
        raise ConfigError(f"{shown}: not a number")
    if low is not None and value < low:
        raise ConfigError(f"{shown}: must be at least {_number(low)}")
    if above is not None and value <= above:
        raise ConfigError(f"{shown}: must be above {_number(above)}")
    if high is not None and value > high:
        raise ConfigError(f"{shown}: must be at most {_number(high)}")


def check_not_empty(key: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> None:
    """Raise an error if a text is empty where that would mean a default.

    Raises:
        ConfigError: If the value of the setting ``key`` is empty, and its type ``hint`` is not that of a text
            that may be.
    """
    empty = value == "" or (isinstance(value, list) and "" in value)
    if empty and not metadata.get("empty"):
        instead = "write null for the default" if NoneType in kinds_of(hint) else ""
        raise ConfigError(f"{key}: is empty", instead)


def _number(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
