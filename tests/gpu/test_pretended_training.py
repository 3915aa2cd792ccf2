"""Training on a pretended GPU: devices, collectives and host synchronisations."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.pretend.launch import pretended
from tnnlm.training.loggers.csv import read_metrics

STEPS = (
    "trainer.max_steps=10",
    "trainer.val_every_n_steps=10",
    "trainer.log_every_n_steps=9",
    "checkpoint.every_n_steps=100",
)


MOST_LAUNCHES = 900
"""Largest number of launches per optimizer step between two rows of the log."""
EVERYTHING = ("trainer.ema_decay=0.9", "trainer.spike_factor=5", "trainer.accumulate=2")


def steps_that_wait(report: dict[str, Any]) -> set[tuple[int, str, str]]:
    """Return the synchronisations after the first step and before the first row of the log."""
    return {(step, kind, place) for step, kind, place, _ in report["syncs"] if 1 <= step < 9}


def test_one_gpu_mixes_no_devices_and_waits_for_it_only_to_log() -> None:
    report = pretended("one_gpu", *STEPS, *EVERYTHING, "trainer.precision=bf16-mixed")
    assert report["summary"]["val/ppl"] > 1
    assert math.isfinite(report["summary"]["val/ppl_recurrent"])
    between = report["steps"][1:8]
    print(f"launches per step of two micro-batches and two layers: {between}")
    assert between == between[:1] * 7
    assert 0 < between[0] <= MOST_LAUNCHES
    assert report["launches"]["mm"] > 0
    assert report["launches"]["row_conv_backward" if find_spec("triton") else "circular_conv_backward"] > 0
    assert steps_that_wait(report) == set()
    assert any(step == 9 for step, *_ in report["syncs"]), "step 9 is logged"


def test_a_run_resumes_between_two_rows_of_the_log() -> None:
    pretended("resumed", *STEPS, *EVERYTHING, "trainer.recompute=true")
    assert read_metrics(Path("runs/demo/metrics.csv"))[-1]["step"] == "10"


def test_no_kernel_copies_from_the_host_or_waits_for_the_gpu() -> None:
    names = ("tno", "fd_tno", "sgconv", "rtf", "hyena")
    report = pretended("taps", *names)
    assert {(kernel, place) for kernel, _, place, _ in report["syncs"] if kernel in names} == set()
    assert report["launches"]["sum"] >= len(names)


def test_collectives_of_several_gpus_take_tensors_of_the_gpu() -> None:
    report = pretended("ddp", *STEPS, *EVERYTHING)
    assert {name for name, *_ in report["collectives"]} >= {"all_reduce", "all_gather"}
    assert steps_that_wait(report) == set()


def test_float16_goes_all_the_way_after_overflows() -> None:
    steps = ("trainer.max_steps=3", "trainer.val_every_n_steps=3", "trainer.log_every_n_steps=1")
    report = pretended("float16", *steps, "trainer.sample_tokens=2")
    rows = [row for row in read_metrics(Path("runs/demo/metrics.csv")) if row["train/loss"]]
    assert [float(row["train/skipped"]) for row in rows] == [1, 1, 2, 2]
    # A skipped step has no norm; the first step after it has one again.
    assert [bool(row["train/grad_norm"]) for row in rows] == [False, True, False, True]
    assert all(math.isfinite(float(row["train/grad_norm"] or 0)) for row in rows)
    start, end, resumed, after = report["scales"]
    assert (end, resumed, after) == (start / 4, end, end)  # each overflow halves it
    scores = [row for row in read_metrics(Path("runs/demo/metrics.csv")) if row["val/ppl"]]
    assert [row["step"] for row in scores] == ["3", "4"]
    for row in scores:
        assert float(row["val/ppl_recurrent"]) == pytest.approx(float(row["val/ppl"]), rel=1e-3)
    assert not any("optimizer.step" in message for message in report["warnings"])
    assert {found["text"] for found in report["engines"].values()} == {report["cpu"]}
