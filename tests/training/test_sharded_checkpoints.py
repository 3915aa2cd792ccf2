"""Sharded checkpoints resume on other numbers of ranks, convert, and are replaced only when complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import rank_arguments, run_processes, run_ranks
from tests.support.sharded_worker import train_until_save
from tests.support.training_runs import working_in, write_text
from tnnlm.checkpoints.shards import SHARDS, assemble
from tnnlm.checkpoints.training import from_attached, load_checkpoint, read_checkpoint, read_intact
from tnnlm.errors import CheckpointError
from tnnlm.training.loggers.csv import read_metrics

COMMON = (
    "data.max_val_tokens=544",
    "trainer.precision=32-true",
    "trainer.val_every_n_steps=6",
    "trainer.log_every_n_steps=1",
    "trainer.sample_tokens=0",
    "checkpoint.every_n_steps=3",
)
SHARDED = ("trainer.strategy=fsdp", "checkpoint.format=sharded")
RUN = Path("runs/sharded/checkpoints")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with a run of 12 steps on one process, and a sharded one of 6 steps on 2 x 2 ranks."""
    with working_in(tmp_path_factory.mktemp("sharded")) as path:
        write_text()
        run_ranks(1, *COMMON, "trainer.max_steps=12", "name=one")
        hybrid = ("trainer.strategy=hsdp", "trainer.shard_size=2", "data.batch_size=1")
        run_ranks(4, *COMMON, *SHARDED, *hybrid, "trainer.max_steps=6", "name=sharded")
        yield path


@pytest.fixture(autouse=True)
def _copy(folder: Path, tmp_path: Path) -> Iterator[None]:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with working_in(tmp_path):
        yield


def losses(name: str) -> list[float]:
    rows = read_metrics(Path(f"runs/{name}/metrics.csv"))
    return [float(row["train/loss"]) for row in rows if row["train/loss"]]


def assert_only_used_shards(checkpoints: Path) -> None:
    """Assert that a checkpoint refers to every folder of shards."""
    named = [read_checkpoint(file).get(SHARDS) for file in checkpoints.glob("*.ckpt")]
    used = {shards["folder"] for shards in named if shards is not None}
    assert {found.name for found in checkpoints.glob("*.shards")} == used


def test_shards_of_four_ranks_resume_on_two_and_on_one_and_convert(script: Any) -> None:
    index = read_intact(RUN / "last.ckpt")
    assert index["state_dict"] == {}
    assert len(index[SHARDS]["files"]) == 4
    # best.ckpt is of the same step as last.ckpt, and only previous.ckpt needs other shards.
    assert read_checkpoint(RUN / "best.ckpt")[SHARDS] == index[SHARDS]
    assert len(list(RUN.glob("*.shards"))) <= 2
    assert script("convert", "runs/sharded", "--verify").code == 0
    run_ranks(
        2,
        *SHARDED,
        "trainer.shard_size=auto",
        "data.batch_size=2",
        "trainer.max_steps=9",
        resume="runs/sharded",
    )
    assert len(read_intact(RUN / "last.ckpt")[SHARDS]["files"]) == 2
    one = ("trainer.strategy=auto", "checkpoint.format=file", "data.batch_size=4", "trainer.max_steps=12")
    run_ranks(1, *one, resume="runs/sharded")
    assert_only_used_shards(RUN)
    assert losses("sharded") == pytest.approx(losses("one"), abs=1e-5, rel=0)
    files = [Path(f"runs/{name}/checkpoints/last.ckpt") for name in ("sharded", "one")]
    mine, expected = (from_attached(load_checkpoint(file)).model.state_dict() for file in files)
    for key, value in expected.items():
        torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-6)
    states = [torch.load(file, weights_only=True)["optimizer_states"][0]["state"] for file in files]
    assert states[0].keys() == states[1].keys()
    for number, moments in states[1].items():
        assert states[0][number]["step"] == moments["step"] == 12
        torch.testing.assert_close(states[0][number]["exp_avg"], moments["exp_avg"], rtol=1e-3, atol=1e-6)


