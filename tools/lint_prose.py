#!/usr/bin/env python
"""Check prose against the word list in tools/prose.toml: README, docs, help, errors, docstrings, comments.

Rules beyond the word list:
  docstrings  The first sentence starts with a capital letter, ends with a full stop, and makes sense without
              the line above it. Entries of Args, Returns, Raises and Yields, and docstrings of attributes and
              settings, do the same.
  help        Help of an option is a sentence: capital letter, full stop.
  errors      A message starts with what it is about and has no full stop at its end.

Examples:
  python tools/lint_prose.py                        # everything; exit code 1 if anything is found
  python tools/lint_prose.py tnnlm/data README.md   # some files and folders
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CHECKED = ("README.md", "CONTRIBUTING.md", "docs", "tools", "examples", "tnnlm", "tests", "configs", ".")
"""Files and folders that are checked by default; of "." only the scripts."""
HELP = {"help", "description", "epilog"}
SECTIONS = (
    "Args:",
    "Returns:",
    "Raises:",
    "Yields:",
    "Attributes:",
    "Examples:",
    "Needs:",
    "Example:",
    "Note:",
)
FRAGMENT = re.compile(
    r"(Of|As|And|But|The same|Its|Their|Such|Those|That|Which|What|Whose|Also|So|Likewise|Or|"
    r"(For|By|In|To|With) (the|it|them))\b"
)
"""First words of a sentence that leans on the one before it."""


class Passage(NamedTuple):
    """A passage of prose."""

    path: Path
    line: int
    kind: str
    """One of page, docstring, attribute, entry, comment, help and error."""
    text: str


class Finding(NamedTuple):
    """A passage that breaks a rule."""

    passage: Passage
    problem: str

    def __str__(self) -> str:
        place = self.passage.path
        place = place.relative_to(ROOT) if place.is_relative_to(ROOT) else place
        return f"{place}:{self.passage.line}: {self.problem}"


@cache
def word_list() -> tuple[re.Pattern[str], list[tuple[re.Pattern[str], str]]]:
    """Accepted terms as one pattern, and rejected patterns with what to write instead."""
    data = tomllib.loads((ROOT / "tools/prose.toml").read_text(encoding="utf-8"))
    accepted = re.compile("|".join(data["accept"]), re.IGNORECASE)
    rejected = [(re.compile(entry["pattern"], re.IGNORECASE), entry["instead"]) for entry in data["reject"]]
    return accepted, rejected


def prose_of(text: str) -> str:
    """Return the text with code, comments, links' targets and roles blanked out; line breaks stay."""
    for pattern in (
        r"<!--.*?-->",
        r"```.*?```",
        r":\w+:`[^`]*`",
        r"``.*?``",
        r"`[^`]*`",
        r"\]\([^)]*\)",
        r"https?://\S+",
    ):
        text = re.sub(pattern, lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.DOTALL)
    return text


def check(passage: Passage) -> Iterator[Finding]:
    """Everything in a passage that breaks a rule."""
    accepted, rejected = word_list()
    text = prose_of(passage.text)
    text = accepted.sub(lambda found: " " * len(found[0]), text)
    for pattern, instead in rejected:
        # A line break counts as a space.
        for found in pattern.finditer(re.sub(r"\s", " ", text)):
            line = passage.line + text.count("\n", 0, found.start())
            yield Finding(passage._replace(line=line), f'"{found[0]}": write {instead}')
    yield from _check_sentence(passage)


def _check_sentence(passage: Passage) -> Iterator[Finding]:
    text = " ".join(passage.text.split())
    if passage.kind == "error":
        if text.endswith(".") and not text.endswith(".."):
            yield Finding(passage, f'error "{text[:50]}": omit the full stop')
    elif passage.kind in ("docstring", "attribute", "entry", "help"):
        if text[:1].islower():
            yield Finding(passage, f'{passage.kind} "{text[:50]}": start with a capital letter')
        elif FRAGMENT.match(text):
            yield Finding(passage, f'{passage.kind} "{text[:50]}": start with a sentence that stands alone')
        if passage.kind != "docstring" and not re.search(r"[.!?:)`'\"]$", text):
            yield Finding(passage, f'{passage.kind} "{text[:50]}": end with a full stop')
        elif passage.kind == "docstring" and not re.search(r"[.!?:]$", _first_paragraph(passage.text)):
            yield Finding(passage, f'docstring "{text[:50]}": end the first sentence with a full stop')


