"""Training on a weighted mixture, stopped and resumed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.support.training_runs import OTHER_DATA, write_text
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.errors import CheckpointError
from tnnlm.training.callbacks.checkpoint import TrainingStopped
from tnnlm.training.resume import resumed_config
from tnnlm.training.run import train

SOURCES = "[{files: text.txt, weight: 3}, {files: other.txt, weight: 1}, {files: third.txt, weight: 1}]"


class StopIn(Callback):
    """Callback that requests a stop within a step, and records the batches that are read."""

    def __init__(self, step: int | None) -> None:
        self.step = step
        self.batches: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: lightning.Trainer, _: Any, batch: Any, batch_idx: int) -> None:
        """Record the batch, and send SIGTERM once."""
        self.batches.append(batch.clone())
        if trainer.global_step == self.step:
            self.step = None
            os.kill(os.getpid(), signal.SIGTERM)


def config_of(name: str, sources: str = SOURCES) -> Config:
    text = write_text().read_text(encoding="utf-8")
    Path("other.txt").write_text(text.upper()[:8_000], encoding="utf-8")
    Path("third.txt").write_text(text[::-1][:8_000], encoding="utf-8")
    words = (f"name={name}", f"data.sources={sources}", "trainer.max_steps=8", "trainer.sample_tokens=0")
    return load_config(None, [*OTHER_DATA, *words])


def test_a_resumed_mixture_reads_the_same_batches_and_ends_with_the_same_weights() -> None:
    whole, first, second = StopIn(None), StopIn(3), StopIn(None)
    train(config_of("whole"), extra_callbacks=[whole])
    with pytest.raises(TrainingStopped):
        train(config_of("broken"), extra_callbacks=[first])
    run = Path("runs/broken")
    train(resumed_config(run, []), run, extra_callbacks=[second])
    assert len(whole.batches) == 8
    assert torch.equal(torch.stack([*first.batches, *second.batches]), torch.stack(whole.batches))
    weights = [
        torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "broken")
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    other = [f"data.sources={SOURCES.replace('weight: 3', 'weight: 2')}", "trainer.max_steps=9"]
    with pytest.raises(CheckpointError, match=r"sources are 50\.00%, 25\.00%, 25\.00%"):
        train(resumed_config(run, other), run)
