"""Training on a pretended GPU: devices, collectives and host synchronisations."""

from __future__ import annotations

import math
from pathlib import Path

from tests.support.pretend.launch import pretended
from tnnlm.training.loggers.csv import read_metrics

STEPS = ("trainer.max_steps=10", "trainer.val_every_n_steps=10", "trainer.log_every_n_steps=9")


def test_one_gpu_mixes_no_devices() -> None:
    report = pretended("one_gpu", *STEPS, "trainer.precision=bf16-mixed")
    assert report["summary"]["val/ppl"] > 1
    assert report["launches"]["mm"] > 0


def test_collectives_of_several_gpus_take_tensors_of_the_gpu() -> None:
    pretended("ddp", *STEPS)


def test_float16_continues_after_an_overflow() -> None:
    pretended("overflow", *STEPS, "trainer.precision=16-mixed")
    row = next(row for row in read_metrics(Path("runs/demo/metrics.csv")) if row["train/loss"])
    assert float(row["train/skipped"]) == 1
    assert math.isfinite(float(row["train/grad_norm"]))  # the mean of the steps that were not skipped
