"""The import rules of tools/count_imports.py hold, and decoding loads no package that only training needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from count_imports import LONGEST, RULES, arrows, circles, imported_names, room_of, sources, upwards
from tests.support.scripts import ROOT

FILES = sorted((ROOT / "tnnlm").rglob("*.py"))
NOT_FOR_DECODING = sorted(
    {name for allowed in RULES.values() for name in allowed.libraries.split()}
    - {name for part in ("inference", "checkpoints", "checksums", "config", "files", "tokenizer", "ops")
       for name in RULES[part].libraries.split()}
    - {"tqdm"}  # torch itself imports it if it is installed
    | {"triton"}  # only for steps on a GPU
)  # fmt: skip


def package_of(path: Path) -> str:
    room = room_of(path)
    return "" if room is None else room.removeprefix("tnnlm/")


@pytest.mark.parametrize(
    "path", [path for path in FILES if package_of(path)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_file_imports_what_its_package_may(path: Path) -> None:
    own = package_of(path)
    for name in imported_names(path):
        first, *rest = name.split(".")
        if first == "tnnlm":
            allowed = {own, *RULES[own].packages.split()}
            assert rest[0] in allowed or rest[0].startswith("__"), f"{path.name} imports {name}"
        elif first not in sys.stdlib_module_names:
            assert first in RULES[own].libraries.split(), f"{path.name} imports {name}"


def test_package_itself_imports_nothing_but_by_name_and_for_type_checkers() -> None:
    tree = ast.parse((ROOT / "tnnlm/__init__.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []  # never executed
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= sys.stdlib_module_names
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            assert str(node.module).split(".")[0] in sys.stdlib_module_names


def test_rules_only_go_down_and_cover_every_package() -> None:
    order = list(RULES)
    for position, (package, allowed) in enumerate(RULES.items()):
        assert set(allowed.packages.split()) <= set(order[:position]), package
    assert set(order) == {package_of(path) for path in FILES} - {""}


def test_packages_have_no_import_cycle_and_no_upward_import() -> None:
    found = arrows()
    assert not circles(found)
    assert not upwards(found)
    assert not any(
        source.startswith("tnnlm/") and not target.startswith("tnnlm/") for source, target in found
    )


def test_a_cycle_and_an_upward_import_are_detected() -> None:
    found = {("tnnlm/ops", "tnnlm/kernels"), ("tnnlm/kernels", "tnnlm/ops")}
    assert circles(found) == [{"tnnlm/ops", "tnnlm/kernels"}]
    assert upwards(found) == {("ops", "kernels")}


@pytest.mark.parametrize("package", [name for name in RULES if (ROOT / "tnnlm" / name).is_dir()])
def test_no_cycle_between_the_modules_of_a_package(package: str) -> None:
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "tnnlm" / package).rglob("*.py")
    }
    found = set()
    for name, path in names.items():
        for imported in imported_names(path):
            for target in (imported, imported.rpartition(".")[0]):
                if target in names and target != name:
                    found.add((name, target))
                    break
    # An __init__ re-exports names, so a module that imports from it creates a cycle.
    assert not circles(found)


@pytest.mark.parametrize(
    "module", ["tnnlm.inference.generator", "tnnlm.inference.session", "tnnlm.cli.generate"]
)
def test_decoding_loads_neither_training_nor_conversion(module: str) -> None:
    code = (
        f"import sys; import {module}; names = set(sys.modules); "
        f"print(sorted({set(NOT_FOR_DECODING)!r} & {{name.split('.')[0] for name in names}}), "
        "sorted(n for n in names if n.split('.')[:2] in [['tnnlm', p] for p in "
        "('conversion', 'training', 'data', 'deployment', 'evaluation')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"
    assert "lightning" in NOT_FOR_DECODING


def test_every_module_has_a_docstring() -> None:
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_no_file_is_too_long() -> None:
    for path in sources():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST, path
