"""The configurations of the Long Range Arena fit their tasks and pass a dry run."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.scripts import ROOT
from tnnlm.data.sequences.rows import SEQUENCE_TASKS

FILES = sorted((ROOT / "configs/lra").glob("*.yaml"))


def test_every_task_has_one() -> None:
    assert {path.stem for path in FILES} == set(SEQUENCE_TASKS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_fits_its_task(script: Any, path: Any) -> None:
    shown = script("train", "--config", str(path), "--dry-run", "--json")
    assert shown.code == 0, shown.err
    plan = json.loads(shown.out)
    config, task = plan["config"], SEQUENCE_TASKS[path.stem]
    assert config["name"] == f"lra_{path.stem}"
    assert config["task"] == "classify"
    model = config["model"]
    assert model["max_length"] == task.length
    assert model["vocab_size"] == task.n_symbols + 1
    assert model["n_classes"] == task.n_classes
    assert model["pair"] == (task.parts == 2)
    if path.stem != "listops":
        assert config["data"]["lra"]["task"] == path.stem
        missing = script("train", "--config", str(path), "data.lra.folder=nowhere")
        assert (missing.code, missing.err.count("\n")) == (2, 1)
        assert "nowhere: no such folder" in missing.err
