"""Checkpoints are written atomically and contain plain data only; settings of the CUDA allocator."""

from __future__ import annotations

import errno
import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from tests.support.training_runs import tiny_run
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.training.callbacks.checkpoint import AtomicCheckpointIO, TrainingStopped
from tnnlm.training.run import train


def test_full_disk_leaves_the_checkpoint_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def half(checkpoint: Any, target: Any) -> None:
        target.write(b"half")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos")  # the order in which torch writes

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match=r"space.*last\.ckpt"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["last.ckpt"]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_stop_before_the_first_step_reports_what_is_saved(
    sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopAtOnce(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    # A sharded run starts without a checkpoint.
    monkeypatch.setattr("tnnlm.training.callbacks.checkpoint.is_sharded", lambda _: sharded)
    with pytest.raises(TrainingStopped, match="nothing was saved" if sharded else "step 0, saved"):
        train(tiny_run(), extra_callbacks=[StopAtOnce()])
    assert Path("runs/demo/checkpoints/last.ckpt").exists() is not sharded


def test_checkpoints_hold_plain_data_and_tensors_only() -> None:
    train(tiny_run("trainer.max_steps=8"))
    path = Path("runs/demo/checkpoints/best.ckpt")
    checkpoint = torch.load(path, weights_only=True)

    def check(value: Any, where: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                check(item, f"{where}.{key}")
        elif isinstance(value, (list, tuple)):
            for item in value:
                check(item, where)
        else:
            assert type(value) in (int, float, str, bool, type(None), torch.Tensor), (where, type(value))

    check(checkpoint, "checkpoint")
    # Lightning itself can load it as well.
    assert torch.load(io.BytesIO(path.read_bytes()), weights_only=True)["global_step"] == 8


def test_keep_large_blocks_respects_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert keep_large_blocks() is False