def _first_paragraph(text: str) -> str:
    return " ".join(text.strip().split("\n\n")[0].split())


def passages_of(path: Path) -> Iterator[Passage]:
    """Every passage of prose in a file, by its kind of file."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield Passage(path, 1, "page", source)
    elif path.suffix in (".yaml", ".toml"):
        for number, line in enumerate(source.splitlines(), 1):
            if line.lstrip().startswith("#"):
                yield Passage(path, number, "comment", line.lstrip("# "))
    elif path.suffix == ".py":
        yield from _comments(path, source)
        for node in ast.walk(ast.parse(source)):
            yield from _docstring(path, node)
            yield from _strings(path, node)


def _comments(path: Path, source: str) -> Iterator[Passage]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Passage(path, token.start[0], "comment", token.string.lstrip("#! "))


def _docstring(path: Path, node: ast.AST) -> Iterator[Passage]:
    body = getattr(node, "body", None)
    if not isinstance(body, list):
        return
    for index, statement in enumerate(body):
        if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
            continue
        text = statement.value.value
        if not isinstance(text, str):
            continue
        if index == 0 and isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ):
            yield Passage(path, statement.lineno, "docstring", text)
            yield from _entries(path, statement.lineno, text)
        else:
            yield Passage(path, statement.lineno, "attribute", text)


def _entries(path: Path, first: int, text: str) -> Iterator[Passage]:
    """Entries ``name: description`` below Args and its like, with the lines that continue them."""
    section, indent, entry = "", 0, None
    for number, line in enumerate(text.splitlines(), first):
        here = len(line) - len(line.lstrip())
        if line.strip() in SECTIONS:
            if entry:
                yield entry
            section, indent, entry = line.strip(), here, None
        elif section and line.strip() and here <= indent:
            section = ""
        elif section in ("Args:", "Raises:", "Attributes:") and line.strip():
            found = re.match(r"\s+(\*{0,2}[\w.`, *]+): (.*)", line) if here == indent + 4 else None
            if found:
                if entry:
                    yield entry
                entry = Passage(path, number, "entry", found[2])
            elif entry:
                entry = entry._replace(text=f"{entry.text}\n{line}")
        elif section in ("Returns:", "Yields:") and line.strip():
            entry = (
                entry._replace(text=f"{entry.text}\n{line}")
                if entry
                else Passage(path, number, "entry", line.strip())
            )
    if entry:
        yield entry


def _strings(path: Path, node: ast.AST) -> Iterator[Passage]:
    if isinstance(node, ast.keyword) and node.arg in HELP:
        text = _text_of(node.value)
        # An epilog or description of several lines is examples, mostly.
        kind = "help" if node.arg == "help" else "comment"
        if text and "SUPPRESS" not in text:
            yield Passage(path, node.value.lineno, kind, text)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error"):
        for argument in node.args:
            if text := _text_of(argument):
                yield Passage(path, argument.lineno, "error", text)


def _text_of(node: ast.expr) -> str:
    """A string in the sources; what is formatted in at run time becomes code."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "`x`" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def files_of(paths: list[Path]) -> Iterator[Path]:
    """Files that hold prose: those given, and those in the folders given."""
    for path in paths:
        if path == ROOT:
            yield from sorted(path.glob("*.py"))
        elif path.is_dir():
            found = (path.rglob(f"*.{suffix}") for suffix in ("py", "md", "yaml", "toml"))
            # Fixtures are as an older version wrote them; the word list contains what it rejects.
            yield from sorted(
                file
                for files in found
                for file in files
                if "fixtures" not in file.parts and file.name != "prose.toml"
            )
        else:
            yield path


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", type=Path, help="Files and folders. (default: all prose)")
    return parser.parse_args()


def main() -> int:
    """Print findings; return 1 if there are any."""
    paths = [path.resolve() for path in parse().paths] or [ROOT / name for name in CHECKED]
    findings = [
        finding for path in files_of(paths) for passage in passages_of(path) for finding in check(passage)
    ]
    for finding in findings:
        print(finding)
    print(f"{len(findings)} findings", file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
