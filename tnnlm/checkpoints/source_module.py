"""Syntax tree of a source file of this package: its definitions, its imports, and the lines of each."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
BLOCK = ast.FunctionDef | ast.ClassDef


class SourceModule:
    """Top-level definitions and imports of a source file.

    Attributes:
        units: Statement of each name, in order.
        outside: Statement that imports a name from another package, and what it imports.
        inside: Module and name that an imported name of this package stands for; no name for a module.
        bare: Statements that define nothing.
    """

    def __init__(self, name: str) -> None:
        path = PACKAGE.joinpath(*name.split("."))
        self.path = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        self.lines = self.path.read_text(encoding="utf-8").splitlines()
        self.tree = ast.parse("\n".join(self.lines))
        self.units: dict[str, ast.stmt] = {}
        self.outside: dict[str, str] = {}
        self.inside: dict[str, tuple[str, str]] = {}
        self.bare: list[ast.stmt] = []
        for node in self.tree.body:
            self._add(node)

    def _add(self, node: ast.stmt) -> None:
        if isinstance(node, BLOCK):
            self.units[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for found in (name for target in targets for name in ast.walk(target)):
                if isinstance(found, ast.Name):
                    self.units[found.id] = node
        elif isinstance(node, ast.Import):
            for alias in node.names:
                self.outside[alias.asname or alias.name.split(".")[0]] = f"import {_imported(alias)}"
        elif isinstance(node, ast.ImportFrom):
            self._add_import(node)
        elif not isinstance(node, ast.Expr):
            self.bare.append(node)

    def _add_import(self, node: ast.ImportFrom) -> None:
        source = str(node.module)
        for alias in node.names:
            bound = alias.asname or alias.name
            if source.split(".")[0] == PACKAGE.name:
                self.inside[bound] = (source.partition(".")[2], alias.name)
            elif source != "__future__":
                self.outside[bound] = f"from {source} import {_imported(alias)}"

    def text(self, node: ast.stmt) -> range:
        """Return the lines, from 0, of a statement with its comments, decorators and docstring."""
        decorators = getattr(node, "decorator_list", [])
        start, end = min([node.lineno, *(d.lineno for d in decorators)]) - 1, node.end_lineno or 0
        while start and self.lines[start - 1].lstrip().startswith("#"):
            start -= 1
        body = self.tree.body
        after = body[body.index(node) + 1 :][:1] if node in body else []
        if not isinstance(node, BLOCK) and after and isinstance(after[0], ast.Expr):
            end = after[0].end_lineno or end
        return range(start, end)


def _imported(alias: ast.alias) -> str:
    return f"{alias.name} as {alias.asname}" if alias.asname else alias.name
