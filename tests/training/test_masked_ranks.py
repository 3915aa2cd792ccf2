"""Runs with task=masked on two ranks, with whole or sharded weights, equal a run on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.training_runs import write_text
from tnnlm.training.loggers.csv import read_metrics


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_equal_one(strategy: str) -> None:
    write_text()
    # An odd number of validation rows: 17 rows of 32 tokens.
    common = ("task=masked", "trainer.max_steps=9", "data.max_val_tokens=544", "trainer.precision=32-true")
    run_ranks(1, *common, "data.batch_size=4", "name=one")
    two = run_ranks(2, *common, "data.batch_size=2", f"trainer.strategy={strategy}", "name=two")
    assert two[0]["metrics"]["val/ppl_masked"] == two[1]["metrics"]["val/ppl_masked"]
    weights: list[Any] = [
        torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("one", "two")
    ]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=0, atol=1e-5)
    rows = [read_metrics(Path(f"runs/{name}/metrics.csv")) for name in ("one", "two")]
    ppl = [[float(row["val/ppl_masked"]) for row in part if row["val/ppl_masked"]] for part in rows]
    assert ppl[0] == pytest.approx(ppl[1], rel=1e-5)
