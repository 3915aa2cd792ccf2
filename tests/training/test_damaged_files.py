"""Damaged files in the folder of a resumed run are rebuilt where they can be, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.scripts import assert_refused
from tnnlm.config.loader import load_config
from tnnlm.errors import CheckpointError
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.slurm import find_job, record_job

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
        (lambda text: text.replace("d_model: 32", "d_model: 64"), "is damaged or was changed"),
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


def test_a_damaged_record_of_a_job_is_refused_if_its_run_may_be_of_the_job(
    run_here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record_job(run_here, "nightly")
    (run_here / "job.json").write_bytes(GARBAGE)
    same = load_config(run_here / "config.yaml", saved=True)
    with pytest.raises(CheckpointError, match=r"tiny/job\.json: is damaged .*; restore it, or remove it"):
        find_job("nightly", same)
    other = load_config(run_here / "config.yaml", ["seed=7"], saved=True)
    assert find_job("nightly", other) is None
    skipped = "job.json: is damaged (not UTF-8 text, byte 0); it was skipped, its run has "
    assert f"{skipped}other settings than this job" in caplog.text
    (run_here / "config.yaml").write_bytes(GARBAGE)
    assert find_job("nightly", other) is None
    assert f"{skipped}no readable config.yaml" in caplog.text


def test_the_record_of_another_run_is_refused(run_here: Path) -> None:
    config = load_config(run_here / "config.yaml", saved=True)
    record_job(run_here, "nightly")
    moved = run_here.rename(run_here.with_name("moved"))  # by the user
    assert find_job("nightly", config) == moved
    Path("runs/other").mkdir()
    record_job(Path("runs/other"), "nightly")
    Path("runs/other/job.json").replace(moved / "job.json")
    with pytest.raises(CheckpointError, match="is the record of the run 'other'"):
        find_job("nightly", config)


def test_edited_settings_and_records_without_checksum(
    script: Any, run_here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = run_here / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("dropout: 0.0", "dropout: 0.5"))
    assert path.read_text() != text
    assert_refused(script("train", "--resume", "tiny"), "config.yaml: is damaged or was changed", "key=value")
    path.write_text("".join(text.splitlines(keepends=True)[:-1]))  # as older versions wrote it
    assert_refused(script("train", "--resume", "tiny"), "runs/tiny: is complete at step 4")
    assert "config.yaml: not verified: written by an older version" in caplog.text
