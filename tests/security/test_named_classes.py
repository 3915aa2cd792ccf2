"""A checkpoint or run of a stranger names classes of loggers, callbacks and profilers: none is imported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.hostile import write_run
from tests.support.scripts import assert_refused
from tests.support.training_runs import write_text

TRACE = "ran"
SETTINGS = {
    "trainer.callbacks": "callbacks: [{class_path: baited.Part, init_args: {a: 1}}]",
    "trainer.loggers": "loggers: [baited.Part]",
    "trainer.profiler": "profiler: baited.Part",
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, _quiet: None) -> Path:
    """Write a run, and a module that leaves a trace where Python finds it."""
    write_text()
    Path("baited.py").write_text(f"open({str(Path(TRACE).absolute())!r}, 'w').close()\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.delitem(sys.modules, "baited", raising=False)
    return write_run(Path("theirs"))


def name_class(run: Path, line: str) -> None:
    """Write a setting into the settings of a run and into those of its checkpoint."""
    key = line.partition(":")[0]
    path = run / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    place = next(index for index, text in enumerate(lines) if text.startswith(f"  {key}:"))
    lines[place] = f"  {line}\n"
    path.write_text("".join(lines))
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["tnnlm"]["config"]["trainer"][key] = (
        [{"class_path": "baited.Part"}] if key != "profiler" else {"class_path": "baited.Part"}
    )
    torch.save(checkpoint, run / "checkpoints/last.ckpt")


@pytest.mark.parametrize("setting", SETTINGS)
def test_classes_that_a_run_names_are_listed_and_not_imported(setting: str, run: Path, script: Any) -> None:
    name_class(run, SETTINGS[setting])
    before = (run / "config.yaml").read_bytes()
    for words in (("--resume", "theirs", "--dry-run"), ("--resume", "theirs")):
        assert_refused(
            script("train", *words), f"{setting}=baited.Part: is code that the run names", "--trust-code"
        )
    assert (run / "config.yaml").read_bytes() == before
    # Commands that don't train read the settings as data.
    assert script("convert", "theirs", "--no-compile", "--no-perplexity").code == 0
    assert (
        script("generate", "--model", "theirs/converted", "--prompt", "the", "--max-new-tokens", "1").code
        == 0
    )
    assert script("train", "--init-from", "theirs", "--dry-run").code == 0
    assert not Path(TRACE).exists()
    assert_refused(
        script("train", "--resume", "theirs", "--dry-run", "--trust-code"), "baited has no class Part"
    )
    assert Path(TRACE).exists()
