"""Argument parsers of the commands: their usage lines, and options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from tnnlm.errors import command


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose usage line and examples show the command in the way the user called it.

    Args:
        name: Name of the subcommand.
        description: Text of ``--help``; its examples begin with ``tnnlm NAME``.
    """
    called = command(name)
    return argparse.ArgumentParser(
        prog=called,
        description=(description or "").replace(f"tnnlm {name}", called),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and the settings that override it to a parser."""
    settings = parser.add_argument_group("settings")
    settings.add_argument(
        "--config",
        default="demo",
        metavar="NAME|FILE",
        help="Name of an included configuration, such as tnn_wt103, or path of a YAML file. (default: demo)",
    )
    settings.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="Settings that override the configuration, such as optim.lr=1e-3.",
    )


def add_device(add: Callable[..., Any]) -> None:
    """Add ``--device`` and ``--dtype``; ``add`` is the ``add_argument`` of a parser or a group."""
    add("--device", default="auto", metavar="NAME", help="Device: cpu, cuda, cuda:1 ... (default: auto)")
    add(
        "--dtype",
        default="float32",
        metavar="NAME",
        help="Dtype of the linear layers' weights: float32, bfloat16 or int8. (default: float32)",
    )
