"""Code of a converted model in one Python file, for machines with Transformers but without tnnlm.

The file consists of the definitions of this package that ``tnnlm.hf`` needs, unchanged and in an order in
which each precedes its use. They are found from the syntax trees of the sources: what the classes for
Transformers mention is copied, then what that mentions, and so on. ``hf/standalone.py`` has the definitions
that replace others, for example checks that need further libraries.
"""

from __future__ import annotations

import ast
import builtins
import functools
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from tnnlm.checkpoints.source_module import BLOCK, PACKAGE, SourceModule

ROOTS = (("hf.config", "TnnlmConfig"), ("hf.model", "TnnlmForCausalLM"))
"""Definitions that config.json refers to, by module and name."""
REPLACING = "hf.standalone"
"""Module whose definitions replace all others with the same name."""
COMPLETE = "hf."
"""Prefix of modules whose classes keep all methods, because Transformers calls them, and that keep statements
other than definitions."""
CUT = {
    "Backbone": {"_new_conv", "features", "compile_blocks"},
    "CausalLM": {"forward", "loss"},
    "SSMParams": {"taps", "difference"},
    "CompanionParams": {"taps", "difference"},
}
"""Methods for training and conversion, which are omitted although their names occur."""
HEADER = '''# Copyright tnnlm developers
# SPDX-License-Identifier: Apache-2.0
"""Code of a converted tnnlm model for Transformers, for machines where the package tnnlm is not installed.

Written by tnnlm {version} from its sources. It needs PyTorch and Transformers.
"""

from __future__ import annotations

'''
_Key = tuple[str, str]


class _Change(NamedTuple):
    """Replacement of a part of a line, in bytes."""

    line: int
    start: int
    end: int
    text: str


class _Bundle:
    """Definitions that were found to be needed."""

    def __init__(self) -> None:
        self.modules: dict[str, SourceModule] = {}
        self.kept: dict[_Key, ast.stmt] = {}
        self.methods: dict[_Key, list[ast.stmt]] = {}
        self.outside: dict[str, str] = {}
        self.mentioned: set[str] = set()
        self._waiting: list[tuple[_Key, ast.FunctionDef]] = []

    def module(self, name: str) -> SourceModule:
        if name not in self.modules:
            self.modules[name] = SourceModule(name)
        return self.modules[name]

    def resolve(self, module: str, name: str) -> _Key | None:
        """Return module and name of the definition of a name, "" for a module itself; None if not ours."""
        replacing = self.module(REPLACING)
        if name in replacing.units and module != REPLACING:
            return REPLACING, name
        own = self.module(module)
        if name in own.units:
            return module, name
        if name not in own.inside:
            return None
        source, inner = own.inside[name]
        nested = f"{source}.{inner}"
        if (PACKAGE.joinpath(*nested.split("."))).with_suffix(".py").is_file():
            return nested, ""
        return self.resolve(source, inner)

    def keep(self, key: _Key) -> None:
        """Keep a definition and all that it mentions."""
        if key in self.kept:
            return
        module, name = key
        node = self.kept[key] = self.module(module).units[name]
        if isinstance(node, ast.ClassDef):
            cut = CUT.get(name, set())
            self.methods[key] = [m for m in node.body if getattr(m, "name", "") not in cut]
            ahead = [m for m in self.methods[key] if isinstance(m, ast.FunctionDef)]
            self._waiting += ((key, method) for method in ahead)
            others = [part for part in node.body if not isinstance(part, ast.FunctionDef)]
            for part in (*node.bases, *node.decorator_list, *others):
                self.follow(module, part)
        else:
            self.follow(module, node)

    def follow(self, module: str, node: ast.AST) -> None:
        """Keep what a node mentions."""
        for part, annotation in _walk(node):
            if isinstance(part, ast.ImportFrom) and str(part.module).split(".")[0] == PACKAGE.name:
                raise AssertionError(f"{module}: an import within a function can't be bundled")
            if isinstance(part, ast.Attribute):
                self.mentioned.add(part.attr)
                if isinstance(part.value, ast.Name) and not annotation:
                    of = self.resolve(module, part.value.id)
                    if of is not None and not of[1]:
                        self._keep_name(of[0], part.attr)
            elif isinstance(part, ast.Name):
                self._mention(module, part.id, annotation)

    def _mention(self, module: str, name: str, annotation: bool) -> None:
        own = self.module(module)
        if name in own.outside and self.outside.setdefault(name, own.outside[name]) != own.outside[name]:
            raise AssertionError(f"{module}: {name} is imported from two places")
        if not annotation:
            self._keep_name(module, name)

    def _keep_name(self, module: str, name: str) -> None:
        found = self.resolve(module, name)
        if found is not None and found[1]:
            self.keep(found)

    def settle(self) -> None:
        """Keep the methods whose names occur, until no further ones do."""
        while ready := [(k, m) for k, m in self._waiting if self._is_called(k, m.name)]:
            self._waiting = [pair for pair in self._waiting if pair not in ready]
            for (module, _), method in ready:
                self.follow(module, method)
        unused = {id(method) for _, method in self._waiting}
        for key, members in self.methods.items():
            self.methods[key] = [member for member in members if id(member) not in unused]

    def _is_called(self, key: _Key, name: str) -> bool:
        special = name.startswith("__") or key[0].startswith(COMPLETE) or hasattr(nn.Module, name)
        return special or name in self.mentioned

    def in_order(self) -> list[str]:
        """Return the modules with kept definitions, each after those that it imports."""
        used, order = {module for module, _ in self.kept}, list[str]()

        def visit(module: str) -> None:
            if module in order:
                return
            for source, name in self.module(module).inside.values():
                nested = f"{source}.{name}"
                for target in (nested, source):
                    if target in self.modules and target != module:
                        visit(target)
                        break
            order.append(module)

        for module in (REPLACING, *sorted(used)):
            visit(module)
        return [module for module in order if module in used]


