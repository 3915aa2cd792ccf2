"""Training on a pretended GPU: devices, collectives and host synchronisations."""

from __future__ import annotations

import pytest

from tests.support.pretend.launch import pretended

STEPS = ("trainer.max_steps=10", "trainer.val_every_n_steps=10", "trainer.log_every_n_steps=9")


def test_one_gpu_mixes_no_devices() -> None:
    report = pretended("one_gpu", *STEPS, "trainer.precision=bf16-mixed")
    assert report["summary"]["val/ppl"] > 1
    assert report["launches"]["mm"] > 0


@pytest.mark.xfail(strict=True, reason="validation sums are on the CPU")
def test_collectives_of_several_gpus_take_tensors_of_the_gpu() -> None:
    pretended("ddp", *STEPS)


@pytest.mark.xfail(strict=True, reason="the norm of no gradients")
def test_float16_continues_after_an_overflow() -> None:
    pretended("overflow", *STEPS, "trainer.precision=16-mixed")
