#!/usr/bin/env python
"""Check the import rules, and count rooms, floors and arrows of the import graph.

  room    node of the graph: a package or module directly under tnnlm/, a folder of tools/ with Python files,
          the scripts in tools/ together, or a script in the root; ``__init__.py`` of tnnlm is no room, and
          its ``__main__.py`` belongs to cli
  arrow   edge of the graph: a pair of rooms of which the first imports the second, at the top of a file,
          inside a function, or by a string that is the name of a module
  floor   height of a room: one more than the highest room that it imports; the printed count is the longest
          chain of imports
  circle  import cycle: rooms that import each other, directly or through others
  up      arrow within the package that RULES, below, does not allow
  lines   lines of Python, including blank lines and comments

Exit code 1 if there is a circle, an arrow up, or a file that is too long.

Examples:
  python tools/count_imports.py
  python tools/count_imports.py --list    # with all arrows
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LONGEST = 320
"""Maximum number of lines of a file."""


class Allowed(NamedTuple):
    """Imports that a package of tnnlm may contain."""

    packages: str
    """Packages and modules of tnnlm, separated by spaces."""
    libraries: str
    """Third-party libraries by import name, separated by spaces."""


RULES = {
    "signals": Allowed("", ""),
    "errors": Allowed("signals", ""),
    "fields": Allowed("", ""),
    "precision": Allowed("", "torch"),
    "files": Allowed("errors", "filelock"),
    "reading": Allowed("errors", ""),
    "checksums": Allowed("errors files reading", "xxhash"),
    "trust": Allowed("errors files", ""),
    "machine": Allowed("errors", "torch psutil"),
    "detokenizer": Allowed("", "tokenizers"),
    "tokenizer": Allowed("errors reading detokenizer", "tokenizers huggingface_hub"),
    "coverage": Allowed("tokenizer", "tokenizers"),
    "chat": Allowed("errors reading tokenizer", "jinja2"),
    "ops": Allowed("machine precision", "torch numpy triton"),
    "kernels": Allowed("errors fields precision ops", "torch"),
    "modules": Allowed("errors precision ops kernels", "torch"),
    "config": Allowed("errors trust fields reading kernels", "omegaconf yaml"),
    "models": Allowed("errors ops kernels modules config", "torch"),
    "evaluation": Allowed("models", "torch"),
    "checkpoints": Allowed(
        "errors trust files reading checksums tokenizer chat ops modules config models",
        "torch safetensors tokenizers",
    ),
    "data": Allowed(
        "errors files reading checksums machine tokenizer coverage chat config models",
        "torch numpy lightning tokenizers datasets pyarrow tqdm xxhash PIL",
    ),
    "conversion": Allowed("errors ops kernels modules config models checkpoints", "torch numpy"),
    "inference": Allowed(
        "errors trust files reading checksums machine tokenizer coverage chat ops models checkpoints",
        "torch numpy safetensors onnxscript llguidance",
    ),
    "training": Allowed(
        "signals errors fields trust files reading checksums machine tokenizer chat ops kernels modules "
        "config models evaluation checkpoints data conversion inference",
        "torch numpy lightning lightning_utilities torchmetrics tqdm rich matplotlib huggingface_hub peft",
    ),
    "deployment": Allowed(
        "errors trust files reading machine tokenizer config models evaluation checkpoints data conversion "
        "inference",
        "torch tqdm rich jinja2 huggingface_hub",
    ),
    "serving": Allowed(
        "errors detokenizer tokenizer chat models inference",
        "torch numpy fastapi starlette pydantic prometheus_client uvicorn h11",
    ),
    "cli": Allowed(
        "errors trust files reading machine config checkpoints data conversion inference training deployment "
        "serving",
        "rich fastapi",
    ),
    "hf": Allowed(
        "errors files reading ops modules config models checkpoints inference", "torch transformers"
    ),
}
"""Import rules, lowest package first: a package may import only the packages listed for it, which are all
above it in this table, and only the libraries listed for it. Inference imports neither conversion nor data
nor training."""
_MODULE = re.compile(r"tnnlm(\.\w+)+")
Arrows = set[tuple[str, str]]


def room_of(path: Path, root: Path = ROOT) -> str | None:
    """Return the room of a file; None for the ``__init__.py`` of tnnlm and for other folders."""
    parts = path.relative_to(root).with_suffix("").parts
    if parts[0] == "tnnlm":
        return {"__init__": None, "__main__": "tnnlm/cli"}.get(parts[1], f"tnnlm/{parts[1]}")
    if parts[0] == "tools":
        return f"tools/{parts[1]}" if len(parts) > 2 else "tools"
    return parts[0] if len(parts) == 1 else None


def sources(root: Path = ROOT) -> dict[Path, str]:
    """Return every Python file that belongs to a room, with the name of the room."""
    files = (
        *sorted(root.glob("tnnlm/**/*.py")),
        *sorted(root.glob("tools/**/*.py")),
        *sorted(root.glob("*.py")),
    )
    return {path: room for path in files if (room := room_of(path, root))}


def imported_names(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, also inside functions, and module names in its strings."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and _MODULE.fullmatch(str(node.value)):
            yield str(node.value)


def _room_of_name(name: str, rooms: set[str]) -> str | None:
    first, *rest = name.split(".")
    candidates = [f"tnnlm/{rest[0]}"] if first == "tnnlm" and rest else [f"tools/{first}", first]
    return next((room for room in candidates if room in rooms), None)


def arrows(root: Path = ROOT) -> Arrows:
    """Return all pairs (importing room, imported room)."""
    files = sources(root)
    rooms = set(files.values())
    found: Arrows = set()
    for path, room in files.items():
        targets = {_room_of_name(name, rooms) for name in imported_names(path)}
        found |= {(room, target) for target in targets if target and target != room}
    return found


def upwards(found: Arrows) -> Arrows:
    """Return the arrows within the package that the import rules do not allow."""
    within = {arrow for arrow in found if all(room.startswith("tnnlm/") for room in arrow)}
    names = {(source.removeprefix("tnnlm/"), target.removeprefix("tnnlm/")) for source, target in within}
    return {(a, b) for a, b in names if a not in RULES or b not in RULES[a].packages.split()}


def circles(found: Arrows) -> list[set[str]]:
    """Return the import cycles: groups of rooms that reach each other."""
    rooms = {room for arrow in found for room in arrow}
    reached = {room: _reached(room, found) for room in rooms}
    groups = {frozenset({room, *(o for o in reached[room] if room in reached[o])}) for room in rooms}
    return [set(group) for group in groups if len(group) > 1]


def _reached(room: str, found: Arrows) -> set[str]:
    seen: set[str] = set()
    ahead = [room]
    while ahead:
        here = ahead.pop()
        new = {target for source, target in found if source == here} - seen
        seen |= new
        ahead += new
    return seen


def floors(found: Arrows) -> dict[str, int]:
    """Return the height of every room, starting at 1; the graph must have no cycles."""
    heights: dict[str, int] = {}

    def height(room: str) -> int:
        if room not in heights:
            heights[room] = 1 + max((height(target) for source, target in found if source == room), default=0)
        return heights[room]

    for room in {room for arrow in found for room in arrow}:
        height(room)
    return heights


def lines(*patterns: str) -> int:
    """Return the number of lines of the Python files under the folders that match ``patterns``."""
    files = [path for pattern in patterns for path in ROOT.glob(f"{pattern}/**/*.py")]
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="Print all arrows.")
    return parser.parse_args()


def main() -> int:
    """Print violations and counts; return 1 if there are violations."""
    args = parse()
    found = arrows()
    rooms = set(sources().values())
    within = {arrow for arrow in found if all(room.startswith("tnnlm/") for room in arrow)}
    for group in (around := circles(found)):
        print("circle:", ", ".join(sorted(group)))
    up = upwards(found)
    for source, target in sorted(up):
        print(f"up: {source} -> {target}")
    long = [path for path in sources() if len(path.read_text(encoding="utf-8").splitlines()) > LONGEST]
    for path in long:
        print(f"over {LONGEST} lines: {path.relative_to(ROOT)}")
    if args.list:
        print(*(f"{source} -> {target}" for source, target in sorted(found)), sep="\n")
    package = {room for room in rooms if room.startswith("tnnlm/")}
    print(f"rooms   {len(rooms):5}, {len(package)} in the package")
    print(f"floors  {max(floors(found).values()) if not around else 0:5}, {_height(within)} in the package")
    print(f"arrows  {len(found):5}, {len(within)} in the package")
    print(f"circles {len(around):5}")
    print(f"up      {len(up):5}")
    print(f"lines   {lines('tnnlm'):5} in the package, {lines('tools')} in tools")
    return 1 if around or up or long else 0


def _height(found: Arrows) -> int:
    return 0 if circles(found) else max(floors(found).values())


if __name__ == "__main__":
    sys.exit(main())
