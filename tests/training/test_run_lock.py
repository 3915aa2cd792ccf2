"""Only one process at a time trains a run; the other one is refused in one line and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
from lightning.pytorch.callbacks import Callback

from tests.support.scripts import Result, assert_refused
from tests.support.training_runs import tiny_run
from tests.support.unchanged import files_under
from tnnlm.errors import CheckpointError
from tnnlm.files import only_process
from tnnlm.training.resume import resumed_config
from tnnlm.training.run import train

RUN = Path("runs/demo")
QUICK = ("trainer.sample_tokens=0", "checkpoint.every_n_steps=1")


class ResumeMeanwhile(Callback):
    """Callback that resumes the run that is being trained, by another path, as a second process would."""

    def __init__(self, script: Any) -> None:
        self.script = script
        self.result: Result | None = None

    def on_before_backward(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Resume once, in step 2."""
        if trainer.global_step == 2 and self.result is None:
            before = files_under(RUN)
            Path("link").symlink_to(RUN)
            self.result = self.script("train", "--resume", "link", "trainer.max_steps=9")
            assert files_under(RUN) == before


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_that_is_being_trained_is_refused(script: Any, resumed: bool) -> None:
    second, run = ResumeMeanwhile(script), None
    config = tiny_run(*QUICK, "trainer.max_steps=3")
    if resumed:
        train(tiny_run(*QUICK, "trainer.max_steps=1"))
        run, config = RUN, resumed_config(RUN, ["trainer.max_steps=3"])
    train(config, run, extra_callbacks=[second])
    assert second.result is not None
    assert_refused(
        second.result, "link: is being trained by another process (process ", "); wait until it ends"
    )
    assert script("train", "--resume", "demo", "trainer.max_steps=4").code == 0
    assert not list(Path("runs").glob(".*"))


def test_the_lock_file_of_a_killed_process_blocks_nothing() -> None:
    train(tiny_run(*QUICK, "trainer.max_steps=1"))
    Path("runs/.demo.lock").touch()
    train(resumed_config(RUN, ["trainer.max_steps=2"]), RUN)


def test_only_the_main_process_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny_run(*QUICK, "trainer.max_steps=1"))
    config = resumed_config(RUN, [])
    with only_process(RUN.resolve(), CheckpointError("locked")):
        with pytest.raises(CheckpointError, match="by another process"):
            train(config, RUN)
        monkeypatch.setattr("tnnlm.training.run.is_main_process", lambda: False)
        with pytest.raises(CheckpointError, match="is complete"):
            train(config, RUN)
