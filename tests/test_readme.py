"""The README's commands run as they stand there, on a tiny model and text."""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripts import ROOT
from tests.support.training_runs import SETTINGS, write_text

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(script: str) -> list[list[str]]:
    """The words after ``python SCRIPT.py`` on every line of a shell block."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if f"python {script}.py" in line]
    return [shlex.split(line, comments=True)[2:] for line in lines if not line.startswith("cat")]


def test_readme_commands_run(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text()
    write_text(Path("book.txt"))
    Path("lines.txt").write_text("The first\nA second line\n")
    training = commands("train")
    assert ["--resume"] in training
    for words in training:
        extra = ["trainer.max_steps=30"] if "--resume" in words else []
        if "--config" in words:
            words[words.index("--config") + 1] = str(ROOT / words[words.index("--config") + 1])
        words = [word.replace("examples/", f"{ROOT}/examples/") for word in words]
        tiny = [] if "--resume" in words or "--dry-run" in words else list(SETTINGS)
        if "--config" in words or "name=hyena" in words:  # the settings of another kernel
            tiny = [word for word in tiny if not word.startswith("model.kernel.")]
        assert script("train", *tiny, *words, *extra).code == 0, words
    assert {path.name for path in Path("runs").iterdir()} >= {"demo", "book"}
    converting = commands("convert")
    assert len(converting) >= 3
    for words in converting:
        # Without a name the newest run is taken: here that would be the one of the book.
        placed = [word.replace("RUN", "runs/demo") for word in words]
        placed = placed if {"runs/demo", "runs/hyena"} & set(placed) else ["runs/demo", *placed]
        forced = ["--force"] if "--out" not in placed else []
        # A horizon of 512 is more than this tiny kernel needs, and as exact.
        assert script("convert", *placed, *forced).code == 0, words
    generating = commands("generate")
    assert len(generating) >= 3
    for words in generating:
        monkeypatch.setattr(sys, "stdin", io.StringIO("The first\nthe second\n"))
        assert script("generate", *words, "--max-new-tokens", "4").code == 0, words
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The text")))
    assert script("generate", "--prompt", "-", "--json", "--max-new-tokens", "4").code == 0
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})  # the library example, as a reader would paste it


def test_readme_names_only_files_that_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
