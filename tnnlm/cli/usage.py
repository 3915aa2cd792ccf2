"""How a command is called, as its help says it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from tnnlm.errors import command


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose usage and examples are written as the command was called.

    Args:
        name: of the subcommand.
        description: with examples that say ``tnnlm NAME``.
    """
    called = command(name)
    return argparse.ArgumentParser(
        prog=called,
        description=(description or "").replace(f"tnnlm {name}", called),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """What every command that reads a configuration takes."""
    settings = parser.add_argument_group("settings")
    settings.add_argument(
        "--config",
        default="demo",
        metavar="NAME|FILE",
        help="a YAML file, or the name of a configuration that is shipped, such as tnn_wt103 (default: demo)",
    )
    settings.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings over those of the file, as optim.lr=1e-3"
    )


def add_device(add: Callable[..., Any]) -> None:
    """What every command that decodes takes; ``add`` is the ``add_argument`` of a parser or a group."""
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: auto)")
    add(
        "--dtype", default="float32", metavar="NAME", help="of the weights: float32 (default), bfloat16, int8"
    )
