"""The best.ckpt of a resumed run is only kept if its score is comparable, wherever the run is stored."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.support.training_runs import tiny_run
from tnnlm.training.resume import resumed_config
from tnnlm.training.run import train

RUN, BEST, PREVIOUS = Path("runs/demo"), Path("checkpoints/best.ckpt"), Path("checkpoints/previous.ckpt")
WORSE = ("optim.lr=10", "optim.schedule=constant", "optim.grad_clip=0")
"""Settings of a resumed run that diverges, so that its validations are worse than those before."""


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def resume(run: Path, *words: str, source: Path = Path("checkpoints/last.ckpt")) -> None:
    train(resumed_config(run, [*WORSE, "trainer.max_steps=16", *words]), run, source=source)


@pytest.fixture
def trained() -> Path:
    """Train to step 8, with best.ckpt of step 8 and previous.ckpt of step 7."""
    train(tiny_run("trainer.max_steps=8", "trainer.sample_tokens=0"))
    assert (step_of(RUN / BEST), step_of(RUN / PREVIOUS)) == (8, 7)
    return RUN


@pytest.mark.parametrize("moved", [False, True])
def test_a_worse_validation_keeps_the_best_checkpoint(trained: Path, moved: bool) -> None:
    run = trained
    if moved:
        run = Path("elsewhere/copy")
        shutil.copytree(trained, run)
    before = (run / BEST).read_bytes()
    resume(run)
    assert (run / BEST).read_bytes() == before
    assert step_of(run / "checkpoints/last.ckpt") == 16


@pytest.mark.parametrize("change", ["rows", "damaged", "missing"])
def test_a_best_checkpoint_without_comparable_score_is_replaced(
    trained: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    best, words, told = trained / BEST, [], ""
    if change == "rows":
        words, told = ["data.max_val_tokens=64"], f"warning: {best}: was validated on other rows"
    elif change == "damaged":
        best.write_bytes(best.read_bytes()[:-5000])
        told = f"warning: {best}: is corrupt"
    else:
        best.unlink()
    resume(trained, *words)
    assert step_of(best) == 16
    shown = capsys.readouterr().out
    assert told in shown
    assert shown.count("warning:") == bool(told)


def test_scores_of_abandoned_steps_do_not_count() -> None:
    train(tiny_run("trainer.max_steps=8", "trainer.sample_tokens=0", "trainer.val_every_n_steps=4"))
    assert (step_of(RUN / BEST), step_of(RUN / PREVIOUS)) == (8, 7)
    resume(RUN, source=PREVIOUS)
    # Step 8 was repeated with other settings, and metrics.csv contains the repetition only.
    assert torch.load(RUN / BEST, weights_only=True)["tnnlm"]["config"]["optim"]["lr"] == 10


def test_more_validation_tokens_than_there_are_do_not_change_the_rows(trained: Path) -> None:
    before = (trained / BEST).read_bytes()
    resume(trained, "data.max_val_tokens=1000000")
    assert (trained / BEST).read_bytes() == before
