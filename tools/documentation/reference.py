"""Reference tables of settings, options of commands, and metrics, from the code that defines them."""

from __future__ import annotations

import argparse
import importlib
import re
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from tnnlm.cli import module_of
from tnnlm.config.flags import field_docs
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.config.shipped import find_config
from tnnlm.kernels import KERNEL_SCHEMAS
from tnnlm.training.loggers.names import METRICS, Place

STANDARD = "demo"
"""Name of the configuration that commands use without ``--config``."""


def settings_table(prefix: str = "") -> str:
    """Return the settings of a group as a table: name, type, default, description.

    The value of the configuration that commands use without ``--config`` follows where it differs.

    Args:
        prefix: A group such as ``optim`` or ``data.listops``, ``kernel.NAME`` for the settings of a kernel,
            or empty for the settings at the top.

    Raises:
        KeyError: If there is no such group.
    """
    if prefix.startswith("kernel."):
        schema: Any = KERNEL_SCHEMAS[prefix.removeprefix("kernel.")]
        shown = "model.kernel."
    else:
        schema, shown = _schema_of(prefix), f"{prefix}." if prefix else ""
    hints, documented = get_type_hints(schema), field_docs(schema)
    used: Any = load_config(find_config(STANDARD))
    for part in filter(None, shown.split(".")):
        used = getattr(used, part)
    rows = [
        f"| `{shown}{item.name}` | {_type(hints[item.name], item)} | {_default(item, used)} "
        f"| {_cell(documented.get(item.name, ''))} |"
        for item in fields(schema)
        # A group has a separate table, and the name of a kernel is in the heading above the table.
        if not is_dataclass(_value(item)) and (schema is Config or item.name != "name")
    ]
    return "\n".join(("| setting | type | default | description |", "|---|---|---|---|", *rows))


def options_table(command: str) -> str:
    """Return the options of a command as a table: option, description.

    Args:
        command: A subcommand of ``tnnlm``, such as ``prepare-data``.
    """
    lines = ["| option | description |", "|---|---|"]
    for action in _actions(importlib.import_module(module_of(command)).arguments()):
        name = ", ".join(action.option_strings)
        value = action.metavar or ("" if action.nargs == 0 else "|".join(map(str, action.choices or ())))
        value = " ".join(value) if isinstance(value, tuple) else value
        called = f"{name} {value}".strip()
        lines.append(f"| `{_cell(called)}` | {_cell((action.help or '').replace('%%', '%'))} |")
    return "\n".join(lines)


def metrics_table() -> str:
    """Return the metrics of a run as a table: column, unit, tasks, description."""
    described = tomllib.loads(Path(__file__).with_name("metrics.toml").read_text(encoding="utf-8"))
    tasks = {Place.CAUSAL: "causal", Place.MASKED: "masked", Place.CLASSIFY: "classify"}
    lines = ["| column | unit | task | description |", "|---|---|---|---|"]
    for metric in METRICS:
        logged = [name for place, name in tasks.items() if metric.shown & place]
        if metric.shown & Place.SUMMARY:
            logged = ["classify, in summary.json"]
        column = f"{metric.column}/LAYER" if metric.shown & Place.LAYERS else metric.column
        about = described[metric.column]
        lines.append(f"| `{column}` | {metric.unit or '-'} | {', '.join(logged) or 'all'} | {about} |")
    return "\n".join(lines)


def _schema_of(prefix: str) -> type:
    schema: Any = Config
    for part in filter(None, prefix.split(".")):
        schema = type(_value({item.name: item for item in fields(schema)}[part]))
    assert isinstance(schema, type)
    return schema


def _value(item: Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _default(item: Field[Any], used: Any) -> str:
    """Return the default of a field, and its value in the group ``used`` if it is another one."""
    default = _literal(_value(item))
    value = _literal(getattr(used, item.name, _value(item)))  # the group may be that of another kernel
    return default if value == default else f"{default} ({STANDARD}: {value})"


def _literal(value: Any) -> str:
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value != "" else "empty"


def _type(hint: Any, item: Field[Any]) -> str:
    if options := item.metadata.get("options"):
        return " \\| ".join(f"`{option}`" for option in options)
    if get_origin(hint) is list:
        return "list of strings" if get_args(hint) == (str,) else "list of groups"
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    words = {int: "integer", float: "number", str: "string", bool: "boolean"}
    return " or ".join(words.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Options in the order of ``--help``, group by group."""
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.dest != "help" and action.help is not argparse.SUPPRESS:
                yield action


def _cell(text: str) -> str:
    """Text of a docstring or help as a cell of a Markdown table."""
    return re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`").replace("|", "\\|")
