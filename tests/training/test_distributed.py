"""Distributed training over gloo: processes started by Lightning, and two machines as two torchrun groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ddp import WORKER, finish, run_worker, start
from tests.support.ranks import free_port, run_ranks
from tests.support.training_runs import SETTINGS, write_text
from tnnlm.training.loggers.csv import read_metrics


def load(path: str) -> Any:
    return torch.load(path, weights_only=True)


def test_two_ranks_equal_each_other_and_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    write_text()
    # An odd number of validation rows: 17 rows of 32 tokens.
    common = ("data.max_val_tokens=544", "trainer.precision=32-true", "trainer.sample_tokens=0")
    (one,) = run_ranks(1, *common, "data.batch_size=4", "name=one")
    weights = load("runs/one/checkpoints/last.ckpt")["state_dict"]
    run_worker(*common, "data.batch_size=2", "trainer.devices=2", "trainer.strategy=ddp", "name=two")
    first, second = load("rank0.pt"), load("rank1.pt")
    assert one["world_size"] == 1
    assert first["world_size"] == second["world_size"] == 2
    assert first["metrics"]["val/ppl"] == second["metrics"]["val/ppl"]
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
        # The global batches are the same, summed in another order.
        torch.testing.assert_close(value, weights[key], rtol=0, atol=1e-5)
    rows = [[r for r in read_metrics(Path(f"runs/{n}/metrics.csv")) if r["val/ppl"]] for n in ("one", "two")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == ["8", "16", "20"]
    for a, b in zip(*rows, strict=True):
        for key in ("val/ppl", "val/bpb", "val/ppl_recurrent"):
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-5)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["one", "two"]
    assert Path("runs/two/summary.json").is_file()
    assert load("runs/two/checkpoints/last.ckpt")["TextDataModule"] == {"samples_seen": 80, "step": 20}


def test_two_torchrun_groups_are_one_run() -> None:
    write_text()
    common = ("trainer.precision=32-true", "trainer.max_steps=8", "data.max_val_tokens=544")
    run_ranks(1, *common, "data.batch_size=4", "name=one")
    port = str(free_port())
    words = (
        "data.batch_size=2",
        "trainer.devices=1",
        "trainer.num_nodes=2",
        "trainer.strategy=fsdp",
        "name=two",
    )
    nodes = [
        start(
            *("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}"),
            *("--master-addr=127.0.0.1", f"--master-port={port}"),
            *(str(WORKER), *SETTINGS, *common, *words),
            TNNLM_CACHE=f"cache of node {node}",  # machines need not share it
        )
        for node in range(2)
    ]
    finish(*nodes)
    assert [load(f"rank{rank}.pt")["world_size"] for rank in range(2)] == [2] * 2
    one, two = (load(f"runs/{name}/checkpoints/last.ckpt") for name in ("one", "two"))
    assert one["TextDataModule"] == two["TextDataModule"]
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(value, two["state_dict"][key], rtol=0, atol=1e-6)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["one", "two"]
