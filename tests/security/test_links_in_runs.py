"""A link or a pipe in the folder of a stranger's run leads no output of tnnlm to another file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.training_runs import tiny_run
from tnnlm.errors import UserError
from tnnlm.files import append_text
from tnnlm.training.loggers.csv import MetricsCSV, read_metrics
from tnnlm.training.resume import check_outputs
from tnnlm.training.sharded_save import _place

posix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows needs a privilege to create links")


@pytest.fixture
def victim() -> Path:
    path = Path("profile").absolute()
    path.write_text("mine\n")
    return path


@posix
def test_appending_replaces_a_link(victim: Path) -> None:
    Path("samples.txt").symlink_to(victim)
    append_text(Path("samples.txt"), "one\n")
    append_text(Path("samples.txt"), "two\n")
    assert victim.read_text() == "mine\n"
    assert Path("samples.txt").read_text() == "one\ntwo\n"


@posix
def test_appending_to_a_pipe_is_refused_without_waiting() -> None:
    os.mkfifo("samples.txt")
    with pytest.raises(UserError, match="not a regular file"):
        append_text(Path("samples.txt"), "one\n")


@posix
@pytest.mark.parametrize("name", ["metrics.csv", "metrics.damaged.csv"])
@pytest.mark.parametrize("resumed", [None, 3])
def test_metrics_are_not_written_through_a_link(name: str, resumed: int | None, victim: Path) -> None:
    Path("metrics.csv").write_text("step,train/loss,crc32\n1,2.0,damaged\n")
    if name == "metrics.csv":
        Path(name).rename("elsewhere.csv")
        victim = Path("elsewhere.csv").absolute()
    before = victim.read_text()
    Path(name).symlink_to(victim)
    logger = MetricsCSV(Path("metrics.csv"), tiny_run(), resumed)
    logger.log_metrics({"train/loss": 1.5}, 4)
    logger.log_metrics({"train/loss": 1.25}, 5)
    assert victim.read_text() == before
    if name == "metrics.csv" or resumed is not None:
        assert [row["step"] for row in read_metrics(Path("metrics.csv"))] == ["4", "5"]


@posix
def test_conversion_is_not_written_through_a_link_of_a_run(run_here: Path, script: Any) -> None:
    mine = Path("mine")
    assert script("convert", "runs/tiny", "--out", str(mine)).code == 0
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    (run_here / "converted").symlink_to(mine.absolute())
    done = script("convert", "runs/tiny", "--force", "--method", "window")
    assert done.code == 2
    assert f"converted: is a symbolic link to {mine.absolute()}; delete the link" in done.err
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before
    # A folder that the user names may be a link.
    assert script("convert", "runs/tiny", "--force", "--out", str(run_here / "converted")).code == 0


@posix
def test_export_does_not_replace_the_target_of_a_link(run_here: Path, script: Any) -> None:
    assert script("convert", "runs/tiny", "--out", "theirs").code == 0
    Path("papers").mkdir()
    Path("papers/mine.txt").write_text("mine\n")
    Path("theirs/export").symlink_to(Path("papers").absolute())
    done = script("convert", "theirs", "--export")
    assert done.code == 2
    assert "theirs/export: is a symbolic link to" in done.err
    assert [path.name for path in Path("papers").iterdir()] == ["mine.txt"]


@posix
@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "wandb", "loggers", "profile"])
def test_resume_does_not_follow_a_folder_that_is_a_link(name: str, run_here: Path, script: Any) -> None:
    mine = Path("mine").absolute()
    if (run_here / name).exists():
        (run_here / name).rename(mine)
    mine.mkdir(exist_ok=True)
    (run_here / name).symlink_to(mine)
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    done = script("train", "--resume", "tiny", "trainer.max_steps=6")
    assert done.code == 2
    assert f"runs/tiny/{name}: is a symbolic link to {mine}; put the folder itself" in done.err
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before


@posix
def test_logs_are_not_written_through_a_link(run_here: Path, victim: Path) -> None:
    for log in (
        "tensorboard/hparams.yaml",
        "wandb/run-1",
        "loggers/a/b/metrics.csv",
        "profile/fit-steps.txt",
    ):
        path = run_here / log
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        for target in (victim, Path("new").absolute()):
            path.symlink_to(target)
            with pytest.raises(UserError, match=f"{log}: is a symbolic link to {target}; delete the link"):
                check_outputs(run_here)
            path.unlink()
    (run_here / "wandb/latest-run").symlink_to("run-1")
    check_outputs(run_here)


@posix
def test_shards_are_not_written_next_to_the_target_of_a_link() -> None:
    Path("run/checkpoints").mkdir(parents=True)
    Path("link").symlink_to("run")
    Path("run/checkpoints/last.ckpt").symlink_to(Path("mine.ckpt").absolute())
    here = Path("run/checkpoints/last.ckpt").absolute()
    assert _place(Path("link/checkpoints/last.ckpt")) == _place(here) == here.parent.resolve() / "last.ckpt"


def test_rows_of_earlier_damage_are_kept() -> None:
    path = Path("metrics.csv")
    for value in ("first", "second"):
        path.write_text(f"step,train/loss,crc32\n1,2.0,{value}\n")
        MetricsCSV(path, tiny_run(), 3).log_metrics({"train/loss": 1.5}, 4)
    assert "first" in Path("metrics.damaged.csv").read_text()
    assert "second" in Path("metrics.damaged-2.csv").read_text()
