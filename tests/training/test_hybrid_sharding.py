"""Hybrid sharding (HSDP) on a mesh of 2 x 2 ranks, compared with training on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.training_runs import write_text
from tnnlm.checkpoints.training import load_checkpoint
from tnnlm.config.loader import load_config
from tnnlm.errors import ConfigError
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.memory import estimate_memory

WORDS = (
    "data.max_val_tokens=544",
    "trainer.precision=32-true",
    "trainer.max_steps=20",
    "trainer.val_every_n_steps=20",
    "trainer.log_every_n_steps=1",
    "trainer.sample_tokens=3",
)
HSDP = ("trainer.strategy=hsdp", "trainer.shard_size=2", "data.batch_size=1")


def rows(name: str, key: str) -> list[float]:
    return [float(row[key]) for row in read_metrics(Path(f"runs/{name}/metrics.csv")) if row[key]]


def test_two_groups_of_two_ranks_equal_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TNNLM_CACHE", str(tmp_path / "cache"))
    write_text()
    run_ranks(1, *WORDS, "name=one")
    held = run_ranks(4, *WORDS, *HSDP, "name=four")
    assert [h["world_size"] for h in held] == [4] * 4
    # Every rank reads other rows, and all ranks have the same gradients after they are reduced.
    assert len({tuple(h["rows"][0]) for h in held}) == 4
    assert len({tuple(h["gradients"]) for h in held}) == 1
    assert len(rows("four", "train/loss")) == 20
    assert rows("four", "train/loss") == pytest.approx(rows("one", "train/loss"), abs=1e-5, rel=0)
    for key in ("val/ppl", "val/ppl_recurrent"):
        assert rows("four", key) == pytest.approx(rows("one", key), rel=1e-5)
    mine, one = (
        load_checkpoint(Path(f"runs/{name}/checkpoints/last.ckpt")).model.state_dict()
        for name in ("four", "one")
    )
    for key, value in mine.items():
        torch.testing.assert_close(value, one[key], rtol=0, atol=1e-6)


def test_a_shard_size_must_divide_the_devices_and_have_a_use(script: Any) -> None:
    common = ("trainer.accelerator=cpu", "trainer.precision=32-true", "name=refused")
    for words, message in (
        (("trainer.strategy=hsdp", "trainer.devices=4", "trainer.shard_size=3"), "must divide the number of"),
        (("trainer.strategy=fsdp", "trainer.shard_size=2"), "is for trainer.strategy=hsdp only"),
    ):
        result = script("train", *common, *words)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert message in result.err
    assert not Path("runs/refused").exists()


def test_dry_run_counts_the_shard_of_a_group() -> None:
    def memory(*words: str) -> int:
        given = ["trainer.accelerator=cpu", "trainer.devices=8", "trainer.num_nodes=2", *words]
        return estimate_memory(load_config(None, given)).peak

    sixteen = memory("trainer.strategy=fsdp")
    node = memory("trainer.strategy=hsdp")
    assert node == memory("trainer.strategy=hsdp", "trainer.shard_size=8")
    assert sixteen == memory("trainer.strategy=hsdp", "trainer.shard_size=16")
    assert sixteen < node < memory("trainer.strategy=ddp")
    with pytest.raises(ConfigError, match=r"trainer\.shard_size=5: must divide the number of devices, 16"):
        memory("trainer.strategy=hsdp", "trainer.shard_size=5")
