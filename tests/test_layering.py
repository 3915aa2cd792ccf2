"""Imports only go down, and a deployment needs no training package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# Lowest first; a module may import from its own layer and from those below.
LAYERS = (
    (
        "errors",
        "allocator",
        "threads",
        "capabilities",
        "precision",
        "atomic",
        "ops",
        "config",
        "config_io",
        "tokenizer",
    ),
    ("kernels",),
    ("modules",),
    ("backbone", "model", "encoder"),
    (
        "conversion",
        "hf_files",
        "converted",
        "checkpoint",
        "runs",
        "packed",
        "linear_choice",
        "row_linear",
        "compiled",
        "graphs",
        "export",
    ),
    ("generation", "evaluation", "engine", "state_file", "terminal", "serving"),
    (
        "documents",
        "holdout",
        "corpus",
        "packing",
        "masking",
        "sequences",
        "data",
        "loader_process",
        "resident",
        "training",
        "deployment",
        "conversion_table",
        "conversion_ppl",
        "comparison",
        "comparison_models",
        "comparison_plots",
        "families",
        "family_peers",
        "family_training",
        "family_measure",
        "family_run",
        "family_report",
        "finite_forms",
        "benchmark",
        "hf",
        "model_card",
        "reproduce",
    ),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TRAINING_ONLY = {
    "lightning",
    "torchmetrics",
    "datasets",
    "matplotlib",
    "rich",
    "tensorboard",
    "filelock",
    "psutil",
    "tqdm",
    "transformers",
    "lm_eval",
    "onnx",
    "onnxruntime",
    "PIL",
}
FILES = sorted((ROOT / "tnnlm").rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "tnnlm").with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path: Path) -> None:
    if part_of(path) == "__init__":
        assert not any(name.startswith("tnnlm") for name in imports(path))
        return
    level = LEVEL[part_of(path)]
    for name in imports(path):
        if name.startswith("tnnlm."):
            assert LEVEL[name.split(".")[1]] <= level, f"{path.name} imports {name}, which is above it"
        if level < len(LAYERS) - 1:
            assert name.split(".")[0] not in TRAINING_ONLY, f"{path.name} imports {name}"


@pytest.mark.parametrize("module", ["tnnlm.generation", "tnnlm.terminal", "generate"])
def test_deployment_loads_no_training_package(module: str) -> None:
    # torch itself loads tqdm where it is installed.
    code = (
        f"import sys; import {module}; "
        f"print(sorted({TRAINING_ONLY - {'tqdm'}!r} & {{name.split('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_module_says_what_it_is() -> None:
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
