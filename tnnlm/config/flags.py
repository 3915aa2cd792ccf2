"""Command-line options generated from the fields of a settings dataclass: type, choices, default and help."""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
import types
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar, get_type_hints

from tnnlm.config.checks import check_settings
from tnnlm.config.values import check_text, kinds_of, one_line, read_float, read_int

_T = TypeVar("_T")
_METAVARS = {int: "N", float: "X"}


def add_flags(
    parser: argparse._ActionsContainer,
    schema: type,
    names: Mapping[str, str],
    defaults: Mapping[str, Any] = {},
) -> None:
    """Add an option to a parser for each of the given fields of a dataclass.

    Args:
        parser: Parser or argument group that the options are added to.
        schema: Dataclass whose fields are numbers, strings, or a number or a keyword such as ``auto``.
        names: Field names mapped to option names without leading dashes, in the order of ``--help``.
        defaults: Defaults of the script where they differ from the defaults of the schema.

    Raises:
        TypeError: If a field has another type.
    """
    hints, documented = get_type_hints(schema), field_docs(schema)
    by_name = {item.name: item for item in fields(schema)}
    for name, flag in names.items():
        metadata = by_name[name].metadata
        default = defaults.get(name, by_name[name].default)
        read, metavar = _reader(hints[name], metadata.get("word"), f"{schema.__name__}.{name}")
        options = metadata.get("options")
        parser.add_argument(
            f"--{flag}",
            dest=name,
            type=read,
            choices=options,
            default=default,
            metavar=None if options else metavar,
            help=_help(documented.get(name, ""), default),
        )


def settings_from_flags(schema: Callable[..., _T], names: Mapping[str, str], args: argparse.Namespace) -> _T:
    """Return the settings given by the options that :func:`add_flags` added.

    Raises:
        ConfigError: If a value is out of bounds; the message begins with the option.
    """
    settings = schema(**{name: getattr(args, name) for name in names})
    check_settings(settings, lambda name, value: f"--{names.get(name, name)} {one_line(value)}")
    return settings


@cache
def field_docs(schema: type) -> Mapping[str, str]:
    """Return the docstring of each field of a class and its base classes, each on one line.

    Classes whose source code is not available contribute no docstrings.
    """
    found: dict[str, str] = {}
    for part in reversed(schema.__mro__[:-1]):
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        except (OSError, TypeError):
            continue
        assert isinstance(body, ast.ClassDef)
        for item, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                doc = _string(text)
                found |= {item.target.id: " ".join(doc.split())} if doc else {}
    return types.MappingProxyType(found)


def _string(node: ast.stmt) -> str:
    value = node.value if isinstance(node, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def _reader(hint: Any, word: str | None, where: str) -> tuple[Callable[[str], Any], str]:
    """Return the parser of an option's value, and its metavar in the help."""
    kinds = tuple(kind for kind in kinds_of(hint) if kind is not type(None))
    if kinds == (str,):
        return _checked(check_text), "TEXT"
    numbers = [kind for kind in kinds if kind in _METAVARS]
    if len(numbers) != 1 or set(kinds) - {*numbers, str}:
        raise TypeError(f"{where}: can't be an option, its type is {hint}")
    (kind,) = numbers
    read = read_int if kind is int else read_float
    if str not in kinds:
        return _checked(read), _METAVARS[kind]
    return _number_or(read, word), f"{_METAVARS[kind]}|{word}"


def _checked(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def checked(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{one_line(text)}: {error}") from None

    return checked


def _number_or(read: Callable[[str], Any], word: str | None) -> Callable[[str], Any]:
    def checked(text: str) -> Any:
        try:
            return text if text == word else read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {word} or a number: {text!r}") from None

    return checked


def _help(text: str, default: Any) -> str:
    # "null" means something in YAML files only, and argparse formats help with the % operator.
    text = text.replace("null:", "default:").replace("%", "%%")
    return text if default is None else f"{text} (default: {default})"
