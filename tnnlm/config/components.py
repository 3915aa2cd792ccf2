"""Settings that name a class and its arguments, in the words of Lightning CLI: ``class_path``, ``init_args``.

Code runs only if the user named it, on the command line or in a file given with ``--config``, or allowed it.
A class that a run or a checkpoint names is therefore read as a :class:`ForeignComponent`, which
:mod:`tnnlm.training.components` does not import.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from types import NoneType
from typing import Any, get_args

from tnnlm.config.values import (
    Node,
    Origin,
    check_text,
    is_list,
    kinds_of,
    list_items,
    read_bool,
    read_float,
    read_int,
)
from tnnlm.config.yaml_files import YamlProblem, read_yaml
from tnnlm.fields import Component

_FORM = (
    "expected a class path such as lightning.pytorch.callbacks.Timer, or {class_path: ..., init_args: {...}}"
)
_DEEPEST = 20
"""Largest nesting of arguments."""


class ForeignComponent(Component):
    """Component that a run or a checkpoint names, whose code nobody has allowed to run."""


def is_component(hint: Any) -> bool:
    """Return whether a field is a component, a list of components, or one of them or None."""
    return any(kind is Component or Component in get_args(kind) for kind in kinds_of(hint))


def opened(node: Node) -> Node:
    """Return a node whose value on the command line is parsed if it is a YAML list or mapping.

    Raises:
        ValueError: If it isn't valid YAML.
    """
    text = node.value
    if (
        node.origin is not Origin.WORD
        or node.quoted
        or not isinstance(text, str)
        or text[:1] not in ("[", "{")
    ):
        return node
    try:
        return read_yaml(text, Origin.FILE, lambda line: node.place)
    except YamlProblem as problem:
        raise ValueError(f"is not valid YAML: {problem}") from None


def read_components(node: Node, hint: Any, resolve: Callable[[str], str]) -> Any:
    """Return the components that a node names, as plain values.

    Args:
        node: Value as given: a class path, a mapping, or a list of them.
        hint: Type of the field.
        resolve: Function that replaces the interpolations of a text.

    Raises:
        ValueError: If it is something else.
    """
    node = opened(node)
    is_null = node.origin is Origin.WORD and not node.quoted and node.value == "null"
    if NoneType in kinds_of(hint) and (node.value is None or is_null):
        return None
    if is_list(hint):
        # One class needs no list.
        items = [node] if isinstance(node.value, dict) else list_items(node)
        return [_component(item, resolve) for item in items]
    return _component(node, resolve)


def _component(node: Node, resolve: Callable[[str], str]) -> Component:
    kind = ForeignComponent if node.origin in (Origin.RUN, Origin.STORED) else Component
    if isinstance(node.value, str):
        return kind(class_path=_path(node.value, resolve))
    if not isinstance(node.value, dict) or "class_path" not in node.value:
        raise ValueError(_FORM)
    if unknown := set(node.value) - {"class_path", "init_args"}:
        raise ValueError(f"{sorted(unknown)[0]} is neither class_path nor init_args")
    found = kind(class_path=_path(node.child(node.value["class_path"]).value, resolve))
    arguments = node.child(node.value.get("init_args", {}))
    if not isinstance(arguments.value, dict | NoneType):
        raise ValueError("init_args is not a mapping of arguments")
    if arguments.value:
        found["init_args"] = _plain(arguments, resolve, _DEEPEST)
    return found


def _path(value: Any, resolve: Callable[[str], str]) -> str:
    text = check_text(resolve(value)) if isinstance(value, str) else ""
    if not all(part.isidentifier() for part in text.split(".")):
        raise ValueError(_FORM)
    return text


def _plain(node: Node, resolve: Callable[[str], str], depth: int) -> Any:
    """Return the value of an argument, whose unquoted text is read as in YAML 1.2, since it has no field."""
    value = node.value
    if not depth:
        raise ValueError("init_args is nested too deeply")
    if isinstance(value, dict):
        return {
            check_text(str(key)): _plain(node.child(item), resolve, depth - 1) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_plain(node.child(item), resolve, depth - 1) for item in value]
    if not isinstance(value, str):
        return value
    text = check_text(resolve(value))
    return text if node.quoted else unquoted(text)


def unquoted(text: str) -> Any:
    """Return what YAML 1.2 reads an unquoted text as: a boolean, a number, or the text itself."""
    readers = (read_bool, read_int if re.fullmatch(r"[-+]?[0-9]+", text) else read_float)
    for read in readers if text == text.strip() and "_" not in text else ():
        with suppress(ValueError):
            return read(text)
    return text
