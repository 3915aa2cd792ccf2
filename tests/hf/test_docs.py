"""The code blocks of docs/how-to/use-with-transformers.md run unchanged, on a small run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from tests.support.scripts import ROOT
from tests.support.training_runs import SETTINGS, write_text

DOCS = (ROOT / "docs/how-to/use-with-transformers.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_snippets_of_the_docs_and_of_a_card_run(script: Any, capsys: Any) -> None:
    write_text()
    assert script("train", *SETTINGS).code == 0
    assert script("convert").code == 0
    names: dict[str, Any] = {}
    python = blocks(DOCS, "python")
    assert len(python) >= 4
    for block in python:
        exec(compile(block, "docs/how-to/use-with-transformers.md", "exec"), names)
    assert script("generate", "--model", "copy", "--prompt", "The", "--max-new-tokens", "3").code == 0
    assert script("push", "runs/demo", "NAME/MODEL", "--dry-run").code == 0
    card = Path("runs/demo/converted/README.md").read_text()
    (snippet,) = blocks(card, "python")
    exec(compile(snippet.replace("FOLDER", "runs/demo/converted"), "README.md", "exec"), {})
    (command,) = blocks(card, "sh")
    words = shlex.split(command.replace("FOLDER", "runs/demo/converted"))[2:]
    assert script("generate", *words, "--max-new-tokens", "3").code == 0


def test_docs_are_linked_and_name_only_files_that_exist() -> None:
    assert "docs/how-to/use-with-transformers.md" in (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", DOCS):
        assert (ROOT / "docs" / target).exists(), target
