"""Notebooks: their cells run in order, with few optimizer steps, and are stored without outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripts import ROOT

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    return list(json.loads(notebook.read_text(encoding="utf-8"))["cells"])


# The examples are too small for loader processes.
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    monkeypatch.setenv("TNNLM_CACHE", str(tmp_path / "cache"))
    names: dict[str, Any] = {"__name__": "__main__"}
    for index, cell in enumerate(cells_of(notebook)):
        if cell["cell_type"] == "code":
            source = re.sub(r"^STEPS = \d+", "STEPS = 20", "".join(cell["source"]), flags=re.MULTILINE)
            exec(compile(source, f"{notebook.name}, cell {index}", "exec"), names)


def test_notebooks_hold_no_outputs_and_are_listed() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 3
    for notebook in NOTEBOOKS:
        assert f"](notebooks/{notebook.name})" in index
        for cell in cells_of(notebook):
            assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_notebooks_resolve(notebook: Path) -> None:
    text = "".join(part for cell in cells_of(notebook) for part in cell["source"])
    targets = re.findall(r"\]\(([\w./-]+\.md)[^)]*\)", text)
    assert targets
    assert all((notebook.parent / target).resolve().is_file() for target in targets)
