"""Loggers, callbacks and profilers by class path: they run, or are refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.scripts import assert_refused
from tests.support.training_runs import SETTINGS, write_text
from tnnlm.config.loader import config_from_dict, config_to_dict, config_to_yaml, load_config
from tnnlm.errors import ConfigError
from tnnlm.training.loggers.csv import read_metrics

MODULE = '''
from pathlib import Path
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

class Steps(Callback):
    """Callback that counts optimizer steps, also over a resume."""

    def __init__(self, path="steps.txt", tags=()):
        self.path, self.tags, self.steps = path, tags, 0

    def on_train_batch_end(self, *args):
        self.steps += 1

    def on_train_end(self, *args):
        Path(self.path).write_text(f"{self.steps} {self.tags}")

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]

class Broken(Callback):
    def __init__(self):
        raise RuntimeError("no licence\\nfound")

class Exits(Callback):
    def __init__(self):
        raise SystemExit(7)

class Rows(CSVLogger):
    hyperparameters = None

    def log_hyperparams(self, params=None):
        Rows.hyperparameters = Rows.hyperparameters or params
'''
SHORT = (
    "trainer.max_steps=6",
    "trainer.val_every_n_steps=6",
    "checkpoint.every_n_steps=3",
    "trainer.log_every_n_steps=2",
)


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch, _quiet: None) -> str:
    """Write a module with own classes to the current folder, where Python finds it; return its name."""
    write_text()
    name = "own_parts"
    Path(f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    return name


def test_named_classes_run_and_run_again_on_resume(mine: str, script: Any) -> None:
    Path("run.yaml").write_text(
        f"trainer:\n  callbacks: [{{class_path: {mine}.Steps, init_args: {{tags: [1, 1e3, 'on', true]}}}}]\n"
        f"  loggers:\n  - class_path: {mine}.Rows\n    init_args: {{name: '', version: ''}}\n"
        "  profiler: simple\n"
    )
    done = script("train", "--config", "run.yaml", *SETTINGS, *SHORT)
    assert done.code == 0, done.err
    assert Path("steps.txt").read_text() == "6 [1, 1000.0, 'on', True]"
    run = Path("runs/demo")
    own, theirs = read_metrics(run / "metrics.csv"), read_metrics(run / "loggers/metrics.csv")
    assert [row["train/loss"] for row in own] == [row["train/loss"] for row in theirs]
    assert all(float(row["train/data_seconds"]) > 0 for row in own if row["train/loss"])
    from own_parts import Rows  # type: ignore[import-not-found]

    assert Rows.hyperparameters["optim"]["lr"] == 2e-3
    profile = (run / "profile/fit-steps.txt").read_text()
    assert "run_training_epoch" in profile
    more = ("train", "--resume", "demo", "trainer.max_steps=8")
    refused = script(*more)
    assert_refused(
        refused, f"trainer.loggers={mine}.Rows, trainer.callbacks={mine}.Steps: is code that the run"
    )
    assert "--trust-code" in refused.err
    assert "trainer.loggers=[] trainer.callbacks=[]" in refused.err
    assert Path("steps.txt").read_text().startswith("6 ")
    done = script(*more, "--trust-code")
    assert done.code == 0, done.err
    assert Path("steps.txt").read_text().startswith("8 ")
    done = script(
        "train", "--resume", "demo", "trainer.max_steps=9", "trainer.loggers=[]", "trainer.callbacks=[]"
    )
    assert done.code == 0, done.err
    assert Path("steps.txt").read_text().startswith("8 ")


REFUSED = {
    "trainer.callbacks=Timer": "trainer.callbacks: Timer: is no class path",
    "trainer.callbacks=own_parts.Missing": "own_parts has no class Missing",
    "trainer.callbacks=missing.package.Class": "can't be imported (ModuleNotFoundError",
    "trainer.callbacks=own_parts.Rows": "is not a Callback of lightning.pytorch",
    "trainer.loggers=own_parts.Steps": "is not a Logger of lightning.pytorch",
    "trainer.loggers=lightning.pytorch.loggers.Logger": "is abstract",
    "trainer.callbacks=[{class_path: own_parts.Steps, init_args: {pat: x}}]": "keyword argument 'pat'",
    "trainer.callbacks=own_parts.Exits": "can't be made (SystemExit: 7)",
    "trainer.callbacks=lightning.pytorch.callbacks.RichProgressBar": "is a progress bar, and every run has",
    "trainer.callbacks=own_parts.Broken": "can't be made (RuntimeError: no licence)",
    "trainer.callbacks=[{class_path: own_parts.Steps, args: 1}]": "args is neither class_path nor init_args",
    "trainer.callbacks=[{class_path: own_parts.Steps, init_args: 1}]": "init_args is not a mapping",
    "trainer.callbacks=[{init_args: {}}]": "expected a class path",
    "trainer.callbacks=[a b]": "expected a class path",
    "trainer.callbacks=[{": "is not valid YAML",
    "trainer.profiler=fast": "trainer.profiler: fast: is no class path",
    "trainer.profiler=own_parts.Steps": "is not a Profiler of lightning.pytorch",
}


@pytest.mark.parametrize("word", REFUSED)
def test_classes_that_cannot_be_used_are_refused_in_one_line(word: str, mine: str, script: Any) -> None:
    assert_refused(script("train", *SETTINGS, word), word.partition("=")[0], REFUSED[word])
    assert not list(Path().glob("runs/*"))


@pytest.mark.parametrize(
    "value", [3, True, [1], [None], {}, {"class_path": 3}, {"class_path": ""}, [["a.B"]], "a\0"]
)
@pytest.mark.parametrize("key", ["callbacks", "loggers", "profiler"])
def test_stored_values_of_another_form_are_refused(key: str, value: Any) -> None:
    data = config_to_dict(load_config(None))
    data["trainer"][key] = value
    with pytest.raises(ConfigError, match=rf"^trainer\.{key}=.*\(old\.ckpt\)") as raised:
        config_from_dict(data, "old.ckpt")
    assert str(raised.value).isprintable()


def test_components_are_kept_as_they_were_given() -> None:
    words = (
        "trainer.callbacks=a.B",
        "trainer.callbacks=c.D",
        "trainer.loggers=[{class_path: e.F, init_args: "
        r"{a: '1e3', b: 1e3, c: null, d: {e: ['${seed}', '\${x}']}}}]",
        "trainer.profiler=pytorch",
        "seed=7",
    )
    config = load_config(None, words)
    assert config.trainer.callbacks == [{"class_path": "a.B"}, {"class_path": "c.D"}]
    arguments = {"a": "1e3", "b": 1000.0, "c": None, "d": {"e": ["7", "${x}"]}}
    assert config.trainer.loggers == [{"class_path": "e.F", "init_args": arguments}]
    Path("config.yaml").write_text(config_to_yaml(config))
    for again in (
        load_config("config.yaml"),
        load_config("config.yaml", saved=True),
        config_from_dict(config_to_dict(config)),
    ):
        assert again == config
    assert (
        load_config("config.yaml", ["trainer.callbacks=[]", "trainer.profiler=null"]).trainer.profiler is None
    )
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_config(
            None, ["trainer.callbacks=[{class_path: a.B, init_args: {a: " + "[" * 30 + "]" * 30 + "}}]"]
        )
