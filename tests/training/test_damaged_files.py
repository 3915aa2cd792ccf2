"""Damaged files in the folder of a resumed run are rebuilt where they can be, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.scripts import assert_refused
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.slurm import record_job

GARBAGE = b"\xff\xfe\x00{\x00[1"


@pytest.mark.parametrize(
    ("name", "content"),
    [("summary.json", GARBAGE), ("summary.json", b"[1, 2]"), ("tokenizer.json", GARBAGE)],
)
def test_a_damaged_file_that_a_run_can_rebuild_is_rebuilt(
    script: Any, run_here: Path, name: str, content: bytes
) -> None:
    before = (run_here / name).read_bytes()
    (run_here / name).write_bytes(content)
    done = script("train", "--resume", "tiny", "trainer.max_steps=5", "trainer.sample_tokens=0")
    assert done.code == 0, done.err
    assert (run_here / name).read_bytes().startswith(before[:12])


def test_intact_rows_of_a_damaged_metrics_file_are_kept(script: Any, run_here: Path) -> None:
    path = run_here / "metrics.csv"
    intact = path.read_bytes()
    first = intact.splitlines(keepends=True)[1]
    damaged = intact + b"3,\xff\x00\n" + first.replace(b"4,", b"x,", 1) + b'"' * 200_000 + b"\n5,1.2"
    path.write_bytes(damaged)
    assert len(read_metrics(path)) == 2
    done = script("train", "--resume", "tiny", "trainer.max_steps=5", "trainer.log_every_n_steps=1")
    assert done.code == 0, done.err
    assert f"warning: {path}: 3 damaged rows were removed" in done.out
    assert (run_here / "metrics.damaged.csv").read_bytes() == damaged
    assert path.read_bytes().startswith(intact)
    assert [row["step"] for row in read_metrics(path)] == ["4", "4", "5", "5"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: GARBAGE.decode("latin-1"), "config.yaml"),
        (lambda text: text[: text.index("trainer:")], "is truncated, without conversion.chunk"),
        (lambda text: text.replace("d_model: 32", "d_model: 64"), "has model.d_model=64, but runs/tiny/"),
    ],
    ids=["garbage", "truncated", "changed"],
)  # fmt: skip
def test_a_damaged_configuration_is_refused(script: Any, run_here: Path, damage: Any, reason: str) -> None:
    path = run_here / "config.yaml"
    path.write_text(damage(path.read_text()), encoding="latin-1")
    assert_refused(
        script("train", "--resume", "tiny", "trainer.max_steps=5"), "runs/tiny/config.yaml: ", reason
    )


@pytest.mark.parametrize("name", ["metrics.csv", "summary.json", "tokenizer.json", "data.json"])
def test_a_folder_in_the_place_of_a_file_is_refused(script: Any, run_here: Path, name: str) -> None:
    (run_here / name).unlink()
    (run_here / name).mkdir()
    done = script("train", "--resume", "tiny", "trainer.max_steps=5")
    assert_refused(done, f"runs/tiny/{name}: is a folder, not a file; move it")


def test_an_unwritable_extra_does_not_stop_a_run(script: Any, run_here: Path) -> None:
    for name in ("loss.png", "samples.txt"):
        (run_here / name).unlink()
        (run_here / name).mkdir()
    done = script("train", "--resume", "tiny", "trainer.max_steps=5")
    assert done.code == 0, done.err
    assert f"warning: {run_here / 'loss.png'}: is a folder" in done.out
    assert f"warning: {run_here / 'samples.txt'}: is a folder" in done.out


def test_a_damaged_record_of_a_job_is_refused(script: Any, run_here: Path) -> None:
    record_job(run_here, "nightly")
    (run_here / "job.json").write_bytes(GARBAGE)
    assert_refused(script("train", "--job", "nightly"), "runs/tiny/job.json: is damaged; restore it")