def test_uneven_shards_equal_the_single_file() -> None:
    kernel = ("model.kernel.name=sgconv", "model.kernel.kernel_dim=8", "conversion.method=window")
    words = (*COMMON, *kernel, "trainer.strategy=fsdp", "data.batch_size=1", "trainer.max_steps=3")
    for form in ("file", "sharded"):
        run_ranks(3, *words, f"checkpoint.format={form}", f"name={form}3")
    # Two ranks load the shards of three.
    run_ranks(2, "trainer.max_steps=4", resume="runs/sharded3")
    run_ranks(2, "trainer.max_steps=4", resume="runs/file3")
    for name in ("previous.ckpt", "last.ckpt"):
        paths = [Path(f"runs/{form}3/checkpoints/{name}") for form in ("file", "sharded")]
        one, mine = (assemble(path, read_checkpoint(path)) for path in paths)
        assert one["global_step"] == mine["global_step"]
        states = (one["state_dict"], mine["state_dict"])
        torch.testing.assert_close(*states, rtol=0, atol=0)
        moments = [dict(found["optimizer_states"][0]["state"]) for found in (one, mine)]
        torch.testing.assert_close(*moments, rtol=0, atol=0)
        groups = [found["optimizer_states"][0]["param_groups"] for found in (one, mine)]
        assert [group["params"] for group in groups[0]] == [group["params"] for group in groups[1]]


@pytest.mark.parametrize("fault", ["kill", "full"])
def test_a_failed_save_keeps_the_checkpoint_before_it(fault: str) -> None:
    words = (*COMMON, *SHARDED, "data.batch_size=2", "trainer.max_steps=9", "trainer.val_every_n_steps=9")
    arguments = [(fault, 6, *given) for given in rank_arguments(2, *words, "name=failed")]
    codes = run_processes(train_until_save, arguments)
    assert all(codes)
    last = Path("runs/failed/checkpoints/last.ckpt")
    assert read_intact(last)["global_step"] == 3
    if fault == "full":
        assert "resume from step 3 with" in Path("rank0.log").read_text()
    run_ranks(2, "trainer.max_steps=9", resume="runs/failed")
    assert read_intact(last)["global_step"] == 9
    assert losses("failed") == pytest.approx(losses("one")[:9], abs=1e-5, rel=0)
    assert_only_used_shards(last.parent)  # the incomplete ones of step 6 are deleted


def test_damaged_and_foreign_shards_are_refused(script: Any) -> None:
    index = read_checkpoint(RUN / "last.ckpt")
    shard = RUN / index[SHARDS]["folder"] / next(iter(index[SHARDS]["files"]))
    intact = shard.read_bytes()
    foreign = shard.with_name("foreign.safetensors")
    foreign.write_bytes(intact)
    with pytest.raises(CheckpointError, match=r"has no shard .*foreign\.safetensors"):
        read_checkpoint(RUN / "last.ckpt")
    foreign.unlink()
    shard.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    refused = script("train", "--resume", "runs/sharded", "trainer.max_steps=12")
    assert refused.code == 2
    assert f"{shard}: is damaged or was replaced (its checksum differs)" in refused.err
    assert "previous.ckpt of step" in refused.err
    shard.unlink()
    missing = script("convert", "runs/sharded")
    assert (missing.code, missing.err.count("\n")) == (2, 1)
    assert f"{shard}: is missing" in missing.err
    for change in (
        {"folder": "../elsewhere"},
        {"folder": ".."},
        {"files": {"../a.safetensors": (1, "")}},
        {"files": 3},
    ):
        torch.save({**index, SHARDS: {**index[SHARDS], **change}}, RUN / "other.ckpt")
        with pytest.raises(CheckpointError, match=r"other\.ckpt: is corrupt"):
            read_checkpoint(RUN / "other.ckpt")
    shard.write_bytes(intact)
    flat = {name: [torch.Size(shape).numel()] for name, shape in index[SHARDS]["shapes"].items()}
    for change in ({"shapes": flat}, {"parameters": []}):
        with pytest.raises(CheckpointError, match="is corrupt"):
            assemble(RUN / "last.ckpt", {**index, SHARDS: {**index[SHARDS], **change}})


def test_shards_need_a_sharded_model(script: Any) -> None:
    result = script("train", "checkpoint.format=sharded", "trainer.accelerator=cpu", "name=refused")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "checkpoint.format=sharded: is not supported by trainer.strategy=auto" in result.err
