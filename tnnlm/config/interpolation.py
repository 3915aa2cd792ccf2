r"""Interpolation of settings: ``${key}`` is the value of another setting, ``${oc.env:NAME}`` a variable.

Only values that the user typed or that are in a file given with ``--config`` are interpolated. Settings that
come with a run, a checkpoint or a model are refused if they contain one: they are stored after interpolation,
with ``\${`` for the text ``${``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

from tnnlm.config.components import is_component, read_components
from tnnlm.config.layers import Schema
from tnnlm.config.mixture import read_groups
from tnnlm.config.values import Node, Origin, is_list, item_type, one_line, read_value, shown
from tnnlm.errors import ConfigError

_ENV = "oc.env:"
_REFERENCE = re.compile(r"\\\$\{|\$\{([^{}]*)\}")
_INTERPOLATION = re.compile(r"(?<!\\)\$\{")


class StoredInterpolation(ConfigError):
    """Interpolation in a file that came with a run, a checkpoint or a model."""


def interpolated(text: str, lookup: Callable[[str], str | None]) -> str:
    r"""Return a text with its interpolations replaced.

    An interpolation that doesn't resolve is text, and so is ``\${``, which loses its backslash.

    Args:
        text: Text as typed.
        lookup: Function that returns the value of a setting as text; None if there is no such setting.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return "${"
        value = _variable(name[len(_ENV) :]) if name.startswith(_ENV) else lookup(name)
        return match[0] if value is None else value

    return _REFERENCE.sub(replaced, text)


def _variable(arguments: str) -> str | None:
    """Return the variable of ``NAME`` or ``NAME,default``, or None if it isn't set and there is no default.

    The default is the text as typed: OmegaConf's own syntax would make ``1e3`` to ``1000.0``.
    """
    from omegaconf.resolvers import oc  # not needed to decode

    name, comma, default = arguments.partition(",")
    try:
        return str(oc.env(_literal(name), *[_literal(default)] * bool(comma)))
    except (KeyError, ValueError):  # not set, or no name of a variable
        return None


def _literal(text: str) -> str:
    """Return an argument without blanks and quotes around it, and with commas for escaped ones."""
    text = text.strip()
    if len(text) > 1 and text[0] in "'\"" and text[0] == text[-1]:
        return text[1:-1]
    return text.replace(r"\,", ",")


def escaped(text: str) -> str:
    r"""Return a text in which every ``${`` is escaped, so that :func:`interpolated` returns it unchanged."""
    return text.replace("${", r"\${")


def stored_text(text: str, key: str, place: str) -> str:
    r"""Return the text of a setting that came with a run, a checkpoint or a model: ``\${`` is ``${``.

    Args:
        text: Text as stored.
        key: Key of the setting.
        place: File that it is in, with the line where known.

    Raises:
        StoredInterpolation: If it contains an interpolation.
    """
    if _INTERPOLATION.search(text):
        raise StoredInterpolation(
            f"{key}={one_line(text)}: is an interpolation in a file that came with a model ({place})",
            r"use a file with the values themselves, and \${ for the text ${; "
            "only your own words and --config FILE are interpolated",
        )
    return text.replace(r"\${", "${")


class Values:
    """Values of settings, read by the types of a schema when they are first needed."""

    def __init__(self, schema: Schema, nodes: Mapping[str, Node]) -> None:
        """Read the settings of ``nodes``, by full key; other settings have the defaults of ``schema``."""
        self.schema = schema
        self.nodes = dict(nodes)
        self._read: dict[str, Any] = {}
        self._open: list[str] = []

    def __getitem__(self, key: str) -> Any:
        """Return the value of a setting.

        Raises:
            ConfigError: If the value has another type than the field, or interpolations form a circle.
        """
        if key not in self.nodes:
            return self.schema.settings[key].default
        if key in self._open:
            raise ConfigError(f"{key}={shown(self.nodes[key])}: refers to itself ({self.nodes[key].place})")
        if key not in self._read:
            self._open.append(key)
            try:
                self._read[key] = self.read(key, self.nodes[key])
            finally:
                self._open.pop()
        return self._read[key]

    def read(self, key: str, node: Node) -> Any:
        """Return the value of a node for a setting.

        Raises:
            ConfigError: If the value has another type than the field; the message contains key and place.
        """
        setting = self.schema.settings[key]

        def resolve(text: str) -> str:
            if node.origin in (Origin.STORED, Origin.RUN):
                return stored_text(text, key, node.place)
            return interpolated(text, self._text)

        try:
            if is_dataclass(item_type(setting.hint)):
                return read_groups(node, setting.hint, key, resolve)
            if is_component(setting.hint):
                return read_components(node, setting.hint, resolve)
            return read_value(node, setting.hint, setting.metadata.get("word"), resolve)
        except ConfigError:  # of a setting that an interpolation refers to
            raise
        except ValueError as error:
            raise ConfigError(f"{key}={shown(node)}: {error} ({node.place})") from None

    def set(self, key: str, node: Node) -> None:
        """Set a setting that follows from others."""
        self.nodes[key] = node
        self._read.pop(key, None)

    def given(self, key: str) -> str | None:
        """Return the place where a user gave a setting, for the end of an error message.

        None if it has its default, or was read from a saved run or a checkpoint.
        """
        node = self.nodes.get(key)
        return f" ({node.place})" if node and node.origin in (Origin.FILE, Origin.WORD) else None

    def _text(self, key: str) -> str | None:
        setting = self.schema.settings.get(key)
        value = None if setting is None or is_list(setting.hint) else self[key]
        if isinstance(value, bool):
            return str(value).lower()
        return str(value) if isinstance(value, str | int | float) else None
