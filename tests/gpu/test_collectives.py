"""Training of several ranks with DDP and FSDP2, whose collectives NCCL would take.

These are real processes over gloo on CPU tensors, because the reducers do not take the tensors of a pretended
GPU, on which ``test_pretended_training.py`` checks devices. Counts are printed: ``pytest -s``.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.nccl import AsNccl
from tests.support.ranks import run_ranks
from tests.support.training_runs import write_text
from tnnlm.training.loggers.csv import read_metrics

RUN = (
    "model.max_length=16",
    "data.max_val_tokens=200",
    "trainer.max_steps=6",
    "trainer.val_every_n_steps=6",
    "trainer.log_every_n_steps=5",
    "trainer.sample_tokens=2",
    "checkpoint.every_n_steps=6",
    "trainer.precision=bf16-mixed",
)
BETWEEN_ROWS = range(2, 5)
"""Steps before the first row of the log, and after those in which DDP chooses its buckets."""
ON_HOST = ("tnnlm/training/callbacks/skip_steps.py", "lightning/pytorch/strategies/parallel.py")
"""Places that read tensors which are on the host in a run on GPUs: the copy of the last step's loss that is
finished already, and the vote of all ranks, which is over gloo there."""
CALLBACK = "lightning/pytorch/trainer/call.py"
"""Place of what the callback of the test reads."""
MOST = {"ddp": 5, "fsdp": 20}
"""Largest number of collectives per step: two of the vote, one of the loss that is checked, and those of the
strategy. DDP reduces the gradients in one bucket and broadcasts buffers; FSDP2 gathers three units and two of
them again, reduces three, and computes the norm of sharded gradients twice."""


def per_step(held: dict[str, Any]) -> Counter[str]:
    """Return the collectives of a step, which must be the same in all steps between two rows of the log."""
    steps = [
        Counter({f"{name} {dtype}": n for step, name, dtype, _, n in held["collectives"] if step == which})
        for which in BETWEEN_ROWS
    ]
    assert all(step == steps[0] for step in steps)
    return steps[0]


@pytest.mark.parametrize(("strategy", "afterwards"), [("ddp", 3), ("fsdp", 1)])
def test_ranks_train_validate_save_and_resume_on_another_number(strategy: str, afterwards: int) -> None:
    write_text()
    held = run_ranks(2, *RUN, f"trainer.strategy={strategy}", "data.batch_size=3", "name=run", as_nccl=True)
    for rank in held:
        assert {device for _, _, _, device, _ in rank["collectives"]} == {"cpu"}
        assert 0 < per_step(rank).total() <= MOST[strategy]
        waits = {where for step, _, where, _ in rank["syncs"] if step in BETWEEN_ROWS}
        assert {where.rsplit(":")[0] for where in waits} <= {*ON_HOST, CALLBACK}
    print(f"{strategy}: {dict(per_step(held[0]))} per step")
    batch = f"data.batch_size={6 // afterwards}"
    more = ("trainer.max_steps=8", "trainer.val_every_n_steps=8")
    resumed = run_ranks(afterwards, batch, *more, resume="runs/run", as_nccl=True)
    assert [rank["world_size"] for rank in resumed] == [afterwards] * afterwards
    scores = [row for row in read_metrics(Path("runs/run/metrics.csv")) if row["val/ppl"]]
    assert [row["step"] for row in scores] == ["6", "8"]
    for row in scores:
        assert float(row["val/ppl_recurrent"]) == pytest.approx(float(row["val/ppl"]), rel=1e-3)


def test_what_nccl_refuses_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with AsNccl().everywhere() as mode:
            gloo = dist.new_group(backend="gloo")
            dist.monitored_barrier(gloo)
            dist.all_reduce(torch.ones(2))
            with pytest.raises(RuntimeError, match="does not support monitored_barrier"):
                dist.monitored_barrier()
            with pytest.raises(RuntimeError, match="contiguous"):
                dist.broadcast(torch.ones(2, 3).T, 0)
            with pytest.raises(RuntimeError, match=r"Unconvertible NCCL type torch\.int16"):
                dist.all_reduce(torch.ones(2, dtype=torch.int16))
    finally:
        dist.destroy_process_group()
    assert mode.collectives[-1, "allreduce_", "torch.float32", "cpu"] == 1
