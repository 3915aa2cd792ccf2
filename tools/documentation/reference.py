"""Reference tables of settings, options of commands, and metrics, from the code that defines them."""

from __future__ import annotations

import argparse
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tnnlm.cli import module_of
from tnnlm.config.catalogue import ITEM, Entry, entries_of
from tnnlm.config.layers import KERNEL, Schema
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.config.shipped import find_config
from tnnlm.config.values import item_type
from tnnlm.kernels import KERNEL_SCHEMAS, KernelConfig
from tnnlm.training.loggers.names import METRICS, Place

STANDARD = "demo"
"""Name of the configuration that commands use without ``--config``."""


def settings_table(prefix: str = "") -> str:
    """Return the settings of a group as a table: name, type, default, description.

    The value of the configuration that commands use without ``--config`` follows where it differs.

    Args:
        prefix: A group such as ``optim`` or ``data.listops``, a list of groups such as ``data.sources``,
            ``kernel.NAME`` for the settings of a kernel, or empty for the settings at the top.

    Raises:
        KeyError: If there is no such group.
    """
    kernel = prefix.removeprefix("kernel.") if prefix.startswith("kernel.") else None
    schema, shown = (KERNEL_SCHEMAS[kernel], f"{KERNEL}.") if kernel else _schema_of(prefix)
    used: Any = load_config(find_config(STANDARD))
    for part in filter(None, shown.replace("[]", "").split(".")):
        used = getattr(used, part)
    rows = [
        f"| `{entry.key}` | {_type(entry)} | {_default(entry, used)} | {_cell(entry.text)} |"
        for entry in entries_of(schema, shown)
        # The name of a kernel is in the heading above the table.
        if entry.key != f"{KERNEL}.name"
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


def _schema_of(prefix: str) -> tuple[type, str]:
    """Return the dataclass of a group of settings, and what its keys begin with."""
    schema = Schema.of(KernelConfig)
    if not prefix:
        return Config, ""
    if prefix in schema.groups:
        return schema.groups[prefix], f"{prefix}."
    return item_type(schema.settings[prefix].hint), f"{prefix}{ITEM}"


def _default(entry: Entry, used: Any) -> str:
    """Return the default of a setting, and its value in the group ``used`` if it is another one."""
    default = _literal(entry.default)
    value = _literal(getattr(used, entry.name, entry.default))  # the group may be that of another kernel
    return default if value == default else f"{default} ({STANDARD}: {value})"


def _literal(value: Any) -> str:
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value != "" else "empty"


def _type(entry: Entry) -> str:
    if entry.options:
        return " \\| ".join(f"`{option}`" for option in entry.options)
    word = entry.metadata.get("word")
    return " or ".join([*entry.kinds, *([f"`{word}`"] if word else [])])


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Options in the order of ``--help``, group by group."""
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.dest != "help" and action.help is not argparse.SUPPRESS:
                yield action


def _cell(text: str) -> str:
    """Text of a docstring or help as a cell of a Markdown table."""
    return re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`").replace("|", "\\|")