def _walk(node: ast.AST, annotation: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Yield all nodes, each with whether it is a part of an annotation, which is never evaluated."""
    yield node, annotation
    for field, value in ast.iter_fields(node):
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST):
                yield from _walk(part, annotation or field in ("annotation", "returns"))


def _flat_names(bundle: _Bundle) -> dict[_Key, str]:
    """Return a name in the file for each definition, with the name of the module if it is taken."""
    names: dict[_Key, str] = {}
    taken = {*bundle.outside, *dir(builtins)}
    for module, name in sorted(bundle.kept, key=lambda key: (key[1].startswith("_"), key)):
        flat = name if name not in taken else f"{name}_of_{module.replace('.', '_')}"
        names[module, name] = flat
        taken.add(flat)
    return names


def _changes(bundle: _Bundle, module: str, names: dict[_Key, str], node: ast.AST) -> Iterator[_Change]:
    """Yield the changes of names that a definition mentions under another name than that in the file."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            of = bundle.resolve(module, part.value.id)
            target = bundle.resolve(of[0], part.attr) if of is not None and not of[1] else None
            if target in names and part.end_col_offset is not None:
                yield _Change(part.lineno, part.col_offset, part.end_col_offset, names[target])
        elif isinstance(part, ast.Name | ast.arg):
            name = part.id if isinstance(part, ast.Name) else part.arg
            found = bundle.resolve(module, name)
            if found not in names or names[found] == name:
                continue
            if isinstance(part, ast.arg) or (isinstance(part.ctx, ast.Store) and isinstance(node, BLOCK)):
                raise AssertionError(f"{module}: {name} is a variable as well as a definition")
            yield _Change(part.lineno, part.col_offset, part.end_col_offset or 0, names[found])


def _text(bundle: _Bundle, key: _Key, names: dict[_Key, str]) -> str:
    """Return the source of a definition, without the methods that are omitted, and with its new names."""
    module, name = key
    own, node = bundle.module(module), bundle.kept[key]
    kept = set(own.text(node))
    if isinstance(node, ast.ClassDef):
        members = bundle.methods[key]
        for member in (member for member in node.body if member not in members):
            kept -= set(own.text(member))
    lines = {number: own.lines[number].encode() for number in sorted(kept)}
    changes = [change for change in _changes(bundle, module, names, node) if change.line - 1 in lines]
    for line, start, end, text in sorted(changes, reverse=True):
        lines[line - 1] = lines[line - 1][:start] + text.encode() + lines[line - 1][end:]
    found = b"\n".join(lines.values()).decode()
    if isinstance(node, BLOCK) and names[key] != name:
        kind = "class" if isinstance(node, ast.ClassDef) else "def"
        found = found.replace(f"{kind} {name}", f"{kind} {names[key]}", 1)
    while "\n\n\n" in found:
        found = found.replace("\n\n\n", "\n\n")
    return found.strip("\n")


@functools.cache
def standalone_code(version: str) -> str:
    """Return the content of the file, which is the same for all models.

    Args:
        version: Version of tnnlm, which the file states.
    """
    bundle = _Bundle()
    for root in ROOTS:
        bundle.keep(root)
        for statement in bundle.module(root[0]).bare:
            bundle.follow(root[0], statement)
    bundle.settle()
    names = _flat_names(bundle)
    parts = []
    for module in bundle.in_order():
        own = bundle.module(module)
        nodes = {id(node): (node.lineno, name) for (of, name), node in bundle.kept.items() if of == module}
        found = [(line, _text(bundle, (module, name), names)) for line, name in nodes.values()]
        if module.startswith(COMPLETE):
            found += [(n.lineno, "\n".join(own.lines[i] for i in own.text(n))) for n in own.bare]
        parts += [text for _, text in sorted(found)]
    imports = sorted(bundle.outside.values(), key=lambda line: (line.startswith("from"), line))
    exported = f"__all__ = {sorted(name for _, name in ROOTS)!r}"
    head = HEADER.format(version=version) + "\n".join(imports)
    return "\n\n\n".join([head, *parts, exported]) + "\n"
