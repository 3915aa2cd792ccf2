"""The part of ``--help`` that lists all settings, group by group, with type, default and a sentence each."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from tnnlm.config.catalogue import ITEM, Entry, Group, groups
from tnnlm.config.loader import load_config
from tnnlm.config.shipped import find_config
from tnnlm.config.values import typed
from tnnlm.errors import OneLineParser

STANDARD = "demo"
"""Name of the configuration that is used without ``--config``."""


class SettingsParser(OneLineParser):
    """Parser whose ``--help`` ends with all settings."""

    def format_help(self) -> str:
        """Return the help of the options, and that of the settings behind it."""
        return f"{super().format_help()}\n{settings_help(self.prog)}"


def settings_help(prog: str) -> str:
    """Return a table of all settings, which is as wide as the terminal.

    Args:
        prog: Command that takes the settings, as typed.
    """
    formatter = argparse.HelpFormatter(prog, max_help_position=32)
    formatter.add_text(
        "Settings are given as key=value. The default is in parentheses, with the value of the configuration "
        "demo, which is used without --config, if it is another one:"
    )
    used = load_config(find_config(STANDARD))
    for group in groups():
        formatter.start_section(_title(group))
        formatter.add_text(f"{group.about}.")
        formatter.add_arguments(list(_actions(group, used)))
        formatter.end_section()
    return formatter.format_help()


def _title(group: Group) -> str:
    if group.kernel is not None:
        return f"{group.prefix}name={group.kernel}"
    if group.of_items:
        return f"{group.prefix.removesuffix(ITEM)}=[{{name: value, ...}}, ...]"
    return group.prefix.rstrip(".") or "general"


def _actions(group: Group, used: Any) -> Iterator[argparse.Action]:
    """Yield an argument for each setting of a group, which only the formatter of argparse uses."""
    chosen = not group.of_items and group.kernel in (None, used.model.kernel.name)
    for part in filter(None, group.prefix.split(".") if chosen else ()):
        used = getattr(used, part)
    for entry in group.entries:
        value = getattr(used, entry.name, entry.default) if chosen else entry.default
        text = f"{entry.sentence} {_default(entry, value)}"
        shown = f"{entry.name}: {_value(entry)}" if group.of_items else f"{entry.key}={_value(entry)}"
        yield argparse.Action([], entry.key, help=text.replace("%", "%%"), metavar=shown)


def _value(entry: Entry) -> str:
    word = entry.metadata.get("word")
    kinds = entry.options or (*(kind.upper() for kind in entry.kinds), *([word] if word else []))
    return "|".join(kinds)


def _default(entry: Entry, value: Any) -> str:
    default = typed(entry.default)
    return (
        f"(default: {default})" if value == entry.default else f"(default: {default}; demo: {typed(value)})"
    )
