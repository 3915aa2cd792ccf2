"""A refused start or resume blames the setting that is wrong, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.scripts import assert_refused
from tests.support.training_runs import SETTINGS, write_text


@pytest.mark.parametrize(
    ("words", "blamed"),
    [
        # The first setting is fixed, but unchanged: the second one is wrong.
        (("seed=0", "trainer.max_steps=none"), "trainer.max_steps=none: expected an integer"),
        (("model.d_model=32", "optim.lr=-1"), "optim.lr=-1: must be above 0"),
        (("task=causal", "data.source=listops"), "data.source=listops: can't be used with task=causal"),
        (("model.widht=3",), "model.widht: "),
        (("data.maskx=1", "trainer.max_steps=9"), "data.maskx: "),
        # The fixed setting doesn't fit the other ones.
        (("trainer.max_steps=9", "task=classify"), "task=classify: can't be changed on resume"),
        (("seed=x",), "seed=x: can't be changed on resume"),
    ],
)
def test_resume_blames_the_setting_that_is_wrong(
    script: Any, run_here: Path, words: tuple[str, ...], blamed: str
) -> None:
    assert_refused(script("train", "--resume", "tiny", *words), f"error: {blamed}")


def test_a_setting_that_changes_the_data_is_reported(script: Any, run_here: Path) -> None:
    words = ("data.val_fraction=0.2", "data.batch_size=2", "trainer.max_steps=9")
    done = script("train", "--resume", "tiny", *words)
    assert_refused(done, "its data has changed", "or omit data.val_fraction=0.2, or start a new run")


def test_a_checkpoint_of_another_trainer_is_refused(script: Any, run_here: Path) -> None:
    last = run_here / "checkpoints/last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    del checkpoint["TextDataModule"]
    torch.save(checkpoint, last)
    done = script("train", "--resume", "tiny", "trainer.max_steps=9")
    assert_refused(done, f"{last}: was not saved by train.py, it lacks TextDataModule")


def test_a_file_in_the_place_of_a_folder_is_reported(script: Any) -> None:
    write_text()
    Path("file").touch()
    for folder in ("file", "file/deeper"):
        done = script("train", *SETTINGS, f"runs_dir={folder}")
        assert_refused(done, f"error: {folder}/demo: ", "file is a file, not a folder; choose another path")
    Path("runs").mkdir()
    Path("runs/demo").touch()
    assert_refused(script("train", "--resume", "demo"), "demo: no such run", "train one with: ")
    Path("runs/demo-9").mkdir()
    assert_refused(script("train", "--resume", "demo-8"), "demo-8: no such run", "; did you mean demo-9?")
    done = script("train", *SETTINGS, "trainer.max_steps=1", "trainer.sample_tokens=0")
    assert done.code == 0, done.err
    assert Path("runs/demo-2/summary.json").is_file()


@pytest.mark.parametrize(
    ("words", "blamed"),
    [
        (("trainer.accelerator=foo",), "trainer.accelerator=foo: expected one of auto, cpu, "),
        (("trainer.strategy=foo",), "trainer.strategy=foo: expected one of auto, ddp, "),
        (
            ("task=classify", "data.source=listops", "model.n_classes=10", "model.pair=true"),
            "model.pair=true: listops needs pair=false",
        ),
    ],
)
def test_dry_run_refuses_what_the_run_refuses(script: Any, words: tuple[str, ...], blamed: str) -> None:
    for option in (("--dry-run",), ()):
        assert_refused(script("train", *option, *words), f"error: {blamed}")
    assert not Path("runs").exists()


def test_steps_that_will_be_repeated_are_announced(script: Any, run_here: Path) -> None:
    words = ("trainer.max_steps=9", "trainer.sample_tokens=0")
    done = script("train", "--resume", "tiny", "--from", "previous", *words)
    assert done.code == 0, done.err
    assert "previous.ckpt is of step 0; steps 1 to " in done.out


@pytest.mark.parametrize(
    "words",
    [
        ("trainer.strategy=fsdp", "trainer.precision=16-mixed"),
        ("trainer.strategy=hsdp", "trainer.precision=bf16-true"),
        ("trainer.strategy=fsdp", "trainer.precision=32-true", "trainer.ema_decay=0.9"),
        ("trainer.precision=bf16-true", "trainer.ema_decay=0.9"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses_before_it_reads_data(
    script: Any, words: tuple[str, ...]
) -> None:
    given = (*words, "trainer.accelerator=cpu", "data.source=files", "data.files=none.txt")
    run, dry_run = script("train", *given), script("train", "--dry-run", *given)
    assert (run.code, dry_run.code) == (2, 2)
    assert run.err == dry_run.err
    assert "not supported" in run.err or "requires float32 weights" in run.err
