"""Weights & Biases logging: one W&B run per run folder, and one error line without the package or its
service.

A fake module replaces the package, which is an optional extra.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch.loggers.wandb as lightning_wandb
import pytest

from tests.support.training_runs import SETTINGS, tiny_run, write_text
from tnnlm.errors import CheckpointError, ConfigError
from tnnlm.training.loggers.wandb import wandb_logger
from tnnlm.training.resume import resumed_config
from tnnlm.training.run import train


class Run:
    """Fake run of the service."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.rows: list[dict[str, Any]] = []
        self.config = self
        self.settings: dict[str, Any] = {}
        self.finished = False
        self.id = options["id"]

    def update(self, settings: dict[str, Any], allow_val_change: bool) -> None:
        """Record the configuration."""
        self.settings = settings

    def log(self, row: dict[str, Any]) -> None:
        """Record a row of metrics."""
        assert not self.finished
        self.rows.append(row)

    def define_metric(self, *args: Any, **kwargs: Any) -> None:
        """Accept the definition of an axis."""

    def finish(self) -> None:
        """Mark the run as finished."""
        self.finished = True

    def project_name(self) -> str:
        """Return the project, as the real class does."""
        return str(self.options["project"])


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Replace the package by a fake module, and return the list of runs that it starts."""
    started: list[Run] = []
    names = ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run")
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}

    def init(**options: Any) -> Run:
        started.append(Run(**options))
        return started[-1]

    modules["wandb"].init, modules["wandb"].run = init, None
    modules["wandb"].require = lambda name: None
    modules["wandb"].Table = lambda **content: content
    modules["wandb.sdk.lib"].RunDisabled, modules["wandb.wandb_run"].Run = type(None), Run
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(lightning_wandb, "_WANDB_AVAILABLE", True)
    return started


def test_run_is_logged_and_continued_when_resumed(runs: list[Run]) -> None:
    train(tiny_run("trainer.wandb=project", "trainer.max_steps=8"))
    folder = Path("runs/demo")
    identity = (folder / "wandb_id").read_text().strip()
    assert len(runs) == 1
    first = runs[0]
    assert first.finished
    wanted = {"project": "project", "name": "demo", "id": identity, "resume": "allow"}
    assert wanted.items() <= first.options.items()
    assert first.settings["trainer"]["max_steps"] == 8
    logged = {key for row in first.rows for key in row}
    assert {"train/loss", "train/grad_norm", "val/ppl", "val/ppl_recurrent", "kernel/length/1"} <= logged
    assert "sample" in logged
    train(resumed_config(folder, ["trainer.max_steps=12"]), folder)
    assert [run.options["id"] for run in runs] == [identity, identity]
    assert {row["trainer/global_step"] for row in runs[1].rows} == {10, 12}
    train(tiny_run("trainer.wandb=project", "trainer.max_steps=2"))
    assert runs[2].options["id"] != identity


def test_missing_package_is_one_line_and_leaves_no_run(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_wandb, "_WANDB_AVAILABLE", False)
    write_text()
    result = script("train", *SETTINGS, "trainer.wandb=project")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "pip install -c constraints.txt -e '.[wandb]'" in result.err
    assert not list(Path("runs").iterdir())


def test_refused_login_is_one_line_and_leaves_no_run(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        (Path(options["dir"]) / "wandb").mkdir()
        raise RuntimeError("api_key not configured\nmore")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(
        ConfigError, match=r"^trainer\.wandb=project: api_key not configured; .*WANDB_MODE=off"
    ):
        train(tiny_run("trainer.wandb=project"))
    assert not list(Path("runs").iterdir())


@pytest.mark.parametrize("content", ["../another", "a" * 257, "two words"])
def test_damaged_id_is_refused_in_one_line(content: str, runs: list[Run]) -> None:
    Path("run").mkdir()
    Path("run/wandb_id").write_text(content)
    with pytest.raises(CheckpointError, match=r"^run/wandb_id: .*; delete it to log to a new W&B run$"):
        wandb_logger(tiny_run("trainer.wandb=project"), Path("run"))
    assert not runs
