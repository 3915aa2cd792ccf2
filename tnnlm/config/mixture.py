"""Sources of a mixture: the settings of one, and how a list of groups of settings is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

from tnnlm.config.checks import check_not_empty, check_value
from tnnlm.config.layers import parsed
from tnnlm.config.values import Node, Origin, item_type, list_items, one_line, read_value, shown
from tnnlm.errors import ConfigError

Resolve = Callable[[str], str]


def read_groups(node: Node, hint: Any, key: str, resolve: Resolve) -> list[Any]:
    """Return a list of groups of settings, each as the dataclass that is the item of the type ``hint``.

    On the command line, the list is written as YAML, ``[{files: a.txt, weight: 2}, {hub_name: b}]``.

    Raises:
        ConfigError: If a setting is unknown, has a wrong type, or is out of bounds.
        ValueError: If the node is not a list.
    """
    items = enumerate(list_items(parsed(node, key)), 1)
    return [_read_group(_as_group(item, key), item_type(hint), f"{key}[{i}]", resolve) for i, item in items]


def _as_group(item: Node, key: str) -> Node:
    """Return an item of a list that is a group of settings.

    Raises:
        ConfigError: If it is something else.
    """
    group = parsed(item, key)
    if not isinstance(group.value, dict):
        raise ConfigError(
            f"{key}={shown(group)}: expected a group of settings ({group.place})",
            f"write {key}=[{{files: ..., weight: ...}}, {{files: ..., weight: ...}}]",
        )
    return group


def _read_group(group: Node, schema: type, key: str, resolve: Resolve) -> Any:
    hints, known = get_type_hints(schema), {item.name: item for item in fields(schema)}
    found = {}
    for name, value in group.value.items():
        node = group.child(value)
        if name not in known:
            raise ConfigError(
                f"{key}.{one_line(name)}: unknown key ({node.place})", f"use {', '.join(known)}"
            )
        try:
            found[name] = read_value(node, hints[name], None, resolve)
        except ConfigError:  # of a setting that an interpolation refers to
            raise
        except ValueError as error:
            raise ConfigError(f"{key}.{name}={shown(node)}: {error} ({node.place})") from None
        try:
            check_value(f"{key}.{name}={shown(node)}", found[name], known[name].metadata)
            if node.origin is Origin.FILE:
                check_not_empty(f"{key}.{name}", found[name], hints[name], known[name].metadata)
        except ConfigError as error:
            raise ConfigError(f"{error.reason} ({node.place})", error.remedy) from None
    return schema(**found)
